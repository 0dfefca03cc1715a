"""Tiny checkpoints that `transformers` makes, with `transformers` itself as the oracle."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from random_checkpoint import NUM_PIECES, train_tokenizer

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json")
VIDEO_TOKEN, IMAGE_TOKEN, VOCAB = NUM_PIECES, NUM_PIECES + 1, NUM_PIECES + 14  # behind the pieces of the tokenizer

tokenizer_model = functools.cache(train_tokenizer)  # the same for every tiny model


@dataclass(frozen=True)
class Tiny:
    """Sizes of one tiny model; no two equal where they could be mixed up."""

    video: bool = False
    text: str = "llama"
    hidden: int = 48
    heads: int = 6
    kv_heads: int = 3
    layers: int = 2
    vision_layers: int = 3
    patch: int = 14
    image: int = 56
    pinpoints: tuple[tuple[int, int], ...] = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
    rope: tuple[tuple[str, Any], ...] = ()
    context: int = 4096


TINY = {
    "vicuna": Tiny(),
    "mistral": Tiny(text="mistral", heads=8, kv_heads=2, hidden=64, layers=3, patch=8, image=48,
                    pinpoints=((48, 96), (96, 48), (96, 96), (144, 48), (48, 144))),
    "video": Tiny(video=True, heads=4, kv_heads=4, rope=(("rope_type", "linear"), ("factor", 2.5))),
    "mistral-video": Tiny(video=True, text="mistral", heads=8, kv_heads=1, hidden=64, patch=8, image=40,
                          pinpoints=((40, 80), (80, 40), (80, 80))),
}  # fmt: skip


@dataclass(frozen=True)
class Oracle:
    """A checkpoint folder and the model that `transformers` sees in it."""

    folder: Path
    tiny: Tiny
    hf: Any


def build_oracle(folder: Path, tiny: Tiny, seed: int = 0) -> Oracle:
    """Writes a tiny random checkpoint by `transformers`, weights scaled so that wrong positions show."""
    import transformers as hf

    torch.manual_seed(seed)
    text_class = hf.MistralConfig if tiny.text == "mistral" else hf.LlamaConfig
    theta = 1e6 if tiny.text == "mistral" else 1e4
    text = text_class(
        hidden_size=tiny.hidden, intermediate_size=tiny.hidden * 2 + 8, num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads, num_key_value_heads=tiny.kv_heads, vocab_size=VOCAB,
        max_position_embeddings=tiny.context, rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": theta, "rope_type": "default", **dict(tiny.rope)},
        **({"sliding_window": None} if tiny.text == "mistral" else {}),
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=40, intermediate_size=72, num_hidden_layers=tiny.vision_layers, num_attention_heads=5,
        image_size=tiny.image, patch_size=tiny.patch, hidden_act="quick_gelu", projection_dim=24,
    )  # fmt: skip
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_grid_pinpoints": [list(p) for p in tiny.pinpoints],
        "image_token_index": IMAGE_TOKEN,
        "tie_word_embeddings": False,
    }
    if tiny.video:
        model: Any = hf.LlavaNextVideoForConditionalGeneration(
            hf.LlavaNextVideoConfig(video_token_index=VIDEO_TOKEN, **common)
        )
    else:
        model = hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(**common))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(10)
            elif "language_model" in name and any(part in name for part in ("o_proj", "v_proj", "mlp")):
                parameter.mul_(3)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    write_tokenizer_config(folder)
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    return Oracle(folder, tiny, model)


def write_tokenizer_config(folder: Path) -> None:
    """The special tokens, by name and id, as the hub's files give them."""
    names = {0: "<unk>", 1: "<s>", 2: "</s>", IMAGE_TOKEN: "<image>", VIDEO_TOKEN: "<video>"}
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(i): {"content": name, **entry} for i, name in names.items()},
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


VISUAL_SEED = 4  # of the noise pictures


def write_clip(path: Path, *, frames: int, height: int = 48, width: int = 64, fps: int = 8) -> Any:
    """A small MPEG-4 clip of moving noise, as a `Video`."""
    import av
    import numpy as np

    from sparsevila import Video

    rng = np.random.default_rng(VISUAL_SEED)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.bit_rate = 2_000_000
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        for i in range(frames):
            rgb = np.kron(np.roll(coarse, i, axis=1), np.ones((height // 6, width // 8, 1), dtype=np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    return Video(path)
