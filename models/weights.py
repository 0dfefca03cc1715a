"""Fills a module built on `meta` from a checkpoint, strictly both ways.

Every parameter waits under the name the checkpoint will use; a fused one waits once per part, a quantised matrix once
per tensor that it is stored as. A tensor that nobody waits for, one that comes twice, one of another shape, and one
that never comes are errors that name it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import CorruptCheckpoint
from ..quant.linear import LinearLayer, StoredWeight
from ..quant.plan import QuantPlan, matrices_of
from .checkpoint import Checkpoint
from .interface import Progress, ProgressFn, no_progress

# Checkpoint name -> the module's own name; None for a tensor that is known and not needed.
RenameFn = Callable[[str], str | None]

_LOADABLE = (torch.float32, torch.float16, torch.bfloat16)
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class _Slot:
    """A parameter, or rows of it, that waits for one checkpoint tensor."""

    parameter: str
    rows: slice | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a linear layer and the tensors, by suffix, that have come for it."""

    name: str
    layer_name: str
    layer: LinearLayer
    part: str
    shape: tuple[int, int]
    suffixes: frozenset[str]
    arrived: dict[str, Tensor] = field(default_factory=dict)


def _slots(module: nn.Module) -> dict[str, _Slot]:
    """What the checkpoint has to bring beside the matrices of linear layers, by its own names."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LinearLayer)}
    slots: dict[str, _Slot] = {}
    for name, parameter in module.named_parameters():
        layer_name, _, leaf = name.rpartition(".")
        layer = layers.get(layer_name)
        if layer is None or (leaf == "bias" and not layer.parts):
            slots[name] = _Slot(name, None, tuple(parameter.shape))
        elif leaf == "bias":
            owner = layer_name.rpartition(".")[0]
            for part, rows in layer.parts.items():
                slots[".".join(filter(None, (owner, part, leaf)))] = _Slot(name, rows, (rows.stop - rows.start,))
    return slots


def _matrices(module: nn.Module, plan: QuantPlan) -> dict[str, _Matrix]:
    """The matrices of linear layers by their names; parts of fused layers each by its own."""
    found = {}
    for name, layer_name, part, shape in matrices_of(module):
        layer = module.get_submodule(layer_name)
        assert isinstance(layer, LinearLayer)
        planned = plan.matrices.get(name)
        suffixes = frozenset({"weight"}) if planned is None else planned.suffixes
        found[name] = _Matrix(name, layer_name, layer, part, shape, suffixes)
    return found


def _names(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    rename: RenameFn,
    *,
    tied: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    plan: QuantPlan | None = None,
    progress: ProgressFn = no_progress,
) -> None:
    """Replaces every `meta` parameter of `module` by the checkpoint's tensor in `dtype` on `device`.

    `tied` maps a parameter to the one it shares if the checkpoint leaves it out; one that is there is loaded. `plan`
    has been applied to the module; None where nothing is quantised. Beside the model one tensor is in memory at a
    time, of a quantised checkpoint the tensors of one fused layer. Raises CorruptCheckpoint that names the tensor.
    """
    plan = plan or QuantPlan()
    slots, matrices = _slots(module), _matrices(module, plan)
    waiting = slots.keys() | {f"{name}.{suffix}" for name, matrix in matrices.items() for suffix in matrix.suffixes}
    present = {rename(name) for name in checkpoint.tensors}
    shared = {name: source for name, source in tied.items() if name not in present and name in waiting}
    waiting -= shared.keys()
    filled: set[str] = set()
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    storage: dict[str, Tensor] = {}

    def together(source: str) -> str:
        """Tensors of one layer follow each other, or a file that is sorted by dtypes would be held as a whole."""
        wanted = rename(source) or source
        matrix = matrices.get(wanted.rpartition(".")[0])
        return wanted if matrix is None else matrix.layer_name

    done_bytes = 0
    for source, tensor in checkpoint.iter_tensors(together if plan.matrices else None):
        done_bytes += tensor.numel() * tensor.element_size()
        progress(Progress("load", min(done_bytes, checkpoint.weight_bytes), checkpoint.weight_bytes, "bytes"))
        wanted = rename(source)
        if wanted is None:
            continue
        if wanted not in waiting:
            why = "it came twice" if wanted in filled else "this model has no such tensor"
            raise CorruptCheckpoint(f"tensor {source}: {why}")
        waiting.remove(wanted)
        filled.add(wanted)
        if wanted not in slots:
            name, _, suffix = wanted.rpartition(".")
            _take(matrices[name], suffix, tensor, source, plan, dtype, device)
            continue
        slot = slots[wanted]
        _check_floats(source, tensor, slot.shape)
        if slot.parameter not in storage:
            storage[slot.parameter] = torch.empty(shapes[slot.parameter], dtype=dtype, device=device)
        target = storage[slot.parameter]
        (target if slot.rows is None else target[slot.rows]).copy_(tensor)
    if waiting:
        missing = sorted(waiting)
        raise CorruptCheckpoint(f"{len(missing)} tensors are missing: {_names(missing)}")
    for name, tensor in storage.items():
        _set(module, name, nn.Parameter(tensor, requires_grad=False))
    for name, shared_name in shared.items():
        # The tensor is shared, the parameters are two: each may be listed under its own name.
        _set(module, name, nn.Parameter(module.get_parameter(shared_name).data, requires_grad=False))


def _check_floats(source: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CorruptCheckpoint(f"tensor {source}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in _LOADABLE:
        raise CorruptCheckpoint(f"tensor {source}: expected a 16 or 32 bit float, got {tensor.dtype}")


def _take(
    matrix: _Matrix,
    suffix: str,
    tensor: Tensor,
    source: str,
    plan: QuantPlan,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Keeps one tensor of a matrix; hands the matrix to its layer when the last one has come."""
    weight: StoredWeight = tensor
    if matrix.name in plan.matrices:
        matrix.arrived[suffix] = tensor
        if matrix.arrived.keys() != matrix.suffixes:
            return
        weight = plan.read(matrix.name, matrix.arrived)
        matrix.arrived.clear()
    else:
        _check_floats(source, tensor, matrix.shape)
    matrix.layer.fill(matrix.part, weight, dtype=dtype, device=device)


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)
