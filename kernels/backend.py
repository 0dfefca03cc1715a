"""Which of its forms an op runs: torch's operations, a Triton kernel of `kernels/gpu`, machine code of `kernels/cpu`.

CUDA tensors run Triton, CPU tensors machine code where an op has it, or torch. With TRITON_INTERPRET=1 in the
environment, where Triton runs its kernels in Python on the CPU, CPU tensors run them too: this is how they are tested
without a GPU. Not those of bfloat16, on which the interpreter's `tl.dot` is wrong. The environment is read once: to
look it up takes as long as a small operation.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

_MACHINE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(tensor: Tensor) -> bool:
    """Whether ops on this tensor are Triton kernels."""
    if tensor.is_cuda:
        return True
    return _INTERPRETED and tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16


@functools.cache
def cpu_level() -> str:
    """What `kernels/cpu` may use of this processor, a level of its `compiled.LEVELS`; "" for torch alone."""
    from .cpu.compiled import level

    return level()


def machine_code(*tensors: Tensor) -> str:
    """`cpu_level` for an op on these, or "": they are elsewhere, of different or other dtypes, or want gradients."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype != dtype or tensor.requires_grad:
            return ""
    return cpu_level() if dtype in _MACHINE_DTYPES else ""
