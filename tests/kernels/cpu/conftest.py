"""Machine code is tested where llvmlite is, at each level that the processor has."""

from __future__ import annotations

import importlib.util

import pytest

from sparsevila.kernels.cpu import compiled

collect_ignore_glob = [] if importlib.util.find_spec("llvmlite") else ["test_*.py"]


@pytest.fixture(params=compiled.LEVELS)
def of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A level to compile for."""
    wanted: str = request.param
    monkeypatch.setenv("SPARSEVILA_CPU", wanted)
    if compiled.level() != wanted:
        pytest.skip(f"this machine has the level {compiled.level()!r} at most")
    return wanted
