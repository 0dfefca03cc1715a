"""docs/results.md: what its sections make of small measurements, and that the page in the tree is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report import accuracy_cost, decoupling, decoupling_7b, drawing, equal_cost, not_shown, page, summary, switches
from report.markdown import interval, points, table
from report.measured import MissingMeasurement

ROOT = Path(__file__).resolve().parents[2]
ALL = ("report.accuracy_cost", "report.equal_cost", "report.decoupling", "report.switches", "report.not_shown")
PLACE = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "torch": "2.13.0",
    "cpu": "Some CPU x 2, ",
    "command": "python one.py",
}


def share(right: int, n: int = 100) -> dict[str, float]:
    return {"n": n, "right": right, "accuracy": right / n, "low": right / n - 0.1, "high": right / n + 0.1}


def difference(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}


def price(setting: str, gflop: float, **answers: int) -> dict:
    tokens = {"input": 40.0, "active": 10.0, "encoder": 100.0}
    made = {"setting": setting, "gflop": {"total": gflop}, "tokens": tokens, "seconds": None}
    return made | ({"answers": {name: share(right) for name, right in answers.items()}} if answers else {})


def row(method: str, setting: str | None, figure: float | None, *, talk: bool = False, later: float = 0.0) -> dict:
    made = {"budget": "gflop=sparsevila:0.6/0.75", "measure": "gflop", "target": 2.5, "method": method}
    made |= {"setting": setting, "figure": figure, "met": setting is not None}
    if setting:
        made["answers"] = {"single": share(50), "first": share(60), "later": share(40)}
        made["against_ours"] = {"single": difference(-0.02), "later": difference(later)}
        made["later_against_single"], made["asked_as_dialogue"] = difference(-0.1), talk
    return made


EQUAL = {
    "environment": PLACE,
    "layouts": [{"layout": "scene", "questions": 70}, {"layout": "page", "questions": 50}],
    "settings": [
        price("dense", 4.0, single=80, first=80, later=80),
        price("sparsevila:0.6/0.75", 2.5, single=55, first=60, later=58),
        price("fastv:0.9/0", 2.51, single=50, first=60, later=40),
        price("fastv:0.5/0", 3.2),  # priced, not asked
    ],
    "rows": [
        row("dense", "dense", None, later=0.2),
        row("sparsevila", "sparsevila:0.6/0.75", 2.5),
        row("fastv", "fastv:0.9/0", 2.51, talk=True, later=-0.2),
        row("pdrop", None, 2.9),
    ],
}


def timed(name: str, setting: str, seconds: tuple[float, ...], active: float, *, met: bool = True) -> dict:
    stages = dict(zip(decoupling.STAGES, seconds, strict=True))
    made = {"name": name, "setting": setting, "met": met, "seconds": {**stages, "total": sum(seconds)}}
    made["tokens"] = {"active": active}
    return made | {
        "answers": {"all": share(60)},
        "facts": 0.5,
        "against_both": difference(0.1),
        "facts_against_both": difference(-0.1),
    }


DECOUPLING = {
    "environment": PLACE | {"command": "python two.py"},
    "arguments": {"rounds": 3, "clips": 9},
    "timed_clips": 2,
    "questions": 40,
    "rows": [
        timed("dense", "dense", (0.05, 0.06, 0.0, 0.09), 500.0),
        timed("prefill alone", "sparsevila:0.7/0", (0.05, 0.02, 0.0, 0.08), 150.0),
        timed("decode alone", "sparsevila:0/0.99", (0.05, 0.06, 0.001, 0.072), 5.0, met=False),
        timed("both", "sparsevila:0.6/0.75", (0.05, 0.024, 0.001, 0.075), 50.0),
    ],
}

BASE = "sparsevila:0.6/0.75"
SWITCHED = f"{BASE}:refresh=8"
SWITCHES = {
    "environment": PLACE | {"command": "python three.py"},
    "rows": [{"setting": name, "by": "all", "picture": "own", **share(n)} for name, n in ((BASE, 50), (SWITCHED, 52))],
    "costs": [
        {"setting": name, "by": "all", "visual_active": 32.0, "retrieval_s": 0.001, "decode_s": 0.02}
        for name in (BASE, SWITCHED)
    ],
    "agreement": [{"setting": SWITCHED, "by": "all", "kl": 0.012}],
    "paired": [
        {"setting": SWITCHED, "against": other, "protocol": "single", "against_protocol": "single", "group": group}
        | difference(0.02)
        for other in ("dense", BASE)
        for group in ("all", "long")
    ],
}


ACTIVE = {
    "environment": PLACE | {"command": "python four.py"},
    "settings": EQUAL["settings"],
    "rows": [one | {"budget": equal_cost.ACTIVE, "measure": "active", "target": 10.0} for one in EQUAL["rows"]],
}


@pytest.fixture
def results(tmp_path):
    files = {accuracy_cost.SOURCE: EQUAL, equal_cost.SOURCES["active"]: ACTIVE}
    for name, data in (files | {decoupling.SOURCE: DECOUPLING, switches.SOURCE: SWITCHES}).items():
        (tmp_path / name).write_text(json.dumps(data))
    return tmp_path


class TestPage:
    def test_from_json_alone(self, results, tmp_path):
        text = page.render(results, tmp_path / "figures", ALL)
        assert text == page.render(results, tmp_path / "figures", ALL)
        for command in ("python one.py", "python two.py", "python three.py", "python four.py"):
            assert f"    {command}\n" in text
        made = {path.name for path in (tmp_path / "figures").iterdir()}
        assert made == {"accuracy_cost.png", "decoupling.png", "switches.png"}
        assert all(f"](results/{name})" in text for name in made)
        assert "commit `0123456789ab`, torch 2.13.0, Some CPU x 2\n" in text
        for line in text.splitlines():  # tables are whole
            assert not line.startswith("|") or line.endswith("|")

    def test_pictures_do_not_change_by_chance(self, results, tmp_path):
        for folder in ("a", "b"):
            accuracy_cost.section(results, tmp_path / folder)
        assert (tmp_path / "a" / "accuracy_cost.png").read_bytes() == (
            tmp_path / "b" / "accuracy_cost.png"
        ).read_bytes()

    @pytest.mark.parametrize("module", [accuracy_cost, decoupling, switches])
    def test_a_missing_measurement_names_its_command(self, tmp_path, module):
        with pytest.raises(MissingMeasurement) as raised:
            module.section(tmp_path, tmp_path)
        assert module.SOURCE in str(raised.value)
        assert module.COMMAND in str(raised.value)

    def test_the_page_in_the_tree_is_what_its_measurements_give(self, tmp_path):
        made = page.render(ROOT / "benchmarks" / "results", tmp_path)
        assert (ROOT / "docs" / "results.md").read_text() == made, "make results"
        drawn = {path.name for path in tmp_path.glob("*.png")}
        assert drawn == {path.name for path in (ROOT / "docs" / "results").glob("*.png")}

    def test_every_section_of_the_page_is_a_module_that_says_what_it_reads(self):
        assert len(set(page.SECTIONS)) == len(page.SECTIONS)
        assert page.SECTIONS[-1] == "report.not_shown"


class TestSections:
    def test_equal_cost(self, results):
        lines = equal_cost.section(results, results).splitlines()
        found = {line.split(" | ")[0][2:]: line for line in reversed(lines) if line.startswith("| ")}
        title = next(line for line in lines if line.startswith("###"))
        assert title == "### Equal operations: `sparsevila:0.6/0.75`, 2.5 GFLOP (62% of dense)"
        assert found["fastv"] == (
            "| fastv | 0.9/0 | 2.51 | 40.0 | 10.0 | 50.0 [40.0, 60.0] | 60.0 [50.0, 70.0] | 40.0 [30.0, 50.0] | "
            "-2.0 [-7.0, +3.0] | -20.0 [-25.0, -15.0] | -10.0 [-15.0, -5.0] |"
        )
        assert found["sparsevila"].endswith("|  |  | 0: the same answers |")
        assert found["pdrop"].startswith("| pdrop | cannot: the least it takes is 2.9 |")
        assert "### Equal active tokens in decode: `sparsevila:0.3/0.5`, 10 visual tokens (100% of dense)" in lines

    def test_each_of_its_measurements_is_needed(self, results):
        (results / equal_cost.SOURCES["active"]).unlink()
        with pytest.raises(MissingMeasurement, match=equal_cost.ACTIVE):
            equal_cost.section(results, results)

    def test_a_verdict_follows_from_the_intervals(self, results):
        text = equal_cost.section(results, results)
        assert "\nLater turns, fewer right than SparseVILA: fastv; more: dense." in text
        undecided = [EQUAL["rows"][1], row("fastv", "fastv:0.9/0", 2.51, later=-0.04)]
        assert equal_cost.verdict(undecided) == "Later turns, not told apart: fastv."
        assert "Nothing is compared" in equal_cost.verdict([row("pdrop", None, 2.9)])

    def test_points_of_the_plot(self):
        methods = accuracy_cost.by_method(EQUAL)
        assert list(methods) == ["sparsevila", "fastv"]
        assert [(one["setting"], one["share"]) for one in methods["fastv"]] == [("fastv:0.9/0", 2.51 / 4)]

    def test_switches_that_help_are_named(self):
        gaps = {"sinks=4": 0.0, "refresh=4": 0.06, "global": -0.06}
        text = switches.verdict({f"{BASE}:{name}": {"all": difference(mean)} for name, mean in gaps.items()})
        assert text.startswith(
            "By their intervals, more right: `refresh=4`; fewer right: `global`; not told apart: `sinks=4`."
        )

    def test_switches_make_a_method_of_its_own(self):
        assert accuracy_cost.method_of("fastv:0.9/0") == "fastv"
        assert accuracy_cost.method_of("visionzip:0.6/0:positions=original") == "visionzip:positions=original"
        assert accuracy_cost.method_of("dense") == "dense"

    def test_decoupling(self, results):
        text = decoupling.section(results, results / "figures")
        found = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
        assert "| 1.57x | 1.12x | 1.33x |" in found["prefill alone"]  # 0.11/0.07, 0.09/0.08, 0.2/0.15
        assert "| sparsevila:0/0.99: cannot |" in found["decode alone"]
        assert "*prefill alone* was set to take as long as both; measured again it took 0.0% " in text
        assert "still takes 183.0 ms" in text
        assert "Decoding is 45% of dense, and with 1% of the visual entries read it keeps 80% of its time" in text
        assert found["both"].endswith("| 60.0 [50.0, 70.0] |  | 50.0 |  |")
        assert found["dense"].endswith("| +10.0 [+5.0, +15.0] | 50.0 | -10.0 [-15.0, -5.0] |")

    def test_widths_of_a_large_model(self, tmp_path):
        run = {"encode": 100.0, "prefill": 100.0, "retrieval": 0.0, "decode": 50.0, "visual_total": 2304}
        for name, (prefill, decode) in decoupling_7b.POLICIES.items():
            made = {
                "environment": PLACE | {"command": f"python {name}.py"},
                "model": "m",
                "scheme": "W4A16",
                "tokens": 64,
            }
            made |= {"dense": run, "sparse": run | {"prefill": 50.0, "decode": 40.0}}
            made["policies"] = {"sparse": {"prefill": prefill, "decode": decode}}
            (tmp_path / decoupling_7b.SOURCES[name]).write_text(json.dumps(made))
        text = page.render(tmp_path, tmp_path, ("report.decoupling_7b",))
        assert "| 60% / 75% | 100 | 50 | 0 | 40 | 190 | 1.33x | 1.25x | 1.32x |" in text
        assert "| 0% / 90% |" in text
        assert "    python both.py\n    python prefill.py\n    python decode.py" in text
        assert text.count("- [latency_7b_") == 3
        (tmp_path / decoupling_7b.SOURCES["decode"]).unlink()
        with pytest.raises(MissingMeasurement, match=r"--decode-sparsity 0\.9"):
            page.render(tmp_path, tmp_path, ("report.decoupling_7b",))

    def test_a_gain_that_its_parts_cannot_explain_is_refused(self):
        dense, both = DECOUPLING["rows"][0]["seconds"], DECOUPLING["rows"][3]["seconds"]
        gained = decoupling.gains(dense, both)
        assert gained["decode"] < gained["end to end"] < gained["prefill"]
        for total in (0.5 * both["total"], 2 * both["total"]):
            with pytest.raises(ValueError, match="a stage is missing"):
                decoupling.gains(dense, {**both, "total": total})

    def test_switches(self, results):
        text = switches.section(results, results / "figures")
        assert "| `sparsevila:0.6/0.75` | 50.0 [40.0, 60.0] |  |  |  | 32.0 | 21.00 |" in text
        line = "| `refresh=8` | 52.0 [42.0, 62.0] | +2.0 [-3.0, +7.0] | +2.0 [-3.0, +7.0] | 0.0120 | 32.0 | 21.00 |"
        assert line in text
        (results / switches.SOURCE).write_text(json.dumps({**SWITCHES, "paired": []}))
        with pytest.raises(ValueError, match="with switches, got none"):
            switches.section(results, results)

    def test_what_is_not_shown_is_said(self):
        text = not_shown.section(ROOT, ROOT)
        for word in ("weights", "data set", "A6000", "GPU"):
            assert word in text


class TestReadme:
    def test_block(self, results):
        made = summary.block(results)
        assert "the same 62% of dense's operations" in made
        assert "120 questions" in made
        assert made.endswith("\n\n`python one.py`")
        assert "| `sparsevila:0.6/0.75` | 50.0 | 40.0 |  |" in made
        assert "| `fastv:0.9/0` | 50.0 | 40.0 | -20.0 [-25.0, -15.0] |" in made
        assert "| pdrop | cannot |  |  |" in made

    def test_placed_between_its_marks(self):
        readme = f"a\n{summary.BEGIN}\nold\n{summary.END}\nb\n"
        once = summary.placed(readme, "new")
        assert once == f"a\n{summary.BEGIN}\n\nnew\n\n{summary.END}\nb\n"
        assert summary.placed(once, "new") == once
        with pytest.raises(ValueError, match="once each"):
            summary.placed("no marks", "new")

    def test_the_readme_in_the_tree_is_what_its_measurements_give(self):
        readme = (ROOT / "README.md").read_text()
        if "report.equal_cost" in page.SECTIONS:
            assert summary.placed(readme, summary.block(ROOT / "benchmarks" / "results")) == readme, "make results"
        else:  # nothing is measured yet, so nothing is said
            assert readme.split(summary.BEGIN)[1].split(summary.END)[0].strip() == ""


class TestParts:
    def test_tables(self):
        assert table(("a", "b"), [("x", "1")]) == "| a | b |\n| :-- | --: |\n| x | 1 |"
        with pytest.raises(ValueError, match="expected 2 cells, got 1"):
            table(("a", "b"), [("x",)])

    def test_numbers(self):
        assert interval(share(50)) == "50.0 [40.0, 60.0]"
        assert points(difference(-0.1)) == "-10.0 [-15.0, -5.0]"
        assert points(None) == ""

    def test_looks_differ(self):
        many = drawing.looks(f"method {i}" for i in range(10))
        assert len(set(many.values())) == 10
