"""What the published checkpoints' config files say, so that their sizes can be computed without their weights.

From public copies of the files where there were some, otherwise from the papers and model cards: no file of the hub was
at hand, and the first real checkpoint that is loaded decides. Weights are never needed: models are built on `meta`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsevila.models.checkpoint import SUB_FOLDERS, Checkpoint
from sparsevila.models.registry import build_model, tied_weights

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
_VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
_MISTRAL = {
    "model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064,
}  # fmt: skip
_QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "use_sliding_window": False,
}  # fmt: skip
_QWEN_SIZES = {
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"vocab_size": 152064},
    "32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064},
    "72b": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 152064},
}  # fmt: skip
_QWEN_MEDIA = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655,
               "video_token_id": 151656}  # fmt: skip
_NEWLINE = {"\u010a": 198}  # of the vocabulary nothing else is needed


@dataclass(frozen=True)
class Published:
    """The JSON files of one checkpoint, by their names in its folder."""

    encoder: str
    summary_tokens: int
    files: dict[str, dict[str, Any]]


def _llava(text: dict[str, Any], *, video: bool = False) -> Published:
    kind = "LlavaNextVideo" if video else "LlavaNext"
    config = {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": "llava_next_video" if video else "llava_next",
        "text_config": text, "vision_config": _CLIP_L, "image_grid_pinpoints": _PINPOINTS,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
    }  # fmt: skip
    return Published("CLIP-L/14 336", 1, {"config.json": config})


def _onevision(text: dict[str, Any]) -> Published:
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
        "text_config": {"model_type": "qwen2", **_QWEN_7B, **text},
        "vision_config": {**_SIGLIP, "num_hidden_layers": 26, "image_size": 384, "vision_use_head": False},
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
    }  # fmt: skip
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Published("SigLIP-so400m 384", 0, {"config.json": config, "preprocessor_config.json": half})


def _qwen2(size: str) -> Published:
    text = {**_QWEN_7B, **_QWEN_SIZES[size]}
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": text["hidden_size"],
              "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    return _qwen("Qwen2VL", "qwen2_vl", text, vision)


def _qwen25(size: str) -> Published:
    text = {**_QWEN_7B, **_QWEN_SIZES[size], "max_position_embeddings": 128000}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3456 if size in ("32b", "72b") else 3420,
              "num_heads": 16, "in_chans": 3, "out_hidden_size": text["hidden_size"], "patch_size": 14,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
              "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}  # fmt: skip
    return _qwen("Qwen2_5_VL", "qwen2_5_vl", text, vision)


def _qwen(name: str, kind: str, text: dict[str, Any], vision: dict[str, Any]) -> Published:
    config = {
        "architectures": [f"{name}ForConditionalGeneration"], "model_type": kind, **text, **_QWEN_MEDIA,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": vision,
    }  # fmt: skip
    limits = {"min_pixels": 3136, "max_pixels": 12845056}
    return Published("Qwen ViT", 0, {"config.json": config, "preprocessor_config.json": limits})


def _nvila(
    top: dict[str, Any], projector: str, *, image_size: int = 448, text: dict[str, Any] | None = None
) -> Published:
    llm = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **_QWEN_7B,
        "vocab_size": 151648,
        **(text or {}),
    }
    config = {
        "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama", "hidden_size": llm["hidden_size"],
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch", **top,
    }  # fmt: skip
    return Published(
        f"SigLIP-so400m {image_size}",
        0,
        {
            "config.json": config,
            "llm/config.json": llm,
            "llm/vocab.json": _NEWLINE,
            "vision_tower/config.json": {**_SIGLIP, "image_size": image_size},
            "mm_projector/config.json": {"model_type": "v2l_projector", "mm_projector_type": projector},
        },
    )


PUBLISHED: dict[str, Published] = {
    "llava-next-7b": _llava(_VICUNA),
    "llava-next-mistral-7b": _llava(_MISTRAL),
    "llava-next-video-7b": _llava({**_VICUNA, "rope_scaling": {"type": "linear", "factor": 2.5}}, video=True),
    "llava-next-13b": _llava(
        {**_VICUNA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    ),
    "llava-onevision-0.5b": _onevision(
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 152000,
            "tie_word_embeddings": True,
        }
    ),
    "llava-onevision-7b": _onevision({"vocab_size": 152000}),
    "qwen2-vl-2b": _qwen2("2b"),
    "qwen2-vl-7b": _qwen2("7b"),
    "qwen2-vl-72b": _qwen2("72b"),
    "qwen2.5-vl-3b": _qwen25("3b"),
    "qwen2.5-vl-7b": _qwen25("7b"),
    "qwen2.5-vl-32b": _qwen25("32b"),
    "qwen2.5-vl-72b": _qwen25("72b"),
    "nvila-8b": _nvila(
        {
            "image_aspect_ratio": "dynamic_s2",
            "dynamic_s2": True,
            "s2_scales": "448,896,1344",
            "s2_max_split_size": 448,
            "s2_resize_output_to_scale_idx": -1,
            "mm_hidden_size": 3456,
            "max_tiles": 12,
            "num_video_frames": 8,
        },
        "mlp_downsample",
    ),
    "nvila-lite-8b": _nvila({"image_aspect_ratio": "dynamic", "max_tiles": 12}, "mlp_downsample_3x3_fix"),
    "longvila-7b": _nvila(
        {"image_aspect_ratio": "resize", "num_video_frames": 256, "fps": 2.0, "model_max_length": 131072},
        "mlp_downsample",
        text={"rope_theta": 15_300_000, "max_position_embeddings": 131072},
    ),
    "longvila-7b-1m": _nvila(
        {"image_aspect_ratio": "resize", "num_video_frames": 256, "model_max_length": 1_048_576},
        "mlp_downsample",
        image_size=384,
        text={"rope_theta": 1_062_356_830, "max_position_embeddings": 262_144},
    ),
    "longvila-1.5b": _nvila(
        {"image_aspect_ratio": "resize", "num_video_frames": 256, "model_max_length": 65536},
        "mlp_downsample",
        image_size=384,
        text={**_QWEN_SIZES["2b"], "vocab_size": 151648, "rope_theta": 15_300_000, "max_position_embeddings": 65536},
    ),
}


class ConfigsAlone(Checkpoint):
    """A checkpoint of which nothing but the JSON files is there; no disk is read."""

    def __init__(self, files: dict[str, dict[str, Any]]) -> None:
        super().__init__(Path("published"))
        self._files = files
        self.config = files.get("config.json", {})
        inner = {
            name: {
                file.removeprefix(f"{name}/"): content for file, content in files.items() if file.startswith(f"{name}/")
            }
            for name in SUB_FOLDERS
        }
        self.folders = {name: ConfigsAlone(own) for name, own in inner.items() if own}

    def has(self, name: str) -> bool:
        return name in self._files

    def read_json(self, name: str, **_: Any) -> Any:
        return self._files.get(name)


def model_of(alias: str) -> Any:
    """The model on `meta`, dense; what it computes besides tensors (preprocessing, positions) works."""
    return build_model(ConfigsAlone(PUBLISHED[alias].files))


def stored_bytes(alias: str) -> int:
    """Of the published weights, 16 bits each: what is run here. Tower layers behind the features are not in it."""
    model = model_of(alias)
    tied = tied_weights(model)
    return sum(2 * p.numel() for name, p in model.named_parameters() if name not in tied)


if __name__ == "__main__":
    with torch.device("meta"):
        for name in PUBLISHED:
            print(f"{name:<24} {stored_bytes(name):>16,} bytes")
