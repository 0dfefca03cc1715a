"""LLaVA-OneVision against `transformers` on the same checkpoint and the same pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_onevision import MAX_TILES, PINPOINTS, SIDE, SPECIAL_IDS, OnevisionOracle, build

from sparsevila import UnsupportedModel
from sparsevila.engine.runner import Runner, Span, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.models.chatml import ChatMLPrompt
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import Frames, Special, VisualInputs
from sparsevila.models.llava_onevision import OnevisionConfig
from sparsevila.models.registry import load_model

SIZES = [(50, 50), (31, 77), (77, 31), (200, 90), (113, 112), (40, 300), (9, 8), (190, 210), (500, 480), (60, 1)]
GRID = SIDE // 14
TEXT_A, TEXT_B, TEXT_C = TextSpan((321, 40, 41, 42)), TextSpan((13, 50)), TextSpan((13, 60, 61, 62, 63, 64))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> OnevisionOracle:
    return build(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def model(oracle: OnevisionOracle) -> Any:
    return load_model(Checkpoint.open(oracle.folder), dtype=torch.float32, device=torch.device("cpu"))


def frames(*shape: int, kind: Any = "image", seed: int = 0) -> Frames:
    """Noise over a gradient: every resampling error shows."""
    T, H, W = shape if kind == "video" else (1, *shape)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:H, 0:W]
    base = np.stack([y * 255 // max(H, 2), x * 255 // max(W, 2), (x + y) % 256], axis=-1)
    rgb = ((base + rng.integers(0, 60, (T, H, W, 3))) % 256).astype(np.uint8)
    return Frames(kind, rgb, np.arange(T, dtype=float), "<test>", float(T), key=f"{kind}{shape}{seed}")


class TestPreprocessing:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_pixels_equal_transformers(self, model: Any, size: tuple[int, int]) -> None:
        from PIL import Image as Pillow
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        processor = LlavaOnevisionImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS, image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )  # fmt: skip
        picture = frames(*size)
        theirs = processor(Pillow.fromarray(picture.rgb[0]), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(model.vision_tower.scale(model.preprocess(picture).pixels), theirs)

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_token_counts_equal_transformers(self, oracle: OnevisionOracle, model: Any, size: tuple[int, int]) -> None:
        inputs = model.preprocess(frames(*size))
        with torch.inference_mode():
            theirs = oracle.hf.model.get_image_features(
                model.vision_tower.scale(inputs.pixels),
                torch.tensor([size]),
                vision_aspect_ratio=f"anyres_max_{MAX_TILES}",
            ).pooler_output[0]
            ours = model.embed_visual(model.encode(inputs))
        assert len(inputs.token_map) == len(theirs)
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()

    def test_a_picture_of_many_tiles_is_scaled_down(self, model: Any) -> None:
        """500 x 480 is laid out on 4 x 4 tiles of 3 x 3 patches; the padding of 4 % goes on both sides."""
        *_, rows_before, cols_before, rows, cols = model.preprocess(frames(500, 480)).layout
        assert (rows_before, cols_before) == (12, 12)
        assert (rows, cols) == (6, 6)

    def test_boxes_point_at_the_source(self, model: Any) -> None:
        """A white square on black: the cells that differ from black are those whose boxes meet the square."""
        rgb = np.zeros((1, 40, 95, 3), dtype=np.uint8)
        rgb[0, 10:18, 55:66] = 255
        inputs = model.preprocess(Frames("image", rgb, np.zeros(1), "<test>", 0.0, "square"))
        y0, x0, y1, x1 = inputs.token_map.box.unbind(1)
        meets = (y0 < 18 / 40) & (y1 > 10 / 40) & (x0 < 66 / 95) & (x1 > 55 / 95)
        patches = model.vision_tower.embed(inputs.pixels) - model.vision_tower.embed(torch.zeros_like(inputs.pixels))
        source = patches.flatten(0, 1).abs().amax(dim=1)[GRID * GRID :] > 1e-6
        tile_cols, top, left, rows, cols, *_ = inputs.layout
        canvas = source.view(-1, tile_cols, GRID, GRID).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        bright = canvas[top : top + rows, left : left + cols]
        cells = ~inputs.token_map.structural
        cells[: GRID * GRID] = False
        assert bright.any()
        assert not (bright.flatten() & ~meets[cells]).any()
        assert meets[cells].sum() <= 2 * bright.sum()  # cells that only touch the edge stay dark

    def test_a_clip_ends_with_one_newline(self, model: Any) -> None:
        tokens = model.encode(model.preprocess(frames(3, 48, 64, kind="video")))
        assert len(tokens) == 3 * model.tokens_per_frame() + 1
        assert tokens.token_map.structural.tolist() == [False] * (len(tokens) - 1) + [True]
        assert tokens.token_map.frame.tolist() == [i // 4 for i in range(12)] + [2]
        assert tokens.saliency is not None
        assert tokens.saliency[-1] == 0
        assert (tokens.saliency[:-1] > 0).all()


def assert_equal_generation(oracle: OnevisionOracle, model: Any, media: list[Frames], steps: int) -> None:
    """Logits of greedy steps within 1e-4 of the largest, tokens identical, from one prefill."""
    inputs = [model.preprocess(item) for item in media]
    spans: list[Span] = [TEXT_A]
    for i, item in enumerate(inputs):
        spans += [TEXT_B] if i else []
        spans.append(VisualSpan(model.encode(item)))
    spans.append(TEXT_C)
    feeds = hf_inputs(model, spans, inputs, media)
    with torch.inference_mode():
        theirs = oracle.hf.generate(
            **feeds, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    runner = Runner(model, chunk_tokens=50)
    cache = runner.new_cache()
    total = sum(len(span) for span in spans)
    cache.reserve(visual=total, text=total + steps)
    logits = runner.logits(runner.prefill(cache, spans, method=Method()).hidden)
    tokens = []
    for want in theirs.logits:
        error = (logits - want[0]).abs().max() / want[0].abs().max()
        assert error < 1e-4, f"step {len(tokens)}: relative error {error:.1e}"
        tokens.append(int(logits.argmax()))
        logits = runner.decode(cache, tokens[-1])
    assert tokens == theirs.sequences[0, feeds["input_ids"].shape[1] :].tolist()
    assert len(tokens) == steps


def hf_inputs(model: Any, spans: list[Span], inputs: list[VisualInputs], media: list[Frames]) -> dict[str, Any]:
    flat: list[int] = []
    kinds = iter(media)
    for span in spans:
        flat += span.ids if isinstance(span, TextSpan) else [SPECIAL_IDS[f"<{next(kinds).kind}>"]] * len(span)
    feeds: dict[str, Any] = {
        "input_ids": torch.tensor([flat]),
        "attention_mask": torch.ones(1, len(flat), dtype=torch.long),
    }
    pixels = {
        kind: [model.vision_tower.scale(p.pixels) for p in inputs if p.kind == kind] for kind in ("image", "video")
    }
    if pixels["image"]:
        most = max(map(len, pixels["image"]))
        padded = [torch.cat([p, torch.zeros(most - len(p), *p.shape[1:])]) for p in pixels["image"]]
        feeds["pixel_values"] = torch.stack(padded)
        feeds["image_sizes"] = torch.tensor([item.rgb.shape[1:3] for item in media if item.kind == "image"])
        feeds["batch_num_images"] = torch.ones(len(padded), dtype=torch.long)
        feeds["vision_aspect_ratio"] = f"anyres_max_{MAX_TILES}"
    if pixels["video"]:
        feeds["pixel_values_videos"] = torch.stack(pixels["video"])
    return feeds


class TestAgainstTransformers:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_one_image(self, oracle: OnevisionOracle, model: Any, size: tuple[int, int]) -> None:
        assert_equal_generation(oracle, model, [frames(*size)], 64 if size == (31, 77) else 4)

    def test_two_images_and_a_clip(self, oracle: OnevisionOracle, model: Any) -> None:
        media = [frames(31, 77), frames(8, 48, 64, kind="video"), frames(190, 210, seed=1)]
        assert_equal_generation(oracle, model, media, 64)

    def test_no_media_and_a_tied_head(self, tmp_path: Any) -> None:
        tied = build(tmp_path, tied=True)
        loaded = load_model(Checkpoint.open(tied.folder), dtype=torch.float32, device=torch.device("cpu"))
        assert_equal_generation(tied, loaded, [], 8)


def test_the_prompt_is_the_template() -> None:
    """`chat_template.json` of llava-hf/llava-onevision-qwen2-7b-ov-hf, by hand; media before the text."""
    prompt = ChatMLPrompt(behind_media="\n")
    pieces = [
        *prompt.opening(first=True, system=None), "<image>", *prompt.question("Q?", after_media=True), "A",
        *prompt.closing(), *prompt.opening(first=False, system=None), *prompt.question("R?", after_media=False),
    ]  # fmt: skip
    text = "".join(piece.name if isinstance(piece, Special) else piece for piece in pieces)
    assert text == (
        "<|im_start|>user\n<image>\nQ?<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_another_way_to_lay_out_pictures_is_refused(oracle: OnevisionOracle) -> None:
    checkpoint = Checkpoint.open(oracle.folder)
    checkpoint.config["vision_aspect_ratio"] = "anyres"
    with pytest.raises(UnsupportedModel, match="anyres_max_N"):
        OnevisionConfig.from_hf(checkpoint)
