"""Quantises a whole checkpoint: AWQ for the decoder, SmoothQuant for the vision tower, in bounded memory.

    quantise_checkpoint(source, out, QuantSettings(), builtin_samples())

The order: the tower is quantised layer by layer on tiles of the calibration media; the media are encoded by the
original tower; every sample becomes an embedded sequence (`calibration_inputs.py`); the decoder's layers are read one
at a time, run on all sequences, quantised, written and freed.

What a layer is calibrated on is the output of the *original* layers before it, as in AutoAWQ: every layer is then
judged by what it adds itself, a unit of work depends on no other, and a run that was interrupted ends with the same
bytes. A layer could be fitted to its quantised predecessors instead; that corrects some of their error and would tie
each unit to all before it.

Everything is computed in float32. What folding has changed (norms, biases) is stored in float32, everything else that
stays dense as the source has it.

Memory: the shell (tower, projector, embedding) while the inputs are made; afterwards one decoder layer in float32, the
hidden states of all samples (4 * hidden_size bytes a position), `num_rows` inputs of each linear layer, and temporaries
of the searches of about the size of the largest fused matrix. Never the whole decoder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import CorruptCheckpoint, InvalidRequest, SparseVILAError
from ..kernels.attention import attention
from ..models.checkpoint import MAX_TOKENIZER_BYTES, Checkpoint
from ..models.decoder import DecoderLayer
from ..models.interface import Frames, Progress, ProgressFn, VisualTokens, no_progress
from ..models.vision_tower import TowerBatch, VisionTower
from ..quant.awq import ClipRecord, Rounding
from ..quant.block import BlockRecord, QuantisedBlock, awq_block, install, linear_layers, smooth_block
from ..quant.calibration import ChannelStats, SearchRecord, collect
from ..quant.export import CheckpointWriter, OutputFormat
from ..quant.formats import by_layer, detect
from ..quant.plan import matrices_of
from ..quant.scale_group import ScaledBlock
from ..quant.stored_layer import StoredLayer
from .calibration_inputs import CalibrationSequence, embed_sample, encode_frames
from .calibration_set import CalibrationSample
from .calibration_set import fingerprint as samples_fingerprint
from .config import Sparsity
from .prompt import check_media_tokens
from .sparsity.registry import make_method
from .streamed_model import StreamedModel
from .tokenizer import load_tokenizer

GROUP_SIZES = (32, 64, 128)
PRUNED = (0.60, 0.75)  # fractions removed in prefill at which the two towers' choices are compared
_HELD_OUT_SHARE, _MAX_HELD_OUT = 4, 8  # one medium in four, at most eight
_COPIED_BYTES = 256 << 20  # of unchanged tensors in one unit
_DOCUMENT_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".md")
_DOCUMENT_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_WRITTEN_HERE = ("config.json", "quantization.json")


@dataclass(frozen=True)
class QuantSettings:
    """What is quantised, and how."""

    llm: Literal["w4a16", "none"] = "w4a16"
    vision: Literal["w8a8", "none"] = "w8a8"
    lm_head: Literal["int8", "none"] = "none"
    group_size: int = 128  # inputs of the decoder's layers that share a scale
    form: OutputFormat = "compressed-tensors"
    search: bool = True  # False: plain rounding, for comparison
    num_rows: int = 512  # inputs of each layer that the searches look at
    max_positions: int = 1024  # of a sample
    max_tiles: int = 32  # that the tower is calibrated on

    def __post_init__(self) -> None:
        for name, choices in (
            ("llm", ("w4a16", "none")),
            ("vision", ("w8a8", "none")),
            ("lm_head", ("int8", "none")),
            ("group_size", GROUP_SIZES),
            ("form", ("compressed-tensors", "awq")),
        ):
            if getattr(self, name) not in choices:
                listed = ", ".join(map(str, choices))
                raise InvalidRequest(f"{name}: expected one of {listed}, got {getattr(self, name)!r:.40}")
        for name, low in (("num_rows", 1), ("max_positions", 16), ("max_tiles", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise InvalidRequest(f"{name}: expected a whole number of at least {low}, got {value!r:.40}")
        if self.llm == self.vision == self.lm_head == "none":
            raise InvalidRequest("llm, vision and lm_head: expected one of them to be quantised, got none")
        if self.form == "awq" and (self.vision != "none" or self.lm_head != "none" or self.llm == "none"):
            raise InvalidRequest(
                f"form: the awq format holds 4-bit layers alone, got llm {self.llm}, vision {self.vision}, "
                f"lm_head {self.lm_head}",
                hint="leave the vision tower and the output matrix as they are, or write compressed-tensors",
            )


@dataclass(frozen=True)
class OutputError:
    """How far a block's output in its quantised form is from its own in float32, on the same inputs."""

    cosine: float  # 1 - cosine of the two outputs
    relative: float  # |difference| / |what the block adds to its input|


@dataclass(frozen=True)
class SaliencyAgreement:
    """Whether the quantised tower would prune what the original one prunes. Means over media items."""

    num_media: int
    held_out: bool  # the tower was calibrated on other media
    spearman: float  # rank correlation of the tokens' saliency
    kept_overlap: dict[str, float]  # by the fraction removed: share of the kept tokens that both keep


@dataclass(frozen=True)
class UnitReport:
    """One block of the model."""

    unit: str
    searches: BlockRecord
    error: OutputError | None  # None where there were no samples to measure it on

    @staticmethod
    def from_json(unit: str, values: Mapping[str, Any]) -> UnitReport:
        searches, error = values["searches"], values["error"]
        return UnitReport(
            unit,
            BlockRecord(
                scales=tuple(SearchRecord(**record) for record in searches["scales"]),
                clips=tuple(ClipRecord(**record) for record in searches["clips"]),
                unscaled=tuple((name, why) for name, why in searches["unscaled"]),
            ),
            None if error is None else OutputError(**error),
        )

    def to_json(self) -> dict[str, Any]:
        return {"searches": asdict(self.searches), "error": None if self.error is None else asdict(self.error)}


@dataclass(frozen=True)
class QuantReport:
    """What was done to a checkpoint."""

    out: Path
    units: tuple[UnitReport, ...]
    saliency: SaliencyAgreement | None  # None where no tower was quantised, or no picture was there

    def to_json(self) -> dict[str, Any]:
        """Without the units, whose records the checkpoint holds one by one."""
        return {"saliency": None if self.saliency is None else asdict(self.saliency)}


def quantise_checkpoint(
    source: Path,
    out: Path,
    settings: QuantSettings,
    samples: Sequence[CalibrationSample],
    *,
    progress: ProgressFn = no_progress,
    device: torch.device | str = "cpu",
) -> QuantReport:
    """Writes a quantised copy of the checkpoint folder `source` to `out`, which must not exist.

    `samples` may be empty for plain rounding. Units that an interrupted run with the same source, settings and samples
    has left are kept. `progress` gets the stages "load", "encode" and "quantise"; what it raises stops the work and
    leaves what is done for the next run.

    Raises InvalidRequest for settings that do not fit the model and for a source that is quantised already;
    ModelNotFound, CorruptCheckpoint or UnsupportedModel for what is wrong with it.
    """
    checkpoint = Checkpoint.open(source)
    _refuse_quantised(checkpoint)
    streamed = StreamedModel(checkpoint, torch.device(device))
    _check_settings(settings, streamed, samples)
    writer = CheckpointWriter(
        Path(out),
        form=settings.form,
        fingerprint=_fingerprint(checkpoint, settings, samples, streamed.device),
        folders=checkpoint.folders,
    )
    return _Quantiser(streamed, writer, Path(out), settings, samples, progress).run()


@dataclass
class _Quantiser:
    """One run. The steps in their order are `run`."""

    streamed: StreamedModel
    writer: CheckpointWriter
    out: Path
    settings: QuantSettings
    samples: Sequence[CalibrationSample]
    progress: ProgressFn
    done: int = 0
    reports: list[UnitReport] = field(default_factory=list)
    written: set[str] = field(default_factory=set)  # tensors, by the model's names

    def run(self) -> QuantReport:
        self._tick()
        tokens: dict[str, VisualTokens] = {}
        if self.samples or self._wants_tower:
            self.streamed.load_shell(self.progress)
        if self.samples:
            tokens = self._encode()
        saliency = self._tower(tokens) if self._wants_tower else None
        sequences = self._sequences(tokens) if self._wants_decoder else []
        tokens.clear()
        self.streamed.drop_shell()
        if self._wants_decoder:
            for index in range(self.streamed.num_layers):
                self._decoder_layer(index, sequences)
        if self.settings.lm_head != "none":
            self._head(sequences)
        self._copy_the_rest()
        report = QuantReport(self.out, tuple(self.reports), saliency)
        record = {"settings": asdict(self.settings), "num_samples": len(self.samples), **report.to_json()}
        checkpoint = self.streamed.checkpoint
        configs = {name: part.config for name, part in checkpoint.folders.items()}
        self.writer.finish(checkpoint.config, documents=self._documents(), record=record, configs=configs)
        self._tick()
        return report

    # What there is to do

    @property
    def _wants_tower(self) -> bool:
        return self.settings.vision != "none"

    @property
    def _wants_decoder(self) -> bool:
        """Whether the decoder's layers have to be run: an output matrix is calibrated on what comes out of them."""
        return self.settings.llm != "none" or (self.settings.lm_head != "none" and bool(self.samples))

    @property
    def _total(self) -> int:
        tower = len(self.streamed.model.tower.blocks) if self._wants_tower else 0
        layers = self.streamed.num_layers if self._wants_decoder else 0
        return tower + layers + (self.settings.lm_head != "none")

    def _tick(self) -> None:
        self.progress(Progress("quantise", self.done, self._total, "layers"))

    def _media(self) -> list[Frames]:
        """Every item once, in order."""
        return list({s.frames.key: s.frames for s in self.samples if s.frames is not None}.values())

    def _encoded(self, media: Sequence[Frames]) -> Iterator[VisualTokens]:
        """Each item's tokens, by the tower as it stands; the progress is that over all items."""
        for done, frames in enumerate(media):
            step = Progress("encode", done, len(media), "media")

            def tell(_: Progress, step: Progress = step) -> None:
                self.progress(step)

            yield encode_frames(self.streamed.model, frames, tell)
        self.progress(Progress("encode", len(media), len(media), "media"))

    def _encode(self) -> dict[str, VisualTokens]:
        """By the original tower: of every item what a sequence can hold, whole for those the towers are compared on."""
        media = self._media()
        compared = {frames.key for frames in _split(media)[1] or media} if self._wants_tower else set()
        tokens = {}
        for frames, found in zip(media, self._encoded(media), strict=True):
            front = torch.arange(min(len(found), self.settings.max_positions))
            tokens[frames.key] = found if frames.key in compared else found.select(front)
        return tokens

    # The tower

    def _tower(self, tokens: Mapping[str, VisualTokens]) -> SaliencyAgreement | None:
        """Quantises every layer that is not there yet; the whole tower is compared when all of them are at hand.

        So an unfinished tower is computed again from its first layer. It is a small part of the work.
        """
        model = self.streamed.model
        tower = model.tower
        layers = [_block(layer) for layer in tower.blocks]
        names = [f"{_name_of(model, tower.blocks)}.{i}" for i in range(len(layers))]
        if all(map(self.writer.has, names)):
            for name in names:
                self._recall(name)
            found = self.writer.record(names[-1])["saliency"]
            return None if found is None else SaliencyAgreement(**found)
        shown, held_out = _split(self._media())
        batches = self._tower_inputs(tower, shown) if shown else []
        quantised = []
        for i, (name, layer) in enumerate(zip(names, layers, strict=True)):
            block, done, error, batches = self._tower_layer(name, i, layer, batches)
            quantised.append(block)
            agreement = None
            if i == len(layers) - 1 and shown:
                agreement = self._compare_towers(tower, quantised, held_out or shown, tokens, bool(held_out))
            extra = {"saliency": None if agreement is None else asdict(agreement)} if i == len(layers) - 1 else {}
            self._write(name, done, error, extra)
        return agreement

    def _tower_inputs(self, tower: VisionTower, media: Sequence[Frames]) -> list[TowerBatch]:
        with torch.no_grad():
            return tower.batches([self.streamed.model.preprocess(frames) for frames in media], self.settings.max_tiles)

    def _tower_layer(
        self, name: str, index: int, layer: ScaledBlock, batches: Sequence[TowerBatch]
    ) -> tuple[ScaledBlock, QuantisedBlock, OutputError | None, list[TowerBatch]]:
        """Returns the quantised layer, what of it is stored, its error, and the batches behind the original layer."""
        outputs: list[Tensor] = []

        def call(batch: TowerBatch) -> Callable[[], object]:
            return lambda: outputs.append(batch.run(layer, index, batch.hidden))

        stats = self._collect(name, layer, map(call, batches))
        block = copy.deepcopy(layer)
        with _named(name):
            done = smooth_block(block, stats, check=self._tick)
        install(block, done.weights)
        error = None
        if batches:
            with torch.no_grad():
                again = [batch.run(block, index, batch.hidden) for batch in batches]
            error = _output_error([batch.hidden for batch in batches], outputs, again)
        behind = [replace(batch, hidden=hidden) for batch, hidden in zip(batches, outputs, strict=True)]
        return block, done, error, behind

    def _compare_towers(
        self,
        tower: VisionTower,
        quantised: Sequence[ScaledBlock],
        media: Sequence[Frames],
        tokens: Mapping[str, VisualTokens],
        held_out: bool,
    ) -> SaliencyAgreement:
        original = list(tower.blocks)
        try:
            _fill(tower.blocks, quantised)
            pairs = [(f, tokens[f.key], found) for f, found in zip(media, self._encoded(media), strict=True)]
        finally:
            _fill(tower.blocks, original)
        return _agreement(pairs, held_out)

    # The decoder

    def _sequences(self, tokens: Mapping[str, VisualTokens]) -> list[CalibrationSequence]:
        if not self.samples:
            return []
        model, checkpoint = self.streamed.model, self.streamed.checkpoint
        tokenizer = load_tokenizer(checkpoint)
        check_media_tokens(tokenizer, model)
        limit = min(self.settings.max_positions, self.streamed.config.max_context)
        sequences = []
        with torch.no_grad():
            for sample in self.samples:
                self._tick()
                seen = None if sample.frames is None else tokens[sample.frames.key]
                sequences.append(embed_sample(model, tokenizer, sample, seen, max_positions=limit))
        return sequences

    def _decoder_layer(self, index: int, sequences: Sequence[CalibrationSequence]) -> None:
        """Runs the original layer on all sequences; quantises it if it has to be and is not there yet."""
        name = self.streamed.layer_name(index)
        quantise = self.settings.llm != "none" and not self.writer.has(name)
        if not quantise and not sequences:
            return self._recall(name)
        layer = self.streamed.layer(index, lambda _: self._tick())
        first = [s.hidden for s in sequences[:1]]  # the error is measured on the first sequence

        def call(sequence: CalibrationSequence) -> Callable[[], object]:
            return lambda: setattr(sequence, "hidden", self._run_layer(layer, sequence))

        stats = self._collect(name, layer if quantise else None, map(call, sequences))
        if not quantise:
            return self._recall(name)
        with _named(name):
            done = awq_block(layer, stats, self._rounding(name), check=self._tick)
        install(layer, done.weights)
        error = None
        if first:
            with torch.no_grad():
                again = self._run_layer(layer, CalibrationSequence(first[0], sequences[0].positions))
            error = _output_error(first, [sequences[0].hidden], [again])
        self._write(name, done, error)

    def _run_layer(self, layer: DecoderLayer, sequence: CalibrationSequence) -> Tensor:
        cos, sin = self.streamed.model.decoder.angles(sequence.positions)
        q, k, v = layer.project(sequence.hidden, cos, sin)
        attended, _ = attention(q, k, v, causal=True)
        return layer.finish(sequence.hidden, attended)

    def _rounding(self, block: str) -> Rounding:
        """AutoAWQ's layout holds float16; otherwise scales have the dtype of the matrices they stand for."""
        stored = next(own for own in self.streamed.tensors_of(block) if own.endswith("_proj.weight"))
        dtype = self.streamed.checkpoint.tensors[self.streamed.stored(stored)].torch_dtype
        return Rounding(self.settings.group_size, scale_dtype=torch.float16 if self.settings.form == "awq" else dtype)

    def _head(self, sequences: Sequence[CalibrationSequence]) -> None:
        """The output matrix in 8 bits, with the norm before it."""
        name = self.streamed.head_name
        if self.writer.has(name):
            return self._recall(name)
        head = self.streamed.head(lambda _: self._tick())

        def call(sequence: CalibrationSequence) -> Callable[[], object]:
            return lambda: head(sequence.hidden)

        stats = self._collect(name, head, map(call, sequences))
        inputs = [s.hidden for s in sequences[:1]]
        with torch.no_grad():
            exact = [head(x) for x in inputs]
            with _named(name):
                done = smooth_block(head, stats, check=self._tick)
            install(head, done.weights)
            found = [head(x) for x in inputs]
        error = _output_error([torch.zeros_like(y) for y in exact], exact, found) if exact else None
        self._write(name, done, error, root=self.streamed.decoder_name)

    # Both

    def _collect(
        self, name: str, block: ScaledBlock | None, calls: Iterable[Callable[[], object]]
    ) -> dict[str, ChannelStats] | None:
        """Makes every call; the inputs of the block's layers, None where nothing is searched."""
        searched = block is not None and self.settings.search
        modules = linear_layers(block) if block is not None and searched else {}
        with _named(name):
            found = collect(modules, calls, num_rows=self.settings.num_rows, progress=lambda _: self._tick())
        return found if searched else None

    def _write(
        self,
        unit: str,
        block: QuantisedBlock,
        error: OutputError | None,
        extra: Mapping[str, Any] | None = None,
        *,
        root: str | None = None,
    ) -> None:
        """Hands a unit to the writer, unless it has it. `root` is what the block's names lie under."""
        root = unit if root is None else root
        report = UnitReport(unit, block.record, error)
        if not self.writer.has(unit):
            stored = {own: self.streamed.stored(f"{root}.{own}") for own in block.dense}
            source = self.streamed.checkpoint.read_tensors(set(stored.values()))
            self.writer.add(
                unit,
                dense={name: _unless_changed(source[name], block.dense[own]) for own, name in stored.items()},
                quantised={
                    self.streamed.stored(f"{root}.{own}.weight").removesuffix(".weight"): weight
                    for own, weight in block.weights.items()
                },
                record={**report.to_json(), **(extra or {})},
            )
        self._recall(unit)

    def _recall(self, unit: str) -> None:
        """Takes note of a unit that is done; a decoder layer that was only run is none."""
        if self.writer.has(unit):
            self.reports.append(UnitReport.from_json(unit, self.writer.record(unit)))
            self.written.update(self.streamed.tensors_of(unit))
        self.done += 1
        self._tick()

    # The rest

    def _copy_the_rest(self) -> None:
        """Everything that no unit has, as it is stored: tensors that are known and not needed included."""
        checkpoint = self.streamed.checkpoint
        written = {self.streamed.stored(own) for own in self.written}
        for number, names in enumerate(_in_batches(checkpoint, [n for n in checkpoint.tensors if n not in written])):
            self._tick()
            unit = f"unchanged.{number}"
            if not self.writer.has(unit):
                self.writer.add(unit, dense=checkpoint.read_tensors(names), quantised={}, record={})

    def _documents(self) -> dict[str, bytes]:
        """The other files of the folder and of its sub-models: tokenizer, preprocessor, templates, licence."""
        checkpoint = self.streamed.checkpoint
        parts = {"": checkpoint, **{f"{name}/": part for name, part in checkpoint.folders.items()}}
        return {
            f"{prefix}{name}": part.read_bytes(name, MAX_TOKENIZER_BYTES)
            for prefix, part in parts.items()
            for name in sorted(path.name for path in part.folder.iterdir() if path.is_file())
            if _is_document(name)
        }


def _is_document(name: str) -> bool:
    known = name.endswith(_DOCUMENT_SUFFIXES) or name.partition(".")[0] in _DOCUMENT_NAMES
    return known and name not in _WRITTEN_HERE and not name.startswith(".") and not name.endswith(".index.json")


# Checks -------------------------------------------------------------------------------------------------------------


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    found = [name for name, t in by_layer(checkpoint.headers()).items() if detect(StoredLayer(name, t)) != "dense"]
    configs = {"": checkpoint.config, **{f"{name}/": part.config for name, part in checkpoint.folders.items()}}
    stated = [folder for folder, config in configs.items() if "quantization_config" in config]
    if found or stated:
        what = f"layer {found[0]}" if found else f"{stated[0]}config.json has a quantization_config"
        raise InvalidRequest(
            f"{checkpoint.folder}: expected a checkpoint of floats, this one is quantised already ({what})",
            hint="start from the original",
        )


def _check_settings(settings: QuantSettings, streamed: StreamedModel, samples: Sequence[CalibrationSample]) -> None:
    """Raises InvalidRequest for what cannot be done with this model and these samples, before any work."""
    if settings.lm_head != "none" and not streamed.has_head:
        raise InvalidRequest("lm_head: the output matrix is the embedding's, which cannot be quantised")
    if settings.llm != "none":
        with torch.device("meta"):
            layer = DecoderLayer(streamed.config)
        for name, _, _, (_, K) in matrices_of(layer):
            if K % settings.group_size:
                fitting = ", ".join(str(size) for size in GROUP_SIZES if K % size == 0) or "none"
                raise InvalidRequest(
                    f"group_size: {settings.group_size} does not divide the {K} inputs of {streamed.layer_name(0)}."
                    f"{name}; of {', '.join(map(str, GROUP_SIZES))} these do: {fitting}"
                )
    if not settings.search:
        return
    if not samples:
        raise InvalidRequest("calibration: expected at least one sample, got none")
    if settings.vision != "none" and not any(sample.frames is not None for sample in samples):
        raise InvalidRequest("calibration: expected a picture or a clip for the vision tower, got text alone")


def _block(layer: torch.nn.Module) -> ScaledBlock:
    assert isinstance(layer, ScaledBlock)
    return layer


def _fill(blocks: torch.nn.ModuleList, others: Sequence[torch.nn.Module]) -> None:
    for i, other in enumerate(others):
        blocks[i] = other


def _name_of(model: Any, module: torch.nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def _fingerprint(
    checkpoint: Checkpoint, settings: QuantSettings, samples: Sequence[CalibrationSample], device: torch.device
) -> str:
    """Of all that decides the result: the source's files by size and time, the settings, the samples, the device."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    state = {
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "config": [checkpoint.config, *(part.config for part in checkpoint.folders.values())],
        "settings": asdict(settings),
        "samples": samples_fingerprint(samples),
        "device": device.type,
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


class _named:  # noqa: N801 (reads as a statement)
    """Errors of the searches, which name a layer of the block, get the block's name."""

    def __init__(self, block: str) -> None:
        self.block = block

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError) and not isinstance(error, SparseVILAError):
            raise CorruptCheckpoint(f"{self.block}: {error}") from error


# Measuring ----------------------------------------------------------------------------------------------------------


def _output_error(inputs: Sequence[Tensor], exact: Sequence[Tensor], found: Sequence[Tensor]) -> OutputError:
    dot = exact_sq = found_sq = off_sq = added_sq = 0.0
    for x, y, z in zip(inputs, exact, found, strict=True):
        x, y, z = x.double(), y.double(), z.double()
        dot += float((y * z).sum())
        exact_sq += float(y.square().sum())
        found_sq += float(z.square().sum())
        off_sq += float((z - y).square().sum())
        added_sq += float((y - x).square().sum())
    cosine = dot / math.sqrt(exact_sq * found_sq) if exact_sq and found_sq else 1.0
    return OutputError(cosine=1 - cosine, relative=math.sqrt(off_sq / added_sq) if added_sq else 0.0)


def _agreement(pairs: Sequence[tuple[Frames, VisualTokens, VisualTokens]], held_out: bool) -> SaliencyAgreement:
    """pairs: an item, its tokens from the original tower, its tokens from the quantised one."""
    spearman = [_spearman(_ranked(a), _ranked(b)) for _, a, b in pairs]
    overlap = {f"{removed:.2f}": _mean([_kept_overlap(a, b, f, removed) for f, a, b in pairs]) for removed in PRUNED}
    return SaliencyAgreement(len(pairs), held_out, _mean(spearman), overlap)


def _ranked(tokens: VisualTokens) -> Tensor:
    assert tokens.saliency is not None
    return tokens.saliency.cpu()[~tokens.token_map.structural]


def _spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks; equal values take the order of their places."""
    ranks = torch.stack([x.argsort(stable=True).argsort().double() for x in (a, b)])
    return 1.0 if ranks.shape[1] < 2 else float(torch.corrcoef(ranks)[0, 1])


def _kept_overlap(a: VisualTokens, b: VisualTokens, frames: Frames, removed: float) -> float:
    """Share of the tokens that pruning keeps by `a` which it keeps by `b` too; structural ones do not count."""
    method = make_method(Sparsity(prefill=removed, decode=0.0))
    kept = []
    for tokens in (a, b):
        survivors = method.on_vision(tokens, frames.kind)
        assert survivors is not None
        kept.append(set(survivors.sources[~survivors.tokens.token_map.structural].tolist()))
    return len(kept[0] & kept[1]) / len(kept[0])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# Parts --------------------------------------------------------------------------------------------------------------


def _split(media: list[Frames]) -> tuple[list[Frames], list[Frames]]:
    """Media to calibrate on, and some to compare the towers on; a single one is not split."""
    count = 0 if len(media) < 2 else min(_MAX_HELD_OUT, max(1, len(media) // _HELD_OUT_SHARE))
    return media[: len(media) - count], media[len(media) - count :]


def _unless_changed(stored: Tensor, now: Tensor) -> Tensor:
    """The stored tensor if the block still has its values, otherwise the block's in float32."""
    now = now.cpu()
    return stored if torch.equal(stored.to(now.dtype), now) else now


def _in_batches(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[list[str]]:
    """Names of tensors that may be in memory and in one file together; a larger one goes alone."""
    batch: list[str] = []
    size = 0
    for name in names:
        info = checkpoint.tensors[name]
        elsewhere = batch and checkpoint.tensors[batch[-1]].file.parent != info.file.parent
        if elsewhere or (batch and size + info.end - info.begin > _COPIED_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += info.end - info.begin
    if batch:
        yield batch
