"""Decode attention on a CPU: the grouped form over two segments against torch's SDPA, in one run.

python benchmarks/kernels/decode_attention.py [--threads 1] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from sparsevila.kernels.decode_attention import decode_attention, decode_attention_ref

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environment import describe
from timing import milliseconds

# query heads, key heads, keys of segment a, keys of segment b, head dimension
SHAPES = [(28, 4, 16128, 256, 128), (28, 4, 1613, 256, 128), (32, 32, 2880, 128, 128), (32, 8, 2880, 128, 128)]
ROUNDS = 7
ROOM = 256


def measure(H: int, H_kv: int, A: int, B: int, D: int) -> dict[str, float]:
    """Checks first; then both forms in turn, the least of several rounds each."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    def store(keys: int) -> torch.Tensor:
        return random(H_kv, keys + ROOM, D)[:, :keys]  # as in the cache: room to grow behind every head

    q = random(H, D)
    a, b = (store(A), store(A)), (store(B), store(B))
    k, v = (torch.cat(pair, dim=1)[None] for pair in zip(a, b, strict=True))

    def grouped() -> torch.Tensor:
        return decode_attention(q, a, b)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q[None, :, None], k, v, enable_gqa=True)

    want = decode_attention_ref(q, a, b)
    for result in (grouped(), sdpa()[0, :, 0]):
        error = float((result.double() - want).abs().max() / want.abs().max())
        if error > 0.03:
            raise SystemExit(f"wrong result, relative error {error:.3f}: no time is printed")
    best = {"grouped": float("inf"), "sdpa": float("inf")}
    for _ in range(ROUNDS):
        best["grouped"] = min(best["grouped"], milliseconds(grouped, 3))
        best["sdpa"] = min(best["sdpa"], milliseconds(sdpa, 1))
    read = 2 * H_kv * (A + B) * D * 2
    return {**best, "ratio": best["sdpa"] / best["grouped"], "gb_per_s": read / best["grouped"] / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    print(f"{'heads':>7} {'keys':>12} {'grouped ms':>11} {'SDPA ms':>9} {'SDPA/grouped':>13} {'GB/s':>6}")
    for H, H_kv, A, B, D in SHAPES:
        row = measure(H, H_kv, A, B, D)
        rows.append({"heads": H, "kv_heads": H_kv, "keys_a": A, "keys_b": B, "head_dim": D, **row})
        keys = f"{A}+{B}"
        print(
            f"{H:>4}/{H_kv:<2} {keys:>12} {row['grouped']:>11.2f} {row['sdpa']:>9.2f} {row['ratio']:>12.1f}x "
            f"{row['gb_per_s']:>6.1f}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"environment": describe(), "dtype": "bfloat16", "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
