"""Fills a module built on `meta` from a checkpoint, strictly both ways.

Every parameter waits under the name the checkpoint will use; a fused one waits once per part. A tensor that
nobody waits for, one that comes twice, one of another shape, and one that never comes are errors that name it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CorruptCheckpoint
from ..quant.linear import Linear
from .checkpoint import Checkpoint
from .interface import Progress, ProgressFn, no_progress

# Checkpoint name -> the module's own name; None for a tensor that is known and not needed.
RenameFn = Callable[[str], str | None]

_LOADABLE = (torch.float32, torch.float16, torch.bfloat16)
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class _Slot:
    """A place that waits for one checkpoint tensor."""

    parameter: str
    rows: slice | None
    shape: tuple[int, ...]


def _slots(module: nn.Module) -> dict[str, _Slot]:
    """What the checkpoint has to bring, by its own names."""
    slots: dict[str, _Slot] = {}
    fused = {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear) and layer.parts}
    for name, parameter in module.named_parameters():
        layer_name, _, suffix = name.rpartition(".")
        if layer_name not in fused:
            slots[name] = _Slot(name, None, tuple(parameter.shape))
            continue
        parent = layer_name.rpartition(".")[0]
        for part, rows in fused[layer_name].parts.items():
            shape = (rows.stop - rows.start, *parameter.shape[1:])
            slots[f"{parent}.{part}.{suffix}"] = _Slot(name, rows, shape)
    return slots


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
    progress: ProgressFn = no_progress,
) -> None:
    """Replaces every `meta` parameter of `module` by the checkpoint's tensor in `dtype` on `device`.

    `tied` maps a parameter to the one it shares if the checkpoint leaves it out; one that is there is loaded.
    One shard is in memory at a time. Raises CorruptCheckpoint that names the tensor.
    """
    waiting = _slots(module)
    present = {rename(name) for name in checkpoint.tensors}
    shared = {name: source for name, source in tied.items() if name not in present}
    for name in shared:
        del waiting[name]
    filled: set[str] = set()
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    storage: dict[str, Tensor] = {}
    done_bytes = 0
    for source, tensor in checkpoint.iter_tensors():
        done_bytes += tensor.numel() * tensor.element_size()
        progress(Progress("load", min(done_bytes, checkpoint.weight_bytes), checkpoint.weight_bytes, "bytes"))
        wanted = rename(source)
        if wanted is None:
            continue
        slot = waiting.pop(wanted, None)
        if slot is None:
            why = "it came twice" if wanted in filled else "this model has no such tensor"
            raise CorruptCheckpoint(f"tensor {source}: {why}")
        filled.add(wanted)
        if tuple(tensor.shape) != slot.shape:
            raise CorruptCheckpoint(f"tensor {source}: expected shape {slot.shape}, got {tuple(tensor.shape)}")
        if tensor.dtype not in _LOADABLE:
            raise CorruptCheckpoint(f"tensor {source}: expected a 16 or 32 bit float, got {tensor.dtype}")
        if slot.parameter not in storage:
            storage[slot.parameter] = torch.empty(shapes[slot.parameter], dtype=dtype, device=device)
        target = storage[slot.parameter]
        (target if slot.rows is None else target[slot.rows]).copy_(tensor)
    if waiting:
        missing = sorted(waiting)
        raise CorruptCheckpoint(f"{len(missing)} tensors are missing: {_names(missing)}")
    storage.update({name: storage[source] for name, source in shared.items()})
    for name, tensor in storage.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
