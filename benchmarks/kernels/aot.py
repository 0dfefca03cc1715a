"""Compiles every Triton kernel in the configurations that published models lead to, for several GPUs, without one.

    python benchmarks/kernels/aot.py [--arch 80 86 87 89 90 100 120] [--only column_sums ...] [--dtypes fp16 bf16]
        [--processes 2] [--out docs/kernels-aot.md] [--json OUT]

Prints shared memory, registers and spilled bytes of each kernel, and how many instructions its main loop has per weight
or score. Fails where shared memory is above what the architecture grants a block, or where more bytes are spilled than
the budget. Instructions are counted in the machine code, in the loop with the most tensor instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsevila.kernels.gpu.variant import Variant

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environment import describe

MODULES = (
    "column_sums", "decode_attention", "extend_attention", "gather", "int4_linear", "int8_linear", "quantize_rows",
    "rms_norm", "rope_append", "silu_mul", "top_k",
)  # fmt: skip
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)
# Bytes of shared memory that a block may have (CUDA C programming guide, table of compute capabilities).
SHARED = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Bytes a thread may spill, by kernel and architecture: none elsewhere. On sm_120 the compiler needs more registers for
# the widest tiles; which tile is better there is for a measurement to say.
SPILL_BUDGET = {("extend_attention", 120): 80, ("int8_linear", 120): 8}
# Instructions a weight may take in the main loop, by the beginning of a kernel's name: beyond, the device issues
# instructions slower than memory brings weights (sm_86 and sm_90; the others have more slots or another pipe).
INSTRUCTION_LIMITS = {"int4_linear g=128 tokens=16 ": 4.0, "int4_linear lop3 g=128 tokens=16 ": 2.6}
LIMITED = (86, 90)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one kernel takes."""

    name: str
    arch: int
    shared: int  # bytes a block
    registers: int  # a thread
    spilled: int  # bytes a thread
    loop_instructions: int  # of the loop with the most tensor instructions, 0 without one
    loop_tensor_instructions: int
    per_entry: float | None  # instructions a lane executes for each weight or score, where the kernel says its tile


def variants(only: list[str] | None, dtypes: list[str]) -> Iterator[tuple[str, Variant]]:
    for module in only or MODULES:
        for variant in import_module(f"sparsevila.kernels.gpu.{module}").variants():
            if variant.name.split()[-1] in dtypes:
                yield module, variant


def compile_one(module: str, name: str, arch: int) -> Compiled:
    """One kernel for one architecture; the variant is found by its name, because compiled functions do not travel."""
    variant = next(v for v in import_module(f"sparsevila.kernels.gpu.{module}").variants() if v.name == name)
    names = variant.kernel.arg_names
    place = {argument: (names.index(argument),) for argument in names}
    source = ASTSource(
        fn=variant.kernel,
        signature={argument: variant.types.get(argument, "constexpr") for argument in names},
        constexprs={place[argument]: value for argument, value in variant.constants.items()},
        attrs={place[argument]: [["tt.divisibility", 16]] for argument in variant.aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(found.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _tool("nvdisasm", "-c", str(cubin))
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    instructions, tensor = main_loop(code)
    entries = variant.entries
    per_entry = None if entries is None or not tensor else instructions * 32 * variant.warps / entries
    return Compiled(name, arch, found.metadata.shared, registers, stack, instructions, tensor, per_entry)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def main_loop(code: str) -> tuple[int, int]:
    """(instructions, tensor instructions) of the innermost loop that has the most of the latter."""
    lines = [line.strip() for line in code.splitlines()]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    best = (0, 0)
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)
        if branch is None or labels.get(branch[1], i) >= i:
            continue
        body = [each for each in lines[labels[branch[1]] : i + 1] if re.match(r"/\*[0-9a-f]+\*/", each)]
        tensor = sum(bool(re.search(r"\b(HMMA|IMMA|HGMMA|IGMMA|UTC\w*MMA)\b", each)) for each in body)
        if tensor and (tensor > best[1] or (tensor == best[1] and len(body) < best[0])):
            best = (len(body), tensor)
    return best


def table(rows: list[Compiled]) -> str:
    text = [
        "| kernel | sm | shared, bytes | registers | spilled | instructions per entry |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        entry = "" if row.per_entry is None else f"{row.per_entry:.2f}"
        text.append(f"| {row.name} | {row.arch} | {row.shared} | {row.registers} | {row.spilled} | {entry} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile all kernels ahead of time; check what they take.")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", choices=MODULES)
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "bf16", "fp32"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the table as Markdown")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = [(module, variant.name, arch) for module, variant in variants(args.only, args.dtypes) for arch in args.arch]
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(compile_one, *zip(*work, strict=True)))
    print(table(rows))
    if args.out:
        command = describe()["command"]
        args.out.write_text(f"# What the kernels take\n\n`{command}` (Triton {triton.__version__})\n\n{table(rows)}\n")
    if args.json:
        found = {"environment": describe(), "triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    broken = [(row, said) for row in rows for said in over_budget(row)]
    for row, said in broken:
        print(f"over budget: {row.name} on sm_{row.arch}: {said}")
    if broken:
        raise SystemExit(1)


def over_budget(row: Compiled) -> Iterator[str]:
    """What of a kernel is above its limits."""
    if row.shared > SHARED[row.arch]:
        yield f"{row.shared} bytes of shared memory, at most {SHARED[row.arch]}"
    spills = SPILL_BUDGET.get((row.name.split()[0], row.arch), 0)
    if row.spilled > spills:
        yield f"{row.spilled} bytes spilled, at most {spills}"
    for beginning, limit in INSTRUCTION_LIMITS.items():
        if row.arch in LIMITED and row.name.startswith(beginning) and not (row.per_entry or limit + 1) <= limit:
            yield f"{row.per_entry} instructions a weight, at most {limit}"


if __name__ == "__main__":
    main()
