"""The facts a bug report needs: versions, processor, memory, devices, codecs, weights."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "torch",
    "triton",
    "llvmlite",
    "numpy",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "pillow",
    "av",
    "huggingface_hub",
    "prompt_toolkit",
)
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve")


def report(version: str) -> Iterator[tuple[str, str]]:
    """Rows of (what, value), cheap ones first; `version` is the engine's own."""
    yield "sparsevila", version
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield from ((name, _version_of(name)) for name in PACKAGES)
    yield "cpu", _cpu()
    yield "memory", _memory()
    yield from _torch_rows()
    yield "codecs", _codecs()
    yield from _weights()


def _version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()}, {os.cpu_count()} cores"
    words = set(text.split())
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {' '.join(f for f in CPU_FLAGS if f in words) or 'no vector flags'}"


def _memory() -> str:
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        total, free = (int(rows[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return "unknown"
    return f"{total:.1f} GiB, {free:.1f} GiB available"


def _torch_rows() -> Iterator[tuple[str, str]]:
    import torch

    from ..kernels.backend import cpu_level

    yield "cpu kernels", cpu_level() or "none, torch's operations"
    yield "torch cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "gpu", "none that this torch can use"
        return
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        yield f"gpu {i}", f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.1f} GiB"


def _codecs() -> str:
    try:
        import av.codec
    except ImportError:
        return "PyAV is not installed: no video"
    # FFmpeg lists a decoder by its library for some codecs, e.g. libdav1d for av1.
    known = av.codec.codecs_available
    return " ".join(c for c in CODECS if c in known or (c == "av1" and "libdav1d" in known)) or "none"


def _weights() -> Iterator[tuple[str, str]]:
    from . import hub

    for row in hub.list_models():
        yield row.alias, str(row.found) if row.found else "not here"
