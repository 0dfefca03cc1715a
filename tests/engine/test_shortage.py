"""Torch's and Python's ways to say that memory ran out."""

from __future__ import annotations

import pytest
import torch
from oracles import Oracle

from sparsevila import Engine, InsufficientMemory
from sparsevila.engine.shortage import out_of_memory, shortage
from sparsevila.models import registry

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."), 5 << 29),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), 20 << 20),
        (torch.OutOfMemoryError("something new"), 0),
        (MemoryError(), 0),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (KeyError("tried to allocate 5 bytes"), None),
    ],
)
def test_what_an_error_says(error: Exception, wanted: int | None) -> None:
    assert shortage(error) == wanted


def test_of_this_machine() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 59, dtype=torch.float32)
    assert shortage(caught.value) == 1 << 61
    error = out_of_memory(1 << 30, CPU, what="this turn")
    assert error.need_bytes == 1 << 30
    assert error.free_bytes > 0
    assert "fewer frames" in error.hint


def test_at_load(oracles: dict[str, Oracle], monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: object, **__: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(registry, "load_weights", greedy)
    with pytest.raises(InsufficientMemory, match="loading this model"):
        Engine.load(oracles["vicuna"].folder, device="cpu")
    monkeypatch.setattr(registry, "load_weights", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        Engine.load(oracles["vicuna"].folder, device="cpu")
