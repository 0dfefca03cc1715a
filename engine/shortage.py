"""Memory that ran out in the middle of something, as one error.

Torch says it in several ways: an exception of its own on a GPU, a RuntimeError on a CPU, Python's MemoryError. Whoever
catches one reads `shortage` off it and leaves the except block before he goes on: the exception holds the frames that
hold the tensors.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path

import torch

from ..errors import InsufficientMemory

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory")
_DEVICE_ERRORS = ("CUDA error", "Triton Error [CUDA]")  # how torch and Triton begin what the driver says
_TRIED = re.compile(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", re.IGNORECASE)


def shortage(error: BaseException) -> int | None:
    """The bytes that could not be had, 0 where the error does not say; None if it is about something else."""
    text = str(error)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(said in text for said in _NO_MEMORY):
        return None
    found = _TRIED.search(text)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def device_failure(error: BaseException) -> bool:
    """Whether the driver reported something else than a lack of memory: an illegal access, a lost device.

    Such an error comes back from every later call of the process.
    """
    said = isinstance(error, torch.AcceleratorError) or any(begin in str(error) for begin in _DEVICE_ERRORS)
    return said and shortage(error) is None


def out_of_memory(wanted: int, device: torch.device, *, what: str) -> InsufficientMemory:
    """What to raise, after what is no longer in use has been given back. `wanted` is that of `shortage`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return InsufficientMemory(wanted, _free_bytes(device), what=f"{what}: the allocation that failed")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else 0
