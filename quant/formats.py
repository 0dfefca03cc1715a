"""Quantised layers of a checkpoint: which format each is in, and its weight as a value of `scheme.py`.

    for name, tensors in by_layer(...).items():
        layer = StoredLayer(name, tensors)
        if detect(layer) != "dense":
            weight = read_layer(layer, (out_features, in_features), config)

A layer's format is what its tensors are, one layer at a time: lists of exceptions in configs are wrong too often. The
config adds what tensors do not say (group size, symmetry), and where it contradicts them the layer is refused.

Names are those of the layer in the file; a bias is left to the caller. Every function works on one layer and holds
no more than it: see the formats' own files for the factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

import torch

from ..errors import CorruptCheckpoint
from . import awq_format, compressed_format
from .quantization_config import QuantizationConfig, Scheme
from .scheme import Int4Weight, Int8Weight
from .stored_layer import StoredLayer

Format = Literal["dense", "awq_gemm", "awq_gemv", "awq_gemv_fast", "pack_quantized", "int_quantized"]

_AWQ: dict[awq_format.Layout, Format] = {"gemm": "awq_gemm", "gemv": "awq_gemv", "gemv_fast": "awq_gemv_fast"}
_LAYOUT: dict[Format, awq_format.Layout] = {name: layout for layout, name in _AWQ.items()}
_METHOD = {"pack_quantized": "compressed-tensors", "int_quantized": "compressed-tensors"}

T = TypeVar("T")


def by_layer(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Tensors of a checkpoint by layer and suffix: {"a.b.qweight": t} -> {"a.b": {"qweight": t}}."""
    layers: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        layers.setdefault(layer, {})[suffix] = tensor
    return layers


def detect(layer: StoredLayer) -> Format:
    """The format of one layer, from the names, dtypes and shapes of its tensors.

    Anything that is none of the quantised formats is "dense", norms and embeddings included; the loader's own checks
    are for those. Raises CorruptCheckpoint for tensors of two formats at once.
    """
    marks = {
        "qweight": layer.has("qweight"),
        "weight_packed": layer.has("weight_packed"),
        "weight": layer.has("weight"),
    }
    found = [suffix for suffix, there in marks.items() if there]
    if len(found) > 1:
        raise layer.corrupt(found[0], f"the layer also has {found[1]}: two formats at once")
    if found == ["qweight"]:
        return _AWQ[awq_format.layout_of(layer)]
    if found == ["weight_packed"]:
        return "pack_quantized"
    if found == ["weight"] and (layer.get("weight").dtype == torch.int8 or layer.has("weight_scale")):
        return "int_quantized"
    return "dense"


def check_layer(layer: StoredLayer, shape: tuple[int, int], config: QuantizationConfig) -> Scheme:
    """Whether a quantised layer holds a matrix of `shape` (N, K) as the config says; returns its scheme.

    Looks at names, shapes and dtypes alone: tensors on `meta` will do. Raises CorruptCheckpoint that names the tensor,
    or UnsupportedModel.
    """
    form = detect(layer)
    if form == "dense":
        raise CorruptCheckpoint(f"layer {layer.name}: expected a quantised layer, got {', '.join(layer.tensors)}")
    method = _METHOD.get(form, "awq")
    if method != config.method:
        raise CorruptCheckpoint(f"layer {layer.name}: its tensors are {form}, quantization_config says {config.method}")
    scheme = config.scheme_for(layer.name, 8 if form == "int_quantized" else 4)
    if form in _LAYOUT:
        if config.layout not in (None, _LAYOUT[form]):
            raise CorruptCheckpoint(
                f"layer {layer.name}: its tensors are in the layout {_LAYOUT[form]}, quantization_config says "
                f"{config.layout}"
            )
        awq_format.check(layer, _LAYOUT[form], shape, scheme.group_of(shape[1]))
    elif form == "pack_quantized":
        group_size = scheme.group_of(shape[1])
        compressed_format.check_pack_quantized(layer, shape, group_size, symmetric=scheme.symmetric)
    else:
        compressed_format.check_int_quantized(layer, shape)
    return scheme


def read_layer(
    layer: StoredLayer, shape: tuple[int, int], config: QuantizationConfig, *, verify: bool = True
) -> Int4Weight | Int8Weight:
    """The weight of a quantised layer that the model has with `shape` (N, K).

    `verify=False` skips the scan of the scales for zeros and values that are no numbers. Raises as `check_layer`.
    """
    scheme = check_layer(layer, shape, config)
    form, group_size = detect(layer), scheme.group_of(shape[1])
    if form in _LAYOUT:
        return awq_format.read_awq(layer, shape, group_size, layout=_LAYOUT[form], verify=verify)
    if form == "pack_quantized":
        return compressed_format.read_pack_quantized(
            layer, shape, group_size, symmetric=scheme.symmetric, verify=verify
        )
    return compressed_format.read_int_quantized(layer, shape, verify=verify)
