"""Activations by the names that Hugging Face configs have for them ("hidden_act").

    gelu(x) = x (1 + erf(x / sqrt 2)) / 2                    gelu_pytorch_tanh: the same by its tanh approximation
    quick_gelu(x) = x sigmoid(1.702 x), that of CLIP         silu(x) = x sigmoid(x)

Source: Hendrycks and Gimpel, arXiv 1606.08415.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": _quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": F.silu,
}


def activation(x: Tensor, name: str) -> Tensor:
    """x of any shape and float dtype, computed in it. Raises ValueError for a name that is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name](x)


def activation_ref(x: Tensor, name: str) -> Tensor:
    """The definition in float64."""
    x = x.double()
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if name == "gelu_pytorch_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x / (1 + torch.exp(-x * {"quick_gelu": 1.702, "silu": 1.0}[name]))
