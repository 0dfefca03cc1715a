"""Where models are: aliases, folders on this machine, the Hugging Face cache, and the explicit download.

`resolve` and `list_models` never touch the network and do not import `huggingface_hub`. `download` is the
one function that does, and runs only where a user asked for it. It fetches JSON files, safetensors and the
tokenizer's files, of a folder of sub-models those of each, nothing that could hold code or pickles, into a folder
that `resolve` does not look at, and renames that folder once every checksum is right.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from ..errors import CorruptCheckpoint, ModelNotFound, SparseVILAError
from ..models.checkpoint import INNER_ROOT, SUB_FOLDERS, Checkpoint, shown
from ..models.interface import Progress, ProgressFn, no_progress

DISK_MARGIN_BYTES: Final = 256 << 20  # left free beside a download
TIMEOUT_S: Final = 30.0
RETRY_PAUSE_S: Final = 1.0
SOURCE_FILE: Final = "sparsevila_source.json"  # in a downloaded folder: repository and commit
BUNDLED: Final = "bundled"
QUANTISED: Final = "-w8a8-w4a16"  # behind a model's name: the copy of it that was quantised on this machine

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WANTED = re.compile(
    rf"((?:{INNER_ROOT}/)?(?:{'|'.join(SUB_FOLDERS)})/)?"
    r"([A-Za-z0-9][A-Za-z0-9._-]*\.(safetensors|json)|tokenizer\.model|merges\.txt)"
)
_HASH_STEP = 8 << 20


@dataclass(frozen=True)
class Alias:
    """A name for people. `size_bytes` of the weights is computed from the architecture, for display only."""

    repository: str | None  # None: bundled with the package
    revision: str
    size_bytes: int
    licence: str


# Revisions stand at "main" because no commit could be looked up when this table was written: put the commit
# here that is in `sparsevila_source.json` after the first download. Sizes are those of `benchmarks/published.py`,
# licences those that the model cards state for the weights; what a licence asks for, its text says.
_LLAMA_2 = "Llama 2 Community License (base model)"
_APACHE, _APACHE_BASE = "Apache 2.0", "Apache 2.0 (base model)"
_QWEN, _QWEN_RESEARCH = "Qwen license", "Qwen Research License (non-commercial)"
_NON_COMMERCIAL = "CC BY-NC 4.0"
ALIASES: Final[dict[str, Alias]] = {
    "demo": Alias(None, "", 8_200_000, "as this package"),
    "demo-quantised": Alias(None, "", 3_800_000, "as this package"),
    "llava-next-7b": Alias("llava-hf/llava-v1.6-vicuna-7b-hf", "main", 14_101_665_792, _LLAMA_2),
    "llava-next-mistral-7b": Alias("llava-hf/llava-v1.6-mistral-7b-hf", "main", 15_108_298_752, _APACHE_BASE),
    "llava-next-video-7b": Alias("llava-hf/LLaVA-NeXT-Video-7B-hf", "main", 14_101_665_792, _LLAMA_2),
    "llava-next-13b": Alias("llava-hf/llava-v1.6-vicuna-13b-hf", "main", 26_677_803_008, _LLAMA_2),
    "llava-onevision-0.5b": Alias("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "main", 1_787_346_496, _APACHE),
    "llava-onevision-7b": Alias("llava-hf/llava-onevision-qwen2-7b-ov-hf", "main", 16_059_775_552, _APACHE),
    "qwen2-vl-2b": Alias("Qwen/Qwen2-VL-2B-Instruct", "main", 4_417_971_200, _APACHE),
    "qwen2-vl-7b": Alias("Qwen/Qwen2-VL-7B-Instruct", "main", 16_582_751_232, _APACHE),
    "qwen2-vl-72b": Alias("Qwen/Qwen2-VL-72B-Instruct", "main", 146_811_120_640, _QWEN),
    "qwen2.5-vl-3b": Alias("Qwen/Qwen2.5-VL-3B-Instruct", "main", 7_509_245_952, _QWEN_RESEARCH),
    "qwen2.5-vl-3b-awq": Alias("Qwen/Qwen2.5-VL-3B-Instruct-AWQ", "main", 3_401_637_888, _QWEN_RESEARCH),
    "qwen2.5-vl-7b": Alias("Qwen/Qwen2.5-VL-7B-Instruct", "main", 16_584_333_312, _APACHE),
    "qwen2.5-vl-7b-awq": Alias("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "main", 6_923_847_680, _APACHE),
    "qwen2.5-vl-32b": Alias("Qwen/Qwen2.5-VL-32B-Instruct", "main", 66_905_436_672, _APACHE),
    "qwen2.5-vl-72b": Alias("Qwen/Qwen2.5-VL-72B-Instruct", "main", 146_821_554_688, _QWEN),
    "nvila-8b": Alias("Efficient-Large-Model/NVILA-8B", "main", 16_146_289_984, _NON_COMMERCIAL),
    "nvila-lite-8b": Alias("Efficient-Large-Model/NVILA-Lite-8B", "main", 16_143_642_688, _NON_COMMERCIAL),
    "longvila-7b": Alias("Efficient-Large-Model/qwen2-7b-longvila-256f", "main", 16_080_192_832, _NON_COMMERCIAL),
    "longvila-7b-1m": Alias("Efficient-Large-Model/qwen2-7b-longvila-1M", "main", 16_079_513_152, _NON_COMMERCIAL),
    "longvila-1.5b": Alias("Efficient-Large-Model/qwen2-1.5b-longvila-256f", "main", 3_900_933_696, _NON_COMMERCIAL),
}


@dataclass(frozen=True)
class ModelFolder:
    """A complete model on this machine, or the folder that the caller named."""

    path: Path
    origin: str  # "folder", "bundled", "SPARSEVILA_HOME" or "Hugging Face cache": for the banner


@dataclass(frozen=True)
class ModelRow:
    """One line of the list of known models."""

    alias: str
    repository: str
    size_bytes: int
    licence: str
    found: Path | None


@dataclass(frozen=True)
class _Target:
    """What a name stands for. `names` are its folders under `models` in our home."""

    name: str
    repository: str | None
    revision: str
    size_bytes: int | None
    names: tuple[str, ...]

    @property
    def command(self) -> str:
        return f"python chat.py models --get {self.name}"


def resolve(
    model: str | Path,
    *,
    offline: bool = False,
    quantised: bool = False,
    home: Path | None = None,
    hf_cache: Path | None = None,
) -> ModelFolder:
    """The folder of a model that is on this machine: an explicit path, an alias, or `hf:USER/REPO`.

    Looks under `home` (default `$SPARSEVILA_HOME`, then `~/.sparsevila`) and in `hf_cache` (default that of
    `huggingface_hub`). Never downloads; `offline` only leaves the download out of the advice. A folder that the
    caller names is returned as it is; of all others only complete ones, and with `quantised` the copy that was
    quantised here before its original. Raises ModelNotFound with the ways to get it.
    """
    explicit = _explicit(model)
    if explicit is not None and (explicit / "config.json").is_file():
        return ModelFolder(explicit, "folder")
    target = None if isinstance(model, Path) else _target(model)
    if target is None or target.name not in ALIASES:
        if explicit is not None and explicit.is_dir():
            return ModelFolder(explicit, "folder")  # reading it will say what is missing
        if explicit is not None and explicit.exists():
            raise ModelNotFound(f"{explicit} is a file", hint="give the folder that holds config.json")
    if target is None:
        raise _unknown(str(model))
    places = list(_places(target, home, hf_cache, quantised=quantised))
    problems = []
    for place in places:
        problem = _problem(place.path)
        if problem is None:
            return place
        problems.append(problem)
    raise _not_here(target, problems, offline=offline, home=home, hf_cache=hf_cache)


def quantised_folder(model: str, home: Path | None = None) -> Path | None:
    """Where the quantised copy of a known model or of `hf:USER/REPO` belongs; None for any other text.

    None as well for the bundled model, which is small.
    """
    target = _target(model)
    if target is None or target.repository is None:
        return None
    return _models_folder(home) / f"{target.names[0]}{QUANTISED}"


def list_models(home: Path | None = None, hf_cache: Path | None = None) -> list[ModelRow]:
    """Every alias and where it is on this machine. No network."""
    return [
        ModelRow(alias, entry.repository or BUNDLED, entry.size_bytes, entry.licence, found.path if found else None)
        for alias, entry in ALIASES.items()
        for found in [_find(_of_alias(alias), home, hf_cache, quantised=True)]
    ]


def download(
    alias_or_repo: str,
    *,
    home: Path | None = None,
    hf_cache: Path | None = None,
    progress: ProgressFn = no_progress,
    endpoint: str | None = None,
    revision: str | None = None,
) -> ModelFolder:
    """Fetch a model into `home`; one that is complete on this machine is returned at once, without network.

    `alias_or_repo` is an alias, `hf:USER/REPO` or `USER/REPO`; `revision` a branch, tag or commit in place of the
    table's. `progress` counts bytes in the stages "download" and "verify"; what it raises stops the work, and the
    next call goes on from the byte where it stopped. Raises ModelNotFound for everything that the hub, the network
    or the disk refuses, CorruptCheckpoint for a repository that is no complete model.
    """
    named = f"hf:{alias_or_repo}" if alias_or_repo not in ALIASES and "/" in alias_or_repo else alias_or_repo
    target = _target(named.replace("hf:hf:", "hf:"))
    if target is None:
        raise _unknown(alias_or_repo)
    if target.repository is None:
        return resolve(target.name, home=home, hf_cache=hf_cache)
    final = _models_folder(home) / target.names[0]
    here = _already_here(target, final, revision, home, hf_cache)
    if here is not None:
        return here
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelNotFound(f"{target.name} is not here, and HF_HUB_OFFLINE forbids to fetch it")
    target = replace(target, revision=revision or target.revision)
    meter = _Meter(progress)
    with _plain_errors(target, meter):
        commit, files = _listing(target, endpoint)
        staging = _staging(final, commit)
        _check_disk(target, files, staging)
        _fetch_all(target, commit, files, staging, meter, endpoint)
        _verify_all(files, staging, meter)
    return _publish(target, commit, staging, final)


# Names --------------------------------------------------------------------------------------------------------------


def _explicit(model: str | Path) -> Path | None:
    """The path that a caller may mean; None for text that cannot be one."""
    if not str(model).strip() or "\0" in str(model) or len(str(model)) > 4096:
        return None
    with contextlib.suppress(RuntimeError, OSError):  # no home folder for `~user`; a name that is too long
        path = Path(model).expanduser()
        path.exists()
        return path
    return None


def _of_alias(alias: str) -> _Target:
    entry = ALIASES[alias]
    names = (alias,) if entry.repository is None else (alias, entry.repository.replace("/", "--"))
    return _Target(alias, entry.repository, entry.revision, entry.size_bytes, names)


def _target(name: str) -> _Target | None:
    """What an alias or `hf:USER/REPO` stands for; None for any other text."""
    if name in ALIASES:
        return _of_alias(name)
    repository = name.removeprefix("hf:")
    if repository == name or not _REPOSITORY.fullmatch(repository) or "--" in repository or ".." in repository:
        return None
    names = [repository.replace("/", "--")]
    names += [alias for alias, entry in ALIASES.items() if entry.repository == repository]
    return _Target(name, repository, "main", None, tuple(names))


def _unknown(name: str) -> ModelNotFound:
    close = difflib.get_close_matches(name, ALIASES, n=3, cutoff=0.4)
    if _REPOSITORY.fullmatch(name):
        close.insert(0, f"hf:{name}")
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    known = ", ".join(ALIASES)
    return ModelNotFound(
        f"no folder and no known model {shown(name)}",
        hint=f"{meant}give a folder with config.json, one of {known}, or hf:USER/REPO",
    )


# Places -------------------------------------------------------------------------------------------------------------


def _models_folder(home: Path | None) -> Path:
    if home is None:
        stated = os.environ.get("SPARSEVILA_HOME")
        home = Path(stated).expanduser() if stated else Path.home() / ".sparsevila"
    return home / "models"


def _hf_cache_folder(hf_cache: Path | None) -> Path:
    """The cache folder of `huggingface_hub`, by its own rules, without importing it."""
    if hf_cache is not None:
        return hf_cache
    stated = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if stated:
        return Path(stated).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hf_home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    return Path(hf_home).expanduser() / "hub"


def _places(
    target: _Target, home: Path | None, hf_cache: Path | None, *, quantised: bool = False
) -> Iterator[ModelFolder]:
    """The folders in which the model may be, best first."""
    if target.repository is None:
        yield ModelFolder(Path(__file__).resolve().parent.parent / "assets" / target.name, BUNDLED)
    if quantised and target.repository is not None:
        for name in target.names:
            yield ModelFolder(_models_folder(home) / f"{name}{QUANTISED}", "quantised here")
    for name in target.names:
        yield ModelFolder(_models_folder(home) / name, "SPARSEVILA_HOME")
    if target.repository is not None:
        for snapshot in _snapshots(target, _hf_cache_folder(hf_cache)):
            yield ModelFolder(snapshot, "Hugging Face cache")


def _snapshots(target: _Target, cache: Path) -> list[Path]:
    """The snapshots of a repository: that of the revision, then the others, newest first; a commit has no others."""
    assert target.repository is not None
    repository = cache / f"models--{target.repository.replace('/', '--')}"
    if _COMMIT.fullmatch(target.revision):
        return [repository / "snapshots" / target.revision]
    found: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        commit = (repository / "refs" / target.revision).read_text()[:64].strip()
        found += [repository / "snapshots" / commit] if _COMMIT.fullmatch(commit) else []
    with contextlib.suppress(OSError):
        others = [entry for entry in os.scandir(repository / "snapshots") if entry.is_dir()]
        found += [Path(e.path) for e in sorted(others, key=lambda e: (-e.stat().st_mtime, e.name))]
    return list(dict.fromkeys(found))


def _problem(folder: Path) -> str | None:
    """Why a folder is no complete model; "" where there is none at all, None where it is complete."""
    if not folder.is_dir():
        return ""
    try:
        Checkpoint.open(folder)
    except SparseVILAError as error:
        return str(error) if str(folder) in str(error) else f"{folder}: {error}"
    return None


def _find(target: _Target, home: Path | None, hf_cache: Path | None, *, quantised: bool = False) -> ModelFolder | None:
    places = _places(target, home, hf_cache, quantised=quantised)
    return next((place for place in places if _problem(place.path) is None), None)


def _not_here(
    target: _Target, problems: Sequence[str], *, offline: bool, home: Path | None, hf_cache: Path | None
) -> ModelNotFound:
    """The three ways to get the weights, with what is known of each."""
    incomplete = [f"incomplete: {problem}" for problem in problems if problem]
    if target.repository is None:
        return ModelNotFound(
            f"the bundled model {target.name} is not here",
            hint="; ".join([*incomplete, "install the package again"]),
        )
    cache = _hf_cache_folder(hf_cache)
    size = "" if target.size_bytes is None else f", {target.size_bytes / 1e9:.1f} GB"
    ways = [
        "1. a folder with its files: --model FOLDER",
        f"2. {_models_folder(home) / target.names[0]}, or the Hugging Face cache at {cache} "
        f"({'it is there, without this model' if cache.is_dir() else 'there is none'})",
        f"3. download it: {target.command}  ({target.repository}, revision {target.revision}{size})",
    ]
    if offline:
        ways[2] += " once the machine is online"
    return ModelNotFound(f"no weights of {target.name} here", hint="\n".join([*incomplete, *ways]))


# Download -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RemoteFile:
    name: str
    size: int
    digest: str  # sha256 of a large file, git's sha1 of a small one; "" where the hub states none

    @property
    def part(self) -> str:
        return f"{self.name}.part"


class _Meter:
    """Adds up bytes over files and tells the caller; remembers what the caller raised to stop the work."""

    def __init__(self, progress: ProgressFn) -> None:
        self._progress = progress
        self.stopped_by: Exception | None = None

    def tell(self, stage: str, done: int, total: int) -> None:
        try:
            self._progress(Progress(stage, done, total, "bytes"))
        except Exception as error:
            self.stopped_by = error
            raise


class _CountedFile:
    """A file that reports how far it has grown. `http_get` writes, and seeks back where a server cannot resume."""

    def __init__(self, file: BinaryIO, before: int, total: int, meter: _Meter) -> None:
        self._file, self._before, self._total, self._meter = file, before, total, meter

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._meter.tell("download", self._before + self._file.tell(), self._total)
        return written

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        return self._file.truncate(size)


class _NoBar:
    """Stands for the progress bar that `http_get` would draw on stderr."""

    def update(self, _: int) -> None:
        """Counts nothing: the file does."""


def _already_here(
    target: _Target, final: Path, revision: str | None, home: Path | None, hf_cache: Path | None
) -> ModelFolder | None:
    """A complete copy. A folder that stands in the way of the download is an error."""
    if revision is None:
        found = _find(target, home, hf_cache)
        if found is not None:
            return found
    if not final.exists():
        return None
    problem = _problem(final)
    if problem is None and revision is not None:
        source = Checkpoint(final).read_json(SOURCE_FILE) or {}
        if revision in (source.get("revision"), source.get("commit")):
            return ModelFolder(final, "SPARSEVILA_HOME")
        problem = f"{final} holds revision {shown(source.get('revision'))}, not {revision}"
    raise ModelNotFound(f"{target.name}: {problem or f'{final} is no folder'}", hint="move it away and try again")


def _listing(target: _Target, endpoint: str | None) -> tuple[str, list[_RemoteFile]]:
    """The commit of the revision and the files worth having, small ones first."""
    from huggingface_hub import HfApi

    assert target.repository is not None
    api = HfApi(endpoint=endpoint, library_name="sparsevila")
    info = api.model_info(target.repository, revision=target.revision, files_metadata=True, timeout=TIMEOUT_S)
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise ModelNotFound(f"{target.repository}: the server states no commit for {target.revision}")
    siblings = info.siblings or []
    files = [
        _remote_file(sibling)
        for sibling in siblings
        if _WANTED.fullmatch(sibling.rfilename) and not sibling.rfilename.startswith("consolidated")
    ]
    if not any(file.name.endswith(".safetensors") for file in files):
        pickled = any(sibling.rfilename.endswith((".bin", ".pt", ".pth")) for sibling in siblings)
        why = "only pickled weights, which are never loaded" if pickled else "no weights"
        raise CorruptCheckpoint(f"{target.repository} has {why}", hint="choose a repository with safetensors files")
    return commit, sorted(files, key=lambda file: (file.name.endswith(".safetensors"), file.name))


def _remote_file(sibling: Any) -> _RemoteFile:
    if not isinstance(sibling.size, int) or sibling.size < 0:
        raise ModelNotFound(f"{shown(sibling.rfilename)}: the server states no size")
    digest = sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
    return _RemoteFile(sibling.rfilename, sibling.size, digest or "")


def _staging(final: Path, commit: str) -> Path:
    """The folder in which one commit grows. What was begun of another commit is of no use and goes."""
    parts = final.parent / ".partial"
    staging = parts / f"{final.name}@{commit}"
    staging.mkdir(parents=True, exist_ok=True)
    for other in parts.glob(f"{final.name}@*"):
        if other != staging:
            shutil.rmtree(other, ignore_errors=True)
    return staging


def _have(file: _RemoteFile, staging: Path) -> int:
    """Bytes of a file that are already here."""
    for name in (file.name, file.part):
        if (staging / name).is_file():
            return min((staging / name).stat().st_size, file.size)
    return 0


def _check_disk(target: _Target, files: Sequence[_RemoteFile], staging: Path) -> None:
    need = sum(file.size - _have(file, staging) for file in files) + DISK_MARGIN_BYTES
    free = shutil.disk_usage(staging).free
    if need > free:
        raise ModelNotFound(
            f"{target.name} needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free at {staging.parent.parent}",
            hint="free some space, or set SPARSEVILA_HOME to a folder on another disk",
        )


def _fetch_all(
    target: _Target,
    commit: str,
    files: Sequence[_RemoteFile],
    staging: Path,
    meter: _Meter,
    endpoint: str | None,
) -> None:
    total, before = sum(file.size for file in files), 0
    for file in files:
        if not (staging / file.name).is_file():
            _fetch_with_patience(target, commit, file, staging, (before, total, meter), endpoint)
        before += file.size
        meter.tell("download", before, total)


def _fetch_with_patience(
    target: _Target,
    commit: str,
    file: _RemoteFile,
    staging: Path,
    counted: tuple[int, int, _Meter],
    endpoint: str | None,
) -> None:
    """Try again after a broken connection; give up after three tries in a row that brought nothing."""
    meter, futile = counted[2], 0
    while True:
        before = _have(file, staging)
        try:
            return _fetch(target, commit, file, staging, counted, endpoint)
        except Exception as error:
            futile = 0 if _have(file, staging) > before else futile + 1
            answered = getattr(error, "response", None) is not None or isinstance(error, (SparseVILAError, OSError))
            if error is meter.stopped_by or (futile and answered) or futile == 3:
                raise
        time.sleep(RETRY_PAUSE_S)


def _fetch(
    target: _Target,
    commit: str,
    file: _RemoteFile,
    staging: Path,
    counted: tuple[int, int, _Meter],
    endpoint: str | None,
) -> None:
    """One file, from the byte where its part ends."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    assert target.repository is not None
    url = hf_hub_url(target.repository, file.name, revision=commit, endpoint=endpoint)
    headers = build_hf_headers(library_name="sparsevila")
    place = get_hf_file_metadata(url, timeout=TIMEOUT_S, headers=headers, endpoint=endpoint).location
    if _host(place) != _host(url):
        headers.pop("authorization", None)  # the token is for the hub, not for the store it points to
    part = staging / file.part
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("r+b" if part.exists() else "w+b") as raw:
        if part.stat().st_size > file.size:
            raw.truncate(0)
        start = raw.seek(0, os.SEEK_END)
        http_get(
            place,
            _CountedFile(raw, *counted),  # type: ignore[arg-type]
            resume_size=start,
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.name,
            _tqdm_bar=_NoBar(),
        )
    part.replace(staging / file.name)


def _host(url: str) -> str:
    return url.split("/", 3)[2]


def _verify_all(files: Sequence[_RemoteFile], staging: Path, meter: _Meter) -> None:
    """Compare every checksum. A file that differs is deleted, so that the next try fetches it anew."""
    total, before = sum(file.size for file in files), 0
    for file in files:
        path = staging / file.name
        if path.stat().st_size != file.size or not _digest_is_right(path, file, (before, total, meter)):
            path.unlink()
            raise ModelNotFound(f"{file.name} arrived damaged and was deleted", hint="try again")
        before += file.size
        meter.tell("verify", before, total)


def _digest_is_right(path: Path, file: _RemoteFile, counted: tuple[int, int, _Meter]) -> bool:
    before, total, meter = counted
    if len(file.digest) == 40:  # git hashes a small file with this line in front
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    elif len(file.digest) == 64:
        digest = hashlib.sha256()
    else:
        return True
    with path.open("rb") as data:
        while block := data.read(_HASH_STEP):
            digest.update(block)
            meter.tell("verify", before + data.tell(), total)
    return digest.hexdigest() == file.digest


def _publish(target: _Target, commit: str, staging: Path, final: Path) -> ModelFolder:
    """Give a complete download its name, in one step."""
    Checkpoint.open(staging)
    source = {"repository": target.repository, "revision": target.revision, "commit": commit}
    (staging / SOURCE_FILE).write_text(json.dumps(source))
    try:
        staging.rename(final)
    except OSError:
        raise ModelNotFound(f"{final} cannot be written", hint="another download may have made it: try again") from None
    return ModelFolder(final, "SPARSEVILA_HOME")


@contextlib.contextmanager
def _plain_errors(target: _Target, meter: _Meter) -> Iterator[None]:
    """Turn what the hub, the network and the disk raise into ModelNotFound; what stopped the work passes."""
    try:
        yield
    except SparseVILAError:
        raise
    except Exception as error:  # the HTTP packages under the hub share no narrower root
        if error is meter.stopped_by:
            raise
        message, hint = _reason(error, target)
        raise ModelNotFound(f"{target.name} could not be fetched: {message}", hint=hint) from None


def _reason(error: Exception, target: _Target) -> tuple[str, str]:
    """(what happened, what to do), without the package's own text: it holds signed addresses."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"{target.repository} is gated", f"accept its terms on its page, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {target.repository}, or it is private", f"check the name; if private, {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{target.repository} has no revision {target.revision}", "check the revision"
    if isinstance(error, errors.EntryNotFoundError):
        return f"a file of {target.repository} has gone", "try again"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it", "unset HF_HUB_OFFLINE"
    if status in (401, 403):
        return f"{target.repository} needs a login (status {status})", log_in
    if status is not None:
        return f"the server answered with status {status}", "try again later"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full", "free some space: the next try goes on from here"
    if isinstance(error, PermissionError):
        return "the folder cannot be written", "set SPARSEVILA_HOME to a folder of yours"
    return f"no connection ({type(error).__name__})", "check the network: the next try goes on from here"
