"""A conversation: media, turns, and the cache that holds them.

Every step of a turn (`turn.py`) takes a frozen state and returns the next. The session keeps the last complete one; a
failed, cancelled or abandoned turn rolls the cache back to it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import Closed, InvalidRequest, MediaError, SessionBusy, SparseVILAError
from ..models.interface import Frames, Progress, ProgressFn, VisionLanguageModel, VisualInputs, no_progress
from .config import Attachment, Chunk, Image, Result, SamplingParams, Sparsity, Turn, Video
from .conversation import MediaItem, Policy, State
from .diagnostics import Agreement, AnswerRating, Overlap, Selection, agreement, overlap, rating
from .media import load_media
from .meter import Meter
from .prompt import check_text
from .runner import Prefilled
from .shortage import out_of_memory, shortage
from .shrink import shrunk
from .sparsity.base import Method, keep_count
from .sparsity.registry import make_method, without_retrieval
from .streaming import TextStream
from .turn import ROOM_FOR_TEXT, TurnDriver

if TYPE_CHECKING:
    from .engine import Engine

_SELECTIONS_KEPT = 64  # turns whose active sets stay for diagnostics


class _Stopped(Exception):
    """A cancel or a time limit was seen."""


class Session:
    """A multi-turn conversation about media. Made by `Engine.session`.

    Not re-entrant: while a turn runs, every other call but `cancel` raises SessionBusy.
    """

    def __init__(self, engine: Engine, *, system: str | None, sparsity: Sparsity | Method | None) -> None:
        if system is not None:
            check_text("system text", system)
        if sparsity is not None:
            make_method(sparsity)  # an unknown name fails here
        self._engine = engine
        self._cache = engine.new_cache()
        self._state = State(self._cache.empty_checkpoint())
        self._system = system
        self._policy = Policy(sparsity, engine.auto)
        self._busy = threading.Lock()
        self._cancelled = threading.Event()
        self._selections: deque[Selection] = deque(maxlen=_SELECTIONS_KEPT)
        self._closed = False

    # What is there

    @property
    def media(self) -> tuple[Attachment, ...]:
        """Every attached item, in the order of the conversation."""
        return tuple(self._attachment(item) for item in self._state.media)

    @property
    def history(self) -> tuple[Turn, ...]:
        """Remembered questions and answers."""
        return tuple(Turn(r.question, r.answer, tuple(m.number for m in r.media)) for r in self._state.records)

    @property
    def sparsity(self) -> Sparsity | Method:
        """The policy in force; where none was set, the default of the media at hand.

        A new `prefill` or method prefills the media again at the next turn, from the encoder's features; a new `decode`
        and the switches of retrieval act at the next turn.
        """
        return self._policy.of_all(self._state.media)

    @sparsity.setter
    def sparsity(self, value: Sparsity | Method | None) -> None:
        if value is not None:
            make_method(value)
        with self._exclusive():
            old, new = self._policy, Policy(value, self._engine.auto)
            self._policy = new
            kinds = {item.kind for item in self._state.media}
            if any(without_retrieval(old.of_kind(k)) != without_retrieval(new.of_kind(k)) for k in kinds):
                self._make_stale(self._state)

    @property
    def method(self) -> Method:
        """What the policy in force is for this decoder; as text, with its hyper-parameters.

        Raises InvalidRequest where the decoder has not what it needs.
        """
        return self._driver(Meter(), no_progress).method(self._state)

    @property
    def system(self) -> str | None:
        """The system text; with a new one the next turn prefills the conversation again."""
        return self._system

    @system.setter
    def system(self, value: str | None) -> None:
        if value is not None:
            check_text("system text", value)
        with self._exclusive():
            if value != self._system:
                self._system = value
                self._make_stale(self._state)

    def selection(self) -> Selection | None:
        """What the last turn pruned, kept and read; None before a turn over the visual store as it is."""
        return self._selections[-1] if self._selections else None

    @property
    def selections(self) -> tuple[Selection, ...]:
        """The last turns over the visual store as it is, oldest first, turns that were not remembered included."""
        return tuple(self._selections)

    # Media

    def attach(self, item: Image | Video, *, progress: ProgressFn = no_progress) -> Attachment:
        """Adds an item to the next question. It is decoded now and encoded at the next turn.

        Raises MediaError or InvalidRequest; then nothing has changed.
        """
        with self._exclusive():
            media = self._open(item, self._state, progress)
            self._state = self._state.with_media(media)
            return self._attachment(media)

    def drop(self, number: int) -> None:
        """Removes the item `number`. The next turn prefills what remains again, from the encoder's features."""
        with self._exclusive():
            numbers = [item.number for item in self._state.media]
            if number not in numbers:
                raise InvalidRequest(f"media {number}: expected one of {numbers}")
            pending = number in {item.number for item in self._state.pending}
            state = self._state.without_media(number)
            if pending:  # nothing of it is in the cache
                self._state = state
            else:
                self._make_stale(state)

    def _open(self, item: Image | Video, state: State, progress: ProgressFn) -> MediaItem:
        start = time.perf_counter()
        model = self._engine.model
        read = partial(load_media, item, default_frames=self._default_frames(state), default_fps=model.default_fps)
        frames = read(progress=progress)
        inputs = model.preprocess(frames)
        return MediaItem(
            number=state.next_number,
            key=frames.key,
            kind=frames.kind,
            source=frames.source,
            height=frames.rgb.shape[1],
            width=frames.rgb.shape[2],
            num_frames=frames.rgb.shape[0],
            duration_s=frames.duration_s,
            notes=frames.notes,
            decode_s=time.perf_counter() - start,
            token_map=inputs.token_map.with_media(state.next_number),
            inputs=inputs,
            read_again=partial(_read_again, model, read, frames.key),
        )

    def _default_frames(self, state: State) -> int:
        """What fits beside what is there, after pruning."""
        kept = self._engine.model.tokens_per_frame()
        if self._policy.method("video").positions != "original":
            kept = keep_count(kept, self._policy.of_kind("video").prefill)
        free = self._engine.max_context - state.checkpoint.next_position - ROOM_FOR_TEXT
        free -= sum(self._policy.planned_positions(item) for item in (state.media if state.stale else state.pending))
        if state.stale:  # the cache is empty, but the records will be in it again
            encode = self._engine.tokenizer.encode
            free -= sum(len(encode(r.question, first=False)) + len(r.answer_ids) for r in state.records)
        return max(1, min(self._engine.model.default_frames, free // kept))

    def _attachment(self, item: MediaItem) -> Attachment:
        entered = zip(self._state.media, self._state.placed, strict=False)  # pending items come last
        here = [placed.survivors.tokens.token_map.num_visual for media, placed in entered if media is item]
        return Attachment(
            number=item.number,
            kind=item.kind,
            source=item.source,
            width=item.width,
            height=item.height,
            frames=item.num_frames,
            duration_s=item.duration_s,
            tokens_total=item.token_map.num_visual,
            tokens_kept=here[0] if here else self._policy.planned_keep(item),
            structural_tokens=int(item.token_map.structural.sum()),
            notes=item.notes,
        )

    # Turns

    def stream(
        self,
        text: str,
        *,
        media: Sequence[Image | Video] = (),
        params: SamplingParams | None = None,
        remember: bool = True,
        timeout_s: float | None = None,
        progress: ProgressFn = no_progress,
    ) -> Iterator[Chunk]:
        """Asks, and yields the answer as it comes. The last chunk alone has `finish_reason` and `stats`.

        With `remember=False` the question and its answer are forgotten afterwards, media stay: the evaluation protocol
        of arXiv 2510.17777. Closing the iterator, `cancel()` and `timeout_s` (seconds) end the turn and leave the
        session as it was. After a last chunk with the reason "error" the typed exception is raised.
        """
        check_text("prompt", text)
        if timeout_s is not None and not timeout_s >= 0:  # so written, NaN is refused too
            raise InvalidRequest(f"timeout_s: expected seconds of at least 0, got {timeout_s!r}")
        return self._stream(text, tuple(media), params or SamplingParams(), remember, timeout_s, progress)

    def ask(
        self,
        text: str,
        *,
        media: Sequence[Image | Video] = (),
        params: SamplingParams | None = None,
        remember: bool = True,
        timeout_s: float | None = None,
        progress: ProgressFn = no_progress,
    ) -> Result:
        """`stream`, collected."""
        chunks = list(
            self.stream(text, media=media, params=params, remember=remember, timeout_s=timeout_s, progress=progress)
        )
        last = chunks[-1]
        assert last.finish_reason is not None
        assert last.stats is not None
        ids = tuple(chunk.token_id for chunk in chunks if chunk.token_id is not None)
        return Result("".join(chunk.text for chunk in chunks), last.finish_reason, last.stats, ids)

    async def astream(
        self,
        text: str,
        *,
        media: Sequence[Image | Video] = (),
        params: SamplingParams | None = None,
        remember: bool = True,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: each step runs in a thread. A cancelled task ends the turn as `cancel()` does."""
        chunks = self.stream(text, media=media, params=params, remember=remember, timeout_s=timeout_s)
        step: asyncio.Task[Chunk | None] | None = None
        try:
            while True:
                step = asyncio.create_task(asyncio.to_thread(next, chunks, None))
                # A thread cannot be cancelled, and the iterator cannot be closed while the thread is inside it.
                chunk = await asyncio.shield(step)
                if chunk is None:
                    return
                yield chunk
        finally:
            if step is not None and not step.done():
                self.cancel()
                await asyncio.wait([step])
            chunks.close()  # type: ignore[attr-defined]

    def cancel(self) -> None:
        """Stops the running turn within one token or one chunk of prefill. From any thread or a signal handler."""
        self._cancelled.set()

    def undo(self) -> Turn:
        """Takes back the last remembered turn, and the media that came with its question. Returns what it was."""
        with self._exclusive():
            state = self._state
            if not state.records:
                raise InvalidRequest("undo: there is no turn to take back")
            record = state.records[-1]
            if state.stale:
                open_media = record.session_media + state.open_media
                self._make_stale(replace(state, records=state.records[:-1], open_media=open_media))
            else:
                self._settle(_reopened(record.before, state))
            return Turn(record.question, record.answer, tuple(m.number for m in record.media))

    def clear(self) -> None:
        """Forgets the turns and keeps the media."""
        with self._exclusive():
            state = self._state
            if not state.records:
                return
            if state.stale or any(record.media for record in state.records[1:]):
                self._make_stale(replace(state, records=(), open_media=state.media))
            else:  # all media stand before the first question, and the cache still holds them
                self._settle(_reopened(state.records[0].asked, state))

    def reset(self) -> None:
        """Forgets turns and media."""
        with self._exclusive():
            self._settle(State(self._cache.empty_checkpoint()))

    def close(self) -> None:
        """Gives the cache back and stops a running turn. May be called twice."""
        self._closed = True
        self.cancel()
        if self._busy.acquire(blocking=False):  # a running turn frees it when it ends
            self._free()
            self._busy.release()

    def overlap(self) -> Overlap:
        """How the active sets of the last turns over this visual store differ: Jaccard, sinks, retrieval tokens.

        Raises InvalidRequest before two sparse turns.
        """
        sparse = [selection for selection in self._selections if selection.active is not None]
        if len(sparse) < 2:
            raise InvalidRequest(f"overlap: expected two sparse turns over the same media, got {len(sparse)}")
        return overlap(sparse)

    def agreement(self, text: str, *, max_new_tokens: int = 64) -> Agreement:
        """Decodes a dense greedy answer, feeds the same tokens to the sparse path and compares the distributions.

        The conversation is left as it was. Raises InvalidRequest where nothing is sparse in decode.
        """
        with self._asked_aside("agreement", text) as (driver, asked, prefilled):
            if prefilled.scores is None:
                raise InvalidRequest("agreement: expected some media and a decode sparsity above 0")
            return agreement(*driver.decode_twice(asked, prefilled, max_new_tokens))

    def rate(self, text: str, answer: str) -> AnswerRating:
        """How likely this answer is as the next one, under the sparsity in force.

        answer: the text as it follows the prompt, a space in front of it where the family's answers begin with one. The
        conversation is left as it was. Raises InvalidRequest where question or answer is empty, ContextTooLong where
        they do not fit.
        """
        check_text("answer", answer)
        with self._asked_aside("rate", text) as (driver, asked, prefilled):
            return rating(*driver.rate(asked, prefilled, answer))

    # Inside

    @contextmanager
    def _asked_aside(self, what: str, text: str) -> Iterator[tuple[TurnDriver, State, Prefilled]]:
        """Prefills a question for something else than a turn; the conversation is left as it was."""
        check_text("prompt", text)
        with self._exclusive():
            self._cancelled.clear()
            try:
                driver = self._driver(Meter(), no_progress)
                self._settle(driver.prepare(self._state))
                asked, prefilled, _ = driver.ask(self._state, text)
                yield driver, asked, prefilled
            except _Stopped:
                raise SparseVILAError(f"{what}: cancelled before it was done") from None
            finally:
                self._settle(self._state)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._closed or self._engine.closed:
            raise Closed("the session is closed")
        self._engine.check_alive()
        if not self._busy.acquire(blocking=False):
            raise SessionBusy("this session is in the middle of a turn", hint="cancel it, or use a session per thread")
        try:
            yield
        finally:
            if self._closed:
                self._free()
            self._busy.release()

    def _free(self) -> None:
        self._cache = self._engine.new_cache()
        self._state = State(self._cache.empty_checkpoint())
        self._selections.clear()

    def _settle(self, state: State) -> None:
        """Makes `state` the session's, and the cache fit it."""
        if state.placed != self._state.placed:
            self._selections.clear()  # another visual store: indices no longer compare
        self._cache.restore(state.checkpoint)
        self._state = state

    def _make_stale(self, state: State) -> None:
        """Empties the cache for the next turn to build again: later keys had attended to what changes."""
        self._settle(replace(state, checkpoint=self._cache.empty_checkpoint(), prefilled=0, placed=(), stale=True))

    def _driver(self, meter: Meter, progress: ProgressFn, timeout_s: float | None = None) -> TurnDriver:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s

        def check() -> None:
            if self._closed or self._cancelled.is_set() or (deadline is not None and time.monotonic() > deadline):
                raise _Stopped

        def checked(step: Progress) -> None:
            progress(step)
            check()

        return TurnDriver(
            self._engine,
            self._cache,
            system=self._system,
            policy=self._policy,
            meter=meter,
            progress=checked,
            check=check,
        )

    def _stream(
        self,
        text: str,
        items: tuple[Image | Video, ...],
        params: SamplingParams,
        remember: bool,
        timeout_s: float | None,
        progress: ProgressFn,
    ) -> Iterator[Chunk]:
        with self._exclusive():
            self._cancelled.clear()
            meter = Meter()
            driver = self._driver(meter, progress, timeout_s)
            failure: SparseVILAError | None = None
            wanted: int | None = None
            try:
                last = yield from self._turn(driver, meter, text, items, params, remember)
            except _Stopped:
                last = Chunk("", finish_reason="cancelled", stats=meter.stats())
            except SparseVILAError as error:
                failure, last = error, Chunk("", finish_reason="error", stats=meter.stats())
            except (RuntimeError, MemoryError) as error:
                wanted, last = shortage(error), Chunk("", finish_reason="error", stats=meter.stats())
                if wanted is None:
                    raise
            finally:
                # After a complete turn this changes nothing; after any other it goes back to the last complete step.
                self._settle(self._state)
            if wanted is not None:
                failure = out_of_memory(wanted, torch.device(self._engine.info.device), what="this turn")
        yield last  # the session is free again: a caller may stop reading here and keep the iterator
        if failure is not None:
            raise failure

    def _turn(
        self,
        driver: TurnDriver,
        meter: Meter,
        text: str,
        items: tuple[Image | Video, ...],
        params: SamplingParams,
        remember: bool,
    ) -> Generator[Chunk, None, Chunk]:
        """The steps of a turn; yields all chunks but the last, which it returns."""
        cached = self._cache.next_position
        # Media attached before belong to the session: once in the cache they stay, whatever becomes of the turn.
        driver.check_context(self._state, text)
        before = driver.prepare(self._state)
        self._settle(before)
        state = before
        for item in items:
            state = state.with_media(self._open(item, state, driver.progress))
        meter.note(decode_frames_s=sum(m.decode_s for m in state.open_media), cached_tokens=cached)
        driver.check_context(state, text)
        asked, prefilled, asked_len = driver.ask(driver.prepare(state), text)
        selection = driver.retrieve(asked, prefilled.scores)
        self._note_visual(meter, asked)
        stream = TextStream(self._engine.tokenizer, params.stop)
        shown, ids, last = [], [], None
        for chunk in driver.decode(asked, prefilled, params, stream):
            shown.append(chunk.text)
            if chunk.finish_reason is not None:
                last = chunk
                break
            assert chunk.token_id is not None
            ids.append(chunk.token_id)
            yield chunk
        assert last is not None
        if remember:
            asked = driver.remember(
                before, asked, (text, "".join(shown)), tuple(ids), kept=stream.kept_tokens, asked_len=asked_len
            )
        self._settle(asked)
        if selection is not None:
            self._selections.append(selection)
        return replace(last, stats=meter.stats())

    def _note_visual(self, meter: Meter, state: State) -> None:
        sparsity = self._policy.of_all(state.media)
        structural = sum(int(p.survivors.tokens.token_map.structural.sum()) for p in state.placed)
        active = self._cache.active_lens()
        meter.note(
            visual_tokens_total=sum(item.token_map.num_visual for item in state.media),
            visual_tokens_kept=max(self._cache.visual_lens()),
            visual_tokens_active=sum(active) / len(active),
            structural_tokens=structural,
            kv_read_bytes=self._cache.read_bytes(),
            prefill_sparsity=sparsity.prefill,
            decode_sparsity=sparsity.decode,
        )


def _read_again(
    model: VisionLanguageModel, read: Callable[..., Frames], key: str, progress: ProgressFn, removed: float
) -> VisualInputs:
    frames = read(progress=progress)
    if frames.key != key:
        raise MediaError(f"{frames.source} is no longer what was attached", hint="drop it and attach it again")
    return shrunk(model.preprocess, frames, removed) if removed else model.preprocess(frames)


def _reopened(earlier: State, now: State) -> State:
    """An earlier state, with the items that were attached to the question still to come."""
    known = {item.number for item in earlier.media}
    later = tuple(item for item in now.open_media if item.number not in known)
    return replace(earlier, open_media=earlier.open_media + later, next_number=now.next_number)
