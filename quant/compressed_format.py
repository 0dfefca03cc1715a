"""The formats of compressed-tensors that hold our schemes: pack-quantized (4 bits) and int-quantized (8 bits).

    pack-quantized  weight_packed int32 (N, ceil(K / 8)): code k of a row is nibble k % 8, from the low end, of word
                    k // 8; weight_scale (N, G); weight_shape int64 (2,) = N, K; weight_zero_point int32
                    (ceil(N / 8), G), packed the same way along N, absent in a symmetric scheme, whose zero is 8
    int-quantized   weight int8 (N, K); weight_scale (N, 1)

The tool counts from -8 to 7 and stores the value plus 8, for codes and zero points alike, so the eights cancel in
code - zero. Its bytes are `Int4Weight`'s. N output features, K input features, G groups of a row.
Source: compressed-tensors 0.19.0, `compressors/pack_quantized` and `compressors/naive_quantized`.

Memory: codes are kept in the file's own tensor, or copied once where K is no multiple of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .scheme import Int4Weight, Int8Weight, pack_nibbles, unpack_nibbles
from .stored_layer import SCALE_DTYPES, StoredLayer, as_bytes, as_int32, num_groups

_WORD = 8  # codes in an int32
_SYMMETRIC_ZERO = 8


def check_pack_quantized(layer: StoredLayer, shape: tuple[int, int], group_size: int, *, symmetric: bool) -> None:
    """Holds every tensor's shape and dtype to a matrix of `shape` (N, K). Raises CorruptCheckpoint."""
    N, K = shape
    groups = num_groups(layer.name, K, group_size)
    suffixes = ["weight_packed", "weight_scale", "weight_shape"]
    if not symmetric:
        suffixes.append("weight_zero_point")
    elif layer.has("weight_zero_point"):
        raise layer.corrupt("weight_zero_point", "the config says that the weights are symmetric")
    layer.check_names(suffixes)
    layer.check("weight_packed", (N, -(-K // _WORD)), (torch.int32,))
    layer.check("weight_scale", (N, groups), SCALE_DTYPES)
    layer.check("weight_shape", (2,), (torch.int64, torch.int32))
    if not symmetric:
        layer.check("weight_zero_point", (-(-N // _WORD), groups), (torch.int32,))


def read_pack_quantized(
    layer: StoredLayer, shape: tuple[int, int], group_size: int, *, symmetric: bool, verify: bool = True
) -> Int4Weight:
    """A 4-bit layer as a matrix of `shape` (N, K); scales keep their dtype; group_size K for a scale per row.

    `verify=False` skips the scan of the scales. Raises CorruptCheckpoint.
    """
    check_pack_quantized(layer, shape, group_size, symmetric=symmetric)
    N, K = shape
    stated = tuple(layer.get("weight_shape").tolist())
    if stated != shape:
        raise layer.corrupt("weight_shape", f"expected {shape}, got {stated}")
    scales = layer.get("weight_scale").contiguous()
    if verify:
        layer.check_scales("weight_scale", scales)
    if symmetric:
        zeros = torch.full(scales.shape, _SYMMETRIC_ZERO, dtype=torch.uint8, device=scales.device)
    else:
        packed = as_bytes(layer.get("weight_zero_point").t())  # (G, 4 ceil(N / 8))
        zeros = unpack_nibbles(packed, N).t().contiguous()
    return Int4Weight(_codes(layer.get("weight_packed"), K), scales, zeros, K, group_size)


def write_pack_quantized(weight: Int4Weight, *, symmetric: bool = False) -> dict[str, Tensor]:
    """The tensors of a pack-quantized layer by suffix: the inverse of `read_pack_quantized`.

    Raises ValueError for a ragged last group, or where `symmetric` and a zero point is not 8.
    """
    K = weight.in_features
    if K % weight.group_size:
        raise ValueError(f"expected whole groups, got {K} inputs in groups of {weight.group_size}")
    shape = torch.tensor([weight.out_features, K])
    tensors = {"weight_packed": _words(weight.codes), "weight_scale": weight.scales, "weight_shape": shape}
    if not symmetric:
        return tensors | {"weight_zero_point": _words(pack_nibbles(weight.zeros.t())).t().contiguous()}
    if bool((weight.zeros != _SYMMETRIC_ZERO).any()):
        raise ValueError(f"expected a zero point of {_SYMMETRIC_ZERO} everywhere in a symmetric weight")
    return tensors


def check_int_quantized(layer: StoredLayer, shape: tuple[int, int]) -> None:
    """Holds every tensor's shape and dtype to a matrix of `shape` (N, K). Raises CorruptCheckpoint."""
    if layer.has("weight_zero_point"):
        raise layer.unsupported("weight_zero_point", "a zero point of 8-bit weights")
    layer.check_names(("weight", "weight_scale"))
    layer.check("weight", shape, (torch.int8,))
    layer.check("weight_scale", (shape[0], 1), SCALE_DTYPES)


def read_int_quantized(layer: StoredLayer, shape: tuple[int, int], *, verify: bool = True) -> Int8Weight:
    """An 8-bit layer as a matrix of `shape` (N, K); scales keep their dtype.

    `verify=False` skips the scan of the scales. Raises CorruptCheckpoint, or UnsupportedModel for static inputs.
    """
    check_int_quantized(layer, shape)
    scales = layer.get("weight_scale")[:, 0].contiguous()
    if verify:
        layer.check_scales("weight_scale", scales)
    return Int8Weight(layer.get("weight"), scales)


def write_int_quantized(weight: Int8Weight) -> dict[str, Tensor]:
    """The tensors of an int-quantized layer by suffix: the inverse of `read_int_quantized`."""
    return {"weight": weight.codes, "weight_scale": weight.scales[:, None].contiguous()}


def _codes(words: Tensor, K: int) -> Tensor:
    """(N, ceil(K / 8)) int32 -> (N, ceil(K / 2)) uint8 with nothing in the nibbles behind the last code."""
    codes = as_bytes(words)[:, : -(-K // 2)]
    if K % 2:
        codes = codes.clone()
        codes[:, -1] &= 15
    return codes.contiguous()


def _words(codes: Tensor) -> Tensor:
    """(rows, bytes) uint8 -> (rows, ceil(bytes / 4)) int32, padded with 0."""
    return as_int32(F.pad(codes, (0, -codes.shape[1] % 4)))
