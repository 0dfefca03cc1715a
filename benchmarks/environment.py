"""What a measurement has to say about where it was made."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """Commit, machine, versions and command line, for the JSON beside a result.

    `dirty` is whether anything but results differs from the commit.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    described: dict[str, Any] = {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")),
        "command": " ".join(["python", *map(relative, sys.argv)]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_model(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
        described["cuda"] = torch.version.cuda
    return described


def relative(argument: str) -> str:
    """Paths inside the repository as a reader would type them, others by their name alone."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extra = [flag for flag in ("avx512_bf16", "avx512_vnni", "amx_bf16") if flag in flags]
    return f"{names[0] if names else platform.processor()} x {len(names)}, {' '.join(extra)}"
