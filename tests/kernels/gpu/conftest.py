"""These tests run on a GPU, or on a CPU under Triton's interpreter (`make test-kernels`); else none is collected."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


# The interpreter's `tl.dot` is wrong on bfloat16; kernels take float32 so that one test is sharp.
@pytest.fixture(params=["float16", "float32"] if INTERPRETED else ["float16", "bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = getattr(torch, request.param)
    return found


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What a kernel forgets to write is a NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
