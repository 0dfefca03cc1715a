"""The layouts of AutoAWQ: gemm, gemv and gemv_fast, read into `Int4Weight`, and gemm written.

In all of them w[n, k] = scale[n, k // g] * (code[n, k] - zero[n, k // g]), and words hold nibbles from the low end.

    gemm       qweight int32 (K, N / 8): nibble i of a word is column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight;
               qzeros int32 (G, N / 8) in the same order; scales float16 (G, N)
    gemv       qweight int32 (N, K / 8), qzeros int32 (N, Z), scales float16 (N, 8 Z); columns in order, groups
               padded with 0 to 8 Z
    gemv_fast  qweight int16 (N / 4, K), below; scales float16 (8 Z, N); `qzeros` float16 (8 Z, N) = -zero * scale

gemv_fast: with r = n % 4, b = k // 64, c = k % 64 // 32, i = k % 32 // 8, m = k % 8, the code (n, k) is bits
4i..4i+3 of element [n // 4, 64 b + 16 r + 8 c + m].

N output features, K input features, g group size, G = K / g. Source: AutoAWQ 0.2.9, `awq/modules/linear`.

Memory: beside the layer's own tensors reading takes at most 4 times the bytes of `qweight`, result included; gemv
keeps the file's tensor as the result. Writing takes little more than the result.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .scheme import Int4Weight, pack_nibbles, unpack_nibbles
from .stored_layer import StoredLayer, as_bytes, as_int32, num_groups

Layout = Literal["gemm", "gemv", "gemv_fast"]

SUFFIXES = ("qweight", "qzeros", "scales")

_WORD = 8  # nibbles in an int32
_NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]  # gemm
_LOW_COLUMNS, _HIGH_COLUMNS = [0, 4, 1, 5], [2, 6, 3, 7]  # gemm: those in the low and high nibbles of a word's bytes
_ROWS_AT_ONCE = 512  # gemm: packed at a time; a multiple of 8
_ROWS, _BLOCK = 4, 64  # gemv_fast: what one row of int16 interleaves, and the columns after which it repeats
_ZERO_TOLERANCE = 0.05  # gemv_fast: -qzeros / scales is off by at most 15 * 2**-11 from float16's rounding


def layout_of(layer: StoredLayer) -> Layout:
    """Which of the three a layer with a `qweight` is in, from its tensors alone.

    gemm and gemv differ in their scales: gemv has a row of them per row of `qweight`, gemm one per `group_size` rows.
    A square matrix is no exception, though its `qweight` has one shape in both: for gemm to have as many rows of
    scales as of `qweight` a group would have to be a single input, which the config's parser refuses.
    """
    qweight, scales = layer.get("qweight"), layer.get("scales")
    if qweight.dtype == torch.int16:
        return "gemv_fast"
    rows = tuple(tensor.shape[0] if tensor.ndim else 0 for tensor in (qweight, scales))
    return "gemv" if rows[0] == rows[1] else "gemm"


def padded_groups(in_features: int, group_size: int) -> int:
    """Columns of scales in gemv and gemv_fast: groups, padded to whole words and, below 128, to several words."""
    words = -(-(in_features // group_size) // _WORD)
    multiple = max(1, 128 // group_size)
    return -(-words // multiple) * multiple * _WORD


def check(layer: StoredLayer, layout: Layout, shape: tuple[int, int], group_size: int) -> None:
    """Holds every tensor's shape and dtype to a matrix of `shape` (N, K). Raises CorruptCheckpoint."""
    N, K = shape
    groups = num_groups(layer.name, K, group_size)
    divisors = {"gemm": (_WORD, 1), "gemv": (1, _WORD), "gemv_fast": (_ROWS, _BLOCK)}[layout]
    if N % divisors[0] or K % divisors[1]:
        raise layer.corrupt("qweight", f"the layout {layout} cannot hold a matrix of {N} x {K}")
    layer.check_names(SUFFIXES)
    half, word = (torch.float16,), (torch.int32,)
    if layout == "gemm":
        layer.check("qweight", (K, N // _WORD), word)
        layer.check("qzeros", (groups, N // _WORD), word)
        layer.check("scales", (groups, N), half)
        return
    padded = padded_groups(K, group_size)
    if layout == "gemv":
        layer.check("qweight", (N, K // _WORD), word)
        layer.check("qzeros", (N, padded // _WORD), word)
        layer.check("scales", (N, padded), half)
    else:
        layer.check("qweight", (N // _ROWS, K), (torch.int16,))
        layer.check("qzeros", (padded, N), half)
        layer.check("scales", (padded, N), half)


def read_awq(
    layer: StoredLayer, shape: tuple[int, int], group_size: int, *, layout: Layout | None = None, verify: bool = True
) -> Int4Weight:
    """A layer in one of AutoAWQ's layouts as a matrix of `shape` (N, K); scales stay float16.

    `layout=None` takes it from the tensors. `verify=False` skips the scan of the scales. Raises CorruptCheckpoint.
    """
    layout = layout or layout_of(layer)
    check(layer, layout, shape, group_size)
    read = {"gemm": _read_gemm, "gemv": _read_gemv, "gemv_fast": _read_gemv_fast}[layout]
    weight = read(layer, shape, group_size)
    if verify:
        layer.check_scales("scales", weight.scales)
    return weight


def write_awq_gemm(weight: Int4Weight) -> dict[str, Tensor]:
    """`qweight`, `qzeros` and `scales` in the gemm layout: the inverse of `read_awq`.

    Raises ValueError where the layout cannot hold the matrix: N no multiple of 8, a ragged last group, or scales that
    are not float16 (rounding them here would move weights whose codes were chosen for other scales).
    """
    N, K = weight.out_features, weight.in_features
    if N % _WORD or K % weight.group_size:
        raise ValueError(f"expected rows in eights and whole groups, got {N} x {K} in groups of {weight.group_size}")
    if weight.scales.dtype != torch.float16:
        raise ValueError(f"expected float16 scales, got {weight.scales.dtype}")
    return {
        "qweight": _gemm_words(weight.codes, K),
        "qzeros": _gemm_words(pack_nibbles(weight.zeros), weight.zeros.shape[1]),
        "scales": weight.scales.t().contiguous(),
    }


# gemm ---------------------------------------------------------------------------------------------------------------


def _read_gemm(layer: StoredLayer, shape: tuple[int, int], group_size: int) -> Int4Weight:
    N, K = shape
    codes = _gemm_codes(layer.get("qweight"))
    nibbles = unpack_nibbles(as_bytes(layer.get("qzeros")), N).view(-1, N // _WORD, _WORD)  # (G, N / 8, 8)
    zeros = nibbles[:, :, _NIBBLE_OF_COLUMN].reshape(-1, N).t().contiguous()
    return Int4Weight(codes, layer.get("scales").t().contiguous(), zeros, K, group_size)


def _gemm_codes(words: Tensor) -> Tensor:
    """(K, N / 8) int32 as in `qweight` -> (N, ceil(K / 2)) uint8 as in `Int4Weight`."""
    if len(words) % 2:
        words = F.pad(words, (0, 0, 0, 1))
    # Turning whole words round first, then the bytes of one word's rows at a time, is friendlier to caches.
    by_byte = as_bytes(words.t()).view(words.shape[1], len(words), 4)
    low, high = _swap(by_byte[:, 0::2], by_byte[:, 1::2])  # (N / 8, K / 2, 4) each
    codes = torch.empty(words.shape[1], _WORD, low.shape[1], dtype=torch.uint8, device=words.device)
    for byte in range(4):
        codes[:, _LOW_COLUMNS[byte]] = low[:, :, byte]
        codes[:, _HIGH_COLUMNS[byte]] = high[:, :, byte]
    return codes.flatten(0, 1)


def _gemm_words(codes: Tensor, K: int) -> Tensor:
    """(N, ceil(K / 2)) uint8 as in `Int4Weight` -> (K, N / 8) int32, the inverse of `_gemm_codes`."""
    words = torch.empty(K, len(codes) // _WORD, dtype=torch.int32, device=codes.device)
    for rows in range(0, len(codes), _ROWS_AT_ONCE):  # what is in between takes four times the memory of its rows
        part = _gemm_words_of_rows(codes[rows : rows + _ROWS_AT_ONCE], K)
        words[:, rows // _WORD : rows // _WORD + part.shape[1]] = part
    return words


def _gemm_words_of_rows(codes: Tensor, K: int) -> Tensor:
    N, pairs = codes.shape
    by_word = codes.reshape(N // _WORD, _WORD, pairs)
    even, odd = _swap(by_word[:, _LOW_COLUMNS], by_word[:, _HIGH_COLUMNS])  # (N / 8, 4, K / 2) each
    by_byte = torch.stack((even, odd), dim=3).permute(0, 2, 3, 1)  # (N / 8, K / 2, 2, 4)
    return as_int32(by_byte.reshape(N // _WORD, 8 * pairs))[:, :K].t()


# gemv and gemv_fast -------------------------------------------------------------------------------------------------


def _read_gemv(layer: StoredLayer, shape: tuple[int, int], group_size: int) -> Int4Weight:
    groups = shape[1] // group_size
    codes = as_bytes(layer.get("qweight"))  # columns in order: already what Int4Weight holds
    zeros = unpack_nibbles(as_bytes(layer.get("qzeros")), groups).contiguous()
    return Int4Weight(codes, layer.get("scales")[:, :groups].contiguous(), zeros, shape[1], group_size)


def _read_gemv_fast(layer: StoredLayer, shape: tuple[int, int], group_size: int) -> Int4Weight:
    N, K = shape
    groups = K // group_size
    scales = layer.get("scales")[:groups].t().contiguous()
    zeros = _zeros_from_products(layer, layer.get("qzeros")[:groups].t(), scales)
    # Axes of the file's bytes: n // 4, b, r, c, m // 2, m % 2, i // 2; the halves of a byte are i % 2.
    words = as_bytes(layer.get("qweight")).view(N // _ROWS, K // _BLOCK, _ROWS, 2, 4, 2, 2)
    low, high = _swap(words[..., 0, :], words[..., 1, :])
    codes = torch.empty(N, K // 2, dtype=torch.uint8, device=words.device)
    target = codes.view(N // _ROWS, _ROWS, K // _BLOCK, 2, 2, 2, 4)  # n // 4, r, b, c, i // 2, i % 2, m // 2
    target[..., 0, :] = low.permute(0, 2, 1, 3, 5, 4)
    target[..., 1, :] = high.permute(0, 2, 1, 3, 5, 4)
    return Int4Weight(codes, scales, zeros, K, group_size)


def _zeros_from_products(layer: StoredLayer, products: Tensor, scales: Tensor) -> Tensor:
    """The zero points z of products -z * scale, both (N, G) float16 -> (N, G) uint8."""
    exact = -products.float() / scales.float()
    zeros = exact.round()
    # NaN, from a scale of 0 or a value that is no number, fails every comparison.
    if not bool((((exact - zeros).abs() <= _ZERO_TOLERANCE) & (zeros >= 0) & (zeros <= 15)).all()):
        raise layer.corrupt("qzeros", "holds a value that is not -z times its scale for a zero point z of 0 to 15")
    return zeros.to(torch.uint8)


# nibbles ------------------------------------------------------------------------------------------------------------


def _swap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two equal shapes of uint8 -> their low nibbles together and their high ones, the first in the low half.

    Its own inverse.
    """
    low = first & 15
    low |= second << 4
    high = second & 0xF0
    high |= first >> 4
    return low, high
