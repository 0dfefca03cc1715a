"""Escape codes, progress lines, the stats line, and which stream gets what."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsevila.engine.config import Stats
from sparsevila.engine.terminal import (
    EscapeFilter,
    ProgressLine,
    Screen,
    format_bytes,
    format_duration,
    format_stats,
    printable,
)
from sparsevila.models.interface import Progress


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("plain naïve 数🙂\n\ttext", "plain naïve 数🙂\n\ttext"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Jwiped\x90q\x9cend", "wipedend"),
        ("\x1b(Btext\x1bcmore", "textmore"),
        ("a\rb\x08c\x7fd\x00e", "abcde"),
        ("\x1b[" + "1" * 300 + "x tail", "1" * 45 + "x tail"),
    ],
)
def test_escape_codes_are_removed(raw: str, clean: str) -> None:
    assert printable(raw) == clean
    pieces = EscapeFilter()
    assert "".join(pieces.feed(c) for c in raw) == clean


@given(st.text())
def test_nothing_that_steers_a_terminal_passes(text: str) -> None:
    clean = printable(text)
    assert not any((c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" for c in clean)


@given(st.text(alphabet=st.characters(exclude_categories=["Cc"])))
def test_ordinary_text_passes(text: str) -> None:
    assert printable(text) == text


def test_progress_is_redrawn_on_a_terminal() -> None:
    stream, clock = Tty(), Clock()
    line = ProgressLine(stream, redraw=True, clock=clock)
    for done in range(1, 5):
        line(Progress("encode", done, 4, "frames"))
        clock.now += 0.2
    line.clear()
    drawn = stream.getvalue().split("\r\x1b[K")
    assert drawn[1] == "encode 1 of 4 frames"
    assert drawn[4] == "encode 4 of 4 frames (6.7 frames/s)"
    assert drawn[5] == ""
    assert "\n" not in stream.getvalue()


def test_a_long_stage_says_the_time_left() -> None:
    """Counted from where it began: work that was resumed had most of its units done in no time."""
    stream, clock = Tty(), Clock()
    line = ProgressLine(stream, redraw=True, clock=clock)
    for done in (28, 29, 30, 31):
        line(Progress("quantise", done, 34, "layers"))
        clock.now += 60
    drawn = stream.getvalue().split("\r\x1b[K")
    assert drawn[1:] == [
        "quantise 28 of 34 layers",
        "quantise 29 of 34 layers (5 min 0 s left)",
        "quantise 30 of 34 layers (4 min 0 s left)",
        "quantise 31 of 34 layers (3 min 0 s left)",
    ]
    assert [format_duration(s) for s in (0.4, 59.4, 61, 3599, 3600, 90061)] == [
        "0 s", "59 s", "1 min 1 s", "59 min 59 s", "1 h 0 min", "25 h 1 min"
    ]  # fmt: skip


def test_progress_is_one_line_per_stage_elsewhere() -> None:
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine(stream, redraw=False, clock=clock)
    for stage, total, unit in (("load", 4_000_000, "bytes"), ("encode", 2, "frames"), ("encode", 2, "frames")):
        for done in (total // 2, total):
            clock.now += 0.5
            line(Progress(stage, done, total, unit))
    line.clear()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("load 4.0 MB of 4.0 MB (4.0 MB/s)")
    assert [text.split()[0] for text in lines] == ["load", "encode", "encode"]
    assert "\x1b" not in stream.getvalue()


def _figures(**changes: Any) -> Stats:
    figures = {
        "ttft_s": 0.412,
        "tokens_per_s": 61.3,
        "output_tokens": 184,
        "visual_tokens_total": 12288,
        "visual_tokens_kept": 4915,
        "visual_tokens_active": 1229.0,
        "cached_tokens": 7,
        "peak_memory_bytes": 7_400_000_000,
    }
    return Stats(**{**figures, **changes})


def test_stats_line() -> None:
    assert format_stats(_figures()) == (
        "ttft 412 ms · decode 61.3 tok/s · 184 tok · visual 12288 > 4915 kept (-60%) > 1229 active (-75%)"
        " · cache reused · peak 7.4 GB"
    )
    text_only = _figures(visual_tokens_total=0, visual_tokens_kept=0, visual_tokens_active=0.0, tokens_per_s=0.0)
    assert format_stats(text_only, ", ") == "ttft 412 ms, 184 tok, cache reused, peak 7.4 GB"


def test_sizes() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 7_400_000_000)] == ["0 B", "999 B", "1.0 kB", "7.4 GB"]


def test_only_the_answer_goes_to_stdout() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(out, err)
    screen.note("a note")
    screen.progress(Progress("prefill", 1, 1, "tokens"))
    for piece in ("The \x1b[1m", "answer"):
        screen.text(piece)
    screen.end_answer()
    screen.stats(_figures())
    screen.error("wrong\nthing", hint="so")
    screen.block("asked for")
    assert out.getvalue() == "The \x1b[1manswer\n"  # not a terminal: byte for byte
    assert err.getvalue().splitlines()[:2] == ["a note", "prefill 1 of 1 tokens"]
    assert "error: wrong thing (so)" in err.getvalue()


def test_terminal_gets_no_escape_codes_of_the_model() -> None:
    out, err = Tty(), Tty()
    screen = Screen(out, err, color=False)
    screen.text("a\x1b[3")
    screen.text("1mb")
    screen.note("na\x1b]0;x\x07me")
    screen.end_answer()
    assert out.getvalue() == "ab\n"
    assert err.getvalue() == "name\n"


def test_an_open_escape_sequence_ends_with_the_answer() -> None:
    out = Tty()
    screen = Screen(out, io.StringIO())
    screen.text("x\x1b]never closed")
    screen.end_answer()
    screen.text("next")
    assert out.getvalue() == "x\nnext"


def test_a_hint_of_several_lines_keeps_them() -> None:
    err = io.StringIO()
    Screen(io.StringIO(), err).error("no weights", hint="1. here\n2. there\x1b[2J")
    assert err.getvalue() == "error: no weights\n  1. here\n  2. there\n"


def test_progress_behind_the_first_word_is_not_shown() -> None:
    err = io.StringIO()
    screen = Screen(io.StringIO(), err)
    for word in ("one", "two"):
        screen.progress(Progress("prefill", 7, 7, "tokens"))
        screen.text(word)
        screen.progress(Progress("prefill", 1, 1, "tokens"))  # the closing text of the turn
        screen.end_answer()
    assert err.getvalue() == "prefill 7 of 7 tokens\n" * 2


def test_json_tells_of_every_stage() -> None:
    out, clock = io.StringIO(), Clock()
    screen = Screen(out, io.StringIO(), as_json=True, clock=clock)
    for stage, done in (("load", 9), ("decode", 1), ("decode", 2), ("encode", 9)):
        screen.progress(Progress(stage, done, 9, "frames"))
    clock.now += 1
    screen.progress(Progress("encode", 3, 9, "frames"))
    shown = [(line["stage"], line["done"]) for line in map(json.loads, out.getvalue().splitlines())]
    assert shown == [("load", 9), ("decode", 1), ("encode", 9), ("encode", 3)]


def test_quiet_keeps_errors() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(out, err, quiet=True)
    screen.note("note")
    screen.progress(Progress("load", 1, 1, "bytes"))
    screen.error("bad")
    assert err.getvalue() == "error: bad\n"


def test_json_lines() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(out, err, as_json=True)
    screen.note("not here")
    screen.progress(Progress("encode", 1, 1, "frames"))
    screen.text("naïve \ud800")
    screen.result("naïve \ud800", "stop", _figures())
    screen.error("bad", code="media", exit_code=4)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["type"] for line in lines] == ["stage", "chunk", "result", "error"]
    assert lines[2]["stats"]["output_tokens"] == 184
    assert lines[3] == {"type": "error", "code": "media", "message": "bad", "hint": "", "exit_code": 4}
    assert out.getvalue().isascii()


def test_what_happens_while_the_history_is_read_is_not_logged_over_the_prompt() -> None:
    """In a process of its own: a logger without a handler writes to stderr, and pytest has handlers."""
    program = """
import logging, os
from sparsevila.engine.terminal import EditingReader
_, slave = os.openpty()
with open(slave, "r+b", buffering=0) as tty:
    EditingReader(os.fdopen(os.dup(slave), "r"), os.fdopen(os.dup(slave), "w"), history=None, color=False)
logging.getLogger("prompt_toolkit").error("Loading history failed")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
