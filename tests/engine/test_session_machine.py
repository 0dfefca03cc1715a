"""A session under any order of calls, against a plain list of what was said.

The model is a list of turns and of items that wait for a question. What a session's cache must hold follows from it by
one masked pass over the whole conversation, which knows no cache, no runner and no turn: the same lengths after every
call, the same logits for a probe question.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracles import TINY, Oracle, write_clip

from sparsevila import (
    Closed,
    Engine,
    Image,
    InvalidRequest,
    SamplingParams,
    Session,
    SessionBusy,
    SparseVILAError,
    Sparsity,
    Video,
)
from sparsevila.engine.media import load_media
from sparsevila.engine.prompt import encode_pieces
from sparsevila.engine.sparsity.registry import make_method
from sparsevila.models.interface import Progress, VisualTokens

GREEDY = SamplingParams(max_new_tokens=4)
PROBE = "And what is that?"
POLICIES = (Sparsity(0.0, 0.0), Sparsity(0.0, 0.75), Sparsity(0.5, 0.75), Sparsity(0.5, 0.0), Sparsity(method="dense"))
QUESTIONS = ("What is it?", "Which colour has the car on the left?", "Why?", "\n <image> </s>")
SYSTEMS = (None, "Be brief.", "Answer in one word, please.")


@dataclass
class World:
    """One loaded checkpoint, the items that rules pick from, and what the encoder makes of each."""

    engine: Engine
    items: list[Image | Video]
    encoded: list[tuple[str, VisualTokens]]  # kind and unpruned features


@dataclass(frozen=True)
class Item:
    """An attached item: its number in the session, and which of the world's items it is."""

    number: int
    index: int


@dataclass(frozen=True)
class Said:
    """A remembered turn, and the active sets with which its answer was made (None: everything was read)."""

    session_media: tuple[Item, ...]
    own_media: tuple[Item, ...]
    question: str
    answer: tuple[int, ...]
    active: tuple[torch.Tensor, ...] | None

    @property
    def media(self) -> tuple[Item, ...]:
        return self.session_media + self.own_media


@dataclass
class Conversation:
    """What the session should hold."""

    system: str | None = None
    policy: Sparsity = POLICIES[0]
    turns: list[Said] = field(default_factory=list)
    waiting: list[Item] = field(default_factory=list)  # for the next question
    next_number: int = 1

    @property
    def media(self) -> list[Item]:
        return [item for turn in self.turns for item in turn.media] + self.waiting


class _Sequence:
    """A conversation written out: a hidden state, a store and an active set for every token."""

    def __init__(self, world: World, policy: Sparsity, system: str | None) -> None:
        self._world, self._policy, self._system = world, policy, system
        self._model = world.engine.model
        self._embeds: list[torch.Tensor] = []
        self.visual: list[bool] = []
        self.positions: list[int] = []
        self.next_position = 0
        self.active: list[tuple[torch.Tensor, ...] | None] = []

    def __len__(self) -> int:
        return len(self.visual)

    def add_ids(self, ids: tuple[int, ...], active: tuple[torch.Tensor, ...] | None = None) -> None:
        self._embeds.append(self._model.decoder.embed(torch.tensor(ids, dtype=torch.long)))
        self.visual += [False] * len(ids)
        self._place(range(len(ids)), len(ids))
        self.active += [active] * len(ids)

    def _place(self, places: Iterable[int], room: int) -> None:
        """Tokens at `places` of the next `room` positions."""
        self.positions += [self.next_position + place for place in places]
        self.next_position += room

    def _encode(self, pieces: list[Any]) -> tuple[int, ...]:
        return encode_pieces(self._world.engine.tokenizer, pieces, start=len(self) == 0)

    def add_media(self, media: tuple[Item, ...], *, first: int = 0) -> None:
        """Items of one turn; `first` of them stand there already."""
        prompt = self._model.prompt
        for i, item in enumerate(media, start=first):
            pieces = prompt.between_media() if i else prompt.opening(first=len(self) == 0, system=self._system)
            self.add_ids(self._encode(pieces))
            kind, tokens = self._world.encoded[item.index]
            survivors = make_method(self._policy).on_vision(tokens, kind)
            # The context has room for all, so survivors stand where they stood.
            self._place(range(len(tokens)) if survivors is None else survivors.sources.tolist(), len(tokens))
            tokens = tokens if survivors is None else survivors.tokens
            self._embeds.append(self._model.embed_visual(tokens))
            self.visual += (~tokens.token_map.structural).tolist()
            self.active += [None] * len(tokens)

    def add_question(self, text: str, *, after_media: bool) -> None:
        prompt = self._model.prompt
        opening = [] if after_media else prompt.opening(first=len(self) == 0, system=self._system)
        self.add_ids(self._encode([*opening, *prompt.question(text, after_media=after_media)]))

    def add_turn(self, turn: Said) -> None:
        self.add_media(turn.media)
        self.add_question(turn.question, after_media=bool(turn.media))
        closing = self._encode(self._model.prompt.closing())
        self.add_ids(turn.answer + closing, turn.active)

    def logits(self, last: int) -> torch.Tensor:
        """(last, V): of the last rows, by one masked pass in which rows see the set they were decoded with."""
        decoder = self._model.decoder
        size = len(self)
        visual = torch.tensor(self.visual)
        store = torch.nonzero(visual)[:, 0]
        hidden = torch.cat(self._embeds)
        cos, sin = decoder.angles(torch.tensor(self.positions))
        for index, layer in enumerate(decoder.layers):
            allowed = torch.ones(size, size, dtype=torch.bool).tril()
            for row, active in enumerate(self.active):
                if active is not None:
                    seen = torch.zeros(size, dtype=torch.bool)
                    seen[store[active[index]]] = True
                    allowed[row] &= seen | ~visual
            q, k, v = layer.project(hidden, cos, sin)
            k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
            scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
            hidden = layer.finish(hidden, scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v)
        return decoder.logits(hidden[-last:])


def written(world: World, said: Conversation, *, waiting: int) -> _Sequence:
    """The conversation, and the first `waiting` of the items that wait for a question."""
    sequence = _Sequence(world, said.policy, said.system)
    for turn in said.turns:
        sequence.add_turn(turn)
    sequence.add_media(tuple(said.waiting[:waiting]))
    return sequence


class _Boom(SparseVILAError):
    """Raised by a progress callback."""


class SessionMachine(RuleBasedStateMachine):
    """Rules call a session; the model follows. `world` is set by the test."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.said = Conversation()
        self.session = self.world.engine.session(sparsity=self.said.policy)
        self.was_stale = False

    # Calls without arguments are drawn far more often than others: they act only where they have something to do.

    @initialize(indices=st.lists(st.integers(0, 3), max_size=2), policy=st.sampled_from(POLICIES))
    def start(self, indices: list[int], policy: Sparsity) -> None:
        self.new_sparsity(policy)
        for index in indices:
            self.attach(index)
        self.ask("What is it?", own=[], remember=True, tokens=3, stop_at=None)

    # Media

    @rule(index=st.integers(0, 3))
    def attach(self, index: int) -> None:
        if len(self.said.media) >= 5:
            return
        attachment = self.session.attach(self.world.items[index])
        assert attachment.number == self.said.next_number
        self.said.waiting.append(Item(attachment.number, index))
        self.said.next_number += 1

    @precondition(lambda self: self.said.media)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.said.media)).number
        self.session.drop(number)

        def without(items: tuple[Item, ...]) -> tuple[Item, ...]:
            return tuple(item for item in items if item.number != number)

        self.said.waiting = list(without(tuple(self.said.waiting)))
        self.said.turns = [
            replace(t, session_media=without(t.session_media), own_media=without(t.own_media)) for t in self.said.turns
        ]

    @rule(number=st.sampled_from([0, 999]))
    def drop_what_is_not_there(self, number: int) -> None:
        with pytest.raises(InvalidRequest, match=str(number)):
            self.session.drop(number)

    # Turns

    def _new_items(self, own: list[int]) -> tuple[list[Any], tuple[Item, ...]]:
        own = own[: max(0, 5 - len(self.said.media))]
        numbers = range(self.said.next_number, self.said.next_number + len(own))
        return [self.world.items[i] for i in own], tuple(map(Item, numbers, own))

    @rule(
        question=st.sampled_from(QUESTIONS),
        own=st.lists(st.integers(0, 3), max_size=2),
        remember=st.booleans(),
        tokens=st.integers(1, 5),
        stop_at=st.none() | st.integers(0, 6),
    )
    def ask(self, question: str, own: list[int], remember: bool, tokens: int, stop_at: int | None) -> None:
        """`stop_at`: the answer is cut by a stop string of several tokens, which begins at that character of it."""
        media, items = self._new_items(own)
        params = SamplingParams(max_new_tokens=tokens)
        if stop_at is not None:
            params = SamplingParams(max_new_tokens=12)
            free = self.session.ask(question, media=media, params=params, remember=False).text
            self.said.waiting += items
            self.said.next_number += len(items)
            self._note_rebuild()
            media, items = [], ()
            stop = free[stop_at : stop_at + 5]
            params = replace(params, stop=(stop,) if stop else ())
        result = self.session.ask(question, media=media, params=params, remember=remember)
        assert result.finish_reason in ("stop", "length")
        assert result.stats.output_tokens <= params.max_new_tokens
        assert not any(stop in result.text for stop in params.stop)
        self._note_rebuild()
        self.said.next_number += len(items)
        if not remember:
            self.said.waiting += items
            return
        record = self.session._state.records[-1]
        assert result.token_ids[: len(record.answer_ids)] == record.answer_ids  # less what began a stop string
        assert record.answer == result.text
        active = self.session.selection().active if self.said.media or items else None
        self.said.turns.append(Said(tuple(self.said.waiting), items, question, record.answer_ids, active))
        self.said.waiting = []

    def _note_rebuild(self) -> None:
        """After a rebuild all earlier answers were prefilled again, and read everything."""
        if self.was_stale:
            self.said.turns = [replace(turn, active=None) for turn in self.said.turns]
            self.was_stale = False

    @rule(own=st.lists(st.integers(0, 3), max_size=1), at=st.integers(0, 40), kind=st.sampled_from(["cancel", "fail"]))
    def interrupt_before_the_answer(self, own: list[int], at: int, kind: str) -> None:
        """Stops at one step of the prefill, or not at all if there are fewer."""
        media, items = self._new_items(own)
        self.world.engine.forget_features()
        steps = iter(range(at + 1))

        def progress(_: Progress) -> None:
            if next(steps, None) == at:
                if kind == "fail":
                    raise _Boom("planned")
                self.session.cancel()

        try:
            reason = self.session.ask("Stop!", media=media, params=GREEDY, progress=progress).finish_reason
        except _Boom:
            reason = "error"
        self._note_rebuild_of_a_part()
        if reason in ("stop", "length"):  # it came too late, so the turn counts
            self.session.undo()
            self.said.next_number += len(items)

    def _note_rebuild_of_a_part(self) -> None:
        """An interrupted turn may have come as far as the rebuilt prefix, which then stays."""
        if self.was_stale and not self.session._state.stale:
            self._note_rebuild()

    @rule(own=st.lists(st.integers(0, 3), max_size=1), tokens=st.integers(1, 4), close=st.booleans())
    def interrupt_the_answer(self, own: list[int], tokens: int, close: bool) -> None:
        media, items = self._new_items(own)
        stream = self.session.stream("Never mind", media=media, params=SamplingParams(max_new_tokens=6))
        ended = any(next(stream).finish_reason for _ in range(tokens))
        if ended:  # an early end of sequence: the turn counts
            self._note_rebuild()
            self.session.undo()
            self.said.next_number += len(items)
            return
        with pytest.raises(SessionBusy):
            self.session.undo()
        if close:
            stream.close()
        else:
            self.session.cancel()
            assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
        self._note_rebuild()

    @rule()
    def compare_sparse_with_dense(self) -> None:
        if self.said.media and self.said.policy.decode > 0:
            assert 1 <= len(self.session.agreement(PROBE, max_new_tokens=3).token_ids) <= 3
        else:
            with pytest.raises(InvalidRequest, match="decode sparsity"):
                self.session.agreement(PROBE, max_new_tokens=3)
        self._note_rebuild()

    @precondition(lambda self: self.said.turns)
    @rule()
    def undo(self) -> None:
        gone = self.said.turns.pop()
        turn = self.session.undo()
        assert (turn.question, turn.media) == (gone.question, tuple(item.number for item in gone.media))
        self.said.waiting = [*gone.session_media, *self.said.waiting]

    @precondition(lambda self: len(self.said.turns) > 1)
    @rule()
    def clear(self) -> None:
        self.session.clear()
        self.session.clear()  # the second one has nothing to do
        with pytest.raises(InvalidRequest, match="undo"):
            self.session.undo()
        self.said.waiting, self.said.turns = self.said.media, []

    @precondition(lambda self: len(self.said.turns) > 2)
    @rule()
    def reset(self) -> None:
        self.session.reset()
        self.said = Conversation(system=self.said.system, policy=self.said.policy)

    # Settings

    @rule(policy=st.sampled_from(POLICIES))
    def new_sparsity(self, policy: Sparsity) -> None:
        self.session.sparsity = policy
        assert self.session.sparsity == policy
        self.said.policy = policy

    @rule(system=st.sampled_from(SYSTEMS))
    def new_system_text(self, system: str | None) -> None:
        self.session.system = system
        self.said.system = system

    # What must hold after every call

    @invariant()
    def history_and_media_are_those_of_the_model(self) -> None:
        said, session = self.said, self.session
        assert [t.question for t in session.history] == [t.question for t in said.turns]
        assert [t.media for t in session.history] == [tuple(m.number for m in t.media) for t in said.turns]
        assert [r.answer_ids for r in session._state.records] == [t.answer for t in said.turns]
        assert [m.number for m in session.media] == [item.number for item in said.media]
        assert session._state.next_number == said.next_number
        for attachment, item in zip(session.media, said.media, strict=True):
            assert attachment.tokens_total == self.world.encoded[item.index][1].token_map.num_visual

    @invariant()
    def the_cache_is_as_long_as_the_conversation(self) -> None:
        session, state = self.session, self.session._state
        checkpoint = session._cache.checkpoint()
        assert checkpoint == state.checkpoint
        assert not session._cache.sparse
        self.was_stale = state.stale
        if state.stale:
            assert checkpoint == session._cache.empty_checkpoint()
            assert (state.placed, state.prefilled) == ((), 0)
            return
        sequence = written(self.world, self.said, waiting=state.prefilled)
        layers = session._cache.num_layers
        assert checkpoint.next_position == sequence.next_position
        assert checkpoint.visual_len == (sum(sequence.visual),) * layers
        assert checkpoint.text_len == (len(sequence) - sum(sequence.visual),) * layers

    @invariant()
    def placed_items_and_selections_fit_the_store(self) -> None:
        session, state = self.session, self.session._state
        placed = [item.number for item in self.said.media][: len(self.said.media) - len(state.pending)]
        if not state.stale:
            assert [int(p.tokens.token_map.media[0]) for p in state.placed] == placed
        assert sum(len(p.in_store()) for p in state.placed) == session._cache.visual_lens()[0]
        for selection in session.selections:
            assert selection.token_map.media.unique_consecutive().tolist() == placed
            assert len(selection.store) == session._cache.visual_lens()[0]

    @precondition(lambda self: len(self.said.turns) + len(self.said.waiting) > 1)
    @rule()
    def probe(self) -> None:
        """The next answer is that of the plain pass, and leaves no trace."""
        seen = list(_recorded_logits(self.session, self.world.engine, PROBE))
        self._note_rebuild()
        active = self.session.selection().active if self.said.media else None
        ids = tuple(int(logits.argmax()) for logits in seen)
        sequence = written(self.world, self.said, waiting=len(self.said.waiting))
        sequence.add_question(PROBE, after_media=bool(self.said.waiting))
        sequence.add_ids(ids[:-1], active)
        want = sequence.logits(len(ids))
        for got, expected in zip(seen, want, strict=True):
            assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
        if active is not None:
            count = max(1, int((1 - self.said.policy.decode) * sum(sequence.visual) + 0.5))
            assert [len(layer) for layer in active] == [count] * len(active)
        assert (active is not None) == (self.said.policy.decode > 0 and bool(self.said.media))

    def teardown(self) -> None:
        failed = sys.exc_info()[0] is not None  # this runs after a failed rule too, and shall not hide its error
        if not failed and self.said.turns:
            self.probe()
        self.session.close()
        assert self.session._cache.bytes_with() == 0


def _recorded_logits(session: Session, engine: Engine, question: str) -> Iterator[torch.Tensor]:
    """Asks without remembering; yields the logits behind each token."""
    runner = engine.runner
    plain: Callable[[torch.Tensor], torch.Tensor] = runner.logits
    seen: list[torch.Tensor] = []

    def recorded(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(plain(hidden))
        return seen[-1]

    runner.logits = recorded  # type: ignore[method-assign]
    try:
        session.ask(question, params=GREEDY, remember=False)
    finally:
        del runner.logits  # type: ignore[method-assign]
    yield from seen


def _picture(seed: int, height: int, width: int) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _world(oracle: Oracle, video: Video) -> World:
    engine = Engine.load(oracle.folder, device="cpu", dtype="float32")
    # Two of equal content, as the feature cache has to keep their numbers apart.
    items = [_picture(1, 70, 90), _picture(2, 90, 40), _picture(1, 70, 90), video]
    encoded = []
    with torch.inference_mode():
        for item in items:
            frames = load_media(item, default_frames=3)
            encoded.append((frames.kind, engine.model.encode(engine.model.preprocess(frames))))
    return World(engine, items, encoded)


@pytest.fixture(scope="module")
def worlds(oracles: dict[str, Oracle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, World]]:
    clip = write_clip(tmp_path_factory.mktemp("machine") / "clip.mp4", frames=6)
    made = {name: _world(oracles[name], replace(clip, frames=3)) for name in ("vicuna", "mistral-video")}
    yield made
    for world in made.values():
        world.engine.close()


def test_the_tiny_models_are_one_llama_and_one_mistral():
    assert (TINY["vicuna"].text, TINY["mistral-video"].text) == ("llama", "mistral")


@pytest.mark.parametrize("name", ["vicuna", "mistral-video"])
def test_any_order_of_calls(worlds: dict[str, World], name: str):
    machine = type("Machine", (SessionMachine,), {"world": worlds[name]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=120,
            stateful_step_count=20,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Ends that no order of calls above reaches


class TestAfterTheLastChunk:
    """A caller who has read the last chunk may keep the iterator; the session is free."""

    def test_of_an_answer(self, worlds: dict[str, World]):
        session = worlds["vicuna"].engine.session()
        stream = session.stream("Hi", params=GREEDY)
        assert next(chunk for chunk in stream if chunk.finish_reason)
        assert len(session.history) == 1
        session.ask("And?", params=GREEDY)
        assert next(stream, None) is None
        assert len(session.history) == 2

    def test_of_a_cancelled_turn(self, worlds: dict[str, World]):
        session = worlds["vicuna"].engine.session()
        stream = session.stream("Hi", params=GREEDY)
        next(stream)
        session.cancel()
        assert next(stream).finish_reason == "cancelled"
        session.ask("And?", params=GREEDY)

    def test_of_a_failed_turn(self, worlds: dict[str, World]):
        session = worlds["vicuna"].engine.session()

        def fail(_: Progress) -> None:
            raise _Boom("planned")

        stream = session.stream("Hi", params=GREEDY, progress=fail)
        assert next(stream).finish_reason == "error"
        session.ask("And?", params=GREEDY)
        with pytest.raises(_Boom):
            next(stream)


class TestCancel:
    def test_while_frames_are_decoded(self, worlds: dict[str, World]):
        """The turn ends at that frame, not behind the last one."""
        world = worlds["mistral-video"]
        session = world.engine.session()
        seen: list[str] = []

        def progress(step: Progress) -> None:
            seen.append(step.stage)
            session.cancel()

        result = session.ask("What happens?", media=[world.items[3]], params=GREEDY, progress=progress)
        assert result.finish_reason == "cancelled"
        assert seen == ["decode"]
        assert session.media == ()

    @pytest.mark.event_loop
    def test_of_an_asyncio_task(self, worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch):
        engine = worlds["vicuna"].engine
        session, plain = engine.session(), engine.session()
        step = engine.runner.step

        def slow(*args: Any) -> None:
            time.sleep(0.05)
            step(*args)

        async def leave_early() -> int:
            count = 0

            async def read() -> None:
                nonlocal count
                async for _ in session.astream("Hi", params=SamplingParams(max_new_tokens=500)):
                    count += 1

            task = asyncio.create_task(read())
            while count < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.02)  # into the next step, which runs in a thread
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return count

        monkeypatch.setattr(engine.runner, "step", slow)
        assert asyncio.run(leave_early()) < 10
        monkeypatch.undo()
        assert session.history == ()
        assert session.ask("Hi", params=GREEDY).token_ids == plain.ask("Hi", params=GREEDY).token_ids


class TestAgreement:
    def test_a_cancel_before_it_does_not_count(self, worlds: dict[str, World]):
        world = worlds["vicuna"]
        session = world.engine.session(media=[world.items[0]], sparsity=Sparsity(0.5, 0.5))
        session.cancel()
        assert session.agreement(PROBE, max_new_tokens=2).token_ids

    def test_a_cancel_during_it_is_a_typed_error(self, worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch):
        world = worlds["vicuna"]
        session = world.engine.session(media=[world.items[0]], sparsity=Sparsity(0.5, 0.5))
        decode = world.engine.runner.decode

        def cancelled(*args: Any) -> torch.Tensor:
            session.cancel()
            return decode(*args)

        monkeypatch.setattr(world.engine.runner, "decode", cancelled)
        with pytest.raises(SparseVILAError, match="cancelled"):
            session.agreement(PROBE, max_new_tokens=50)
        monkeypatch.undo()
        assert session._cache.checkpoint() == session._state.checkpoint
        session.ask(PROBE, params=GREEDY)


@pytest.mark.parametrize("limit", [float("nan"), -1.0])
def test_time_limits_that_are_none(worlds: dict[str, World], limit: float):
    with pytest.raises(InvalidRequest, match="timeout_s"):
        worlds["vicuna"].engine.session().stream("Hi", timeout_s=limit)


def test_an_engine_closed_during_a_turn(oracles: dict[str, Oracle]):
    engine = Engine.load(oracles["vicuna"].folder, device="cpu", dtype="float32")
    session = engine.session()
    stream = session.stream("Hi", params=GREEDY)
    next(stream)
    engine.close()
    assert next(stream).finish_reason == "error"
    with pytest.raises(Closed):
        next(stream)
    session.close()


def test_a_session_closed_before_its_first_step(worlds: dict[str, World]):
    session = worlds["vicuna"].engine.session()
    stream = session.stream("Hi", params=GREEDY)
    session.close()
    with pytest.raises(Closed):
        next(stream)


def test_selections_are_of_the_store_as_it_is(worlds: dict[str, World]):
    """Two pictures of one size fill equally long stores, whose indices still do not compare."""
    world = worlds["vicuna"]
    session = world.engine.session(sparsity=Sparsity(0.5, 0.5))
    session.ask("What is it?", media=[_picture(5, 70, 90)], params=GREEDY)
    session.ask("And this?", media=[_picture(6, 70, 90)], params=GREEDY)
    both = session.selection()
    assert both is not None
    session.undo()
    assert session.selection() is None
    session.ask("And this?", media=[_picture(7, 70, 90)], params=GREEDY)
    assert [len(s.store) for s in session.selections] == [len(both.store)]
    session.ask("Why?", params=GREEDY)
    assert len(session.selections) == 2
