"""Quantises one block of a model by its own description (`scale_group.py`): AWQ to 4 bits, SmoothQuant to 8.

    stats = collect({name: layer ...}, calls)            the inputs of every linear layer, from a float run
    done = awq_block(block, stats, Rounding(128))        scales searched and folded, ranges clipped, weights rounded
    install(block, done.weights)                         the block computes with what will be stored

Every function works in place on a block in float32 and holds nothing beyond it but sampled rows, one temporary of the
searches, and the codes. Without `stats` the weights are rounded to the nearest code and nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .awq import ClipRecord, HeadGroups, Rounding, clip, fold_scales, quantise_int4, search_clip, search_scales
from .calibration import ChannelStats, SearchRecord
from .linear import Linear, LinearLayer, quantised_like
from .plan import matrices_of
from .scale_group import ScaledBlock
from .scheme import Int4Weight, Int8Weight
from .smoothquant import quantise_int8, search_smoothing

Check = Callable[[], None]  # called between steps of a search; what it raises stops the work
_Search = Callable[[list[Linear], ChannelStats, HeadGroups | None], tuple[Tensor, SearchRecord]]


@dataclass(frozen=True)
class BlockRecord:
    """What the searches found in one block."""

    scales: tuple[SearchRecord, ...] = ()
    clips: tuple[ClipRecord, ...] = ()
    unscaled: tuple[tuple[str, str], ...] = ()  # inputs that were not scaled, and why


@dataclass(frozen=True, eq=False)
class QuantisedBlock:
    """A block as it is stored. Names are the block's own, the parts of fused layers each by its own name."""

    weights: Mapping[str, Int4Weight | Int8Weight]  # by matrix, e.g. "self_attn.q_proj"
    dense: Mapping[str, Tensor]  # everything else, e.g. "input_layernorm.weight", "self_attn.q_proj.bias"
    record: BlockRecord


def linear_layers(block: nn.Module) -> dict[str, Linear]:
    """The dense linear layers of a block by name; the modules whose inputs are to be collected."""
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, Linear)}


def awq_block(
    block: ScaledBlock, stats: Mapping[str, ChannelStats] | None, rounding: Rounding, *, check: Check = lambda: None
) -> QuantisedBlock:
    """4 bits: scales for every input that has something to fold them into, then clipping, then rounding.

    `stats` by layer name, of the block as it is; None for plain rounding. The block is changed in place: afterwards its
    weights are folded and cut, not rounded. Raises ValueError that names the layer for what is not finite.
    """
    record = BlockRecord()
    if stats is not None:
        inputs, record = _fold_all(
            block,
            stats,
            lambda layers, own, heads: search_scales(layers, own, rounding, heads=heads, progress=_ticks(check)),
        )
        clips = []
        for name, layer in linear_layers(block).items():
            limits, found = search_clip(layer, inputs[name], rounding, progress=_ticks(check))
            clip(layer, limits, rounding.group_size)
            clips.append(found)
        record = replace(record, clips=tuple(clips))

    def to_codes(weight: Tensor, name: str) -> Int4Weight:
        return quantise_int4(
            weight, rounding.group_size, rounding.symmetric, scale_dtype=rounding.scale_dtype, name=name
        )

    return _quantised(block, to_codes, record, check)


def smooth_block(
    block: ScaledBlock, stats: Mapping[str, ChannelStats] | None, *, check: Check = lambda: None
) -> QuantisedBlock:
    """8 bits: smoothing of every input that has something to fold it into, then rounding. As `awq_block` otherwise."""
    record = BlockRecord()
    if stats is not None:
        _, record = _fold_all(
            block,
            stats,
            lambda layers, own, heads: search_smoothing(layers, own, heads=heads, progress=_ticks(check)),
        )
    return _quantised(block, lambda weight, name: quantise_int8(weight, name=name), record, check)


def install(block: nn.Module, weights: Mapping[str, Int4Weight | Int8Weight]) -> None:
    """Replaces the dense linear layers of a block by quantised ones; biases and norms stay the block's."""
    for name, layer in linear_layers(block).items():
        owner, _, leaf = name.rpartition(".")
        parts = {part: weights[_matrix_name(owner, leaf, part)] for part in layer.waits_for()}
        setattr(block.get_submodule(owner), leaf, _quantised_layer(layer, parts))


def _fold_all(
    block: ScaledBlock, stats: Mapping[str, ChannelStats], search: _Search
) -> tuple[dict[str, ChannelStats], BlockRecord]:
    """Searches and folds group after group. Returns the layers' inputs afterwards."""
    inputs: dict[str, ChannelStats] = {}
    records, unscaled = [], []
    for group in block.scale_groups():
        layers, own = list(group.layers.values()), stats[group.name]
        if group.previous is None:
            unscaled.append((group.name, group.unscaled))
        else:
            scales, found = search(layers, own, group.heads)
            fold_scales(group.previous, layers, scales, rows=group.rows, heads=group.heads, name=group.name)
            own = own.divided(scales)
            records.append(found)
        inputs.update({name: replace(own, name=name) for name in group.layers})
    return inputs, BlockRecord(scales=tuple(records), unscaled=tuple(unscaled))


def _quantised(
    block: nn.Module, to_codes: Callable[[Tensor, str], Int4Weight | Int8Weight], record: BlockRecord, check: Check
) -> QuantisedBlock:
    weights = {}
    for name, layer_name, part, _ in matrices_of(block):
        check()
        layer = block.get_submodule(layer_name)
        assert isinstance(layer, Linear)
        weights[name] = to_codes(layer.weight.detach()[layer.parts.get(part, slice(None))], name)
    return QuantisedBlock(weights, _dense_tensors(block), record)


def _dense_tensors(block: nn.Module) -> dict[str, Tensor]:
    """Everything but the matrices of linear layers; a fused bias part by part."""
    layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, LinearLayer)}
    found: dict[str, Tensor] = {}
    for name, parameter in block.named_parameters():
        owner, _, leaf = name.rpartition(".")
        layer = layers.get(owner)
        if layer is None:
            found[name] = parameter.detach()
        elif leaf == "bias":
            outer, _, fused = owner.rpartition(".")
            for part in layer.waits_for():
                rows = layer.parts.get(part, slice(None))
                found[f"{_matrix_name(outer, fused, part)}.bias"] = parameter.detach()[rows]
    return found


def _matrix_name(owner: str, leaf: str, part: str) -> str:
    return ".".join(filter(None, (owner, part or leaf)))


def _quantised_layer(old: Linear, parts: Mapping[str, Int4Weight | Int8Weight]) -> LinearLayer:
    first = next(iter(parts.values()))
    new = quantised_like(old, first.group_size if isinstance(first, Int4Weight) else None)
    for part, weight in parts.items():
        new.fill(part, weight, dtype=old.weight.dtype, device=old.weight.device)
    new.bias = old.bias
    return new


def _ticks(check: Check) -> Callable[[int, int], None]:
    return lambda done, total: check()
