"""Our 4-bit language model, dense and sparse, beside llama.cpp's Q4_0 on the same sizes, in one run on a CPU.

    npm install --ignore-scripts --prefix PEER node-llama-cpp@3.22.1
    python -m venv PEER/venv && PEER/venv/bin/pip install gguf
    python benchmarks/peers/llama_cpp.py --peer PEER --work FOLDER [--layers 4] [--threads 2] [--json OUT]

A LLaVA-NeXT of Vicuna-7B's widths with fewer layers, random weights on both sides, one square picture (2,928 visual
tokens) and a question. llama.cpp gets as many text tokens as our prompt has positions: its own image path is not
measured, so our encoder stands in a row of its own and is in no total that is compared. Both decode a fixed number of
tokens. Rounds take turns; medians. llama.cpp runs with and without its flash attention. Q4_0 has 4.5 bits a weight and
a 4-bit output matrix, ours 4.3 bits and an 8-bit output matrix. W4A8 is the same checkpoint with `--w4a8`: 8 bits a
weight in memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from sparsevila import Engine, Image, SamplingParams, Sparsity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environment import describe
from random_checkpoint import preset, write_random_quantised

SIDE = 672  # pixels: two tiles by two and the base view
QUESTION = "What happens in this picture, from the beginning to the end?"
TOKENS = (64, 256)
POLICIES = {"dense": Sparsity(), "sparse 60/75": Sparsity(0.60, 0.75), "sparse 75/90": Sparsity(0.75, 0.90)}
SCHEMES = {"W4A16": False, "W4A8": True}
OURS = {f"{scheme} {policy}": (scheme, policy) for scheme in SCHEMES for policy in POLICIES}

PEERS = {"llama.cpp Q4_0": False, "llama.cpp Q4_0 flash": True}


def our_round(engine: Engine, policy: Sparsity) -> dict[str, float]:
    """Milliseconds of each stage, and of the tokens behind the first one, of one answer."""
    row: dict[str, float] = {}
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    engine.forget_features()
    session = engine.session(media=[Image(pixels)], sparsity=policy)
    first, count, stats = 0.0, 0, None
    for chunk in session.stream(QUESTION, params=SamplingParams(max_new_tokens=max(TOKENS))):
        now = time.perf_counter()
        count += chunk.token_id is not None
        first = now if count == 1 and not first else first
        if chunk.token_id is not None and count in TOKENS:
            row[f"decode {count}"] = (now - first) * 1e3
        stats = chunk.stats
    session.close()
    assert stats is not None
    assert count == max(TOKENS), f"expected {max(TOKENS)} tokens, got {count}"
    row["encode"], row["prefill"] = stats.encode_s * 1e3, (stats.prefill_s + stats.retrieval_s) * 1e3
    row["visual"], row["prompt"] = stats.visual_tokens_total, stats.prompt_tokens
    return row


def write_their_model(peer: Path, path: Path, shape: dict[str, Any]) -> None:
    sizes = path.with_suffix(".json")
    sizes.write_text(json.dumps(shape))
    script = Path(__file__).with_name("llama_cpp_model.py")
    subprocess.run([str(peer / "venv" / "bin" / "python"), str(script), str(path), str(sizes)], check=True)


def their_round(peer: Path, path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    sizes = path.with_suffix(".json")
    sizes.write_text(json.dumps(shape))
    script = Path(__file__).with_name("llama_cpp_rows.mjs")
    command = ["node", str(script), str(peer), str(path), str(sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(row[key] for row in rounds) for key in rounds[0]}


def totals(row: dict[str, float]) -> dict[str, float]:
    return {f"total {tokens}": row["prefill"] + row[f"decode {tokens}"] for tokens in TOKENS}


def print_table(rows: dict[str, dict[str, float]]) -> None:
    columns = ["prefill", *(f"{what} {tokens}" for tokens in TOKENS for what in ("decode", "total"))]
    print(f"{'ms':>22} {'encode':>9} " + " ".join(f"{c:>11}" for c in columns))
    for name, row in rows.items():
        encode = f"{row['encode']:.0f}" if "encode" in row else "-"
        print(f"{name:>22} {encode:>9} " + " ".join(f"{row[c]:>11.0f}" for c in columns))
    for peer in PEERS:
        for name in OURS:
            gains = ", ".join(f"{c} {rows[peer][c] / rows[name][c]:.2f}x" for c in columns)
            print(f"{peer} over {name}: {gains}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Our language model beside llama.cpp's, in one run on a CPU.")
    parser.add_argument("--peer", type=Path, required=True, help="folder with node-llama-cpp, and gguf in venv")
    parser.add_argument("--work", type=Path, required=True, help="a folder for both models; kept")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512, help="tokens that llama.cpp takes at a time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    shape = replace(preset(f"vicuna-7b-{args.layers}-layers"), max_positions=4096)
    folder = args.work / f"vicuna-7b-{args.layers}-layers-int8-head"
    if not folder.exists():
        write_random_quantised(folder, shape, head=True)
    theirs = {
        "hidden": shape.text_hidden, "ffn": shape.text_ffn, "layers": shape.text_layers, "heads": shape.text_heads,
        "kv_heads": shape.text_kv_heads, "vocab": shape.vocab_size, "context": 4096, "batch": args.batch,
        "threads": args.threads, "tokens": TOKENS, "rounds": 1,
    }  # fmt: skip
    path = args.work / f"q4_0-{shape.text_layers}.gguf"
    if not path.exists():
        write_their_model(args.peer, path, theirs)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in (*OURS, *PEERS)}
    with ExitStack() as stack:
        engines = {}
        for scheme, w4a8 in SCHEMES.items():
            engine = stack.enter_context(Engine.load(folder, device="cpu", dtype="bfloat16", w4a8=w4a8))
            engine.tokenizer.eos_ids = ()
            engine.warmup()
            engines[scheme] = engine
        for _ in range(args.rounds):
            for name, (scheme, policy) in OURS.items():
                rounds[name].append(our_round(engines[scheme], POLICIES[policy]))
            theirs["prompt"] = int(rounds["W4A16 dense"][0]["prompt"])
            for name, flash in PEERS.items():
                found = their_round(args.peer, path, theirs | {"flash": flash})
                rounds[name] += found["rounds"]
        scheme = engines["W4A16"].info.scheme
    rows = {name: (row := medians(each)) | totals(row) for name, each in rounds.items()}
    dense = rows["W4A16 dense"]
    print(
        f"{args.layers} layers of Vicuna-7B's widths, {scheme}, {int(dense['visual'])} visual tokens, "
        f"prompt {int(dense['prompt'])}, {args.threads} threads, median of {args.rounds}; {found['version']}"
    )
    print_table(rows)
    if args.json:
        peer = {"peer": found["version"], "kernels": found["kernels"], "sizes": theirs}
        result = {"environment": describe(), "scheme": scheme, **peer, "rows": rows, "rounds": rounds}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
