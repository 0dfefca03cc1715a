"""A pty with a program in it, as a person at a terminal sees it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pexpect

CTRL_C, CTRL_D = "\x03", "\x04"
TIMEOUT_S = 30


def _hear_interrupts() -> None:
    """A shell's background job ignores SIGINT, and so would its children: a terminal's program does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program in a pty of its own, with `folder` as its working folder and its home."""

    def __init__(self, program: Path, folder: Path, *argv: str, stdout: Path | None = None, **environ: str) -> None:
        env = {**os.environ, "SPARSEVILA_HOME": str(folder / "home"), "TERM": "xterm", "NO_COLOR": "1"}
        env |= {"PROMPT_TOOLKIT_NO_CPR": "1", **environ}  # nobody is there to say where the cursor is
        self._ready = "> " if "--plain" in argv else "\x1b[?2004h"  # bracketed paste goes on once per prompt
        command = [sys.executable, str(program), *argv]
        if stdout:
            command = ["/bin/sh", "-c", f'exec "$@" > "{stdout}"', "sh", *command]
        self._child = pexpect.spawn(
            command[0],
            command[1:],
            cwd=folder,
            env=env,
            encoding="utf-8",
            timeout=TIMEOUT_S,
            dimensions=(24, 100),
            preexec_fn=_hear_interrupts,
        )
        self._child.delaybeforesend = None
        self.shown = ""

    def expect(self, text: str) -> None:
        self._child.expect_exact(text)
        self.shown += self._child.before + self._child.after

    def prompt(self) -> None:
        self.expect(self._ready)

    def send(self, keys: str) -> None:
        self._child.send(keys)

    def enter(self, line: str) -> None:
        self.send(line + "\r")

    def code(self) -> int:
        """Wait for the end; the exit code."""
        self._child.expect(pexpect.EOF)
        self.shown += self._child.before
        self._child.close()
        return self._child.exitstatus if self._child.exitstatus is not None else -self._child.signalstatus

    def terminate(self) -> None:
        self._child.kill(signal.SIGTERM)

    def kill(self) -> None:
        self._child.close(force=True)
