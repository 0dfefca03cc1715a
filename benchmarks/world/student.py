"""The demo model while it learns: the engine's own modules with gradients, and its export to the hub's layout.

Training runs the engine's tower, projector and decoder layers in batches, so what is trained is what is shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from random_checkpoint import Shape, write_documents
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from world.sample import TILE

from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.decoder import DecoderLayer
from sparsevila.models.interface import TokenMap, VisualTokens
from sparsevila.models.llava_next import LlavaNext
from sparsevila.quant.linear import Linear

NUM_PIECES = 768
GROUNDED = ((2, 0), (3, 1), (4, 2))  # layers and heads that are told where an answer is, while they are
UNSEEN = -30000.0  # added to a score; its exponential is 0
_ALL_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
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
    text_layers=6,
    text_heads=3,
    text_kv_heads=3,  # a single one learnt what is where more slowly; other things were changed with it
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
        elif "embed_tokens" in name:
            parameter.normal_(std=1.0)  # as the projected patches, see `standardise`
        elif "embed" in name or parameter.ndim == 1:
            parameter.normal_(std=0.02)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
                parameter.mul_(0.3)  # residual branches begin small


@torch.no_grad()
def standardise(model: LlavaNext, features: Tensor) -> None:
    """Begins the projector so that features like these (n, D) leave it with unit variance, as words enter.

    A trained tower's features are tens of units large and far from zero: the layers behind would see little but their
    mean, and words would drown in them.
    """
    first, second = (model.multi_modal_projector.get_submodule(f"linear_{i}") for i in (1, 2))
    assert isinstance(first, Linear)
    assert isinstance(second, Linear)
    assert first.bias is not None
    mean, spread = features.mean(0), features.std(0)
    first.weight.div_(spread)
    first.bias.copy_(-first.weight @ mean)
    second.weight.div_(F.linear(F.gelu(F.linear(features, first.weight, first.bias)), second.weight).std())
    model.image_newline.normal_()


def tower_hidden(model: LlavaNext, pixels: Tensor) -> Tensor:
    """pixels (B, 3, TILE, TILE) -> (B, 1 + patches, D) behind the last layer that is run, summary token first."""
    tower = model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    # On a CPU the backward pass of the fused attention takes longer than the rest of the tower.
    backends = [SDPBackend.MATH] if torch.is_grad_enabled() and x.device.type == "cpu" else list(_ALL_BACKENDS)
    with sdpa_kernel(backends):
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


def decode(
    model: LlavaNext,
    visual: Tensor,
    rows: Rows,
    run_layer: Callable[..., Tensor] | None = None,
    shown: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """visual (B, V, hidden) -> hidden states (B, Tt, hidden) of the text rows behind the last layer, and the sum of
    `grounding` over the layers, zero without `shown`.

    `run_layer` is `decoder_layer`, compiled.
    """
    run_layer = run_layer or decoder_layer
    decoder = model.decoder
    B, Tt = rows.text.shape
    before = decoder.embed(rows.before).expand(B, -1, -1)
    hidden = torch.cat([before, visual, decoder.embed(rows.text)], dim=1)
    cos, sin = decoder.angles(rows.positions.flatten())
    prefix = hidden.shape[1] - Tt
    bias = _prefix_bias(prefix, hidden.device), _text_bias(rows.segments, Tt)
    hidden = hidden.flatten(0, 1)
    lacking = hidden.new_zeros(())
    for i in range(len(decoder.layers)):
        if shown is not None:
            lacking = lacking + grounding(model, hidden, rows, shown, i)
        hidden = run_layer(decoder.layer(i), hidden, cos, sin, bias, B, is_last=i == len(decoder.layers) - 1)
    return hidden.unflatten(0, (B, Tt)), lacking


def grounding(model: LlavaNext, hidden: Tensor, rows: Rows, shown: Tensor, index: int) -> Tensor:
    """How little of their attention the told heads of a layer give to where the answers are: mean of -log(mass), ().

    hidden (B T, hidden) before layer `index`; shown (B, Tt, V) bool. Zero for a layer that is not told.
    """
    heads = [head for layer, head in GROUNDED if layer == index]
    told = shown.any(-1)
    if not heads or not told.any():
        return hidden.new_zeros(())
    B, Tt = rows.text.shape
    layer = model.decoder.layer(index)
    q, k, _ = layer.project(hidden, *model.decoder.angles(rows.positions.flatten()))  # each (heads, B T, D)
    start, stop = len(rows.before), len(rows.before) + shown.shape[2]
    bias = _text_bias(rows.segments, Tt)[:, 0].float()
    lacking = []
    for head in heads:
        queries, keys = (x[head].float().unflatten(0, (B, -1)) for x in (q, k))
        scores = (queries[:, -Tt:] * q.shape[-1] ** -0.5) @ keys.transpose(1, 2) + bias
        mass = (scores.softmax(-1)[:, :, start:stop] * shown).sum(-1)[told]
        lacking.append(-mass.clamp(min=1e-6).log().mean())
    return torch.stack(lacking).sum()


def decoder_layer(
    layer: DecoderLayer,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: tuple[Tensor, Tensor],
    B: int,
    *,
    is_last: bool,
) -> Tensor:
    """hidden (B T, hidden) -> the same behind this layer; of the last layer only the text rows, (B Tt, hidden).

    The visual prefix sees only itself, so its scores are not computed against the text; nor is anything of it computed
    that nobody reads.
    """
    q, k, v = (x.unflatten(1, (B, -1)).transpose(0, 1) for x in layer.project(hidden, cos, sin))  # (B, heads, T, D)
    q, k = q.to(v.dtype), k.to(v.dtype)
    prefix = bias[0].shape[-1]
    attended = _attend(q[:, :, prefix:], k, v, bias[1])
    if is_last:
        hidden = hidden.unflatten(0, (B, -1))[:, prefix:].flatten(0, 1)
    else:
        seen = _attend(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], bias[0])
        attended = torch.cat([seen, attended], dim=2)
    return layer.finish(hidden, attended.transpose(0, 1).flatten(1, 2))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """q (B, H, M, D), k and v (B, H_kv, N, D), bias (B or 1, 1, M, N) -> (B, H, M, D). Plain products, for a backward
    pass that is fast on a CPU too; the rows of the heads that share keys stand behind each other."""
    B, H, M, D = q.shape
    shared = k.shape[1]
    rows = (q * D**-0.5).reshape(B, shared, -1, D)
    scores = (rows @ k.transpose(2, 3)).view(B, H, M, -1) + bias
    weights = scores.softmax(-1).to(v.dtype)
    return (weights.view(B, shared, -1, k.shape[2]) @ v).view(B, H, M, D)


def _prefix_bias(prefix: int, device: torch.device) -> Tensor:
    """(1, 1, P, P) bfloat16: 0 where a row of the prefix may see, else far below every score."""
    seen = torch.ones(prefix, prefix, dtype=torch.bool, device=device).tril()
    return torch.zeros(seen.shape, dtype=torch.bfloat16, device=device).masked_fill(~seen, UNSEEN)[None, None]


def _text_bias(segments: Tensor, Tt: int) -> Tensor:
    """segments (B, T) -> (B, 1, Tt, T) bfloat16 for the text rows. Padding sees itself, so that no row is empty."""
    T = segments.shape[1]
    rows, cols = segments[:, T - Tt :, None], segments[:, None, :]
    at = torch.arange(T, device=segments.device)
    own = at == at[T - Tt :, None]
    seen = ((at <= at[T - Tt :, None]) & ((cols == 0) | (cols == rows)) & (cols >= 0)) | own
    return torch.zeros(seen.shape, dtype=torch.bfloat16, device=seen.device).masked_fill(~seen, UNSEEN)[:, None]


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
