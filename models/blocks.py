"""Small modules that several architectures share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.add_rms_norm import add_rms_norm
from ..kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + added, if there is something to add, and its norm; both (M, size)."""
        if added is None:
            return x, self(x)
        return add_rms_norm(x, added, self.weight, self.eps)


def empty_embedding(num_rows: int, size: int) -> nn.Embedding:
    """A table (num_rows, size) that waits for its weights.

    Drawing random ones, as the constructor does, makes torch import its compiler on `meta`: seconds, and it sets an
    environment variable.
    """
    return nn.Embedding.from_pretrained(torch.empty(num_rows, size))


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


# The names of Hugging Face configs ("hidden_act").
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "silu": F.silu,
}
