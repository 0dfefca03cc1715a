"""What a quantised weight is, apart from any file format and any kernel's layout.

    int4:  w[n, k] = scale[n, k // g] * (code[n, k] - zero[n, k // g])      codes and zeros 0..15
    int8:  w[n, k] = scale[n] * code[n, k]                                  codes -128..127

Files are read into these values and written from them (`formats.py`); layers turn them once into what their op wants
(`linear.py`). Source of the schemes: AWQ, arXiv 2306.00978; SmoothQuant, arXiv 2211.10438. Sizes: N output features,
K input features, g group size, G = ceil(K / g) groups; the last group may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.w4a16 import unpack_nibbles as unpack_nibbles  # the other half of `pack_nibbles`

_WIDE_ENTRIES = 1 << 22


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A matrix of 4-bit codes with a scale and a zero point for each group of a row."""

    codes: Tensor  # (N, ceil(K / 2)) uint8: the low nibble is the even k, the high one the odd k, 0 past the end
    scales: Tensor  # (N, G) float16, bfloat16 or float32
    zeros: Tensor  # (N, G) uint8; 8 everywhere in a symmetric scheme
    in_features: int
    group_size: int  # K for a whole row

    def __post_init__(self) -> None:
        N, K, g = self.codes.shape[0], self.in_features, self.group_size
        if g < 1 or K < 1:
            raise ValueError(f"expected a group size and a width of at least 1, got {g} and {K}")
        groups = (N, -(-K // g))
        if self.codes.shape != (N, -(-K // 2)) or self.codes.dtype != torch.uint8:
            raise ValueError(
                f"expected codes ({N}, {-(-K // 2)}) uint8, got {tuple(self.codes.shape)} {self.codes.dtype}"
            )
        if self.scales.shape != groups or not self.scales.is_floating_point():
            raise ValueError(f"expected scales {groups} of floats, got {tuple(self.scales.shape)} {self.scales.dtype}")
        if self.zeros.shape != groups or self.zeros.dtype != torch.uint8:
            raise ValueError(f"expected zeros {groups} uint8, got {tuple(self.zeros.shape)} {self.zeros.dtype}")

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (N, K), computed in float32."""
        codes = unpack_nibbles(self.codes, self.in_features)
        group = torch.arange(self.in_features, device=codes.device) // self.group_size
        scales, zeros = self.scales.float()[:, group], self.zeros.float()[:, group]
        return ((codes.float() - zeros) * scales).to(dtype)

    def to_int8(self) -> Int8Weight:
        """The matrix rounded once more, to 8 bits with one scale max|w| / 127 for each row (1 for a row of zeros).

        An entry moves by at most half of its row's scale. Some 2^22 entries are float32 at a time.
        """
        codes, scales = [], []
        for rows in torch.arange(self.out_features).split(max(1, _WIDE_ENTRIES // self.in_features)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            some = replace(self, codes=self.codes[part], scales=self.scales[part], zeros=self.zeros[part]).dequantise()
            scale = some.abs().amax(dim=1) / 127
            scale = torch.where(scale == 0, 1.0, scale)
            codes.append((some / scale[:, None]).round().clamp(-127, 127).to(torch.int8))
            scales.append(scale)
        return Int8Weight(torch.cat(codes), torch.cat(scales))


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A matrix of 8-bit codes with a scale for each row."""

    codes: Tensor  # (N, K) int8
    scales: Tensor  # (N,) float16, bfloat16 or float32

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.int8:
            raise ValueError(f"expected codes (N, K) int8, got {tuple(self.codes.shape)} {self.codes.dtype}")
        if self.scales.shape != self.codes.shape[:1] or not self.scales.is_floating_point():
            N, scales = self.codes.shape[0], self.scales
            raise ValueError(f"expected scales ({N},) of floats, got {tuple(scales.shape)} {scales.dtype}")

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (N, K), computed in float32."""
        return (self.codes.float() * self.scales.float()[:, None]).to(dtype)


def pack_nibbles(codes: Tensor) -> Tensor:
    """codes (N, K) of 0..15, any integer dtype -> (N, ceil(K / 2)) uint8, even k in the low nibble, padded with 0."""
    codes = codes.to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | (codes[:, 1::2] << 4)
