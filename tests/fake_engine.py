"""A stand-in for the engine: the model's name chooses how it behaves. Run it to start the chat on it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sparsevila import errors
from sparsevila.engine.config import (
    Attachment,
    Chunk,
    EngineInfo,
    Image,
    SamplingParams,
    Sparsity,
    Stats,
    Turn,
    Video,
)

STEP_S = 0.02
SLOW_STEPS = 1500  # half a minute: a test that interrupts a slow stage finds it running on a busy machine too
AUTO = {"image": Sparsity(0.6, 0.75), "video": Sparsity(0.5, 0.8)}
ANSWERS = {
    "escape": ["\x1b[31mred\x1b", "]0;title\x07 plain\r", "\x9b2J end"],
    "utf8": ["naïve ", "数 ", "🙂"],
    "endless": [f"word{i} " for i in range(2000)],
    "huge": ["x" * 4096] * 64,
}


@dataclass(frozen=True)
class FakeStep:
    """What the engine's Progress is, without importing torch."""

    stage: str
    done: int
    total: int | None
    unit: str


@dataclass
class FakeSession:
    engine: FakeEngine
    system: str | None
    items: list[Attachment] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    wanted: Sparsity | None = None
    cancelled: bool = False
    asked: list[tuple[str, SamplingParams]] = field(default_factory=list)
    sources: list[Image | Video] = field(default_factory=list)
    closed: bool = False

    @property
    def sparsity(self) -> Sparsity:
        return self.wanted or AUTO["image"]

    @property
    def method(self) -> str:
        return f"Method(prefill={self.sparsity.prefill:g}, decode={self.sparsity.decode:g})"

    @sparsity.setter
    def sparsity(self, value: Sparsity | None) -> None:
        if value is not None and value.method not in ("sparsevila", "fastv"):
            raise errors.InvalidRequest(f"method: expected sparsevila or fastv, got {value.method!r}")
        self.wanted = value

    @property
    def media(self) -> tuple[Attachment, ...]:
        return tuple(self.items)

    @property
    def history(self) -> tuple[Turn, ...]:
        return tuple(self.turns)

    def attach(self, item: Image | Video, *, progress: Any) -> Attachment:
        name = str(item.source)
        if not os.path.exists(name):
            raise errors.MediaNotFound(f"{name}: there is no such file")
        if "bad" in name:
            raise errors.CorruptMedia(f"{name}: the index is missing", hint="likely an unfinished recording")
        frames = (item.frames or 8) if isinstance(item, Video) else 1
        for i in range(SLOW_STEPS if "slow" in name else frames):
            progress(FakeStep("decode", i + 1, SLOW_STEPS if "slow" in name else frames, "frames"))
            time.sleep(STEP_S if "slow" in name else 0)
        kind = "video" if isinstance(item, Video) else "image"
        made = Attachment(len(self.items) + 1, kind, name, 64, 48, frames, 2.0, 16 * frames, 6 * frames, 0)
        self.items.append(made)
        self.sources.append(item)
        return made

    def stream(self, text: str, *, params: SamplingParams, progress: Any) -> Iterator[Chunk]:
        self.cancelled = False
        self.asked.append((text, params))
        model = self.engine.model
        for stage, unit in (("encode", "frames"), ("prefill", "tokens")):
            slow = model == f"slow-{stage}"
            for i in range(SLOW_STEPS if slow else 2):
                if self.cancelled:
                    yield Chunk("", finish_reason="cancelled", stats=Stats())
                    return
                progress(FakeStep(stage, i + 1, SLOW_STEPS if slow else 2, unit))
                time.sleep(STEP_S if slow else 0)
        if model == "oom":
            raise errors.InsufficientMemory(2**33, 2**30, what="the prefill")
        if model == "boom":
            raise RuntimeError("the fake broke")
        if model == "dead":
            raise errors.EngineDead("the device is lost")
        pieces = ANSWERS.get(model) or [f"{text.upper()}", f" [{len(self.items)}]"]
        for i, piece in enumerate(pieces):
            if self.cancelled:
                yield Chunk("", index=i, finish_reason="cancelled", stats=Stats(output_tokens=i))
                return
            time.sleep(STEP_S if model == "endless" else 0)
            yield Chunk(piece, token_id=i, index=i)
        self.turns.append(Turn(text, "".join(pieces)))
        stats = Stats(ttft_s=0.412, tokens_per_s=61.3, output_tokens=184, peak_memory_bytes=7_400_000_000)
        visual = {"visual_tokens_total": 12288, "visual_tokens_kept": 4915, "visual_tokens_active": 1229.0}
        yield Chunk("", index=len(pieces), finish_reason="stop", stats=replace(stats, cached_tokens=9, **visual))

    def cancel(self) -> None:
        self.cancelled = True

    def undo(self) -> Turn:
        if not self.turns:
            raise errors.InvalidRequest("there is no turn to undo")
        return self.turns.pop()

    def clear(self) -> None:
        self.turns.clear()

    def reset(self) -> None:
        self.turns.clear()
        self.items.clear()

    def drop(self, number: int) -> None:
        if not 1 <= number <= len(self.items):
            raise errors.InvalidRequest(f"expected an item from 1 to {len(self.items)}, got {number}")
        del self.items[number - 1]

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeEngine:
    model: str
    options: dict[str, Any]
    sessions: list[FakeSession] = field(default_factory=list)
    closed: bool = False

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(self.model, "Fake", "folder", "float32", "cpu", 1000, 4000, 4096, 0.1, ("a fake",))

    def default_sparsity(self, kind: str) -> Sparsity:
        return AUTO[kind]

    def session(self, *, system: str | None = None, progress: Any = None) -> FakeSession:
        self.sessions.append(FakeSession(self, system))
        return self.sessions[-1]

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


def load(model: str, *, progress: Any, **options: Any) -> FakeEngine:
    """`Engine.load` of the fake."""
    if model == "missing":
        raise errors.ModelNotFound("no weights for 'missing' here", hint="put them there")
    for i in range(SLOW_STEPS if model == "slow-load" else 1):
        progress(FakeStep("load", i + 1, SLOW_STEPS if model == "slow-load" else 1, "bytes"))
        time.sleep(STEP_S if model == "slow-load" else 0)
    return FakeEngine(model, options)


if __name__ == "__main__":
    from sparsevila.chat import main

    sys.exit(main(load=load))  # type: ignore[arg-type]
