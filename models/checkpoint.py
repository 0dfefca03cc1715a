"""Reading a checkpoint folder safely: JSON files, safetensors headers and tensors, and typed config values.

The only file of `models` that opens files. Everything in a folder is untrusted: sizes and nesting are
capped before parsing, every offset of a safetensors file is checked before a byte of it is used, links
may not lead out, nothing is unpickled and no Python file is imported.

Tensors are read into memory of their own, not mapped: a mapped file that shrinks kills the process with
SIGBUS, a short read is an ordinary error. The header is checked here and not by the `safetensors` package
because that package takes the last of two equal names without a word.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, overload

import numpy as np
import torch
from torch import Tensor

from ..errors import CorruptCheckpoint, ModelNotFound

MAX_JSON_BYTES: Final = 16 << 20  # config and index files; the index of a 70B model has 0.1 MB
MAX_TOKENIZER_BYTES: Final = 64 << 20  # the largest tokenizer.json in use has about 35 MB
MAX_JSON_DEPTH: Final = 64
MAX_HEADER_BYTES: Final = 100_000_000  # the cap of the safetensors package
SIZE_TOLERANCE: Final = 0.01  # of the index's total_size, which some writers count with tied tensors

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
TOKENIZER_FILES: Final = ("tokenizer.model", "tokenizer.json", "vocab.json")

# A folder of sub-models (NVILA, LongVILA): each of these is a checkpoint of its own, with config and weights.
LANGUAGE_FOLDER: Final = "llm"
SUB_FOLDERS: Final = (LANGUAGE_FOLDER, "vision_tower", "mm_projector")
INNER_ROOT: Final = "model"  # some training scripts put all of it one level down

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
_OPEN, _CLOSE = (ord("["), ord("{")), (ord("]"), ord("}"))
_SCAN_STEP = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `begin` and `end` are byte offsets in `file`."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it, e.g. "BF16"
    file: Path
    begin: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


def shown(value: object) -> str:
    """A value of an untrusted file for a message: escaped and short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _corrupt(file: str, reason: str) -> NoReturn:
    raise CorruptCheckpoint(f"{file}: {reason}", hint="download or copy the file again")


# JSON ---------------------------------------------------------------------------------------------------------------


def _check_depth(data: bytes, file: str) -> None:
    """Linear, without recursion. Brackets inside strings do not count."""
    # In a run of backslashes pairs escape each other from the left; only an odd last one escapes a quote.
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    depth, inside = 0, np.uint8(0)
    for start in range(0, len(plain), _SCAN_STEP):
        part = np.frombuffer(plain, np.uint8, min(_SCAN_STEP, len(plain) - start), start)
        quoted = np.bitwise_xor.accumulate((part == ord('"')).view(np.uint8)) ^ inside
        step = ((part == _OPEN[0]) | (part == _OPEN[1])).view(np.int8) - (
            (part == _CLOSE[0]) | (part == _CLOSE[1])
        ).view(np.int8)
        step[quoted != 0] = 0
        depths = depth + np.cumsum(step, dtype=np.int32)
        if depths.max() > MAX_JSON_DEPTH:
            _corrupt(file, f"JSON nested deeper than {MAX_JSON_DEPTH} levels")
        depth, inside = int(depths[-1]), quoted[-1]


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise KeyError(key)
            seen.add(key)
    return values


def parse_json(data: bytes, file: str) -> dict[str, Any]:
    """A JSON object of an untrusted file. Raises CorruptCheckpoint for broken, deep or doubled content."""
    _check_depth(data, file)
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_pairs)
    except KeyError as error:
        _corrupt(file, f"the key {shown(error.args[0])} stands there twice")
    except UnicodeDecodeError:
        _corrupt(file, "expected UTF-8 text")
    except (ValueError, RecursionError):
        _corrupt(file, "not valid JSON")
    if not isinstance(values, dict):
        _corrupt(file, f"expected a JSON object, got {type(values).__name__}")
    return values


# safetensors --------------------------------------------------------------------------------------------------------


def _header_bytes(path: Path) -> tuple[bytes, int, int]:
    """The raw header, the offset of the first tensor byte, the file size."""
    name = path.name
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            _corrupt(name, f"expected at least 8 bytes, got {len(start)}")
        if start[:4] == b"PK\x03\x04" or (start[0] == 0x80 and start[1] in range(2, 6)):
            _corrupt(name, "this is a pickled PyTorch file under a safetensors name; it is never unpickled")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            _corrupt(name, f"header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
        if length > size - 8:
            _corrupt(name, f"header of {length} bytes in a file of {size} bytes")
        header = file.read(length)
    if len(header) != length:
        _corrupt(name, f"expected {length} bytes of header, got {len(header)}")
    if not header.startswith(b"{"):
        _corrupt(name, "the header is not a JSON object")
    return header, 8 + length, size


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    file, which = path.name, f"tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _corrupt(file, f"{which}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _corrupt(file, f"{which}: unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or not all(_is_count(side) for side in shape):
        _corrupt(file, f"{which}: expected a shape of non-negative whole numbers, got {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        _corrupt(file, f"{which}: expected two offsets, got {shown(offsets)}")
    begin, end = offsets
    need = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != need:
        _corrupt(file, f"{which}: {dtype} {shown(shape)} needs {need} bytes, the offsets span {end - begin}")
    return TensorInfo(tuple(shape), dtype, path, data_start + begin, data_start + end)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names and places of the tensors of one safetensors file, in the order of their bytes.

    Every byte behind the header belongs to exactly one tensor. Raises CorruptCheckpoint otherwise.
    """
    try:
        raw, data_start, size = _header_bytes(path)
    except OSError:
        _corrupt(path.name, "cannot be read")
    header = parse_json(raw, path.name)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _corrupt(path.name, "__metadata__: expected names and texts")
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    expected = data_start
    for name, info in tensors.items():
        if info.begin != expected:
            kind = "overlaps the one before" if info.begin < expected else "leaves a hole before it"
            _corrupt(path.name, f"tensor {shown(name)} {kind}: expected offset {expected}, got {info.begin}")
        expected = info.end
    if expected != size:
        kind = "is cut short" if expected > size else "has trailing bytes"
        _corrupt(path.name, f"the file {kind}: expected {expected} bytes, got {size}")
    return tensors


def _read_tensor(file: Any, info: TensorInfo, name: str) -> Tensor:
    tensor = torch.empty(info.shape, dtype=info.torch_dtype)
    if tensor.numel():
        target = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.seek(info.begin)
        got = file.readinto(target)
        if got != len(target):
            _corrupt(info.file.name, f"tensor {shown(name)}: expected {len(target)} bytes, got {got}")
    return tensor


# The folder ---------------------------------------------------------------------------------------------------------


def _is_plain_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name) <= 255
        and not re.search(r"[/\\:\x00-\x1f]", name)
    )


def _stays_inside(folder: Path, path: Path) -> bool:
    """Whether a link leads to a file of the folder, or to the blobs of the Hugging Face cache that it lies in.

    A snapshot is CACHE/models--USER--REPO/snapshots/REVISION. Its files link to `blobs` of the repository, and
    those may link on to a `blobs` that all repositories of the cache share.
    """
    target = path.resolve()
    repository = folder.parent.parent
    in_cache = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    allowed = (folder, repository / "blobs", repository.parent / "blobs") if in_cache else (folder,)
    return any(target.is_relative_to(place) for place in allowed)


class Checkpoint:
    """One model folder whose names, sizes and offsets have been checked. Holds no file open.

    `tensors` maps every tensor name to its place; `notes` are plain sentences about what was ignored. `folders` are
    the checkpoints of the sub-models by the names of their folders, where the model is a folder of sub-models: their
    tensors are in `tensors` too, under `<folder>.<name>`.
    """

    def __init__(self, folder: Path, *, root: Path | None = None) -> None:
        """Use `Checkpoint.open`; this alone checks nothing. `root`: of a sub-model, the folder of the whole."""
        self.folder = folder
        self._real = (root or folder).resolve()
        self.config: dict[str, Any] = {}
        self.tensors: Mapping[str, TensorInfo] = {}
        self.notes: tuple[str, ...] = ()
        self.folders: Mapping[str, Checkpoint] = {}

    @classmethod
    def open(cls, folder: str | Path, *, tokenizer: bool = True) -> Checkpoint:
        """Check a folder and read its config and tensor headers.

        `tokenizer=False` for a folder that needs none, such as a vision tower alone. Raises ModelNotFound where
        there is no model at all, CorruptCheckpoint where a part is missing or damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise ModelNotFound(f"{folder} {what}", hint="give a folder with config.json and safetensors files")
        inner = cls(folder / INNER_ROOT, root=folder)
        checkpoint = inner if inner._is_divided() else cls(folder)
        if checkpoint._is_divided():
            checkpoint._open_folders(tokenizer=tokenizer)
        else:
            checkpoint._open_files(tokenizer=tokenizer)
        return checkpoint

    @property
    def language(self) -> Checkpoint:
        """Where config and tokenizer of the language model are: a folder of its own, or this one."""
        return self.folders.get(LANGUAGE_FOLDER, self)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.end - info.begin for info in self.tensors.values())

    def has(self, name: str) -> bool:
        """Whether the folder has a file of that name."""
        return (self.folder / name).exists()

    def read_bytes(self, name: str, max_bytes: int) -> bytes:
        """A whole file of the folder. Raises CorruptCheckpoint if it is missing, too large or not a plain file."""
        path = self._path(name)
        try:
            size = path.stat().st_size
            if size > max_bytes:
                _corrupt(name, f"{size} bytes, at most {max_bytes} are allowed")
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        except OSError:
            _corrupt(name, "cannot be read")
        if len(data) > max_bytes:
            _corrupt(name, f"more than {max_bytes} bytes")
        return data

    @overload
    def read_json(self, name: str, *, required: Literal[True], max_bytes: int = ...) -> dict[str, Any]: ...
    @overload
    def read_json(self, name: str, *, required: bool = ..., max_bytes: int = ...) -> dict[str, Any] | None: ...
    def read_json(self, name: str, *, required: bool = False, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
        """The object in a JSON file of the folder; None where it is missing and not required."""
        if not self.has(name):
            if required:
                _corrupt(name, "missing")
            return None
        return parse_json(self.read_bytes(name, max_bytes), name)

    def headers(self) -> dict[str, Tensor]:
        """Every tensor's shape and dtype, as a tensor on `meta`."""
        return {n: torch.empty(t.shape, dtype=t.torch_dtype, device="meta") for n, t in self.tensors.items()}

    def part(self, names: Collection[str]) -> Checkpoint:
        """The same folder with these tensors alone: what reads a checkpoint reads them, and nothing else of a file.

        Raises CorruptCheckpoint for a name that is not there.
        """
        wanted = set(names)
        if missing := sorted(wanted - self.tensors.keys()):
            raise CorruptCheckpoint(f"tensor {shown(missing[0])} is not in {self.folder}")
        part = Checkpoint(self.folder)
        part._real, part.config, part.notes, part.folders = self._real, self.config, self.notes, self.folders
        part.tensors = {name: info for name, info in self.tensors.items() if name in wanted}
        return part

    def read_tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """The tensors of these names, each in fresh memory; CPU, stored dtype. Raises CorruptCheckpoint."""
        return dict(self.part(names).iter_tensors())

    def iter_tensors(self, together: Callable[[str], str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, shard by shard in the order of the bytes; CPU, stored dtype.

        `together` names a tensor's group: those of one group in one shard follow its first one. Each tensor is fresh
        memory that the caller may keep; only what the caller keeps stays. Raises CorruptCheckpoint where a file
        changed since it was opened.
        """
        for path in dict.fromkeys(info.file for info in self.tensors.values()):
            try:
                with path.open("rb", buffering=0) as file:
                    reader = _FullReads(file)
                    for name, info in self._in_groups(path, together):
                        yield name, _read_tensor(reader, info, name)
            except OSError:
                _corrupt(path.name, "cannot be read")

    def _in_groups(self, path: Path, together: Callable[[str], str] | None) -> list[tuple[str, TensorInfo]]:
        """The tensors of one file in the order in which they are read."""
        items = [(name, info) for name, info in self.tensors.items() if info.file == path]
        if together is None:
            return items
        groups: dict[str, list[tuple[str, TensorInfo]]] = {}
        for name, info in items:
            groups.setdefault(together(name), []).append((name, info))
        return [item for group in groups.values() for item in group]

    def _path(self, name: str) -> Path:
        """The path of a file that exists, is a regular one and does not lie outside."""
        if not _is_plain_name(name):
            raise CorruptCheckpoint(f"expected a plain file name, got {shown(name)}")
        path = self.folder / name
        if not _stays_inside(self._real, path):
            _corrupt(name, "is a link that leads out of the model folder")
        try:
            mode = path.stat().st_mode
        except OSError:
            _corrupt(name, "missing or unreadable")
        if not stat.S_ISREG(mode):
            _corrupt(name, "is not a regular file")
        return path

    def _open_files(self, *, tokenizer: bool, weights: bool = True) -> None:
        """Checks and reads a folder that holds config and weights itself."""
        shards = self._require_files(tokenizer=tokenizer, weights=weights)
        self.config = self.read_json("config.json", required=True)
        self.tensors = self._read_headers(shards, empty_ok=not weights)
        self.notes = (*self.notes, *self._ignored())

    def _is_divided(self) -> bool:
        """Whether this is a folder of sub-models. The keys and folders of one that is damaged count as well."""
        if not self.folder.is_dir() or self.has(SINGLE_FILE) or self.has(INDEX_FILE):
            return False
        if any((self.folder / name).is_dir() for name in SUB_FOLDERS):
            return True
        return self.has("config.json") and f"{LANGUAGE_FOLDER}_cfg" in self.read_json("config.json", required=True)

    def _open_folders(self, *, tokenizer: bool) -> None:
        """Checks and reads a folder of sub-models. Errors name the sub-folder.

        The paths that the config gives for them are those of the machine it was written on: the folder names count.
        """
        missing = [f"{name}/" for name in SUB_FOLDERS if not (self.folder / name).is_dir()]
        if not self.has("config.json"):
            missing.insert(0, "config.json")
        if missing:
            raise CorruptCheckpoint(
                f"{self.folder}: missing {'; '.join(missing)}",
                hint=f"a model of this kind has the folders {', '.join(SUB_FOLDERS)}: copy what is missing",
            )
        self.config = self.read_json("config.json", required=True)
        folders, tensors = {}, {}
        for name in SUB_FOLDERS:
            part = Checkpoint(self.folder / name, root=self._real)
            try:
                config = part.read_json("config.json") or {}
                has_weights = config.get("mm_projector_type") != "identity"
                part._open_files(tokenizer=tokenizer and name == LANGUAGE_FOLDER, weights=has_weights)
            except (CorruptCheckpoint, ModelNotFound) as error:
                raise CorruptCheckpoint(f"{name}/: {error}", hint=error.hint) from None
            folders[name] = part
            tensors.update({f"{name}.{tensor}": info for tensor, info in part.tensors.items()})
            self.notes = (*self.notes, *(f"{name}/: {note}" for note in part.notes))
        self.folders, self.tensors = folders, tensors
        self.notes = (*self.notes, *self._ignored())

    def _require_files(self, *, tokenizer: bool, weights: bool = True) -> list[str]:
        """The names of the shards. Raises one error that lists everything that is missing."""
        shards, missing = self._shards() if weights or self.has(SINGLE_FILE) or self.has(INDEX_FILE) else ([], [])
        no_config = not self.has("config.json")
        if no_config:
            missing.insert(0, "config.json")
        if tokenizer and not any(self.has(name) for name in TOKENIZER_FILES):
            missing.append("a tokenizer (tokenizer.model, tokenizer.json, or vocab.json with merges.txt)")
        if not missing:
            return shards
        kind = ModelNotFound if no_config and not shards else CorruptCheckpoint
        hint = "copy the missing files into the folder, or download the model again"
        if not shards and (pickled := self._pickled()):
            missing.append(f"{pickled} is there, but pickled weights are never loaded")
            hint = (
                "convert the weights to safetensors elsewhere, for example with transformers: "
                "AutoModelForImageTextToText.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise kind(f"{self.folder}: missing {'; '.join(missing)}", hint=hint)

    def _shards(self) -> tuple[list[str], list[str]]:
        """The weight files, and what of them is missing."""
        if self.has(SINGLE_FILE):
            return [SINGLE_FILE], []
        if not self.has(INDEX_FILE):
            return [], [f"weights ({SINGLE_FILE} or {INDEX_FILE})"]
        shards = sorted(set(self._weight_map().values()))
        return shards, [name for name in shards if not self.has(name)]

    def _weight_map(self) -> dict[str, str]:
        """Tensor name -> shard name, each a plain name."""
        weight_map = self.read_json(INDEX_FILE, required=True).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            _corrupt(INDEX_FILE, "expected a weight_map")
        for tensor, shard in weight_map.items():
            if not _is_plain_name(shard) or not shard.endswith(".safetensors"):
                _corrupt(
                    INDEX_FILE,
                    f"tensor {shown(tensor)}: expected a plain file name ending in .safetensors, got {shown(shard)}",
                )
        return weight_map

    def _read_headers(self, shards: Sequence[str], *, empty_ok: bool = False) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            found = read_header(self._path(shard))
            for name in found.keys() & tensors.keys():
                _corrupt(shard, f"tensor {shown(name)} is also in {tensors[name].file.name}")
            tensors.update(found)
        if not tensors:
            if empty_ok:
                return {}
            _corrupt(SINGLE_FILE, "holds no tensor")
        if not self.has(SINGLE_FILE):
            self._check_index(tensors)
        return tensors

    def _check_index(self, tensors: Mapping[str, TensorInfo]) -> None:
        """The index and the shards name the same tensors in the same files."""
        weight_map = self._weight_map()
        for name, shard in weight_map.items():
            if name not in tensors:
                _corrupt(INDEX_FILE, f"tensor {shown(name)} is not in {shard}")
            if tensors[name].file.name != shard:
                _corrupt(INDEX_FILE, f"tensor {shown(name)}: expected in {shard}, found in {tensors[name].file.name}")
        for name in tensors.keys() - weight_map.keys():
            _corrupt(tensors[name].file.name, f"tensor {shown(name)} is not in the index")
        self._check_total(sum(info.end - info.begin for info in tensors.values()))

    def _check_total(self, found: int) -> None:
        metadata = self.read_json(INDEX_FILE, required=True).get("metadata") or {}
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        if stated is None:
            return
        if isinstance(stated, bool) or not isinstance(stated, (int, float)) or not abs(stated) < 2**63:
            _corrupt(INDEX_FILE, f"total_size: expected a number of bytes, got {shown(stated)}")
        if abs(stated - found) > SIZE_TOLERANCE * found:
            _corrupt(INDEX_FILE, f"total_size: expected {found} bytes as in the shards, got {shown(stated)}")
        if stated != found:
            self.notes = (*self.notes, f"{INDEX_FILE} states {stated:.0f} bytes of tensors, the shards hold {found}")

    def _pickled(self) -> str | None:
        names = sorted(entry.name for entry in os.scandir(self.folder))
        return next((name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))), None)

    def _ignored(self) -> list[str]:
        notes = []
        if "auto_map" in self.config:
            notes.append("auto_map in config.json is ignored: code of a checkpoint is never imported")
        if any(entry.name.endswith(".py") for entry in os.scandir(self.folder)):
            notes.append("Python files in the folder are ignored: code of a checkpoint is never imported")
        return notes


class _FullReads:
    """`readinto` that goes on until the buffer is full or the file ends; one system call reads at most 2 GiB."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def seek(self, offset: int) -> None:
        self._file.seek(offset)

    def readinto(self, target: memoryview) -> int:
        done = 0
        while done < len(target):
            got = self._file.readinto(target[done : done + (1 << 30)])
            if not got:
                break
            done += got
        return done


# Typed config values ------------------------------------------------------------------------------------------------


class _Required:
    """Marks a key without a default."""


REQUIRED: Final = _Required()
Key = str | tuple[str, ...]  # one key, or the spellings of one key


class ConfigReader:
    """Typed, range-checked access to a config. Every error names the file, the key and the value.

    A missing key takes `default`, or is an error where there is none. `null` is a value: it overrides the
    default, and gives None where `none_ok`, otherwise an error. A key may be a tuple of spellings of which
    at most one value may occur.
    """

    def __init__(self, values: Mapping[str, Any], *, file: str = "config.json", prefix: str = "") -> None:
        self.values = values
        self.file = file
        self._prefix = prefix

    def has(self, key: Key) -> bool:
        """Whether the key is there, `null` included."""
        return any(name in self.values for name in _spellings(key))

    def fail(self, key: Key, expected: str) -> NoReturn:
        """Raise CorruptCheckpoint for a key whose value is there but wrong."""
        name = next((name for name in _spellings(key) if name in self.values), _spellings(key)[0])
        value = self.values.get(name)
        raise CorruptCheckpoint(f"{self.file}: {self._prefix}{name}: expected {expected}, got {shown(value)}")

    def sub(self, key: Key, *, required: bool = True) -> ConfigReader:
        """The reader of a nested object; an empty one where it is missing or null and not required."""
        value = self._get(key, REQUIRED if required else None)
        if value is None and not required:
            value = {}
        if not isinstance(value, dict):
            self.fail(key, "an object")
        return ConfigReader(value, file=self.file, prefix=f"{self._prefix}{_spellings(key)[0]}.")

    @overload
    def get_int(self, key: Key, default: int | _Required = ..., *, low: int = ..., high: int = ...) -> int: ...
    @overload
    def get_int(
        self, key: Key, default: int | _Required | None = ..., *, low: int = ..., high: int = ..., none_ok: bool
    ) -> int | None: ...
    def get_int(
        self,
        key: Key,
        default: int | _Required | None = REQUIRED,
        *,
        low: int = 1,
        high: int = 2**31 - 1,
        none_ok: bool = False,
    ) -> int | None:
        """A whole number within low..high, both included."""
        value = self._get(key, default)
        if self._absent(key, value, none_ok):
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(key, f"a whole number from {low} to {high}")
        return value

    @overload
    def get_float(
        self, key: Key, default: float | _Required = ..., *, low: float = ..., high: float = ...
    ) -> float: ...
    @overload
    def get_float(
        self, key: Key, default: float | _Required | None = ..., *, low: float = ..., high: float = ..., none_ok: bool
    ) -> float | None: ...
    def get_float(
        self,
        key: Key,
        default: float | _Required | None = REQUIRED,
        *,
        low: float = -1e30,
        high: float = 1e30,
        none_ok: bool = False,
    ) -> float | None:
        """A finite number within low..high, both included."""
        value = self._get(key, default)
        if self._absent(key, value, none_ok):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self.fail(key, f"a number from {low:g} to {high:g}")
        return float(value)

    @overload
    def get_bool(self, key: Key, default: bool | _Required = ...) -> bool: ...
    @overload
    def get_bool(self, key: Key, default: bool | _Required | None = ..., *, none_ok: bool) -> bool | None: ...
    def get_bool(self, key: Key, default: bool | _Required | None = REQUIRED, *, none_ok: bool = False) -> bool | None:
        """true or false."""
        value = self._get(key, default)
        if self._absent(key, value, none_ok):
            return value
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    @overload
    def get_str(self, key: Key, default: str | _Required = ..., *, choices: Sequence[str] = ...) -> str: ...
    @overload
    def get_str(
        self, key: Key, default: str | _Required | None = ..., *, choices: Sequence[str] = ..., none_ok: bool
    ) -> str | None: ...
    def get_str(
        self,
        key: Key,
        default: str | _Required | None = REQUIRED,
        *,
        choices: Sequence[str] = (),
        none_ok: bool = False,
    ) -> str | None:
        """A text, one of `choices` where given."""
        value = self._get(key, default)
        if self._absent(key, value, none_ok):
            return value
        if not isinstance(value, str) or (choices and value not in choices):
            self.fail(key, f"one of {', '.join(map(repr, choices))}" if choices else "a text")
        return value

    @overload
    def get_list(self, key: Key, default: Sequence[Any] | _Required = ..., *, max_len: int = ...) -> list[Any]: ...
    @overload
    def get_list(
        self, key: Key, default: Sequence[Any] | _Required | None = ..., *, max_len: int = ..., none_ok: bool
    ) -> list[Any] | None: ...
    def get_list(
        self,
        key: Key,
        default: Sequence[Any] | _Required | None = REQUIRED,
        *,
        max_len: int = 4096,
        none_ok: bool = False,
    ) -> list[Any] | None:
        """A list of at most `max_len` items, which the caller checks."""
        value = self._get(key, default)
        if self._absent(key, value, none_ok):
            return value
        if not isinstance(value, (list, tuple)) or len(value) > max_len:
            self.fail(key, f"a list of at most {max_len} items")
        return list(value)

    def get_ints(
        self,
        key: Key,
        default: Sequence[int] | _Required = REQUIRED,
        *,
        low: int = 0,
        high: int = 2**31 - 1,
        max_len: int = 4096,
    ) -> tuple[int, ...]:
        """A list of whole numbers within low..high, both included."""
        values = self.get_list(key, default, max_len=max_len)
        if not all(isinstance(v, int) and not isinstance(v, bool) and low <= v <= high for v in values):
            self.fail(key, f"a list of whole numbers from {low} to {high}")
        return tuple(values)

    def get_triple(self, key: Key, default: Sequence[float]) -> tuple[float, float, float]:
        """Three numbers, one a colour."""
        values = self.get_list(key, default)
        if len(values) != 3 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            self.fail(key, "three numbers")
        return float(values[0]), float(values[1]), float(values[2])

    def _get(self, key: Key, default: Any) -> Any:
        found = [name for name in _spellings(key) if name in self.values]
        if not found:
            if default is REQUIRED:
                raise CorruptCheckpoint(f"{self.file}: {self._prefix}{_spellings(key)[0]}: the key is missing")
            return default
        value = self.values[found[0]]
        for other in found[1:]:
            if self.values[other] != value:
                self.fail(key, f"the same value as {self._prefix}{other} ({shown(self.values[other])})")
        return value

    def _absent(self, key: Key, value: Any, none_ok: bool) -> bool:
        """Whether the answer is None: an allowed null, or a default of None for a missing key."""
        return value is None and (none_ok or not self.has(key))


def _spellings(key: Key) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key
