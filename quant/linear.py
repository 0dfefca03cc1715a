"""Linear layers: one call, one loader, whatever the precision."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """y = x W^T + b in the weights' own dtype.

    `parts` names the checkpoint matrices that stand in one weight, row after row, e.g.
    `{"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}`; one matrix has a plain number of rows. The loader
    fills each part by its rows, so dense and quantised layers load by the same lines.
    """

    def __init__(self, in_features: int, parts: int | Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts: dict[str, slice] = {}  # checkpoint name -> rows; empty for a single matrix
        rows = 0
        if isinstance(parts, int):
            rows = parts
        else:
            for name, size in parts.items():
                self.parts[name] = slice(rows, rows + size)
                rows += size
        self.out_features = rows
        self.weight = nn.Parameter(torch.empty(rows, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"
