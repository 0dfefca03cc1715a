"""Writing a quantised checkpoint: a folder that this engine and others load.

    writer = CheckpointWriter(folder, form="compressed-tensors", fingerprint=...)
    for unit in ...:                                   # a decoder layer, the embeddings, a tower's layer ...
        if not writer.has(unit):
            writer.add(unit, dense=..., quantised=..., record=...)
    writer.finish(config, documents=..., record=...)

Work goes on in `<folder>.partial`, one safetensors file a unit, each of which is there whole or not at all. Killed at
any moment, a later run with the same fingerprint goes on behind the last whole unit and ends with the same bytes. The
model appears under its name by one rename, and until then no folder has a config.json that could make it look like one.

A model may be a folder of sub-models, each with its config and weights (`folders`): a tensor `<folder>.<name>` then
lies in that folder as `<name>`, and each folder's config says what of it is quantised.

In `compressed-tensors` 8-bit layers are int-quantized and 4-bit ones pack-quantized; readers are transformers with
compressed-tensors, and vLLM. `awq` is AutoAWQ's gemm layout, which has no 8 bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import __version__
from ..errors import InvalidRequest, UnsupportedModel
from .awq_format import write_awq_gemm
from .compressed_format import write_int_quantized, write_pack_quantized
from .layer_patterns import dense_parts, target_patterns
from .quantization_config import QuantizationConfig, Scheme, SchemeGroup, awq_config, compressed_config
from .scheme import Int4Weight, Int8Weight

OutputFormat = Literal["compressed-tensors", "awq"]

FORMAT_VERSION = 1  # of quantization.json and of what lies in a partial folder
RECORD_FILE = "quantization.json"

_CONFIG_FILE = "config.json"
_INDEX_FILE = "model.safetensors.index.json"
_PROGRESS_FILE = "progress.json"
_READY = "ready"  # the folder within the partial one that takes the model's name at the end
_SHARD = re.compile(r"model(?:-(\d+)-of-\d+)?\.safetensors")
_MODE = 0o644  # whatever the umask of the process: models are shared
_ALIGNMENT = 8  # bytes, of the header
_DTYPES = {  # as safetensors spells them
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class _Layer:
    """How one quantised layer was written."""

    bits: Literal[4, 8]
    group_size: int  # the inputs for a whole row
    in_features: int
    symmetric: bool

    @property
    def whole_row(self) -> bool:
        return self.group_size == self.in_features

    @property
    def kind(self) -> str:
        return "W8A8" if self.bits == 8 else "W4A16"


@dataclass(frozen=True)
class _Unit:
    """What lies beside the shard of one unit, to read back after a restart."""

    number: int  # from 1, in the order of `add`
    name: str
    record: dict[str, Any]
    tensors: list[str]
    matrices: list[str]  # layers of `dense` that have a matrix
    layers: dict[str, _Layer]
    tensor_bytes: int
    file_bytes: int
    sha256: str  # of the file, as it was written
    folder: str = ""  # of the sub-model that it belongs to; "" of a model that is one folder

    @staticmethod
    def from_json(data: bytes) -> _Unit:
        values = json.loads(data)
        layers = {name: _Layer(**layer) for name, layer in values.pop("layers").items()}
        return _Unit(**values, layers=layers)


@dataclass
class _Progress:
    """The units that are done, and what they hold together."""

    units: dict[str, _Unit] = field(default_factory=dict)

    def in_order(self) -> list[_Unit]:
        return sorted(self.units.values(), key=lambda unit: unit.number)

    def next_number(self) -> int:
        taken = {unit.number for unit in self.units.values()}
        return next(number for number in range(1, len(taken) + 2) if number not in taken)

    def of(self, folder: str) -> list[_Unit]:
        return [unit for unit in self.in_order() if unit.folder == folder]

    def layers(self) -> dict[str, _Layer]:
        return {name: layer for unit in self.in_order() for name, layer in unit.layers.items()}


class CheckpointWriter:
    """Writes a quantised checkpoint, one shard per unit of work; resumable; appears under its name whole or not at all.

    Raises OSError as the disk does; what had been added before stays.
    """

    def __init__(
        self,
        folder: Path,
        *,
        form: OutputFormat,
        fingerprint: str,
        symmetric: bool = False,
        folders: Iterable[str] = (),
    ) -> None:
        """Works in the sibling `<folder>.partial`. `folders` are those of the sub-models, where there are some.

        `fingerprint` stands for the source and all settings. A partial folder with the same one is gone on with, one
        with another is removed and begun anew. `symmetric` leaves out the zero points of 4-bit layers, all of which
        must then be 8; compressed-tensors only. Raises InvalidRequest where `folder` exists, or where something else
        than a partial checkpoint lies in the way.
        """
        if form not in get_args(OutputFormat):
            raise ValueError(f"expected a format of {get_args(OutputFormat)}, got {form!r}")
        if symmetric and form == "awq":
            raise ValueError("expected zero points: the awq format has no symmetric scheme")
        self._folder = Path(folder)
        self._partial = self._folder.with_name(f"{self._folder.name}.partial")
        self._form: OutputFormat = form
        self._symmetric = symmetric
        self._folders = tuple(folders)
        self._progress = _Progress()
        self._refuse_existing()
        self._begin({"version": FORMAT_VERSION, "form": form, "symmetric": symmetric, "fingerprint": fingerprint})

    def has(self, unit: str) -> bool:
        """Whether the unit lies on the disk whole."""
        return unit in self._progress.units

    def record(self, unit: str) -> Mapping[str, Any]:
        """The record that `add` was given for a unit, as JSON gives it back. Raises KeyError for one not there."""
        return self._progress.units[unit].record

    def add(
        self,
        unit: str,
        *,
        dense: Mapping[str, Tensor],
        quantised: Mapping[str, Int4Weight | Int8Weight],
        record: Mapping[str, Any],
    ) -> None:
        """Writes the shard of one unit: when it returns the unit is on the disk.

        `dense` by tensor name, `quantised` by layer name without ".weight", both as the source checkpoint has them;
        biases are in `dense`. `record` is plain JSON. Holds the unit's tensors at most once more. Raises ValueError for
        a name that is there already, for a layer that the format cannot hold, for an empty unit and for one of several
        sub-models.
        """
        plain_record = json.loads(_to_json(record))
        if unit in self._progress.units:
            raise ValueError(f"the unit {unit!r} has been added before")
        tensors = dict(dense)
        for name, weight in quantised.items():
            packed = {f"{name}.{suffix}": tensor for suffix, tensor in self._pack(name, weight).items()}
            if clash := sorted(packed.keys() & tensors.keys()):
                raise ValueError(f"tensor {clash[0]}: the layer is quantised, and dense as well")
            tensors |= packed
        self._check_names(unit, tensors)
        folder = self._folder_of(unit, tensors)
        layers = {name: self._layer(weight) for name, weight in quantised.items()}
        number = self._progress.next_number()
        path = self._shard_path(number)
        temporary = path.with_suffix(".tmp")
        try:
            inner = {_within(folder, name): tensor for name, tensor in tensors.items()}
            sha256 = _write_tensors(temporary, inner, _summary(layers.values()))
            done = _Unit(
                number=number,
                name=unit,
                folder=folder,
                record=plain_record,
                tensors=list(tensors),
                matrices=[n.removesuffix(".weight") for n, t in dense.items() if n.endswith(".weight") and t.ndim == 2],
                layers=layers,
                tensor_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
                file_bytes=temporary.stat().st_size,
                sha256=sha256,
            )
            _write(path.with_suffix(".json"), _to_json(asdict(done)))
            temporary.replace(path)  # from here on the unit is there
        finally:
            temporary.unlink(missing_ok=True)
        _sync(self._partial)
        self._progress.units[unit] = done

    def finish(
        self,
        config: Mapping[str, Any],
        *,
        documents: Mapping[str, bytes],
        record: Mapping[str, Any],
        configs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Makes the model folder out of the units.

        `config` is the content of config.json, `configs` those of the sub-models by folder; the quantization_config is
        added where there are quantised layers, in place of any it has. `documents` are the other files by name
        (tokenizer, preprocessor ...), `<folder>/<name>` in a sub-model. `record` goes into quantization.json, beside
        the units' records, every layer's scheme and the shards' SHA-256. Raises UnsupportedModel where no config can
        say which layers are quantised, ValueError for a document under a name of its own, InvalidRequest where
        `folder` has come to exist.
        """
        self._gather()
        units = self._progress.in_order()
        if not units or units[-1].number != len(units):
            raise ValueError(f"expected all units of the model, got {[unit.number for unit in units]}")
        if set(configs or {}) != set(self._folders):
            raise ValueError(f"expected the configs of {self._folders}, got {sorted(configs or {})}")
        shards = dict(zip((unit.name for unit in units), _shard_names(len(units)), strict=True))
        self._check_documents(documents, set(shards.values()))
        written = {folder: self._config_of(folder, inner) for folder, inner in (configs or {"": config}).items()}
        ready = self._partial / _READY
        for folder in ("", *self._folders):
            (ready / folder).mkdir()
        for name, data in documents.items():
            _write(ready / name, data)
        for folder in written:
            own = self._progress.of(folder)
            if len(units) > 1 and own:
                _write(ready / folder / _INDEX_FILE, _to_json(_index(own, shards)))
        _write(ready / RECORD_FILE, _to_json(self._account(units, shards, record)))
        for unit in units:
            self._shard_path(unit.number).replace(ready / unit.folder / shards[unit.name])
        for folder, inner in {"": config, **written}.items():
            _write(ready / folder / _CONFIG_FILE, _to_json(inner))
        self._refuse_existing()
        for folder in (*self._folders, ""):
            _sync(ready / folder)
        ready.rename(self._folder)
        _sync(self._folder.parent)
        shutil.rmtree(self._partial)

    def _config_of(self, folder: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with what it says of quantised layers; one of a sub-model that has none says nothing."""
        units = self._progress.of(folder)
        layers = {_within(folder, name): layer for unit in units for name, layer in unit.layers.items()}
        matrices = [_within(folder, name) for unit in units for name in unit.matrices]
        if folder and not layers:
            return {key: value for key, value in config.items() if key != "quantization_config"}
        return {**config, "quantization_config": _quantization(self._form, layers, matrices).to_dict()}

    def _check_documents(self, documents: Mapping[str, bytes], shards: set[str]) -> None:
        reserved = {_CONFIG_FILE, _INDEX_FILE, RECORD_FILE, *shards}
        for name in documents:
            folder, _, plain = name.rpartition("/")
            known = folder in ("", *self._folders) and Path(plain).name == plain
            if not known or plain in reserved or plain.endswith(".safetensors"):
                raise ValueError(f"expected a plain file name that the writer does not use itself, got {name!r}")

    def _folder_of(self, unit: str, tensors: Mapping[str, Tensor]) -> str:
        """The sub-model that all tensors of a unit belong to; "" where the model is one folder."""
        found = {name.partition(".")[0] for name in tensors} if self._folders else {""}
        if len(found) > 1 or not found <= {"", *self._folders}:
            raise ValueError(
                f"the unit {unit!r}: expected tensors of one folder of {self._folders}, got {sorted(found)}"
            )
        return found.pop()

    def _begin(self, settings: dict[str, Any]) -> None:
        """Opens the partial folder, or makes it."""
        partial = self._partial
        if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
            raise InvalidRequest(f"{partial} is in the way: expected a folder or nothing there")
        if partial.exists():
            progress = partial / _PROGRESS_FILE
            if not progress.exists() and any(entry.suffix != ".tmp" for entry in partial.iterdir()):
                raise InvalidRequest(
                    f"{partial} is no unfinished checkpoint: it has no {_PROGRESS_FILE}",
                    hint="move it away, or choose another output folder",
                )
            if not progress.exists() or _read_json(progress) != settings:
                shutil.rmtree(partial)
        if not partial.exists():
            partial.mkdir(parents=True)
            _write(partial / _PROGRESS_FILE, _to_json(settings))
            _sync(partial.parent)
        self._gather()
        self._resume()

    def _resume(self) -> None:
        """Takes up the whole units; removes whatever a kill has left of others."""
        kept = {_PROGRESS_FILE}
        for path in sorted(self._partial.glob("unit-*.json")):
            unit = _Unit.from_json(path.read_bytes())
            shard = self._shard_path(unit.number)
            if shard.exists() and shard.stat().st_size == unit.file_bytes:
                self._progress.units[unit.name] = unit
                kept |= {path.name, shard.name}
        for path in self._partial.iterdir():
            if path.name not in kept:
                path.unlink()

    def _gather(self) -> None:
        """Takes a `finish` that did not end back: shards to where units lie, the rest of it away."""
        ready = self._partial / _READY
        if not ready.exists():
            return
        for path in ready.rglob("*.safetensors"):
            if match := _SHARD.fullmatch(path.name):
                path.replace(self._shard_path(int(match[1] or 1)))
        shutil.rmtree(ready)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self._folder):
            raise InvalidRequest(
                f"{self._folder} exists: a model is not written over", hint="remove it, or choose another output folder"
            )

    def _shard_path(self, number: int) -> Path:
        return self._partial / f"unit-{number:05d}.safetensors"

    def _check_names(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            raise ValueError(f"the unit {unit!r} has no tensor")
        for other in self._progress.units.values():
            if clash := sorted(tensors.keys() & set(other.tensors)):
                raise ValueError(f"tensor {clash[0]}: in the unit {unit!r}, and in {other.name!r} before")

    def _pack(self, name: str, weight: Int4Weight | Int8Weight) -> dict[str, Tensor]:
        """The tensors of a layer by suffix. Raises ValueError with its name where the format cannot hold it."""
        try:
            if isinstance(weight, Int8Weight):
                if self._form == "awq":
                    raise ValueError("the awq format holds 4-bit layers alone, got one of 8 bits")
                return write_int_quantized(weight)
            if self._form == "awq":
                return write_awq_gemm(weight)
            return write_pack_quantized(weight, symmetric=self._symmetric)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None

    def _layer(self, weight: Int4Weight | Int8Weight) -> _Layer:
        K = weight.in_features
        if isinstance(weight, Int8Weight):
            return _Layer(bits=8, group_size=K, in_features=K, symmetric=True)
        return _Layer(bits=4, group_size=weight.group_size, in_features=K, symmetric=self._symmetric)

    def _account(self, units: list[_Unit], shards: Mapping[str, str], record: Mapping[str, Any]) -> dict[str, Any]:
        """What quantization.json says."""
        files = {unit.name: "/".join(filter(None, (unit.folder, shards[unit.name]))) for unit in units}
        return {
            "format_version": FORMAT_VERSION,
            "tool": {"name": "sparsevila", "version": __version__},
            "format": self._form,
            "record": record,
            "layers": {
                name: {
                    "scheme": layer.kind,
                    "bits": layer.bits,
                    "group_size": layer.group_size if layer.bits == 4 else None,
                    "symmetric": layer.symmetric,
                }
                for name, layer in self._progress.layers().items()
            },
            "units": {unit.name: {"shard": files[unit.name], "record": unit.record} for unit in units},
            "shards": {files[unit.name]: {"bytes": unit.file_bytes, "sha256": unit.sha256} for unit in units},
        }


# What config.json says ----------------------------------------------------------------------------------------------


def _quantization(form: OutputFormat, layers: Mapping[str, _Layer], dense: list[str]) -> QuantizationConfig:
    """The config that gives each quantised layer its scheme and each `dense` one none, by the names in the file.

    Raises UnsupportedModel where none does.
    """
    schemes = _schemes(layers)
    linear = [name for name in dense if "embed" not in name.rpartition(".")[2]]  # other matrices no target can mean
    config = _awq(schemes, linear) if form == "awq" else _compressed(schemes, linear)
    wanted: dict[str, Scheme | None] = {**dict.fromkeys(linear), **schemes}
    for name, scheme in wanted.items():
        if config.scheme(name) != scheme:
            raise UnsupportedModel(
                f"layer {name}: its name is too like others' for a quantization_config, which would say "
                f"{config.scheme(name)} instead of {scheme}"
            )
    return config


def _compressed(schemes: Mapping[str, Scheme], linear: list[str]) -> QuantizationConfig:
    among = [*schemes, *linear]
    groups = tuple(
        SchemeGroup(target_patterns([name for name in schemes if schemes[name] == scheme], among), scheme)
        for scheme in sorted(set(schemes.values()), key=lambda scheme: (-scheme.bits, scheme.group_size or 0))
    )
    return compressed_config(groups, dense=target_patterns(linear, among))


def _awq(schemes: Mapping[str, Scheme], linear: list[str]) -> QuantizationConfig:
    if len(set(schemes.values())) > 1:
        raise UnsupportedModel(f"the awq format holds one scheme, got {sorted(map(str, set(schemes.values())))}")
    try:
        parts = dense_parts(linear, list(schemes))
    except ValueError as error:
        raise UnsupportedModel(f"modules_to_not_convert: {error}") from None
    return awq_config(next(iter(schemes.values())).group_size, dense=parts)


def _schemes(layers: Mapping[str, _Layer]) -> dict[str, Scheme]:
    """Each layer's scheme; a row that is one group counts as that group size where other layers have it."""
    if not layers:
        raise UnsupportedModel("a quantised checkpoint without a quantised layer")
    sizes = {layer.group_size for layer in layers.values() if layer.bits == 4 and not layer.whole_row}

    def scheme(layer: _Layer) -> Scheme:
        whole = layer.bits == 8 or (layer.whole_row and layer.group_size not in sizes)
        return Scheme(layer.bits, None if whole else layer.group_size, layer.symmetric)

    return {name: scheme(layer) for name, layer in layers.items()}


# Files --------------------------------------------------------------------------------------------------------------


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _within(folder: str, name: str) -> str:
    """A tensor's or layer's name in its own folder."""
    return name.removeprefix(f"{folder}.") if folder else name


def _index(units: list[_Unit], shards: Mapping[str, str]) -> dict[str, Any]:
    weight_map = {_within(unit.folder, name): shards[unit.name] for unit in units for name in unit.tensors}
    total = sum(unit.tensor_bytes for unit in units)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _summary(layers: Iterable[_Layer]) -> dict[str, str]:
    """The `__metadata__` of a shard: texts, for people."""
    layers = list(layers)
    values = {
        "scheme": dict.fromkeys(layer.kind for layer in layers),
        "bits": dict.fromkeys(str(layer.bits) for layer in layers),
        "group_size": dict.fromkeys(str(layer.group_size) for layer in layers if layer.bits == 4),
    }
    return {"format": "pt"} | {key: " / ".join(found) for key, found in values.items() if found}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A safetensors file, to the disk; returns its SHA-256. One tensor at a time is copied where it has to be.

    Not by the safetensors package, which writes metadata in another order each time: the same content is to give the
    same bytes. Raises ValueError for a dtype that the format does not have.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each one is aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {name}: expected a dtype of {', '.join(map(str, _DTYPES))}, got {tensor.dtype}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        start: tuple[bytes | memoryview, ...] = (struct.pack("<Q", len(text)), text)
        for part in chain(start, (_memory(tensors[name]) for name in order)):
            file.write(part)
            digest.update(part)
    path.chmod(_MODE)
    _sync(path)
    return digest.hexdigest()


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; a copy where it is not contiguous, or not on the CPU."""
    plain = tensor.detach().cpu().contiguous()
    # A contiguous tensor of one element may have any stride, which `view(dtype)` refuses.
    found: memoryview = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data
    return found


def _to_json(values: Mapping[str, Any]) -> bytes:
    """Raises ValueError or TypeError for what is no plain JSON, a number that is none included."""
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _write(path: Path, data: bytes) -> None:
    """A whole file or none: under another name, to the disk, then in place."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.chmod(_MODE)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Has a file, or the entries of a folder, written to the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # a system that opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
