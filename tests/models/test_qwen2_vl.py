"""Qwen2-VL and Qwen2.5-VL against `transformers` on the same checkpoint and the same pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_qwen import SPECIAL_IDS, QwenOracle, build
from torch import Tensor

from sparsevila.engine.runner import Runner, Span, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import Frames, VisualInputs
from sparsevila.models.registry import load_model

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


def greedy(model: Any, spans: Sequence[Span], steps: int) -> tuple[list[int], Tensor]:
    """Tokens and logits (steps, V) of a greedy answer; its prefill is in chunks, each token then one of its own."""
    runner = Runner(model, chunk_tokens=50)
    cache = runner.new_cache()
    total = sum(len(s) for s in spans)
    cache.reserve(visual=total, text=total + steps)
    tokens: list[int] = []
    logits: list[Tensor] = []
    while len(tokens) < steps:
        logits.append(runner.logits(runner.prefill(cache, spans, method=Method()).hidden))
        tokens.append(int(chosen(logits[-1])))
        spans = [TextSpan((tokens[-1],))]
    return tokens, torch.stack(logits)


@torch.inference_mode()
def assert_equal_generation(oracle: QwenOracle, media: Sequence[Frames], steps: int = 64, positions=None) -> None:
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
