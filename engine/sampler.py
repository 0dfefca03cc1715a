"""Chooses the next token, where the logits are: nothing here waits for a device but `__call__`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparseVILAError
from .config import SamplingParams

NO_TOKEN = -1  # what is chosen from logits that are no numbers


class Sampler:
    """One turn's choice of tokens. The generator is private and seeded anew, so turns do not depend on each other.

    A token takes one random number, drawn on the host before the answer begins, so a seed means the same on every
    device.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator().manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> int:
        """logits (V,) float32 -> token id. Raises SparseVILAError if they are not finite."""
        return checked(int(self.choose(logits, self.draw(1).to(logits.device))))

    def draw(self, count: int) -> Tensor:
        """The next random numbers: (count,) float64 in [0, 1), on the CPU."""
        return torch.rand(count, dtype=torch.float64, generator=self._generator)

    def choose(self, logits: Tensor, dice: Tensor) -> Tensor:
        """logits (V,) float32 and dice (1,) float64 -> token id (1,) int64, NO_TOKEN if the logits are not finite."""
        token = logits.argmax(0, keepdim=True)  # for which a NaN is the largest
        finite = logits.gather(0, token).isfinite()
        if self.params.temperature > 0:
            sums = self.probabilities(logits).cumsum(0)
            # The first token whose sum passes the number: one of probability 0 never is.
            token = torch.searchsorted(sums, dice * sums[-1:], right=True).clamp(max=len(sums) - 1)
        return token.masked_fill(~finite, NO_TOKEN)

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
            p = nucleus(p, self.params.top_p, candidates=p.device.type == "cpu")
        return p


def nucleus(p: Tensor, top_p: float, *, candidates: bool) -> Tensor:
    """The smallest set of the likeliest that holds `top_p`: a token stays while those before it hold less.

    p (V,) float64 of sum 1 -> the same with 0 for the others. With `candidates` only tokens that can be in the set are
    sorted: less work, but on a device their number is one that the host has to wait for.
    """
    if not candidates:
        ranked, order = p.sort(descending=True, stable=True)
        return torch.zeros_like(p).index_copy_(0, order, ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0))
    # All tokens below the bound together hold less than the rest.
    likely = torch.nonzero(p >= (1 - top_p) / len(p))[:, 0]
    ranked, order = p[likely].sort(descending=True, stable=True)
    kept = likely[order[ranked.cumsum(-1) - ranked < top_p]]
    return torch.zeros_like(p).index_copy_(0, kept, p[kept])


def checked(token: int) -> int:
    """A chosen token. Raises SparseVILAError for NO_TOKEN."""
    if token == NO_TOKEN:
        raise SparseVILAError("the model's logits are not finite", hint="try --dtype float32")
    return token
