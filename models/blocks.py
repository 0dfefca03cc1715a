"""Small modules that several architectures share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.activation import ACTIVATIONS as ACTIVATIONS
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
