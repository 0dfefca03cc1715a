"""What settings cost on a few conversations: one picture and its dialogue, each question forgotten (`eviction`).

So that a setting is not cheap because its answers are short, every answer has as many tokens as the true one. Counts
are the same on every machine; seconds are of this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from accuracy.answering import EngineAnswerer, Reply, Setting, reply_of
from accuracy.cost import Manner, ModelSizes, conversation_cost, input_tokens, total_cost
from accuracy.questions import Item, Question

from sparsevila import Engine, SamplingParams
from sparsevila.engine.media import load_media
from sparsevila.models.llava_next import LlavaNext

STAGES = ("encode", "prefill", "retrieval", "decode")


@dataclass(frozen=True)
class Counts:
    """Means over conversations."""

    cost: dict[str, dict[str, float]]  # unit -> part -> value, as `Cost.to_json`
    input_tokens: float  # visual tokens that a layer prefills, mean over layers
    active_tokens: float  # visual tokens that a decode step reads, mean over layers and turns
    encoder_tokens: float  # what the encoder made, newlines left out

    @property
    def gflop(self) -> float:
        return self.cost["gflop"]["total"]


@dataclass(frozen=True)
class Seconds:
    """Of a conversation, mean over conversations; of each the fastest of several times."""

    encode: float
    prefill: float
    retrieval: float
    decode: float

    @property
    def total(self) -> float:
        return self.encode + self.prefill + self.retrieval + self.decode


class Sample:
    """The conversations that settings are measured on. Raises ValueError for a model that is not a LLaVA-NeXT."""

    def __init__(self, engine: Engine, items: Sequence[Item], folder: Path) -> None:
        model = engine.model
        if not isinstance(model, LlavaNext):
            raise ValueError(f"cost: expected a LLaVA-NeXT, whose sizes are known here; got {type(model).__name__}")
        self._engine, self._items = engine, tuple(items)
        self._answerer = EngineAnswerer(engine, folder)
        self.sizes = ModelSizes.of(model.config, model.decoder.norm.weight.element_size())
        self._tiles = {item.layout.name: self._tiles_of(item) for item in items}
        self._known: dict[Setting, Counts] = {}

    @property
    def tiles(self) -> dict[str, int]:
        """Tiles of a picture or clip of each layout."""
        return dict(self._tiles)

    def counts(self, setting: Setting) -> Counts:
        """Counted; asked once."""
        if setting not in self._known:
            self._known[setting] = self._count(setting)
        return self._known[setting]

    def seconds(self, settings: Sequence[Setting], rounds: int) -> dict[Setting, Seconds]:
        """Measured, settings in turn; the encoder runs for each of them anew."""
        best: dict[tuple[Setting, str], Seconds] = {}
        with self._endless():
            for _ in range(rounds):
                for item in self._items:
                    for setting in settings:
                        made = self._time(setting, item)
                        key = setting, item.key
                        best[key] = min(best.get(key, made), made, key=lambda one: one.total)
        return {setting: _mean([best[setting, item.key] for item in self._items]) for setting in settings}

    def _tiles_of(self, item: Item) -> int:
        (media,) = self._answerer.show(item, "own").media
        frames = load_media(media, default_frames=1)
        return int(self._engine.model.preprocess(frames).pixels.shape[0])

    def _steps(self, question: Question) -> int:
        """Decode steps of the true answer: one for each token but the first, one for the end."""
        return len(self._engine.tokenizer.encode(question.answer, first=False))

    def _count(self, setting: Setting) -> Counts:
        talks = [self._prompts(setting, item) for item in self._items]
        manner = Manner.of(setting)
        costs = []
        for item, replies in zip(self._items, talks, strict=True):
            steps = [self._steps(question) for question in item.dialogue]
            costs.append(conversation_cost(self.sizes, self._tiles[item.layout.name], replies, steps, manner))
        return Counts(
            cost=total_cost(costs).to_json(len(costs)),
            input_tokens=fmean(input_tokens(replies[0], manner) for replies in talks),
            active_tokens=fmean(fmean(reply.visual_active for reply in replies) for replies in talks),
            encoder_tokens=fmean(replies[0].visual_total for replies in talks),
        )

    def _prompts(self, setting: Setting, item: Item) -> list[Reply]:
        """The turns of a conversation up to their first tokens, which is all that counts depend on."""
        media = self._answerer.show(item, "own").media
        params = SamplingParams(max_new_tokens=1)
        with closing(self._engine.session(media=media, sparsity=setting.sparsity)) as session:
            return [reply_of(session.ask(q.text, params=params, remember=False)) for q in item.dialogue]

    def _time(self, setting: Setting, item: Item) -> Seconds:
        self._engine.forget_features()
        media, spent = self._answerer.show(item, "own").media, dict.fromkeys(STAGES, 0.0)
        with closing(self._engine.session(media=media, sparsity=setting.sparsity)) as session:
            for question in item.dialogue:
                params = SamplingParams(max_new_tokens=self._steps(question) + 1)
                stats = session.ask(question.text, params=params, remember=False).stats
                for stage in STAGES:
                    spent[stage] += getattr(stats, f"{stage}_s")
        return Seconds(**spent)

    @contextmanager
    def _endless(self) -> Iterator[None]:
        """No token ends an answer."""
        tokenizer = self._engine.tokenizer
        kept, tokenizer.eos_ids = tokenizer.eos_ids, ()
        try:
            yield
        finally:
            tokenizer.eos_ids = kept


def _mean(found: Sequence[Seconds]) -> Seconds:
    return Seconds(**{stage: fmean(getattr(one, stage) for one in found) for stage in STAGES})
