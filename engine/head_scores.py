"""How well each attention head finds what an answer needs in a picture: a small file beside a checkpoint.

Found offline, once a model, by `benchmarks/head_scores.py`: `{"scores": [[...], ...], ...}`, a row for each decoder
layer, a number of at least 0 for each query head. What else stands there says where they come from.
"""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import CorruptCheckpoint, InvalidRequest
from ..models.checkpoint import Checkpoint

HEAD_SCORES = "head_scores.json"
_MAX_BYTES = 1 << 20

HeadScores = tuple[tuple[float, ...], ...]  # layers times query heads


def read_head_scores(path: Path, *, num_layers: int, num_heads: int) -> HeadScores:
    """The scores of a decoder of that size.

    Raises InvalidRequest where there is no such file, CorruptCheckpoint where it is of another decoder or damaged.
    """
    folder = Checkpoint(path.parent)
    if not folder.has(path.name):
        raise InvalidRequest(
            f"scores of attention heads: {path} does not exist",
            hint="`python benchmarks/head_scores.py --model FOLDER` makes it; --switch head_scores=FILE names another",
        )
    rows = folder.read_json(path.name, required=True, max_bytes=_MAX_BYTES).get("scores")
    if not isinstance(rows, list) or not all(isinstance(row, list) and all(map(_is_score, row)) for row in rows):
        raise CorruptCheckpoint(f"{path.name}: expected scores, lists of numbers of at least 0")
    if [len(row) for row in rows] != [num_heads] * num_layers:
        raise CorruptCheckpoint(
            f"{path.name}: expected {num_layers} layers of {num_heads} heads, got {[len(row) for row in rows]}"
        )
    return tuple(tuple(map(float, row)) for row in rows)


def _is_score(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
