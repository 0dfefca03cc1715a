"""Tiny random checkpoints of Qwen2-VL and Qwen2.5-VL, as the hub has them: flat config, hub names, byte-level BPE.

    python tests/tiny_qwen.py FOLDER [qwen2|qwen2.5]

Weights come from the names of their tensors by a generator whose numbers never change, so a fixture that another
version of `transformers` has made of the same folder fits the checkpoint that a test builds.
"""

from __future__ import annotations

import functools
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Generation = Literal["qwen2", "qwen2.5"]

NUM_PIECES = 320
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
SPECIAL_IDS = {name: NUM_PIECES + i for i, name in enumerate(SPECIALS)}
VOCAB = NUM_PIECES + 14  # embeddings have more rows than the tokenizer has tokens, as the real ones
# Pixels: of pictures, and of the frames of a clip.
IMAGE_LIMITS, VIDEO_LIMITS = (4 * 784, 64 * 784), (4 * 784, 20 * 784)
TOKENS_PER_SECOND = 2
_CORPUS = (
    "What is in the picture? A red car stands on the left of the house, and the clock says ten past four. "
    "What happens in the video? The boat moves to the right, then a bird comes and sits down. Describe the scene. "
)
# Qwen's own rule for words.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class QwenOracle:
    """A checkpoint folder and the model that `transformers` sees in it."""

    folder: Path
    generation: Generation
    hf: Any


def config(generation: Generation, *, tied: bool = False) -> dict[str, Any]:
    """A flat config.json; no two sizes equal where they could be mixed up."""
    hidden = 64
    common = {"patch_size": 14, "in_chans": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 3}
    if generation == "qwen2":
        name, kind = "Qwen2VLForConditionalGeneration", "qwen2_vl"
        vision = {**common, "depth": 3, "embed_dim": 48, "hidden_size": hidden, "mlp_ratio": 2}
    else:
        name, kind = "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"
        vision = {
            **common, "depth": 4, "hidden_size": 48, "intermediate_size": 76, "out_hidden_size": hidden,
            "window_size": 56, "fullatt_block_indexes": [1, 3], "tokens_per_second": TOKENS_PER_SECOND,
        }  # fmt: skip
    return {
        "architectures": [name], "model_type": kind, "hidden_size": hidden, "intermediate_size": 160,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "tie_word_embeddings": tied,
        "vision_config": vision, "torch_dtype": "float32", "bos_token_id": SPECIAL_IDS["<|endoftext|>"],
        "eos_token_id": SPECIAL_IDS["<|im_end|>"], "vision_start_token_id": SPECIAL_IDS["<|vision_start|>"],
        "vision_end_token_id": SPECIAL_IDS["<|vision_end|>"], "image_token_id": SPECIAL_IDS["<|image_pad|>"],
        "video_token_id": SPECIAL_IDS["<|video_pad|>"],
    }  # fmt: skip


def _weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Scaled so that wrong positions and wrong windows show in the logits."""
    numbers = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).standard_normal(tuple(shape))
    values = torch.from_numpy(numbers.astype(np.float32))
    if "norm" in name or "ln_q" in name or name.endswith("bias"):
        return values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    if "embed_tokens" in name or "lm_head" in name:
        return values * 0.1
    gain = 1.6 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 0.8
    return values * gain / values[0].numel() ** 0.5


@functools.cache
def tokenizer_json(specials: tuple[str, ...] = SPECIALS) -> str:
    """A byte-level BPE, the same for every tiny model; its special tokens stand behind the pieces."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    assert tokenizer.get_vocab_size() == NUM_PIECES
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    return tokenizer.to_str()


def write_files(folder: Path) -> None:
    """Tokenizer, generation and preprocessor files."""
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(i): {"content": name, **entry} for name, i in SPECIAL_IDS.items()},
            "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "unk_token": None, "tokenizer_class": "Qwen2Tokenizer",
        },
        "generation_config.json": {
            "bos_token_id": SPECIAL_IDS["<|endoftext|>"], "pad_token_id": SPECIAL_IDS["<|endoftext|>"],
            "eos_token_id": [SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|endoftext|>"]],
        },
        "preprocessor_config.json": {
            "min_pixels": IMAGE_LIMITS[0], "max_pixels": IMAGE_LIMITS[1], "patch_size": 14, "temporal_patch_size": 2,
            "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "video_preprocessor_config.json": {
            "size": {"shortest_edge": VIDEO_LIMITS[0], "longest_edge": VIDEO_LIMITS[1]}, "patch_size": 14,
            "temporal_patch_size": 2, "merge_size": 2,
        },
    }  # fmt: skip
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(tokenizer_json())


def build(folder: Path, *, generation: Generation, tied: bool = False, seed: int = 0) -> QwenOracle:
    """Writes a complete checkpoint folder and has `transformers` read it."""
    import transformers as hf
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(generation, tied=tied)))
    write_files(folder)
    model_class = getattr(hf, config(generation)["architectures"][0])
    with torch.device("meta"):
        empty = model_class(model_class.config_class.from_pretrained(folder))
    tensors = {}
    for name, parameter in empty.named_parameters():  # a tied head is not among them
        stored = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        tensors[stored] = _weight(stored, parameter.shape, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return QwenOracle(folder, generation, model.eval())


if __name__ == "__main__":
    build(Path(sys.argv[1]), generation="qwen2" if sys.argv[2:] == ["qwen2"] else "qwen2.5")
