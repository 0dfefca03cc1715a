"""What the engine's own bookkeeping says of a model that is not here: sizes from configs, tensors without memory.

Counted are the weights as they are loaded, the features of a clip, the cache with its active sets and the workspace.
Pixels of a clip wait in host memory and are no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsevila import Engine, Sparsity
from sparsevila.engine.config import EngineInfo
from sparsevila.engine.engine import WORKSPACE_BYTES, loaded_bytes
from sparsevila.engine.sparsity.base import keep_count
from sparsevila.engine.sparsity.registry import make_method
from sparsevila.errors import InsufficientMemory
from sparsevila.models.checkpoint import TensorInfo
from sparsevila.models.interface import Frames, MediaKind, TokenMap, VisualTokens
from sparsevila.models.llava_next import LlavaNext
from sparsevila.quant.linear import LinearLayer
from sparsevila.quant.plan import matrices_of

GROUP = 128
TEXT = 1024  # tokens of a question and an answer


@dataclass(frozen=True)
class Planned:
    """Bytes of one conversation about one item."""

    visual_tokens: int
    structural_tokens: int
    kept: int
    active: int
    weight_bytes: int
    feature_bytes: int
    cache_bytes: int
    fits_context: bool
    workspace_bytes: int = WORKSPACE_BYTES

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.feature_bytes + self.cache_bytes + self.workspace_bytes


def headers(model: Any, *, quantised: bool) -> dict[str, TensorInfo]:
    """What a checkpoint of the model holds: bfloat16; quantised, W4A16 decoder layers and a W8A8 tower."""

    def info(shape: tuple[int, ...], dtype: str) -> TensorInfo:
        return TensorInfo(shape, dtype, Path("model.safetensors"), 0, 0)

    name_of = {module: name for name, module in model.named_modules()}
    decoder, tower = f"{name_of[model.decoder]}.layers.", f"{name_of[model.tower.blocks]}."
    in_layers = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, LinearLayer)}
    found = {n: info(tuple(p.shape), "BF16") for n, p in model.named_parameters() if n not in in_layers}
    for name, _, _, (N, K) in matrices_of(model):
        if quantised and name.startswith(decoder):
            found[f"{name}.weight_packed"] = info((N, K // 8), "I32")
            found[f"{name}.weight_scale"] = info((N, -(-K // GROUP)), "BF16")
            found[f"{name}.weight_zero_point"] = info((N // 8, -(-K // GROUP)), "I32")
        elif quantised and name.startswith(tower):
            found[f"{name}.weight"] = info((N, K), "I8")
            found[f"{name}.weight_scale"] = info((N, 1), "BF16")
        else:
            found[f"{name}.weight"] = info((N, K), "BF16")
    return found


def blank(kind: MediaKind, num_frames: int, height: int, width: int) -> Frames:
    """A black picture or clip of one frame a second, whose frames share their memory."""
    rgb = np.broadcast_to(np.zeros((1, height, width, 3), dtype=np.uint8), (num_frames, height, width, 3))
    return Frames(kind, rgb, np.arange(num_frames, dtype=float), "<blank>", float(num_frames), f"{kind}{num_frames}")


def plan(model: Any, token_map: TokenMap, kind: MediaKind, sparsity: Sparsity, *, quantised: bool = True) -> Planned:
    """What one item takes under a policy, by `loaded_bytes` and the engine's cache."""
    visual, structural = token_map.num_visual, len(token_map) - token_map.num_visual
    kept = make_method(sparsity).planned_keep(token_map, kind)
    active = keep_count(kept, sparsity.decode) if sparsity.decode else 0
    weights = loaded_bytes(headers(model, quantised=quantised), torch.bfloat16)
    engine = meta_engine(model, weights)
    cache = engine.new_cache()
    width = feature_width(model)
    return Planned(
        visual_tokens=visual,
        structural_tokens=structural,
        kept=kept,
        active=active or kept,
        weight_bytes=weights,
        feature_bytes=len(token_map) * width * 2,
        cache_bytes=cache.bytes_with(
            visual=kept, text=structural + TEXT, active=[active] * cache.num_layers if active else []
        ),
        fits_context=kept + structural + TEXT <= engine.max_context,
    )


def fits(model: Any, planned: Planned, token_map: TokenMap, limit: int) -> bool:
    """Whether `Engine.reserve` lets the item in under a limit of that many bytes."""
    engine = meta_engine(model, planned.weight_bytes, limit)
    with torch.device("meta"):
        features = torch.empty(len(token_map), feature_width(model), dtype=torch.bfloat16)
    engine._features["item"] = VisualTokens(features, token_map, None)
    cache = engine.new_cache()
    sparse = planned.active < planned.kept
    try:
        engine.reserve(
            cache,
            visual=planned.kept,
            text=planned.structural_tokens + TEXT,
            active=[planned.active] * cache.num_layers if sparse else [],
        )
    except InsufficientMemory:
        return False
    return True


def feature_width(model: Any) -> int:
    """Numbers of a cached feature: the tower's where the projector is per token and pruning comes before it."""
    if isinstance(model, LlavaNext):
        return model.config.vision.hidden_size
    return int(model.decoder.config.hidden_size)


def meta_engine(model: Any, weight_bytes: int, limit: int | None = None) -> Engine:
    """An engine whose model has sizes and no memory."""
    model.to(torch.bfloat16)
    info = EngineInfo("", "", "", "", "meta", 0, weight_bytes, model.decoder.config.max_context, 0.0)
    return Engine(model, None, info, max_memory_bytes=limit)  # type: ignore[arg-type]
