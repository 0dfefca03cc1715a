"""Sets and budgets of each key head, against one plain masked pass over the whole conversation."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import TinyFolders
from oracles import write_clip
from torch import Tensor

import sparsevila
from sparsevila import CorruptCheckpoint, Engine, Image, InvalidRequest, SamplingParams, Session, Sparsity, Video
from sparsevila.engine.conversation import Placed
from sparsevila.engine.decode_step import DecodeStep
from sparsevila.engine.diagnostics import ACTIVE, KEPT, Selection, overlap
from sparsevila.engine.head_scores import HEAD_SCORES
from sparsevila.engine.head_sets import by_head
from sparsevila.engine.runner import TextSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.engine.sparsity.sparsemm import SparseMM, budgets
from sparsevila.engine.sparsity.sparsevila import SparseVILA
from sparsevila.models.interface import TokenMap, VisualTokens
from sparsevila.models.positions import ContiguousPositions

SHORT = SamplingParams(max_new_tokens=5)
QUESTIONS = ("What is it?", "Which colour is the car on the left?", "And then?")
FAMILIES = ("vicuna", "qwen2.5", "nvila")  # one axis and three, structural tokens of every kind; all share key heads
POLICIES = {
    "own sets": Sparsity(0.3, 0.6, sets="per_kv_head"),
    "sparsemm": Sparsity(0.6, method="sparsemm"),
    "sparsemm, retrieval": Sparsity(0.5, 0.5, method="sparsemm"),
}
EVICTING = tuple(POLICIES)[1:]


def picture(seed: int = 4) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Shown:
    """A model, what it is shown, and its scores of heads."""

    engine: Engine
    item: Image | Video
    scores: list[list[float]]  # layers times query heads
    file: Path

    def policy(self, name: str) -> Sparsity:
        return replace(POLICIES[name], head_scores=str(self.file)) if name in EVICTING else POLICIES[name]


@pytest.fixture(scope="module")
def all_shown(tiny_folders: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Shown]]:
    folder = tmp_path_factory.mktemp("heads")
    clip = replace(write_clip(folder / "clip.mp4", frames=6), frames=4)
    found = {}
    for name in FAMILIES:
        engine = Engine.load(tiny_folders[name], device="cpu", dtype="float32")
        config = engine.model.decoder.config
        scores = np.random.default_rng(len(name)).random((config.num_layers, config.num_heads)).round(3)
        scores[0, 0], scores[1, 0] = 0.0, 30.0  # of layer 1 the first key head takes all there is
        file = folder / f"{name}.json"
        file.write_text(json.dumps({"scores": scores.tolist(), "data": "dice"}))
        found[name] = Shown(engine, clip if name == "qwen2.5" else picture(), scores.tolist(), file)
    yield found
    for shown in found.values():
        shown.engine.close()


@pytest.fixture(params=FAMILIES)
def shown(request: pytest.FixtureRequest, all_shown: dict[str, Shown]) -> Shown:
    return all_shown[request.param]


@pytest.fixture
def vicuna(all_shown: dict[str, Shown]) -> Shown:
    return all_shown["vicuna"]


@pytest.fixture(params=POLICIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def contents(session: Session) -> list[Tensor]:
    cache = session._cache
    heads = range(cache.visual[0].k.shape[0])
    return [t.clone() for stores in (cache.visual, cache.text) for s in stores for h in heads for t in s.segment_of(h)]


def assert_same(a: Session, b: Session) -> None:
    """Bit for bit: cache, history."""
    assert a._cache.checkpoint() == b._cache.checkpoint() == a._state.checkpoint == b._state.checkpoint
    assert [(t.question, t.answer) for t in a.history] == [(t.question, t.answer) for t in b.history]
    assert all(torch.equal(x, y) for x, y in zip(contents(a), contents(b), strict=True))


# The plain pass: no cache, no chunks, a mask for each key head, float64 softmax.


def head_budgets(scores: list[list[float]], num_kv_heads: int, n: int, share: float) -> list[list[int]]:
    """A tenth each and the rest by score, at most n: the level of the water is found by halving."""
    merits = []
    for row in scores:
        group = len(row) // num_kv_heads
        merits += [sum(row[h * group : (h + 1) * group]) / group for h in range(num_kv_heads)]
    total = math.floor(share * n * len(merits) + 0.5)
    floor, low, high = 0.1 * total / len(merits), 0.0, 1e9
    for _ in range(200):
        level = (low + high) / 2
        full = sum(min(n, floor + level * merit) for merit in merits)
        low, high = (level, high) if full < total else (low, level)
    wanted = [min(n, floor + low * merit) for merit in merits]
    counts = [math.floor(w + 1e-6) for w in wanted]
    assert min(counts) > 0
    for head in sorted(range(len(wanted)), key=lambda h: counts[h] - wanted[h])[: total - sum(counts)]:
        counts[head] += 1
    return [counts[i : i + num_kv_heads] for i in range(0, len(counts), num_kv_heads)]


@dataclass
class PlainTurn:
    question: range
    visual: list[int]  # rows of the media that came with it
    end: int = 0  # behind its closing text


class Plain:
    """The conversation of a session as one sequence, and what a policy makes of it."""

    def __init__(self, session: Session, scores: list[list[float]]) -> None:
        self.scores, self.model, self.decoder = scores, session._engine.model, session._engine.model.decoder
        policy = session.sparsity
        assert isinstance(policy, Sparsity)
        self.keeps = 1 - policy.prefill if policy.method == "sparsemm" else 1.0
        self.reads = 1 - policy.decode
        self.parts: list[tuple[int, ...] | VisualTokens] = []
        self.media: dict[int, Placed] = {}  # by the part
        self.turns: list[PlainTurn] = []
        self.answers: list[tuple[int, int]] = []  # row, the token that came after it
        self.size = 0
        driver, state = session._driver(None, lambda _: None), session._state  # type: ignore[arg-type]
        placed, prompt = iter(state.placed), session._engine.model.prompt
        for t, record in enumerate(state.records):
            visual = []
            for i, _ in enumerate(record.media):
                pieces = prompt.between_media() if i else driver._opening(record.before)
                self.add(driver._ids(pieces, start=t == 0 and i == 0))
                item = next(placed)
                tokens = item.survivors.tokens
                self.media[len(self.parts)] = item
                layout = tokens.token_map.structural.tolist()
                visual += [row for row, is_layout in zip(self.add(tokens), layout, strict=True) if not is_layout]
            question = self.add(driver._question_ids(replace(record.asked, records=state.records[:t]), record.question))
            for token in record.answer_ids:
                self.answers.append((self.size - 1, token))
                self.add((token,))
            self.add(driver._ids(prompt.closing()))
            self.turns.append(PlainTurn(question, visual, self.size))

    def add(self, part: tuple[int, ...] | VisualTokens) -> range:
        self.parts.append(part)
        self.size += len(part)
        return range(self.size - len(part), self.size)

    def positions(self) -> Tensor:
        """On one axis survivors stand where they stood; on three the model says where."""
        found, start = [], 0
        for i, part in enumerate(self.parts):
            if isinstance(part, VisualTokens) and isinstance(self.model, ContiguousPositions):
                positions = start + self.media[i].survivors.sources
                start += len(self.media[i].tokens)
            elif isinstance(part, VisualTokens):
                positions, start = self.model.visual_positions(part.token_map, start)
            else:
                positions, start = self.model.text_positions(len(part), start)
            found.append(positions)
        return torch.cat(found, dim=-1)

    @torch.inference_mode()
    def run(self) -> tuple[Tensor, list[list[list[list[int]]]], list[list[list[list[int]]]]]:
        """Logits of all rows; kept[layer][turn][head] and read[layer][turn][head], rows of visual tokens.

        `asked[layer][head]` is how much the last question looked at each row that the head had.
        """
        self.asked: list[list[dict[int, float]]] = []
        hidden = torch.cat(
            [
                self.model.embed_visual(part) if isinstance(part, VisualTokens)
                else self.decoder.embed(torch.tensor(part, dtype=torch.long))
                for part in self.parts
            ]
        )  # fmt: skip
        angles = self.decoder.angles(self.positions())
        kept, read = [], []
        for number, layer in enumerate(self.decoder.layers):
            self.asked.append([])
            q, k, v = layer.project(hidden, *angles)
            group = len(q) // len(k)
            found = [self._head(number, h, q[h * group : (h + 1) * group], k[h]) for h in range(len(k))]
            out = torch.cat([p @ v[h].double() for h, (p, _, _) in enumerate(found)])
            kept.append([[head[t] for _, head, _ in found] for t in range(len(self.turns))])
            read.append([[head[t] for _, _, head in found] for t in range(len(self.turns))])
            hidden = layer.finish(hidden, out.float())
        return self.decoder.logits(hidden), kept, read

    def _head(self, layer: int, head: int, q: Tensor, k: Tensor) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        """Attention (group, M, M) of a key head's queries; what it keeps of each turn's media; what a turn reads."""
        dots = q.double() @ k.double().t() / math.sqrt(q.shape[-1])
        sees = torch.ones(self.size, self.size, dtype=torch.bool).tril()
        there: list[int] = []
        kept, read = [], []
        for turn in self.turns:
            later, own = turn.question[-1] + 1, turn.visual
            asked = dots[:, list(turn.question)].masked_fill(~sees[list(turn.question)], -torch.inf).softmax(-1)
            if own and self.keeps < 1:
                count = head_budgets(self.scores, len(self.scores[0]) // len(q), len(own), self.keeps)[layer][head]
                each = [float(asked[:, -32:, row].mean()) for row in own]
                smooth = [sum(each[max(0, i - 2) : i + 3]) / 5 for i in range(len(each))]
                best = sorted(range(len(own)), key=lambda i: (-smooth[i], i))[:count]
                stays = [own[i] for i in sorted(best)]
                sees[later:, sorted(set(own) - set(stays))] = False
            else:
                stays = own
            kept.append(stays)
            there = there + stays
            count = max(1, math.floor(self.reads * len(there) + 0.5))
            score = {row: float(asked[:, :, row].mean()) for row in there}
            reads = sorted(sorted(there, key=lambda row: (-score[row], row))[:count])
            sees[later : turn.end, sorted(set(there) - set(reads))] = False
            read.append(reads)
        self.asked[layer].append(score)
        p = dots.masked_fill(~sees, -torch.inf).softmax(-1)
        return p, kept, read


def check(session: Session, scores: list[list[float]], *, greedy_from: int = 0) -> None:
    """A session equals the plain pass: tokens from the turn `greedy_from` on, kept and read sets, and logits of what
    follows."""
    engine, plain = session._engine, Plain(session, scores)
    logits, kept, read = plain.run()
    before = sum(len(r.answer_ids) for r in session._state.records[:greedy_from])
    for row, token in plain.answers[before:]:
        assert int(logits[row].argmax()) == token
    store = {row: i for i, row in enumerate(row for turn in plain.turns for row in turn.visual)}
    placed = iter(session._state.placed)
    for t, record in enumerate(session._state.records):
        items = [next(placed) for _ in record.media]
        if not items or plain.keeps == 1:
            continue
        number = {row: i for i, row in enumerate(plain.turns[t].visual)}
        for layer, turns in enumerate(kept):
            assert items[0].layers is not None
            got = [own.tolist() for own in by_head(items[0].layers[layer])]
            assert got == [[number[row] for row in own] for own in turns[t]], f"layer {layer}"
    selection = session.selection()
    assert selection is not None
    for layer, turns in enumerate(read):
        assert selection.active is not None
        got = [own.tolist() for own in by_head(selection.active[layer])]
        assert got == [[store[row] for row in own] for own in turns[-1]], f"layer {layer}"
        if plain.reads < 1:
            assert selection.scores is not None
            heads, want = plain.asked[layer], torch.zeros(len(store))
            for row, score in ((row, score) for own in heads for row, score in own.items()):
                want[store[row]] += score / len(heads)
            assert (selection.scores[layer] - want).abs().max() < 1e-5 * want.max()
            held = sum(own[row] for own, rows in zip(heads, turns[-1], strict=True) for row in rows)
            assert selection.recovered_mass()[layer] == pytest.approx(held / sum(sum(own.values()) for own in heads))
    # A question, and two tokens by steps: nothing is retrieved for them.
    asked = session._driver(None, lambda _: None)._question_ids(session._state, "Last?")  # type: ignore[arg-type]
    mark = session._cache.checkpoint()
    engine.reserve(session._cache, text=len(asked) + 2)
    hidden = engine.runner.prefill(session._cache, [TextSpan(asked)], method=Method()).hidden
    ours = [engine.runner.logits(hidden), *(engine.runner.decode(session._cache, token) for token in (40, 41))]
    session._cache.restore(mark)
    plain.add(asked)
    plain.add((40, 41))
    for a, b in zip(ours, plain.run()[0][-3:], strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


class TestAgainstThePlainPass:
    def test_three_turns_with_later_media(self, shown, name):
        session = shown.engine.session(media=[shown.item], sparsity=shown.policy(name))
        session.ask(QUESTIONS[0], params=SHORT)
        check(session, shown.scores)
        session.ask(QUESTIONS[1], media=[picture(5)], params=SHORT)
        check(session, shown.scores)
        session.ask(QUESTIONS[2], params=SHORT)
        check(session, shown.scores)
        first = session.selections[0].active[1]
        assert len({tuple(own.tolist()) for own in by_head(first)}) == len(by_head(first)) > 1  # heads differ
        heads = [store.heads for store in session._cache.visual]
        assert any(heads) == (name in EVICTING)

    def test_layers_walked_in_small_chunks(self, shown, name, monkeypatch):
        monkeypatch.setattr(shown.engine.runner, "chunk_tokens", 7)
        session = shown.engine.session(media=[shown.item, picture(5)], sparsity=shown.policy(name))
        session.ask(QUESTIONS[1], params=SHORT)
        check(session, shown.scores)

    @pytest.mark.parametrize("change", ["drop", "system", "stronger"])
    def test_a_conversation_that_is_built_again(self, vicuna, name, change):
        session = vicuna.engine.session(media=[vicuna.item, picture(5)], sparsity=vicuna.policy(name))
        session.ask(QUESTIONS[0], params=SHORT)
        if change == "drop":
            session.drop(2)
        elif change == "system":
            session.system = "Be brief."
        else:
            session.sparsity = replace(vicuna.policy(name), prefill=0.0)
            session.ask("Now?", params=SHORT, remember=False)
            assert session._cache.checkpoint().visual_heads == ()
            session.sparsity = vicuna.policy(name)
        session.ask(QUESTIONS[1], params=SHORT)
        if name in EVICTING:  # answers are prefilled densely, over what the first question has left
            rebuilt = vicuna.engine.session(media=[vicuna.item], sparsity=replace(vicuna.policy(name), decode=0.0))
            rebuilt.ask(QUESTIONS[0], params=SHORT)
            if change == "drop":
                got, want = (s._state.placed[0].layers for s in (session, rebuilt))
                assert all(torch.equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))
        if POLICIES[name].decode == 0:
            check(session, vicuna.scores, greedy_from=1)


class TestSessions:
    def test_nothing_removed_is_bit_identical_to_dense(self, shown, name):
        none = replace(shown.policy(name), prefill=0.0, decode=0.0, head_scores=None)  # no file is needed
        zero, dense = (shown.engine.session(media=[shown.item], sparsity=s) for s in (none, Sparsity(method="dense")))
        for question in QUESTIONS:
            assert zero.ask(question, params=SHORT).token_ids == dense.ask(question, params=SHORT).token_ids
        assert_same(zero, dense)
        assert zero.selection().active is None

    def test_one_set_for_all_where_heads_agree(self, vicuna):
        """With all entries read, sets of each head are the shared ones: nothing but their form is new."""
        session = vicuna.engine.session(media=[vicuna.item], sparsity=Sparsity(0.3, 1e-9, sets="per_kv_head"))
        plain = vicuna.engine.session(media=[vicuna.item], sparsity=Sparsity(0.3, 1e-9))
        for s in (session, plain):
            s.ask(QUESTIONS[0], params=SHORT)
        assert_same(session, plain)
        assert session.selection().recovered_mass() == pytest.approx([1.0, 1.0])

    def test_interleaved_sessions_equal_separate_ones(self, vicuna, name):
        separate, mixed = (
            [vicuna.engine.session(media=[vicuna.item], sparsity=vicuna.policy(name)) for _ in range(2)]
            for _ in range(2)
        )
        for _ in range(2):
            for session, question in zip(separate, QUESTIONS, strict=False):
                session.ask(question, params=SHORT)
            streams = [s.stream(q, params=SHORT) for s, q in zip(mixed, QUESTIONS, strict=False)]
            while streams:
                streams = [s for s in streams if next(s, None) is not None]
        for a, b in zip(separate, mixed, strict=True):
            assert_same(a, b)

    def test_steps_that_run_ahead(self, vicuna, name, monkeypatch):
        found = []
        for ahead in (False, True):
            monkeypatch.setattr(vicuna.engine.runner, "runs_ahead", ahead)
            session = vicuna.engine.session(media=[vicuna.item], sparsity=vicuna.policy(name))
            found.append(session)
            for question in QUESTIONS[:2]:
                session.ask(question, params=SHORT)
        assert_same(*found)

    @pytest.mark.parametrize("name", EVICTING)
    def test_what_the_first_question_evicts_stays_away(self, vicuna, name):
        forgetful, cleared, other = (
            vicuna.engine.session(media=[vicuna.item], sparsity=vicuna.policy(name)) for _ in range(3)
        )
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
        theirs = other._state.placed[0].layers
        assert any(not torch.equal(a, b) for x, y in zip(first, theirs, strict=True) for a, b in zip(x, y, strict=True))

    def test_undo(self, vicuna, name):
        policy = vicuna.policy(name)
        session, plain, fresh = (vicuna.engine.session(media=[vicuna.item], sparsity=policy) for _ in range(3))
        for s in (session, plain):
            s.ask(QUESTIONS[0], params=SHORT)
        session.ask(QUESTIONS[1], media=[picture(6)], params=SHORT)
        session.undo()
        assert_same(session, plain)
        session.undo()
        assert (session._cache.next_position == 0) == (name in EVICTING)
        assert session._cache.checkpoint().visual_heads == ()
        for s in (session, fresh):
            s.ask(QUESTIONS[2], params=SHORT)
        assert_same(session, fresh)

    def test_eviction_of_a_turn(self, vicuna, name):
        """`remember=False`: the next answer is the one of a session that never heard the question."""
        policy = vicuna.policy(name)
        session, plain = (vicuna.engine.session(media=[vicuna.item], sparsity=policy) for _ in range(2))
        for s in (session, plain):
            s.ask(QUESTIONS[0], params=SHORT)
        session.ask(QUESTIONS[1], params=SHORT, remember=False)
        for s in (session, plain):
            s.ask(QUESTIONS[2], params=SHORT)
        assert_same(session, plain)

    @pytest.mark.parametrize("end", ["cancel", "fail"])
    def test_a_turn_that_ends_early_leaves_the_session_as_it_was(self, vicuna, name, end):
        policy = vicuna.policy(name)
        session, plain = (vicuna.engine.session(media=[vicuna.item], sparsity=policy) for _ in range(2))
        for s in (session, plain):
            s.ask(QUESTIONS[0], params=SHORT)
        before = session._cache.checkpoint()

        def runs_to(stop_at: int) -> bool:
            steps = 0

            def progress(_: object) -> None:
                nonlocal steps
                steps += 1
                if steps == stop_at and end == "cancel":
                    session.cancel()
                elif steps == stop_at:
                    raise KeyError("planned")

            with contextlib.suppress(KeyError):
                reason = session.ask(QUESTIONS[1], media=[picture(5)], params=SHORT, progress=progress).finish_reason
                return reason != "cancelled"
            return False

        stop_at = 1
        while not runs_to(stop_at):
            assert session._cache.checkpoint() == before
            stop_at += 1
        assert stop_at > 3
        plain.ask(QUESTIONS[1], media=[picture(5)], params=SHORT)
        assert_same(session, plain)

    def test_a_graph_is_captured_anew_where_heads_begin_to_differ(self, vicuna, monkeypatch):
        session, plain = (vicuna.engine.session(sparsity=vicuna.policy("sparsemm")) for _ in range(2))
        captures = 0

        def capture(self: DecodeStep, whole: Any, cache: object) -> Any:
            nonlocal captures
            captures += 1
            return SimpleNamespace(replay=whole)

        session._cache.reserve(visual=3000, text=3000)
        vicuna.engine.runner._step_of(session._cache)._graphs = True
        monkeypatch.setattr(DecodeStep, "_capture", capture)
        for turn, media in enumerate(([], [picture()], [picture(5)])):
            for s in (session, plain):
                s.ask(QUESTIONS[turn], media=media, params=SHORT)
        assert captures == 2
        assert_same(session, plain)


class TestWhatIsReported:
    def test_counts_and_bytes(self, shown, name):
        session = shown.engine.session(media=[shown.item], sparsity=shown.policy(name))
        for question in QUESTIONS[:2]:
            result = session.ask(question, params=replace(SHORT, max_new_tokens=1))
            _, _, read = Plain(session, shown.scores).run()
            counts = [[len(own) for own in turns[-1]] for turns in read]
            mean = sum(map(sum, counts)) / sum(map(len, counts))
            assert result.stats.visual_tokens_active == pytest.approx(mean)
            assert result.stats.visual_tokens_kept == max(session._cache.visual_lens()) >= max(map(max, counts))
        if name == "sparsemm":
            n = session.media[0].tokens_total
            assert sum(map(sum, counts)) == math.floor(0.4 * n * sum(map(len, counts)) + 0.5)
            config = shown.engine.model.decoder.config
            texts = config.num_kv_heads * sum(store.length for store in session._cache.text)
            assert session._cache.read_bytes() == (sum(map(sum, counts)) + texts) * 2 * config.head_dim * 4

    def test_shares_states_mass_and_overlap(self, vicuna, name):
        session = vicuna.engine.session(media=[vicuna.item], sparsity=vicuna.policy(name))
        sets = []
        for question in QUESTIONS[:2]:
            session.ask(question, params=SHORT)
            _, _, read = Plain(session, vicuna.scores).run()
            plain = Plain(session, vicuna.scores)
            number = {row: i for i, row in enumerate(plain.turns[0].visual)}
            sets.append([[{number[row] for row in own} for own in turns[-1]] for turns in read])
        selection = session.selection()
        pairs = sum(map(len, sets[1]))
        share = torch.zeros(len(selection.token_map))
        for own in (own for layer in sets[1] for own in layer):
            share[selection.store[sorted(own)]] += 1 / pairs
        torch.testing.assert_close(selection.layer_share(), share)
        assert (selection.states()[selection.store] == KEPT).any() or name != "own sets"
        assert bool((selection.states()[share > 0] == ACTIVE).all())
        found = session.overlap()
        for layer, (one, two) in enumerate(zip(*sets, strict=True)):
            both, either = (sum(len(f(a, b)) for a, b in zip(one, two, strict=True)) for f in (set.__and__, set.__or__))
            assert found.jaccard[layer] == pytest.approx(both / either)
            assert found.sinks[layer].tolist() == sorted(set().union(*one) & set().union(*two))
            assert found.retrieval[layer].tolist() == sorted(set().union(*one) ^ set().union(*two))
        if POLICIES[name].decode:
            assert [len(scores) for scores in selection.scores] == [len(selection.store)] * 2
            assert all(0 < mass < 1 for mass in selection.recovered_mass())
        else:
            assert selection.scores is None
            assert selection.recovered_mass() == []
            assert found.jaccard == [1.0, 1.0]

    def test_mass_is_that_of_each_head(self, vicuna, monkeypatch):
        """More than any shared set of that size holds, and what the scores of the heads say."""
        seen = []
        on_turn = SparseVILA.on_turn

        def spy(self: SparseVILA, scores: Any) -> Any:
            seen.append(scores)
            return on_turn(self, scores)

        monkeypatch.setattr(SparseVILA, "on_turn", spy)
        found = []
        for sets in ("per_kv_head", "shared"):
            session = vicuna.engine.session(media=[vicuna.item], sparsity=Sparsity(0.0, 0.7, sets=sets))
            session.ask(QUESTIONS[0], params=SHORT)
            found.append(session.selection())
        for layer, scores in enumerate(seen[0]):
            torch.testing.assert_close(scores.mean(dim=0), seen[1][layer])
            torch.testing.assert_close(found[0].scores[layer], seen[1][layer])
            k = math.floor(0.3 * scores.shape[1] + 0.5)
            want = float(scores.topk(k, dim=1).values.sum() / scores.sum())
            own, shared = (selection.recovered_mass()[layer] for selection in found)
            assert own == pytest.approx(want)
            assert own > shared

    def test_agreement_of_own_sets(self, vicuna):
        session = vicuna.engine.session(media=[vicuna.item], sparsity=POLICIES["own sets"])
        assert max(session.agreement(QUESTIONS[0], max_new_tokens=6).kl) > 0

    def test_turns_with_shared_sets_and_with_own_ones_compare(self):
        n = 6
        maps = TokenMap(
            torch.ones(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32), torch.rand(n, 4),
            torch.zeros(n, dtype=torch.bool), torch.full((n,), -1, dtype=torch.int32),
        )  # fmt: skip
        turns = [
            Selection(maps, torch.zeros(n), torch.arange(n), None, (sets,))
            for sets in (
                torch.tensor([0, 1]),
                torch.tensor([[0, 1], [1, 4]]),
                (torch.tensor([1]), torch.tensor([1, 4, 5])),
            )
        ]
        found = overlap(turns)
        assert found.jaccard == [pytest.approx((3 / 5 + 3 / 5) / 2)]
        assert found.sinks[0].tolist() == [1]
        assert found.retrieval[0].tolist() == [0, 4, 5]
        assert turns[2].layer_share().tolist() == [0, 1.0, 0, 0, 0.5, 0.5]


class TestBudgets:
    def test_by_hand(self):
        # 40 % of 4 heads of 50: 80 entries, 2 each as the floor (a tenth of 20), 72 by 1 : 2 : 3 : 0.
        assert budgets([1, 2, 3, 0], 50, 0.4) == [14, 26, 38, 2]
        # The third would want 66: it takes all 50, and the others share 80 - 50 - 6 = 24 by 1 : 1 : 0.
        assert budgets([1, 1, 14, 0], 50, 0.4) == [14, 14, 50, 2]
        assert budgets([0, 0, 0, 0], 50, 0.4) == [20] * 4

    def test_fractions_go_to_the_largest_then_to_the_lower_head(self):
        assert budgets([1, 1, 1], 10, 0.5) == [5, 5, 5]
        assert budgets([1, 1, 1], 7, 1 / 3) == [3, 2, 2]

    def test_each_head_keeps_one_at_least(self):
        assert budgets([0, 0, 0, 1], 3, 0.01) == [1, 1, 1, 1]
        assert budgets([0, 0, 0, 0, 9], 40, 0.06) == [1, 1, 1, 1, 8]

    @pytest.mark.parametrize("n", [1, 2, 7, 64, 577])
    @pytest.mark.parametrize("share", [0.001, 0.11, 0.5, 0.93, 0.9999])
    def test_the_sum_holds(self, n, share):
        for seed in range(5):
            merits = (np.random.default_rng(seed).random(24) ** (4 * seed)).tolist()
            counts = budgets(merits, n, share)
            assert sum(counts) == max(24, math.floor(share * n * 24 + 0.5))
            assert all(1 <= count <= n for count in counts)
            order = sorted(range(24), key=lambda head: merits[head])
            assert all(counts[a] <= counts[b] + 1 for a, b in pairwise(order))

    def test_merits_are_means_of_the_queries_that_share_a_key_head(self):
        method = SparseMM(0.5).with_head_scores(((1.0, 3.0, 0.0, 1.0),), 2)
        assert method.merits == ((2.0, 0.5),)

    def test_smoothing_and_ties(self):
        method = SparseMM(0.5).with_head_scores(((1.0, 1.0),), 2)
        scores = torch.zeros(2, 10)
        scores[0, 7] = 1.0
        # Of the first head 5 to 9 have a fifth each; of the second all are alike.
        assert [own.tolist() for own in method.on_heads(0, scores)] == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]


class TestScoresOfHeads:
    def test_without_a_file_the_command_is_named(self, vicuna):
        session = vicuna.engine.session(media=[vicuna.item], sparsity=POLICIES["sparsemm"])
        with pytest.raises(InvalidRequest, match="does not exist") as error:
            session.ask(QUESTIONS[0], params=SHORT)
        assert "benchmarks/head_scores.py" in error.value.hint
        assert session._cache.next_position == 0
        session.sparsity = vicuna.policy("sparsemm")
        session.ask(QUESTIONS[0], params=SHORT)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({"scores": [[0.5] * 6]}, "expected 2 layers of 6 heads, got"),
            ({"scores": [[0.5] * 6, [0.5] * 5]}, "expected 2 layers of 6 heads, got"),
            ({"scores": [[0.5] * 6, [-0.5] * 6]}, "numbers of at least 0"),
            ({"scores": [[0.5] * 6, [True] * 6]}, "numbers of at least 0"),
            ({"scores": "high"}, "lists of numbers"),
            ({}, "lists of numbers"),
            ([], "JSON object"),
        ],
    )
    def test_files_of_another_decoder_or_none(self, vicuna, tmp_path, content, said):
        file = tmp_path / "scores.json"
        file.write_text(json.dumps(content))
        policy = Sparsity(0.5, method="sparsemm", head_scores=str(file))
        session = vicuna.engine.session(media=[vicuna.item], sparsity=policy)
        with pytest.raises(CorruptCheckpoint, match=said):
            session.ask(QUESTIONS[0], params=SHORT)

    def test_the_demo_models_file_is_of_its_weights(self):
        folder = Path(sparsevila.__file__).parent / "assets" / "demo"
        record = json.loads((folder / HEAD_SCORES).read_text())
        assert record["model_sha256"] == sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert record["split"] == "validation"

    def test_policies_that_mean_nothing(self):
        for wrong in ({"head_scores": ""}, {"head_scores": 3}, {"sets": "own"}):
            with pytest.raises(InvalidRequest, match=next(iter(wrong))):
                Sparsity(0.5, 0.5, **wrong)
        with pytest.raises(InvalidRequest, match="exclude each other"):
            Sparsity(0.5, 0.5, sets="per_kv_head", score_layers="middle")


class TestOwnSetsWithOtherSwitches:
    def test_sinks_are_in_every_heads_set(self):
        method = SparseVILA(0.0, 0.5, sets="per_kv_head", sinks=2)
        scores = [torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]])] * 2
        saliency = torch.tensor([0.0, 0, 0, 9, 0, 8])
        for layer in method.on_turn_with(scores, lambda: saliency):
            assert layer.tolist() == [[0, 3, 5], [3, 4, 5]]

    def test_budgets_by_mass_count_for_every_head_of_a_layer(self):
        method = SparseVILA(0.0, 0.5, sets="per_kv_head", budgets="mass")
        flat, sharp = torch.full((2, 8), 1 / 8), torch.eye(2, 8) * 0.9 + 0.1 / 8
        counts = [layer.shape for layer in method.on_turn([flat, sharp])]
        assert [count[0] for count in counts] == [2, 2]
        assert sum(count[1] for count in counts) == 8
        assert counts[1][1] != counts[0][1]

    @pytest.mark.parametrize("switches", [{"sinks": 2}, {"budgets": "mass"}, {"refresh": 2}, {"rerotate": True}])
    def test_sessions_answer(self, vicuna, switches):
        policy = Sparsity(0.2, 0.6, sets="per_kv_head", **switches)
        one, two = (vicuna.engine.session(media=[vicuna.item], sparsity=policy) for _ in range(2))
        for session in (one, two):
            for question in QUESTIONS[:2]:
                session.ask(question, params=SHORT)
        assert_same(one, two)
