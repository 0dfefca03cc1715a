"""A kernel in one configuration that its launcher chooses, so that it can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Everything that Triton compiles by."""

    name: str
    kernel: Any  # a `triton.jit` function
    types: Mapping[str, str]  # of the arguments that are no constants, in order: "*fp16", "i32", "fp32"
    constants: Mapping[str, Any]  # the `tl.constexpr` arguments
    warps: int
    stages: int
    aligned: frozenset[str]  # arguments that are multiples of 16 wherever the engine calls this
    entries: int | None = None  # weights or scores of one turn of the main loop, to count instructions by
