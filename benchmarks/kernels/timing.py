"""Times calls in turn, so that what slows the machine down for a while slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import median

import torch


def milliseconds(call: Callable[[], object], repeat: int = 1) -> float:
    """The mean of `repeat` calls."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat * 1e3


def in_turn(calls: dict[str, Callable[[], object]], seconds: float, least: int = 3) -> dict[str, dict[str, float]]:
    """Least and median time of each call in ms; all in turn, `least` rounds and until `seconds` have passed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    return {name: {"min": min(values), "median": median(values)} for name, values in times.items()}


def rotated(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One call after the other, so that none finds its weights in a cache."""
    following = cycle(calls)
    return lambda: next(following)()


def read_bandwidth(num_bytes: int = 1 << 28) -> float:
    """GB/s of summing a tensor beyond the caches, the best of several runs."""
    values = torch.ones(num_bytes // 4)
    return num_bytes / min(milliseconds(values.sum) for _ in range(5)) / 1e6
