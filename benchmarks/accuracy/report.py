"""A measurement as a page of Markdown, from its JSON alone.

python benchmarks/accuracy/report.py benchmarks/results/accuracy_demo.json [--out OUT.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KINDS = ("scene", "page", "clip")
PICTURES = {"own": "", "wrong": ", wrong picture", "none": ", no picture"}


def render(data: Row) -> str:
    """The whole page."""
    sections = (
        _head,
        _totals,
        _paired,
        _history,
        _types,
        _lists,
        _layouts,
        _costs,
        _encoding,
        _agreement,
        _overlap,
        _checks,
    )
    return "\n\n".join(text for text in (section(data) for section in sections) if text) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    lines = [list(head), [":--", *["--:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _points(row: Row) -> str:
    """A difference in percentage points with its interval."""
    return f"{100 * row['mean']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def _interval(row: Row) -> str:
    return f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{1e3 * value:.2f}"


def _name(row: Row) -> str:
    return f"{row['setting']}, {row['protocol']}{PICTURES[row['picture']]}"


def _tasks(data: Row) -> list[tuple[str, str, str]]:
    """(setting, protocol, picture) in the order of the measurement."""
    return list(dict.fromkeys((row["setting"], row["protocol"], row["picture"]) for row in data["rows"]))


def _find(data: Row, task: tuple[str, str, str], by: str, group: str) -> Row | None:
    for row in data["rows"]:
        if (row["setting"], row["protocol"], row["picture"], row["by"], row["group"]) == (*task, by, group):
            return row
    return None


def _share(data: Row, task: tuple[str, str, str], by: str, group: str, *, of: str = "accuracy") -> str:
    row = _find(data, task, by, group)
    return _percent(row[of]) if row else ""


def _groups(data: Row, by: str) -> list[str]:
    return sorted({row["group"] for row in data["rows"] if row["by"] == by})


# Sections


def _head(data: Row) -> str:
    place, model, clips = data["environment"], data["model"], data["clip_files"]
    asked, samples = (sum(row[name] for row in data["layouts"]) for name in ("questions", "samples"))
    lines = [
        f"# Accuracy of {model['name']} on the held-out synthetic world",
        "",
        f"{asked} questions about {samples} samples of the test seeds. Checkpoint `{model['checksum'][:12]}`, "
        f"{model['dtype']} on {model['device']}; commit `{place['commit'][:12]}`{' and changes' * place['dirty']}, "
        f"torch {place['torch']}, {place['cpu']}.",
        "",
        f"    {place['command']}",
        "",
        "An answer is right if it is the true one to the letter. In brackets: 95 % intervals, Wilson's for shares, a "
        "bootstrap over samples for differences (percentage points, on the same questions). *single*: each question "
        "as if it were the first. *history*: the dialogue in order, the model's own answers remembered.",
        "",
        table(
            ("layout", "samples", "questions", "seeds"),
            (
                (row["layout"], str(row["samples"]), str(row["questions"]), "{} to {}".format(*row["seeds"]))
                for row in data["layouts"]
            ),
        ),
    ]
    for row in data["clips"]:
        lines.append(
            f"\n{row['layout']}: {row['clips']} clips as files ({clips['codec']}, crf {clips['crf']}, every pixel "
            f"{clips['scale']} x {clips['scale']}), PSNR {row['psnr_mean']:.1f} dB, "
            f"worst frame {row['psnr_min']:.1f} dB."
        )
    return "\n".join(lines)


def _totals(data: Row) -> str:
    rows = []
    for task in _tasks(data):
        whole = _find(data, task, "all", "all")
        assert whole is not None
        kinds = [_share(data, task, "kind", kind) for kind in KINDS]
        facts = _percent(whole["facts"])
        rows.append((_name(whole), str(whole["n"]), _interval(whole), _percent(whole["macro"]), *kinds, facts))
    rows.append(("best blind guess", "", _prior(data, "all", "all"), "", *(_prior(data, "kind", k) for k in KINDS), ""))
    head = ("setting", "n", "right, %", "mean of types", *KINDS, "facts of lists")
    note = (
        "*facts of lists*: F1 of the items of long answers. *best blind guess*: the largest of stated chance, the most "
        "frequent answer of its type and layout in training seeds, and the better of two named alternatives."
    )
    return f"## In all\n\n{table(head, rows)}\n\n{note}"


def _prior(data: Row, by: str, group: str) -> str:
    row = _find(data, _tasks(data)[0], by, group)
    return _percent(row["prior"]) if row else ""


def _paired(data: Row) -> str:
    found = [row for row in data["paired"] if row["against"] != row["setting"]]
    return _comparison("Against dense, and against dice at the same counts", found)


def _history(data: Row) -> str:
    found = [row for row in data["paired"] if row["against"] == row["setting"]]
    return _comparison("A conversation against the same questions asked alone", found)


def _comparison(title: str, found: list[Row]) -> str:
    if not found:
        return ""
    groups: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in found:
        shown = "" if row["picture"] == "own" else f", {row['picture']} picture"
        pair = f"{row['setting']}, {row['protocol']}{shown}", f"{row['against']}, {row['against_protocol']}{shown}"
        groups.setdefault(pair, {})[row["by"], row["group"]] = row
    rows = []
    for (ours, theirs), by in groups.items():
        whole = by["all", "all"]
        kinds = [_points(by["kind", kind]) if ("kind", kind) in by else "" for kind in KINDS]
        facts = _points(whole["facts"]) if whole["facts"] else ""
        discordant = f"{whole['only_ours']} / {whole['only_theirs']}"
        rows.append((ours, theirs, str(whole["n"]), _points(whole), discordant, *kinds, facts))
    head = ("setting", "against", "n", "points", "only it / only the other right", *KINDS, "facts of lists")
    return f"## {title}\n\n{table(head, rows)}"


def _first_protocol(data: Row) -> str:
    return "single" if any(task[1] == "single" for task in _tasks(data)) else _tasks(data)[0][1]


def _types(data: Row) -> str:
    protocol = _first_protocol(data)
    own = [task for task in _tasks(data) if task[1:] == (protocol, "own")]
    blind = [task for task in _tasks(data) if task[1] == protocol and task[2] != "own"]
    rows = []
    for group in _groups(data, "type"):
        asked = [row for task in own if (row := _find(data, task, "type", group))]
        guesses = [row for task in blind if (row := _find(data, task, "type", group))]
        if asked:
            marked = [_percent(row["accuracy"]) + " **!**" * row["beats_prior_blind"] for row in guesses]
            rows.append((group, str(asked[0]["n"]), _percent(asked[0]["prior"]), *marked, *map(_interval, asked)))
    head = ("type", "n", "guess", *(PICTURES[task[2]][2:] for task in blind), *(task[0] for task in own))
    return f"## By type, {protocol}\n\n{table(head, rows)}" + _leaks(data)


def _leaks(data: Row) -> str:
    rows = [row for row in data["rows"] if row["by"] == "type" and row["beats_prior_blind"] is not None]
    if not rows:
        return ""
    found = [
        f"{row['group']} ({row['protocol']}{PICTURES[row['picture']]})" for row in rows if row["beats_prior_blind"]
    ]
    return (
        "\n\n**!**: accuracy without the right picture passes the best blind guess by more than 5 points, with its "
        f"whole (exact) interval. Under all protocols: {', '.join(found) or 'no type'}."
    )


def _lists(data: Row) -> str:
    """Share of facts right beside exact match."""
    own = [task for task in _tasks(data) if task[2] == "own"]
    names = [
        name for name in _groups(data, "type") if any((_find(data, t, "type", name) or {}).get("lists") for t in own)
    ]
    rows = []
    for task in own:
        cells = []
        for name in names:
            row = _find(data, task, "type", name)
            cells.append(f"{_percent(row['accuracy'])} / {_percent(row['facts'])}" if row else "")
        rows.append((f"{task[0]}, {task[1]}", *cells))
    return f"## Lists: exact match / facts right (F1), %\n\n{table(('setting', *names), rows)}" if names else ""


def _layouts(data: Row) -> str:
    own = [task for task in _tasks(data) if task[2] == "own"]
    names = [row["layout"] for row in data["layouts"]]
    rows = [(f"{task[0]}, {task[1]}", *(_share(data, task, "layout", name) for name in names)) for task in own]
    return f"## By layout, %\n\n{table(('setting', *names), rows)}"


def _costs(data: Row) -> str:
    counts = ("visual_total", "visual_kept", "visual_active", "output_tokens")
    times = ("first_prefill_s", "later_prefill_s", "retrieval_s", "decode_s", "step_s", "first_ttft_s", "later_ttft_s")
    rows = []
    for row in data["costs"]:
        if row["by"] == "all":
            tokens = [f"{row[name]:.1f}" for name in counts]
            rows.append((_name(row), *tokens, *(_milliseconds(row[name]) for name in times)))
    tokens_head = ("visual tokens", "kept", "read", "answer tokens")
    times_head = ("prefill with picture, ms", "of a question", "retrieval", "decode", "per step")
    head = ("setting", *tokens_head, *times_head, "first token with picture", "of a question")
    return f"## Cost per question, means\n\n{table(head, rows)}"


def _encoding(data: Row) -> str:
    rows = [(row["layout"], str(row["n"]), _milliseconds(row["encode_s"])) for row in data["encoding"]]
    if not rows:
        return ""
    return "Encoding a picture, once for all settings:\n\n" + table(("layout", "pictures", "ms"), rows)


def _agreement(data: Row) -> str:
    if not data["agreement"]:
        return ""
    rows = []
    for row in data["agreement"]:
        counts = str(row["questions"]), str(row["steps"])
        shares = _percent(row["top1"]), _percent(row["all_top1"])
        rows.append((_name(row), row["group"], *counts, f"{row['kl']:.4f}", *shares))
    head = (
        "setting",
        "group",
        "questions",
        "steps",
        "KL, nats",
        "same first choice, %",
        "in all steps of an answer, %",
    )
    note = (
        "Decode sparsity alone: dense decoding over what prefill kept, its tokens fed to the sparse path, from the "
        "second token on."
    )
    return f"## Agreement with dense decoding\n\n{note}\n\n{table(head, rows)}"


def _overlap(data: Row) -> str:
    if not data["overlap"]:
        return ""
    rows = []
    for row in data["overlap"]:
        layers = " ".join(f"{value:.2f}" for value in row["jaccard"])
        sinks = " ".join(_percent(value) for value in row["sinks"])
        rows.append((_name(row), str(row["sessions"]), layers, f"{row['jaccard_by_chance']:.2f}", sinks))
    head = ("setting", "sessions", "Jaccard by layer", "of dice", "sinks by layer, % of the store")
    return f"## Overlap of active sets between neighbouring turns\n\n{table(head, rows)}"


def _checks(data: Row) -> str:
    rows = []
    for row in data["checks"]:
        same = f"{row['same_when_fresh']} of {row['asked_again']}" if row["asked_again"] else ""
        redone = f"{row['media_prefilled_again']} of {row['later_questions']}" if row["later_questions"] else ""
        cut = next(r["cut"] for r in data["rows"] if _name(r) == _name(row) and r["by"] == "all")
        rows.append((_name(row), same, redone, str(cut)))
    head = ("setting", "same tokens in a fresh session", "later questions that redid media", "answers cut by the limit")
    note = (
        "A method that prunes without the question must answer a dialogue under partial eviction (each question and "
        "answer forgotten, the visual cache kept) with the tokens of a fresh session for each question. So *single* "
        "is asked in one session per sample, and its dialogue is the figure for partial eviction."
    )
    return f"## Checks\n\n{note}\n\n{table(head, rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--out", type=Path, help="file for the page; without it, it is printed")
    args = parser.parse_args(argv)
    page = render(json.loads(args.json.read_text()))
    if args.out:
        args.out.write_text(page)
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
