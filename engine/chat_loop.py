"""The interactive conversation: typed lines in, answers and notes out, Ctrl-C in between.

It drives a session and a screen that are given to it; which model and which streams is the program's matter.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..errors import Closed, EngineDead, InvalidRequest, SparseVILAError
from . import commands, terminal
from .config import Attachment, EngineInfo, FinishReason, Image, Sparsity, Stats, Video
from .switches import parse_switches, write_switches

if TYPE_CHECKING:
    from ..models.interface import Progress
    from .engine import Engine
    from .session import Session
    from .sparsity.base import Method

HINT_WINDOW_S = 2.0  # two Ctrl-C at an empty prompt within this time leave
INTERRUPTED = 130
NOTE_FILE = "NOTE.md"  # beside a model's weights: what a person should know before believing its answers
MAX_NOTE_CHARACTERS = 4096


class Interrupts:
    """Ctrl-C while the engine works: the first two ask it to stop, the third leaves the program."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.count = 0
        self._stop = stop
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, _signum: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 2:
            raise KeyboardInterrupt
        self._stop()


class Chat:
    """A conversation: what is typed goes in by `handle`, answers and notes go out by `screen`."""

    def __init__(
        self, engine: Engine, screen: terminal.Screen, settings: commands.Settings, *, system: str | None, stats: bool
    ) -> None:
        self._engine = engine
        self._session: Session = engine.session(system=system, progress=screen.progress)
        self._screen = screen
        self._settings = commands.Settings()
        self._show_stats = stats
        self._unanswered: str | None = None  # the last question, while it has no whole answer
        self._retries = 0
        self._last_stats: Stats | None = None
        self._use(settings)

    def close(self) -> None:
        self._session.close()

    # -- turns

    def attach(self, item: Image | Video) -> None:
        """Add media to the next question. Raises KeyboardInterrupt when stopped; then nothing has changed."""
        with Interrupts(lambda: None) as interrupts:

            def progress(step: Progress) -> None:
                if interrupts.count:
                    raise KeyboardInterrupt
                self._screen.progress(step)

            attachment = self._session.attach(item, progress=progress)
        self._screen.clear_progress()
        self._use(self._settings)  # the default sparsity may be another one now
        for line in describe_attachment(attachment):
            self._screen.note(line)

    def ask(self, text: str) -> FinishReason:
        """Stream one answer. A cancelled or failed turn leaves the conversation as it was."""
        self._unanswered = text
        pieces: list[str] = []
        reason: FinishReason = "error"
        stats: Stats | None = None
        params = self._settings.params
        if self._retries and params.temperature > 0:
            params = replace(params, seed=params.seed + self._retries)  # the same seed would repeat the answer
        with Interrupts(self._session.cancel) as interrupts:

            def progress(step: Progress) -> None:
                if interrupts.count:  # a press before the stream began was forgotten by it
                    self._session.cancel()
                self._screen.progress(step)

            try:
                for chunk in self._session.stream(text, params=params, progress=progress):
                    pieces.append(chunk.text)
                    self._screen.text(chunk.text)
                    if chunk.finish_reason:
                        reason, stats = chunk.finish_reason, chunk.stats
            finally:
                self._screen.end_answer()
        self._screen.result("".join(pieces), reason, stats)
        if reason == "cancelled":
            self._screen.block("[stopped]")
        else:
            self._unanswered, self._last_stats = None, stats
        if stats and stats.output_tokens and self._show_stats:
            self._screen.stats(stats)
        return reason

    def loop(self, reader: terminal.LineReader) -> int:
        """Answer until the end of input; the exit code."""
        pressed_s = float("-inf")
        while True:
            try:
                line = reader.read()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if time.monotonic() - pressed_s < HINT_WINDOW_S:
                    return INTERRUPTED
                pressed_s = time.monotonic()
                self._screen.block("Ctrl-D or /exit leaves; Ctrl-C again too")
                continue
            try:
                if not self.handle(line):
                    return 0
            except (EngineDead, Closed):
                raise
            except SparseVILAError as error:
                report_error(self._screen, error)

    def handle(self, line: str) -> bool:
        """Do what a typed line says; False when it says leave."""
        meant = commands.parse_line(line, self._settings)
        if isinstance(meant, commands.Run):
            if meant.name == "exit":
                return False
            getattr(self, f"_do_{meant.name}")(meant.rest)
        elif isinstance(meant, commands.Attach):
            self._attach_all(meant)
        elif isinstance(meant, commands.Ask):
            self._retries = 0
            self.ask(meant.text)
        return True

    def _attach_all(self, meant: commands.Attach) -> None:
        try:
            for item in meant.items:
                self.attach(item)
        except KeyboardInterrupt:
            self._screen.clear_progress()
            self._screen.block("[stopped] not attached")
            return
        if meant.question:
            self._retries = 0
            self.ask(meant.question)

    def _use(self, settings: commands.Settings) -> None:
        """Take `settings` over, all or nothing."""
        wanted = self._policy(settings)
        if wanted is not None or self._policy(self._settings) is not None:
            self._session.sparsity = wanted
        self._settings = settings

    def _policy(self, settings: commands.Settings) -> Sparsity | None:
        """The sparsity to ask for; None leaves all of it to the engine."""
        prefill, decode = settings.prefill_sparsity, settings.decode_sparsity
        switches = parse_switches(",".join(settings.switch)) if settings.switch else {}
        if prefill is None and decode is None and settings.method == Sparsity.method and not switches:
            return None
        has_video = any(a.kind == "video" for a in self._session.media)
        auto = self._engine.default_sparsity("video" if has_video else "image")
        return replace(
            auto,
            prefill=auto.prefill if prefill is None else prefill,
            decode=auto.decode if decode is None else decode,
            method=settings.method,
            **switches,
        )

    # -- slash commands, by name

    def _do_media(self, _rest: str) -> None:
        lines = [line for a in self._session.media for line in describe_attachment(a)]
        self._screen.block("\n".join(lines) or "nothing is attached: /image FILE or /video FILE")

    def _do_drop(self, rest: str) -> None:
        number = commands.parse_int(rest)
        self._session.drop(number)
        self._use(self._settings)
        self._screen.note(f"dropped item {number}")

    def _do_clear(self, _rest: str) -> None:
        self._session.clear()
        self._unanswered = None
        self._screen.note("the turns are forgotten, the media are kept")

    def _do_reset(self, _rest: str) -> None:
        self._session.reset()
        self._unanswered = None
        self._use(self._settings)
        self._screen.note("turns and media are forgotten")

    def _do_undo(self, _rest: str) -> None:
        turn = self._session.undo()
        self._unanswered = None
        self._screen.note(f"dropped: {turn.question}")

    def _do_retry(self, _rest: str) -> None:
        question = self._unanswered
        if question is None:
            question = self._session.undo().question
        self._retries += 1
        self.ask(question)

    def _do_sparsity(self, rest: str) -> None:
        words = rest.split()
        if words == ["auto"]:
            words = ["auto", "auto"]
        if words and len(words) != 2:
            raise InvalidRequest("expected two values", hint="/sparsity PREFILL DECODE, e.g. /sparsity 0.6 0.75")
        if words:
            prefill, decode = (commands.parse_sparsity(word) for word in words)
            self._use(replace(self._settings, prefill_sparsity=prefill, decode_sparsity=decode))
        self._screen.block(f"{describe_sparsity(self._session.sparsity)}\n{self._session.method}")

    def _do_set(self, rest: str) -> None:
        key, value = commands.take_word(rest)
        if not key or not value:
            raise InvalidRequest(
                "expected a key and a value", hint="e.g. /set temperature 0.7; /show params lists keys"
            )
        self._use(commands.set_option(self._settings, key, value))
        row = commands.option(key)
        self._screen.note(f"{row.key} {dict(commands.show_settings(self._settings))[row.key]}")

    def _do_show(self, rest: str) -> None:
        topics: dict[str, Callable[[], list[tuple[str, str]]]] = {
            "params": lambda: commands.show_settings(self._settings),
            "model": lambda: describe_model(self._engine.info),
            "memory": self._memory,
        }
        wanted = rest.split() or list(topics)
        if unknown := [word for word in wanted if word not in topics]:
            raise InvalidRequest(f"there is no {unknown[0]!r} to show", hint=f"one of {', '.join(topics)}")
        self._screen.block(table([row for word in wanted for row in topics[word]()]))

    def _memory(self) -> list[tuple[str, str]]:
        info, stats = self._engine.info, self._last_stats
        peak = terminal.format_bytes(stats.peak_memory_bytes) if stats and stats.peak_memory_bytes else "no turn yet"
        return [
            ("weights", terminal.format_bytes(info.weight_bytes)),
            ("context", f"{info.max_context} tokens"),
            ("visual tokens", str(sum(a.tokens_kept for a in self._session.media))),
            ("peak of the last turn", peak),
        ]

    def _do_stats(self, rest: str) -> None:
        self._show_stats = commands.parse_switch(rest) if rest else not self._show_stats
        self._screen.note(f"stats {'on' if self._show_stats else 'off'}")

    def _do_system(self, rest: str) -> None:
        self._session.system = rest or None
        self._screen.note("system text set" if rest else "system text removed")

    def _do_help(self, rest: str) -> None:
        if rest:
            found = commands.command(rest.lstrip("/"))
            if found is None:
                raise InvalidRequest(f"there is no command {rest!r}")
            self._screen.block(f"{found.usage}\n  {found.summary}")
            return
        rows = [(c.usage if len(c.usage) < 40 else f"/{c.name} ...", c.summary) for c in commands.COMMANDS]
        ways = "A dropped file is attached. // sends a line that starts with /. Ctrl-C stops an answer."
        self._screen.block(f"{table(rows)}\n{ways}")


# ---- sentences


def describe_attachment(item: Attachment) -> list[str]:
    """Lines for one attached item: what it is, what is kept of it, what was odd about it."""
    what = f"{item.kind} {item.width}x{item.height}"
    if item.kind == "video":
        what += f", {item.duration_s:.1f} s, {item.frames} frame{'s' if item.frames != 1 else ''}"
    tokens = f"{item.tokens_total} visual tokens, {item.tokens_kept} kept"
    return [f"[{item.number}] {item.source}: {what}, {tokens}", *(f"    note: {note}" for note in item.notes)]


def describe_sparsity(sparsity: Sparsity | Method) -> str:
    """The effective policy in words, with the switches that are on."""
    shares = f"sparsity: {sparsity.prefill:.0%} pruned, {sparsity.decode:.0%} of the rest not read"
    if not isinstance(sparsity, Sparsity):
        return f"{shares} ({type(sparsity).__name__})"
    on = write_switches(sparsity)
    return f"{shares} ({sparsity.method}{' with ' + on if on else ''})"


def describe_model(info: EngineInfo) -> list[tuple[str, str]]:
    """Rows for `/show model`."""
    return [
        ("model", info.model),
        ("architecture", info.architecture),
        ("folder", info.folder),
        ("scheme", f"{info.scheme} on {info.device}"),
        ("parameters", f"{info.parameters / 1e6:.1f} M, {terminal.format_bytes(info.weight_bytes)}"),
        ("context", f"{info.max_context} tokens"),
        *((key, str(value)) for key, value in info.details.items()),
    ]


def banner(screen: terminal.Screen, info: EngineInfo) -> None:
    """What is loaded, where from, and what to know about it."""
    size = f"{info.parameters / 1e6:.1f} M parameters, {terminal.format_bytes(info.weight_bytes)}"
    screen.note(
        f"{info.model}: {info.architecture}, {info.scheme} on {info.device}, {size}, context {info.max_context}"
    )
    screen.note(f"from {info.folder}", dim=True)
    for note in (*info.notes, note_beside(Path(info.folder))):
        if note:
            screen.note(note)


def note_beside(folder: Path) -> str:
    """What a model's NOTE.md says first: the first paragraph below its heading, as one line; "" without one."""
    note = folder / NOTE_FILE
    if not note.is_file():
        return ""
    with note.open(encoding="utf-8", errors="replace") as file:
        lines = file.read(MAX_NOTE_CHARACTERS).splitlines()
    below = itertools.dropwhile(lambda line: not line.strip() or line.startswith("#"), lines)
    return " ".join(line.strip() for line in itertools.takewhile(str.strip, below))


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns."""
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"{left:{width}}  {right}" for left, right in rows)


def report_error(screen: terminal.Screen, error: SparseVILAError) -> None:
    """One line for a typed error."""
    screen.error(str(error), hint=error.hint, code=error.code, exit_code=error.exit_code)
