"""From answers to rows: perfect, guessing and blind answerers, a killed run, and the command as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accuracy.answering import Conversation, Extras, Reply, Setting, Task, asked_questions
from accuracy.questions import Item, Question, count, draw
from accuracy.report import main as report_main
from accuracy.report import render
from accuracy.run import answer_all, do, plan_jobs, plan_tasks, shown_name, to_json
from accuracy.scoring import Guesser, learn_guesser
from accuracy.summary import summarise
from accuracy.workfile import Result, WorkFile, checksum_of_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def reply(text: str, cached: int = 300) -> Reply:
    return Reply(text, False, len(text), 20, cached, 300, 300, 300.0, 0.0, 0.004, 0.0, 0.02, 0.005, kl=(), top1=())


class Fake:
    """Answers by a rule from question and picture; counts what it was asked."""

    def __init__(self, rule, stop_after: int | None = None) -> None:
        self.rule, self.stop_after, self.asked = rule, stop_after, 0

    def converse(self, item: Item, task: Task, extras: Extras) -> Conversation:
        if self.asked == self.stop_after:
            raise KeyboardInterrupt
        self.asked += 1
        questions = asked_questions(item, task.protocol)
        return Conversation(tuple(reply(self.rule(item, q, task), 300 * (i > 0)) for i, q in enumerate(questions)))

    def forget(self) -> None:
        pass


def truth(item: Item, question: Question, task: Task) -> str:
    return question.answer


@pytest.fixture(scope="module")
def items():
    return draw(300)


@pytest.fixture(scope="module")
def guesser(items):
    return learn_guesser(items, 200)


def tasks_of(*settings: str, protocols=("single", "history"), pictures=("own", "wrong", "none")) -> list[Task]:
    return plan_tasks([Setting.parse(s) for s in settings], protocols, pictures)


def measure(path: Path, items, tasks, guesser, answerer) -> dict:
    """What the command does between its arguments and its file."""
    work = WorkFile(path, {"of": "a test"})
    done = {(result.task, result.chunk) for result in work.results()}
    jobs = plan_jobs(items, tasks, done, fresh=0, agreement=0)
    answer_all(jobs, (do(job, answerer) for job in jobs), work)
    return summarise(items, tasks, work.results(), guesser)


def rows_of(data: dict, **fields) -> list[dict]:
    return [row for row in data["rows"] if all(row[name] == value for name, value in fields.items())]


class TestScores:
    def test_a_perfect_answerer(self, tmp_path, items, guesser):
        data = measure(tmp_path / "w", items, tasks_of("dense", "random:0.5/0.5"), guesser, Fake(truth))
        assert {row["accuracy"] for row in data["rows"]} == {1.0}
        assert {row["facts"] for row in data["rows"]} == {1.0, None}
        (whole,) = rows_of(data, setting="dense", protocol="single", picture="own", by="all")
        assert whole["n"] == count(items)
        (talk,) = rows_of(data, setting="dense", protocol="history", picture="own", by="all")
        assert talk["n"] == sum(len(item.dialogue) for item in items)
        assert {row["group"] for row in rows_of(data, by="part", protocol="history")} == {"dialogue"}
        assert {row["mean"] for row in data["paired"]} == {0.0}

    def test_a_guesser_reaches_the_prior_and_no_more(self, tmp_path, items, guesser):
        learnt: Guesser = guesser

        def guess(item, question, task):
            return learnt.named(item, question) or learnt.constant(item, question)

        data = measure(tmp_path / "w", items, tasks_of("dense"), guesser, Fake(guess))
        types = rows_of(data, by="type", picture="own", protocol="single")
        assert all(row["accuracy"] <= row["prior"] + 1e-9 for row in types)
        best_is_named = [row for row in types if row["group"] in ("clip which_first", "page larger", "scene higher")]
        assert all(row["accuracy"] > 0 for row in best_is_named)
        assert not any(row["beats_prior_blind"] for row in data["rows"])
        (whole,) = rows_of(data, by="all", picture="own", protocol="single")
        assert 0.5 * whole["prior"] < whole["accuracy"] <= whole["prior"]

    def test_blind_knowledge_is_marked(self, tmp_path, items, guesser):
        def knows_blind(item, question, task):
            return question.answer if question.type in ("describe", "direction") else ""

        data = measure(tmp_path / "w", items, tasks_of("dense"), guesser, Fake(knows_blind))
        for picture in ("wrong", "none"):
            marked = {row["group"] for row in rows_of(data, by="type", picture=picture) if row["beats_prior_blind"]}
            assert marked == {"scene describe", "clip direction"}
        assert not any(row["beats_prior_blind"] for row in rows_of(data, picture="own"))

    def test_a_worse_setting_shows_in_the_comparison(self, tmp_path, items, guesser):
        def sparse_fails_on_pages(item, question, task):
            fails = task.setting.name.startswith("sparsevila") and question.kind == "page" and not question.is_long
            return "" if fails else question.answer

        tasks = tasks_of("dense", "sparsevila:0.5/0.75", "random:0.5/0.75", "random:0.5/0.5", protocols=("single",))
        data = measure(tmp_path / "w", items, tasks, guesser, Fake(sparse_fails_on_pages))
        pairs = {(row["setting"], row["against"]) for row in data["paired"]}
        assert pairs == {("sparsevila:0.5/0.75", "dense"), ("sparsevila:0.5/0.75", "random:0.5/0.75"),
                         ("random:0.5/0.75", "dense"), ("random:0.5/0.5", "dense")}  # fmt: skip
        by = {row["group"]: row for row in data["paired"] if row["setting"].startswith("sparsevila")}
        failed = sum(q.kind == "page" and not q.is_long for item in items for q in item.questions)
        assert (by["all"]["only_ours"], by["all"]["only_theirs"]) == (0, failed)
        assert by["all"]["mean"] == pytest.approx(-failed / count(items))
        assert by["all"]["low"] < by["all"]["mean"] < by["all"]["high"] < 0
        assert by["clip"]["mean"] == by["long"]["mean"] == 0
        assert by["page title"]["mean"] == -1
        assert by["long"]["facts"]["mean"] == 0

    def test_lists_are_worth_their_share(self, tmp_path, items, guesser):
        def first_half(item, question, task):
            parts = question.answer.split(", ")
            return ", ".join(parts[: (len(parts) + 1) // 2]) if question.is_long else question.answer

        data = measure(tmp_path / "w", items, tasks_of("dense", pictures=("own",)), guesser, Fake(first_half))
        (row,) = rows_of(data, group="scene describe")
        assert row["accuracy"] == 0
        assert 0.6 < row["facts"] < 0.75


class TestTasks:
    def test_only_the_first_setting_is_asked_blind(self):
        keys = [task.key for task in tasks_of("dense", "random:0.5/0.5", protocols=("single",))]
        assert keys == ["dense single own", "dense single wrong", "dense single none", "random:0.5/0.5 single own"]

    def test_eviction_is_asked_where_single_does_not_give_it(self):
        both = tasks_of("dense", protocols=("single", "eviction"), pictures=("own",))
        assert [task.protocol for task in both] == ["single"]
        alone = tasks_of("dense", protocols=("eviction",), pictures=("own",))
        assert [task.protocol for task in alone] == ["eviction"]


class TestResume:
    @pytest.fixture(scope="class")
    def tasks(self):
        return tasks_of("dense", "random:0.5/0.5", protocols=("single",), pictures=("own",))

    @pytest.mark.parametrize("stop_after", [0, 5, 40])
    def test_a_killed_run_goes_on_where_it_was(self, tmp_path, items, guesser, tasks, stop_after):
        def mostly(item, question, task):
            return question.answer if (item.seed + len(question.text)) % 3 else ""

        whole = Fake(mostly)
        want = measure(tmp_path / "whole", items, tasks, guesser, whole)
        killed, again = Fake(mostly, stop_after), Fake(mostly)
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path / "cut", items, tasks, guesser, killed)
        with open(tmp_path / "cut", "a") as file:
            file.write('{"task": "dense single own", "chu')  # the kill came in the middle of a line
        assert measure(tmp_path / "cut", items, tasks, guesser, again) == want
        redone = killed.asked + again.asked - whole.asked
        assert 0 <= redone < 12 * len(tasks)  # at most what one chunk holds
        assert again.asked < whole.asked or stop_after < 12

    def test_more_settings_do_not_repeat_the_first(self, tmp_path, items, guesser, tasks):
        first, second = Fake(truth), Fake(truth)
        measure(tmp_path / "w", items, tasks[:1], guesser, first)
        data = measure(tmp_path / "w", items, tasks, guesser, second)
        assert first.asked == second.asked == len(items)
        assert len(rows_of(data, by="all")) == 2

    def test_results_of_another_run_are_refused(self, tmp_path):
        WorkFile(tmp_path / "w", {"model": "a", "questions": 10})
        WorkFile(tmp_path / "w", {"questions": 10, "model": "a"})
        with pytest.raises(SystemExit, match="model: there 'a', here 'b'"):
            WorkFile(tmp_path / "w", {"model": "b", "questions": 10})

    def test_a_chunk_that_came_twice_counts_once(self, tmp_path):
        work = WorkFile(tmp_path / "w", {})
        first, second = (Result("t", 0, (Conversation((reply(text),)),)) for text in "ab")
        work.append([first, second])
        assert list(work.results()) == [first]

    def test_missing_answers_are_no_result(self, tmp_path, items, guesser, tasks):
        work = WorkFile(tmp_path / "w", {})
        jobs = plan_jobs(items, tasks, set(), fresh=0, agreement=0)
        work.append(do(jobs[0], Fake(truth)))
        with pytest.raises(ValueError, match=f"expected {len(items)} conversations"):
            summarise(items, tasks, work.results(), guesser)


def test_checksums_tell_checkpoints_apart(tmp_path):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "NOTE.md").write_text(name)
    a, b, c = (checksum_of_checkpoint(tmp_path / name) for name in "abc")
    assert a == b != c


def test_the_file_is_json_with_a_line_per_row():
    data = {"rows": [{"a": 1 / 3, "b": [2e-9, None]}, {"a": 1, "b": []}], "none": [], "deep": {"x": {"y": (1, 0.5)}}}
    text = to_json(data)
    assert json.loads(text) == {
        "rows": [{"a": 0.333333, "b": [2e-9, None]}, {"a": 1, "b": []}], "none": [], "deep": {"x": {"y": [1, 0.5]}}
    }  # fmt: skip
    assert text.count("\n") == 8


def test_names_hold_no_folders_of_this_machine():
    assert shown_name("/somewhere/else/student") == "student"
    assert shown_name("assets/demo") == "assets/demo"


@pytest.fixture(scope="module")
def measured(student, tmp_path_factory) -> tuple[Path, list[str]]:
    """The command itself, with two processes and random weights."""
    folder = tmp_path_factory.mktemp("measured")
    out = folder / "accuracy.json"
    arguments = ["--model", student, "--out", out, "--questions", 30, "--processes", 2, "--prior-samples", 20]
    arguments += ["--fresh", 5, "--agreement", 10, "--protocols", "single", "--pictures", "own", "wrong"]
    arguments += ["--settings", "dense", "sparsevila:0.6/0.75"]
    command = [sys.executable, ROOT / "benchmarks" / "accuracy" / "run.py", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, [str(part) for part in command]


class TestCommand:
    def test_what_it_writes(self, measured):
        out, _ = measured
        data = json.loads(out.read_text())
        assert {"commit", "dirty", "command"} <= data["environment"].keys()
        assert len(data["model"]["checksum"]) == 64
        assert sum(row["questions"] for row in data["layouts"]) >= 30
        assert len(rows_of(data, by="all")) == 2 + 1
        checks = {(c["setting"], c["protocol"], c["picture"]): c for c in data["checks"]}
        for setting in ("dense", "sparsevila:0.6/0.75"):
            check = checks[setting, "single", "own"]
            assert check["asked_again"] == check["same_when_fresh"] > 0
            assert check["media_prefilled_again"] == 0 < check["later_questions"]
        (agreed,) = [row for row in data["agreement"] if row["by"] == "all"]
        assert agreed["setting"] == "sparsevila:0.6/0.75"
        assert agreed["kl"] > 0
        assert [row["setting"] for row in data["overlap"]] == ["sparsevila:0.6/0.75"]
        costs = {row["setting"]: row for row in data["costs"] if row["by"] == "all"}
        ours = costs["sparsevila:0.6/0.75"]
        assert ours["visual_active"] == pytest.approx(0.25 * ours["visual_kept"], rel=0.02)
        assert ours["visual_kept"] == pytest.approx(0.4 * ours["visual_total"], rel=0.02)
        assert len(data["encoding"]) == len(data["layouts"])
        assert all(row["psnr_min"] > 25 for row in data["clips"])
        assert {row["layout"] for row in data["clips"]} == {"clip 08", "clip 16", "clip 32"}

    def test_again_it_has_nothing_to_do_and_writes_the_same(self, measured):
        out, command = measured
        before = json.loads(out.read_text())
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert " 0 chunks to go" in done.stdout
        after = json.loads(out.read_text())
        assert {k: v for k, v in after.items() if k != "environment"} == {
            k: v for k, v in before.items() if k != "environment"
        }

    def test_other_arguments_are_refused(self, measured):
        out, command = measured
        kept = out.with_suffix(".work.jsonl").read_bytes()
        done = subprocess.run([*command, "--questions", "31"], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "questions: there 30, here 31" in done.stderr
        assert out.with_suffix(".work.jsonl").read_bytes() == kept

    def test_the_report_depends_on_the_json_alone(self, measured, tmp_path, capsys):
        out, _ = measured
        data = json.loads(out.read_text())
        page = render(data)
        assert page == render(json.loads(json.dumps(data, sort_keys=True)))
        report_main([str(out)])
        assert capsys.readouterr().out == page
        report_main([str(out), "--out", str(tmp_path / "page.md")])
        assert (tmp_path / "page.md").read_text() == page
        for text in ("sparsevila:0.6/0.75, single", "best blind guess", "wrong picture", "clip 32", "## Checks"):
            assert text in page
        assert str(out.parent) not in page
        types = {row["group"] for row in rows_of(data, by="type")}
        assert all(f"\n| {name} |" in page for name in types)
        for line in page.splitlines():  # tables are whole
            if line.startswith("|"):
                assert line.endswith("|")
