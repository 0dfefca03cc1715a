"""Machine code is tested where llvmlite is, at each level that the processor has."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from sparsevila.kernels.cpu import compiled

collect_ignore_glob = [] if importlib.util.find_spec("llvmlite") else ["test_*.py"]


@pytest.fixture(params=compiled.LEVELS)
def of(request: pytest.FixtureRequest, limit_cpu: Callable[[str], None]) -> str:
    """A level to compile for."""
    wanted: str = request.param
    limit_cpu(wanted)
    if compiled.level() != wanted:
        pytest.skip(f"this machine has the level {compiled.level()!r} at most")
    return wanted
