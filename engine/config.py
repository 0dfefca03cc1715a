"""What a caller asks for and what comes back: small frozen values, validated where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

FinishReason = Literal["stop", "length", "cancelled", "error"]
Positions = Literal["auto", "original", "contiguous"]


def _finite(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidRequest(f"{name}: expected a finite number, got {value!r}")


@dataclass(frozen=True)
class Image:
    """A picture: a path, encoded bytes, a Pillow image, or an (H, W, 3) uint8 array."""

    source: str | Path | bytes | PILImage | np.ndarray


@dataclass(frozen=True)
class Video:
    """A clip. `frames` or `fps`, not both; neither takes the model's default number of frames.

    `start` and `end` are seconds; `strict` refuses a damaged file instead of using its readable part.
    """

    source: str | Path
    frames: int | None = None
    fps: float | None = None
    start: float = 0.0
    end: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.frames is not None and self.fps is not None:
            raise InvalidRequest("frames and fps exclude each other: give one of them")
        if self.frames is not None and (not isinstance(self.frames, int) or self.frames < 1):
            raise InvalidRequest(f"frames: expected a whole number of at least 1, got {self.frames!r}")
        if self.fps is not None:
            _finite("fps", self.fps)
            if self.fps <= 0:
                raise InvalidRequest(f"fps: expected a number above 0, got {self.fps}")
        _finite("start", self.start)
        if self.start < 0:
            raise InvalidRequest(f"start: expected at least 0 s, got {self.start}")
        if self.end is not None:
            _finite("end", self.end)
            if self.end <= self.start:
                raise InvalidRequest(f"end: expected more than start ({self.start} s), got {self.end} s")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    `seed` drives a private generator that is seeded anew for every turn.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 1 << 63:
                raise InvalidRequest(f"{name}: expected a whole number from {low} to 2**63 - 1, got {value!r}")
        _finite("temperature", self.temperature)
        _finite("top_p", self.top_p)
        if self.temperature < 0:
            raise InvalidRequest(f"temperature: expected at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise InvalidRequest(f"stop: expected non-empty strings in a tuple, got {self.stop!r}")


@dataclass(frozen=True)
class Sparsity:
    """Fractions of visual tokens removed: `prefill` of the encoder's, `decode` of those left in the cache.

    `scope` says over what prefill ranks the frames of a video: each frame on its own, or all at once. The fields behind
    it are switches beyond the paper; their defaults are off, and a method to which one means nothing refuses it. Those
    of retrieval act where `decode` removes something, `diversity` where `prefill` does.
    Source: arXiv 2510.17777, section 3.
    """

    prefill: float = 0.0
    decode: float = 0.0
    method: str = "sparsevila"
    scope: Literal["per_frame", "global"] = "per_frame"
    # Where survivors of a medium stand, where positions have one axis: each where it stood, or moved up as if the
    # others had never been. "auto" lets them stand while all places of a prompt's media fit in the context.
    positions: Positions = "auto"
    # How a turn's entries are shared out among layers: as many for each, or where the attention is (`budgets.py`).
    budgets: Literal["equal", "mass"] = "equal"
    score_layers: Literal["own", "middle"] = "own"  # whose scores rank: each layer's own, or the middle third's for all
    sets: Literal["shared", "per_kv_head"] = "shared"  # whether the key heads of a layer read the same entries
    sinks: int = 0  # entries that every turn reads, whatever it asks: those the encoder looks at most
    refresh: int = 0  # tokens of an answer after which its entries are ranked afresh; 0: never
    diversity: float = 0.0  # 0 to 1: how much likeness to what is already kept counts against a token in prefill
    # Of `sparsemm`: how well each attention head sees, a file; None: the one beside the checkpoint (`head_scores.py`).
    head_scores: str | None = None
    rerotate: bool = False  # whether what a turn reads moves up to contiguous positions

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            value = getattr(self, name)
            _finite(f"{name} sparsity", value)
            if not 0 <= value < 1:
                raise InvalidRequest(f"{name} sparsity: expected 0 <= x < 1, got {value}")
        if self.scope not in ("per_frame", "global"):
            raise InvalidRequest(f"scope: expected 'per_frame' or 'global', got {self.scope!r}")
        self._check_switches()

    def _check_switches(self) -> None:
        allowed = {
            "positions": get_args(Positions), "budgets": ("equal", "mass"), "score_layers": ("own", "middle"),
            "sets": ("shared", "per_kv_head"),
        }  # fmt: skip
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                expected = " or ".join(map(repr, choices))
                raise InvalidRequest(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if (self.sets, self.score_layers) == ("per_kv_head", "middle"):
            raise InvalidRequest("sets per_kv_head and score_layers middle exclude each other: layers share no heads")
        for name in ("sinks", "refresh"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InvalidRequest(f"{name}: expected a whole number of at least 0, got {value!r}")
        if self.head_scores is not None and not (isinstance(self.head_scores, str) and self.head_scores):
            raise InvalidRequest(f"head_scores: expected the path of a file, got {self.head_scores!r}")
        _finite("diversity", self.diversity)
        if not 0 <= self.diversity <= 1:
            raise InvalidRequest(f"diversity: expected 0 <= x <= 1, got {self.diversity}")
        if not isinstance(self.rerotate, bool):
            raise InvalidRequest(f"rerotate: expected True or False, got {self.rerotate!r}")


@dataclass(frozen=True)
class Stats:
    """What one turn cost. Times in seconds, sizes in bytes; counts of visual tokens leave out structural ones."""

    load_s: float = 0.0
    decode_frames_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0  # media prefix and question
    retrieval_s: float = 0.0  # ranking and compaction
    ttft_s: float = 0.0  # from the call to the first token
    decode_s: float = 0.0  # from the first token to the last, warm-up left out
    refresh_s: float = 0.0  # of decode_s: ranking afresh in the middle of an answer, the prefill that it takes included
    warmup_s: float = 0.0  # compiling and capturing the decode step, where this turn was the first to need it
    prompt_tokens: int = 0  # prefilled in this turn
    cached_tokens: int = 0  # found in the cache
    visual_tokens_total: int = 0  # the encoder's
    visual_tokens_kept: int = 0  # in the visual store, of the layer and key head that has most
    visual_tokens_active: float = 0.0  # read per decode step, mean over layers and key heads
    structural_tokens: int = 0
    layer_tokens: float = 0.0  # prefilled in this turn, mean over the decoder's layers
    layer_pairs: float = 0.0  # pairs of a token prefilled in this turn and one that it attends to, mean over layers
    kv_read_bytes: int = 0  # keys and values that the first decode step reads
    output_tokens: int = 0
    tokens_per_s: float = 0.0  # decode steps per second, the first token left out
    peak_memory_bytes: int = 0
    prefill_sparsity: float = 0.0
    decode_sparsity: float = 0.0


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. Exactly one last chunk of a stream has a `finish_reason` and `stats`."""

    text: str
    token_id: int | None = None
    index: int = 0
    finish_reason: FinishReason | None = None
    stats: Stats | None = None


@dataclass(frozen=True)
class Result:
    """A whole answer."""

    text: str
    finish_reason: FinishReason
    stats: Stats
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Attachment:
    """One media item of a session, as `/media` lists it."""

    number: int  # from 1, as `drop` takes it
    kind: str
    source: str
    width: int
    height: int
    frames: int
    duration_s: float
    tokens_total: int
    tokens_kept: int  # planned, at most, until it is in the cache
    structural_tokens: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One remembered question and answer."""

    question: str
    answer: str
    media: tuple[int, ...] = ()  # numbers of the items attached with the question


@dataclass(frozen=True)
class EngineInfo:
    """What is loaded, for banners and bug reports."""

    model: str  # what the caller asked for
    architecture: str
    folder: str
    scheme: str  # of the layers and the dtype of the rest: "float32", "W8A8 / W4A16 / bfloat16"
    device: str
    parameters: int
    weight_bytes: int
    max_context: int
    load_s: float
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
