"""The steps of one turn over a cache: place the media, ask, decode, remember.

The order fixes what later turns see: [text before | visual tokens] is prefilled and its lengths are recorded before
any token of a question enters. Each step takes a `State` and returns the next; none of them keeps one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ContextTooLong, InvalidRequest
from ..models.interface import ProgressFn, PromptPiece, VisualTokens, no_progress
from ..models.positions import ContiguousPositions
from .cache import KVCache
from .config import Chunk, FinishReason, SamplingParams
from .conversation import MediaItem, Placed, Policy, Record, State, pruned_inside, select
from .decode_step import Answer
from .diagnostics import Selection
from .head_sets import HeadSets, longest
from .meter import Meter
from .prompt import encode_pieces
from .rerotation import StorePositions, check_rerotation, rerotate
from .runner import Places, Prefilled, Span, TextSpan, VisualSpan
from .sampler import Sampler
from .sparsity.base import Method, Survivors
from .sparsity.registry import make_method
from .streaming import TextStream

if TYPE_CHECKING:
    from .engine import Engine

ROOM_FOR_TEXT = 512  # positions left free behind media, by whoever plans what they take


class TurnDriver:
    """Runs the steps of one turn. `check` raises to stop between tokens, `progress` may raise between chunks."""

    def __init__(
        self,
        engine: Engine,
        cache: KVCache,
        *,
        system: str | None,
        policy: Policy,
        meter: Meter,
        progress: ProgressFn,
        check: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._system = system
        self._policy = policy
        self._meter = meter
        self.progress = progress
        self._check = check

    # Before the question

    def prepare(self, state: State) -> State:
        """Builds a stale cache again and places what is pending, as far as the method allows without a question."""
        if state.stale:
            state = self._rebuild(state)
        return state if self.method(state).needs_question else self.place(state)

    def place(self, state: State) -> State:
        """Prefills the pending media of the open turn."""
        if not state.pending:
            return state
        spans, placed = self._media_spans(state)
        if any(map(len, spans)):  # a method may leave nothing of a medium, and a prompt may have no text beside it
            self._prefill(spans, self.method(state))
        return replace(
            state, prefilled=len(state.open_media), placed=(*state.placed, *placed), checkpoint=self._cache.checkpoint()
        )

    def method(self, state: State) -> Method:
        """What the policy is for this decoder. Raises InvalidRequest where it cannot do what is asked."""
        method = make_method(self._policy.of_all(state.media))
        config = self._engine.model.decoder.config
        if method.rerotate and method.scores_turn:
            check_rerotation(config)
        method = method.at_depth(config.num_layers)
        if not method.needs_head_scores:
            return method
        return method.with_head_scores(self._engine.head_scores(method.head_scores_file), config.num_kv_heads)

    def _media_spans(self, state: State) -> tuple[list[Span], list[Placed]]:
        spans: list[Span] = []
        placed = []
        start = self._cache.next_position
        stands = self._stands(state)
        for item, ids in zip(state.pending, self._texts_before_media(state), strict=True):
            method = self._policy.method(item.kind)
            tokens = self._encoded(item, method)
            survivors = method.on_vision(tokens, item.kind)
            if survivors is None:
                survivors = Survivors(tokens, torch.arange(len(tokens)))
            was_pruned = 0 < len(survivors.tokens) < len(tokens)
            places = Places(survivors.sources, len(tokens)) if stands and was_pruned else None
            span = VisualSpan(survivors.tokens, places)
            if method.positions == "auto" and was_pruned and places is None:
                self._note_moved(item)
            start += len(ids)
            index = None if places is None else places.index
            placed.append(Placed(tokens, survivors, start=start, room=span.num_positions, places=index))
            spans += [TextSpan(ids), span]
            start += span.num_positions
        return spans, placed

    def _note_moved(self, item: MediaItem) -> None:
        note = f"its {len(item.token_map):,} positions do not fit in the context: what survives pruning moves up"
        if isinstance(self._engine.model, ContiguousPositions) and note not in item.notes:
            item.notes += (note,)

    def _stands(self, state: State) -> bool:
        """Whether survivors of the pending media stand where they stood before pruning (`Sparsity.positions`).

        A matter of what is remembered and of the media alone: no question may move them. Raises InvalidRequest where
        positions have three axes, for which a model is loaded with another choice.
        """
        asked = self.method(state).positions
        if not isinstance(self._engine.model, ContiguousPositions):
            if asked == "original":
                raise InvalidRequest(
                    f"positions: {self._engine.info.architecture} has three axes, got {asked!r}",
                    hint="choose where survivors stand when the model is loaded (--positions)",
                )
            return False
        if asked != "auto":
            return asked == "original"
        text = sum(map(len, self._texts_before_media(state)))
        need = self._cache.next_position + text + sum(len(item.token_map) for item in state.pending)
        return need + min(ROOM_FOR_TEXT, self._engine.max_context // 4) <= self._engine.max_context

    def _encoded(self, item: MediaItem, method: Method) -> VisualTokens:
        if method.shrinks_by:
            return self._engine.encode_shrunk(item, method.shrinks_by, self._meter, self.progress)
        item.tokens = self._engine.encode(item, self._meter, self.progress, with_keys=method.needs_keys)
        return item.tokens

    def _texts_before_media(self, state: State) -> list[tuple[int, ...]]:
        """What stands before each pending item: the turn's opening, or what is between two media."""
        between = self._ids(self._engine.model.prompt.between_media())
        texts = [between] * len(state.pending)
        if texts and state.prefilled == 0:
            texts[0] = self._ids(self._opening(state), start=not state.records)
        return texts

    def _opening(self, state: State) -> list[PromptPiece]:
        return self._engine.model.prompt.opening(first=not state.records, system=self._system)

    def _ids(self, pieces: list[PromptPiece], *, start: bool = False) -> tuple[int, ...]:
        return encode_pieces(self._engine.tokenizer, pieces, start=start)

    def _rebuild(self, state: State) -> State:
        """Prefills the whole conversation again; answers keep their token ids."""
        fresh = State(self._cache.empty_checkpoint(), next_number=state.next_number)
        self._cache.restore(fresh.checkpoint)
        for record in state.records:
            before = self.prepare(replace(fresh, open_media=record.session_media))
            asked = replace(before, open_media=record.media)
            asked, _, _ = self.ask(self.prepare(asked), record.question, score=False)
            fresh = self._remember(before, asked, record, unfed=record.answer_ids)
        return replace(fresh, open_media=state.open_media)

    # The question

    def check_context(self, state: State, question: str) -> None:
        """Raises ContextTooLong, before anything is encoded, with a number of frames that would fit.

        Raises InvalidRequest where the method cannot do in this decoder what was asked of it.
        """
        self.method(state)
        text = sum(map(len, self._texts_before_media(state))) + len(self._question_ids(state, question))
        stands = self._stands(state)
        planned = {
            item: len(item.token_map) if stands else self._policy.planned_positions(item) for item in state.pending
        }
        used, room = self._cache.next_position, self._engine.max_context - self._closing_len()
        visual = sum(planned.values())
        need = used + visual + text + 1
        if need <= room:
            return
        raise ContextTooLong(
            f"the conversation needs {need} positions ({used} before, {visual} visual, {text} of this prompt, "
            f"1 of the answer), the context has {room}",
            hint=self._advice(state, planned, room - need),
        )

    def _advice(self, state: State, planned: dict[MediaItem, int], short: int) -> str:
        """What would make a prompt fit; short: positions that are left, below 0."""
        moving_up = sum(item.spared for item in state.placed)
        moving_up += sum(positions - self._policy.planned_positions(item) for item, positions in planned.items())
        if moving_up + short >= 0:
            return "it would fit with the switch positions=contiguous, which moves up what survives pruning"
        return _fitting_frames(planned, short + sum(planned.values()))

    def _closing_len(self) -> int:
        return len(self._ids(self._engine.model.prompt.closing()))

    def _question_ids(self, state: State, question: str) -> tuple[int, ...]:
        pieces = self._engine.model.prompt.question(question, after_media=bool(state.open_media))
        if state.open_media:
            return self._ids(pieces)
        return self._ids([*self._opening(state), *pieces], start=not state.records)

    def ask(self, state: State, question: str, *, score: bool = True) -> tuple[State, Prefilled, int]:
        """Prefills the question.

        Returns the state in front of it (media placed), what the prefill left behind, and the question's length.
        """
        method = self.method(state)
        spans, placed = self._media_spans(state) if state.pending else ([], [])
        ids = self._question_ids(state, question)
        score = score and method.scores_turn and bool(state.placed or placed)
        prefilled = self._prefill([*spans, TextSpan(ids)], method, score=score)
        asked = replace(
            state,
            prefilled=len(state.open_media),
            placed=(*state.placed, *pruned_inside(placed, prefilled.stayed)),
            checkpoint=self._cache.checkpoint().before_text(len(ids)),
        )
        return asked, prefilled, len(ids)

    def retrieve(self, state: State, scores: list[Tensor] | None) -> Selection | None:
        """Ranks the visual store for this question and compacts what it may read into the active set."""
        if not state.placed:
            return None
        active = None
        if scores is not None:
            with self._engine.device_work(), self._meter.timed("retrieval"), torch.inference_mode():
                active = self._activate(state, scores)
        return select(state.placed, scores, active)

    def _activate(self, state: State, scores: Sequence[Tensor]) -> Sequence[HeadSets] | None:
        """Ranks the visual store and compacts what may be read from now on into the active set; None: all may be."""
        if not bool(torch.stack([layer.isfinite().all() for layer in scores]).all()):  # one wait for all layers
            warnings.warn("the question's scores are not finite: this turn reads all tokens", stacklevel=3)
            return None
        method = self.method(state)
        active = method.on_turn_with(scores, lambda: self._saliency(state.placed))
        if active is not None:
            self._engine.reserve(self._cache, active=[longest(sets) for sets in active])
            self._cache.activate(active)
            if method.rerotate:
                rerotate(self._cache, active, self._positions(state.placed), self._engine.model.decoder.config)
        return active

    def _refreshed(self, state: State, ids: Sequence[int]) -> Prefilled:
        """Ranks the visual store afresh in the middle of an answer, by the last of its tokens.

        ids: those tokens, all but the last of which are in the cache. They are prefilled again, over the whole visual
        store, as a question is; so the token behind them is chosen by a dense pass, as the first of an answer is.
        """
        with self._engine.device_work(), self._meter.timed("refresh"), torch.inference_mode():
            self._cache.forget_text(len(ids) - 1)
            self._cache.deactivate()
            span = TextSpan(tuple(ids))
            prefilled = self._run([span], self.method(state), score=True, progress=lambda _: self._check())
            assert prefilled.scores is not None, "a refresh is scored"
            self._activate(state, prefilled.scores)
        return prefilled

    def _refreshes_every(self, state: State) -> int:
        """Tokens of an answer after which it is ranked afresh; 0: never, as where nothing is sparse."""
        return self.method(state).refresh if self._cache.sparse else 0

    def _saliency(self, placed: Sequence[Placed]) -> Tensor:
        """How much the encoder looks at each entry of the visual store, (N,) float32."""
        found = []
        for item in placed:
            tokens = item.survivors.tokens
            assert tokens.saliency is not None, "the encoder gave no saliency"
            found.append(tokens.saliency.cpu()[~tokens.token_map.structural])
        return torch.cat(found).to(self._engine.runner.device)

    def _positions(self, placed: Sequence[Placed]) -> StorePositions:
        """Of every entry of the visual store, where positions have one axis."""
        device = self._engine.runner.device
        return StorePositions.of([item.store_positions().to(device) for item in placed])

    def _prefill(
        self, spans: list[Span], method: Method, *, score: bool = False, progress: ProgressFn | None = None
    ) -> Prefilled:
        visual = sum(s.tokens.token_map.num_visual for s in spans if isinstance(s, VisualSpan))
        total = sum(len(span) for span in spans)
        end = self._cache.next_position
        end += sum(span.num_positions if isinstance(span, VisualSpan) else len(span) for span in spans)
        if end > self._engine.max_context:
            raise ContextTooLong(
                f"the conversation needs {end} positions, the context has {self._engine.max_context}",
                hint="raise the prefill sparsity, or clear the conversation",
            )
        self._engine.reserve(self._cache, visual=visual, text=total - visual)
        with self._engine.device_work(), self._meter.timed("prefill"):
            prefilled = self._run(spans, method, score=score, progress=progress or self.progress)
        self._meter.add("prompt_tokens", total)
        return prefilled

    def _run(self, spans: list[Span], method: Method, *, score: bool, progress: ProgressFn) -> Prefilled:
        held = self._cache.entries()
        prefilled = self._engine.runner.prefill(self._cache, spans, method=method, score=score, progress=progress)
        self._meter.add("layer_tokens", sum(prefilled.layer_tokens) / len(prefilled.layer_tokens))
        pairs = [n * before + n * (n + 1) // 2 for n, before in zip(prefilled.layer_tokens, held, strict=True)]
        self._meter.add("layer_pairs", sum(pairs) / len(pairs))
        return prefilled

    # The answer

    def decode(self, asked: State, prefilled: Prefilled, params: SamplingParams, stream: TextStream) -> Iterator[Chunk]:
        """Yields the answer token by token; the last chunk of all has the reason, and no stats yet."""
        engine, cache = self._engine, self._cache
        limit = min(params.max_new_tokens, engine.max_context - self._closing_len() - cache.next_position)
        engine.reserve(cache, text=limit + self._closing_len())  # what comes after the last token may not fail either
        reason: FinishReason | None = None
        for index, token in enumerate(self._tokens(asked, prefilled, Sampler(params), limit)):
            ends = token in engine.tokenizer.eos_ids
            self._meter.token(is_text=not ends)
            if ends:
                reason = "stop"
                break
            text = stream.push(token)
            yield Chunk(text, token, index)
            if stream.stopped:
                reason = "stop"
                break
            if index < limit - 1:
                self._check()
        yield Chunk(stream.flush(), None, index, reason or "length")

    def _tokens(self, asked: State, prefilled: Prefilled, sampler: Sampler, limit: int) -> Iterator[int]:
        """The tokens of an answer, at most `limit`, in one piece or refreshed between pieces.

        A piece never runs ahead of its end, so between two of them the cache lacks its last token alone.
        """
        every = self._refreshes_every(asked) or limit
        for start in range(0, limit, every):
            count = min(every, limit - start)
            answer = self._engine.runner.answer(self._cache, prefilled.hidden, sampler, count)
            ids = []
            for _ in range(count):
                ids.append(self._next(answer))
                yield ids[-1]
            if start + count < limit:
                prefilled = self._refreshed(asked, ids)

    def _next(self, answer: Answer) -> int:
        before = answer.warmup_s
        with self._engine.device_work():
            token = answer.next()
        self._meter.warmed_up(answer.warmup_s - before)
        return token

    def _first_logits(self, prefilled: Prefilled) -> Tensor:
        with self._engine.device_work():
            return self._engine.runner.logits(prefilled.hidden)

    def _step(self, token: int) -> Tensor:
        with self._engine.device_work():
            return self._engine.runner.decode(self._cache, token)

    def _fed(self, asked: State, ids: Sequence[int]) -> Iterator[Tensor]:
        """Feeds tokens as if they had been chosen, refreshed where an answer would be: the logits (V,) behind each."""
        every = self._refreshes_every(asked)
        for count, token in enumerate(ids, start=1):
            self._check()
            if every and count % every == 0:
                yield self._first_logits(self._refreshed(asked, ids[count - every : count]))
            else:
                yield self._step(token)

    def decode_twice(
        self, asked: State, prefilled: Prefilled, max_new_tokens: int
    ) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """A dense greedy answer, and the same tokens fed to the sparse path.

        Returns the tokens, and for every step after the first the logits (V,) float32 of both paths.
        """
        engine, cache = self._engine, self._cache
        limit = min(max_new_tokens, engine.max_context - cache.next_position)
        engine.reserve(cache, text=limit)
        mark = cache.checkpoint()
        ids = [int(self._first_logits(prefilled).argmax())]
        dense: list[Tensor] = []
        while len(ids) < limit and ids[-1] not in engine.tokenizer.eos_ids:
            self._check()
            dense.append(self._step(ids[-1]))
            ids.append(int(dense[-1].argmax()))
        cache.restore(mark)
        self.retrieve(asked, prefilled.scores)
        return ids, dense, list(self._fed(asked, ids[: len(dense)]))

    def rate(self, asked: State, prefilled: Prefilled, answer: str) -> tuple[list[int], list[Tensor]]:
        """Feeds a given answer to the path that would have decoded one.

        Returns its token ids and, for each, the logits (V,) float32 that it was to be chosen from.
        """
        engine, cache = self._engine, self._cache
        ids = engine.tokenizer.encode(answer, first=False)
        room = engine.max_context - cache.next_position
        if len(ids) > room:
            raise ContextTooLong(f"the answer needs {len(ids)} positions, the context has {room} left")
        engine.reserve(cache, text=len(ids))
        self.retrieve(asked, prefilled.scores)
        return ids, [self._first_logits(prefilled), *self._fed(asked, ids[:-1])]

    def remember(
        self,
        before: State,
        asked: State,
        record_of: tuple[str, str],
        ids: tuple[int, ...],
        *,
        kept: int,
        asked_len: int,
    ) -> State:
        """Closes the turn in the cache: what was decoded past a stop is taken back, the closing text goes in.

        The closing tokens see what the answer saw (the active set, in a sparse turn). `record_of` is question and
        answer, `ids` the answer's tokens of which the first `kept` count, `asked_len` the question's length.
        """
        fed = self._cache.checkpoint().text_len[0] - asked.checkpoint.text_len[0] - asked_len
        if fed > kept:
            self._cache.forget_text(fed - kept)
        question, answer = record_of
        own = asked.open_media[len(before.open_media) :]
        record = Record(question, answer, ids[:kept], before.open_media, own, before, asked)
        return self._remember(before, asked, record, unfed=ids[min(fed, kept) : kept])

    def _remember(self, before: State, asked: State, record: Record, *, unfed: tuple[int, ...]) -> State:
        closing = unfed + self._ids(self._engine.model.prompt.closing())
        if closing:
            # The answer is out: nothing is left to report or to cancel.
            self._prefill([TextSpan(closing)], Method(), progress=no_progress)
        self._cache.deactivate()
        record = replace(record, before=before, asked=asked)
        return replace(
            asked, records=(*asked.records, record), open_media=(), prefilled=0, checkpoint=self._cache.checkpoint()
        )


def _fitting_frames(planned: dict[MediaItem, int], room: int) -> str:
    """Advice: the number of frames with which the videos among the pending items would fit."""
    videos = {item: positions for item, positions in planned.items() if item.kind == "video" and positions}
    if not videos:
        return "ask a shorter question, raise the prefill sparsity, or clear the conversation"
    others = sum(planned.values()) - sum(videos.values())
    per_frame = sum(positions / item.num_frames for item, positions in videos.items())
    fit = int((room - others) / per_frame)
    return f"--frames {fit} would fit" if fit > 0 else "no frame fits: clear the conversation or raise the sparsity"
