"""Prefill sparsity alone, decode sparsity alone and both at the widths of a 7B model: times of random weights."""

from __future__ import annotations

from pathlib import Path

from report.decoupling import STAGES, gains
from report.markdown import table
from report.measured import Row, command_of, read

# name -> (prefill, decode): prefill alone is set to take about as long as both.
POLICIES = {"both": (0.6, 0.75), "prefill": (0.63, 0.0), "decode": (0.0, 0.9)}
SOURCES = {name: f"latency_7b_{name}.json" for name in POLICIES}
COMMANDS = {
    name: "python benchmarks/latency.py --random vicuna-7b-4-layers --llm w4a16 --video assets/clips/street.mp4 "
    f"--frames 16 --tokens 64 --rounds 3 --threads 2 --prefill-sparsity {prefill} --decode-sparsity {decode} "
    f"--json benchmarks/results/{SOURCES[name]}"
    for name, (prefill, decode) in POLICIES.items()
}


def section(results: Path, figures: Path) -> str:
    found = {name: read(results, SOURCES[name], COMMANDS[name]) for name in POLICIES}
    rows = [_line("dense", found["both"]["dense"], found["both"]["dense"])]
    rows += [_line(_named(data), data["dense"], data["sparse"]) for data in found.values()]
    both = found["both"]
    lead = (
        f"{both['model']} with {both['scheme']} and random weights, {both['dense']['visual_total']} visual tokens, "
        f"{both['tokens']} generated tokens; milliseconds. Its answers are noise, its times are those of the shape. "
        "Each row is measured in turn with a dense run of its own, which its gains are against."
    )
    head = (
        "removed in prefill/decode", "encode", "prefill", "retrieval", "decode", "end to end", "gain of prefill",
        "of decode", "end to end",
    )  # fmt: skip
    commands = "\n".join(command_of(data) for data in found.values())
    return f"## The same at a 7B model's widths, four layers\n\n{lead}\n\n{table(head, rows)}\n\n{commands}"


def _named(data: Row) -> str:
    policy = data["policies"]["sparse"]
    return f"{policy['prefill']:.0%} / {policy['decode']:.0%}"


def _line(name: str, dense: Row, sparse: Row) -> tuple[str, ...]:
    own, other = ({**run, "total": sum(run[stage] for stage in STAGES)} for run in (dense, sparse))
    gained = gains(own, other)
    times = [f"{other[stage]:,.0f}" for stage in (*STAGES, "total")]
    return (name, *times, *(f"{gain:.2f}x" for gain in gained.values()))
