"""docs/results.md, its plots and the README's table, from the measurements in benchmarks/results alone.

    python benchmarks/report/page.py [--results benchmarks/results] [--out docs/results.md] [--readme README.md]

A section is a module with `section(results, figures) -> str`: it reads its JSON, writes its plots to `figures` and
returns its Markdown. One that reads a JSON says which (`SOURCE`) and what makes it (`COMMAND`; of several `SOURCES` and
`COMMANDS`, by the same names), and raises with that command where it is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report.measured import origin, read
from report.summary import block, placed

ROOT = Path(__file__).resolve().parents[2]
# In the order of the page.
SECTIONS = (
    "report.findings", "report.accuracy_cost", "report.equal_cost", "report.limits", "report.greedy", "report.leakage",
    "report.functional", "report.decoupling", "report.switches", "report.not_shown",
)  # fmt: skip
HEAD = """# Results

What sparsity costs and what it keeps, measured. The built-in model answers questions about a drawn world whose truth
is known ([demo-model.md](demo-model.md), [evaluation.md](evaluation.md)); every number stands beside the command that
made its JSON. `make results` writes this page from those files."""


def render(results: Path, figures: Path, sections: Sequence[str] = SECTIONS) -> str:
    """The whole page; plots go to `figures`. Raises MissingMeasurement where a section's JSON is not there."""
    modules = [import_module(name) for name in sections]
    commands: dict[str, str] = {}
    for module in modules:
        commands |= _sources(module)
    lines = []
    for name, command in commands.items():
        lines.append(f"- [{name}](../benchmarks/results/{name}): {origin(read(results, name, command))}")
    measured = ["## What was measured, and where\n\n" + "\n".join(lines)] if lines else []
    return "\n\n".join([HEAD, *measured, *(module.section(results, figures) for module in modules)]) + "\n"


def _sources(module: ModuleType) -> dict[str, str]:
    """What a section reads: JSON -> the command that makes it."""
    if hasattr(module, "SOURCES"):
        return {module.SOURCES[name]: module.COMMANDS[name] for name in module.SOURCES}
    return {module.SOURCE: module.COMMAND} if hasattr(module, "SOURCE") else {}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="gets the lines between its marks")
    args = parser.parse_args(argv)
    args.out.write_text(render(args.results, args.out.parent / "results"))
    print(args.out)
    if "report.equal_cost" in SECTIONS:
        args.readme.write_text(placed(args.readme.read_text(), block(args.results)))
        print(args.readme)


if __name__ == "__main__":
    main()
