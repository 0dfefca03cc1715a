"""A video of 256 frames: what it takes to run one, and what the engine estimates for LongVILA-7B.

    python benchmarks/long_video.py [--frames 256] [--json benchmarks/results/long_video.json]
    python benchmarks/long_video.py --estimate-only

The run: a random model in LongVILA's layout with narrow layers and the real number of tokens (448 pixels, 16 x 16
tokens and a newline a frame: 65,792 for 256 frames), on the CPU, through `Engine` and `Session`. Each policy runs in a
process of its own (Linux); its peak over a turn is reported beside what it holds before the clip is opened.
The estimate: the engine's own bookkeeping over the sizes of LongVILA-7B (`planned_memory.py`, `published.py`). Pixels
of a clip wait in host memory and are no part of it; their size stands beside it.
Needs transformers and PyAV (requirements-test.txt).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsevila import Engine, SamplingParams, Sparsity, Video
from sparsevila.engine.engine import parse_bytes

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

POLICIES = {"dense": Sparsity(), "sparse": Sparsity(0.75, 0.90)}


# The estimate -------------------------------------------------------------------------------------------------------


def estimate(num_frames: int, limit: str, *, quantised: bool, sparsity: Sparsity) -> dict[str, Any]:
    """Bytes by the engine's own bookkeeping, and whether `reserve` lets the clip in under `--max-memory LIMIT`."""
    from planned_memory import blank, fits, plan
    from published import model_of

    model = model_of("longvila-7b")
    token_map = model.preprocess(blank("video", num_frames, 4, 4)).token_map
    planned = plan(model, token_map, "video", sparsity, quantised=quantised)
    size = model.config.vision.image_size
    return {
        "scheme": "W4A16 + W8A8" if quantised else "bfloat16",
        "policy": asdict(sparsity),
        **asdict(planned),
        "total_bytes": planned.total_bytes,
        "fits": {limit: fits(model, planned, token_map, parse_bytes(limit))},
        "host_pixel_bytes": num_frames * 3 * size * size,
    }


# The run ------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, *, image_size: int = 448, patch_size: int = 14) -> None:
    """LongVILA's layout and token counts, two narrow layers."""
    from tiny_nvila import VOCAB, Shape, write

    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 1,
        "image_size": image_size, "patch_size": patch_size,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 131072,
        "tie_word_embeddings": False, "rope_theta": 15.3e6,
    }  # fmt: skip
    top = {"image_aspect_ratio": "resize", "num_video_frames": 256, "fps": 2.0}
    write(folder, Shape(vision=vision, projector="mlp_downsample_2x2_fix", text=text, top=top))


def resident_bytes(what: str) -> int:
    """Of this process: `VmRSS` now, `VmHWM` at the highest since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """The highest resident size starts again from the present one."""
    Path("/proc/self/clear_refs").write_text("5")


def run(folder: Path, clip: Path, frames: int, sparsity: Sparsity, tokens: int) -> dict[str, Any]:
    """Two questions about the clip. Bytes by which the process grew while it was opened, and in the first turn."""
    torch.set_num_threads(1)
    with Engine.load(folder, device="cpu", dtype="float32") as engine:
        engine.tokenizer.eos_ids = ()  # every answer has the same length
        engine.warmup()
        before = resident_bytes("VmRSS")
        forget_peak()
        session = engine.session(sparsity=sparsity)
        attached = session.attach(Video(clip, frames=frames))
        opened = resident_bytes("VmHWM")
        forget_peak()
        params = SamplingParams(max_new_tokens=tokens)
        first = session.ask("What happens in the clip?", params=params).stats
        asked = resident_bytes("VmHWM")
        second = session.ask("And at the end?", params=params).stats
        held = {
            "pixels": attached.frames * 3 * engine.model.config.vision.image_size**2,  # type: ignore[attr-defined]
            "features": engine._feature_bytes(),
            "cache": session._cache.bytes_with(),
        }
    assert second.encode_s == 0, "the second turn must not run the tower"
    return {
        "policy": asdict(sparsity),
        "frames": attached.frames,
        "first": asdict(first),
        "second": asdict(second),
        "before_bytes": before,
        "grown_while_opened_bytes": opened - before,
        "grown_in_turn_bytes": asked - before,
        "held_bytes": held,
    }


def run_all(frames: int, tokens: int) -> dict[str, Any]:
    """Every policy in a process of its own, so that peaks do not hide each other."""
    from oracles import write_clip

    found = {}
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place) / "model")
        write_clip(Path(place) / "clip.mp4", frames=frames)
        for name in POLICIES:
            command = [
                sys.executable,
                __file__,
                "--child",
                name,
                place,
                "--frames",
                str(frames),
                "--tokens",
                str(tokens),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(result: dict[str, Any]) -> None:
    for name, found in result.get("run", {}).items():
        first = found["first"]
        print(
            f"{name}: {first['visual_tokens_total']} visual + {first['structural_tokens']} structural tokens, "
            f"{first['visual_tokens_kept']} kept, {first['visual_tokens_active']:.0f} read; encode "
            f"{first['encode_s']:.1f} s, prefill {first['prefill_s']:.1f} s; the process grew by "
            f"{found['grown_while_opened_bytes'] / 1e6:.0f} MB while the clip was opened and by "
            f"{found['grown_in_turn_bytes'] / 1e6:.0f} MB in the turn, which holds "
            f"{sum(found['held_bytes'].values()) / 1e6:.0f} MB: "
            + ", ".join(f"{what} {size / 1e6:.0f}" for what, size in found["held_bytes"].items())
        )
    for found in result["estimate"]:
        parts = ", ".join(f"{part} {found[f'{part}_bytes'] / 1e9:.2f}" for part in ("weight", "feature", "cache"))
        print(
            f"LongVILA-7B, {found['scheme']}, prefill -{found['policy']['prefill']:.0%}: "
            f"{found['total_bytes'] / 1e9:.2f} GB ({parts} and workspace {found['workspace_bytes'] / 1e9:.2f}); "
            f"{', '.join(f'fits {limit}: {fits}' for limit, fits in found['fits'].items())}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="A long video in bounded memory.")
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16, help="generated tokens a turn")
    parser.add_argument("--max-memory", default="24GB", help="the limit that the estimate is asked about")
    parser.add_argument("--estimate-only", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("POLICY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, place = args.child
        found = run(Path(place) / "model", Path(place) / "clip.mp4", args.frames, POLICIES[name], args.tokens)
        print(json.dumps(found))
        return
    from environment import describe

    result: dict[str, Any] = {"environment": describe()}
    if not args.estimate_only:
        result["run"] = run_all(args.frames, args.tokens)
    result["estimate"] = [
        estimate(args.frames, args.max_memory, quantised=quantised, sparsity=policy)
        for quantised in (True, False)
        for policy in POLICIES.values()
    ]
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
