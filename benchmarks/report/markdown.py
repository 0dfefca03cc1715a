"""Tables and figures of a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others to the right. Raises ValueError for a row of another length."""
    lines = [list(head), [":--", *["--:"] * (len(head) - 1)]]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"expected {len(head)} cells, got {len(row)}: {row}")
        lines.append(list(row))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def interval(row: Mapping[str, float]) -> str:
    """A share of right answers with its 95 % interval, in percent."""
    return f"{percent(row['accuracy'])} [{percent(row['low'])}, {percent(row['high'])}]"


def points(row: Mapping[str, float] | None) -> str:
    """A difference with its 95 % interval, in percentage points."""
    return "" if row is None else f"{100 * row['mean']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def figure(name: str, what: str) -> str:
    return f"![{what}](results/{name})"
