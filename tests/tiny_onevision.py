"""A tiny random checkpoint of LLaVA-OneVision, made by `transformers`.

python tests/tiny_onevision.py FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_qwen import NUM_PIECES, tokenizer_json

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
SPECIAL_IDS = {name: NUM_PIECES + i for i, name in enumerate(SPECIALS)}
SIDE = 50  # pixels of a tile: three patches of 14 and a rest that no patch covers, like 384 = 27 * 14 + 6
PINPOINTS = [[height, width] for height in (50, 100, 150, 200) for width in (50, 100, 150, 200)]
MAX_TILES = 4  # so that pictures of more tiles are scaled down


@dataclass(frozen=True)
class OnevisionOracle:
    """A checkpoint folder and the model that `transformers` sees in it."""

    folder: Path
    hf: Any


def build(folder: Path, *, tied: bool = False, seed: int = 0) -> OnevisionOracle:
    """Writes a complete checkpoint folder, weights scaled so that wrong positions show."""
    import transformers as hf

    torch.manual_seed(seed)
    text = hf.Qwen2Config(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=NUM_PIECES + 14, max_position_embeddings=4096, use_sliding_window=False, tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )  # fmt: skip
    vision = hf.SiglipVisionConfig(
        hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=5, image_size=SIDE,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    model: Any = hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS, tie_word_embeddings=tied,
            image_token_index=SPECIAL_IDS["<image>"], video_token_index=SPECIAL_IDS["<video>"],
            vision_aspect_ratio=f"anyres_max_{MAX_TILES}",
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(10)
            elif "language_model" in name and any(part in name for part in ("o_proj", "v_proj", "mlp")):
                parameter.mul_(3)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    _write_files(folder)
    return OnevisionOracle(folder, model)


def _write_files(folder: Path) -> None:
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(i): {"content": name, **entry} for name, i in SPECIAL_IDS.items()},
            "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "unk_token": None, "tokenizer_class": "Qwen2Tokenizer",
        },
        "generation_config.json": {"eos_token_id": [SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|endoftext|>"]]},
        "preprocessor_config.json": {
            "image_grid_pinpoints": PINPOINTS, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
            "size": {"height": SIDE, "width": SIDE},
        },
    }  # fmt: skip
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(tokenizer_json(SPECIALS))


if __name__ == "__main__":
    build(Path(sys.argv[1]))
