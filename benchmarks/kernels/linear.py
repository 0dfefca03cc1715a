"""Linear layers on a CPU: W4A16, W4A8 and W8A8 against bfloat16 and against torch's own int4 op, in one run.

python benchmarks/kernels/linear.py [--threads 1] [--shapes vicuna qwen clip siglip qwenvit] [--rows 1 4 16 64 256]
    [--json OUT]

Every form is checked against float64 on a sample of its outputs first; a wrong one gets no time. Times are the least of
several rounds, all forms in turn; weights are rotated, so that none is found in a cache of less than 64 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevila.kernels.w4a16 import pack_w4a16, unpack_nibbles, w4a16
from sparsevila.kernels.w8a8 import pack_w8a8, w8a8
from sparsevila.quant.scheme import Int4Weight

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environment import describe
from timing import in_turn, read_bandwidth, rotated

Call = Callable[[], object]

# Each layer's name, outputs and inputs.
LANGUAGE = {
    "vicuna": [("o", 4096, 4096), ("qkv", 12288, 4096), ("gate_up", 22016, 4096), ("down", 4096, 11008)],
    "qwen": [("o", 3584, 3584), ("qkv", 4608, 3584), ("gate_up", 37888, 3584), ("down", 3584, 18944)],
}
TOWERS = {
    "clip": [("qkv", 3072, 1024), ("out", 1024, 1024), ("fc1", 4096, 1024), ("fc2", 1024, 4096)],
    "siglip": [("qkv", 3456, 1152), ("out", 1152, 1152), ("fc1", 4304, 1152), ("fc2", 1152, 4304)],
    "qwenvit": [("qkv", 3840, 1280), ("out", 1280, 1280), ("gate", 3420, 1280), ("down", 1280, 3420)],
}
ROWS = (1, 4, 16, 64, 256, 512, 1024, 4096)
GROUP = 128
ROTATED_BYTES = 1 << 26
INT4_MAX_ROWS = 256  # torch's op takes time in proportion to the rows: a second and more beyond
MAX_OPERATIONS = 1.5e11  # per product; what is larger takes minutes and says nothing new
SAMPLE = 64  # outputs that are checked
# Of the largest output: bfloat16 rounding of the weights; the inputs' 8 bits besides; float16 scales rounded to 8 bits.
TOLERANCE = {"bf16": 0.02, "w4a16": 0.02, "int4 op": 0.03, "w4a8": 0.05, "w8a8": 0.04}
FORMS = ("bf16", "w4a16", "int4 op", "w4a8", "w8a8")  # columns
BITS = {"bf16": 16.0, "w4a16": 4 + 24 / GROUP, "int4 op": 4 + 32 / GROUP, "w4a8": 8.0, "w8a8": 8.0}


@dataclass(frozen=True)
class Layer:
    """The forms of one matrix: x -> y, as many times as are needed to rotate; and a sample of its rows in float64."""

    forms: dict[str, list[Callable[[Tensor], Tensor]]]
    rows: Tensor  # (SAMPLE,) indices
    sample: Tensor  # (SAMPLE, K) float64


def language_layer(N: int, K: int, generator: torch.Generator) -> Layer:
    """W4A16 with zero points, groups of 128, and the same widened for W4A8, against the weights in bfloat16."""
    codes = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
    scales = ((torch.rand(N, K // GROUP, generator=generator) + 0.5) * 0.01).half()
    zeros = torch.randint(4, 12, (N, K // GROUP), generator=generator, dtype=torch.uint8)

    def dense(rows: Tensor, dtype: torch.dtype) -> Tensor:
        by_group = unpack_nibbles(codes[rows], K).to(dtype).view(len(rows), -1, GROUP)
        return ((by_group - zeros[rows, :, None].to(dtype)) * scales[rows, :, None].to(dtype)).flatten(1)

    qweight, by_group, zero_points, layout = pack_w4a16(codes, scales, zeros, K, GROUP)
    weight = torch.cat([dense(part, torch.float32).bfloat16() for part in torch.arange(N).split(1024)])

    # The op has one scale and one shift a group, in bfloat16: (code - 8) * scale + shift.
    shift = (8 - zeros.float()) * scales.float()
    scale_shift = torch.stack((scales.float(), shift), dim=2).transpose(0, 1).contiguous().bfloat16()
    parts = [unpack_nibbles(part, K).int() for part in codes.split(1024)]  # whole blocks of the op's rows
    theirs = torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1) for part in parts])

    def packed(qweight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: w4a16(x, qweight, by_group, zero_points, layout)

    def bare(qweight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, qweight, GROUP, scale_shift)

    rows = sampled(N)
    ours, op = ([form(q) for q in copies(q)] for form, q in ((packed, qweight), (bare, theirs)))
    forms = {"bf16": plain(weight), "w4a16": ours, "int4 op": op}
    wide = Int4Weight(codes, scales, zeros, K, GROUP).to_int8()
    forms["w4a8"] = [int8(c, wide.scales, None) for c in copies(wide.codes)]
    return Layer(forms, rows, dense(rows, torch.float64))


def tower_layer(N: int, K: int, generator: torch.Generator) -> Layer:
    """W8A8 with a bias, quantisation of the inputs included, against the same weights in bfloat16."""
    codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    scales = (torch.rand(N, generator=generator) + 0.5) * 1e-3
    bias = torch.zeros(N, dtype=torch.bfloat16)
    rows = sampled(N)
    forms = {
        "bf16": plain((codes.float() * scales[:, None]).bfloat16(), bias),
        "w8a8": [int8(c, scales, bias) for c in copies(codes)],
    }
    return Layer(forms, rows, codes[rows].double() * scales[rows, None].double())


def int8(codes: Tensor, scales: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = pack_w8a8(codes)
    return lambda x: w8a8(x, packed, scales, bias)


def plain(weight: Tensor, bias: Tensor | None = None) -> list[Callable[[Tensor], Tensor]]:
    def one(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear(x, weight, bias)

    return [one(w) for w in copies(weight)]


def copies(weight: Tensor) -> list[Tensor]:
    count = max(2, -(-ROTATED_BYTES // (weight.numel() * weight.element_size())))
    return [weight, *(weight.clone() for _ in range(count - 1))]


def sampled(N: int) -> Tensor:
    return torch.linspace(0, N - 1, SAMPLE).long()


def measure(layer: Layer, x: Tensor, weights: int, bandwidth: float, seconds: float) -> dict[str, Any]:
    """Checks, then times. `weights` is their number, for the bytes that are read."""
    want = x.double() @ layer.sample.t()
    row: dict[str, Any] = {}
    calls: dict[str, Call] = {}
    for name, forms in layer.forms.items():
        if name == "int4 op" and x.shape[0] > INT4_MAX_ROWS:
            row[name] = "skipped"
            continue
        error = float((forms[-1](x)[:, layer.rows].double() - want).abs().max() / want.abs().max())
        if not error <= TOLERANCE[name]:
            raise SystemExit(f"{name}: relative error {error:.3f}: no time is printed")
        calls[name] = rotated([bound(form, x) for form in forms])
    for name, found in in_turn(calls, seconds).items():
        read = weights * BITS[name] / 8 / found["min"] / 1e6  # GB/s
        row[name] = {"ms": found["min"], "median_ms": found["median"], "read_fraction": read / bandwidth}
    for name in calls:
        row[name]["over_bf16"] = row["bf16"]["ms"] / row[name]["ms"]
    return row


def bound(form: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    return lambda: form(x)


def line(name: str, rows: int, row: dict[str, Any]) -> str:
    text = f"{name:<16} {rows:>5}"
    for form in FORMS:
        found = row.get(form)
        if isinstance(found, dict):
            text += f" {found['ms']:>9.3f} {found['over_bf16']:>6.2f}x {found['read_fraction']:>5.0%}"
        else:
            text += f" {found or '-':>9} {'':>7} {'':>5}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", choices=[*LANGUAGE, *TOWERS], default=[*LANGUAGE, *TOWERS])
    parser.add_argument("--layers", nargs="+", help="of each family, e.g. o down; all if left out")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=0.3, help="at least, for the rounds of one line")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth:.1f} GB/s, {args.threads} thread(s); ms, times as fast as bf16, fraction of it")
    print(f"{'layer':<16} {'rows':>5} {'bf16':>9}" + "".join(f"{'':>13} {name:>9}" for name in FORMS[1:]))
    measured: list[dict[str, Any]] = []
    for family in args.shapes:
        for part, N, K in (LANGUAGE | TOWERS)[family]:
            if args.layers and part not in args.layers:
                continue
            layer = (language_layer if family in LANGUAGE else tower_layer)(N, K, generator)
            for rows in args.rows:
                name = f"{family} {part}"
                if 2.0 * rows * N * K > MAX_OPERATIONS:
                    print(f"{name:<16} {rows:>5}   skipped: more than {MAX_OPERATIONS:.1e} operations", flush=True)
                    continue
                x = torch.randn(rows, K, generator=generator).bfloat16()
                row = measure(layer, x, N * K, bandwidth, args.seconds)
                print(line(name, rows, row), flush=True)
                measured.append({"family": family, "layer": part, "N": N, "K": K, "rows": rows, **row})
    if args.json:
        found = {"environment": describe(), "load": os.getloadavg(), "read_gb_per_s": bandwidth, "rows": measured}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
