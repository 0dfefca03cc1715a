"""Write a randomly initialised LLaVA-NeXT or LLaVA-NeXT-Video checkpoint in the layout of the real ones.

    python benchmarks/random_checkpoint.py --preset tiny OUT [--seed 0] [--dtype bfloat16]
        [--llm w4a16] [--vision w8a8] [--lm-head int8] [--group 128]

The folder has the tensor names, config keys and tokenizer files of a published checkpoint, so the whole
path from file to answer runs without a download. Its answers are noise. The weights have the scale of a
trained model's (unit-variance activations, peaked attention, logits of standard deviation 4), so that a
wrong position, a lost token or another question changes the answer. `--llm` and `--vision` draw the codes
of a W4A16 language model and of a W8A8 tower themselves: the memory and the speed of such a model, without
the time that quantising one takes.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsevila.quant.scheme import Int4Weight, Int8Weight

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
NUM_PIECES = 576  # of the tokenizer: 3 special, 256 bytes, the rest learned from TEXT
NUM_BYTE_ROWS = 3 + 256
NUM_SPARE_ROWS = 64  # published embeddings have 64 rows more than the SentencePiece model has pieces
EOS_ID = 2

# What the tokenizer learns its pieces from, and so what the noise is spelt with.
TEXT = """\
A red circle moves from left to right and a blue square stays in the middle of the picture.
Then the green triangle turns around, grows larger and slowly leaves the frame at the top.
What happens in the clip? What do you see in this image? How many people are there?
Which colour is the car, and where does it stop? Please describe the scene in one sentence.
The street is wet and two people wait at the crossing while a white bus passes behind them.
A woman with a yellow umbrella talks to a man who carries a brown bag over his shoulder.
There is a badge on the table; it shows the name, a number and a small black and white photograph.
The page has a title, three columns of text and a chart with bars for every month of the year.
First the door opens, after that someone walks in, and finally the light goes out again.
The dog runs behind the ball, the children laugh, and the camera follows them across the garden.
Is this the same badge? Yes, it is the same one, but the picture is brighter than before.
In the background you can see mountains, a lake and several houses with orange roofs.
It looks like a quiet morning: the sky is grey, nobody speaks, and nothing else is moving.
Near the end of the video the train arrives at the station and many passengers step out.
"""


@dataclass(frozen=True)
class Shape:
    """The sizes of a checkpoint. `head_dim` None means hidden over heads, and is then left out of the config."""

    model: Literal["llava_next", "llava_next_video"]
    vision_hidden: int
    vision_ffn: int
    vision_layers: int
    vision_heads: int
    image_size: int  # pixels, a multiple of patch_size
    patch_size: int
    text_hidden: int
    text_ffn: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    vocab_size: int  # rows of the embedding and of the output head
    head_dim: int | None = None
    text_model: Literal["llama", "mistral"] = "llama"
    rope_theta: float = 10000.0
    rope_scaling: tuple[str, float] | None = None  # type and factor, e.g. ("linear", 2.5)
    max_positions: int = 4096
    rms_norm_eps: float = 1e-5
    num_pieces: int = NUM_PIECES  # of the tokenizer
    pinpoints: tuple[tuple[int, int], ...] | None = None  # heights and widths in tiles; None: the published ones

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: expected a multiple of {self.patch_size}, got {self.image_size}")
        if self.text_heads % self.text_kv_heads:
            raise ValueError(f"text_heads: expected a multiple of {self.text_kv_heads}, got {self.text_heads}")
        needed = self.num_pieces + len(self.added_tokens)
        if self.vocab_size < needed:
            raise ValueError(f"vocab_size: expected at least {needed}, got {self.vocab_size}")

    @property
    def text_head_dim(self) -> int:
        return self.head_dim or self.text_hidden // self.text_heads

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The tokens after the SentencePiece pieces, in the order of the published tokenizers."""
        media = ("<video>", "<image>") if self.model == "llava_next_video" else ("<image>",)
        return (*media, "<pad>")

    def token_id(self, name: str) -> int:
        return self.num_pieces + self.added_tokens.index(name)

    @property
    def grid_pinpoints(self) -> list[list[int]]:
        """Heights and widths in pixels that images are tiled to."""
        tiles = self.pinpoints or ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        return [[rows * self.image_size, cols * self.image_size] for rows, cols in tiles]


_VICUNA_7B = Shape(
    model="llava_next",
    vision_hidden=1024,
    vision_ffn=4096,
    vision_layers=24,
    vision_heads=16,
    image_size=336,
    patch_size=14,
    text_hidden=4096,
    text_ffn=11008,
    text_layers=32,
    text_heads=32,
    text_kv_heads=32,
    vocab_size=32064,
)
PRESETS = {
    "tiny": Shape(
        model="llava_next_video",
        vision_hidden=64,
        vision_ffn=160,
        vision_layers=4,
        vision_heads=4,
        image_size=112,
        patch_size=14,
        text_hidden=96,
        text_ffn=192,
        text_layers=3,
        text_heads=4,
        text_kv_heads=2,
        head_dim=32,
        vocab_size=NUM_PIECES + NUM_SPARE_ROWS,
    ),
    "0.5b": replace(
        _VICUNA_7B,
        text_hidden=1024,
        text_ffn=2816,
        text_layers=24,
        text_heads=16,
        text_kv_heads=4,
        max_positions=32768,
    ),
    # The sizes of Qwen2-7B's decoder, which has biases besides, behind LLaVA-NeXT's tower: contexts of 50 thousand.
    "qwen2-7b": replace(
        _VICUNA_7B,
        text_model="mistral",
        text_hidden=3584,
        text_ffn=18944,
        text_layers=28,
        text_heads=28,
        text_kv_heads=4,
        vocab_size=152064,
        rope_theta=1e6,
        max_positions=65536,
    ),
}


def preset(name: str) -> Shape:
    """The shape called `name`; `vicuna-7b-4-layers` is LLaVA-NeXT-7B with four decoder layers."""
    if name in PRESETS:
        return PRESETS[name]
    if match := re.fullmatch(r"vicuna-7b-([1-9]\d?)-layers", name):
        return replace(_VICUNA_7B, text_layers=int(match[1]))
    raise ValueError(f"preset: expected one of {sorted(PRESETS)} or vicuna-7b-N-layers, got {name!r}")


def write_random_checkpoint(
    folder: Path | str,
    shape: Shape,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the checkpoint into `folder`, which is made where it is missing.

    `dtype` is the name of a torch floating dtype. Above `max_shard_bytes` the weights are split into
    several files with an index, as the hub does. The same arguments give the same files.
    """
    folder = Path(folder)
    write_documents(folder, shape, dtype=dtype, tokenizer=train_tokenizer())
    _write_weights(folder, shape, seed, getattr(torch, dtype), max_shard_bytes)


def write_documents(folder: Path, shape: Shape, *, dtype: str, tokenizer: bytes) -> None:
    """Write everything but the weights into `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = {
        "config.json": _config(shape, dtype),
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": EOS_ID,
            "pad_token_id": shape.token_id("<pad>"),
        },
        "preprocessor_config.json": _preprocessor_config(shape),
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": shape.patch_size,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": _tokenizer_config(shape),
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(tokenizer)


def train_tokenizer(lines: Iterable[str] = TEXT.splitlines(), num_pieces: int = NUM_PIECES) -> bytes:
    """A SentencePiece BPE model with Llama's options, trained on `lines`."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_pieces,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _text_config(shape: Shape, dtype: str) -> dict[str, Any]:
    text: dict[str, Any] = {
        "architectures": [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[shape.text_model]],
        "hidden_act": "silu",
        "hidden_size": shape.text_hidden,
        "intermediate_size": shape.text_ffn,
        "max_position_embeddings": shape.max_positions,
        "model_type": shape.text_model,
        "num_attention_heads": shape.text_heads,
        "num_hidden_layers": shape.text_layers,
        "num_key_value_heads": shape.text_kv_heads,
        "pad_token_id": shape.token_id("<pad>"),
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "torch_dtype": dtype,
        "vocab_size": shape.vocab_size,
    }
    if shape.head_dim is not None:
        text["head_dim"] = shape.head_dim
    if shape.rope_scaling is not None:
        text["rope_scaling"] = {"type": shape.rope_scaling[0], "factor": shape.rope_scaling[1]}
    if shape.text_model == "mistral":
        text["sliding_window"] = None
    return text


def _config(shape: Shape, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [
            {
                "llava_next": "LlavaNextForConditionalGeneration",
                "llava_next_video": "LlavaNextVideoForConditionalGeneration",
            }[shape.model]
        ],
        "ignore_index": -100,
        "image_grid_pinpoints": shape.grid_pinpoints,
        "image_token_index": shape.token_id("<image>"),
        "model_type": shape.model,
        "projector_hidden_act": "gelu",
        "text_config": _text_config(shape, dtype),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_image_newline_parameter": True,
        "vision_config": {
            "hidden_act": "quick_gelu",
            "hidden_size": shape.vision_hidden,
            "image_size": shape.image_size,
            "intermediate_size": shape.vision_ffn,
            "layer_norm_eps": 1e-5,
            "model_type": "clip_vision_model",
            "num_attention_heads": shape.vision_heads,
            "num_hidden_layers": shape.vision_layers,
            "patch_size": shape.patch_size,
            "projection_dim": 768,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if shape.model == "llava_next_video":
        grid = shape.image_size // shape.patch_size
        config |= {
            "spatial_pool_mode": "average",
            "spatial_pool_out_channels": shape.vision_hidden,
            "spatial_pool_stride": 2,
            "video_seq_length": (grid // 2) ** 2 * 2,
            "video_token_index": shape.token_id("<video>"),
        }
    return config


def _preprocessor_config(shape: Shape) -> dict[str, Any]:
    return {
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": shape.image_size, "width": shape.image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": shape.grid_pinpoints,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "LlavaNextImageProcessor",
        "image_std": CLIP_STD,
        "processor_class": "LlavaNextProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": shape.image_size},
    }


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    names = {0: "<unk>", 1: "<s>", EOS_ID: "</s>"}
    names |= {shape.token_id(name): name for name in shape.added_tokens}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": name, **flags} for i, name in sorted(names.items())},
        "additional_special_tokens": [],
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": shape.max_positions,
        "pad_token": "<pad>",
        "padding_side": "left",
        "processor_class": "LlavaNextProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


@dataclass(frozen=True)
class _Draw:
    """How one tensor is drawn: normal numbers around `mean`."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def _linear(name: str, out_size: int, in_size: int, *, gain: float = 1.0, bias: bool) -> Iterator[tuple[str, _Draw]]:
    yield f"{name}.weight", _Draw((out_size, in_size), gain * in_size**-0.5)
    if bias:
        yield f"{name}.bias", _Draw((out_size,), 0.1)


def _norm(name: str, size: int, *, bias: bool) -> Iterator[tuple[str, _Draw]]:
    yield f"{name}.weight", _Draw((size,), 0.1, mean=1.0)
    if bias:
        yield f"{name}.bias", _Draw((size,), 0.1)


QK_GAIN = 1.8  # attention scores of standard deviation 3: a few keys stand out, as in a trained model


def _vision_tensors(shape: Shape) -> Iterator[tuple[str, _Draw]]:
    width, root = shape.vision_hidden, "vision_tower.vision_model."
    num_positions = (shape.image_size // shape.patch_size) ** 2 + 1
    patch = (width, 3, shape.patch_size, shape.patch_size)
    yield root + "embeddings.class_embedding", _Draw((width,), 1.0)
    yield root + "embeddings.patch_embedding.weight", _Draw(patch, (3 * shape.patch_size**2) ** -0.5)
    yield root + "embeddings.position_embedding.weight", _Draw((num_positions, width), 0.5)
    yield from _norm(root + "pre_layrnorm", width, bias=True)
    for i in range(shape.vision_layers):
        layer = f"{root}encoder.layers.{i}."
        yield from _norm(layer + "layer_norm1", width, bias=True)
        for name, gain in (("q_proj", QK_GAIN), ("k_proj", QK_GAIN), ("v_proj", 1.0), ("out_proj", 1.0)):
            yield from _linear(f"{layer}self_attn.{name}", width, width, gain=gain, bias=True)
        yield from _norm(layer + "layer_norm2", width, bias=True)
        yield from _linear(layer + "mlp.fc1", shape.vision_ffn, width, bias=True)
        yield from _linear(layer + "mlp.fc2", width, shape.vision_ffn, bias=True)
    yield from _norm(root + "post_layernorm", width, bias=True)


def _text_tensors(shape: Shape) -> Iterator[tuple[str, _Draw]]:
    width, root = shape.text_hidden, "language_model.model."
    q_width, kv_width = shape.text_heads * shape.text_head_dim, shape.text_kv_heads * shape.text_head_dim
    yield root + "embed_tokens.weight", _Draw((shape.vocab_size, width), 1.0)
    for i in range(shape.text_layers):
        layer = f"{root}layers.{i}."
        yield from _norm(layer + "input_layernorm", width, bias=False)
        yield from _linear(layer + "self_attn.q_proj", q_width, width, gain=QK_GAIN, bias=False)
        yield from _linear(layer + "self_attn.k_proj", kv_width, width, gain=QK_GAIN, bias=False)
        yield from _linear(layer + "self_attn.v_proj", kv_width, width, bias=False)
        yield from _linear(layer + "self_attn.o_proj", width, q_width, bias=False)
        yield from _norm(layer + "post_attention_layernorm", width, bias=False)
        yield from _linear(layer + "mlp.gate_proj", shape.text_ffn, width, bias=False)
        yield from _linear(layer + "mlp.up_proj", shape.text_ffn, width, bias=False)
        yield from _linear(layer + "mlp.down_proj", width, shape.text_ffn, gain=2.0, bias=False)
    yield from _norm(root + "norm", width, bias=False)
    yield from _linear("language_model.lm_head", shape.vocab_size, width, gain=4.0, bias=False)


def _all_tensors(shape: Shape) -> Iterator[tuple[str, _Draw]]:
    yield "image_newline", _Draw((shape.text_hidden,), 1.0)
    yield from _vision_tensors(shape)
    yield from _linear("multi_modal_projector.linear_1", shape.text_hidden, shape.vision_hidden, bias=True)
    yield from _linear("multi_modal_projector.linear_2", shape.text_hidden, shape.text_hidden, gain=1.7, bias=True)
    yield from _text_tensors(shape)


def _draw(name: str, draw: _Draw, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    values = torch.randn(draw.shape, generator=generator).mul_(draw.std).add_(draw.mean)
    if name.endswith("lm_head.weight"):
        _keep_to_text(values)
    return values.to(dtype)


def _keep_to_text(head: Tensor) -> None:
    """Leave the output head with words: bytes, special tokens and spare rows get the logit 0, which never wins.

    The row of the end token is longer instead, so that most answers end by themselves after a line or two.
    """
    eos = head[EOS_ID] * 1.3
    head[:NUM_BYTE_ROWS] = 0
    head[NUM_PIECES:] = 0
    head[EOS_ID] = eos


def _write_weights(folder: Path, shape: Shape, seed: int, dtype: torch.dtype, max_shard_bytes: int) -> None:
    from safetensors.torch import save_file

    draws = list(_all_tensors(shape))
    shards: list[list[tuple[str, _Draw]]] = [[]]
    total_bytes = shard_bytes = 0
    for name, draw in draws:
        size = torch.Size(draw.shape).numel() * dtype.itemsize
        if shards[-1] and shard_bytes + size > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append((name, draw))
        shard_bytes += size
        total_bytes += size
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _draw(name, draw, generator, dtype) for name, draw in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# Quantised weights --------------------------------------------------------------------------------------------------

_CODES_STD = {4: 4.61, 8: 42.0}  # of drawn codes: uniform over 16 values, and normal with few beyond 127
_HEAD = "language_model.lm_head.weight"
_TEXT_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\..*_proj\.weight")
_VISION_LAYER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.(self_attn|mlp)\..*\.weight")


def write_random_quantised(
    folder: Path | str,
    shape: Shape,
    *,
    llm: bool = True,
    vision: bool = True,
    head: bool = False,
    seed: int = 0,
    dtype: str = "bfloat16",
    group_size: int = 128,
) -> None:
    """Write the same model with the matrices of the decoder's layers in 4 bits and of the tower's used layers in 8.

    In compressed-tensors' formats; without `llm` or `vision` that part stays in floats, with `head` the output matrix
    has 8 bits. `dtype` is that of the rest and
    of the scales. Raises InvalidRequest where `folder` exists. Holds one decoder layer, or the rest, at a time.
    """
    from sparsevila.quant.export import CheckpointWriter

    writer = CheckpointWriter(Path(folder), form="compressed-tensors", fingerprint=f"random {shape} {seed} {dtype}")
    generator, float_type = torch.Generator().manual_seed(seed), getattr(torch, dtype)
    units: dict[str, list[tuple[str, _Draw]]] = {}
    for name, draw in _all_tensors(shape):
        layer = re.match(r"language_model\.model\.layers\.\d+", name)
        units.setdefault(layer[0] if layer else "the rest", []).append((name, draw))
    for unit, draws in units.items():
        wanted = [bits for bits, asked in ((4, llm), (8, vision)) if asked]
        codes = {name: bits for name, _ in draws if (bits := _bits_of(name, shape)) in wanted}
        codes |= {name: 8 for name, _ in draws if head and name == _HEAD}
        writer.add(
            unit,
            dense={name: _draw(name, draw, generator, float_type) for name, draw in draws if name not in codes},
            quantised={
                name.removesuffix(".weight"): _draw_codes(draw, codes[name], group_size, generator, float_type)
                for name, draw in draws
                if name in codes
            },
            record={"drawn": True},
        )
    with tempfile.TemporaryDirectory() as scratch:
        write_documents(Path(scratch), shape, dtype=dtype, tokenizer=train_tokenizer())
        documents = {file.name: file.read_bytes() for file in Path(scratch).iterdir()}
    config = json.loads(documents.pop("config.json"))
    writer.finish(config, documents=documents, record={"drawn with seed": seed})


def write(
    folder: Path,
    shape: Shape,
    *,
    llm: str,
    vision: str,
    lm_head: str = "none",
    seed: int = 0,
    dtype: str = "bfloat16",
    group: int = 128,
) -> None:
    """Either kind, by the words of the command line."""
    if llm == vision == lm_head == "none":
        write_random_checkpoint(folder, shape, seed=seed, dtype=dtype)
        return
    parts = {"llm": llm != "none", "vision": vision != "none", "head": lm_head != "none"}
    write_random_quantised(folder, shape, **parts, seed=seed, dtype=dtype, group_size=group)


def _bits_of(name: str, shape: Shape) -> Literal[4, 8] | None:
    """Width of a tensor's codes; None for one that stays in floats, the unused last layer of the tower among them."""
    if _TEXT_LAYER.fullmatch(name):
        return 4
    match = _VISION_LAYER.fullmatch(name)
    return 8 if match and int(match[1]) < shape.vision_layers - 1 else None


def _draw_codes(
    draw: _Draw, bits: Literal[4, 8], group_size: int, generator: torch.Generator, dtype: torch.dtype
) -> Int4Weight | Int8Weight:
    from sparsevila.quant.scheme import Int4Weight, Int8Weight

    N, K = draw.shape
    step = draw.std / _CODES_STD[bits]
    if bits == 8:
        codes = torch.randn(N, K, generator=generator).mul_(_CODES_STD[8]).round_().clamp_(-127, 127).to(torch.int8)
        return Int8Weight(codes, torch.full((N,), step, dtype=dtype))
    nibbles = torch.randint(256, (N, -(-K // 2)), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(7, 9, (N, K // group_size), generator=generator, dtype=torch.uint8)
    return Int4Weight(nibbles, torch.full(zeros.shape, step, dtype=dtype), zeros, K, group_size)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a randomly initialised LLaVA-NeXT checkpoint.")
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--preset", required=True, help=f"{', '.join(PRESETS)}, or vicuna-7b-N-layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--llm", default="none", choices=["w4a16", "none"])
    parser.add_argument("--vision", default="none", choices=["w8a8", "none"])
    parser.add_argument("--lm-head", default="none", choices=["int8", "none"])
    parser.add_argument("--group", type=int, default=128, metavar="N", help="inputs that share a scale in 4 bits")
    args = parser.parse_args(argv)
    try:
        shape = preset(args.preset)
    except ValueError as error:
        parser.error(str(error))
    parts = {"llm": args.llm, "vision": args.vision, "lm_head": args.lm_head}
    write(args.folder, shape, **parts, seed=args.seed, dtype=args.dtype, group=args.group)
    size = sum(f.stat().st_size for f in args.folder.iterdir() if f.is_file())
    print(f"{args.preset}: {size / 1e6:.1f} MB in {args.folder}")


if __name__ == "__main__":
    main()
