"""What a policy may do beyond the paper, as text: `budgets=mass,sinks=4`. The fields of `Sparsity` are the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from ..errors import InvalidRequest
from .config import Sparsity

# By name, with its default, which is off.
SWITCHES: Mapping[str, Any] = MappingProxyType(
    {row.name: row.default for row in fields(Sparsity) if row.name not in ("prefill", "decode", "method")}
)


def switched_on(sparsity: Sparsity) -> dict[str, Any]:
    """The switches that are not at their default."""
    values = {name: getattr(sparsity, name) for name in SWITCHES}
    return {name: value for name, value in values.items() if value != SWITCHES[name]}


def parse_switches(text: str) -> dict[str, Any]:
    """`NAME=VALUE[,NAME=VALUE...]`, where `global` is short for `scope=global`, to fields of `Sparsity`.

    Raises InvalidRequest where a name is unknown or comes twice, or a value is not of its kind. Whether a value is
    among those allowed, `Sparsity` says.
    """
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = ("scope", "=", part) if part == "global" else part.partition("=")
        if name not in SWITCHES or not equals:
            raise InvalidRequest(f"switch: expected NAME=VALUE with a name of {', '.join(SWITCHES)}, got {part!r}")
        if name in found:
            raise InvalidRequest(f"switch: expected {name} once, got it twice in {text!r}")
        found[name] = _value(name, value)
    return found


def _value(name: str, text: str) -> Any:
    default = SWITCHES[name]
    if isinstance(default, bool):
        if text not in ("on", "off"):
            raise InvalidRequest(f"{name}: expected on or off, got {text!r}")
        return text == "on"
    if isinstance(default, (int, float)):
        try:
            return type(default)(text)
        except ValueError:
            kind = "whole number" if isinstance(default, int) else "number"
            raise InvalidRequest(f"{name}: expected a {kind}, got {text!r}") from None
    return text


def write_switches(sparsity: Sparsity) -> str:
    """What is on, as `parse_switches` reads it, in the order of the fields; "" where nothing is."""
    return ",".join(_written(name, value) for name, value in switched_on(sparsity).items())


def _written(name: str, value: Any) -> str:
    if (name, value) == ("scope", "global"):
        return "global"
    if isinstance(value, bool):
        return f"{name}={'on' if value else 'off'}"
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
