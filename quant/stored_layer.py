"""The tensors of one layer as a checkpoint holds them, and the checks that every format shares.

A checkpoint is untrusted: each tensor is held to the shape and dtype that follow from the model's own sizes before
anything is made of it, so no number of the file decides about an allocation. Errors name the tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CorruptCheckpoint, UnsupportedModel

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Suffixes that mean something this engine does not compute, and what that is.
_UNSUPPORTED = {
    "g_idx": "inputs reordered by their activations (g_idx)",
    "weight_g_idx": "inputs reordered by their activations (g_idx)",
    "input_scale": "a static scale of the inputs",
    "input_zero_point": "a static zero point of the inputs",
    "input_global_scale": "a static scale of the inputs",
    "output_scale": "quantised outputs",
    "output_zero_point": "quantised outputs",
    "weight_global_scale": "a second scale of the weights",
    "bitmask": "sparse weights",
    "compressed": "sparse weights",
    "meta": "sparse weights",
}


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """What a checkpoint has under one layer's name.

    `tensors` by suffix, e.g. "qweight" for "model.layers.0.mlp.up_proj.qweight". For checks alone tensors on `meta`
    will do, so a loader can refuse a layer by the headers of its file, before it reads a byte of it.
    """

    name: str
    tensors: Mapping[str, Tensor]

    def has(self, suffix: str) -> bool:
        return suffix in self.tensors

    def corrupt(self, suffix: str, reason: str) -> CorruptCheckpoint:
        """The error to raise about one tensor."""
        return CorruptCheckpoint(f"tensor {self.name}.{suffix}: {reason}")

    def unsupported(self, suffix: str, what: str) -> UnsupportedModel:
        """The error to raise about a tensor that is in order and means something not computed here."""
        return UnsupportedModel(f"tensor {self.name}.{suffix}: {what} is not supported")

    def get(self, suffix: str) -> Tensor:
        if suffix not in self.tensors:
            found = ", ".join(sorted(self.tensors)) or "nothing"
            raise self.corrupt(suffix, f"missing; the layer has {found}")
        return self.tensors[suffix]

    def check(self, suffix: str, shape: tuple[int, ...], dtypes: Collection[torch.dtype]) -> None:
        """Raises CorruptCheckpoint unless the tensor is there with this shape and one of these dtypes."""
        tensor = self.get(suffix)
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.corrupt(suffix, f"expected {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
        if tuple(tensor.shape) != shape:
            raise self.corrupt(suffix, f"expected shape {shape}, got {tuple(tensor.shape)}")

    def check_names(self, known: Collection[str]) -> None:
        """Raises UnsupportedModel or CorruptCheckpoint where the layer has a tensor beside those and a bias."""
        for suffix in self.tensors.keys() - set(known) - {"bias"}:
            if suffix in _UNSUPPORTED:
                raise self.unsupported(suffix, _UNSUPPORTED[suffix])
            raise self.corrupt(suffix, f"does not belong beside {', '.join(known)}")

    def check_scales(self, suffix: str, scales: Tensor) -> None:
        """Raises CorruptCheckpoint unless all are finite and none is zero. Reads every value."""
        if not bool(torch.isfinite(scales).all()):
            raise self.corrupt(suffix, "holds a scale that is not a finite number")
        if bool((scales == 0).any()):
            raise self.corrupt(suffix, "holds a scale of 0")


def num_groups(name: str, in_features: int, group_size: int) -> int:
    """Scales in a row. Raises CorruptCheckpoint unless the group size divides the width."""
    if group_size < 1 or in_features % group_size:
        raise CorruptCheckpoint(f"layer {name}: a group size of {group_size} does not divide its {in_features} inputs")
    return in_features // group_size


def as_bytes(words: Tensor) -> Tensor:
    """(rows, n) of an integer dtype -> (rows, bytes) uint8, the low byte first, as in every file and on every platform.

    The same memory where the rows lie behind each other.
    """
    return _flat(words).view(torch.uint8).view(len(words), -1)


def as_int32(rows: Tensor) -> Tensor:
    """(rows, bytes) uint8, a multiple of 4 -> (rows, bytes / 4) int32, the inverse of `as_bytes`."""
    return _flat(rows).view(torch.int32).view(len(rows), -1)


def _flat(rows: Tensor) -> Tensor:
    """All elements in order, with a stride of 1: a side of length 1 may have any, which `view(dtype)` refuses."""
    return rows.contiguous().as_strided((rows.numel(),), (1,))
