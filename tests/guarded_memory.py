"""Tensors beside memory that must not be touched: who reads or writes a byte too far ends the process."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


def at_the_end(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last before a page that is forbidden. Skips the test where that is not known."""
    memory, last = _with_forbidden_page(tensor.nbytes, 0)
    return _copied(tensor, memory, last - tensor.nbytes)


def at_the_start(tensor: Tensor) -> Tensor:
    """A copy whose first byte is the first behind a page that is forbidden."""
    memory, _ = _with_forbidden_page(tensor.nbytes, PAGE)
    return _copied(tensor, memory, PAGE)


def _with_forbidden_page(size: int, before: int) -> tuple[mmap.mmap, int]:
    """Room for so many bytes behind `before`, and where its last page ends, behind which another one follows."""
    if sys.platform != "linux":
        pytest.skip("asks Linux for a page that must not be touched")
    last = before + max(1, -(-size // PAGE)) * PAGE
    memory = mmap.mmap(-1, last + PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for where in (start + last, *([start] if before else [])):
        if protect(where, PAGE, 0) != 0:
            pytest.skip(f"a page cannot be forbidden here: errno {ctypes.get_errno()}")
    return memory, last


def _copied(tensor: Tensor, memory: mmap.mmap, offset: int) -> Tensor:
    made = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return made.view(tensor.shape).copy_(tensor)
