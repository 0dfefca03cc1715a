"""Which entries of a quantisation config mean which layers, for readers that name the same layers differently.

A layer is `language_model.model.layers.0.mlp.up_proj` in a file and `model.language_model.layers.0.mlp.up_proj` in the
memory of transformers; a tower may have lost a `vision_model` in between. What stays is the tail: the last part of the
stack's name, the index, the leaf. Entries made here say the tail alone, in the regular expressions that `NamePattern`
reads, so they mean one layer under each of its names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

_CONTAINERS = ("model", "language_model")  # come and go at the front of a name
_HEAD = "lm_head"  # within the language model in files, beside it in memory
_STACKED = re.compile(r"(?:(?P<owner>.*)\.)?(?P<stack>[^.]+)\.(?P<index>\d+)\.(?P<leaf>.*[^.\d].*)")
_INDEX_CHARS, _LEAF_CHARS = 90, 120  # of the alternatives in one pattern, which NamePattern limits to 256 in all


def target_patterns(layers: Collection[str], among: Collection[str]) -> tuple[str, ...]:
    """`re:` entries that match each of `layers`, names of a checkpoint, and the same layers under other prefixes.

    `among` are all layers of the checkpoint, `layers` included: an index is written out where it tells layers apart.
    Whether the entries match nothing else of `among` is for the caller to check.
    """
    stacks: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    everywhere: dict[tuple[str, str], set[int]] = defaultdict(set)
    single = set()
    for name in among:
        place = _place(name)
        if place is not None:
            stack, index, leaf = place
            everywhere[stack, leaf].add(index)
            if name in layers:
                stacks[stack][leaf].add(index)
        elif name in layers:
            single.add(f"re:.*{re.escape(_plain(name))}$")
    patterns = [
        f"re:.*{stack}\\.{indices}\\.{_one_of(part)}$"
        for stack, leaves in sorted(stacks.items())
        for indices, same in sorted(_by_indices(stack, leaves, everywhere).items())
        for part in _parts(map(re.escape, sorted(same)), _LEAF_CHARS)
    ]
    return (*patterns, *sorted(single))


def dense_parts(dense: Iterable[str], quantised: Collection[str]) -> tuple[str, ...]:
    """AutoAWQ's list of modules left alone: parts of the names of `dense` layers that no `quantised` one contains.

    AutoAWQ looks for them anywhere in a name, transformers 5 at its begin and at its end, so a module's part comes
    with the prefix that it has in memory too. Raises ValueError for a layer that no part tells apart.
    """
    parts: set[str] = set()
    for name in dense:
        if any(part in name for part in parts):
            continue
        plain = _plain(name)
        pieces = plain.split(".")
        stacked = _STACKED.fullmatch(plain)
        in_decoder = stacked is not None and not stacked["owner"]  # a part of such a name begins differently in memory
        lengths = [len(pieces)] if in_decoder else range(1, len(pieces) + 1)
        candidates = (".".join(pieces[:length]) for length in lengths)
        free = (part for part in candidates if not any(part in other for other in quantised))
        part = next(free, None)
        if part is None:
            raise ValueError(f"no part of the name {name} tells it from the quantised layers")
        parts |= {part} if part == plain else {part, f"model.{part}"}
    return tuple(sorted(parts))


def _place(name: str) -> tuple[str, int, str] | None:
    """(pattern of the stack, index, leaf) of a layer in a stack: "encoder\\.layers", 3, "mlp.fc1"."""
    match = _STACKED.fullmatch(name)
    if match is None:
        return None
    owner = (match["owner"] or "").rpartition(".")[2]
    # `language_model.layers` in memory is `language_model.model.layers` in a file: both end in `model.layers`.
    owner = "model" if owner.endswith("model") else owner
    stack = f"{owner}.{match['stack']}" if owner else match["stack"]
    return re.escape(stack), int(match["index"]), match["leaf"]


def _plain(name: str) -> str:
    """The name without the containers in front, which are not the same everywhere."""
    pieces = name.split(".")
    if pieces[-1] == _HEAD:
        return _HEAD
    while len(pieces) > 1 and pieces[0] in _CONTAINERS:
        pieces = pieces[1:]
    return ".".join(pieces)


def _by_indices(
    stack: str, leaves: dict[str, set[int]], everywhere: dict[tuple[str, str], set[int]]
) -> dict[str, list[str]]:
    """Leaves by the pattern of their indices; a leaf may come under several."""
    found: dict[str, list[str]] = defaultdict(list)
    for leaf, indices in leaves.items():
        if indices == everywhere[stack, leaf]:
            found["\\d+"].append(leaf)
            continue
        for part in _parts(map(str, sorted(indices)), _INDEX_CHARS):
            found[_one_of(part)].append(leaf)
    return found


def _one_of(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"({'|'.join(items)})"


def _parts(items: Iterable[str], max_chars: int) -> Iterator[list[str]]:
    """The items in runs of at most `max_chars` together, at least one item each."""
    part: list[str] = []
    for item in items:
        if part and sum(len(other) + 1 for other in part) + len(item) > max_chars:
            yield part
            part = []
        part.append(item)
    if part:
        yield part
