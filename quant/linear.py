"""Linear layers: one call, one loader, whatever the precision.

A layer is built empty, says which matrices it waits for (`waits_for`) and is handed each of them (`fill`): a tensor of
floats, or a value of `scheme.py`. When a quantised one has all of them it turns them once into what its op reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.activation import activation
from ..kernels.quantize_rows import RowNorm
from ..kernels.w4a16 import W4A16Layout, pack_w4a16, w4a16
from ..kernels.w8a8 import pack_w8a8, w8a8
from .scheme import Int4Weight, Int8Weight

StoredWeight = Tensor | Int4Weight | Int8Weight


class LinearLayer(nn.Module, ABC):
    """y = x W^T + b.

    `parts` names the checkpoint matrices that stand in one weight, row after row, e.g.
    `{"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}`; one matrix has a plain number of rows. The bias is a parameter
    in the model's dtype, filled by rows like the weight.
    """

    scheme: str  # for people: "W4A16"; empty for a layer in the model's dtype

    def __init__(self, in_features: int, parts: int | Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts: dict[str, slice] = {}  # checkpoint name -> rows; empty for a single matrix
        rows = 0
        if isinstance(parts, int):
            rows = parts
        else:
            for name, size in parts.items():
                self.parts[name] = slice(rows, rows + size)
                rows += size
        self.out_features = rows
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None

    def waits_for(self) -> dict[str, tuple[int, int]]:
        """Shape (rows, in_features) of every matrix by its part's name; a single one has the name ""."""
        if not self.parts:
            return {"": (self.out_features, self.in_features)}
        return {name: (rows.stop - rows.start, self.in_features) for name, rows in self.parts.items()}

    @abstractmethod
    def fill(self, part: str, weight: StoredWeight, *, dtype: torch.dtype, device: torch.device) -> None:
        """Takes the matrix of one part, once. `dtype` is the model's; the layer ends up on `device`."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""

    def fused(self, x: Tensor, *, norm: nn.Module | None = None, act: str = "") -> Tensor:
        """act(forward(norm(x))), `act` a name of `kernels.activation`: in fewer passes where the layer has such."""
        y = self(x if norm is None else norm(x))
        return activation(y, act) if act else y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class Linear(LinearLayer):
    """The weights' own dtype; the one that can be trained."""

    scheme = ""

    def __init__(self, in_features: int, parts: int | Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__(in_features, parts, bias=bias)
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features), requires_grad=False)

    def fill(self, part: str, weight: StoredWeight, *, dtype: torch.dtype, device: torch.device) -> None:
        assert isinstance(weight, Tensor)
        assert tuple(weight.shape) == self.waits_for()[part]
        if self.weight.is_meta:
            empty = torch.empty(self.weight.shape, dtype=dtype, device=device)
            self.weight = nn.Parameter(empty, requires_grad=False)
        self.weight.data[self.parts.get(part, slice(None))].copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _QuantisedLinear(LinearLayer):
    """Collects its parts, then packs them. Not trainable."""

    def __init__(self, in_features: int, parts: int | Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__(in_features, parts, bias=bias)
        self._arrived: dict[str, Int4Weight | Int8Weight] = {}

    def fill(self, part: str, weight: StoredWeight, *, dtype: torch.dtype, device: torch.device) -> None:
        assert isinstance(weight, (Int4Weight, Int8Weight))
        wanted = self.waits_for()
        assert part not in self._arrived
        assert (weight.out_features, weight.in_features) == wanted[part]
        self._arrived[part] = weight
        if len(self._arrived) == len(wanted):
            arrived = [self._arrived[name] for name in wanted]
            self._arrived.clear()
            self._pack(arrived, device)

    @abstractmethod
    def _pack(self, parts: list[Int4Weight | Int8Weight], device: torch.device) -> None:
        """Sets the parameters from the parts, in the order of their rows."""


class W4A16Linear(_QuantisedLinear):
    """4-bit weights in groups along the inputs, activations in the model's dtype."""

    scheme = "W4A16"

    def __init__(
        self, in_features: int, parts: int | Mapping[str, int], *, group_size: int, bias: bool = False
    ) -> None:
        super().__init__(in_features, parts, bias=bias)
        self.group_size = group_size
        self.layout = W4A16Layout(self.out_features, in_features, group_size)
        self.qweight: nn.Parameter | None = None  # see kernels/w4a16.py
        self.scales: nn.Parameter | None = None
        self.zeros: nn.Parameter | None = None

    def _pack(self, parts: list[Int4Weight | Int8Weight], device: torch.device) -> None:
        found = [part for part in parts if isinstance(part, Int4Weight) and part.group_size == self.group_size]
        assert len(found) == len(parts)
        qweight, scales, zeros, self.layout = pack_w4a16(
            torch.cat([part.codes.to(device) for part in found]),
            torch.cat([part.scales.to(device, torch.float32) for part in found]),
            torch.cat([part.zeros.to(device) for part in found]),
            self.in_features,
            self.group_size,
        )
        self.qweight = nn.Parameter(qweight, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.zeros = nn.Parameter(zeros, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        assert self.qweight is not None, "the layer has not been filled"
        assert self.scales is not None
        assert self.zeros is not None
        return w4a16(x, self.qweight, self.scales, self.zeros, self.layout, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


class _Int8Linear(_QuantisedLinear):
    """Codes of 8 bits with a scale per output, activations quantised to 8 bits per token while running.

    On a CPU without machine code for them the weights may be packed so that they can neither be copied nor saved.
    """

    def __init__(self, in_features: int, parts: int | Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__(in_features, parts, bias=bias)
        self.qweight: nn.Parameter | None = None  # see kernels/w8a8.py
        self.scales: nn.Parameter | None = None  # (out_features,) float32

    def _pack_int8(self, parts: list[Int8Weight], device: torch.device) -> None:
        codes = torch.cat([part.codes.to(device) for part in parts])
        self.qweight = nn.Parameter(pack_w8a8(codes), requires_grad=False)
        scales = torch.cat([part.scales.to(device, torch.float32) for part in parts])
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        assert self.qweight is not None, "the layer has not been filled"
        assert self.scales is not None
        return w8a8(x, self.qweight, self.scales, self.bias, shape=(self.out_features, self.in_features))

    def fused(self, x: Tensor, *, norm: nn.Module | None = None, act: str = "") -> Tensor:
        assert self.qweight is not None, "the layer has not been filled"
        assert self.scales is not None
        if norm is None:
            rows = None
        else:
            assert isinstance(norm.weight, Tensor)
            assert isinstance(norm.eps, float)
            bias = getattr(norm, "bias", None)  # an RMSNorm has none
            rows = RowNorm(norm.weight, bias, norm.eps)
        shape = (self.out_features, self.in_features)
        return w8a8(x, self.qweight, self.scales, self.bias, shape=shape, norm=rows, act=act)


class W8A8Linear(_Int8Linear):
    """Weights that the checkpoint has in 8 bits."""

    scheme = "W8A8"

    def _pack(self, parts: list[Int4Weight | Int8Weight], device: torch.device) -> None:
        found = [part for part in parts if isinstance(part, Int8Weight)]
        assert len(found) == len(parts)
        self._pack_int8(found, device)


class W4A8Linear(_Int8Linear):
    """Weights that the checkpoint has in 4 bits, widened to 8 at load: twice the memory of W4A16, an int8 product.

    A product of 8-bit codes has room for one scale per output, 4-bit weights have one per group: they are rounded once
    more (`Int4Weight.to_int8`).
    """

    scheme = "W4A8"

    def _pack(self, parts: list[Int4Weight | Int8Weight], device: torch.device) -> None:
        found = [part for part in parts if isinstance(part, Int4Weight)]
        assert len(found) == len(parts)
        self._pack_int8([part.to_int8() for part in found], device)


def quantised_like(old: LinearLayer, group_size: int | None, *, w4a8: bool = False) -> LinearLayer:
    """An empty layer on `meta` of the same sizes and parts: for 4 bits in groups of `group_size`, for 8 bits of None.

    `w4a8` quantises the activations of 4-bit weights too.
    """
    parts = {name: rows.stop - rows.start for name, rows in old.parts.items()} or old.out_features
    with torch.device("meta"):
        if group_size is None:
            return W8A8Linear(old.in_features, parts, bias=old.bias is not None)
        if w4a8:
            return W4A8Linear(old.in_features, parts, bias=old.bias is not None)
        return W4A16Linear(old.in_features, parts, group_size=group_size, bias=old.bias is not None)


def num_parameters(module: nn.Module) -> int:
    """Weights and biases of the model, quantised or not. Scales and zero points do not count."""
    counted: dict[int, int] = {}
    for part in module.modules():
        if isinstance(part, _QuantisedLinear):
            counted[id(part)] = part.in_features * part.out_features + (0 if part.bias is None else part.out_features)
        else:
            counted.update({id(p): p.numel() for p in part.parameters(recurse=False)})
    return sum(counted.values())
