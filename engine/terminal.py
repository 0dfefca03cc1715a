"""The screen and the keyboard of the chat: who may write where, progress lines, escape codes, line editing.

The model's text goes to stdout and nothing else does, but for the JSON lines that replace it with
`--json`. Everything for the person goes to stderr. Streams are arguments; nothing here knows an engine.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .config import Stats

if TYPE_CHECKING:
    from ..models.interface import Progress

REDRAW_S = 0.1  # a progress line is drawn again at most this often
LEFT_AFTER_S = 20.0  # of a stage this long the time left is said, in place of its rate
MAX_ESCAPE_LEN = 256  # an escape sequence longer than this is given up, so that it cannot swallow an answer


class EscapeFilter:
    """Removes terminal escape sequences and control characters from text that comes in pieces."""

    def __init__(self) -> None:
        self._state = "text"
        self._length = 0

    def feed(self, text: str) -> str:
        """The printable part of `text`; a sequence may begin in one piece and end in a later one."""
        return "".join(c for c in text if self._passes(c))

    def _passes(self, char: str) -> bool:
        if self._state == "text":
            return self._in_text(char)
        self._length += 1
        if self._length > MAX_ESCAPE_LEN:
            self._state = "text"
            return self._in_text(char)
        self._state = self._next_state(char)
        return False

    def _in_text(self, char: str) -> bool:
        starts = {"\x1b": "escape", "\x9b": "csi", "\x9d": "string", "\x90": "string"}
        if char in starts:
            self._state, self._length = starts[char], 0
            return False
        return char in "\n\t" or not (char < " " or "\x7f" <= char <= "\x9f")

    def _next_state(self, char: str) -> str:
        if char == "\x1b":
            return "escape"
        if self._state == "escape":
            if char == "[":
                return "csi"
            if char in "]P_^X":
                return "string"
            return "escape" if " " <= char <= "/" else "text"
        if self._state == "csi":
            return "text" if "@" <= char <= "~" else "csi"
        return "text" if char in "\x07\x9c" else "string"


def printable(text: str) -> str:
    """`text` without escape sequences and control characters, for names and messages from outside."""
    return EscapeFilter().feed(text)


def format_bytes(count: float) -> str:
    """A size in decimal units, as disks and hubs give it."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def format_duration(seconds: float) -> str:
    """1 min 5 s, 2 h 10 min: two units at the most."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_stats(stats: Stats, separator: str = " · ") -> str:
    """The line of figures after an answer; percentages are shares removed."""
    parts = [f"ttft {stats.ttft_s * 1000:.0f} ms"]
    if stats.tokens_per_s > 0:
        parts.append(f"decode {stats.tokens_per_s:.1f} tok/s")
    parts.append(f"{stats.output_tokens} tok")
    total, kept, active = stats.visual_tokens_total, stats.visual_tokens_kept, stats.visual_tokens_active
    if total:
        read = f" > {active:.0f} active ({_removed(active, kept)})" if kept else ""
        parts.append(f"visual {total} > {kept} kept ({_removed(kept, total)}){read}")
    if stats.cached_tokens:
        parts.append("cache reused")
    if stats.peak_memory_bytes:
        parts.append(f"peak {format_bytes(stats.peak_memory_bytes)}")
    return separator.join(parts)


def _removed(part: float, whole: float) -> str:
    return f"-{100 * (1 - part / whole):.0f}%"


class ProgressLine:
    """Progress of one long stage: one redrawn line on a terminal, one line per finished stage elsewhere."""

    def __init__(self, stream: TextIO, *, redraw: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._redraw = redraw
        self._clock = clock
        self._last: Progress | None = None
        self._begun_s, self._begun_at = 0.0, 0
        self._drawn_s = float("-inf")
        self._visible = False

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if self._last is None or progress.stage != self._last.stage or progress.done < self._last.done:
            self.clear()
            self._begun_s, self._drawn_s = now, float("-inf")
            self._begun_at = progress.done  # work that was resumed does not begin at 0
        self._last = progress
        if self._redraw and now - self._drawn_s >= REDRAW_S:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be redrawn
            self._stream.write("\r\x1b[K" + self._sentence(now)[:width])
            self._stream.flush()
            self._drawn_s, self._visible = now, True

    def clear(self) -> None:
        """The stage is over: wipe the redrawn line, or write the stage's one line."""
        if self._visible:
            self._stream.write("\r\x1b[K")
        elif self._last is not None and not self._redraw:
            self._stream.write(self._sentence(self._clock()) + "\n")
        self._stream.flush()
        self._last, self._visible = None, False

    def _sentence(self, now: float) -> str:
        p = self._last
        assert p is not None
        elapsed = max(now - self._begun_s, 1e-9)
        rate = p.done / elapsed
        new = p.done - self._begun_at
        if p.unit == "bytes":
            total = f" of {format_bytes(p.total)}" if p.total else ""
            amount, speed = f"{format_bytes(p.done)}{total}", f"{format_bytes(rate)}/s"
        else:
            total = f" of {p.total}" if p.total else ""
            amount, speed = f"{p.done}{total} {p.unit}", f"{rate:.1f} {p.unit}/s"
        if p.total and new > 0 and p.done < p.total and elapsed > LEFT_AFTER_S:
            speed = f"{format_duration((p.total - p.done) * elapsed / new)} left"
        return f"{p.stage} {amount}" + (f" ({speed})" if elapsed > REDRAW_S else "")


class Screen:
    """All output of the chat.

    `plain` draws nothing twice and uses no colour; `quiet` leaves out notes and progress, never errors;
    `as_json` writes one object per line to stdout in place of text, and no notes.
    """

    def __init__(
        self,
        stdout: TextIO,
        stderr: TextIO,
        *,
        plain: bool = False,
        quiet: bool = False,
        as_json: bool = False,
        color: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stderr_is_tty = stderr.isatty()
        self._out, self._err = stdout, stderr
        self._plain, self._quiet, self._json = plain, quiet, as_json
        self._color = color and not plain and self.stderr_is_tty
        self._filter = EscapeFilter() if stdout.isatty() else None
        self._line = ProgressLine(stderr, redraw=self.stderr_is_tty and not plain, clock=clock)
        self._clock = clock
        self._last_event = ("", float("-inf"))  # stage, time
        self._answering = False
        self._at_line_start = True

    # -- the model's text

    def text(self, piece: str) -> None:
        """A piece of an answer, to stdout at once."""
        if not piece:
            return
        self._answering = True
        if self._json:
            self._event("chunk", text=piece)
            return
        self._line.clear()
        shown = self._filter.feed(piece) if self._filter else piece
        if shown:
            self._out.write(shown)
            self._out.flush()
            self._at_line_start = shown.endswith("\n")

    def end_answer(self) -> None:
        """Close the answer's last line."""
        self._line.clear()
        if not self._json and not self._at_line_start:
            self._out.write("\n")
            self._out.flush()
        self._at_line_start, self._answering = True, False
        if self._filter:
            self._filter = EscapeFilter()  # a sequence left open must not reach into the next answer

    def result(self, text: str, finish_reason: str, stats: Stats | None) -> None:
        """The JSON line that closes an answer; nothing without `as_json`."""
        if self._json:
            figures = dataclasses.asdict(stats) if stats else None
            self._event("result", text=text, finish_reason=finish_reason, stats=figures)

    # -- for the person

    def note(self, sentence: str, *, dim: bool = False) -> None:
        """A line on stderr, unless quiet."""
        if self._quiet or self._json:
            return
        self._say(f"\x1b[2m{printable(sentence)}\x1b[0m" if dim and self._color else printable(sentence))

    def error(self, message: str, *, hint: str = "", code: str = "internal", exit_code: int = 1) -> None:
        """One line on stderr, a hint of several lines below it; a JSON line where those are asked for."""
        steps = hint.split("\n") if "\n" in hint else []
        sentence = printable(message + (f" ({hint})" if hint and not steps else "")).replace("\n", " ")
        lines = [f"\x1b[31merror:\x1b[0m {sentence}" if self._color else f"error: {sentence}"]
        self._say("\n".join([*lines, *(f"  {printable(step)}" for step in steps)]))
        if self._json:
            self._event("error", code=code, message=message, hint=hint, exit_code=exit_code)

    def stats(self, stats: Stats) -> None:
        self.note(format_stats(stats, ", " if self._plain else " · "), dim=True)

    def block(self, text: str) -> None:
        """Lines on stderr that are shown even when quiet: what a person has asked for."""
        self._say("\n".join(printable(line) for line in text.split("\n")))

    def _say(self, sentence: str) -> None:
        self._line.clear()
        if not self._at_line_start and self._out.isatty():
            self._out.write("\n")
            self._out.flush()
            self._at_line_start = True
        self._err.write(sentence + "\n")
        self._err.flush()

    # -- progress

    def progress(self, progress: Progress) -> None:
        """The callback for the engine's long stages. What the engine does after the first word is not one."""
        if self._answering:
            return
        if self._json:
            now, (stage, drawn_s) = self._clock(), self._last_event
            if progress.stage != stage or progress.done == progress.total or now - drawn_s >= REDRAW_S:
                self._last_event = (progress.stage, now)
                self._event("stage", **dataclasses.asdict(progress))
        elif not self._quiet:
            self._line(progress)

    def clear_progress(self) -> None:
        self._line.clear()

    def _event(self, kind: str, **fields: Any) -> None:
        self._out.write(json.dumps({"type": kind, **fields}, allow_nan=False) + "\n")
        self._out.flush()


class LineReader(Protocol):
    """Where questions come from. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C at an empty prompt."""

    def read(self) -> str: ...


class PlainReader:
    """The terminal's own line editing: nothing is drawn but the prompt."""

    def __init__(self, stdin: TextIO, stderr: TextIO) -> None:
        self._stdin, self._stderr = stdin, stderr

    def read(self) -> str:
        self._stderr.write("> ")
        self._stderr.flush()
        line = self._stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class EditingReader:
    """Line editing, history and Tab completion by prompt_toolkit, drawn on stderr.

    A pasted text of several lines stays one question. Ctrl-C clears a typed line first.
    """

    def __init__(self, stdin: TextIO, stderr: TextIO, *, history: Path | None, color: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import CompleteEvent, Completer, Completion
        from prompt_toolkit.document import Document
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.input import create_input
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import ColorDepth, create_output

        from .commands import complete

        class LineCompleter(Completer):
            def get_completions(self, document: Document, complete_event: CompleteEvent) -> Any:
                for replaced, text in complete(document.text_before_cursor):
                    yield Completion(text, start_position=-replaced)

        keys = KeyBindings()

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        # A signal that ends the program while the history is read would be logged, traceback and all, over the prompt.
        logging.getLogger("prompt_toolkit").addHandler(logging.NullHandler())
        kept: History = FileHistory(str(history)) if history and _make_private(history) else InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            message="> ",
            input=create_input(stdin),
            output=create_output(stderr),
            color_depth=None if color else ColorDepth.DEPTH_1_BIT,
            history=kept,
            completer=LineCompleter(),
            complete_while_typing=False,
            key_bindings=keys,
        )

    def read(self) -> str:
        return self._session.prompt()


def _make_private(history: Path) -> bool:
    """Create the history file for its owner alone; False where that is not possible."""
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(history, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return False
    return True
