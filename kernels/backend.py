"""Which of its two forms an op runs: torch's operations, or a Triton kernel of `kernels/gpu`.

CUDA tensors run Triton, CPU tensors torch. With TRITON_INTERPRET=1 in the environment, where Triton runs its kernels in
Python on the CPU, CPU tensors run them too: this is how they are tested without a GPU. Not those of bfloat16, on which
the interpreter's `tl.dot` is wrong.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Whether ops on this tensor are Triton kernels."""
    if tensor.is_cuda:
        return True
    interpreted = tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return interpreted and tensor.dtype != torch.bfloat16
