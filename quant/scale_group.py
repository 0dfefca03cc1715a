"""Which layers of a block read the same input, and what makes it: all that a search over scales asks of a model.

A block (a layer of a decoder or of a vision tower) describes itself in `scale_groups`; `block.py` quantises it by that
description and knows no architecture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .awq import HeadGroups
from .linear import Linear


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Linear layers with one input of K channels, and the operation that makes it.

    Scales are folded into `previous`: a norm whose output is proportional to its weight (and bias), or a Linear of
    whose output rows `rows` are the K channels. The path from there to the layers is linear in each channel. `heads`
    where neighbouring channels are copies of each other (an o_proj under grouped-query attention).
    """

    layers: Mapping[str, Linear]  # by their names within the block; a fused one is one layer
    previous: nn.Module | None  # None: nothing before is linear in each channel
    rows: slice | None = None
    heads: HeadGroups | None = None
    unscaled: str = ""  # the reason, where `previous` is None

    def __post_init__(self) -> None:
        if not self.layers or len({layer.in_features for layer in self.layers.values()}) != 1:
            widths = {name: layer.in_features for name, layer in self.layers.items()}
            raise ValueError(f"expected layers of one input, got {widths}")
        if (self.previous is None) != bool(self.unscaled):
            raise ValueError(f"{self.name}: expected what makes the input, or the reason why nothing can be scaled")

    @property
    def name(self) -> str:
        """The first layer's, under which the input is reported."""
        return next(iter(self.layers))


class ScaledBlock(nn.Module, ABC):
    """A block that says how scales may move within it."""

    @abstractmethod
    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """Every linear layer of the block in exactly one group, in the order in which they run.

        Only for a block whose layers are dense (`Linear`).
        """
