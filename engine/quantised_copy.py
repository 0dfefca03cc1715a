"""The quantised copy of a known model: what making one would cost, and making it once for all later starts.

The copy lies beside downloaded models under a name of its own (`hub.quantised_folder`), where loading finds it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InsufficientMemory, InvalidRequest, SparseVILAError
from ..models.checkpoint import Checkpoint
from ..models.decoder import Decoder
from ..models.interface import ProgressFn, no_progress
from ..models.registry import build_model
from ..quant.plan import matrices_of
from .calibration_set import builtin_samples
from .hub import DISK_MARGIN_BYTES, quantised_folder, resolve
from .quantise import QuantReport, QuantSettings, quantise_checkpoint

WORTH_BYTES = 1 << 30  # a model with fewer bytes of weights is quick as it is
NUM_SAMPLES = 64  # about; of the built-in set

_FLOAT = 4  # bytes: quantising computes in float32
_LAYER_COPIES = 3.5  # of a decoder layer in memory at once, searches included; at 7B width it came to that
_INTERPRETER_BYTES = 400 << 20  # torch itself


@dataclass(frozen=True)
class QuantCost:
    """What quantising a checkpoint takes. Estimates from its headers."""

    source_bytes: int
    out_bytes: int  # on the disk
    memory_bytes: int  # at the peak

    def check_disk(self, folder: Path) -> None:
        """Raises InvalidRequest where the disk under `folder` has no room."""
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if free < self.out_bytes + DISK_MARGIN_BYTES:
            raise InvalidRequest(
                f"{folder}: the quantised model needs {self.out_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            )

    def check_memory(self, limit: int | None) -> None:
        """Raises InsufficientMemory where quantising would take more than `limit` bytes."""
        if limit is not None and self.memory_bytes > limit:
            raise InsufficientMemory(self.memory_bytes, limit, what="quantising this model")


def estimate(checkpoint: Checkpoint, settings: QuantSettings, *, num_samples: int = NUM_SAMPLES) -> QuantCost:
    """Reads headers alone. Raises as building the model does."""
    model: Any = build_model(checkpoint)
    decoder: Decoder = model.decoder
    name_of = {module: name for name, module in model.named_modules()}
    layers, head = f"{name_of[decoder]}.layers.", f"{name_of[decoder]}.lm_head"
    tower = f"{name_of[model.tower.blocks]}."
    out = float(checkpoint.weight_bytes)
    stored = {model.rename(name): info for name, info in checkpoint.tensors.items()}
    shell = sum(p.numel() for p in model.parameters())
    for name, _, _, (N, K) in matrices_of(model):
        info = stored.get(f"{name}.weight")
        in_decoder = name.startswith(layers)
        shell -= N * K if in_decoder or name == head else 0
        if info is None:  # tied
            continue
        if in_decoder:
            wanted, packed = settings.llm != "none", N * K / 2 + N * K / settings.group_size * 2.5
        elif name == head:
            wanted, packed = settings.lm_head != "none", N * K + 4.0 * N
        else:
            wanted, packed = settings.vision != "none" and name.startswith(tower), N * K + 4.0 * N
        out += packed - (info.end - info.begin) if wanted else 0
    layer = sum(p.numel() for p in decoder.layer(0).parameters())
    states = num_samples * settings.max_positions * decoder.config.hidden_size * _FLOAT
    memory = max(shell * _FLOAT, layer * _FLOAT * _LAYER_COPIES) + states + _INTERPRETER_BYTES
    return QuantCost(checkpoint.weight_bytes, int(out), int(memory))


@dataclass(frozen=True)
class CopyPlan:
    """A copy that could be made."""

    source: Path
    out: Path
    settings: QuantSettings
    cost: QuantCost


def plan_copy(model: str, *, home: Path | None = None, hf_cache: Path | None = None) -> CopyPlan | None:
    """What `make_copy` would do for a model's name, where it is worth it; None where it is not.

    That is a model whose original is on this machine, of over a gibibyte, not quantised, of an architecture that can
    be, and not copied before.
    """
    out = quantised_folder(model, home)
    if out is None or out.exists():
        return None
    try:
        checkpoint = Checkpoint.open(resolve(model, home=home, hf_cache=hf_cache).path)
        configs = (checkpoint.config, *(part.config for part in checkpoint.folders.values()))
        if checkpoint.weight_bytes < WORTH_BYTES or any("quantization_config" in config for config in configs):
            return None
        settings = QuantSettings()
        return CopyPlan(checkpoint.folder, out, settings, estimate(checkpoint, settings))
    except SparseVILAError:  # loading it will say what is wrong with it
        return None


def make_copy(plan: CopyPlan, *, progress: ProgressFn = no_progress) -> QuantReport:
    """Quantises; an interrupted call is gone on with by the next one. Raises as `quantise_checkpoint`."""
    plan.cost.check_disk(plan.out)
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    return quantise_checkpoint(plan.source, plan.out, plan.settings, builtin_samples(), progress=progress)
