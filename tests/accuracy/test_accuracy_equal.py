"""Settings at the same cost: the search, what a row says, and the commands as a whole on random weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from accuracy import decoupling, equal
from accuracy.answering import Conversation, Reply, Setting
from accuracy.cost import Manner, ModelSizes, encoding, input_tokens
from accuracy.equal import Budget, Contender, Found, compared, kept, nearest, on_line, own_gflop, parts_of
from accuracy.prices import Sample
from accuracy.questions import draw
from accuracy.run import plan_tasks
from accuracy.scoring import learn_guesser
from accuracy.summary import Answered, summarise
from accuracy.workfile import Result

from sparsevila import Engine

SIZES = ModelSizes(4, 2, 5, 9, 3, 6, 10, 2, 8, 4, 7, element_bytes=2)


class TestSearch:
    @pytest.mark.parametrize("target", [900.0, 500.0, 333.3, 25.0])
    def test_nearest_to_a_target(self, target):
        asked = []

        def figure(step: int) -> float:
            asked.append(step)
            return 1000.0 - step

        step, met = nearest(figure, 990, target)
        assert met
        assert abs(figure(step) - target) <= max(0.5, 0.001 * target)
        assert len(set(asked)) < 6

    def test_of_plateaus_the_nearer_one(self):
        assert nearest(lambda step: 10.0 - step // 100, 999, 5.4)[0] // 100 == 5
        assert nearest(lambda step: 10.0 - step // 100, 999, 5.6)[0] // 100 == 4

    def test_what_cannot_be_reached(self):
        assert nearest(lambda step: 1000.0 - step, 400, 500.0) == (400, False)
        assert nearest(lambda step: 1000.0 - step, 400, 595.0) == (400, True)  # nearly

    def test_what_is_cheap_enough_at_once(self):
        assert nearest(lambda step: 100.0 - step, 90, 200.0) == (0, True)

    def test_lines_between_measured_points(self):
        points = [(0, 10.0), (500, 8.0), (900, 4.0)]
        assert on_line(points, 6.0) == (700, 6.0)
        assert on_line(points, 8.0) == (500, 8.0)
        assert on_line(points, 11.0) == (0, 10.0)
        assert on_line(points, 1.0) == (900, 4.0)

    def test_a_time_that_rises_again_is_noise(self):
        assert on_line([(0, 10.0), (400, 6.0), (600, 7.0), (800, 4.0)], 5.0) == (700, 5.0)

    def test_prefill_or_decode_alone(self):
        assert decoupling.alone((0.5, 0.9), lambda f: 10 - 10 * f, 5.0) == (0.5, True)
        assert decoupling.alone((0.5, 0.9), lambda f: 10 - f, 5.0) == (0.9, False)
        with pytest.raises(ValueError, match="expected a target below what dense takes, 10 s, got 12 s"):
            decoupling.alone((0.5, 0.9), lambda f: 10 - f, 12.0)


class TestArguments:
    def test_budgets(self):
        assert Budget.parse("gflop=sparsevila:0.6/0.75").reference == Setting.parse("sparsevila:0.6/0.75")
        assert Budget.parse("input=0.50").name == "input=0.5"
        for text, what in (("gflop", "MEASURE=SETTING"), ("flop=0.5", "MEASURE=SETTING"), ("input=1.5", "fraction"),
                           ("input=magic:0/0", "method")):  # fmt: skip
            with pytest.raises(ValueError, match=what):
                Budget.parse(text)

    def test_the_most_a_method_can_do(self):
        assert Contender.parse("sparsevila/0.75").highest(6) == 999
        assert Contender.parse("pdrop").highest(32) == 749  # its first quarter sees everything
        assert Contender.parse("pdrop").highest(6) == 833  # of six layers, the first one
        with pytest.raises(ValueError, match="method"):
            Contender.parse("magic/0.5")

    def test_the_method_of_a_setting(self):
        apart = Contender.parse("sparsevila/0.75:positions=contiguous")
        assert apart.name == "sparsevila:positions=contiguous"
        assert apart.setting(600).name == "sparsevila:0.6/0.75:positions=contiguous"
        assert not apart.is_of(Setting.parse("sparsevila:0.6/0.75"))
        assert apart.is_of(Setting.parse("sparsevila:0.2/0.75:positions=contiguous"))
        ours = Contender.parse("sparsevila/0.75")
        assert ours.is_of(Setting.parse("sparsevila:0.6/0.75"))
        assert not ours.is_of(Setting.parse("sparsevila:0.6/0.5"))
        assert not ours.is_of(Setting.parse("random:0.6/0.75"))


def reply(cached: int = 0) -> Reply:
    return Reply("", False, 2, 30, cached, 40, 20, 20.0, 0, 0, 0, 0, 0, 2, 26.0, 300.0, 1000)


def answers(items, rule, turns_only: bool = False) -> list[Answered]:
    found = []
    for item in items:
        for i, question in enumerate(item.dialogue if turns_only else item.questions):
            found.append(Answered(item, question, reply(30 * (i > 0)), float(rule(question)), None))
    return found


@pytest.fixture(scope="module")
def items():
    return draw(60)


@pytest.fixture
def told(items):
    """SparseVILA is right always, FastV alone too, but in a dialogue only the first time."""
    return {
        "dense single own": answers(items, lambda q: True),
        "sparsevila:0.6/0.75 single own": answers(items, lambda q: True),
        "fastv:0.9/0 single own": answers(items, lambda q: True),
        "fastv:0.9/0 eviction own": answers(items, lambda q: q.turn == 0, turns_only=True),
    }


class TestRows:
    FOUND = (
        Found("gflop=0.6", "gflop", 2.0, "sparsevila", "sparsevila:0.6/0.75", 2.0),
        Found("gflop=0.6", "gflop", 2.0, "fastv", "fastv:0.9/0", 2.01),
        Found("gflop=0.6", "gflop", 2.0, "pdrop", None, 2.5),
    )

    def test_turns_are_told_apart(self, items, told):
        rows = {row["method"]: row for row in compared(self.FOUND, told, ["single", "eviction"])}
        assert list(rows) == ["dense", "sparsevila", "fastv", "pdrop"]
        ours, theirs = rows["sparsevila"]["answers"], rows["fastv"]["answers"]
        assert ours["first"]["n"] == theirs["first"]["n"] == len(items)
        assert ours["later"]["n"] == theirs["later"]["n"] == sum(len(item.dialogue) - 1 for item in items)
        assert ours["single"]["n"] == sum(len(item.questions) for item in items)
        assert (ours["later"]["accuracy"], theirs["first"]["accuracy"], theirs["later"]["accuracy"]) == (1, 1, 0)
        assert rows["fastv"]["against_ours"]["later"] == {"mean": -1, "low": -1, "high": -1}
        assert rows["fastv"]["against_ours"]["single"]["mean"] == 0
        assert rows["fastv"]["later_against_single"]["mean"] == -1
        assert rows["sparsevila"]["later_against_single"]["mean"] == 0

    def test_what_cannot_be_met_has_no_answers(self, told):
        row = compared(self.FOUND, told, ["single", "eviction"])[-1]
        assert (row["met"], row["setting"], row["figure"]) == (False, None, 2.5)
        assert "answers" not in row

    def test_a_conversation_encodes_once_whatever_came_alone(self, items, told):
        setting = Setting.parse("fastv:0.9/0")
        parts = parts_of(setting, told, ["single", "eviction"])
        talk = [*parts["first"], *parts["later"]]
        tiles = {item.layout.name: 3 for item in items}
        whole = own_gflop(SIZES, tiles, setting, talk)
        smaller = own_gflop(SIZES, dict.fromkeys(tiles, 1), setting, talk)
        assert whole - smaller == pytest.approx(encoding(SIZES, 3).gflop - encoding(SIZES, 1).gflop)

    def test_input_tokens_leave_text_out(self):
        figures = replace(reply(), prompt_tokens=30, visual_total=20, visual_kept=5, layer_tokens=22.0)
        assert input_tokens(figures, Manner(inside=True)) == 12  # 10 of text; what was evicted had been computed
        assert input_tokens(replace(figures, visual_kept=20), Manner()) == 12


def test_a_search_is_kept_until_something_changes(tmp_path):
    made = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"n": len(made)}

    path = tmp_path / "found"
    assert kept(path, {"a": 1}, make) == kept(path, {"a": 1}, make) == {"n": 1}
    assert kept(path, {"a": 2}, make) == {"n": 2}
    path.write_text(path.read_text().splitlines()[0])  # killed in the middle
    assert kept(path, {"a": 2}, make) == {"n": 3}


@pytest.fixture(scope="module")
def asked(student, tmp_path_factory):
    """Both commands, on two samples and a few settings."""
    folder = tmp_path_factory.mktemp("equal")
    few = [item for item in draw(60) if item.layout.name in ("scene 128x128", "clip 08")][:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equal, "draw", lambda number: few)
        patch.setattr(equal, "TIMED", (0, 950))
        patch.setattr(decoupling, "PREFILL", (0.95,))
        patch.setattr(decoupling, "DECODE", (0.9,))
        for name in ("MAX_NEW_TOKENS", "MAX_NEW_TOKENS_LONG"):
            patch.setattr(f"accuracy.answering.{name}", 4)
        arguments = ["--model", str(student), "--out", str(folder / "equal.json"), "--rounds", "1"]
        arguments += ["--budgets", "gflop=sparsevila:0.6/0.75", "seconds=0.9", "active=0.1"]
        equal.main([*arguments, "--methods", "sparsevila/0.75", "fastv", "visionzip"])
        arguments[3] = str(folder / "decoupling.json")
        decoupling.main([*arguments[:6], "--clips", "2", "--timed", "1", "--reference", "sparsevila:0.9/0.75"])
    return folder, few


def test_switches_are_compared_with_the_same_setting_without(items):
    names = ("sparsevila:0.5/0.75", "sparsevila:0.5/0.75:sinks=4", "sparsevila:0.5/0.75:global", "sparsevila:0.6/0.75")
    tasks = plan_tasks([Setting.parse(name) for name in names], ["single"], ["own"])
    some = items[:3]
    right = [Conversation(tuple(replace(reply(), text=q.answer) for q in item.questions)) for item in some]
    wrong = [Conversation(tuple(reply() for _ in item.questions)) for item in some]
    results = [Result(task.key, 0, tuple(wrong if ":sinks" in task.key else right)) for task in tasks]
    made = summarise(some, tasks, results, learn_guesser(some, 2))["paired"]
    found = {(row["setting"], row["against"]): row["mean"] for row in made if row["by"] == "all"}
    assert found == {(names[1], names[0]): -1.0, (names[2], names[0]): 0.0}


class TestCommand:
    def test_rows_cost_what_the_budget_says(self, asked):
        folder, _ = asked
        data = json.loads((folder / "equal.json").read_text())
        rows = {(row["budget"], row["method"]): row for row in data["rows"]}
        assert len(rows) == 3 * 4
        budget = "gflop=sparsevila:0.6/0.75"
        assert rows[budget, "sparsevila"]["setting"] == "sparsevila:0.6/0.75"
        prices = {price["setting"]: price for price in data["settings"]}
        for method in ("sparsevila", "fastv", "visionzip"):
            row = rows[budget, method]
            assert row["figure"] == pytest.approx(row["target"], rel=0.02)
            assert prices[row["setting"]]["gflop"]["total"] == pytest.approx(row["figure"], rel=1e-5)
        assert rows["active=0.1", "fastv"]["setting"] is None  # two of six layers see everything
        assert rows["active=0.1", "fastv"]["figure"] > 2 * rows["active=0.1", "fastv"]["target"]
        assert all("answers" in row for row in rows.values() if row["setting"])
        timed = [row["setting"] for row in rows.values() if row["measure"] == "seconds" and row["setting"]]
        assert all(prices[name]["seconds"]["total"] > 0 for name in timed)
        assert prices["dense"]["seconds"]["retrieval"] == 0

    def test_results_of_another_run_are_refused_before_anything_is_measured(self, student, tmp_path, monkeypatch):
        monkeypatch.setattr(equal, "priced_and_found", lambda *_: pytest.fail("it was measured"))
        (tmp_path / "equal.work.jsonl").write_text('{"model": "another"}\n')
        with pytest.raises(SystemExit, match="holds results of another run"):
            equal.main(["--model", str(student), "--out", str(tmp_path / "equal.json"), "--questions", "10"])

    def test_counts_follow_from_tokens(self, asked, student, tmp_path):
        _, few = asked
        with Engine.load(student, device="cpu", dtype="float32") as engine:
            sample = Sample(engine, few, tmp_path)
            dense, ours = (sample.counts(Setting.parse(s)) for s in ("dense", "sparsevila:0.5/0.75"))
        assert sample.tiles == {"scene 128x128": 5, "clip 08": 8}
        assert dense.input_tokens == dense.active_tokens == dense.encoder_tokens == (320 + 128) / 2
        assert ours.input_tokens == dense.input_tokens / 2
        assert ours.active_tokens == dense.input_tokens / 8
        assert ours.cost["gflop"]["encoder"] == dense.cost["gflop"]["encoder"]
        assert ours.gflop < dense.gflop

    def test_prefill_decode_and_both(self, asked):
        folder, _ = asked
        data = json.loads((folder / "decoupling.json").read_text())
        rows = {row["name"]: row for row in data["rows"]}
        assert list(rows) == ["dense", "prefill alone", "decode alone", "both"]
        assert rows["both"]["setting"] == "sparsevila:0.9/0.75"
        tokens = {name: row["tokens"] for name, row in rows.items()}
        assert tokens["dense"]["input"] == tokens["decode alone"]["input"] == 512
        assert tokens["prefill alone"]["active"] == tokens["prefill alone"]["input"] < 512
        assert tokens["decode alone"]["active"] < 512
        for row in rows.values():
            stages = [value for name, value in row["seconds"].items() if name != "total"]
            assert row["seconds"]["total"] == pytest.approx(sum(stages), rel=1e-4)
            assert row["answers"]["all"]["n"] == data["questions"]
        assert rows["both"]["against_both"]["mean"] == rows["both"]["facts_against_both"]["mean"] == 0
        assert rows["dense"]["seconds"]["retrieval"] == 0 < rows["both"]["seconds"]["retrieval"]
