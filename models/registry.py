"""Architecture string of a config.json -> the class that computes it. One literal table, imported on demand."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..errors import CorruptCheckpoint, InvalidRequest, UnsupportedModel
from ..quant.plan import QuantPlan
from ..quant.quantization_config import QuantizationConfig, parse_quantization_config
from .checkpoint import Checkpoint
from .interface import ProgressFn, VisionLanguageModel, no_progress
from .positions import ContiguousPositions
from .weights import load_weights

# "file:Class" in this folder.
ARCHITECTURES = {
    "LlavaNextForConditionalGeneration": "llava_next:LlavaNext",
    "LlavaNextVideoForConditionalGeneration": "llava_next:LlavaNext",
    "Qwen2VLForConditionalGeneration": "qwen2_vl:Qwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_vl:Qwen2VL",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision:LlavaOnevision",
    "LlavaLlamaModel": "nvila:Nvila",
}

# NVILA and VILA once more under another key map (repositories ending in -hf): known by name, not read.
_REPACKED_TYPES = ("vila", "nvila", "nvila_lite")

_TIED_HEAD = "language_model.lm_head.weight"
_EMBEDDING = "language_model.embed_tokens.weight"


def build_model(checkpoint: Checkpoint, *, positions: str | None = None) -> VisionLanguageModel:
    """The checkpoint's model on `meta`, every layer dense.

    `positions` chooses how survivors of pruning are placed where the model has a choice (`models/qwen2_vl.py`); None:
    the model's own way. Raises UnsupportedModel, CorruptCheckpoint, or InvalidRequest for `positions`.
    """
    names = checkpoint.config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CorruptCheckpoint(f"config.json: architectures: expected one name, got {names!r:.100}")
    if (kind := checkpoint.config.get("model_type")) in _REPACKED_TYPES:
        raise UnsupportedModel(
            f"model_type {kind!r} ({names[0]!r:.100}) is a repackaged VILA, whose tensor names are not read here",
            hint="take the repository without -hf, which has the folders llm, vision_tower and mm_projector",
        )
    target = ARCHITECTURES.get(names[0])
    if target is None:
        raise UnsupportedModel(
            f"architecture {names[0]!r:.100} is not supported", hint=f"supported: {', '.join(ARCHITECTURES)}"
        )
    file, _, class_name = target.partition(":")
    model_class = getattr(importlib.import_module(f".{file}", __package__), class_name)
    if positions is not None and issubclass(model_class, ContiguousPositions):
        raise InvalidRequest(
            f"positions: {names[0]} has one axis, for which a request chooses, got {positions!r:.40}",
            hint="the switch positions=original or positions=contiguous (Sparsity, --switch)",
        )
    with torch.device("meta"):
        return model_class.from_checkpoint(checkpoint, **({} if positions is None else {"positions": positions}))


def tied_weights(model: VisionLanguageModel) -> dict[str, str]:
    """Parameters that share another one where the checkpoint leaves them out, by the model's names."""
    return {_TIED_HEAD: _EMBEDDING} if model.decoder.config.tie_word_embeddings else {}


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    w4a8: bool = False,
    positions: str | None = None,
    progress: ProgressFn = no_progress,
) -> VisionLanguageModel:
    """Builds the checkpoint's model and fills it, strictly.

    Layers that the checkpoint holds quantised stay so; `dtype` is that of everything else and of the activations.
    `w4a8`: 4-bit layers multiply in 8 bits; `positions` as in `build_model`. Raises UnsupportedModel,
    CorruptCheckpoint, or InvalidRequest for `w4a8` without such layers and for `positions`.
    """
    model: Any = build_model(checkpoint, positions=positions)
    plan = _quant_plan(model, checkpoint)
    plan.apply(model, w4a8=w4a8)
    tied = tied_weights(model)
    load_weights(model, checkpoint, model.rename, tied=tied, dtype=dtype, device=device, plan=plan, progress=progress)
    return model.eval()


def _quant_plan(model: Any, checkpoint: Checkpoint) -> QuantPlan:
    """The plan by the config of the whole; where sub-models have configs of their own, by theirs and their names."""
    whole = _quantization_config(checkpoint)
    if whole is not None or not checkpoint.folders:
        return QuantPlan.of(model, checkpoint.headers(), model.rename, whole)

    def of_folder(folder: str, part: Checkpoint) -> QuantPlan:
        def rename(name: str) -> str | None:
            return model.rename(f"{folder}.{name}")

        return QuantPlan.of(model, part.headers(), rename, _quantization_config(part))

    return QuantPlan.joined(of_folder(folder, part) for folder, part in checkpoint.folders.items())


def _quantization_config(checkpoint: Checkpoint) -> QuantizationConfig | None:
    """That of the whole model, else that of its language model: some writers quantise the latter by itself."""
    text = checkpoint.config.get("text_config")
    values = checkpoint.config.get("quantization_config")
    if values is None and isinstance(text, dict):
        values = text.get("quantization_config")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"config.json: quantization_config: expected an object, got {values!r:.100}")
    return parse_quantization_config(values)
