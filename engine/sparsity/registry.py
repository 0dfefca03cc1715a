"""Methods by name. One literal table; the defaults of `auto` beside it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ...errors import InvalidRequest
from ...models.interface import MediaKind
from ..config import Sparsity
from ..switches import SWITCHES, switched_on
from .base import Method
from .controls import NoTokens, Resize
from .fastv import FastV
from .pdrop import PDrop
from .prumerge import PruMerge, PruMergePlus
from .random import RandomTokens
from .sparsemm import SparseMM
from .sparsevila import RETRIEVAL_SWITCHES, SparseVILA
from .sparsevlm import SparseVLM, SparseVLMPlus
from .visionzip import VisionZip

METHODS: dict[str, type[Method]] = {
    "dense": Method,
    "sparsevila": SparseVILA,
    "random": RandomTokens,
    "fastv": FastV,
    "pdrop": PDrop,
    "sparsevlm": SparseVLM,
    "sparsevlm+": SparseVLMPlus,
    "sparsemm": SparseMM,
    "visionzip": VisionZip,
    "prumerge": PruMerge,
    "prumerge+": PruMergePlus,
    "resize": Resize,
    "none": NoTokens,
}

# Fractions removed in prefill and decode when the caller asks for none in particular (arXiv 2510.17777, table 1).
AUTO: dict[MediaKind, Sparsity] = {"image": Sparsity(0.60, 0.75), "video": Sparsity(0.60, 0.75)}
# For videos of models that were made for long ones, as LongVILA: they repeat themselves more.
LONG_VIDEO = Sparsity(0.75, 0.90)
LONG_VIDEO_FRAMES = 128  # by default, at least, of such a model


def auto_sparsity(default_frames: int) -> dict[MediaKind, Sparsity]:
    """The table for a model that takes so many frames of a video by default."""
    return AUTO if default_frames < LONG_VIDEO_FRAMES else {**AUTO, "video": LONG_VIDEO}


def without_retrieval(sparsity: Sparsity | Method) -> Sparsity | Method:
    """What of a policy decides what the cache holds: all but `decode` and the switches that act on retrieval alone."""
    off: dict[str, Any] = {row.name: row.default for row in fields(sparsity) if row.name in RETRIEVAL_SWITCHES}
    return replace(sparsity, decode=0.0, **off)


def make_method(sparsity: Sparsity | Method) -> Method:
    """The method of a policy; a method is its own.

    Raises InvalidRequest that lists the names, or the switches that mean something to the method.
    """
    if isinstance(sparsity, Method):
        return sparsity
    if sparsity.method not in METHODS:
        raise InvalidRequest(f"method: expected one of {', '.join(METHODS)}, got {sparsity.method!r}")
    method = METHODS[sparsity.method]
    if refused := [name for name in switched_on(sparsity) if name not in method.switches]:
        known = ", ".join(name for name in SWITCHES if name in method.switches) or "none"
        raise InvalidRequest(f"method {sparsity.method}: expected switches among {known}, got {', '.join(refused)}")
    return method.from_policy(sparsity)
