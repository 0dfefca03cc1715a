"""What the searches know of a model: how large each input channel of a layer is, and a few of its inputs.

`collect` listens to modules while the caller runs whatever it likes; the searches (`awq.py`, `smoothquant.py`) read the
result and report in `SearchRecord`s. Sizes: R sampled rows, K input channels, M rows of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Progress = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Inputs of one layer: statistics over all rows seen, and some of the rows."""

    name: str  # of the layer, for reports and errors
    mean_abs: Tensor  # (K,) float32, on the CPU like the rest
    max_abs: Tensor  # (K,) float32
    rows: Tensor  # (R, K) float32: a uniform sample without replacement, in no particular order
    num_rows: int  # rows seen

    def __post_init__(self) -> None:
        K = self.rows.shape[-1]
        if self.rows.ndim != 2 or self.mean_abs.shape != (K,) or self.max_abs.shape != (K,):
            raise ValueError(
                f"{self.name}: expected rows (R, K), mean_abs (K,) and max_abs (K,), got "
                f"{tuple(self.rows.shape)}, {tuple(self.mean_abs.shape)}, {tuple(self.max_abs.shape)}"
            )
        if not len(self.rows):
            raise ValueError(f"{self.name}: expected at least one sampled row, got none")
        for tensor in (self.mean_abs, self.max_abs, self.rows):
            check_finite(tensor, f"{self.name}: inputs")

    @staticmethod
    def of(name: str, rows: Tensor) -> ChannelStats:
        """Statistics of rows (R, K) of any float type that are all there is."""
        rows = rows.detach().float().cpu()
        magnitude = rows.abs()
        return ChannelStats(name, magnitude.mean(dim=0), magnitude.amax(dim=0), rows, len(rows))

    def divided(self, scales: Tensor) -> ChannelStats:
        """The same inputs after `scales` (K,), all positive, were folded into what makes them."""
        return ChannelStats(self.name, self.mean_abs / scales, self.max_abs / scales, self.rows / scales, self.num_rows)


@dataclass(frozen=True)
class SearchRecord:
    """What a search over channel scales found. Errors are mean squared errors of the output on the sampled rows."""

    name: str
    variant: str  # which formula; "plain" if no scales were better
    alpha: float | None  # None for "plain"
    error_before: float  # with plain rounding
    error_after: float  # never above `error_before`


def collect(
    modules: Mapping[str, nn.Module],
    calls: Iterable[Callable[[], object]],
    *,
    num_rows: int = 512,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, ChannelStats]:
    """Runs every call and returns the statistics of each module's first argument (..., K).

    Every leading dimension counts as rows. `progress` gets the number of calls done. No gradients are recorded; the
    listeners are gone when this returns or raises. The sample depends on `seed`, on `num_rows` and on the rows per
    call, and is the same choice of rows in every module that sees the same calls.

    Memory on the CPU: `4 * K * (num_rows + 5)` bytes a module; while a call runs, a copy of the input of one module at
    a time. Raises ValueError for an input that is not finite and for a module that no call reached, both by name.
    """
    if num_rows < 1:
        raise ValueError(f"expected num_rows of at least 1, got {num_rows}")
    listeners = {name: _Listener(name, num_rows, seed) for name in modules}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(listeners[name].hear).remove)
        for done, call in enumerate(calls, start=1):
            call()
            if progress is not None:
                progress(done)
    return {name: listener.stats() for name, listener in listeners.items()}


class _Listener:
    """Running statistics of one module's inputs.

    The sample: every row draws a number, and the `limit` rows with the largest numbers stay. That is a uniform sample
    without replacement, whatever the number of rows, and needs no loop over rows.
    """

    def __init__(self, name: str, limit: int, seed: int) -> None:
        self.name = name
        self.limit = limit
        self.rng = torch.Generator().manual_seed(seed)
        self.num_rows = 0
        self.sum_abs = torch.empty(0)  # (K,) float64 from the first row on: a float32 sum would stop growing
        self.max_abs = torch.empty(0)
        self.rows = torch.empty(0)
        self.draws = torch.empty(0, dtype=torch.float64)

    def hear(self, _module: nn.Module, args: tuple[object, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(
                f"{self.name}: expected a tensor as first argument, got {[type(a).__name__ for a in args]}"
            )
        x = args[0].detach().flatten(0, -2) if args[0].ndim > 1 else args[0].detach()[None]  # (M, K)
        if not len(x):
            return
        check_finite(x, f"{self.name}: inputs")
        if not self.num_rows:
            K = x.shape[1]
            self.sum_abs, self.max_abs = torch.zeros(K, dtype=torch.float64), torch.zeros(K)
            self.rows = torch.empty(0, K)
        magnitude = x.abs()
        self.sum_abs += magnitude.sum(dim=0, dtype=torch.float64).cpu()
        self.max_abs = torch.maximum(self.max_abs, magnitude.amax(dim=0).float().cpu())
        self.num_rows += len(x)
        self._sample(x)

    def _sample(self, x: Tensor) -> None:
        draws = torch.cat([self.draws, torch.rand(len(x), generator=self.rng, dtype=torch.float64)])
        keep = draws.topk(min(self.limit, len(draws))).indices.sort().values
        old = keep[keep < len(self.rows)]
        new = keep[len(old) :] - len(self.rows)
        self.rows = torch.cat([self.rows[old], x[new.to(x.device)].float().cpu()])
        self.draws = draws[keep]

    def stats(self) -> ChannelStats:
        if not self.num_rows:
            raise ValueError(f"{self.name}: no call reached this module")
        return ChannelStats(self.name, (self.sum_abs / self.num_rows).float(), self.max_abs, self.rows, self.num_rows)


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises ValueError that names `what` unless every element is finite."""
    if not bool(tensor.isfinite().all()):
        bad = int((~tensor.isfinite()).sum())
        raise ValueError(f"{what}: expected finite numbers, got {bad} of {tensor.numel()} that are NaN or infinite")
