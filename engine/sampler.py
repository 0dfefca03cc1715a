"""Chooses the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparseVILAError
from .config import SamplingParams


class Sampler:
    """One turn's choice of tokens. The generator is private and seeded anew, so turns do not depend on each other."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator().manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> int:
        """logits (V,) float32 -> token id. Raises SparseVILAError if they are not finite."""
        if not torch.isfinite(logits.max()):
            raise SparseVILAError("the model's logits are not finite", hint="try --dtype float32")
        if self.params.temperature == 0:
            return int(logits.argmax())
        logits = logits.cpu() / self.params.temperature
        if 0 < self.params.top_k < len(logits):
            threshold = logits.topk(self.params.top_k).values[-1]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        if self.params.top_p < 1:
            # The smallest set that holds top_p: a token stays while those before it hold less.
            p = p.masked_fill(p.cumsum(-1) - p >= self.params.top_p, 0)
        return int(order[torch.multinomial(p, 1, generator=self._generator)])
