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
        p = self.probabilities(logits.cpu())
        return int(torch.multinomial(p, 1, generator=self._generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Chances (V,) float64, in proportion, of logits (V,) float32: temperature, then `top_k`, then `top_p`."""
        # The largest becomes 0 and divides to 0 by any temperature; float64, as the smallest ones are 0 in float32.
        logits = logits.double()
        logits = (logits - logits.max()) / self.params.temperature
        if 0 < self.params.top_k < len(logits):
            threshold = logits.topk(self.params.top_k).values[-1]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        p = logits.softmax(-1)
        if self.params.top_p < 1:
            # The smallest set that holds top_p: a token stays while those before it hold less. All tokens below the
            # bound together hold less than the rest, so they need no sorting.
            likely = torch.nonzero(p >= (1 - self.params.top_p) / len(p))[:, 0]
            ranked, order = p[likely].sort(descending=True, stable=True)
            kept = likely[order[ranked.cumsum(-1) - ranked < self.params.top_p]]
            p = torch.zeros_like(p).index_copy_(0, kept, p[kept])
        return p
