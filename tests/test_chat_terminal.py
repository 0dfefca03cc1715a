"""The chat program at a real terminal (a pty) and in real pipes, on the stand-in engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pty_terminal import CTRL_C, CTRL_D, TIMEOUT_S, Terminal

PROGRAM = Path(__file__).resolve().parent / "fake_engine.py"


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "slow.mp4").write_bytes(b"\0\0\0\x20ftyp")
    (tmp_path / "my clip.mp4").write_bytes(b"\0\0\0\x20ftyp")
    opened: list[Terminal] = []

    def call(*argv: str, **kwargs: Any) -> Terminal:
        opened.append(Terminal(PROGRAM, tmp_path, *argv, **kwargs))
        return opened[-1]

    yield call
    for terminal in opened:
        terminal.kill()


def test_a_conversation_and_its_history(open_terminal: Any, tmp_path: Path) -> None:
    terminal = open_terminal()
    terminal.prompt()
    terminal.enter("hello")
    terminal.expect("HELLO [0]")
    terminal.expect("ttft 412 ms")
    terminal.prompt()
    terminal.send("/vid\t")
    terminal.expect("eo")
    terminal.send("my\t")
    terminal.expect("clip.mp4")
    terminal.enter("")
    terminal.expect("[1] my clip.mp4: video")
    terminal.prompt()
    terminal.send(CTRL_D)
    assert terminal.code() == 0
    history = tmp_path / "home" / "history"
    assert "hello" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_pasted_lines_are_one_question(open_terminal: Any, tmp_path: Path) -> None:
    terminal = open_terminal("--no-history", stdout=tmp_path / "out")
    terminal.prompt()
    terminal.send("\x1b[200~first line\nsecond line\x1b[201~")
    terminal.enter("")
    terminal.expect("ttft")
    terminal.prompt()
    terminal.enter("/exit")
    assert terminal.code() == 0
    assert (tmp_path / "out").read_text() == "FIRST LINE\nSECOND LINE [0]\n"
    assert not (tmp_path / "home").exists()


def test_stdout_holds_the_answers_alone(open_terminal: Any, tmp_path: Path) -> None:
    terminal = open_terminal("--video", "my clip.mp4", stdout=tmp_path / "out")
    for line in ("/media", "one", "/nonsense", "two", "/exit"):
        terminal.prompt()
        terminal.enter(line)
    assert terminal.code() == 0
    assert (tmp_path / "out").read_text() == "ONE [1]\nTWO [1]\n"
    assert "there is no command" in terminal.shown


def test_escape_codes_of_the_model_are_stripped(open_terminal: Any) -> None:
    terminal = open_terminal("--model", "escape", "--plain")
    terminal.prompt()
    terminal.enter("x")
    terminal.expect("red plain end")
    terminal.prompt()
    terminal.enter("/exit")
    assert terminal.code() == 0
    assert "\x1b" not in terminal.shown


@pytest.mark.parametrize(
    ("model", "stage"),
    [("slow-encode", "encode "), ("slow-prefill", "prefill "), ("endless", "word3 ")],
)
def test_ctrl_c_stops_a_turn_and_keeps_the_model(open_terminal: Any, model: str, stage: str) -> None:
    terminal = open_terminal("--model", model)
    terminal.prompt()
    terminal.enter("q")
    terminal.expect(stage)
    terminal.send(CTRL_C)
    terminal.expect("[stopped]")
    terminal.prompt()
    terminal.enter("/undo")  # the turn is not in the history
    terminal.expect("there is no turn to undo")
    terminal.prompt()
    terminal.enter("/retry")  # but can be asked again
    terminal.expect(stage)
    terminal.send(CTRL_C)
    terminal.expect("[stopped]")
    terminal.prompt()
    terminal.enter("/exit")
    assert terminal.code() == 0


def test_ctrl_c_while_attaching(open_terminal: Any) -> None:
    terminal = open_terminal()
    terminal.prompt()
    terminal.enter("/video slow.mp4")
    terminal.expect("decode ")
    terminal.send(CTRL_C)
    terminal.expect("[stopped] not attached")
    terminal.prompt()
    terminal.enter("/media")
    terminal.expect("nothing is attached")
    terminal.prompt()
    terminal.enter("/exit")
    assert terminal.code() == 0


def test_ctrl_c_while_loading_leaves(open_terminal: Any) -> None:
    terminal = open_terminal("--model", "slow-load")
    terminal.expect("load ")
    terminal.send(CTRL_C)
    assert terminal.code() == 130
    assert "Traceback" not in terminal.shown


def test_ctrl_c_at_the_prompt(open_terminal: Any) -> None:
    terminal = open_terminal()
    terminal.prompt()
    terminal.send("half_a_line")
    terminal.expect("half_a_line")
    terminal.send(CTRL_C)  # clears the line, and does not count
    terminal.enter("whole")
    terminal.expect("WHOLE [0]")
    assert "Ctrl-C again" not in terminal.shown
    terminal.prompt()
    terminal.send(CTRL_C)
    terminal.expect("Ctrl-D or /exit leaves")
    terminal.prompt()
    terminal.send(CTRL_C)
    assert terminal.code() == 130
    assert "HALF" not in terminal.shown


def test_ctrl_c_in_a_run_with_a_prompt(open_terminal: Any) -> None:
    terminal = open_terminal("--model", "endless", "--prompt", "x")
    terminal.expect("word3 ")
    terminal.send(CTRL_C)
    assert terminal.code() == 130
    assert "[stopped]" in terminal.shown


def _pipe(*argv: str, **kwargs: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(PROGRAM), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_is_silent(unbuffered: str) -> None:
    process = _pipe("--model", "huge", "--prompt", "x", "-q", env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(TIMEOUT_S) == 141
    assert process.stderr.read() == b""


def test_prompt_leaves_stdin_alone() -> None:
    read_end, write_end = os.pipe()  # never written, never closed: reading it would hang
    try:
        process = _pipe("--prompt", "x", "-q", stdin=read_end)
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert (process.returncode, out, err) == (0, b"X [0]\n", b"")


def test_sigterm_ends_it_cleanly() -> None:
    process = _pipe("--model", "endless", "--prompt", "x", "-q")
    assert process.stdout is not None
    process.stdout.read(10)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (143, b"")


def test_sigterm_at_the_prompt(open_terminal: Any) -> None:
    terminal = open_terminal()
    terminal.prompt()
    terminal.terminate()
    assert terminal.code() == 143
    assert "Traceback" not in terminal.shown


def test_a_narrow_ascii_terminal_does_no_harm(open_terminal: Any) -> None:
    terminal = open_terminal("--model", "utf8", "--prompt", "x", PYTHONIOENCODING="ascii", COLUMNS="5")
    assert terminal.code() == 0
    assert "na\\xefve" in terminal.shown


def test_help_is_quick() -> None:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(PROGRAM), "--help"], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0
    assert time.perf_counter() - start < 2  # torch alone takes longer
