"""`quantization_config` of a config.json, read and written: what the weights are, for AWQ and compressed-tensors.

The config says how to read a layer that the file holds quantised; *whether* it is quantised the tensors say
(`formats.py`). Writers get the list of exceptions wrong: AutoAWQ states none for a LLaVA-NeXT whose tower and
projector are plain float16, and module names in memory differ from those on disk.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from ..errors import CorruptCheckpoint, UnsupportedModel
from .awq_format import Layout
from .name_pattern import NamePattern

MAX_GROUPS = 64
MAX_NAMES = 16_384  # of targets or exceptions: writers list every layer of a tower
MAX_NAME_LEN = 512
MAX_PATTERN_CHARS = 4096  # of all `re:` patterns together: each is tried on each layer
MAX_GROUP_SIZE = 65_536

_LINEAR = "Linear"  # the class that targets name; every layer asked about here is one
_WRITTEN_BY = {4: "pack-quantized", 8: "int-quantized"}  # bits of the weights -> format


@dataclass(frozen=True)
class Scheme:
    """W4A16 with a scale and a zero point per group, or W8A8 with a scale per row and per token of the input."""

    bits: Literal[4, 8]  # of the weights; with 8 the inputs are quantised to 8 bits too, while running
    group_size: int | None  # inputs that share a scale; None for a whole row
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits == 8 and (self.group_size is not None or not self.symmetric):
            raise ValueError(f"expected a scale per row and no zero point with 8 bits, got {self}")
        if self.group_size is not None and not 2 <= self.group_size <= MAX_GROUP_SIZE:
            raise ValueError(f"expected a group size from 2 to {MAX_GROUP_SIZE}, got {self.group_size}")

    def group_of(self, in_features: int) -> int:
        """Inputs that share a scale in a layer of that width."""
        return self.group_size or in_features


@dataclass(frozen=True)
class SchemeGroup:
    """A scheme and the layers it is meant for: names, `re:` patterns, or the class `Linear`."""

    targets: tuple[str, ...]
    scheme: Scheme


@dataclass(frozen=True)
class QuantizationConfig:
    """What a config.json says about quantised weights. `layout` is AutoAWQ's `version`, None where it says nothing."""

    method: Literal["awq", "compressed-tensors"]
    groups: tuple[SchemeGroup, ...]
    ignore: tuple[str, ...] = ()  # layers left dense: parts of names for awq, entries like targets otherwise
    layout: Layout | None = None

    def __post_init__(self) -> None:
        """Raises UnsupportedModel for patterns outside of what is understood, CorruptCheckpoint for too many."""
        if sum(len(text) for text, pattern in self._patterns.items() if pattern.is_regex) > MAX_PATTERN_CHARS:
            raise CorruptCheckpoint(f"quantization_config: more than {MAX_PATTERN_CHARS} characters of name patterns")

    def scheme(self, layer: str) -> Scheme | None:
        """What the config alone says about a linear layer of that name; None for one it leaves dense.

        Precedence as in compressed-tensors: exceptions, then a target that is the name, then patterns in the order
        of their text, then the class.
        """
        if self.method == "awq":
            return None if any(part in layer for part in self.ignore) else self.groups[0].scheme
        patterns = self._patterns
        if any(text == _LINEAR or patterns[text].matches(layer) for text in self.ignore):
            return None
        by_target = {text: group.scheme for group in self.groups for text in group.targets}
        matching = [text for text in by_target if patterns[text].matches(layer)]
        if matching:
            return by_target[min(matching, key=lambda text: (patterns[text].is_regex, text))]
        return by_target.get(_LINEAR)

    def scheme_for(self, layer: str, bits: Literal[4, 8]) -> Scheme:
        """The scheme of a layer that the file holds in that many bits.

        Where one scheme has those bits it is the one, whatever targets and exceptions say: their names may be those
        of the modules in memory. Otherwise the names decide. Raises CorruptCheckpoint where nothing does.
        """
        schemes = {group.scheme for group in self.groups if group.scheme.bits == bits}
        if len(schemes) == 1:
            return schemes.pop()
        named = self.scheme(layer)
        if named is None or named.bits != bits:
            raise CorruptCheckpoint(
                f"layer {layer}: the file holds {bits}-bit weights, quantization_config has {len(schemes)} schemes of "
                "that width and names none of them for this layer"
            )
        return named

    def to_dict(self) -> dict[str, Any]:
        """The value of `quantization_config` in a config.json: `parse_quantization_config` gives this back."""
        return _awq_dict(self) if self.method == "awq" else _compressed_dict(self)

    @cached_property
    def _patterns(self) -> dict[str, NamePattern]:
        """Every target and exception of compressed-tensors, read."""
        if self.method == "awq":
            return {}
        return {text: NamePattern(text) for text in (*self.ignore, *(t for g in self.groups for t in g.targets))}


def awq_config(group_size: int | None, *, dense: tuple[str, ...] = ()) -> QuantizationConfig:
    """The config of a checkpoint in AutoAWQ's gemm layout; `dense` are parts of the names of layers left alone."""
    return QuantizationConfig("awq", (SchemeGroup((_LINEAR,), Scheme(4, group_size, False)),), dense, "gemm")


def compressed_config(groups: tuple[SchemeGroup, ...], *, dense: tuple[str, ...] = ()) -> QuantizationConfig:
    """The config of a checkpoint in compressed-tensors' formats, e.g. an 8-bit tower and a 4-bit language model."""
    return QuantizationConfig("compressed-tensors", groups, dense)


def parse_quantization_config(values: Mapping[str, Any]) -> QuantizationConfig:
    """Reads the object under `quantization_config`.

    Raises UnsupportedModel for a method, a format or an option that this engine does not compute, CorruptCheckpoint
    for a value that no writer means. Both name the key and the value.
    """
    fields = _Fields(values, "quantization_config")
    method = fields.text("quant_method")
    if method == "awq":
        return _parse_awq(fields)
    if method == "compressed-tensors":
        return _parse_compressed(fields)
    raise fields.unsupported("quant_method", "'awq' or 'compressed-tensors'")


# AWQ ----------------------------------------------------------------------------------------------------------------


def _parse_awq(fields: _Fields) -> QuantizationConfig:
    fields.only("bits", 4)
    fields.only("zero_point", True, default=True)
    fields.only("desc_act", False, default=False)
    if fields.get("backend", None) == "llm-awq":
        raise fields.unsupported("backend", "a kernel of AutoAWQ's layouts")
    fields.empty("dynamic")
    group_size = fields.whole("group_size", low=-1, high=MAX_GROUP_SIZE)
    if group_size in (0, 1):
        raise fields.unsupported("group_size", "-1 or at least 2")
    layout: Layout | None = None
    for key in ("version", "format", "checkpoint_format"):  # spellings of AutoAWQ, transformers 5 and GPTQModel
        if fields.values.get(key) is None:
            continue
        stated = fields.text(key).lower()
        if stated not in get_args(Layout):
            raise fields.unsupported(key, " or ".join(map(repr, get_args(Layout))))
        if layout not in (None, stated):
            raise fields.corrupt(key, f"{layout!r} as above")
        layout = stated  # type: ignore[assignment]  # one of Layout's values
    ignore = fields.texts("modules_to_not_convert", default=())
    scheme = Scheme(4, None if group_size == -1 else group_size, symmetric=False)
    return QuantizationConfig("awq", (SchemeGroup((_LINEAR,), scheme),), ignore, layout)


def _awq_dict(config: QuantizationConfig) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": config.groups[0].scheme.group_size or -1,
        "bits": 4,
        "version": config.layout,
        "modules_to_not_convert": list(config.ignore) or None,
    }


# compressed-tensors -------------------------------------------------------------------------------------------------


def _parse_compressed(fields: _Fields) -> QuantizationConfig:
    fields.only("format", *_WRITTEN_BY.values(), "mixed-precision")
    fields.only("kv_cache_scheme", None, default=None)
    fields.empty("transform_config")
    sparsity = fields.sub("sparsity_config", required=False)
    # Early writers noted the share of zeros under the format "dense", which stores every value.
    if sparsity.values:
        sparsity.only("format", "dense")
    groups = fields.sub("config_groups")
    if not 1 <= len(groups.values) <= MAX_GROUPS:
        raise fields.corrupt("config_groups", f"1 to {MAX_GROUPS} groups")
    parsed = tuple(_parse_group(groups.sub(name), fields.values["format"]) for name in groups.values)
    return QuantizationConfig("compressed-tensors", parsed, fields.texts("ignore", default=()))


def _parse_group(fields: _Fields, whole_format: str) -> SchemeGroup:
    targets = fields.texts("targets")
    fields.only("output_activations", None, default=None)
    weights = fields.sub("weights")
    scheme = _parse_weights(weights)
    fields.only("format", _WRITTEN_BY[scheme.bits], None, default=None)
    if whole_format not in (_WRITTEN_BY[scheme.bits], "mixed-precision"):
        raise weights.unsupported("num_bits", f"the width of the format {whole_format!r}")
    if scheme.bits == 4:
        fields.only("input_activations", None, default=None)
    else:
        inputs = fields.sub("input_activations")
        inputs.only("num_bits", 8)
        inputs.only("type", "int")
        inputs.only("symmetric", True)
        inputs.only("strategy", "token")
        inputs.only("dynamic", True)
    return SchemeGroup(targets, scheme)


def _parse_weights(fields: _Fields) -> Scheme:
    bits: Literal[4, 8] = fields.only("num_bits", 4, 8)
    fields.only("type", "int")
    fields.only("dynamic", False, default=False)
    fields.only("block_structure", None, default=None)
    # "weight" and its alias "static" reorder while calibrating and leave no trace in the file; "group" does.
    fields.only("actorder", None, False, "weight", "static", default=None)
    strategy = fields.only("strategy", *(("group", "channel") if bits == 4 else ("channel",)))
    symmetric: bool = fields.only("symmetric", *((True, False) if bits == 4 else (True,)))
    if strategy == "channel":
        fields.only("group_size", None, -1, default=None)
        return Scheme(bits, None, symmetric)
    return Scheme(bits, fields.whole("group_size", low=2, high=MAX_GROUP_SIZE), symmetric)


def _compressed_dict(config: QuantizationConfig) -> dict[str, Any]:
    formats = {_WRITTEN_BY[group.scheme.bits] for group in config.groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": _group_dict(group) for i, group in enumerate(config.groups)},
        "ignore": list(config.ignore),
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _group_dict(group: SchemeGroup) -> dict[str, Any]:
    scheme = group.scheme
    whole = {"type": "int", "symmetric": True, "group_size": None, "block_structure": None, "actorder": None}
    weights = whole | {
        "num_bits": scheme.bits,
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    inputs = whole | {"num_bits": 8, "strategy": "token", "dynamic": True}
    return {
        "targets": list(group.targets),
        "weights": weights,
        "input_activations": inputs if scheme.bits == 8 else None,
        "output_activations": None,
        "format": _WRITTEN_BY[scheme.bits],
    }


# fields -------------------------------------------------------------------------------------------------------------


class _Required:
    """Marks a key without a default."""


_REQUIRED = _Required()


@dataclass(frozen=True)
class _Fields:
    """Typed access to one object of the config; every error names the whole key and the value."""

    values: Mapping[str, Any]
    where: str

    def corrupt(self, key: str, expected: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(self._said(key, expected))

    def unsupported(self, key: str, expected: str) -> UnsupportedModel:
        return UnsupportedModel(self._said(key, expected))

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        if key not in self.values and default is _REQUIRED:
            raise CorruptCheckpoint(f"config.json: {self.where}.{key}: the key is missing")
        return self.values.get(key, default)

    def only(self, key: str, *accepted: Any, default: Any = _REQUIRED) -> Any:
        """The value, if it is one of `accepted`. 1 is not true here, nor 4.0 a 4."""
        value = self.get(key, default)
        if not any(type(value) is type(one) and value == one for one in accepted):
            raise self.unsupported(key, " or ".join(map(repr, accepted)))
        return value

    def empty(self, key: str) -> None:
        if self.get(key, None):
            raise self.unsupported(key, "nothing")

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise self.corrupt(key, "a text")
        return value

    def texts(self, key: str, default: Any = _REQUIRED) -> tuple[str, ...]:
        """A list of names; null stands for an empty one where there is a default."""
        value = self.get(key, default)
        if value is None and default is not _REQUIRED:
            return ()
        if not isinstance(value, (list, tuple)) or len(value) > MAX_NAMES:
            raise self.corrupt(key, f"a list of at most {MAX_NAMES} names")
        for name in value:
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LEN:
                raise self.corrupt(key, f"names of 1 to {MAX_NAME_LEN} characters")
        return tuple(value)

    def whole(self, key: str, *, low: int, high: int) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.corrupt(key, f"a whole number from {low} to {high}")
        return value

    def sub(self, key: str, *, required: bool = True) -> _Fields:
        """The object under a key; an empty one where it is missing or null and not required."""
        value = self.get(key, _REQUIRED if required else None)
        if value is None and not required:
            value = {}
        if not isinstance(value, dict):
            raise self.corrupt(key, "an object")
        return _Fields(value, f"{self.where}.{key}")

    def _said(self, key: str, expected: str) -> str:
        return f"config.json: {self.where}.{key}: expected {expected}, got {reprlib.repr(self.values.get(key))}"
