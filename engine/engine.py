"""A loaded model: weights, tokenizer, device. Sessions share it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from weakref import WeakSet

import numpy as np
import torch
from torch import nn

from ..errors import Closed, ContextTooLong, EngineDead, InsufficientMemory, InvalidRequest
from ..models.checkpoint import Checkpoint, TensorInfo
from ..models.interface import MediaKind, ProgressFn, VisionLanguageModel, VisualTokens, no_progress
from ..models.registry import load_model
from ..quant.linear import num_parameters
from ..quant.plan import scheme_name
from .cache import KVCache
from .config import EngineInfo, Image, SamplingParams, Sparsity, Video
from .conversation import MediaItem
from .head_scores import HEAD_SCORES, HeadScores, read_head_scores
from .hub import resolve
from .meter import Meter
from .prompt import check_media_tokens
from .runner import Runner
from .session import Session
from .shortage import device_failure, out_of_memory, shortage
from .sparsity.base import Method
from .sparsity.registry import auto_sparsity
from .tokenizer import Tokenizer, load_tokenizer

_FEATURE_CACHE_BYTES = 1 << 30  # encoded media that no session holds any more
WORKSPACE_BYTES = 512 << 20  # activations of a prefill chunk and of the vision tower's tiles, rounded up
_SCALE_BYTES = 8  # a scale and its product with the zero point, each as two bfloat16 numbers
_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1, "": 1}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Engine:
    """Runs one checkpoint. Made by `Engine.load`; a context manager."""

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        info: EngineInfo,
        *,
        max_memory_bytes: int | None,
        sparsity: Sparsity | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.info = info
        self.max_context = info.max_context
        self.auto = auto_sparsity(model.default_frames)
        self.runner = Runner(model)
        self.device_lock = threading.RLock()  # device work of all sessions goes one after the other
        self.closed = False
        self.dead = False  # the device failed for good
        self._sparsity = sparsity
        self._max_memory_bytes = max_memory_bytes
        self._features: OrderedDict[str, VisualTokens] = OrderedDict()
        self._caches: WeakSet[KVCache] = WeakSet()
        self._head_scores: dict[str | None, HeadScores] = {}

    @staticmethod
    def load(
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_memory: int | str | None = None,
        max_context: int | None = None,
        sparsity: Sparsity | None = None,
        offline: bool = False,
        quantised: bool = True,
        w4a8: bool = False,
        positions: str | None = None,
        progress: ProgressFn = no_progress,
    ) -> Engine:
        """Loads a checkpoint: a folder, an alias, or `hf:USER/REPO` that is on this machine. Never downloads.

        `device` "auto", "cpu", "cuda:0"; `dtype` "auto", "float32", "bfloat16", "float16"; `max_memory` in bytes or
        like "6GiB", a bound for weights, caches and workspace; `max_context` in positions, at most the model's own.
        `sparsity` is the sessions' default, None: that of the kind of media. Of an alias or a repository the copy that
        was quantised on this machine is taken, unless `quantised` is False. `w4a8` lets 4-bit layers multiply in 8
        bits: more speed where a prompt is long, twice the memory for them, less accuracy (docs/quantisation.md).
        `positions` "regrid", "original" or "contiguous" says where multimodal RoPE places what survives pruning.
        Raises ModelNotFound, UnsupportedModel, CorruptCheckpoint, InsufficientMemory or InvalidRequest.
        """
        start = time.perf_counter()
        target, limit = _device(device), None if max_memory is None else parse_bytes(max_memory)
        folder = resolve(model, offline=offline, quantised=quantised)
        checkpoint = Checkpoint.open(folder.path)
        chosen = _dtype(dtype, target)
        _check_weights_fit(checkpoint, chosen, limit, w4a8=w4a8)
        tokenizer = load_tokenizer(checkpoint)
        loaded = _load(checkpoint, chosen, target, w4a8=w4a8, positions=positions, progress=progress)
        check_media_tokens(tokenizer, loaded)
        trained = loaded.decoder.config.max_context
        if max_context is not None and not (isinstance(max_context, int) and 1 <= max_context <= trained):
            raise InvalidRequest(f"context: expected 1 to {trained}, got {max_context!r}")
        context, notes = max_context or trained, list(checkpoint.notes)
        if limit is not None:
            fits = max(1, (limit - _fixed_bytes(loaded)) // _position_bytes(loaded))
            if max_context is not None and fits < max_context:
                need = _fixed_bytes(loaded) + max_context * _position_bytes(loaded)
                raise InsufficientMemory(need, limit, what=f"a context of {max_context}", hint=f"--ctx {fits} fits")
            if fits < context:
                notes.append(f"context {fits} instead of {context}: that is what fits the memory limit")
                context = fits
        assert isinstance(loaded, nn.Module)  # every class of the registry is one
        info = EngineInfo(
            model=str(model),
            architecture=checkpoint.config["architectures"][0],
            folder=str(folder.path),
            scheme=scheme_name(loaded, chosen),
            device=str(target),
            parameters=num_parameters(loaded),
            weight_bytes=_weight_bytes(loaded),
            max_context=context,
            load_s=time.perf_counter() - start,
            notes=tuple(notes),
        )
        engine = Engine(loaded, tokenizer, info, max_memory_bytes=limit, sparsity=sparsity)
        if target.type == "cuda":  # compiling kernels belongs to no answer
            info.details["warmup_s"] = engine.warmup()
        return engine

    def default_sparsity(self, kind: MediaKind) -> Sparsity:
        """What `sparsity=None` means for media of this kind."""
        return self._sparsity or self.auto[kind]

    def session(
        self,
        *,
        media: Sequence[Image | Video] = (),
        system: str | None = None,
        sparsity: Sparsity | Method | None = None,
        progress: ProgressFn = no_progress,
    ) -> Session:
        """A new conversation, with media for its first question. Raises MediaError or InvalidRequest.

        `sparsity` may be a method of your own, which needs no name (`engine/sparsity/base.py`).
        """
        self.check_alive()
        if self.closed:
            raise Closed("the engine is closed")
        session = Session(self, system=system, sparsity=sparsity or self._sparsity)
        for item in media:
            session.attach(item, progress=progress)
        return session

    def forget_features(self) -> None:
        """Forgets encoded media that no session holds."""
        with self.device_lock:
            self._features.clear()

    def warmup(self) -> float:
        """Runs one short turn, so that first-use costs (compilation, paging in) are not in the first answer.

        On a GPU with a picture, and done by `load`. Returns the seconds that it took.
        """
        start = time.perf_counter()
        grey = Image(np.full((64, 64, 3), 128, dtype=np.uint8))
        try:
            self._short_turn([grey] if self.info.device.startswith("cuda") else [])
        except (ContextTooLong, InsufficientMemory):
            self._short_turn([])  # no picture fits into what this engine may use: none will be asked about
        return time.perf_counter() - start

    def _short_turn(self, media: list[Image | Video]) -> None:
        session = self.session(media=media)
        try:
            session.ask("Hi", params=SamplingParams(max_new_tokens=3))
        finally:
            session.close()

    def close(self) -> None:
        """Gives weights and encoded media back. May be called twice; sessions raise Closed afterwards."""
        if not self.closed:
            self.closed = True
            with self.device_lock:
                self._features.clear()
                _give_back(self.model)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # For the steps of a turn

    def check_alive(self) -> None:
        """Raises EngineDead if the device has failed in a way that a process cannot repair."""
        if self.dead:
            raise EngineDead(
                "the GPU failed during earlier work, and this process can no longer use it",
                hint="start a new process; if it fails again, look at the driver's log (dmesg, nvidia-smi -q)",
            )

    @contextmanager
    def device_work(self) -> Iterator[None]:
        """One session's work on weights and device at a time.

        Raises Closed if the engine was closed meanwhile, EngineDead if the device fails or has failed.
        """
        with self.device_lock:
            self.check_alive()
            if self.closed:
                raise Closed("the engine is closed")
            try:
                yield
            except RuntimeError as error:
                self.dead = device_failure(error)
                if not self.dead:
                    raise
            self.check_alive()

    def encode(self, item: MediaItem, meter: Meter, progress: ProgressFn, *, with_keys: bool = False) -> VisualTokens:
        """The item's features: its own, those of equal content seen before, or the vision tower's.

        The kept features go by content alone. Those without keys do not serve a method that compares keys: the item is
        encoded once more, from its source if its pixels have gone (MediaError where that has changed), and what comes
        out takes their place. Those with keys serve every method.
        """
        if item.tokens is not None and _serves(item.tokens, with_keys):
            return item.tokens
        with self.device_work():  # the lock guards the kept features too
            known = self._features.get(item.key)
            if known is None or not _serves(known, with_keys):
                inputs = item.read_again(progress, 0.0) if item.inputs is None else item.inputs
                with meter.timed("encode"), torch.inference_mode():
                    known = self.model.encode(inputs, progress, with_keys=with_keys)
            self._features[item.key] = known
            self._features.move_to_end(item.key)  # last in, last out
            self._trim_features()
        item.inputs = None
        return replace(known, token_map=item.token_map)

    def encode_shrunk(self, item: MediaItem, removed: float, meter: Meter, progress: ProgressFn) -> VisualTokens:
        """The features of the item scaled down until it has that fraction fewer tokens; a map of their own goes along.

        Raises MediaError where the source has changed, InvalidRequest where no size has about as many tokens.
        """
        key = f"{item.key} less {removed}"
        with self.device_work():
            known = self._features.get(key)
            if known is None:
                inputs = item.read_again(progress, removed)
                with meter.timed("encode"), torch.inference_mode():
                    known = self.model.encode(inputs, progress)
            self._features[key] = known
            self._features.move_to_end(key)
            self._trim_features()
        return replace(known, token_map=known.token_map.with_media(item.number))

    def head_scores(self, path: str | None) -> HeadScores:
        """How well each attention head sees, from this file or the one beside the checkpoint; read once.

        Raises InvalidRequest where there is none, CorruptCheckpoint where it is not of this decoder.
        """
        if path not in self._head_scores:
            config = self.model.decoder.config
            file = Path(self.info.folder) / HEAD_SCORES if path is None else Path(path)
            found = read_head_scores(file, num_layers=config.num_layers, num_heads=config.num_heads)
            self._head_scores[path] = found
        return self._head_scores[path]

    def _feature_bytes(self) -> int:
        held = [t for tokens in self._features.values() for t in (tokens.features, tokens.keys) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)

    def _trim_features(self) -> None:
        while self._feature_bytes() > _FEATURE_CACHE_BYTES and len(self._features) > 1:
            self._features.popitem(last=False)

    def new_cache(self) -> KVCache:
        """An empty cache; as long as it lives, it counts against `max_memory`."""
        cache = self.runner.new_cache()
        self._caches.add(cache)
        return cache

    def reserve(self, cache: KVCache, *, visual: int = 0, text: int = 0, active: Sequence[int] = ()) -> None:
        """Makes room in a cache, before anything is written to it.

        `visual` and `text` are entries to come, `active` the sizes of the active sets. Raises InsufficientMemory before
        the allocation where `max_memory` forbids it.
        """
        if self._max_memory_bytes is not None:
            need = cache.bytes_with(visual=visual, text=text, active=active)
            held = self._feature_bytes() + sum(other.bytes_with() for other in self._caches if other is not cache)
            free = self._max_memory_bytes - self.info.weight_bytes - WORKSPACE_BYTES - held
            if need > free:
                raise InsufficientMemory(need, max(free, 0), what="the cache of this conversation")
        with self.device_work():
            cache.reserve(visual=visual, text=text)


def _serves(tokens: VisualTokens, with_keys: bool) -> bool:
    return tokens.keys is not None or not with_keys


def parse_bytes(value: int | str) -> int:
    """Bytes of 6442450944, "6GiB", "500 MB". Raises InvalidRequest."""
    text = str(value).strip()
    digits = text.rstrip("BbGgIiKkMm ")
    unit = _UNITS.get(text[len(digits) :].strip().upper())
    try:
        amount = float(digits)
    except ValueError:
        amount = -1.0
    if unit is None or not 0 < amount < float("inf"):
        raise InvalidRequest(f"memory: expected bytes or a size like 6GiB, got {value!r:.40}")
    return int(amount * unit)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest(f"device: expected auto, cpu or cuda:N, got {name!r:.40}") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device: expected auto, cpu or cuda:N, got {name!r:.40}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(f"device {name}: {torch.cuda.device_count()} CUDA devices are here")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it natively, otherwise float32."""
    if name in _DTYPES:
        return _DTYPES[name]
    if name != "auto":
        raise InvalidRequest(f"dtype: expected auto, {', '.join(_DTYPES)}, got {name!r:.40}")
    if device.type == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def _load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    w4a8: bool,
    positions: str | None,
    progress: ProgressFn,
) -> VisionLanguageModel:
    try:
        return load_model(checkpoint, dtype=dtype, device=device, w4a8=w4a8, positions=positions, progress=progress)
    except (RuntimeError, MemoryError) as error:
        wanted = shortage(error)
        if wanted is None:
            raise
    raise out_of_memory(wanted, device, what="loading this model")


def _check_weights_fit(checkpoint: Checkpoint, dtype: torch.dtype, limit: int | None, *, w4a8: bool) -> None:
    if limit is None:
        return
    need = loaded_bytes(checkpoint.tensors, dtype, w4a8=w4a8) + WORKSPACE_BYTES
    if need > limit:
        raise InsufficientMemory(need, limit, what="loading this model", hint="use a smaller model or a higher limit")


def loaded_bytes(tensors: Mapping[str, TensorInfo], dtype: torch.dtype, *, w4a8: bool = False) -> int:
    """What a checkpoint's tensors will take in memory, from their headers."""
    return sum(_loaded_bytes(name, info, dtype, w4a8=w4a8) for name, info in tensors.items())


def _loaded_bytes(name: str, info: TensorInfo, dtype: torch.dtype, *, w4a8: bool) -> int:
    """What a stored tensor takes in memory: floats in the model's dtype, packed weights as they are or widened."""
    entries = torch.Size(info.shape).numel()
    if not info.torch_dtype.is_floating_point:
        widened = w4a8 and name.rpartition(".")[2] in ("qweight", "weight_packed")
        return entries * info.torch_dtype.itemsize * (2 if widened else 1)
    if name.rpartition(".")[2] in ("scales", "weight_scale"):  # of a quantised matrix
        return entries * _SCALE_BYTES
    return entries * dtype.itemsize


def _weight_bytes(model: VisionLanguageModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _give_back(model: VisionLanguageModel) -> None:
    """Replaces every weight by an empty one of its dtype. Not by `to("meta")`, which packed weights do not know."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(0, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def _fixed_bytes(model: VisionLanguageModel) -> int:
    """Weights and workspace: what does not grow with the conversation."""
    return _weight_bytes(model) + WORKSPACE_BYTES


def _position_bytes(model: VisionLanguageModel) -> int:
    """Keys and values of one position in every layer; active sets, a share of a turn's tokens, are not in it."""
    config = model.decoder.config
    entry = 2 * config.num_kv_heads * config.head_dim * model.decoder.norm.weight.element_size()
    return config.num_layers * entry
