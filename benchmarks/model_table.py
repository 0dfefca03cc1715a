"""What the supported models make of a picture and a clip, and what that takes: docs/models.md.

    python benchmarks/model_table.py [--out docs/models.md] [--only ALIAS ...]

Families come from the registry, names from the list of aliases, sizes from `published.py`; nothing is typed in here.
Tokens are counted by each model's own preprocessing, memory by the engine's bookkeeping (`planned_memory.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planned_memory import blank, fits, plan
from published import PUBLISHED, model_of

from sparsevila import Sparsity
from sparsevila.engine.hub import ALIASES
from sparsevila.models.interface import MediaKind, TokenMap
from sparsevila.models.registry import ARCHITECTURES

POLICIES = {"dense": Sparsity(0.0, 0.0), "60/75": Sparsity(0.60, 0.75), "75/90": Sparsity(0.75, 0.90)}
PICTURE, CLIP = (1080, 1920), (720, 1280)  # height and width in pixels
CLIP_FRAMES = 64
PLANNED_FRAMES = (8, 32, 64, 128, 256, 512)
CARDS = {"24 GB": 24 * 10**9, "48 GB": 48 * 10**9}
HEAD = """# Models

Made by `python benchmarks/model_table.py --out docs/models.md`: from the registry, the aliases and what the published
config files say (`benchmarks/published.py`; no weights were at hand). Tokens are counted by each model's own
preprocessing, bytes by the bookkeeping that `--max-memory` uses (`benchmarks/planned_memory.py`). RADIO towers,
which have several summary tokens, are read in NVILA's layout; no model with one is published.
"""


def families() -> Iterator[str]:
    """The architectures of the registry with the names that people use for them."""
    yield "| architecture (config.json) | file | names |"
    yield "|---|---|---|"
    for architecture, target in ARCHITECTURES.items():
        names = [a for a, p in PUBLISHED.items() if p.files["config.json"]["architectures"] == [architecture]]
        shown = ", ".join(f"`{name}`" for name in names)
        yield f"| {architecture} | `models/{target.partition(':')[0]}.py` | {shown} |"


def licences() -> Iterator[str]:
    yield "| name | repository | weights, GB | licence |"
    yield "|---|---|---|---|"
    for alias, entry in ALIASES.items():
        yield f"| `{alias}` | {entry.repository or 'bundled'} | {entry.size_bytes / 1e9:.2f} | {entry.licence} |"


class Shown:
    """A model, and what it makes of the picture and the clips; each is preprocessed once."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.model: Any = model_of(alias)
        self._maps: dict[tuple[MediaKind, int], TokenMap] = {}

    def tokens(self, kind: MediaKind, num_frames: int) -> TokenMap:
        if (kind, num_frames) not in self._maps:
            height, width = PICTURE if kind == "image" else CLIP
            self._maps[kind, num_frames] = self.model.preprocess(blank(kind, num_frames, height, width)).token_map
        return self._maps[kind, num_frames]


def tokens(models: list[Shown]) -> Iterator[str]:
    """Per model: an image and a clip, dense and pruned, and the bytes of keys and values."""
    yield (
        "| name | encoder | summary tokens | 1080p image: dense | 60/75 kept, read | 75/90 | "
        f"{CLIP_FRAMES} frames of 720p: dense | 60/75 kept, read | 75/90 | KV MB: dense | 60/75 stored, read | 75/90 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for shown in models:
        cells = []
        kinds: tuple[tuple[MediaKind, int], ...] = (("image", 1), ("video", CLIP_FRAMES))
        for kind, frames in kinds:
            token_map = shown.tokens(kind, frames)
            found = {name: plan(shown.model, token_map, kind, policy) for name, policy in POLICIES.items()}
            cells.append(f"{found['dense'].kept:,}")
            cells += [f"{found[name].kept:,}, {found[name].active:,}" for name in ("60/75", "75/90")]
        entry = entry_bytes(shown.model)
        cells.append(f"{found['dense'].kept * entry / 1e6:,.0f}")
        cells += [
            f"{found[name].kept * entry / 1e6:,.0f}, {found[name].active * entry / 1e6:,.1f}"
            for name in ("60/75", "75/90")
        ]
        card = PUBLISHED[shown.alias]
        yield f"| `{shown.alias}` | {card.encoder} | {card.summary_tokens or 'none'} | {' | '.join(cells)} |"


def entry_bytes(model: Any) -> int:
    """Keys and values of one token in all layers, 16 bits a number."""
    config = model.decoder.config
    return int(config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2)


def memory(models: list[Shown], policy: Sparsity) -> Iterator[str]:
    """Per model and number of frames: gigabytes, and the smallest card they fit."""
    yield f"| name | weights | {' | '.join(f'{frames} frames' for frames in PLANNED_FRAMES)} |"
    yield f"|---|---|{'---|' * len(PLANNED_FRAMES)}"
    for shown in models:
        cells = []
        for frames in PLANNED_FRAMES:
            token_map = shown.tokens("video", frames)
            found = plan(shown.model, token_map, "video", policy)
            card = next((name for name, limit in CARDS.items() if fits(shown.model, found, token_map, limit)), "none")
            size = f"{found.total_bytes / 1e9:.1f}" + {"24 GB": "", "48 GB": " *", "none": " **"}[card]
            cells.append(size if found.fits_context else "over the context")
        yield f"| `{shown.alias}` | {found.weight_bytes / 1e9:.1f} | {' | '.join(cells)} |"


def report(aliases: list[str]) -> Iterator[str]:
    models = [Shown(alias) for alias in aliases]
    yield HEAD
    yield "## Families\n"
    yield from families()
    yield "\n## Names, sizes, licences\n"
    yield "Sizes of the weights as computed here, licences as the model cards state them.\n"
    yield from licences()
    yield "\n## Visual tokens\n"
    yield (
        "Fractions are those *removed*: 60/75 leaves 40 % of the encoder's tokens in the cache and reads 25 % of\n"
        "these while answering. Structural tokens (newlines, markers) are not counted. KV is that of the clip.\n"
    )
    yield from tokens(models)
    yield "\n## Planned memory, W4A16 language model and W8A8 tower\n"
    yield (
        "Gigabytes (10^9 bytes) of weights, features, cache and workspace for one clip of 720p and a short\n"
        "conversation. Plain numbers fit a card of 24 GB, * one of 48 GB, ** neither. By the estimate: nothing of\n"
        "this ran on a GPU.\n"
    )
    for name, policy in POLICIES.items():
        yield f"\n### {name}\n"
        yield from memory(models, policy)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of the supported models.")
    parser.add_argument("--out", type=Path, help="write the page instead of printing it")
    parser.add_argument("--only", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    args = parser.parse_args()
    text = "\n".join(report(args.only)) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
