"""Tiny random checkpoints of the NVILA family, laid out as the released ones: `llm/`, `vision_tower/`, `mm_projector/`.

    python tests/tiny_nvila.py FOLDER [nvila|longvila|radio]

Sub-models are made and written by `transformers`, which also is their oracle; the projector is plain tensors. Weights
are scaled so that a wrong position shows in the logits.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tiny_qwen import NUM_PIECES, tokenizer_json
from torch import Tensor

Kind = Literal["nvila", "longvila", "radio"]

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]", "<vila/sentinel>", "<image>", "<vila/video>",
)  # fmt: skip
SPECIAL_IDS = {name: NUM_PIECES + i for i, name in enumerate(SPECIALS)}
VOCAB = SPECIAL_IDS["<image>"]  # the ids of media lie behind the embedding table, as in the released models


@dataclass(frozen=True)
class Shape:
    """Sizes and switches of one tiny model; no two sizes equal where they could be mixed up."""

    tower: Literal["siglip", "radio"] = "siglip"
    vision: dict[str, Any] = field(default_factory=dict)
    projector: str = "mlp_downsample"
    num_scales: int = 1
    text: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    old_tokenizer: bool = False  # vocab.json and merges.txt instead of tokenizer.json


_SIGLIP = {
    "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
_RADIO = {
    "hidden_size": 40, "mlp_ratio": 2.0, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "max_img_size": 48, "num_cls_tokens": 3, "num_registers": 2,
}  # fmt: skip
_TEXT = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
_TSP = "llava.model.encoders.TSPVideoEncoder"

SHAPES: dict[str, Shape] = {
    "nvila": Shape(
        vision=_SIGLIP,
        num_scales=3,
        text={**_TEXT, "rope_theta": 1e6},
        top={
            "image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2": True, "s2_scales": "28,56,84",
            "s2_max_split_size": 28, "s2_resize_output_to_scale_idx": -1, "num_video_frames": 8, "max_tiles": 12,
        },
    ),
    "longvila": Shape(
        vision={**_SIGLIP, "image_size": 38},  # 5 x 5 patches and three pixels that none covers
        projector="mlp_downsample_2x2_fix",
        text={**_TEXT, "num_key_value_heads": 2, "rope_theta": 15.3e6, "max_position_embeddings": 131072},
        top={"image_aspect_ratio": "resize", "num_video_frames": 256, "fps": 2.0, "model_max_length": 131072},
        old_tokenizer=True,
    ),
    "radio": Shape(
        tower="radio",
        vision=_RADIO,
        projector="mlp_downsample_3x3_fix",
        text={**_TEXT, "num_attention_heads": 4, "num_key_value_heads": 4, "rope_theta": 1e6},
        top={"image_aspect_ratio": "dynamic", "min_tiles": 1, "max_tiles": 6, "num_video_frames": 8},
    ),
}  # fmt: skip

# Beside the three kinds, for the tests of this family: every projector, mode and pooling that is left.
EXTRA_SHAPES: dict[str, Shape] = {
    "pad": Shape(
        vision=_SIGLIP, projector="mlp2x_gelu", text={**_TEXT, "rope_theta": 1e6},
        top={"image_aspect_ratio": "pad", "num_video_frames": 8},
    ),
    "pooled": Shape(
        vision={**_SIGLIP, "image_size": 42}, projector="mlp_downsample_3x3_fix", text={**_TEXT, "rope_theta": 1e6},
        top={
            "image_aspect_ratio": "resize", "num_video_frames": 16, "num_time_tokens": 100,
            "time_token_format": "<t{t}>",
            "video_encoder": json.dumps({"_target_": _TSP, "pool_sizes": [[3, 1, 2]]}),
        },
    ),
    "linear": Shape(
        vision=_SIGLIP, projector="linear", text={**_TEXT, "rope_theta": 1e6},
        top={"image_aspect_ratio": "dynamic", "min_tiles": 1, "max_tiles": 4, "chat_template": "qwen2"},
    ),
    "identity": Shape(
        vision={**_SIGLIP, "hidden_size": 64}, projector="identity",
        text={**_TEXT, "rope_theta": 1e6, "max_position_embeddings": 1024},
        top={"image_aspect_ratio": "resize", "model_max_length": 2500},  # above: linear RoPE by 3
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TinyNvila:
    """A checkpoint folder and its parts as `transformers` has them."""

    folder: Path
    shape: Shape
    tower: Any  # SiglipVisionModel or RadioModel
    llm: Any  # Qwen2ForCausalLM
    projector: dict[str, Tensor]


def build(folder: Path, *, kind: Kind, seed: int = 0) -> TinyNvila:
    """Writes a complete checkpoint folder of one kind."""
    return write(folder, SHAPES[kind], seed)


def write(folder: Path, shape: Shape, seed: int = 0) -> TinyNvila:
    """Writes a complete checkpoint folder of any shape."""
    import transformers as hf

    hf.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    if shape.tower == "radio":
        tower: Any = hf.RadioModel(hf.RadioConfig(**shape.vision))
    else:
        tower = hf.SiglipVisionModel(hf.SiglipVisionConfig(**shape.vision))
    text = dict(shape.text)
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    length = shape.top.get("model_max_length", 0)
    if length > text["max_position_embeddings"]:
        rope = {**rope, "rope_type": "linear", "factor": float(-(-length // text["max_position_embeddings"]))}
    llm = hf.Qwen2ForCausalLM(hf.Qwen2Config(**text, rope_parameters=rope))
    for model in (tower, llm):
        _sharpen(model)
    # Logit 0, never the largest: random weights would end an answer anywhere.
    llm.lm_head.weight.data[[SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|endoftext|>"]]] = 0
    tower.eval().save_pretrained(folder / "vision_tower")
    llm.eval().save_pretrained(folder / "llm")
    # The config on disk does not know of the scaling: its length against the model's says it.
    config = json.loads((folder / "llm" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    (folder / "llm" / "config.json").write_text(json.dumps(config))
    width = shape.vision["hidden_size"] * shape.num_scales
    projector = projector_tensors(shape.projector, width, text["hidden_size"])
    _write_projector(folder / "mm_projector", shape.projector, projector)
    if shape.tower == "siglip":
        size = {"height": shape.vision["image_size"], "width": shape.vision["image_size"]}
        pre = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "resample": 3, "size": size}
        (folder / "vision_tower" / "preprocessor_config.json").write_text(json.dumps(pre))
    _write_tokenizer(folder / "llm", old=shape.old_tokenizer)
    top = {
        "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama", "hidden_size": text["hidden_size"],
        "mm_hidden_size": width, "mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch",
        # Paths of the machine it was trained on, as in released configs: nobody may follow them.
        "llm_cfg": {"_name_or_path": "/nowhere/llm"}, "vision_tower_cfg": "/nowhere/vision_tower",
        "mm_projector_cfg": {"_name_or_path": "/nowhere/mm_projector"},
        "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
        "video_encoder": {"_target_": "llava.model.encoders.BasicVideoEncoder"},
        **shape.top,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(top))
    return TinyNvila(folder, shape, tower, llm, projector)


@torch.no_grad()
def _sharpen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.mul_(10)
        elif any(part in name for part in ("o_proj", "v_proj", "mlp")) and name.endswith("weight"):
            parameter.mul_(3)
        elif "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        elif "lambda1" in name or "position_embedding" in name or "token" in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)


def projector_tensors(kind: str, width: int, hidden: int) -> dict[str, Tensor]:
    """Random tensors under the names of the released projectors."""
    linears: dict[str, tuple[int, int]]
    norms: dict[str, int] = {}
    if kind == "mlp_downsample_3x3_fix":
        linears, norms = {"2": (9, 3), "5": (3, 0), "7": (0, 0)}, {"1": 9, "4": 3}
    elif kind.startswith("mlp_downsample"):
        linears, norms = {"2": (4, 0), "4": (0, 0)}, {"1": 4}
    else:
        linears = {"linear": {"": (1, 0)}, "mlp2x_gelu": {"0": (1, 0), "2": (0, 0)}, "identity": {}}[kind]

    def size(factor: int) -> int:
        return factor * width or hidden

    tensors = {}
    for index, (inputs, outputs) in linears.items():
        name = ".".join(filter(None, ("layers", index)))
        tensors[f"{name}.weight"] = torch.randn(size(outputs), size(inputs)) * size(inputs) ** -0.5
        tensors[f"{name}.bias"] = torch.randn(size(outputs)) * 0.1
    for index, factor in norms.items():
        tensors[f"layers.{index}.weight"] = 1 + torch.randn(size(factor)) * 0.1
        tensors[f"layers.{index}.bias"] = torch.randn(size(factor)) * 0.1
    return tensors


def _write_projector(folder: Path, kind: str, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "v2l_projector", "mm_projector_type": kind}))
    if tensors:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path, *, old: bool) -> None:
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(i): {"content": name, **entry} for name, i in SPECIAL_IDS.items()}
    values = json.loads(tokenizer_json(SPECIALS))
    if old:
        (folder / "vocab.json").write_text(json.dumps(values["model"]["vocab"]))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in values["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        (folder / "added_tokens.json").write_text(json.dumps(SPECIAL_IDS))
    else:
        (folder / "tokenizer.json").write_text(json.dumps(values))
    config = {
        "added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "<|im_end|>", "pad_token": "[PAD]",
        "add_prefix_space": False, "model_max_length": 4096, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ends = [SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|endoftext|>"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


if __name__ == "__main__":
    build(Path(sys.argv[1]), kind=sys.argv[2] if len(sys.argv) > 2 else "nvila")  # type: ignore[arg-type]
