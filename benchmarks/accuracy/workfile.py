"""Results on disk as they come, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy.answering import Conversation
from environment import ROOT

# What answers depend on, beside the arguments and the checkpoint: the engine, what is drawn and what is asked.
_ENGINE = ("engine", "kernels", "models", "quant")
_WORLD = ("clip", "dialogue", "dice", "drawing", "glyphs", "page", "sample", "scene", "splits", "video", "vocabulary")
_OWN = ("questions", "answering")


@dataclass(frozen=True)
class Result:
    """What one task made of one chunk of samples, in their order."""

    task: str
    chunk: int
    conversations: tuple[Conversation, ...]

    def to_line(self) -> str:
        data = [conversation.to_json() for conversation in self.conversations]
        return json.dumps({"task": self.task, "chunk": self.chunk, "conversations": data}, separators=(",", ":"))

    @staticmethod
    def from_line(line: str) -> Result:
        data = json.loads(line)
        return Result(data["task"], data["chunk"], tuple(map(Conversation.from_json, data["conversations"])))


class WorkFile:
    """A file of JSON lines: a header that says what of, then one result each.

    Raises SystemExit if the file is there and its header is another one: results of two runs are never mixed.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        first = json.dumps(header, sort_keys=True)
        whole = _whole_lines(path)
        if not whole:
            path.write_text(first + "\n")
            return
        if whole[0] != first:
            changed = _differences(json.loads(whole[0]), header)
            raise SystemExit(f"{path} holds results of another run ({changed}): remove it, or choose another --out")
        _rewrite(path, whole)  # without a last line that was cut

    def results(self) -> Iterator[Result]:
        """What is there; of a task's chunk that came twice, the first."""
        seen: set[tuple[str, int]] = set()
        for line in _whole_lines(self.path)[1:]:
            result = Result.from_line(line)
            if (result.task, result.chunk) not in seen:
                seen.add((result.task, result.chunk))
                yield result

    def append(self, results: Iterable[Result]) -> None:
        """Adds results; they are on disk when it returns."""
        with open(self.path, "a") as file:
            for result in results:
                file.write(result.to_line() + "\n")


def _whole_lines(path: Path) -> list[str]:
    """Lines that end; a process that was killed may have left half of one."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _rewrite(path: Path, lines: list[str]) -> None:
    beside = path.with_suffix(".new")
    beside.write_text("".join(line + "\n" for line in lines))
    beside.replace(path)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return ", ".join(f"{name}: there {old.get(name)!r:.40}, here {new.get(name)!r:.40}" for name in names)


def checksum_of_checkpoint(folder: Path) -> str:
    """sha256 over names and contents of what a checkpoint is made of."""
    digest = hashlib.sha256()
    kinds = {".safetensors", ".json", ".model"}
    for path in sorted(path for path in folder.iterdir() if path.suffix in kinds):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def checksum_of_sources() -> str:
    """sha256 over the code whose change may change an answer."""
    files = [path for folder in _ENGINE for path in sorted((ROOT / folder).rglob("*.py"))]
    files += [ROOT / "benchmarks" / "world" / f"{name}.py" for name in _WORLD]
    files += [Path(__file__).parent / f"{name}.py" for name in _OWN]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
