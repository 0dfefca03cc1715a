"""Measurements as they lie in `benchmarks/results`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class MissingMeasurement(RuntimeError):
    """A section's JSON is not there; says which command makes it."""


def read(results: Path, name: str, command: str) -> Row:
    """The JSON `name`. Raises MissingMeasurement with the command that makes it."""
    path = results / name
    if not path.exists():
        raise MissingMeasurement(f"expected {path.name} in {results.name}, which is not there; make it with: {command}")
    data: Row = json.loads(path.read_text())
    return data


def command_of(data: Row) -> str:
    """The command that made a measurement, as an indented block."""
    return "    " + data["environment"]["command"]


def origin(data: Row) -> str:
    """Where a measurement was made, in a line."""
    place = data["environment"]
    changed = " and changes" * place["dirty"]
    return f"commit `{place['commit'][:12]}`{changed}, torch {place['torch']}, {place['cpu'].strip(' ,')}"
