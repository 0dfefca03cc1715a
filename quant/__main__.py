"""Quantises a checkpoint: W8A8 vision tower, W4A16 language model.

    python -m sparsevila.quant MODEL --out DIR [--llm w4a16|none] [--vision w8a8|none] [--lm-head int8|none]
        [--group 128] [--calib FILE|FOLDER ...] [--format compressed-tensors|awq]

MODEL is an alias, a folder or hf:USER/REPO that is on this machine. An interrupted run is gone on with by the same
command. Exit codes are those of `chat.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import get_args

from ..engine.calibration_set import CalibrationSample, builtin_samples, read_samples
from ..engine.chat_loop import INTERRUPTED, report_error
from ..engine.engine import parse_bytes
from ..engine.hub import resolve
from ..engine.quantise import GROUP_SIZES, QuantReport, QuantSettings, quantise_checkpoint
from ..engine.quantised_copy import estimate
from ..engine.terminal import Screen, format_bytes
from ..errors import InvalidRequest, SparseVILAError
from ..models.checkpoint import Checkpoint
from .export import OutputFormat

_DEFAULTS = {field.name: field.default for field in fields(QuantSettings)}
_WORST_SHOWN = 3
TERMINATED = 143


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsevila.quant",
        description="Quantise a checkpoint: AWQ for the language model, SmoothQuant for the vision tower.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="alias, folder or hf:USER/REPO, on this machine")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new checkpoint; must not exist")
    parser.add_argument("--llm", choices=["w4a16", "none"], default=_DEFAULTS["llm"])
    parser.add_argument("--vision", choices=["w8a8", "none"], default=None, help="default: w8a8, none for awq")
    parser.add_argument("--lm-head", choices=["int8", "none"], default=_DEFAULTS["lm_head"])
    parser.add_argument("--group", type=int, choices=GROUP_SIZES, default=_DEFAULTS["group_size"])
    parser.add_argument("--format", choices=get_args(OutputFormat), default=_DEFAULTS["form"])
    parser.add_argument(
        "--calib",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="calibrate on these pictures, clips, texts, .jsonl files or folders of them (default: a built-in set)",
    )
    parser.add_argument("--samples", type=int, default=None, metavar="N", help="take the first N samples only")
    parser.add_argument("--round", action="store_true", help="no search: round to the nearest code, for comparison")
    parser.add_argument("--max-memory", metavar="SIZE", help="refuse if the estimate is above it, e.g. 16GiB")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda:0")
    parser.add_argument("--plain", action="store_true", help="nothing is redrawn")
    parser.add_argument("-q", "--quiet", action="store_true", help="errors only")
    return parser


def settings_of(args: argparse.Namespace) -> QuantSettings:
    return QuantSettings(
        llm=args.llm,
        vision=args.vision or ("none" if args.format == "awq" else "w8a8"),
        lm_head=args.lm_head,
        group_size=args.group,
        form=args.format,
        search=not args.round,
    )


def samples_of(args: argparse.Namespace) -> list[CalibrationSample]:
    if args.round and args.calib is None:
        return []
    samples = builtin_samples() if args.calib is None else read_samples(args.calib)
    if args.samples is not None and args.samples < 1:
        raise InvalidRequest(f"--samples: expected at least 1, got {args.samples}")
    return samples[: args.samples]


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code."""
    args = build_parser().parse_args(argv)
    screen = Screen(
        sys.stdout,
        sys.stderr,
        plain=args.plain or os.environ.get("TERM") == "dumb",
        quiet=args.quiet,
        color=not os.environ.get("NO_COLOR"),
    )
    signal.signal(signal.SIGTERM, _leave)
    try:
        report = run(args, screen)
    except SparseVILAError as error:
        report_error(screen, error)
        return error.exit_code
    except KeyboardInterrupt:
        screen.clear_progress()
        screen.note("stopped: the same command goes on from here")
        return INTERRUPTED
    screen.clear_progress()
    for line in lines_of(report):
        screen.note(line)
    return 0


def _leave(_signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def run(args: argparse.Namespace, screen: Screen) -> QuantReport:
    settings, samples = settings_of(args), samples_of(args)
    limit = None if args.max_memory is None else parse_bytes(args.max_memory)
    checkpoint = Checkpoint.open(resolve(args.model).path)
    cost = estimate(checkpoint, settings, num_samples=len(samples))
    cost.check_memory(limit)
    cost.check_disk(args.out)
    screen.note(
        f"{checkpoint.folder}: {format_bytes(cost.source_bytes)} of weights will be about "
        f"{format_bytes(cost.out_bytes)}; needs about {format_bytes(cost.memory_bytes)} of memory; "
        f"{len(samples)} calibration samples"
    )
    return quantise_checkpoint(
        checkpoint.folder, args.out, settings, samples, progress=screen.progress, device=args.device
    )


def lines_of(report: QuantReport) -> list[str]:
    """The report for people: where it is, which blocks are worst, what pruning sees of it."""
    lines = [f"written: {report.out}"]
    measured = sorted(
        ((unit.error.relative, unit.unit) for unit in report.units if unit.error is not None), reverse=True
    )
    if measured:
        worst = ", ".join(f"{name} {error:.1%}" for error, name in measured[:_WORST_SHOWN])
        lines.append(f"error of what a block adds: {worst} are the largest of {len(measured)}")
    if report.saliency is not None:
        found = report.saliency
        kept = ", ".join(
            f"{overlap:.1%} at {float(removed):.0%} pruning" for removed, overlap in found.kept_overlap.items()
        )
        where = "held-out" if found.held_out else "the calibration"
        lines.append(
            f"saliency of the quantised tower on {found.num_media} {where} pictures: rank correlation "
            f"{found.spearman:.3f}, the same tokens kept {kept}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
