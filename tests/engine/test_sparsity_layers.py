"""Methods that prune inside the language model, against one plain masked pass over the whole conversation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_nvila
import tiny_qwen
import torch
from oracles import TINY, build_oracle, write_clip
from torch import Tensor

from sparsevila import Engine, Image, InvalidRequest, SamplingParams, Session, Sparsity, Video
from sparsevila.engine.decode_step import DecodeStep
from sparsevila.engine.diagnostics import ACTIVE, STRUCTURAL
from sparsevila.engine.runner import TextSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.engine.sparsity.fastv import FastV
from sparsevila.engine.sparsity.pdrop import PDrop
from sparsevila.engine.sparsity.registry import make_method
from sparsevila.engine.sparsity.sparsevlm import SparseVLM, SparseVLMPlus, density_peaks
from sparsevila.models.interface import VisualTokens

LAYERS = 8
SHORT = SamplingParams(max_new_tokens=5)
QUESTIONS = ("What is it?", "Which colour is the car on the left?", "And then?")


@dataclass(frozen=True)
class Rule:
    """A method in words of the plain pass, for a decoder of LAYERS layers."""

    sparsity: Sparsity
    stages: dict[int, float]  # layer: share that goes on of what is there
    before: bool = False  # ranked before the layer, by its projections; else after it
    raters: bool = False  # rated by chosen words; else by the last one
    renumbers: bool = False
    recycles: bool = False


RULES = {
    "fastv": Rule(Sparsity(0.6, method="fastv"), {1: 0.4}),
    # 50, 25, 12.5 %: 2 (1 + 1/2 + 1/4 + 1/8) of 8 layers.
    "pdrop": Rule(Sparsity(1 - 1.875 / 4, method="pdrop"), {2: 0.5, 4: 0.5, 6: 0.5}, before=True, renumbers=True),
    # 60, 40, 22 % as 300, 200, 110: 1 + 0.6 + 2 * 0.4 + 4 * 0.22 of 8 layers.
    "sparsevlm+": Rule(Sparsity(0.59, method="sparsevlm+"), {0: 0.6, 1: 0.4 / 0.6, 3: 0.22 / 0.4}, raters=True),
    "sparsevlm": Rule(
        Sparsity(0.59, method="sparsevlm"), {0: 0.6, 1: 0.4 / 0.6, 3: 0.22 / 0.4},
        raters=True, renumbers=True, recycles=True,
    ),
}  # fmt: skip


def picture(seed: int = 4) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def _qwen(folder: Path) -> None:
    config = tiny_qwen.config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_qwen, "config", lambda *a, **k: {**config(*a, **k), "num_hidden_layers": LAYERS})
        tiny_qwen.build(folder, generation="qwen2.5")


def _nvila(folder: Path) -> None:
    shape = tiny_nvila.SHAPES["nvila"]
    tiny_nvila.write(folder, replace(shape, text={**shape.text, "num_hidden_layers": LAYERS}))


# One-dimensional and multimodal RoPE; structural tokens of every kind.
BUILD: dict[str, Callable[[Path], Any]] = {
    "vicuna": lambda folder: build_oracle(folder, replace(TINY["vicuna"], layers=LAYERS)),
    "qwen2.5": _qwen,
    "nvila": _nvila,
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    found = {}
    for name, build in BUILD.items():
        folder = tmp_path_factory.mktemp(name)
        build(folder)
        found[name] = Engine.load(folder, device="cpu", dtype="float32")
    yield found
    for engine in found.values():
        engine.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Video:
    return replace(write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=6), frames=4)


@pytest.fixture(params=BUILD)
def shown(request: pytest.FixtureRequest, engines: dict[str, Engine], clip: Video) -> tuple[Engine, Image | Video]:
    return engines[request.param], clip if request.param == "qwen2.5" else picture()


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Rule:
    return RULES[request.param]


def contents(session: Session) -> list[Tensor]:
    cache = session._cache
    return [t.clone() for stores in (cache.visual, cache.text) for store in stores for t in store.segment()]


def assert_same(a: Session, b: Session) -> None:
    """Bit for bit: cache, positions of every layer, history."""
    assert a._cache.checkpoint() == b._cache.checkpoint() == a._state.checkpoint == b._state.checkpoint
    assert [(t.question, t.answer) for t in a.history] == [(t.question, t.answer) for t in b.history]
    assert all(torch.equal(x, y) for x, y in zip(contents(a), contents(b), strict=True))


# The plain pass: no cache, no chunks, one mask, float64 softmax; tokens are struck off the whole sequence.


class Plain:
    """The conversation of a session as one sequence, and what a rule makes of it."""

    def __init__(self, session: Session, rule: Rule) -> None:
        self.rule, self.model, self.decoder = rule, session._engine.model, session._engine.model.decoder
        self.parts: list[tuple[int, ...] | VisualTokens] = []
        self.turns: list[tuple[range, list[range]]] = []  # rows of the question, and of each of its media items
        self.answers: list[tuple[int, int]] = []  # row, the token that came after it
        self.size = 0
        driver, state = session._driver(None, lambda _: None), session._state  # type: ignore[arg-type]
        placed = iter(state.placed)
        prompt = session._engine.model.prompt
        for t, record in enumerate(state.records):
            media = []
            for i, _ in enumerate(record.media):
                pieces = prompt.between_media() if i else driver._opening(record.before)
                self.add(driver._ids(pieces, start=t == 0 and i == 0))
                media.append(self.add(next(placed).survivors.tokens))
            asked = replace(record.asked, records=state.records[:t])
            question = self.add(driver._question_ids(asked, record.question))
            self.turns.append((question, media))
            for token in record.answer_ids:
                self.answers.append((self.size - 1, token))
                self.add((token,))
            self.add(driver._ids(prompt.closing()))

    def add(self, part: tuple[int, ...] | VisualTokens) -> range:
        self.parts.append(part)
        self.size += len(part)
        return range(self.size - len(part), self.size)

    def visual(self, rows: range) -> list[int]:
        """The rows of a medium that are no layout."""
        part = next(p for p, at in self._placed_parts() if at == rows)
        assert isinstance(part, VisualTokens)
        return [row for row, structural in zip(rows, part.token_map.structural.tolist(), strict=True) if not structural]

    def _placed_parts(self) -> Iterator[tuple[tuple[int, ...] | VisualTokens, range]]:
        start = 0
        for part in self.parts:
            yield part, range(start, start + len(part))
            start += len(part)

    def positions(self, there: list[int], made: dict[int, tuple[int, int]]) -> Tensor:
        """Positions of a sequence of the rows `there` alone; rows that were made follow their turn's media."""
        here, start, found = set(there), 0, []
        behind = {media[-1]: turn for turn, (_, media) in enumerate(t for t in self.turns if t[1])}
        for part, rows in self._placed_parts():
            kept = [i for i, row in enumerate(rows) if row in here]
            if isinstance(part, VisualTokens):
                positions, start = self.model.visual_positions(part.token_map.select(torch.tensor(kept)), start)
            else:
                assert len(kept) == len(part)
                positions, start = self.model.text_positions(len(kept), start)
            found.append(positions)
            if rows in behind:
                count = sum(made[row][0] == behind[rows] for row in there if row in made)
                positions, start = self.model.text_positions(count, start)
                found.append(positions)
        result = torch.cat(found, dim=-1)
        if result.ndim == 1:
            assert result.tolist() == list(range(len(there)))
        return result

    def raters(self, hidden: Tensor, question: range, visual: list[int]) -> list[int]:
        words = hidden[list(question)].double()
        similarity = [0.0] * len(question)
        for row in visual:
            for i, share in enumerate((words @ hidden[row].double()).softmax(0).tolist()):
                similarity[i] += share / len(visual)
        mean = sum(similarity) / len(similarity)
        chosen = [row for row, value in zip(question, similarity, strict=True) if value > mean]
        assert 0 < len(chosen) < len(question)
        return chosen

    @torch.inference_mode()
    def run(self) -> tuple[Tensor, list[list[list[int]]]]:
        """Logits of the rows, all of which must be text from the first answer on; and per turn with media and per
        layer which of its visual tokens the layer read."""
        hidden = torch.cat(
            [
                self.model.embed_visual(part) if isinstance(part, VisualTokens)
                else self.decoder.embed(torch.tensor(part, dtype=torch.long))
                for part in self.parts
            ]
        )  # fmt: skip
        turns = [(q, [row for rows in media for row in self.visual(rows)]) for q, media in self.turns if media]
        rating = [self.raters(hidden, q, visual) if self.rule.raters else [q[-1]] for q, visual in turns]
        there = list(range(self.size))
        made: dict[int, tuple[int, int]] = {}  # new rows: their turn, and the row that each stands for
        whole = positions = self.positions(there, made)
        read: list[list[list[int]]] = [[] for _ in turns]
        # Per layer: the visual tokens of the first turn that it read, and how much its question looked at each.
        self.asked: list[tuple[list[int], Tensor]] = []

        def attention(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = layer.project(hidden, *self.decoder.angles(positions))
            k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0).double() for x in (k, v))
            scores = q.double() @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            later = torch.ones(len(hidden), len(hidden), dtype=torch.bool).triu(1)
            return scores.masked_fill(later, -torch.inf).softmax(-1), v

        def gone(p: Tensor, turn: int, share: float) -> set[int]:
            """The rows of a turn's media that go no further."""
            index = {row: i for i, row in enumerate(there)}
            visual, raters = set(turns[turn][1]) | {row for row in made if made[row][0] == turn}, rating[turn]
            own = [row for row in there if row in visual]
            score = {row: sum(float(p[:, index[r], index[row]].mean()) for r in raters) / len(raters) for row in own}
            lost = sorted(own, key=lambda row: (-score[row], index[row]))[max(1, math.floor(share * len(own) + 0.5)) :]
            if self.rule.recycles:
                recycle(turn, sorted(lost[: int(0.3 * len(lost)) + 1], key=index.__getitem__))
            return set(lost)

        def recycle(turn: int, rows: list[int]) -> None:
            """Clusters rows; what comes of it waits for `strike` to put it in front of the question."""
            points = [hidden[there.index(row)] for row in rows]
            for members, centre in peaks(points, len(rows) // 10 + 1):
                row = self.size + len(made)
                stands_for = made[rows[centre]][1] if rows[centre] in made else rows[centre]
                made[row] = turn, stands_for
                waiting.append((row, turns[turn][0][0], torch.stack([points[i] for i in members]).mean(dim=0)))

        waiting: list[tuple[int, int, Tensor]] = []

        def strike(rows: set[int]) -> None:
            nonlocal hidden, there, positions
            for row, question, vector in waiting:
                at = there.index(question)
                hidden = torch.cat([hidden[:at], vector[None], hidden[at:]])
                there = [*there[:at], row, *there[at:]]
            waiting.clear()
            hidden = hidden[[row not in rows for row in there]]
            there = [row for row in there if row not in rows]
            positions = self.positions(there, made) if self.rule.renumbers else whole[..., there]

        for i, layer in enumerate(self.decoder.layers):
            share = self.rule.stages.get(i)
            if share is not None and self.rule.before:
                for turn in range(len(turns)):  # a turn ranks where the earlier ones have lost theirs
                    strike(gone(attention(layer, hidden)[0], turn, share))
            for turn, ((_, visual), layers) in enumerate(zip(turns, read, strict=True)):
                number = {row: n for n, row in enumerate(visual)}
                number |= {row: number[stands_for] for row, (own, stands_for) in made.items() if own == turn}
                layers.append([number[row] for row in there if row in number])
            p, v = attention(layer, hidden)
            seen = [there.index(row) for row in there if row in turns[0][1] or made.get(row, (1,))[0] == 0]
            rows = [there.index(row) for row in turns[0][0]]
            self.asked.append((read[0][-1], p[:, rows][:, :, seen].mean(dim=(0, 1))))
            hidden = layer.finish(hidden, (p @ v).float())
            if share is not None and not self.rule.before:
                strike(set().union(*(gone(p, turn, share) for turn in range(len(turns)))))
        logits = torch.full((self.size + len(made), self.decoder.config.vocab_size), torch.nan)
        logits[there] = self.decoder.logits(hidden)
        logits = logits[: self.size]
        return logits, read


def peaks(points: list[Tensor], count: int) -> list[tuple[list[int], int]]:
    """Density peaks by loops: members and centre of each cluster, by the centre's index."""
    n = range(len(points))
    far = [[float((a.double() - b.double()).square().mean().sqrt()) for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(far[i])[:count]) / count) for i in n]
    largest = max(map(max, far))
    apart = [min([far[i][j] for j in n if density[j] > density[i]], default=largest) for i in n]
    centres = sorted(sorted(n, key=lambda i: (-apart[i] * density[i], i))[:count])
    own = [centres.index(i) if i in centres else min(range(count), key=lambda c: (far[i][centres[c]], c)) for i in n]
    return [([i for i in n if own[i] == c], centre) for c, centre in enumerate(centres)]


def check(session: Session, rule: Rule, *, greedy_from: int = 0) -> None:
    """A session equals the plain pass: tokens from the turn `greedy_from` on, kept sets, and logits of what follows."""
    engine, plain = session._engine, Plain(session, rule)
    logits, read = plain.run()
    before = sum(len(r.answer_ids) for r in session._state.records[:greedy_from])
    for row, token in plain.answers[before:]:
        assert int(logits[row].argmax()) == token
    turns = iter(read)
    placed = iter(session._state.placed)
    for record in session._state.records:
        if not record.media:
            continue
        items = [next(placed) for _ in record.media]
        for layer, want in enumerate(next(turns)):
            offset, got = 0, []
            for item in items:
                assert item.layers is not None
                got += (item.layers[layer] + offset).tolist()
                offset += len(item.in_store())
            assert got == want, f"layer {layer}"
    assert session._cache.visual_lens() == [sum(len(turn[layer]) for turn in read) for layer in range(LAYERS)]
    # A question, and two tokens by steps.
    asked = session._driver(None, lambda _: None)._question_ids(session._state, "Last?")  # type: ignore[arg-type]
    mark = session._cache.checkpoint()
    engine.reserve(session._cache, text=len(asked) + 2)
    hidden = engine.runner.prefill(session._cache, [TextSpan(asked)], method=Method()).hidden
    got = [engine.runner.logits(hidden), *(engine.runner.decode(session._cache, token) for token in (40, 41))]
    session._cache.restore(mark)
    plain.add(asked)
    plain.add((40, 41))
    for a, b in zip(got, plain.run()[0][-3:], strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


class TestAgainstThePlainPass:
    def test_three_turns_with_later_media(self, shown, rule):
        engine, item = shown
        session = engine.session(media=[item], sparsity=rule.sparsity)
        session.ask(QUESTIONS[0], params=SHORT)
        check(session, rule)
        session.ask(QUESTIONS[1], media=[picture(5)], params=SHORT)
        session.ask(QUESTIONS[2], params=SHORT)
        check(session, rule)
        # On three axes tokens move up only where a whole row, column or frame has gone.
        lag, stages = session._cache.lag, len(set(session._cache.visual_lens()))
        assert stages == len(rule.stages) + 1
        assert (1 < len(set(lag)) <= stages) if rule.renumbers else lag == ()
        assert list(lag) == sorted(lag) or rule.recycles  # new tokens may take more room than has become free

    def test_layers_walked_in_small_chunks(self, shown, rule, monkeypatch):
        engine, item = shown
        monkeypatch.setattr(engine.runner, "chunk_tokens", 7)
        session = engine.session(media=[item, picture(5)], sparsity=rule.sparsity)
        session.ask(QUESTIONS[1], params=SHORT)
        check(session, rule)

    @pytest.mark.parametrize("change", ["drop", "system", "stronger"])
    def test_a_conversation_that_is_built_again(self, shown, rule, change):
        engine, item = shown
        session = engine.session(media=[item, picture(5)], sparsity=rule.sparsity)
        session.ask(QUESTIONS[0], params=SHORT)
        if change == "drop":
            session.drop(2)
        elif change == "system":
            session.system = "Be brief."
        else:
            session.sparsity = replace(rule.sparsity, prefill=0.0)
            session.ask("Now?", params=SHORT, remember=False)
            assert session._cache.lag == ()
            assert len(set(session._cache.visual_lens())) == 1
            session.sparsity = rule.sparsity
        session.ask(QUESTIONS[1], params=SHORT)
        check(session, rule, greedy_from=1)


class TestSessions:
    def test_nothing_removed_is_bit_identical_to_dense(self, shown, rule):
        engine, item = shown
        none = replace(rule.sparsity, prefill=0.0)
        assert not make_method(none).needs_question
        zero, dense = (engine.session(media=[item], sparsity=s) for s in (none, Sparsity(method="dense")))
        for question in QUESTIONS:
            assert zero.ask(question, params=SHORT).token_ids == dense.ask(question, params=SHORT).token_ids
        assert_same(zero, dense)
        assert zero.selection().active is None

    def test_interleaved_sessions_equal_separate_ones(self, shown, rule):
        engine, item = shown
        separate, mixed = ([engine.session(media=[item], sparsity=rule.sparsity) for _ in range(2)] for _ in range(2))
        for _ in range(2):
            for session, question in zip(separate, QUESTIONS, strict=False):
                session.ask(question, params=SHORT)
            streams = [s.stream(q, params=SHORT) for s, q in zip(mixed, QUESTIONS, strict=False)]
            while streams:
                streams = [s for s in streams if next(s, None) is not None]
        for a, b in zip(separate, mixed, strict=True):
            assert_same(a, b)

    def test_steps_that_run_ahead(self, shown, rule, monkeypatch):
        engine, item = shown
        found = []
        for ahead in (False, True):
            monkeypatch.setattr(engine.runner, "runs_ahead", ahead)
            session = engine.session(media=[item], sparsity=rule.sparsity)
            found.append(session)
            for question in QUESTIONS[:2]:
                session.ask(question, params=SHORT)
        assert_same(*found)

    def test_the_first_question_prunes_for_all_later_ones(self, shown, rule):
        engine, item = shown
        forgetful, cleared, other = (engine.session(media=[item], sparsity=rule.sparsity) for _ in range(3))
        forgetful.ask(QUESTIONS[0], params=SHORT, remember=False)
        first = forgetful._state.placed[0].layers
        again = [forgetful.ask(QUESTIONS[1], params=SHORT, remember=False).token_ids for _ in range(2)]
        assert forgetful.ask(QUESTIONS[1], params=SHORT).token_ids == again[0] == again[1]
        assert forgetful._state.placed[0].layers is first
        cleared.ask(QUESTIONS[0], params=SHORT)
        cleared.clear()
        assert cleared.ask(QUESTIONS[1], params=SHORT).token_ids == again[0]
        assert_same(forgetful, cleared)
        other.ask(QUESTIONS[1], params=SHORT)
        assert any(not torch.equal(a, b) for a, b in zip(first, other._state.placed[0].layers, strict=True))

    def test_undo(self, shown, rule):
        engine, item = shown
        session, plain, fresh = (engine.session(media=[item], sparsity=rule.sparsity) for _ in range(3))
        for s in (session, plain):
            s.ask(QUESTIONS[0], params=SHORT)
        session.ask(QUESTIONS[1], media=[picture(6)], params=SHORT)
        session.undo()
        assert_same(session, plain)
        session.undo()
        assert session._cache.next_position == 0  # without its question nothing of the media is in the cache
        assert session._cache.lag == ()
        for s in (session, fresh):
            s.ask(QUESTIONS[2], params=SHORT)
        assert_same(session, fresh)

    @pytest.mark.parametrize("name", RULES)
    @pytest.mark.parametrize("end", ["cancel", "fail"])
    def test_a_turn_that_ends_early_leaves_the_session_as_it_was(self, engines, name, end):
        engine, rule = engines["vicuna"], RULES[name]
        session, plain = (engine.session(media=[picture()], sparsity=rule.sparsity) for _ in range(2))
        for s in (session, plain):
            s.ask(QUESTIONS[0], params=SHORT)
        before = session._cache.checkpoint()

        def runs_to(stop_at: int) -> bool:
            """Whether a turn has no more steps than that; else it ends early at that step."""
            steps = 0

            def progress(_: object) -> None:
                nonlocal steps
                steps += 1
                if steps == stop_at and end == "cancel":
                    session.cancel()
                elif steps == stop_at:
                    raise KeyError("planned")

            with contextlib.suppress(KeyError):
                return (
                    session.ask(QUESTIONS[1], media=[picture(5)], params=SHORT, progress=progress).finish_reason
                    != "cancelled"
                )
            return False

        stop_at = 1
        while not runs_to(stop_at):
            assert session._cache.checkpoint() == before
            stop_at += 1
        assert stop_at > LAYERS
        stream = session.stream(QUESTIONS[2], params=SHORT)
        next(stream)
        stream.close()
        plain.ask(QUESTIONS[1], media=[picture(5)], params=SHORT)
        assert_same(session, plain)

    def test_a_graph_is_captured_anew_where_layers_begin_to_count_for_themselves(self, engines, monkeypatch):
        engine = engines["vicuna"]
        session, plain = (engine.session(sparsity=RULES["pdrop"].sparsity) for _ in range(2))
        captures = 0

        def capture(self: DecodeStep, whole: Any, cache: object) -> Any:
            nonlocal captures
            captures += 1
            return SimpleNamespace(replay=whole)

        session._cache.reserve(visual=3000, text=3000)
        engine.runner._step_of(session._cache)._graphs = True
        monkeypatch.setattr(DecodeStep, "_capture", capture)
        for turn, media in enumerate(([], [picture()], [picture(5)])):
            for s in (session, plain):
                s.ask(QUESTIONS[turn], media=media, params=SHORT)
        assert captures == 2
        assert_same(session, plain)


class TestWhatIsReported:
    def test_counts_and_shares_by_layer(self, shown, rule):
        engine, item = shown
        session = engine.session(media=[item], sparsity=rule.sparsity)
        session.ask(QUESTIONS[0], params=SHORT)
        plain = Plain(session, rule)
        read = plain.run()[1][0]
        counts = [len(layer) for layer in read]
        assert sorted(counts, reverse=True) == counts
        assert counts[0] == session.media[0].tokens_total > counts[-1]
        later = [session.ask(question, params=SHORT) for question in QUESTIONS[1:]]
        for result in later:
            assert result.stats.visual_tokens_kept == counts[0]
            assert result.stats.visual_tokens_active == pytest.approx(sum(counts) / LAYERS)
            assert result.stats.layer_tokens == result.stats.prompt_tokens  # text goes through every layer
        selection = session.selection()
        where = session._state.placed[0].tokens.token_map
        share = torch.zeros(len(where))
        visual = torch.nonzero(~where.structural)[:, 0]
        for layer in read:
            share[visual[layer]] += 1 / LAYERS
        torch.testing.assert_close(selection.layer_share(), share)
        assert set(selection.states().tolist()) <= {ACTIVE, STRUCTURAL}  # the first layer reads every token
        found = session.overlap()
        assert found.jaccard == [1.0] * LAYERS  # one set for all turns
        assert [layer.tolist() for layer in found.sinks] == [sorted(layer) for layer in read]
        assert not any(len(layer) for layer in found.retrieval)
        entry = session._cache._entry_bytes
        texts = [store.length for store in session._cache.text]
        assert session._cache.read_bytes() == (sum(counts) + sum(texts)) * entry

    def test_shares_of_items_that_two_questions_pruned(self, shown, rule):
        engine, item = shown
        session = engine.session(media=[item], sparsity=rule.sparsity)
        session.ask(QUESTIONS[0], params=SHORT)
        session.ask(QUESTIONS[1], media=[picture(5)], params=SHORT)
        want = []
        for placed, read in zip(session._state.placed, Plain(session, rule).run()[1], strict=True):
            where = placed.tokens.token_map
            share = torch.zeros(len(where))
            for layer in read:
                share[torch.nonzero(~where.structural)[:, 0][layer]] += 1 / LAYERS
            want.append(share)
        torch.testing.assert_close(session.selection().layer_share(), torch.cat(want))

    def test_layer_tokens_of_the_first_turn(self, shown, rule):
        engine, item = shown
        session = engine.session(media=[item], sparsity=rule.sparsity)
        result = session.ask(QUESTIONS[0], params=SHORT, remember=False)
        counts = session._cache.visual_lens()
        missing = sum(counts[0] - count for count in counts) / LAYERS
        assert result.stats.layer_tokens == pytest.approx(result.stats.prompt_tokens - missing)

    def test_retrieval_from_what_pruning_has_left(self, shown, rule):
        """In the first turn too, whose media come with the question."""
        engine, item = shown
        session = engine.session(media=[item, picture(6)], sparsity=replace(rule.sparsity, decode=0.5))
        for turn, media in enumerate(([], [], [picture(5)])):
            result = session.ask(QUESTIONS[turn], media=media, params=SHORT)
            selection, lens = session.selection(), session._cache.visual_lens()
            keep = [math.floor(n / 2 + 0.5) for n in lens]
            assert result.stats.visual_tokens_active == pytest.approx(sum(keep) / LAYERS)
            assert [len(active) for active in selection.active] == keep
            assert [len(scores) for scores in selection.scores] == [len(selection.store)] * LAYERS
            assert [int((scores > 0).sum()) for scores in selection.scores] == lens
            for scores, active in zip(selection.scores, selection.active, strict=True):
                assert scores[active].min() == scores.topk(len(active)).values[-1]
            assert all(0.5 < mass < 1 for mass in selection.recovered_mass())
            if turn == 0:  # later questions see what answers have made of the active sets
                plain = Plain(session, rule)
                plain.run()
                for layer, (here, want) in enumerate(plain.asked):
                    got = selection.scores[layer][here].double()
                    assert (got - want).abs().max() < 1e-5 * want.max()
                    best = sorted(range(len(here)), key=lambda i: (-float(want[i]), i))[: keep[layer]]
                    assert selection.active[layer].tolist() == [here[i] for i in sorted(best)]


class TestStages:
    def test_of_the_papers_decoder(self):
        assert FastV(0.5).at_depth(32).stages == ((1, 0.5),)
        pdrop = PDrop(0.53125).at_depth(32).stages
        assert pdrop == ((8, 0.5), (16, 0.5), (24, 0.5))
        layers, removed = zip(*SparseVLMPlus(1 - 6488 / (32 * 576)).at_depth(32).stages, strict=True)
        assert layers == (2, 6, 15)
        assert removed == pytest.approx((1 - 300 / 576, 1 / 3, 0.45), abs=1e-6)

    @pytest.mark.parametrize("method", [PDrop, SparseVLMPlus])
    @pytest.mark.parametrize("depth", [2, 3, 4, 5, 7, 12, 24, 28, 80])
    @pytest.mark.parametrize("removed", [0.01, 0.3, 0.49])
    def test_the_average_is_what_was_asked(self, method, depth, removed):
        stages = method(removed).at_depth(depth).stages
        there, read = 1.0, 0.0
        for layer in range(depth):
            gone = dict(stages).get(layer, 0.0)
            assert 0 <= gone <= 1
            before, there = there, there * (1 - gone)
            read += there if method is PDrop else before
        assert 1 - read / depth == pytest.approx(removed, abs=1e-6)
        assert all(0 <= layer < depth for layer, _ in stages)

    @pytest.mark.parametrize("name", ["pdrop", "sparsevlm+"])
    def test_what_the_first_layers_alone_exceed_is_refused(self, engines, name):
        session = engines["vicuna"].session(media=[picture()], sparsity=Sparsity(0.9, method=name))
        with pytest.raises(InvalidRequest, match=rf"{name.rstrip('+')}: expected less than 0\.(75|875)"):
            session.ask(QUESTIONS[0], params=SHORT)
        assert session._cache.next_position == 0
        session.sparsity = Sparsity(0.5, method=name)
        session.ask(QUESTIONS[0], params=SHORT)

    def test_decoders_without_a_layer_to_prune_behind(self):
        with pytest.raises(InvalidRequest, match="more than 2 decoder layers, got 2"):
            FastV(0.5).at_depth(2)
        for method in (PDrop(0.1), SparseVLMPlus(0.1)):
            with pytest.raises(InvalidRequest, match="first 1 of 1 layers"):
                method.at_depth(1)
        for method in (FastV(), PDrop(), SparseVLMPlus()):
            assert method.at_depth(1) is method

    def test_close_to_the_bound_a_token_stays(self):
        method = PDrop(0.7499999999).at_depth(4)
        assert method.on_layer(1, torch.ones(7)).tolist() == [0]

    def test_ties_go_to_the_lower_index(self):
        assert FastV(0.5).at_depth(3).on_layer(1, torch.ones(6)).tolist() == [0, 1, 2]


class TestRecycling:
    def test_density_peaks_by_hand(self):
        # Three heaps on a line, each densest in its middle. Scores of the middles, exp(-5/3) 85, exp(-8.5/3) 40.5 and
        # exp(-12.5/3) 41, are above those of all others: their nearest denser point is in the same heap.
        points = torch.tensor([0.0, 1.0, 3.0, 40.0, 41.5, 44.0, 80.0, 82.5, 85.0])[:, None]
        centres, cluster = density_peaks(points, 3)
        assert centres.tolist() == [1, 4, 7]
        assert cluster.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]

    def test_one_cluster_is_the_mean(self):
        hidden, scores = torch.arange(12.0).reshape(6, 2), torch.tensor([0.1, 0.6, 0.2, 0.5, 0.3, 0.4])
        new, stand_for = SparseVLM().recycle(hidden, scores)  # the best int(6 * 0.3) + 1
        torch.testing.assert_close(new, (hidden[1] + hidden[3])[None] / 2)
        assert stand_for.tolist() == [1]

    def test_a_single_dropped_token_comes_back(self):
        new, stand_for = SparseVLM().recycle(torch.ones(1, 3), torch.ones(1))
        assert torch.equal(new, torch.ones(1, 3))
        assert stand_for.tolist() == [0]

    @pytest.mark.parametrize(("n", "count"), [(1, 1), (7, 1), (23, 3), (40, 5), (40, 40)])
    def test_equals_the_loops(self, n, count):
        points = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
        centres, cluster = density_peaks(points, count)
        want = peaks(list(points), count)
        assert centres.tolist() == [centre for _, centre in want]
        assert [torch.nonzero(cluster == c)[:, 0].tolist() for c in range(count)] == [members for members, _ in want]

    def test_points_in_one_place_fill_every_cluster(self):
        centres, cluster = density_peaks(torch.ones(9, 4), 3)
        assert centres.tolist() == [0, 1, 2]
        assert cluster.bincount(minlength=3).tolist() == [7, 1, 1]

    def test_a_step_finds_the_angles_of_layers_that_are_ahead(self, engines):
        runner = engines["vicuna"].runner
        got = []
        for lag, ahead in (((-9,) * LAYERS, 0), ((), 9)):
            runner._angles.cos = runner._angles.sin = torch.empty(0)
            cache = runner.new_cache()
            cache.reserve(text=4)
            cache.next_position, cache.lag = 1018 + ahead, lag
            got.append(runner.decode(cache, 40))
        assert torch.equal(*got)


class TestRaters:
    def test_by_hand(self):
        visual = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
        text = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
        # Rows over the text: softmax(3, 0, 0, -1) and softmax(0, 0, 2, -2).
        mean = [(math.exp(a) / (math.e**3 + 2 + 1 / math.e) + math.exp(b) / (2 + math.e**2 + math.e**-2)) / 2
                for a, b in ((3, 0), (0, 0), (0, 2), (-1, -2))]  # fmt: skip
        want = [value > 0.25 for value in mean]
        assert want == [True, False, True, False]
        assert SparseVLMPlus().raters(visual, text).tolist() == want

    def test_words_all_alike_all_rate(self):
        assert SparseVLMPlus().raters([torch.ones(3, 2)], torch.ones(1, 2)).tolist() == [True]
        assert SparseVLMPlus().raters([torch.ones(3, 2)], torch.zeros(4, 2)).tolist() == [True] * 4
