"""A video of 256 frames: what it takes to run one, and what the engine estimates for LongVILA-7B.

    python benchmarks/long_video.py [--frames 256] [--json benchmarks/results/long_video.json]
    python benchmarks/long_video.py --estimate-only

The run: a random model in LongVILA's layout with narrow layers and the real number of tokens (448 pixels, 16 x 16
tokens and a newline a frame: 65,792 for 256 frames), on the CPU, through `Engine` and `Session`. Each policy runs in a
process of its own (Linux); its peak over a turn is reported beside what it holds before the clip is opened.
The estimate: the engine's own bookkeeping (`loaded_bytes`, `Engine.reserve`) over the sizes of LongVILA-7B, on tensors
without memory. Pixels of a clip wait in host memory and are no part of it; their size stands beside it.
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
from sparsevila.engine.config import EngineInfo
from sparsevila.engine.engine import WORKSPACE_BYTES, loaded_bytes, parse_bytes
from sparsevila.engine.sparsity.base import keep_count
from sparsevila.errors import InsufficientMemory
from sparsevila.models.checkpoint import Checkpoint, TensorInfo
from sparsevila.models.interface import Frames, VisualTokens
from sparsevila.models.nvila import Nvila
from sparsevila.quant.linear import LinearLayer
from sparsevila.quant.plan import matrices_of

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

POLICIES = {"dense": Sparsity(), "sparse": Sparsity(0.75, 0.90)}
GROUP = 128
# As published: Efficient-Large-Model/qwen2-7b-longvila-256f over google/siglip-so400m at 448 pixels.
LONGVILA_7B: dict[str, dict[str, Any]] = {
    "": {
        "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama", "hidden_size": 3584, "mm_hidden_size": 1152,
        "image_aspect_ratio": "resize", "num_video_frames": 256, "fps": 2.0, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
    },
    "llm": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 151648, "rope_theta": 15_300_000.0,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "vision_tower": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "image_size": 448, "patch_size": 14,
    },
    "mm_projector": {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample_2x2_fix"},
}  # fmt: skip


# The estimate -------------------------------------------------------------------------------------------------------


def longvila_7b(folder: Path) -> Nvila:
    """The model on `meta`, from configs alone."""
    checkpoint = Checkpoint(folder)
    checkpoint.config = LONGVILA_7B[""]
    (folder / "llm").mkdir()
    (folder / "llm" / "vocab.json").write_text(json.dumps({"\u010a": 198}))
    parts = {}
    for name in ("llm", "vision_tower", "mm_projector"):
        parts[name] = Checkpoint(folder / name)
        parts[name].config = LONGVILA_7B[name]
    checkpoint.folders = parts
    with torch.device("meta"):
        return Nvila.from_checkpoint(checkpoint)


def headers(model: Nvila, *, quantised: bool) -> dict[str, TensorInfo]:
    """What a checkpoint of the model holds: bfloat16; quantised, W4A16 decoder layers and a W8A8 tower."""

    def info(shape: tuple[int, ...], dtype: str) -> TensorInfo:
        return TensorInfo(shape, dtype, Path("model.safetensors"), 0, 0)

    found: dict[str, TensorInfo] = {}
    in_layers = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, LinearLayer)}
    for name, parameter in model.named_parameters():
        if name not in in_layers:
            found[name] = info(tuple(parameter.shape), "BF16")
    for name, _, _, (N, K) in matrices_of(model):
        if quantised and name.startswith("language_model.layers."):
            found[f"{name}.weight_packed"] = info((N, K // 8), "I32")
            found[f"{name}.weight_scale"] = info((N, K // GROUP), "BF16")
        elif quantised and name.startswith("vision_tower.encoder."):
            found[f"{name}.weight"] = info((N, K), "I8")
            found[f"{name}.weight_scale"] = info((N, 1), "BF16")
        else:
            found[f"{name}.weight"] = info((N, K), "BF16")
    return found


def estimate(num_frames: int, limit: str, *, quantised: bool, sparsity: Sparsity) -> dict[str, Any]:
    """Bytes by the engine's own bookkeeping, and whether `reserve` lets the clip in under `--max-memory LIMIT`."""
    with tempfile.TemporaryDirectory() as folder:
        model = longvila_7b(Path(folder))
    weights = loaded_bytes(headers(model, quantised=quantised), torch.bfloat16)
    engine = meta_engine(model, weights, parse_bytes(limit))
    token_map = model.preprocess(blank_clip(num_frames)).token_map
    with torch.device("meta"):
        features = torch.empty(len(token_map), model.config.text.hidden_size, dtype=torch.bfloat16)
    engine._features["clip"] = VisualTokens(features, token_map, None)
    cache = engine.new_cache()
    kept = sum(keep_count(model.tokens_per_frame(), sparsity.prefill) for _ in range(num_frames))
    active = [keep_count(kept, sparsity.decode)] * cache.num_layers if sparsity.decode else []
    text = int(token_map.structural.sum()) + 1024  # newlines, question and answer
    cache_bytes = cache.bytes_with(visual=kept, text=text, active=active)
    feature_bytes = features.numel() * features.element_size()
    try:
        engine.reserve(cache, visual=kept, text=text, active=active)
        fits = True
    except InsufficientMemory:
        fits = False
    size = model.config.vision.image_size
    return {
        "scheme": "W4A16 + W8A8" if quantised else "bfloat16",
        "policy": asdict(sparsity),
        "visual_tokens": token_map.num_visual,
        "structural_tokens": int(token_map.structural.sum()),
        "weight_bytes": weights,
        "feature_bytes": feature_bytes,
        "cache_bytes": cache_bytes,
        "workspace_bytes": WORKSPACE_BYTES,
        "total_bytes": weights + feature_bytes + cache_bytes + WORKSPACE_BYTES,
        "fits": {limit: fits},
        "host_pixel_bytes": num_frames * 3 * size * size,
    }


def meta_engine(model: Nvila, weight_bytes: int, limit: int) -> Engine:
    """An engine whose model has sizes and no memory."""
    model.to(torch.bfloat16)
    context = model.config.text.max_context
    info = EngineInfo("LongVILA-7B", "LlavaLlamaModel", "", "", "meta", 0, weight_bytes, context, 0.0)
    return Engine(model, None, info, max_memory_bytes=limit)  # type: ignore[arg-type]


def blank_clip(num_frames: int) -> Frames:
    import numpy as np

    rgb = np.zeros((num_frames, 4, 4, 3), dtype=np.uint8)
    return Frames("video", rgb, np.arange(num_frames, dtype=float), "<blank>", float(num_frames), "blank")


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
