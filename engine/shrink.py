"""Media scaled down until a model makes fewer tokens of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image as Pillow

from ..errors import InvalidRequest
from ..models.interface import Frames, VisualInputs
from .sparsity.base import SHRINK_TOLERANCE, keep_count

_STEPS = 10  # of the search: a side to a thousandth


def shrunk(preprocess: Callable[[Frames], VisualInputs], frames: Frames, removed: float) -> VisualInputs:
    """The media at the size whose number of tokens is nearest to `keep_count` of what they have as they are.

    Bisects the length of a side; where several sizes are as near, the largest that was tried. Raises InvalidRequest
    where the nearest is off by more than SHRINK_TOLERANCE.
    """
    wanted = keep_count(preprocess(frames).token_map.num_visual, removed)
    low, high = 0.0, 1.0
    best: tuple[int, float, VisualInputs] | None = None
    for _ in range(_STEPS):
        side = (low + high) / 2
        inputs = preprocess(_scaled(frames, side))
        found = inputs.token_map.num_visual
        off = abs(found - wanted)
        if best is None or (off, -side) < best[:2]:
            best = (off, -side, inputs)
        low, high = (low, side) if found > wanted else (side, high)
    assert best is not None
    if best[0] > SHRINK_TOLERANCE * wanted:
        raise InvalidRequest(
            f"resize: expected about {wanted} visual tokens of {frames.source}, the nearest size has "
            f"{best[2].token_map.num_visual}",
            hint="this model makes as many tokens of a smaller one",
        )
    return best[2]


def _scaled(frames: Frames, side: float) -> Frames:
    """The same frames, sides times `side`."""
    height, width = (max(1, round(length * side)) for length in frames.rgb.shape[1:3])
    smaller = [
        np.asarray(Pillow.fromarray(rgb).resize((width, height), Pillow.Resampling.BICUBIC)) for rgb in frames.rgb
    ]
    return replace(frames, rgb=np.stack(smaller))
