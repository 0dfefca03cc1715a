"""Qwen2-VL and Qwen2.5-VL against `transformers` on the same checkpoint and the same pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_qwen import SPECIAL_IDS, QwenOracle, build
from torch import Tensor

from sparsevila import InvalidRequest
from sparsevila.engine.runner import Runner, Span, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import Frames, TokenMap, VisualInputs
from sparsevila.models.qwen2_vl import Qwen2VL
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
    return Runner(model)._positions([*spans, TextSpan((0,) * 64)], 0)[0]


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
        positions, _ = Runner(model)._positions(spans, 0)
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
