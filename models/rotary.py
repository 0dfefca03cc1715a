"""Rotary frequencies, with every scaling type named, and which axis of a position turns which of them.

An unknown type is an error: ignoring one loads and answers badly.
Sources: RoPE arXiv 2104.09864; linear arXiv 2306.15595; YaRN arXiv 2309.00071; "llama3" from Llama 3.1's release;
multimodal RoPE arXiv 2409.12191.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from .checkpoint import ConfigReader

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]

_SECTIONS = (16, 24, 24)  # the class default of Qwen2-VL, for a head of 128


@dataclass(frozen=True)
class RopeConfig:
    """`theta` and the scaling; fields that a type does not use keep their defaults."""

    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: scales cos and sin
    sections: tuple[int, ...] = ()  # multimodal: how many frequencies turn by time, row and column

    @staticmethod
    def from_hf(
        text: ConfigReader, *, default_theta: float, max_positions: int, head_dim: int | None = None
    ) -> RopeConfig:
        """Reads `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

        `head_dim` is that of a model with multimodal positions, None where they have one axis.
        """
        key = "rope_parameters" if text.has("rope_parameters") else "rope_scaling"
        scaling = text.sub(key, required=False)
        theta = text.get_float("rope_theta", default=default_theta, low=1.0)
        theta = scaling.get_float("rope_theta", default=theta, low=1.0)
        if head_dim is None:
            if scaling.has("mrope_section"):
                raise UnsupportedModel("rope type mrope: this architecture takes one-dimensional positions")
            name = scaling.get_str(("rope_type", "type"), default="default")
            return RopeConfig._of_type(name, scaling, theta, max_positions)
        # Multimodal RoPE is known by its sections: later writers turn its type into "default" in one of two spellings.
        names = {scaling.get_str(key, default="default") for key in ("rope_type", "type")} - {"mrope", "default"}
        sections = scaling.get_ints("mrope_section", default=_SECTIONS, max_len=3)
        if len(sections) != 3 or sum(sections) != head_dim // 2:
            scaling.fail("mrope_section", f"three numbers of the sum {head_dim // 2}, half of head_dim")
        config = RopeConfig._of_type(names.pop() if names else "default", scaling, theta, max_positions)
        return replace(config, sections=sections)

    @staticmethod
    def _of_type(name: str, scaling: ConfigReader, theta: float, max_positions: int) -> RopeConfig:
        if name == "default":
            return RopeConfig(theta=theta)
        if name not in ("linear", "dynamic", "llama3", "yarn"):
            raise UnsupportedModel(f"rope type {name!r}: expected default, linear, dynamic, llama3 or yarn")
        factor = scaling.get_float("factor", low=1.0)
        original = scaling.get_int("original_max_position_embeddings", default=max_positions, low=1)
        if name == "linear":
            return RopeConfig(theta, "linear", factor, original)
        if name == "dynamic":
            return RopeConfig(theta, "dynamic", factor, original)
        if name == "llama3":
            return RopeConfig(
                theta,
                "llama3",
                factor,
                original,
                low_freq_factor=scaling.get_float("low_freq_factor", low=0.0),
                high_freq_factor=scaling.get_float("high_freq_factor", low=0.0),
            )
        default_attention = 0.1 * math.log(factor) + 1.0
        return RopeConfig(
            theta,
            "yarn",
            factor,
            original,
            beta_fast=scaling.get_float("beta_fast", default=32.0, low=0.0),
            beta_slow=scaling.get_float("beta_slow", default=1.0, low=0.0),
            attention_factor=scaling.get_float("attention_factor", default=default_attention, low=0.0),
        )

    def by_axis(self, angle: Tensor) -> Tensor:
        """angle (3, M, D/2) by time, row and column -> (M, D/2), each frequency's by the axis of its section."""
        parts = angle.split(self.sections, dim=-1)
        return torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)

    def frequencies(self, dim: int) -> Tensor:
        """Angle per position of each pair, (dim/2,) float32."""
        base = 1.0 / self.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        # Dynamic NTK changes nothing inside the original window, and contexts beyond it are refused.
        if self.type in ("default", "dynamic"):
            return base
        if self.type == "linear":
            return base / self.factor
        if self.type == "llama3":
            return self._llama3(base)
        return self._yarn(base, dim)

    def _llama3(self, base: Tensor) -> Tensor:
        wavelength = 2 * math.pi / base
        low = self.original_max_positions / self.low_freq_factor
        high = self.original_max_positions / self.high_freq_factor
        span = self.high_freq_factor - self.low_freq_factor
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / span
        blended = (1 - smooth) * base / self.factor + smooth * base
        return torch.where(wavelength > low, base / self.factor, torch.where(wavelength < high, base, blended))

    def _yarn(self, base: Tensor, dim: int) -> Tensor:
        def pair_that_turns(rotations: float) -> float:
            return dim * math.log(self.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(self.beta_slow)), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
        return base / self.factor * ramp + base * (1 - ramp)
