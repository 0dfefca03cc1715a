"""A device that fails for good: what an engine says then, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Oracle

from sparsevila import Engine, Image, InsufficientMemory, SamplingParams
from sparsevila.engine.shortage import device_failure, shortage
from sparsevila.errors import EngineDead

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA` 0x7f00"
SHORT = SamplingParams(max_new_tokens=6)


@pytest.fixture
def engine(oracles: dict[str, Oracle]) -> Iterator[Engine]:
    made = Engine.load(oracles["vicuna"].folder, device="cpu", dtype="float32")
    yield made
    made.close()


def picture() -> Image:
    return Image(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("error", [torch.AcceleratorError(ILLEGAL), RuntimeError(f"Triton Error [CUDA]: {ILLEGAL}")])
@pytest.mark.parametrize("stage", ["step", "prefill", "encode"])
def test_of_a_failed_device(engine: Engine, stage: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    session, other = engine.session(), engine.session()
    session.ask("What is it?", params=SHORT)
    kept = session._state, session._cache.checkpoint(), session.history

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(engine.model) if stage == "encode" else engine.runner, stage, fails)
    with pytest.raises(EngineDead, match="this process can no longer use it") as caught:
        session.ask("And then?", media=[picture()], params=SHORT)
    monkeypatch.undo()
    assert "0x" not in str(caught.value)
    assert "start a new process" in caught.value.hint
    assert (session._state, session._cache.checkpoint(), session.history) == kept
    # Nothing on the device is touched again, though the fault itself is gone.
    for call in (
        lambda: session.ask("Why?", params=SHORT),
        lambda: other.ask("Why?", params=SHORT),
        lambda: session.attach(picture()),
        engine.session,
        engine.warmup,
    ):
        with pytest.raises(EngineDead):
            call()
    other.close()
    session.close()
    engine.close()


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "Triton Error [CUDA]: out of memory"])
def test_a_lack_of_memory_is_no_failure(engine: Engine, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shortage(RuntimeError(text)) == 0
    session = engine.session()

    def fails(*_: Any) -> None:
        raise torch.AcceleratorError(text)

    monkeypatch.setattr(engine.runner, "step", fails)
    with pytest.raises(InsufficientMemory):
        session.ask("What is it?", params=SHORT)
    monkeypatch.undo()
    assert session.ask("What is it?", params=SHORT).text


def test_other_errors_are_neither() -> None:
    for error in (RuntimeError("shapes differ"), ValueError("CUDA is not here"), MemoryError()):
        assert not device_failure(error)
