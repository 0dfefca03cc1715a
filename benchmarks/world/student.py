"""The demo model while it learns: the engine's own modules with gradients, and its export to the hub's layout.

Training runs the engine's tower, projector and decoder layers in batches, so what is trained is what is shipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from random_checkpoint import Shape, write_documents
from torch import Tensor, nn
from torch.nn import functional as F
from world.sample import TILE

from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import TokenMap, VisualTokens
from sparsevila.models.llava_next import LlavaNext
from sparsevila.quant.linear import Linear

NUM_PIECES = 768
PATCH = 8
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (2, 3), (3, 2), (3, 3))

# One layer of the tower is behind the features: published towers have it too.
_SMALL = Shape(
    model="llava_next_video",
    vision_hidden=128,
    vision_ffn=512,
    vision_layers=5,
    vision_heads=2,
    image_size=TILE,
    patch_size=PATCH,
    text_hidden=192,
    text_ffn=512,
    text_layers=5,
    text_heads=3,
    text_kv_heads=1,
    head_dim=64,
    vocab_size=NUM_PIECES + 64,
    num_pieces=NUM_PIECES,
    pinpoints=PINPOINTS,
)
_WIDER = {"vision_hidden": 192, "vision_ffn": 768, "vision_layers": 6, "vision_heads": 3}
_DEEPER = {"text_hidden": 256, "text_ffn": 704, "text_layers": 6, "text_heads": 4, "text_kv_heads": 2}
SHAPES = {"small": _SMALL, "large": replace(_SMALL, **_WIDER, **_DEEPER)}


@dataclass(frozen=True)
class Rows:
    """A batch of token rows for the decoder. B samples, each [before | V visual tokens | text], T in all."""

    before: Tensor  # (before,) int64, the same for all samples
    text: Tensor  # (B, T - before - V) int64, padded
    positions: Tensor  # (B, T) int64
    segments: Tensor  # (B, T) int64: 0 is seen by all later rows, another number by its own rows; -1 is padding


def build(shape: Shape, folder: Path, tokenizer: bytes, *, seed: int = 0) -> LlavaNext:
    """A freshly initialised student; `folder` gets the documents of its checkpoint, all but the weights."""
    write_documents(folder, shape, dtype="bfloat16", tokenizer=tokenizer)
    model = empty(folder)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        _initialise(name, parameter)
    return model


def empty(folder: Path) -> LlavaNext:
    """The model that a folder's config describes, weights undefined."""
    checkpoint = Checkpoint(folder)  # there are no weights yet to open
    checkpoint.config = checkpoint.read_json("config.json", required=True)
    return LlavaNext.from_checkpoint(checkpoint)


def _initialise(name: str, parameter: nn.Parameter) -> None:
    with torch.no_grad():
        if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            parameter.fill_(1)
        elif name.endswith("bias"):
            parameter.zero_()
        elif "embed" in name or parameter.ndim == 1:
            parameter.normal_(std=0.02)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
                parameter.mul_(0.3)  # residual branches begin small


def tower_hidden(model: LlavaNext, pixels: Tensor) -> Tensor:
    """pixels (B, 3, TILE, TILE) -> (B, 1 + patches, D) behind the last layer that is run, summary token first."""
    tower = model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers:
        x, _ = layer(x, score=False)
    return x


def embed_visual(model: LlavaNext, features: Tensor, token_map: TokenMap, sources: Tensor | None) -> Tensor:
    """features (B, tiles, patches, D) -> (B, V, hidden): pooled for a video, put in reading order for a picture."""
    B = features.shape[0]
    if sources is None:
        x = model.pool(features.flatten(0, 1)).reshape(B, len(token_map), -1)
    else:
        x = features.flatten(1, 2)[:, sources.clamp(min=0)]
        x = x.masked_fill((sources < 0)[None, :, None], 0)
    flat = TokenMap.concat([token_map] * B)
    return model.embed_visual(VisualTokens(x.flatten(0, 1), flat, None)).reshape(B, len(token_map), -1)


def decode(model: LlavaNext, visual: Tensor, rows: Rows) -> Tensor:
    """visual (B, V, hidden) -> hidden states (B, T, hidden) behind the last layer."""
    decoder = model.decoder
    B = visual.shape[0]
    before = decoder.embed(rows.before).expand(B, -1, -1)
    hidden = torch.cat([before, visual, decoder.embed(rows.text)], dim=1)
    T = hidden.shape[1]
    mask = _mask(rows.segments)
    cos, sin = decoder.angles(rows.positions.flatten())
    hidden = hidden.reshape(B * T, -1)
    for layer in map(decoder.layer, range(len(decoder.layers))):
        q, k, v = (x.unflatten(1, (B, T)).transpose(0, 1) for x in layer.project(hidden, cos, sin))
        attended = _attention(q, k, v, mask).transpose(0, 1).flatten(1, 2)  # (H, B * T, D)
        hidden = layer.finish(hidden, attended)
    return hidden.reshape(B, T, -1)


def _mask(segments: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T) bool: what a row may see. Padding sees itself, so that no row is empty."""
    T = segments.shape[1]
    rows, cols = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    own = torch.eye(T, dtype=torch.bool, device=segments.device)
    return ((causal & ((cols == 0) | (cols == rows)) & (cols >= 0)) | own)[:, None]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, T, D), k and v (B, H_kv, T, D) -> (B, H, T, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.to(v.dtype) for x in (q, k, v))
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # On a CPU the fused op's backward pass with a mask is slower than the plain product.
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def export(model: LlavaNext, folder: Path) -> list[Path]:
    """Writes model.safetensors beside the documents: bfloat16, the names of published checkpoints. Returns all files.

    The layer behind the features and the last norm, which published towers have and nobody runs, repeat others.
    """
    from safetensors.torch import save_file

    tensors = {_hub_name(name): t for name, t in _parts(model)}
    used = len(model.vision_tower.encoder.layers)
    prefix = "vision_tower.vision_model.encoder.layers."
    behind = {
        name.replace(f"{prefix}{used - 1}.", f"{prefix}{used}."): t
        for name, t in tensors.items()
        if name.startswith(f"{prefix}{used - 1}.")
    }
    norm = {f"vision_tower.vision_model.post_layernorm.{leaf}": tensors[
        f"vision_tower.vision_model.pre_layrnorm.{leaf}"] for leaf in ("weight", "bias")}  # fmt: skip
    stored = {k: t.detach().to("cpu", torch.bfloat16).clone() for k, t in {**tensors, **behind, **norm}.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    Checkpoint.open(folder)  # complains of what is missing
    return [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".model", ".safetensors")]


def _parts(model: LlavaNext) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its checkpoint name; fused ones part by part."""
    fused = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear) and layer.parts}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in fused:
            yield name, parameter
            continue
        for part, rows in fused[owner].parts.items():
            yield f"{owner.rpartition('.')[0]}.{part}.{leaf}", parameter[rows]


def _hub_name(name: str) -> str:
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model.") and "lm_head" not in name:
        return name.replace("language_model.", "language_model.model.", 1)
    return name
