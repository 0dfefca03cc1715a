"""Batches for training, made from seeds alone: the same number gives the same batch, on any machine, in any process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from world.labels import image_labels, patch_labels
from world.sample import QA, TILE, Sample
from world.splits import TRAIN, make
from world.student import PATCH, Rows

from sparsevila.engine.prompt import encode_pieces
from sparsevila.engine.tokenizer import Tokenizer
from sparsevila.models.interface import Frames, MediaKind, TokenMap
from sparsevila.models.llava_next import LlavaNext

IGNORED = -100
TEXT_TOKENS = 224  # about a sample; what does not fit is left out, the rest is padding
LENGTH_POWER = -0.5  # an answer of n tokens weighs sqrt(n): else lists would drown all else
FURTHER_TALKS = 3  # beside a sample's own, because the picture's tokens cost more than what is said about them

# Kind, options, and its share of the language batches. One batch has one layout of tokens.
Mix = tuple[tuple[str, dict[str, int], int], ...]
FIRST: Mix = (("scene", {"width": 64, "height": 64}, 1),)  # how to find a thing is learnt from one kind first
EARLY: Mix = (  # then what the others have of their own, still with few tokens
    ("scene", {"width": 64, "height": 64}, 40),
    ("page", {"width": 64, "height": 64}, 25),
    ("clip", {"frames": 4}, 10),
    ("clip", {"frames": 8}, 25),
)
LATE: Mix = (
    ("scene", {"width": 64, "height": 64}, 8),
    ("scene", {"width": 128, "height": 64}, 6),
    ("scene", {"width": 64, "height": 128}, 6),
    ("scene", {"width": 128, "height": 128}, 13),
    ("scene", {"width": 192, "height": 128}, 3),
    ("page", {"width": 64, "height": 64}, 6),
    ("page", {"width": 128, "height": 64}, 6),
    ("page", {"width": 128, "height": 128}, 14),
    ("page", {"width": 128, "height": 192}, 3),
    ("clip", {"frames": 8}, 15),
    ("clip", {"frames": 16}, 15),
    ("clip", {"frames": 32}, 5),
)


@dataclass(frozen=True)
class Tiles:
    """For the tower: single tiles with dense labels."""

    pixels: Tensor  # (B, 3, TILE, TILE) float32
    patches: dict[str, Tensor]  # (B, patches) int64
    whole: dict[str, Tensor]  # (B, classes) float32, zeros and ones


@dataclass(frozen=True)
class Dialogues:
    """For projector and decoder: pictures or clips of one layout, and what is said about them."""

    pixels: Tensor  # (B, tiles, 3, TILE, TILE) float32; patch features (B, tiles, patches, D) once the tower has run
    token_map: TokenMap  # of one sample
    sources: Tensor | None  # (V,) int64, which patch each token of a picture is; None for a clip
    rows: Rows
    targets: Tensor  # (B, T) int64: the token that each row must say next, IGNORED where nothing is asked
    turns: Tensor  # (B, T) int64: the number of the turn a target belongs to
    weights: Tensor  # (B, T) float32: of each target in the loss, by the length of its answer
    types: tuple[tuple[str, ...], ...]  # per sample, of its turns
    shown: Tensor | None  # (B, Tt, V) bool: the visual tokens that a text row's answer is in; nothing in other rows


class BatchMaker:
    """Makes batch number n. Holds what it needs of the model (preprocessing) and its tokenizer, no weights."""

    def __init__(
        self,
        model: LlavaNext,
        tokenizer: Tokenizer,
        *,
        seeds: range = TRAIN,
        first: int = 0,
        early: int = 0,
        together: int = 1,
        grounded: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.seeds = seeds
        self.first, self.early = first, early  # language batches of one layout, then of small ones, at the beginning
        self.grounded = grounded  # language batches that tell where answers are, at the beginning
        self.together = together  # batches of one layout that follow each other: processes that wait for each other

    def _seeds(self, number: int, size: int) -> range:
        first = number * size % (len(self.seeds) - size)
        return range(self.seeds.start + first, self.seeds.start + first + size)

    # The tower

    def tiles(self, number: int, size: int) -> Tiles:
        """Dense scenes and pages of one tile, clips' frames, and pictures shrunk to one tile as the base view is."""
        samples: list[tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]] = []
        for i, seed in enumerate(self._seeds(number, size)):
            kind = ("scene", "page", "scene", "page", "clip", "base")[i % 6]
            if kind == "clip":
                samples.append(_first_tile(make("clip", seed, frames=4), PATCH, TILE))
            elif kind == "base":
                samples.append(_shrunk(make("scene", seed, width=2 * TILE, height=2 * TILE)))
            else:
                samples.append(_first_tile(make(kind, seed, width=TILE, height=TILE, dense=True), PATCH, TILE))
        names = samples[0][1].keys()
        pixels = self.model.normalise([rgb for rgb, _, _ in samples])
        patches = {n: torch.from_numpy(np.stack([p[n] for _, p, _ in samples])).long().flatten(1) for n in names}
        whole = {n: torch.from_numpy(np.stack([w[n] for _, _, w in samples])).float() for n in samples[0][2]}
        return Tiles(pixels, patches, whole)

    # The language model

    def layout(self, number: int) -> tuple[str, dict[str, int]]:
        """Kind and options of batch `number`."""
        mix = FIRST if number < self.first else EARLY if number < self.first + self.early else LATE
        shares = [share for _, _, share in mix]
        [(kind, options, _)] = random.Random(number // self.together).choices(mix, weights=shares)
        return kind, options

    def dialogues(self, number: int, size: int, *, layout: tuple[str, dict[str, int]] | None = None) -> Dialogues:
        """Half of the samples ask every question by itself, half hold conversations; each of these sees the picture and
        itself alone, so that a sample has room for many."""
        kind, options = layout or self.layout(number)
        samples = [make(kind, seed, talks=FURTHER_TALKS, **options) for seed in self._seeds(number, size)]
        inputs = [self.model.preprocess(_frames(sample)) for sample in samples]
        first = inputs[0]
        prompt = self.model.prompt
        before = encode_pieces(self.tokenizer, prompt.opening(first=True, system=None), start=True)
        prefix = len(before) + len(first.token_map)
        talks = [self._talk(s, prefix, apart=i % 2 == 0) for i, s in enumerate(samples)]
        length = TEXT_TOKENS  # always the same, for a compiled step
        total = prefix + length

        def table(fill: int, columns: Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor([[*column, *[fill] * (length - len(column))] for column in columns])

        start = torch.arange(prefix).expand(size, -1)
        targets = torch.full((size, total), IGNORED)
        turns = torch.full((size, total), -1)
        targets[:, prefix:], turns[:, prefix:] = (
            table(IGNORED, [t.targets for t in talks]),
            table(-1, [t.turns for t in talks]),
        )
        weights = torch.zeros(size, total)
        weights[:, prefix:] = torch.tensor([[*talk.weights, *[0.0] * (length - len(talk.weights))] for talk in talks])
        return Dialogues(
            weights=weights,
            pixels=torch.stack([x.pixels for x in inputs]),
            token_map=first.token_map,
            sources=None if first.kind == "video" else self.model.token_sources(first.layout),
            rows=Rows(
                before=torch.tensor(before),
                text=table(0, [t.ids for t in talks]),
                positions=torch.cat([start, table(0, [t.positions for t in talks])], dim=1),
                segments=torch.cat([torch.zeros_like(start), table(-1, [t.segments for t in talks])], dim=1),
            ),
            targets=targets,
            turns=turns,
            types=tuple(tuple(qa.type for qa in talk.asked) for talk in talks),
            shown=_shown(samples, talks, first.token_map) if number < self.grounded else None,
        )

    def _talk(self, sample: Sample, prefix: int, *, apart: bool) -> _Talk:
        """The conversations that fit, one segment each; with `apart` every question is one, rare types as often as
        others."""
        dice = random.Random(sample.seed)
        talks = [sample.dialogue, *sample.further]
        if apart:
            turns = [qa for talk in talks for qa in talk]
            dice.shuffle(turns)
            talks = [(qa,) for qa in (dice.choice(sample.alone), *_by_turns(turns))]
        talk = _Talk([], [], [], [], [], [], [])
        for segment, conversation in enumerate(talks, 1):
            position = prefix
            for qa in conversation:
                question, answer = self._ids(qa, opens=position == prefix)
                ids = [*question, *answer]
                if len(talk.ids) + len(ids) > TEXT_TOKENS:
                    continue
                talk.ids.extend(ids)
                # The row before an answer's token says it; the last row of the answer says the end.
                end = self.tokenizer.special_id("</s>")
                talk.targets.extend([*[IGNORED] * (len(question) - 1), *answer, end])
                talk.weights.extend([(len(answer) + 1) ** LENGTH_POWER] * len(ids))
                talk.turns.extend([len(talk.asked)] * len(ids))
                talk.positions.extend(range(position, position + len(ids)))
                talk.segments.extend([segment] * len(ids))
                position += len(ids)
                talk.asked.append(qa)
        return talk

    def _ids(self, qa: QA, *, opens: bool) -> tuple[tuple[int, ...], list[int]]:
        """Question and answer as the engine will tokenise them; `opens` right behind the picture."""
        prompt = self.model.prompt
        pieces = prompt.question(qa.question, after_media=opens)
        if not opens:
            pieces = [*prompt.opening(first=False, system=None), *pieces]
        return encode_pieces(self.tokenizer, pieces, start=False), self.tokenizer.encode(f" {qa.answer}", first=False)


def _by_turns(turns: Sequence[QA]) -> list[QA]:
    """The first of every type, then the second of every type, and so on; a question is not asked twice."""
    ranked: dict[str, int] = {}
    order = []
    for qa in {qa.question: qa for qa in turns}.values():
        ranked[qa.type] = ranked.get(qa.type, 0) + 1
        order.append((ranked[qa.type], qa))
    return [qa for _, qa in sorted(order, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class _Talk:
    """One sample's text: parallel lists, and its turns."""

    ids: list[int]
    targets: list[int]
    weights: list[float]
    turns: list[int]
    positions: list[int]
    segments: list[int]
    asked: list[QA]


def _shown(samples: Sequence[Sample], talks: Sequence[_Talk], token_map: TokenMap) -> Tensor:
    """`Dialogues.shown`: tokens of every view that touch a region of the question, in the rows that say its answer."""
    shown = torch.zeros(len(samples), TEXT_TOKENS, len(token_map), dtype=torch.bool)
    for sample, talk, rows in zip(samples, talks, shown, strict=True):
        turns, targets = torch.tensor(talk.turns), torch.tensor(talk.targets)
        for turn, qa in enumerate(talk.asked):
            rows[: len(turns)][(turns == turn) & (targets != IGNORED)] = _touched(qa, sample, token_map)
    return shown


def _touched(qa: QA, sample: Sample, token_map: TokenMap) -> Tensor:
    """(V,) bool"""
    _, height, width, _ = sample.rgb.shape
    y0, x0, y1, x1 = (token_map.box * torch.tensor([height, width, height, width])).unbind(1)
    touched = torch.zeros(len(token_map), dtype=torch.bool)
    for r in qa.regions:
        inside = (y0 < r.y1) & (y1 > r.y0) & (x0 < r.x1) & (x1 > r.x0)
        touched |= inside & (token_map.frame >= r.start) & (token_map.frame < r.stop)
    return touched & ~token_map.structural


def _frames(sample: Sample) -> Frames:
    kind: MediaKind = "video" if sample.kind == "clip" else "image"
    return Frames(kind, sample.rgb, np.arange(len(sample.rgb), dtype=float), "<world>", 0.0, f"{kind} {sample.seed}")


def _first_tile(
    sample: Sample, patch: int, tile: int
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A frame with its labels; of a clip the one that the seed says."""
    frame = sample.seed % len(sample.rgb)
    patches = patch_labels(sample, patch, tile=tile, partner=True)
    whole = image_labels(sample, tile=tile)
    return sample.rgb[frame], {n: p[frame] for n, p in patches.items()}, {n: w[frame, 0, 0] for n, w in whole.items()}


def _shrunk(sample: Sample) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A picture of two by two tiles squashed into one: shapes can still be told, text cannot."""
    from PIL import Image

    rgb = np.asarray(Image.fromarray(sample.rgb[0]).resize((TILE, TILE), Image.Resampling.BICUBIC))
    patches = {n: p[0] for n, p in patch_labels(sample, 2 * PATCH).items() if not n.startswith("character")}
    blank = np.full((TILE // PATCH, TILE // PATCH), IGNORED)
    slots = patch_labels(sample, PATCH)
    patches |= {n: blank for n in slots if n.startswith("character")}
    for name in ("word", "row", "column", "partner_shape", "partner_colour", "partner_word"):
        patches[name] = blank
    return rgb, patches, {n: w[0, 0, 0] for n, w in image_labels(sample).items()}
