"""Processes that train one model together: each takes some of a step's batches, all take the same step.

Threads inside an operation are a poor use of cores for a model this small. Gradients meet in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

import torch
from torch import Tensor, multiprocessing, nn


@dataclass(frozen=True)
class Crew:
    """One process among `size`; `rank` 0 leads: it alone logs, saves and says when to stop."""

    rank: int = 0
    size: int = 1
    barrier: Barrier | None = None
    table: Tensor | None = None  # (size, elements) float32 in shared memory: each one's gradients, and a word of order

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, batches: int) -> range:
        """Which of a step's batches are this process's."""
        return range(self.rank, batches, self.size)

    def sum_gradients(self, parameters: Sequence[nn.Parameter], *, stop: bool) -> bool:
        """Puts the sum of all processes' gradients into each one's parameters. Returns the leader's `stop`.

        The sum is taken in the order of the ranks, so all processes go on with the same bits.
        """
        if self.table is None or self.barrier is None:
            return stop
        own = self.table[self.rank]
        own[0] = stop
        at = 1
        for parameter in parameters:
            part = own[at : at + parameter.numel()].view(parameter.shape)
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad)
            at += parameter.numel()
        self.barrier.wait()
        total = self.table[:, :at].sum(dim=0)
        stopped = bool(self.table[0, 0])
        self.barrier.wait()  # nobody writes again before all have read
        at = 1
        for parameter in parameters:
            parameter.grad = total[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()
        return stopped


def run_crew(size: int, elements: int, work: Callable[[Crew], None]) -> None:
    """Runs `work` in `size` processes, one of them this one. `elements` bounds the parameters. `work` must pickle.

    Raises RuntimeError when another process failed; a failure here ends the others.
    """
    if size == 1:
        work(Crew())
        return
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(size)
    table = torch.zeros(size, elements + 1).share_memory_()
    others = [
        context.Process(target=_work_or_break, args=(work, Crew(rank, size, barrier, table))) for rank in range(1, size)
    ]
    for process in others:
        process.start()
    try:
        _work_or_break(work, Crew(0, size, barrier, table))
    finally:
        for process in others:
            process.join(10)
            process.kill()
    if any(process.exitcode for process in others):
        raise RuntimeError(f"a process of the crew ended with {[process.exitcode for process in others]}")


def _work_or_break(work: Callable[[Crew], None], crew: Crew) -> None:
    try:
        work(crew)
    except BaseException:
        if crew.barrier is not None:
            crew.barrier.abort()  # the others stop at their next step instead of waiting for this one
        raise
