"""LLaVA-NeXT and LLaVA-NeXT-Video against `transformers` on the same checkpoint and the same pixels."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from oracles import IMAGE_TOKEN, TINY, VIDEO_TOKEN, Oracle

from sparsevila.engine.runner import Runner, Span, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import Frames, VisualInputs
from sparsevila.models.llava_next import LlavaNext, LlavaNextConfig
from sparsevila.models.registry import load_model

# What the real models make of a picture (336 px tiles): (H, W) -> tiles, rows, columns, tokens.
REAL_COUNTS = {
    (336, 336): (3, 24, 24, 1176), (1, 1): (3, 24, 24, 1176), (480, 640): (5, 36, 48, 2340),
    (768, 1024): (5, 36, 48, 2340), (640, 480): (5, 48, 36, 2352), (1080, 1920): (5, 28, 48, 1948),
    (1920, 1080): (5, 48, 28, 1968), (672, 672): (5, 48, 48, 2928), (2000, 2000): (5, 48, 48, 2928),
    (100, 1000): (4, 8, 72, 1160), (1000, 100): (4, 72, 8, 1224), (37, 53): (3, 24, 34, 1416),
    (333, 500): (3, 24, 36, 1464), (1000, 3): (4, 72, 0, 648),
}  # fmt: skip
SMALL_SIZES = [(31, 77), (56, 56), (200, 90), (113, 112), (40, 300), (9, 8)]


def frames(*shape: int, kind: str = "image", seed: int = 0) -> Frames:
    """Noise over a gradient: every resampling error shows."""
    shape = shape if kind == "video" else (1, *shape)
    T, H, W = shape
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:H, 0:W]
    base = np.stack([y * 255 // max(H, 2), x * 255 // max(W, 2), (x + y) % 256], axis=-1)
    rgb = ((base + rng.integers(0, 60, (T, H, W, 3))) % 256).astype(np.uint8)
    return Frames(kind, rgb, np.arange(T, dtype=float), "<test>", float(T), key=f"{kind}{shape}{seed}")


def load(oracle: Oracle) -> Any:
    return load_model(Checkpoint.open(oracle.folder), dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def real_size() -> LlavaNext:
    """A LLaVA-NeXT of the real picture sizes, on meta: only its preprocessing is used."""
    config: dict[str, Any] = {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "text_config": {"model_type": "llama", "num_hidden_layers": 1},
        "vision_config": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 2, "image_size": 336,
                          "patch_size": 14},
    }  # fmt: skip

    class Folder:
        def __init__(self) -> None:
            self.config = config

        def read_json(self, name: str, **_: Any) -> None:
            return None

    with torch.device("meta"):
        return LlavaNext(LlavaNextConfig.from_hf(Folder()))  # type: ignore[arg-type]


def hf_processor(size: int, pinpoints: list[list[int]]) -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    return LlavaNextImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_grid_pinpoints=pinpoints
    )


class TestPreprocessing:
    @pytest.mark.parametrize("size", REAL_COUNTS, ids=str)
    def test_pixels_and_counts_equal_transformers(self, real_size, size):
        from PIL import Image

        picture = frames(*size)
        inputs = real_size.preprocess(picture)
        theirs = hf_processor(336, [list(p) for p in real_size.config.pinpoints])(
            Image.fromarray(picture.rgb[0]), return_tensors="pt"
        )
        assert torch.equal(inputs.pixels, theirs["pixel_values"][0])
        tiles, rows, cols, tokens = REAL_COUNTS[size]
        assert inputs.pixels.shape == (tiles, 3, 336, 336)
        assert inputs.layout[-2:] == (rows, cols)
        assert len(inputs.token_map) == tokens
        assert int(inputs.token_map.structural.sum()) == rows

    def test_video_frames_equal_clip_processor(self, real_size):
        from PIL import Image
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        for shape in [(2, 240, 320), (1, 500, 333), (3, 64, 64)]:
            clip = frames(*shape, kind="video")
            inputs = real_size.preprocess(clip)
            processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
            theirs = processor([Image.fromarray(f) for f in clip.rgb], return_tensors="pt")["pixel_values"]
            assert torch.equal(inputs.pixels, theirs)
            assert len(inputs.token_map) == 144 * shape[0]

    def test_token_map_points_at_the_source(self, real_size):
        """A white square on black: the tokens whose patches are bright are those whose boxes meet the square."""
        rgb = np.zeros((1, 300, 500, 3), dtype=np.uint8)
        rgb[0, 60:120, 350:420] = 255
        inputs = real_size.preprocess(Frames("image", rgb, np.zeros(1), "<test>", 0.0, "square"))
        tile_cols, top, left, rows, cols = inputs.layout
        canvas = inputs.pixels[1:, 0].unflatten(0, (-1, tile_cols)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        patches = canvas.unfold(0, 14, 14).unfold(1, 14, 14).amax(dim=(-1, -2))
        bright = (patches > 1.5)[top : top + rows, left : left + cols]
        box = inputs.token_map.box[576:].unflatten(0, (rows, cols + 1))[:, :-1]
        y0, x0, y1, x1 = box.unbind(-1)
        meets = (y0 < 120 / 300) & (y1 > 60 / 300) & (x0 < 420 / 500) & (x1 > 350 / 500)
        assert bright.sum() > 4
        assert (bright & ~meets).sum() == 0
        assert (meets & ~bright).sum() <= meets.sum() * 0.5  # patches that only touch the edge stay dark

    def test_pinpoints_that_disagree_are_refused(self, real_size):
        from sparsevila import CorruptCheckpoint

        class Folder:
            config: ClassVar[dict[str, Any]] = {
                "model_type": "llava_next", "text_config": {}, "vision_config": {"image_size": 336, "patch_size": 14}
            }  # fmt: skip

            def read_json(self, name: str) -> dict[str, Any]:
                return {"image_grid_pinpoints": [[336, 336]]}

        with pytest.raises(CorruptCheckpoint, match="image_grid_pinpoints"):
            LlavaNextConfig.from_hf(Folder())  # type: ignore[arg-type]


def ids(*tokens: int) -> TextSpan:
    return TextSpan(tokens)


TEXT_A, TEXT_B, TEXT_C = ids(1, 40, 41, 42), ids(13, 50), ids(13, 60, 61, 62, 63, 64)


def hf_inputs(spans: list[Span], pixels: list[VisualInputs], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Our spans as `transformers` takes them: one id per visual token, all tiles padded to one count."""
    flat: list[int] = []
    visual = iter(pixels)
    for span in spans:
        if isinstance(span, TextSpan):
            flat += span.ids
        else:
            flat += [VIDEO_TOKEN if next(visual).kind == "video" else IMAGE_TOKEN] * len(span)
    result: dict[str, Any] = {
        "input_ids": torch.tensor([flat]),
        "attention_mask": torch.ones(1, len(flat), dtype=torch.long),
    }
    images = [p.pixels for p in pixels if p.kind == "image"]
    videos = [p.pixels for p in pixels if p.kind == "video"]
    if images:
        most = max(len(p) for p in images)
        padded = [torch.cat([p, torch.zeros(most - len(p), *p.shape[1:])]) for p in images]
        result["pixel_values"] = torch.stack(padded)
        result["image_sizes"] = torch.tensor(sizes)
    if videos:
        result["pixel_values_videos"] = torch.stack(videos)
    return result


def assert_equal_generation(oracle: Oracle, media: list[Frames], steps: int = 64) -> None:
    """Logits of `steps` greedy steps within 1e-4 of the largest, tokens identical, from one prefill."""
    model = load(oracle)
    inputs = [model.preprocess(item) for item in media]
    spans: list[Span] = [TEXT_A]
    for i, item in enumerate(inputs):
        spans += [TEXT_B] if i else []
        spans.append(VisualSpan(model.encode(item)))
    spans.append(TEXT_C)
    feeds = hf_inputs(spans, inputs, [item.rgb.shape[1:3] for item in media if item.kind == "image"])
    with torch.inference_mode():
        theirs = oracle.hf.generate(
            **feeds, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    want_tokens = theirs.sequences[0, feeds["input_ids"].shape[1] :].tolist()
    runner = Runner(model, chunk_tokens=50)
    cache = runner.new_cache()
    total = sum(len(s) for s in spans)
    cache.reserve(visual=total, text=total + steps)
    logits = runner.logits(runner.prefill(cache, spans, method=Method()).hidden)
    got_tokens = []
    for want in theirs.logits:
        error = (logits - want[0]).abs().max() / want[0].abs().max()
        assert error < 1e-4, f"step {len(got_tokens)}: relative error {error:.1e}"
        got_tokens.append(int(logits.argmax()))
        logits = runner.decode(cache, got_tokens[-1])
    assert len(want_tokens) == steps
    assert got_tokens == want_tokens


class TestAgainstTransformers:
    @pytest.mark.parametrize("name", TINY)
    def test_no_media(self, oracles, name):
        assert_equal_generation(oracles[name], [])

    @pytest.mark.parametrize("name", TINY)
    @pytest.mark.parametrize("size", SMALL_SIZES, ids=str)
    def test_one_image(self, oracles, name, size):
        assert_equal_generation(oracles[name], [frames(*size)], steps=64 if size == (31, 77) else 4)

    @pytest.mark.parametrize("name", TINY)
    def test_two_images(self, oracles, name):
        assert_equal_generation(oracles[name], [frames(31, 77), frames(90, 60, seed=1)])

    @pytest.mark.parametrize("name", ["video", "mistral-video"])
    def test_eight_frames(self, oracles, name):
        assert_equal_generation(oracles[name], [frames(8, 48, 64, kind="video")])

    def test_a_wrong_position_would_show(self, oracles):
        """The comparison can fail: shifting every position by one changes nothing, skipping one does."""
        model = load(oracles["vicuna"])
        logits = []
        for skip in (0, 3):
            runner = Runner(model)
            cache = runner.new_cache()
            cache.reserve(text=20)
            runner.prefill(cache, [TEXT_A], method=Method())
            cache.next_position += skip
            logits.append(runner.logits(runner.prefill(cache, [TEXT_C], method=Method()).hidden))
        assert (logits[0] - logits[1]).abs().max() / logits[0].abs().max() > 0.01
