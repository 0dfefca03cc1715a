"""What one turn costs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from .config import Stats


class Meter:
    """Collects the figures of one turn. `clock` gives seconds and never runs backwards."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._first_token = 0.0
        self._sampled = 0
        self._stats = Stats()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to `<stage>_s`, up to where a GPU has done what it was given."""
        start = self._clock()
        try:
            yield
            if _uses_cuda():
                torch.cuda.synchronize()
        finally:
            self.add(f"{stage}_s", self._clock() - start)

    def add(self, name: str, amount: float) -> None:
        """Adds to one figure."""
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + amount})

    def note(self, **figures: float) -> None:
        """Sets figures."""
        self._stats = replace(self._stats, **figures)  # type: ignore[arg-type]

    def token(self, *, is_text: bool) -> None:
        """A token was chosen; the first one ends the time to first token. An end token is not of the answer."""
        now = self._clock()
        if self._sampled == 0:
            self._first_token = now
            self.note(ttft_s=now - self._start)
        self._sampled += 1
        self.add("output_tokens", is_text)
        self.note(decode_s=now - self._first_token)

    def warmed_up(self, seconds: float) -> None:
        """Time that went into compiling and capturing: reported by itself, and not as decoding."""
        if seconds > 0:
            self._first_token += seconds
            self.add("warmup_s", seconds)

    def stats(self) -> Stats:
        """The figures so far."""
        steps = self._sampled - 1
        rate = steps / self._stats.decode_s if steps > 0 and self._stats.decode_s > 0 else 0.0
        return replace(self._stats, tokens_per_s=rate, peak_memory_bytes=peak_memory_bytes())


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def peak_memory_bytes() -> int:
    """Peak of the device's allocations, or of the process on a CPU; 0 where the system does not tell."""
    if _uses_cuda():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
