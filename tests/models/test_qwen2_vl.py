"""Qwen2-VL and Qwen2.5-VL against `transformers` on the same checkpoint and the same pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import write_clip
from safetensors.torch import load_file
from tiny_qwen import SPECIAL_IDS, QwenOracle, build
from tiny_qwen import config as tiny_config
from torch import Tensor

from sparsevila import (
    ContextTooLong,
    CorruptCheckpoint,
    Engine,
    Image,
    InvalidRequest,
    SamplingParams,
    Session,
    SparseVILAError,
    Sparsity,
    Video,
)
from sparsevila.engine.config import Result
from sparsevila.engine.runner import Runner, Span, TextSpan, VisualSpan, _parts
from sparsevila.engine.sparsity.base import Method
from sparsevila.errors import ImageTooNarrow
from sparsevila.models.checkpoint import Checkpoint, ConfigReader
from sparsevila.models.decoder import DecoderConfig
from sparsevila.models.interface import Frames, Progress, TokenMap, VisualInputs
from sparsevila.models.qwen2_vl import PixelLimits, Qwen2VL, Qwen2VLConfig, smart_resize, video_limits
from sparsevila.models.registry import load_model

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "qwen"
CPU = torch.device("cpu")
MODELS = ("qwen2", "qwen2-tied", "qwen2.5", "qwen2.5-tied")
START, END = SPECIAL_IDS["<|vision_start|>"], SPECIAL_IDS["<|vision_end|>"]
PADS = {"image": SPECIAL_IDS["<|image_pad|>"], "video": SPECIAL_IDS["<|video_pad|>"]}


@pytest.fixture(scope="module")
def qwens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QwenOracle]:
    """Both generations, with a head of their own and with the embedding as head."""
    found = {}
    for name in MODELS:
        generation, _, tied = name.partition("-")
        found[name] = build(tmp_path_factory.mktemp(name), generation=generation, tied=bool(tied))
    return found


def load(oracle: QwenOracle, **changes: Any) -> Any:
    model: Any = load_model(Checkpoint.open(oracle.folder), dtype=torch.float32, device=CPU)
    for name, value in changes.items():
        setattr(model, name, value)
    return model


def frames(*shape: int, kind: str = "image", seed: int = 0, fps: float = 2.0) -> Frames:
    """Noise over a gradient: every resampling error shows."""
    shape = shape if kind == "video" else (1, *shape)
    T, H, W = shape
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:H, 0:W]
    base = np.stack([y * 255 // max(H, 2), x * 255 // max(W, 2), (x + y) % 256], axis=-1)
    rgb = ((base + rng.integers(0, 60, (T, H, W, 3))) % 256).astype(np.uint8)
    return Frames(kind, rgb, np.arange(T) / fps, "<test>", T / fps, key=f"{kind}{shape}{seed}")


# The whole model


def ids(*tokens: int) -> TextSpan:
    return TextSpan(tokens)


TEXT_A, TEXT_B, TEXT_C = ids(1, 40, 41, 42), ids(13, 50), ids(13, 60, 61, 62, 63, 64)


def grid_of(inputs: VisualInputs) -> list[int]:
    return list(inputs.layout)


def hf_inputs(model: Any, spans: Sequence[Span], media: Sequence[VisualInputs]) -> dict[str, Any]:
    """Our spans as `transformers` takes them: markers around one id for each token, patches, grids."""
    flat: list[int] = []
    visual = iter(media)
    for span in spans:
        if isinstance(span, TextSpan):
            flat += span.ids
        else:
            flat += [START, *[PADS[next(visual).kind]] * (len(span) - 2), END]
    tokens = torch.tensor([flat])
    types = (tokens == PADS["image"]).int() + 2 * (tokens == PADS["video"]).int()
    result: dict[str, Any] = {"input_ids": tokens, "mm_token_type_ids": types}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")
    ):  # fmt: skip
        of_kind = [item for item in media if item.kind == kind]
        if of_kind:
            result[pixels] = torch.cat([model.patches(item.pixels).flatten(0, 1) for item in of_kind])
            result[grids] = torch.tensor([grid_of(item) for item in of_kind])
    return result


def our_positions(model: Any, spans: Sequence[Span]) -> Tensor:
    """(3, M), and 64 more of the answer."""
    return Runner(model)._positions([*_parts(spans), 64], 0)[0]


def chosen(logits: Tensor) -> Tensor:
    """The likeliest token of each row, media tokens aside: `transformers` would look for the pixels of one."""
    return logits.index_fill(-1, torch.tensor([*PADS.values()]), -torch.inf).argmax(-1)


def greedy(
    model: Any, spans: Sequence[Span], steps: int, choose: Callable[[Tensor], Tensor] = chosen
) -> tuple[list[int], Tensor]:
    """Tokens and logits (steps, V) of a greedy answer; its prefill is in chunks, each token then one of its own."""
    runner = Runner(model, chunk_tokens=50)
    cache = runner.new_cache()
    total = sum(len(s) for s in spans)
    cache.reserve(visual=total, text=total + steps)
    tokens: list[int] = []
    logits: list[Tensor] = []
    while len(tokens) < steps:
        logits.append(runner.logits(runner.prefill(cache, spans, method=Method()).hidden))
        tokens.append(int(choose(logits[-1])))
        spans = [TextSpan((tokens[-1],))]
    return tokens, torch.stack(logits)


@torch.inference_mode()
def assert_equal_generation(oracle: QwenOracle, media: Sequence[Frames], steps: int = 64) -> None:
    """64 greedy tokens are those of `transformers`, every step's logits within 1e-4 of the largest.

    It gets our tokens at once: its choice at each step has to be the next of them. It makes the positions itself,
    unless there is a clip.
    """
    model = load(oracle)
    inputs = [model.preprocess(item) for item in media]
    spans: list[Span] = [TEXT_A]
    for i, item in enumerate(inputs):
        spans += [TEXT_B] if i else []
        spans.append(VisualSpan(model.encode(item)))
    spans.append(TEXT_C)
    tokens, logits = greedy(model, spans, steps)
    feeds = hf_inputs(model, [*spans, TextSpan(tuple(tokens[:-1]))], inputs)
    if any(item.kind == "video" for item in media):
        feeds["position_ids"] = our_positions(model, spans)[:, None, : feeds["input_ids"].shape[1]]
    want = oracle.hf(**feeds).logits[0, -steps:]
    error = (logits - want).abs().amax(1) / want.abs().amax(1)
    assert error.max() < 1e-4, f"step {int(error.argmax())}: relative error {error.max():.1e}"
    assert len(tokens) == steps
    assert chosen(want).tolist() == tokens


SIZES = [(28, 28), (100, 100), (60, 300), (300, 60), (113, 112), (200, 90), (31, 77), (10, 10), (400, 640), (70, 42)]


class TestAgainstTransformers:
    @pytest.mark.parametrize("name", MODELS)
    def test_no_media(self, qwens, name):
        assert_equal_generation(qwens[name], [])

    @pytest.mark.parametrize("name", ["qwen2", "qwen2.5"])
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_one_image(self, qwens, name, size):
        assert_equal_generation(qwens[name], [frames(*size)])

    @pytest.mark.parametrize("name", MODELS)
    def test_several_images(self, qwens, name):
        assert_equal_generation(qwens[name], [frames(100, 200), frames(30, 40, seed=1), frames(200, 60, seed=2)])

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("num_frames", [1, 4, 5])
    def test_video(self, qwens, name, num_frames):
        assert_equal_generation(qwens[name], [frames(num_frames, 90, 120, kind="video")])

    @pytest.mark.parametrize("name", MODELS)
    def test_images_and_videos(self, qwens, name):
        clip, other = frames(5, 90, 120, kind="video"), frames(2, 60, 60, kind="video", seed=3, fps=0.7)
        assert_equal_generation(qwens[name], [frames(100, 200), clip, frames(50, 50, seed=1), other])


class TestEncoding:
    @pytest.mark.parametrize("name", ["qwen2", "qwen2.5"])
    @torch.inference_mode()
    def test_frames_go_through_the_tower_in_chunks(self, qwens, monkeypatch, name):
        """No more patches at once than there may be, or one pair of frames; the result is that of all at once."""
        model = load(qwens[name])
        clip = model.preprocess(frames(9, 90, 120, kind="video"))
        whole = model.encode(clip)
        per_pair = clip.layout[1] * clip.layout[2]
        for patches, pairs in ((1, [1] * 5), (2 * per_pair, [2, 2, 1]), (1 << 20, [5])):
            seen: list[int] = []
            steps: list[Progress] = []
            monkeypatch.setattr("sparsevila.models.qwen2_vl._PATCHES_PER_CHUNK", patches)
            hook = model.visual.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
            part = model.encode(clip, steps.append)
            hook.remove()
            assert seen == pairs
            assert [step.done for step in steps] == [*range(0, 9, 2 * pairs[0]), 9]
            for got, want in ((part.features, whole.features), (part.saliency, whole.saliency)):
                assert (got - want).abs().max() < 1e-5 * want.abs().max()

    def test_markers_have_no_saliency_and_their_own_embedding(self, qwens):
        model = load(qwens["qwen2.5"])
        tokens = model.encode(model.preprocess(frames(60, 90)))
        assert tokens.saliency[[0, -1]].tolist() == [0.0, 0.0]
        assert (tokens.saliency[1:-1] > 0).all()
        embedded = model.embed_visual(tokens)
        assert torch.equal(embedded[[0, -1]], model.decoder.embed(torch.tensor([START, END])))
        assert torch.equal(embedded[1:-1], tokens.features[1:-1])
        assert torch.equal(model.embed_visual(tokens.select(torch.tensor([2, len(tokens) - 1])))[1], embedded[-1])


# Clips against the last version of `transformers` whose positions are the models' own (tests/models/oracles/mrope.py)


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return json.loads((FIXTURES / "positions.json").read_text())


def noise(kind: str, part: dict[str, Any]) -> Frames:
    """The media of a fixture: (frames, height, width), the seed of its noise, its frames a second."""
    shape = part[kind]
    rgb = np.random.RandomState(part["seed"]).randint(0, 256, (*shape, 3)).astype(np.uint8)
    return Frames(kind, rgb, np.arange(shape[0]) / part.get("fps", 1.0), "<test>", 1.0, key=str(part))


class TestClipsAgainstTheModelsOwnPositions:
    @pytest.mark.parametrize("name", ["qwen2", "qwen2.5"])
    @pytest.mark.parametrize("case", ["clip", "odd clip, fractions", "slow clip", "mixed"])
    @torch.inference_mode()
    def test_pixels_positions_tokens_and_logits(self, qwens, known, name, case):
        stored = load_file(FIXTURES / f"{name}.safetensors")
        want = {key: stored[f"{case}/{key}"] for key in ("positions", "patches", "tokens", "logits")}
        model = load(qwens[name])
        spans: list[Span] = []
        patches: dict[str, list[Tensor]] = {"image": [], "video": []}
        for part in known["cases"][case]:
            kind = next(iter(part))
            if kind == "text":
                spans.append(TextSpan(tuple(part["text"])))
                continue
            inputs = model.preprocess(noise(kind, part))
            patches[kind].append(model.patches(inputs.pixels).flatten())
            spans.append(VisualSpan(model.encode(inputs)))
        assert torch.equal(torch.cat([*patches["image"], *patches["video"]])[:: known["patch_step"]], want["patches"])
        positions, _ = Runner(model)._positions(_parts(spans), 0)
        assert torch.equal(positions, want["positions"].long())
        tokens, logits = greedy(model, spans, len(want["tokens"]), choose=lambda row: row.argmax(-1))
        assert tokens == want["tokens"].tolist()
        error = (logits - want["logits"]).abs().amax(1) / want["logits"].abs().amax(1)
        assert error.max() < 1e-4

    @pytest.mark.parametrize("name", ["qwen2", "qwen2.5"])
    def test_positions_of_sequences(self, qwens, known, name):
        model = load(qwens[name])
        for sequence in known[name]:
            parts, start = [], 0
            for part in sequence["parts"]:
                if isinstance(part, int):
                    positions, start = model.text_positions(part, start)
                else:
                    times, rows, cols, seconds = part
                    token_map = inside(model._token_map((times, rows, cols), 2 * times, seconds or 0.0))
                    positions, start = model.visual_positions(token_map, start)
                parts.append(positions)
            assert torch.cat(parts, dim=1).tolist() == sequence["positions"], sequence["parts"]

    def test_times_of_long_clips(self, qwens, known):
        """400 patches: what float64 would give differs."""
        model = load(qwens["qwen2.5"])
        wide = 0
        for seconds, want in known["long_clips"].items():
            assert model.frame_times(400, float(seconds)).tolist() == [t - 1 for t in want]
            wide += sum(int(i * float(seconds) * 2) + 1 != t for i, t in enumerate(want))
        assert wide > 10


def inside(token_map: TokenMap) -> TokenMap:
    """Without the markers, which the fixtures count as text."""
    return token_map.select(torch.arange(1, len(token_map) - 1))


# Positions of what survived, by hand


def places(model: Any, keep: Sequence[int], start: int = 10) -> tuple[list[list[int]], int]:
    """Times, rows, columns of the tokens `keep` of a clip of 4 patches of 2 x 3, a second apart; the next position."""
    token_map = model._token_map((4, 4, 6), 8, 1.0)
    kept = token_map.select(torch.tensor([0, *[1 + i for i in keep], len(token_map) - 1]))
    positions, after = model.visual_positions(kept, start)
    assert positions[:, 0].tolist() == [start] * 3  # the marker before
    assert positions[:, -1].tolist() == [after - 1] * 3  # and the one behind
    return positions[:, 1:-1].tolist(), after


# Tokens of the clip by number: frame 0 has 0 to 5, frame 1 has 6 to 11. With 2 positions a second the frames stand at
# 11, 13, 15, 17. What is kept -> per policy times, rows, columns, and the position behind the marker.
BY_HAND = {
    "all of two frames": (
        range(6, 18),
        {
            "regrid": ([11] * 6 + [13] * 6, ([11] * 3 + [12] * 3) * 2, [11, 12, 13] * 4, 15),
            "original": ([13] * 6 + [15] * 6, ([11] * 3 + [12] * 3) * 2, [11, 12, 13] * 4, 19),
            "contiguous": (range(11, 23), range(11, 23), range(11, 23), 24),
        },
    ),
    "a row is gone": (
        [3, 5, 10, 23],
        {
            "regrid": ([11, 11, 13, 15], [11] * 4, [11, 13, 12, 13], 17),
            "original": ([11, 11, 13, 17], [12] * 4, [11, 13, 12, 13], 19),
            "contiguous": (range(11, 15), range(11, 15), range(11, 15), 16),
        },
    ),
    "a column is gone": (
        [1, 5, 7, 14, 22],
        {
            "regrid": ([11, 11, 13, 15, 17], [11, 12, 11, 11, 12], [11, 12, 11, 12, 11], 19),
            "original": ([11, 11, 13, 15, 17], [11, 12, 11, 11, 12], [12, 13, 12, 13, 12], 19),
            "contiguous": (range(11, 16), range(11, 16), range(11, 16), 17),
        },
    ),
    "one token": (
        [23],
        {
            "regrid": ([11], [11], [11], 13),
            "original": ([17], [12], [13], 19),
            "contiguous": ([11], [11], [11], 13),
        },
    ),
}


class TestSurvivors:
    @pytest.mark.parametrize("policy", ["regrid", "original", "contiguous"])
    @pytest.mark.parametrize("case", BY_HAND)
    def test_by_hand(self, qwens, case, policy):
        keep, want = BY_HAND[case]
        found, after = places(load(qwens["qwen2.5"], positions=policy), keep)
        *axes, behind = want[policy]
        assert found == [list(axis) for axis in axes]
        assert after == behind

    @pytest.mark.parametrize("policy", ["regrid", "original"])
    def test_nothing_moves_where_nothing_vanished(self, qwens, policy):
        """Every time, row and column keeps a token: survivors stand where they stood, and so does the text behind."""
        for name in ("qwen2", "qwen2.5"):
            model = load(qwens[name], positions=policy)
            whole, after = places(model, range(24))
            keep = [0, 4, 7, 11, 13, 14, 18, 23]
            found, behind = places(model, keep)
            assert found == [[axis[i] for i in keep] for axis in whole]
            assert behind == after

    def test_frames_that_share_a_time_are_one(self, qwens):
        """0.2 s apart the patches stand at 0, 0, 0, 1: without the first two nothing has vanished."""
        model = load(qwens["qwen2.5"])
        token_map = model._token_map((4, 4, 4), 8, 0.2)
        assert model.frame_times(4, 0.2).tolist() == [0, 0, 0, 1]
        kept = token_map.select(torch.arange(9, 17))
        assert model.visual_positions(kept, 0)[0][0].tolist() == [0] * 4 + [1] * 4

    def test_another_policy_is_refused(self, qwens):
        config = load(qwens["qwen2.5"]).config
        with torch.device("meta"), pytest.raises(InvalidRequest, match="positions: expected one of regrid, original"):
            Qwen2VL(config, positions="moved")  # type: ignore[arg-type]


# Preprocessing

# (H, W) -> resized (H, W) and tokens with the hub's limits, then with the class's.
REAL_SIZES = {
    (10, 10): (56, 56, 4, 4), (28, 28): (56, 56, 4, 4), (42, 70): (56, 56, 4, 4), (70, 42): (56, 56, 4, 4),
    (37, 53): (56, 84, 6, 6), (100, 1000): (112, 1008, 144, 144), (480, 640): (476, 644, 391, 391),
    (720, 1280): (728, 1288, 1196, 1196), (1080, 1920): (1092, 1932, 2691, 1222),
    (4000, 3000): (4004, 2996, 15301, 1230), (28, 5600): (28, 5600, 200, 200),
}  # fmt: skip
HUB_LIMITS, CLASS_LIMITS = PixelLimits(3136, 12845056), PixelLimits(3136, 1003520)
# Of a pair of frames, with the reference's limits for clips.
REAL_CLIPS = {(240, 320): 140, (360, 640): 299, (480, 640): 391, (720, 1280): 720, (1080, 1920): 720}


class Folder:
    """A checkpoint of config and JSON files alone."""

    def __init__(self, config: dict[str, Any], **files: dict[str, Any]) -> None:
        self.config = config
        self.files = files

    def read_json(self, name: str, **_: Any) -> dict[str, Any] | None:
        return self.files.get(name.removesuffix(".json"))


def model_of(folder: Folder) -> Qwen2VL:
    with torch.device("meta"):
        return Qwen2VL(Qwen2VLConfig.from_hf(folder))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def real_size() -> Qwen2VL:
    """A Qwen2.5-VL of the real picture sizes, on meta: only its preprocessing is used."""
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 3584,
        "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 1,
        "vision_config": {"depth": 8, "hidden_size": 1280},
    }  # fmt: skip
    return model_of(Folder(config, preprocessor_config={"min_pixels": 3136, "max_pixels": 12845056}))


def hf_patches(picture: np.ndarray, limits: PixelLimits) -> tuple[Tensor, list[int]]:
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=limits.least, max_pixels=limits.most)
    made = processor([Image.fromarray(picture)], return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"][0].tolist()


class TestPreprocessing:
    @pytest.mark.parametrize("size", REAL_SIZES, ids=str)
    def test_sizes_and_counts(self, size):
        *resized, tokens, class_tokens = REAL_SIZES[size]
        assert list(smart_resize(*size, 28, HUB_LIMITS)) == resized
        assert resized[0] * resized[1] // 784 == tokens
        assert np.prod(smart_resize(*size, 28, CLASS_LIMITS)) // 784 == class_tokens

    @pytest.mark.parametrize("size", [s for s in REAL_SIZES if s != (4000, 3000)], ids=str)
    def test_pixels_equal_transformers(self, real_size, size):
        picture = frames(*size)
        inputs = real_size.preprocess(picture)
        want, grid = hf_patches(picture.rgb[0], HUB_LIMITS)
        assert grid_of(inputs) == grid
        assert torch.equal(real_size.patches(inputs.pixels)[0], want)
        assert inputs.token_map.num_visual == REAL_SIZES[size][2]

    @pytest.mark.parametrize("num_frames", [1, 2, 5])
    def test_frames_stand_in_pairs(self, real_size, num_frames):
        """Each half of a patch is the picture of its frame, by the limits for clips; the last frame fills a pair."""
        clip = frames(num_frames, 90, 120, kind="video")
        inputs = real_size.preprocess(clip)
        want = torch.stack(
            [hf_patches(rgb, PixelLimits(100352, 602112))[0].unflatten(1, (3, 2, -1)) for rgb in clip.rgb]
        )
        got = real_size.patches(inputs.pixels).unflatten(2, (3, 2, -1))
        assert len(got) == -(-num_frames // 2)
        for i in range(2 * len(got)):
            assert torch.equal(got[i // 2, :, :, i % 2], want[min(i, num_frames - 1), :, :, 0])

    @pytest.mark.parametrize("size", REAL_CLIPS, ids=str)
    def test_tokens_of_a_pair_of_frames(self, real_size, size):
        tokens = np.prod(smart_resize(*size, 28, real_size.config.video_limits)) // 784
        assert tokens == REAL_CLIPS[size]
        assert real_size.tokens_per_frame() == 384 >= tokens / 2

    def test_a_long_clip_shares_its_budget(self):
        """By the reference: 90 % of 128,000 tokens for all frames, at least 1.05 times the least area for each."""
        limits = PixelLimits(100352, 602112)
        assert video_limits(limits, 32, 28) == video_limits(limits, 300, 28) == limits
        assert video_limits(limits, 768, 28) == PixelLimits(100352, 235200)
        assert video_limits(limits, 5000, 28) == PixelLimits(100352, 105369)

    def test_too_narrow(self, real_size):
        with pytest.raises(ImageTooNarrow, match="200 to 1, got 5628 x 28"):
            real_size.preprocess(frames(28, 5628))

    def test_token_map_points_at_the_source(self, real_size):
        """A white square on black: the tokens whose patches are bright are those whose boxes meet the square."""
        rgb = np.zeros((1, 300, 500, 3), dtype=np.uint8)
        rgb[0, 60:120, 350:420] = 255
        inputs = real_size.preprocess(Frames("image", rgb, np.zeros(1), "<test>", 0.0, "square"))
        token_map = inside(inputs.token_map)
        patches = real_size.patches(inputs.pixels)[0].unflatten(0, (-1, 4))
        bright = patches.amax(dim=(1, 2)) > 1.5
        y0, x0, y1, x1 = token_map.box.unbind(-1)
        meets = (y0 < 120 / 300) & (y1 > 60 / 300) & (x0 < 420 / 500) & (x1 > 350 / 500)
        assert bright.sum() > 4
        assert (bright & ~meets).sum() == 0
        assert (meets & ~bright).sum() <= meets.sum() * 0.5  # tokens that only touch the edge stay dark

    def test_map_of_a_clip(self, real_size):
        clip = frames(5, 90, 120, kind="video", fps=4.0)
        token_map = real_size.preprocess(clip).token_map
        assert token_map.structural.tolist() == [True] + [False] * (len(token_map) - 2) + [True]
        per_pair = token_map.num_visual // 3
        assert inside(token_map).frame.tolist() == [0] * per_pair + [2] * per_pair + [4] * per_pair
        assert token_map.grid is not None
        assert token_map.grid.seconds.tolist() == [0.5] * len(token_map)
        index = inside(token_map).grid.index
        assert torch.equal(index, torch.cartesian_prod(*(torch.arange(n, dtype=torch.int32) for n in (3, 10, 14))))
        both = TokenMap.concat([token_map, token_map])
        assert torch.equal(both.grid.index, token_map.grid.index.repeat(2, 1))
        assert TokenMap.concat([]).grid is None


# Config

TINY_25 = tiny_config("qwen2.5")


class TestConfig:
    def test_class_defaults_fill_the_hub_awq_config(self):
        """A vision config that says no more than widths."""
        model = model_of(Folder({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 2048,
            "num_attention_heads": 16, "num_key_value_heads": 2, "num_hidden_layers": 1, "tie_word_embeddings": True,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": {
                "hidden_size": 1280, "in_chans": 3, "intermediate_size": 3456, "model_type": "qwen2_5_vl",
                "out_hidden_size": 2048, "spatial_patch_size": 14, "tokens_per_second": 2,
            },
        }))  # fmt: skip
        vision = model.config.vision
        assert (vision.num_layers, vision.num_heads, vision.window_side, vision.head_dim) == (32, 16, 4, 80)
        assert vision.full_layers == {7, 15, 23, 31}
        assert model.config.tokens_per_second == 2
        assert model.config.text.tie_word_embeddings
        assert model.config.text.rms_norm_eps == 1e-5
        assert (model.config.image_limits, model.config.video_limits.most) == (CLASS_LIMITS, 602112)

    def test_an_empty_config_is_that_of_the_classes(self):
        """All but the number of layers, for the sake of memory."""
        for kind, width in (("qwen2_vl", 1280), ("qwen2_5_vl", 3584)):
            with pytest.raises(CorruptCheckpoint, match="gives 3584 channels, the text model takes 8192"):
                model_of(Folder({"model_type": kind}))
            sizes = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
            config = Qwen2VLConfig.from_hf(Folder({"model_type": kind} | sizes))  # type: ignore[arg-type]
            assert config.text.num_layers == 80
            assert config.text.rope.theta == 1e6
            assert config.text.max_context == 32768
            assert config.vision.hidden_size == width
            assert config.tokens_per_second == (None if kind == "qwen2_vl" else 4)
            assert config.text.rope.sections == (16, 24, 24)

    @pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"])
    def test_class_defaults_of_the_text_part(self, kind):
        text = DecoderConfig.from_hf(ConfigReader({"model_type": kind}))
        assert (text.hidden_size, text.intermediate_size, text.num_layers) == (8192, 29568, 80)
        assert (text.num_heads, text.num_kv_heads, text.vocab_size) == (64, 8, 152064)
        assert text.qkv_bias

    def test_hidden_size_of_the_first_generation_is_the_width_that_comes_out(self):
        vision = model_of(Folder(tiny_config("qwen2"))).config.vision
        assert (vision.hidden_size, vision.out_hidden_size, vision.intermediate_size) == (48, 64, 96)
        assert vision.window_size is None

    @pytest.mark.parametrize("place", ["preprocessor files", "one file of transformers 5"])
    def test_limits_of_pictures_and_of_clips(self, place):
        image = {"min_pixels": 4 * 784, "max_pixels": 64 * 784, "size": {"shortest_edge": 1, "longest_edge": 2}}
        video = {"size": {"shortest_edge": 5 * 784, "longest_edge": 20 * 784}, "min_pixels": None}
        files = {"preprocessor_config": image, "video_preprocessor_config": video}
        if place != "preprocessor files":
            files = {"processor_config": {"image_processor": image, "video_processor": video}}
        config = model_of(Folder(TINY_25, **files)).config
        assert config.image_limits == PixelLimits(4 * 784, 64 * 784)
        assert config.video_limits == PixelLimits(5 * 784, 20 * 784)

    def test_limits_within_size_by_their_own_names(self):
        pre = {"size": {"min_pixels": 4 * 784, "max_pixels": 9 * 784}, "max_pixels": None}
        assert model_of(Folder(TINY_25, preprocessor_config=pre)).config.image_limits == PixelLimits(4 * 784, 9 * 784)

    @pytest.mark.parametrize(
        ("changes", "files", "message"),
        [
            ({}, {"preprocessor_config": {"patch_size": 16}}, "preprocessor_config.json: patch_size: expected 14"),
            ({}, {"preprocessor_config": {"min_pixels": 9, "max_pixels": 8}}, "min_pixels: expected at most"),
            ({}, {"preprocessor_config": {"image_mean": [1, 2]}}, "image_mean: expected three numbers"),
            ({"vision_start_token_id": -1}, {}, "vision_start_token_id: expected a whole number"),
            ({"vision_end_token_id": 334}, {}, "vision_end_token_id: expected a whole number from 0 to 333, got 334"),
            ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, {}, "of the sum 8, half of head_dim"),
            ({"rope_scaling": {"type": "longrope", "mrope_section": [2, 3, 3]}}, {}, "rope type 'longrope'"),
            ({"vision_config": {**TINY_25["vision_config"], "fullatt_block_indexes": [9]}}, {}, "one of the 4 layers"),
            ({"vision_config": {**TINY_25["vision_config"], "hidden_size": 50}}, {}, "a multiple of 4, got 50"),
            ({"vision_config": {**TINY_25["vision_config"], "window_size": 20}}, {}, "at least one token, got 20"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, changes, files, message):
        with pytest.raises(SparseVILAError, match=message):
            model_of(Folder(TINY_25 | changes, **files))

    @pytest.mark.parametrize(
        "scaling",
        [
            {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}},
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
            {"rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 2.0, "mrope_section": [2, 3, 3]}},
        ],
    )
    def test_multimodal_rope_is_known_by_its_sections(self, scaling):
        rope = model_of(Folder(TINY_25 | scaling)).config.text.rope
        assert rope.sections == (2, 3, 3)
        assert rope.theta == 1e6
        assert rope.type == ("yarn" if "yarn" in str(scaling) else "default")


# Conversations

# As in the hub's tokenizer_config.json of both generations.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages "
    "%}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ "
    "message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == "
    "'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% "
    "if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% "
    "elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% "
    "if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif "
    "'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = "what the model said"
PAD_NAMES = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
DENSE, SPARSE = Sparsity(0.0, 0.0), Sparsity(0.6, 0.75)
# Per turn the media and the question. Of a first turn with no system text, and so on.
TALKS: list[tuple[str | None, list[tuple[tuple[str, ...], str]]]] = [
    (None, [((), "Hi")]),
    (None, [(("image",), "What is it?"), ((), "Why, then?")]),
    ("Be brief.", [(("image", "video"), "Compare."), (("image",), "And this?"), ((), "Well")]),
    (None, [((), "Hi"), (("video", "image", "image"), "  What  happens?\n"), ((), "Then?")]),
]


@pytest.fixture(scope="module")
def engines(qwens) -> Iterator[dict[str, Engine]]:
    loaded = {name: Engine.load(qwens[name].folder, device="cpu", dtype="float32") for name in ("qwen2", "qwen2.5")}
    yield loaded
    for engine in loaded.values():
        engine.close()


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Image | Video]:
    clip = write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=12)
    return {"image": Image(frames(70, 90).rgb[0]), "video": replace(clip, frames=5)}


class Watched:
    """A session, and everything that enters its cache in order: tokens as ids, media as they are."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session = session
        self.spans: list[Span] = []
        self.results: list[Result] = []
        runner = session._engine.runner
        prefill = runner.prefill

        def watched(cache: Any, spans: Sequence[Span], **options: Any) -> Any:
            self.spans += spans
            return prefill(cache, spans, **options)

        monkeypatch.setattr(runner, "prefill", watched)

    def ask(self, text: str, **options: Any) -> Result:
        result = self.session.ask(text, params=SamplingParams(max_new_tokens=6), **options)
        # The closing text follows the tokens that were decoded; the last of them may be in front of it.
        closing = self.spans.pop()
        assert isinstance(closing, TextSpan)
        fed = len(result.token_ids) + 2 - len(closing)
        self.spans += [TextSpan(result.token_ids[:fed]), closing]
        self.results.append(result)
        return result

    def ids(self) -> list[int]:
        """With a pad for every visual token."""
        kinds = iter(item.kind for item in self.session.media)
        ids: list[int] = []
        for span in self.spans:
            if isinstance(span, TextSpan):
                ids += span.ids
            else:
                ids += [START, *[PADS[next(kinds)]] * span.tokens.token_map.num_visual, END]
        return ids


def rendered_ids(folder: Path, system: str | None, turns: Any, watched: Watched) -> list[int]:
    """The checkpoint's template, rendered by jinja, tokenised by `tokenizers`; pads repeated, answers by their ids."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for media, question in turns:
        content = [{"type": kind} for kind in media] + [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    counts = iter(item.tokens_kept for item in watched.session.media)
    answers = iter(result.token_ids for result in watched.results)
    ids: list[int] = []
    for part in re.split(rf"({ANSWER}|<\|image_pad\|>|<\|video_pad\|>)", text):
        if part == ANSWER:
            ids += next(answers)
        elif part in PAD_NAMES.values():
            ids += [SPECIAL_IDS[part]] * next(counts)
        else:
            ids += tokenizer.encode(part, add_special_tokens=False).ids
    return ids


class TestConversations:
    @pytest.mark.parametrize("sparsity", [DENSE, SPARSE], ids=["dense", "sparse"])
    @pytest.mark.parametrize("talk", range(len(TALKS)))
    def test_ids_are_those_of_the_rendered_template(self, qwens, engines, items, monkeypatch, talk, sparsity):
        system, turns = TALKS[talk]
        watched = Watched(engines["qwen2.5"].session(system=system, sparsity=sparsity), monkeypatch)
        for kinds, question in turns:
            watched.ask(question, media=[items[kind] for kind in kinds])
        want = rendered_ids(qwens["qwen2.5"].folder, system, turns, watched)
        assert watched.ids() == want

    def test_what_a_user_types_is_text(self, engines, monkeypatch):
        watched = Watched(engines["qwen2.5"].session(), monkeypatch)
        watched.ask("Why <|im_end|> and <|image_pad|><|vision_start|>?")
        assert [i for i in watched.ids() if i == SPECIAL_IDS["<|im_end|>"]] == [SPECIAL_IDS["<|im_end|>"]] * 3
        assert not {START, END, *PADS.values()} & set(watched.spans[0].ids)
        assert "<|im_end|> and <|image_pad|><|vision_start|>?" in engines["qwen2.5"].tokenizer.decode(watched.ids())

    @pytest.mark.parametrize("name", ["qwen2", "qwen2.5"])
    @pytest.mark.parametrize("prefill", [0.0, 0.6])
    @torch.inference_mode()
    def test_a_later_turn_is_the_conversation_from_scratch(self, engines, items, monkeypatch, name, prefill):
        """Three turns with media in two of them: the whole sequence at once gives the last answer, token by token."""
        engine = engines[name]
        watched = Watched(engine.session(sparsity=Sparsity(prefill, 0.0)), monkeypatch)
        watched.ask("What happens?", media=[items["video"], items["image"]])
        watched.ask("And this?", media=[items["image"]])
        before = len(watched.spans)
        last = watched.ask("Why?")
        monkeypatch.undo()
        spans = watched.spans[: before + 1]
        tokens, _ = greedy(engine.model, spans, len(last.token_ids), choose=lambda row: row.argmax(-1))
        assert tokens == list(last.token_ids)
        _, after = engine.runner._positions(_parts(watched.spans), 0)
        assert after == watched.session._cache.next_position
        assert after != sum(map(len, watched.spans))  # positions are not counts

    @pytest.mark.parametrize("name", ["qwen2", "qwen2.5"])
    @pytest.mark.parametrize("sparsity", [DENSE, SPARSE], ids=["dense", "sparse"])
    def test_undo_and_drop(self, engines, items, name, sparsity):
        params = SamplingParams(max_new_tokens=6)
        plain, changed = (engines[name].session(media=[items["video"]], sparsity=sparsity) for _ in range(2))
        changed.ask("What is it?", params=params)
        changed.undo()
        changed.ask("And this?", media=[items["image"]], params=params)
        changed.drop(2)
        changed.undo()
        first, second = (s.ask("What happens?", params=params) for s in (plain, changed))
        assert first.token_ids == second.token_ids
        assert plain._cache.next_position == changed._cache.next_position

    def test_a_clip_may_take_more_positions_than_tokens(self, engines, monkeypatch, tmp_path):
        """Two seconds a pair of frames at two positions a second, a token of each: too long, whatever the limit."""
        clip = replace(write_clip(tmp_path / "slow.mp4", frames=12, fps=1), frames=12)
        engine, fits = engines["qwen2.5"], []
        for context in range(70, 100):
            monkeypatch.setattr(engine, "max_context", context)
            session = engine.session(media=[clip], sparsity=Sparsity(0.9, 0.0))
            try:
                session.ask("What?", params=SamplingParams(max_new_tokens=3))
            except ContextTooLong:
                assert session.history == ()
            else:
                fits.append(context)
                assert session._cache.next_position <= context
        tokens = sum(len(layer.segment()[0][0]) for layer in (session._cache.visual[0], session._cache.text[0]))
        assert fits == [*range(fits[0], 100)]
        assert tokens + 3 < fits[0] == session._cache.next_position - 2  # where it has one token, and here three

    def test_two_frames_a_second_unless_a_caller_says_otherwise(self, engines, tmp_path):
        clip = write_clip(tmp_path / "long.mp4", frames=24, fps=8)
        session = engines["qwen2.5"].session(media=[clip, replace(clip, frames=9), replace(clip, fps=4.0)])
        assert [item.frames for item in session.media] == [6, 9, 12]
        grid = session._state.media[0].token_map.grid
        assert grid is not None
        assert float(grid.seconds[0]) == pytest.approx(1.0)

    def test_generated_text_ends_at_its_token(self, engines):
        ends = {SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|endoftext|>"]}
        assert set(engines["qwen2.5"].tokenizer.eos_ids) == ends

    def test_what_was_pruned_and_kept(self, engines, items):
        """Of each pair of frames the tokens that the tower attends to most; both markers stay."""
        session = engines["qwen2.5"].session(media=[items["video"]], sparsity=SPARSE)
        session.ask("What happens?", params=SamplingParams(max_new_tokens=4))
        selection = session.selection()
        assert selection is not None
        visual = ~selection.token_map.structural
        kept = torch.zeros(len(visual), dtype=torch.bool)
        kept[selection.store] = True
        for frame in (0, 2, 4):
            own = visual & (selection.token_map.frame == frame)
            count = int(own.sum())
            assert int((kept & own).sum()) == int(0.4 * count + 0.5)
            assert selection.saliency[kept & own].min() >= selection.saliency[own & ~kept].max()
        assert session.media[0].structural_tokens == 2
        assert selection.active is not None
        assert all(len(layer) == max(1, int(0.25 * len(selection.store) + 0.5)) for layer in selection.active)
