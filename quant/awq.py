"""Activation-aware weight quantisation to 4 bits (AWQ, arXiv 2306.00978).

    rounding   w[n, k] ~ scale (code - zero), by groups of g along k                          equation 1
    scaling    Q(w * s) (x / s): channels that matter are rounded on a finer grid             equation 2
    search     s = mean|x|^alpha, the alpha whose output error is least                       equations 4 and 5
    clipping   the range of a group may be narrower than its largest weight                   end of section 3.2

The weight term of `channel_scales` is not in the paper; AutoAWQ has it. Both forms are tried. Scales are folded into
what makes the input (`fold_scales`), so that nothing is left to do at run time. All searches compute in float32.
Sizes: N outputs, K inputs, g group size, G = ceil(K / g) groups, R sampled rows, H heads, H_kv key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .calibration import ChannelStats, Progress, SearchRecord, check_finite
from .linear import Linear
from .scheme import Int4Weight, pack_nibbles

STEPS = 20  # of alpha over 0..1, and of the clip over 1..0.5
MOST_CLIPPED = 0.5
ROWS_AT_A_TIME = 2048  # output rows of a weight that a search holds in float32
NOT_CLIPPED = ("q_proj", "k_proj")  # their product goes through a softmax: errors of one alone do not tell


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded to 4 bits."""

    group_size: int = 128  # the last group of a row may be shorter
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"expected a group size of at least 1, got {self.group_size}")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"expected scales in float16, bfloat16 or float32, got {self.scale_dtype}")


@dataclass(frozen=True)
class HeadGroups:
    """Grouped-query attention: H / H_kv neighbouring heads of o_proj's input are copies of one head of v_proj."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads or self.head_dim < 1:
            raise ValueError(f"expected num_heads a multiple of num_kv_heads, got {self}")

    def share(self, scales: Tensor) -> Tensor:
        """scales (H * D,), all positive -> (H * D,), equal within a group: the geometric mean, thus symmetric in s
        and 1 / s. Scales that differ within a group could not be folded into the one head that feeds it."""
        grouped = scales.reshape(self.num_kv_heads, -1, self.head_dim)
        return grouped.log().mean(dim=1, keepdim=True).exp().expand_as(grouped).flatten()

    def narrow(self, scales: Tensor) -> Tensor:
        """Shared scales (H * D,) -> one for each row of v_proj, (H_kv * D,). Raises if they are not shared."""
        if scales.shape != (self.num_heads * self.head_dim,):
            raise ValueError(f"expected {self.num_heads * self.head_dim} scales, got {tuple(scales.shape)}")
        grouped = scales.reshape(self.num_kv_heads, -1, self.head_dim)
        if not torch.equal(grouped, grouped[:, :1].expand_as(grouped)):
            raise ValueError("expected scales that are equal for all query heads of a key head, got different ones")
        return grouped[:, 0].flatten()


@dataclass(frozen=True)
class ClipRecord:
    """What a clip search found. Errors are mean squared errors of the layer's output on the sampled rows."""

    name: str
    clipped: float  # fraction of the groups that were narrowed
    error_before: float
    error_after: float  # never above `error_before`


# Rounding to the nearest code ---------------------------------------------------------------------------------------


def quantise_int4(
    weight: Tensor,
    group_size: int,
    symmetric: bool = False,
    *,
    scale_dtype: torch.dtype = torch.float16,
    name: str = "weight",
) -> Int4Weight:
    """Rounds weight (N, K) to the nearest of the codes that each group's range allows.

    Asymmetric: scale = (max - min) / 15 with zero inside [min, max], zero point = round(-min / scale). Symmetric:
    scale = max|w| / 7.5, zero point 8. Scales are rounded up to `scale_dtype`, so that the range is always covered and
    no weight is off by more than half a step. A group of zeros has scale 1. Raises ValueError with `name` for a weight
    that is not finite or not a matrix, and for a scale that `scale_dtype` cannot hold.
    """
    _check_matrix(weight, name)
    rounding = Rounding(group_size, symmetric, scale_dtype)
    codes, scales, zeros = _round_groups(_grouped(weight.detach().float(), group_size), rounding, name)
    K = weight.shape[1]
    return Int4Weight(pack_nibbles(codes.flatten(1)[:, :K]), scales, zeros.to(torch.uint8), K, group_size)


def _check_matrix(weight: Tensor, name: str) -> None:
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"{name}: expected a matrix (N, K) of floats, got {tuple(weight.shape)} {weight.dtype}")
    check_finite(weight, name)


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """(N, K) -> (N, G, g). Zeros fill up the last group: they are inside every range, so they change none."""
    N, K = weight.shape
    return F.pad(weight, (0, -K % group_size)).reshape(N, -1, group_size)


def _round_groups(groups: Tensor, rounding: Rounding, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """groups (N, G, g) float32 -> codes (N, G, g) float32 of 0..15, scales (N, G), zeros (N, G) float32."""
    low = groups.amin(dim=2).clamp(max=0)
    full = groups.amax(dim=2).clamp(min=0) - low
    scale = groups.abs().amax(dim=2) / 7.5 if rounding.symmetric else full / 15
    scales = round_up(torch.where(scale == 0, 1.0, scale), rounding.scale_dtype)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{name}: weights up to {float(groups.abs().max()):.3g} need scales above {scales.dtype}")
    step = scales.float()
    zeros = torch.full_like(step, 8) if rounding.symmetric else (-low / step).round().clamp(0, 15)
    codes = ((groups / step[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes, scales, zeros


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale, float32 and positive -> the next number of `dtype` that is not smaller."""
    near = scale.to(dtype)
    if dtype == torch.float32:
        return near
    # The bits of positive floats count upwards with their values, subnormal ones and infinity included.
    return (near.view(torch.int16) + (near.float() < scale).to(torch.int16)).view(dtype)


def _rounded_groups(groups: Tensor, rounding: Rounding, name: str) -> Tensor:
    """groups (N, G, g) float32 -> what their codes stand for, float32."""
    codes, scales, zeros = _round_groups(groups, rounding, name)
    return (codes - zeros[..., None]) * scales.float()[..., None]


def rounded(weight: Tensor, rounding: Rounding, name: str = "weight") -> Tensor:
    """weight (N, K) float32 -> the matrix that `quantise_int4` stands for, (N, K) float32."""
    groups = _rounded_groups(_grouped(weight, rounding.group_size), rounding, name)
    return groups.flatten(1)[:, : weight.shape[1]]


# Scales -------------------------------------------------------------------------------------------------------------


def weight_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Mean over all output rows of |w| / max|w| of its group: weights (N_i, K) -> (K,) float32."""
    K = weights[0].shape[1]
    total = torch.zeros(K)
    for weight in weights:
        for part in torch.split(weight, ROWS_AT_A_TIME):
            groups = _grouped(part.detach().float().abs(), group_size)
            share = groups / (groups.amax(dim=2, keepdim=True) + 1e-6)
            total += share.flatten(1)[:, :K].sum(dim=0).cpu()
    return total / sum(len(weight) for weight in weights)


def channel_scales(mean_abs: Tensor, magnitude: Tensor | None, alpha: float) -> Tensor:
    """s = mean|x|^alpha / (magnitude^(1 - alpha) + 1e-4), then s / sqrt(max(s) min(s)); (K,) float32.

    Without `magnitude` the divisor is 1 (arXiv 2306.00978, equation 5); with it, AutoAWQ's form. A channel that was
    zero in every input gets 1 and has no say in the normalisation: nothing is known about it, and a small scale would
    round its weights away.
    """
    alive = mean_abs > 0
    if not bool(alive.any()):
        return torch.ones_like(mean_abs)
    s = mean_abs.pow(alpha)
    if magnitude is not None:
        s = s / (magnitude.pow(1 - alpha) + 1e-4)
    s = s.clamp(min=1e-4)
    s = s / (s[alive].max() * s[alive].min()).sqrt()
    return torch.where(alive, s, 1.0)


def search_scales(
    layers: Sequence[Linear],
    stats: ChannelStats,
    rounding: Rounding,
    *,
    heads: HeadGroups | None = None,
    block: Callable[[Tensor], Tensor] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, SearchRecord]:
    """The scales (K,) float32 of the input that `layers` share whose output error on `stats.rows` is least.

    The error is that of the layers' own outputs, or of `block(rows)` if given, which must call them: while it runs,
    their weights and biases are float32 ones, and they get their own back whatever happens. `heads` for an o_proj whose
    scales will be folded into a v_proj. The search does not change the layers: see `fold_scales`. Plain rounding is
    tried first and wins ties, so the result is never worse than that on the sample. Deterministic.
    """
    _check_inputs(layers, stats)
    error = _LayersError(layers, stats, rounding) if block is None else _BlockError(layers, stats, rounding, block)
    magnitude = weight_magnitude([layer.weight for layer in layers], rounding.group_size)
    best = torch.ones_like(stats.mean_abs)
    plain = error(best)
    record = SearchRecord(stats.name, "plain", None, plain, plain)
    candidates = list(_candidates(stats.mean_abs, magnitude))
    for done, (variant, alpha, s) in enumerate(candidates, start=1):
        s = heads.share(s) if heads is not None else s
        found = error(s)
        if found < record.error_after:
            best, record = s, SearchRecord(stats.name, variant, alpha, plain, found)
        if progress is not None:
            progress(done, len(candidates))
    return best, record


def _candidates(mean_abs: Tensor, magnitude: Tensor) -> Iterator[tuple[str, float, Tensor]]:
    for step in range(1, STEPS + 1):  # alpha = 0 is plain rounding
        yield "activation", step / STEPS, channel_scales(mean_abs, None, step / STEPS)
    for step in range(STEPS + 1):
        yield "activation and weight", step / STEPS, channel_scales(mean_abs, magnitude, step / STEPS)


class _LayersError:
    """Mean squared error of the layers' outputs when their weights are rounded under given scales."""

    def __init__(self, layers: Sequence[Linear], stats: ChannelStats, rounding: Rounding) -> None:
        self.layers, self.stats, self.rounding = layers, stats, rounding
        self.rows = stats.rows.to(layers[0].weight.device)

    def __call__(self, scales: Tensor) -> float:
        total, outputs = 0.0, 0
        for layer in self.layers:
            for part in torch.split(layer.weight.detach(), ROWS_AT_A_TIME):
                off = _scaled_and_rounded(part, scales, self.rounding, self.stats.name) - part.float()
                total += float((self.rows @ off.t()).square().sum(dtype=torch.float64))
            outputs += layer.out_features
        return total / (outputs * len(self.rows))


class _BlockError:
    """The same at the end of a function of the rows that calls the layers."""

    def __init__(
        self,
        layers: Sequence[Linear],
        stats: ChannelStats,
        rounding: Rounding,
        block: Callable[[Tensor], Tensor],
    ) -> None:
        self.layers, self.stats, self.rounding, self.block = layers, stats, rounding, block
        self.rows = stats.rows.to(layers[0].weight.device)
        self.exact = self._run([layer.weight.detach().float() for layer in layers])

    def __call__(self, scales: Tensor) -> float:
        weights = [
            _scaled_and_rounded(layer.weight.detach(), scales, self.rounding, self.stats.name) for layer in self.layers
        ]
        return float((self._run(weights) - self.exact).square().mean(dtype=torch.float64))

    def _run(self, weights: Sequence[Tensor]) -> Tensor:
        with torch.no_grad(), _borrowed(self.layers, weights):
            return self.block(self.rows).float()


def _scaled_and_rounded(weight: Tensor, scales: Tensor, rounding: Rounding, name: str) -> Tensor:
    """Q(w * s) / s, float32: what the layer computes with, seen from the input before folding."""
    scales = scales.to(weight.device)
    return rounded(weight.float() * scales, rounding, name) / scales


@contextmanager
def _borrowed(layers: Sequence[Linear], weights: Sequence[Tensor]) -> Iterator[None]:
    """The layers compute in float32 with other weights, inside the block."""
    own = [(layer.weight, layer.bias) for layer in layers]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=False)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        yield
    finally:
        for layer, (own_weight, own_bias) in zip(layers, own, strict=True):
            layer.weight, layer.bias = own_weight, own_bias


def _check_inputs(layers: Sequence[Linear], stats: ChannelStats) -> None:
    K = stats.rows.shape[1]
    if not layers or any(layer.weight.shape[1] != K for layer in layers):
        raise ValueError(
            f"{stats.name}: expected layers of {K} inputs, got {[layer.weight.shape[1] for layer in layers]}"
        )
    for layer in layers:
        _check_matrix(layer.weight, stats.name)


def fold_scales(
    previous: nn.Module,
    layers: Sequence[Linear],
    scales: Tensor,
    *,
    rows: slice | None = None,
    heads: HeadGroups | None = None,
    name: str = "fold",
) -> None:
    """Divides what makes the input by `scales` (K,) and multiplies the columns of `layers` by them, in place.

    `previous` is a norm whose output is proportional to its weight (and bias), or a Linear: then `rows` are the
    output rows that are the K channels (`qkv_proj.parts["v_proj"]` for o_proj, with `heads`; `gate_up_proj.parts
    ["up_proj"]` for down_proj, because silu(gate) * up is linear in up). The path from there to the layers must be
    linear in each channel: never fold through an activation (fc1 to fc2). The function computed is the same up to the
    rounding of the weights' own dtype. Raises ValueError before anything is changed.
    """
    _check_scales(scales, [layer.weight.shape[1] for layer in layers], name)
    made_by = scales if heads is None else heads.narrow(scales)
    updates: list[tuple[Tensor, Tensor]] = []
    own = dict(previous.named_parameters(recurse=False))
    if not {"weight"} <= own.keys() <= {"weight", "bias"}:
        raise ValueError(f"{name}: expected a norm or a Linear with a weight to divide, got parameters {sorted(own)}")
    for parameter in own.values():
        target = parameter.detach()[rows if rows is not None else slice(None)]
        if len(target) != len(made_by):
            raise ValueError(f"{name}: expected {len(made_by)} channels to divide, got {len(target)}")
        divisor = made_by.to(target.device).reshape(-1, *[1] * (target.ndim - 1))
        updates.append((target, (target.float() / divisor).to(target.dtype)))
    for layer in layers:
        target = layer.weight.detach()
        updates.append((target, (target.float() * scales.to(target.device)).to(target.dtype)))
    for _, value in updates:
        check_finite(value, f"{name}: weights after folding")
    for target, value in updates:
        target.copy_(value)


def _check_scales(scales: Tensor, widths: Sequence[int], name: str) -> None:
    if scales.ndim != 1 or any(width != len(scales) for width in widths):
        raise ValueError(f"{name}: expected a scale for each input of {list(widths)}, got {tuple(scales.shape)}")
    check_finite(scales, f"{name}: scales")
    if not bool((scales > 0).all()):
        raise ValueError(f"{name}: expected positive scales, got {float(scales.min())}")


# Clipping -----------------------------------------------------------------------------------------------------------


def search_clip(
    layer: Linear,
    stats: ChannelStats,
    rounding: Rounding,
    *,
    skip: Sequence[str] = NOT_CLIPPED,
    progress: Progress | None = None,
) -> tuple[Tensor, ClipRecord]:
    """How far to narrow each group's range before rounding: limits (N, G) float32, weights outside +-limit are cut.

    Of max|w| times 1, 0.975, ..., 0.5 the one with the least error of the group's own share of the output. Shares
    meet in the sum, so a row whose whole output is no better for it keeps its ranges: no row gets worse on the sample.
    `skip` names parts of the layer that are left alone. `stats` are those after folding (`ChannelStats.divided`).
    Does not change the layer: see `clip`.
    """
    _check_inputs([layer], stats)
    x = stats.rows.to(layer.weight.device)
    gram = _group_gram(x, rounding.group_size)
    free = _free_rows(layer, skip)
    limits, errors = [], torch.zeros(2, dtype=torch.float64)
    starts = range(0, layer.out_features, ROWS_AT_A_TIME)
    for done, start in enumerate(starts, start=1):
        part = slice(start, start + ROWS_AT_A_TIME)
        weight = layer.weight.detach()[part].float()
        found = _clip_rows(weight, gram, rounding, stats.name)
        # (M,) errors of every row, plain and clipped
        plain = _row_errors(x, weight, rounded(weight, rounding, stats.name))
        cut = _row_errors(x, weight, rounded(_clamped(weight, found, rounding.group_size), rounding, stats.name))
        better = (cut < plain) & free[part]
        widest = _grouped(weight, rounding.group_size).abs().amax(dim=2)
        limits.append(torch.where(better[:, None], found, widest))
        errors += torch.stack([plain.sum(), torch.where(better, cut, plain).sum()]).cpu()
        if progress is not None:
            progress(done, len(starts))
    limit = torch.cat(limits)
    before, after = (float(e) / (layer.out_features * len(x)) for e in errors)
    narrowed = limit < _grouped(layer.weight.detach().float(), rounding.group_size).abs().amax(dim=2)
    return limit, ClipRecord(stats.name, float(narrowed.float().mean()), before, after)


def clip(layer: Linear, limits: Tensor, group_size: int) -> None:
    """Cuts the layer's weights to +-limits (N, G), in place. Rounding follows; this alone changes the function."""
    G = -(-layer.in_features // group_size)
    if limits.shape != (layer.out_features, G):
        raise ValueError(f"expected limits ({layer.out_features}, {G}), got {tuple(limits.shape)}")
    weight = layer.weight.detach()
    weight.copy_(_clamped(weight.float(), limits.to(weight.device), group_size))


def _free_rows(layer: Linear, skip: Sequence[str]) -> Tensor:
    free = torch.ones(layer.out_features, dtype=torch.bool, device=layer.weight.device)
    for name, rows in layer.parts.items():
        if name in skip:
            free[rows] = False
    return free


def _clamped(weight: Tensor, limits: Tensor, group_size: int) -> Tensor:
    groups, limit = _grouped(weight, group_size), limits[..., None]
    return groups.clamp(-limit, limit).flatten(1)[:, : weight.shape[1]]


def _group_gram(x: Tensor, group_size: int) -> Tensor:
    """rows (R, K) -> x_g^T x_g for each group, (G, g, g): squared errors without touching the rows again."""
    groups = _grouped(x, group_size).transpose(0, 1)  # (G, R, g)
    return groups.transpose(1, 2) @ groups


def _clip_rows(weight: Tensor, gram: Tensor, rounding: Rounding, name: str) -> Tensor:
    """weight (M, K) -> limits (M, G) with the least error of each group's own output."""
    groups = _grouped(weight, rounding.group_size)  # (M, G, g)
    widest = groups.abs().amax(dim=2)
    best, least = widest, torch.full_like(widest, torch.inf)
    for step in range(STEPS + 1):
        limit = widest * (1 - (1 - MOST_CLIPPED) * step / STEPS)
        cut = groups.clamp(-limit[..., None], limit[..., None])
        off = _rounded_groups(cut, rounding, name) - groups
        error = (torch.einsum("mgi,gij->mgj", off, gram) * off).sum(dim=2)
        best, least = torch.where(error < least, limit, best), torch.minimum(error, least)
    return best


def _row_errors(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """Squared error of each output over the sample: x (R, K), matrices (M, K) -> (M,) float64."""
    return (x @ (other - weight).t()).square().sum(dim=0, dtype=torch.float64)
