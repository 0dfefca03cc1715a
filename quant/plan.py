"""Which layers of a model are quantised, from what its checkpoint holds.

    plan = QuantPlan.of(model, headers, rename, config)
    plan.apply(model)

The tensors decide, layer by layer (`formats.py`); nothing above a layer knows about precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import CorruptCheckpoint, InvalidRequest, UnsupportedModel
from ..kernels.w8a8 import MAX_IN_FEATURES
from .formats import by_layer, check_layer, detect, read_layer
from .linear import LinearLayer, quantised_like
from .quantization_config import QuantizationConfig, Scheme
from .scheme import Int4Weight, Int8Weight
from .stored_layer import StoredLayer


@dataclass(frozen=True)
class PlannedMatrix:
    """A quantised matrix: where the checkpoint has it, and how."""

    stored_name: str  # of the layer in the file
    suffixes: frozenset[str]  # of its tensors, the bias not among them
    shape: tuple[int, int]  # (N, K)
    scheme: Scheme
    config: QuantizationConfig

    @property
    def group_size(self) -> int:
        return self.scheme.group_of(self.shape[1])

    def __str__(self) -> str:
        return "W8A8" if self.scheme.bits == 8 else f"W4A16 in groups of {self.group_size}"


@dataclass(frozen=True)
class QuantPlan:
    """The quantised matrices of a checkpoint by the model's own names, fused layers part by part."""

    matrices: Mapping[str, PlannedMatrix] = field(default_factory=dict)

    @staticmethod
    def of(
        model: nn.Module,
        headers: Mapping[str, Tensor],
        rename: Callable[[str], str | None],
        config: QuantizationConfig | None,
    ) -> QuantPlan:
        """Reads the plan off the checkpoint's headers.

        `headers` are the tensors by their names in the file, on `meta`; `rename` gives the model's own name, None for
        a tensor that it does not need. Raises CorruptCheckpoint or UnsupportedModel that names the layer.
        """
        shapes = {name: shape for name, _, _, shape in matrices_of(model)}
        found: dict[str, PlannedMatrix] = {}
        for stored_name, tensors in by_layer(headers).items():
            layer = StoredLayer(stored_name, tensors)
            form = detect(layer)
            renamed = rename(f"{stored_name}.{next(iter(tensors))}")
            if form == "dense" or renamed is None:
                continue
            if config is None:
                raise CorruptCheckpoint(
                    f"layer {stored_name}: its tensors are {form}, config.json has no quantization_config"
                )
            name = renamed.rpartition(".")[0]
            if name not in shapes:
                raise CorruptCheckpoint(f"layer {stored_name}: it is quantised, this model has no such linear layer")
            if name in found:
                raise CorruptCheckpoint(f"layer {stored_name}: it came twice, also as {found[name].stored_name}")
            scheme = check_layer(layer, shapes[name], config)
            if scheme.bits == 8 and shapes[name][1] > MAX_IN_FEATURES:
                raise UnsupportedModel(
                    f"layer {stored_name}: expected at most {MAX_IN_FEATURES} inputs with 8 bits, got {shapes[name][1]}"
                )
            found[name] = PlannedMatrix(stored_name, frozenset(tensors) - {"bias"}, shapes[name], scheme, config)
        return QuantPlan(found)

    @staticmethod
    def joined(plans: Iterable[QuantPlan]) -> QuantPlan:
        """One plan for a model whose parts were quantised each with its own config."""
        return QuantPlan({name: matrix for plan in plans for name, matrix in plan.matrices.items()})

    def apply(self, model: nn.Module, *, w4a8: bool = False) -> None:
        """Replaces the layers of a model on `meta` whose matrices are quantised.

        `w4a8` makes layers of 4-bit weights quantise their activations to 8 bits. Raises CorruptCheckpoint where the
        parts of one fused layer differ in scheme or group size, InvalidRequest for `w4a8` without a 4-bit layer.
        """
        if w4a8 and not any(matrix.scheme.bits == 4 for matrix in self.matrices.values()):
            raise InvalidRequest("w4a8: expected a model with 4-bit layers, this one has none")
        names: dict[str, list[str]] = {}
        for name, layer_name, _, _ in matrices_of(model):
            names.setdefault(layer_name, []).append(name)
        for layer_name, parts in names.items():
            planned = [self.matrices.get(name) for name in parts]
            kinds = ["dense" if matrix is None else str(matrix) for matrix in planned]
            if len(set(kinds)) > 1:
                listed = ", ".join(f"{name} is {kind}" for name, kind in zip(parts, kinds, strict=True))
                raise CorruptCheckpoint(f"layers that are computed as one must be quantised alike: {listed}")
            if planned[0] is not None:
                owner, _, leaf = layer_name.rpartition(".")
                old = model.get_submodule(layer_name)
                assert isinstance(old, LinearLayer)
                group_size = None if planned[0].scheme.bits == 8 else planned[0].group_size
                setattr(model.get_submodule(owner), leaf, quantised_like(old, group_size, w4a8=w4a8))

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> Int4Weight | Int8Weight:
        """The matrix of that name from its stored tensors by suffix. Raises CorruptCheckpoint."""
        matrix = self.matrices[name]
        return read_layer(StoredLayer(matrix.stored_name, tensors), matrix.shape, matrix.config)


def matrices_of(model: nn.Module) -> Iterator[tuple[str, str, str, tuple[int, int]]]:
    """(matrix name, layer name, part, shape) of every linear layer; a part stands beside its fused layer."""
    for layer_name, layer in model.named_modules():
        if isinstance(layer, LinearLayer):
            owner = layer_name.rpartition(".")[0]
            for part, shape in layer.waits_for().items():
                yield f"{owner}.{part}" if part and owner else part or layer_name, layer_name, part, shape


def scheme_name(model: nn.Module, dtype: torch.dtype) -> str:
    """For people, in the order of the modules: "W8A8 / W4A16 / bfloat16", the dtype being that of the rest."""
    schemes = [layer.scheme for layer in model.modules() if isinstance(layer, LinearLayer) and layer.scheme]
    return " / ".join([*dict.fromkeys(schemes), str(dtype).removeprefix("torch.")])
