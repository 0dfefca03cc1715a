"""Dense against sparse, end to end, in one run of one build.

    python benchmarks/latency.py --model PATH --video clip.mp4 [--frames N] [--tokens 64] [--json OUT]
    python benchmarks/latency.py --random 0.5b --video clip.mp4 --frames 64 [--llm w4a16] [--vision w8a8]

`--random PRESET` builds a randomly initialised checkpoint of that shape first (see random_checkpoint.py): its answers
are noise, its speed is that of the shape. Each policy decodes exactly `--tokens` tokens (no end token stops it).
Policies take turns; every figure is the median over the rounds. Dense is the same engine without sparsity.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from sparsevila import Engine, Image, SamplingParams, Sparsity, Video

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environment import describe, relative
from random_checkpoint import preset, write

STAGES = ("encode", "prefill", "retrieval", "decode")
QUESTIONS = ("What happens in this picture, from the beginning to the end?", "Which things are on the left side?")
TOLERANCE = 1.03  # by which an end-to-end gain may leave the range of its parts before the report is refused


@dataclass(frozen=True)
class Run:
    """One turn of one policy; times in milliseconds."""

    encode: float
    prefill: float
    retrieval: float
    decode: float  # all steps after the first token
    second_turn_ttft: float
    visual_total: int
    visual_kept: int
    visual_active: float
    kv_read_bytes: int  # per decode step

    @property
    def total(self) -> float:
        return self.encode + self.prefill + self.retrieval + self.decode


def run_once(engine: Engine, item: Image | Video, sparsity: Sparsity, tokens: int) -> Run:
    """A first question, whose stages are reported, and a second one for its time to first token."""
    engine.forget_features()
    session = engine.session(media=[item], sparsity=sparsity)
    params = SamplingParams(max_new_tokens=tokens)
    first = session.ask(QUESTIONS[0], params=params, remember=False).stats
    second = session.ask(QUESTIONS[1], params=SamplingParams(max_new_tokens=2), remember=False).stats
    assert first.output_tokens == tokens, f"expected {tokens} tokens, got {first.output_tokens}"
    session.close()
    return Run(
        encode=first.encode_s * 1e3,
        prefill=first.prefill_s * 1e3,
        retrieval=first.retrieval_s * 1e3,
        decode=first.decode_s * 1e3,
        second_turn_ttft=second.ttft_s * 1e3,
        visual_total=first.visual_tokens_total,
        visual_kept=first.visual_tokens_kept,
        visual_active=first.visual_tokens_active,
        kv_read_bytes=first.kv_read_bytes,
    )


def medians(runs: list[Run]) -> Run:
    values = {name: median(asdict(run)[name] for run in runs) for name in asdict(runs[0])}
    return Run(**values)


def report(dense: Run, sparse: Run, tokens: int) -> dict[str, float]:
    """Prints the table; returns the gains. Refuses an end-to-end gain that its parts cannot explain."""
    gains = {
        "encode+prefill": (dense.encode + dense.prefill) / (sparse.encode + sparse.prefill),
        "retrieval+decode": dense.decode / (sparse.retrieval + sparse.decode),
        "end to end": dense.total / sparse.total,
    }
    print(f"{'':>22} {'dense ms':>10} {'share':>6} {'sparse ms':>10} {'share':>6} {'gain':>7}")

    def line(name: str, a: float, b: float) -> None:
        gain = f"{a / b:6.2f}x" if a and b else ""
        print(f"{name:>22} {a:>10.1f} {a / dense.total:>6.0%} {b:>10.1f} {b / sparse.total:>6.0%} {gain:>7}")

    for stage in STAGES:
        line("retrieval+compaction" if stage == "retrieval" else stage, getattr(dense, stage), getattr(sparse, stage))
    line(f"end to end, {tokens} tok", dense.total, sparse.total)
    steps = tokens - 1
    print(f"{'per decoded token':>22} {dense.decode / steps:>10.2f} {'':>6} {sparse.decode / steps:>10.2f}")
    megabytes = dense.kv_read_bytes / 1e6, sparse.kv_read_bytes / 1e6
    print(f"{'cache read, MB/token':>22} {megabytes[0]:>10.1f} {'':>6} {megabytes[1]:>10.1f}")
    print(f"{'second turn, ttft':>22} {dense.second_turn_ttft:>10.1f} {'':>6} {sparse.second_turn_ttft:>10.1f}")
    print(
        f"visual tokens: {sparse.visual_total} > {sparse.visual_kept} kept > {sparse.visual_active:.0f} active "
        f"(dense: {dense.visual_kept})"
    )
    low, high = sorted([gains["encode+prefill"], gains["retrieval+decode"]])
    whole = gains["end to end"]
    if not low / TOLERANCE <= whole <= high * TOLERANCE:
        raise SystemExit(f"end-to-end gain {whole:.2f} is not between {low:.2f} and {high:.2f}: a stage is missing")
    print("gains:", ", ".join(f"{name} {gain:.2f}x" for name, gain in gains.items()))
    return gains


def main() -> None:
    parser = argparse.ArgumentParser(description="Dense against sparse latency, end to end.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder, alias or hf:USER/REPO")
    source.add_argument("--random", metavar="PRESET", help="tiny, 0.5b, vicuna-7b-N-layers")
    parser.add_argument("--llm", default="none", choices=["w4a16", "none"], help="precision of --random's decoder")
    parser.add_argument("--vision", default="none", choices=["w8a8", "none"], help="precision of --random's tower")
    item = parser.add_mutually_exclusive_group(required=True)
    item.add_argument("--image", type=Path)
    item.add_argument("--video", type=Path)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens, the same for both")
    parser.add_argument("--prefill-sparsity", type=float, default=0.60)
    parser.add_argument("--decode-sparsity", type=float, default=0.75)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--w4a8", action="store_true", help="8-bit products in 4-bit layers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error("--tokens: at least 2, so that there is a decode step to time")
    if args.threads:
        torch.set_num_threads(args.threads)
    media = Image(args.image) if args.image else Video(args.video, frames=args.frames)
    policies = {"dense": Sparsity(), "sparse": Sparsity(args.prefill_sparsity, args.decode_sparsity)}
    with ExitStack() as stack:
        folder = args.model
        if args.random:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
            write(folder, preset(args.random), llm=args.llm, vision=args.vision)
        engine = stack.enter_context(Engine.load(folder, device=args.device, dtype=args.dtype, w4a8=args.w4a8))
        engine.tokenizer.eos_ids = ()  # every answer has the same length
        engine.warmup()
        runs: dict[str, list[Run]] = {name: [] for name in policies}
        for _ in range(args.rounds):
            for name, policy in policies.items():
                runs[name].append(run_once(engine, media, policy, args.tokens))
        info = engine.info
    dense, sparse = medians(runs["dense"]), medians(runs["sparse"])
    what = args.random or relative(args.model)
    print(
        f"{what}: {info.parameters / 1e9:.2f} B parameters, {info.scheme}, {info.device}, "
        f"{torch.get_num_threads()} threads; prefill -{args.prefill_sparsity:.0%}, decode -{args.decode_sparsity:.0%}; "
        f"median of {args.rounds}"
    )
    gains = report(dense, sparse, args.tokens)
    if args.json:
        result = {
            "environment": describe(),
            "model": what,
            "scheme": info.scheme,
            "tokens": args.tokens,
            "policies": {name: asdict(policy) for name, policy in policies.items()},
            "dense": asdict(dense),
            "sparse": asdict(sparse),
            "gains": gains,
            "rounds": {name: [asdict(run) for run in rs] for name, rs in runs.items()},
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
