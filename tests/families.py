"""A tiny checkpoint of every family in the registry, by name; each is made once a test session, when it is asked for.

A row of the registry without a checkpoint here fails `tests/test_families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tiny_nvila
import tiny_onevision
import tiny_qwen
from oracles import TINY, Tiny, build_oracle


@dataclass(frozen=True)
class Family:
    """A tiny model: who makes it, and the kind of media that the shared tests show it."""

    architecture: str
    build: Callable[[Path], object]
    shown: Literal["image", "video"]


def _llava(tiny: Tiny) -> Family:
    name = "LlavaNextVideoForConditionalGeneration" if tiny.video else "LlavaNextForConditionalGeneration"
    return Family(name, partial(build_oracle, tiny=tiny), "video" if tiny.video else "image")


FAMILIES: dict[str, Family] = {
    **{name: _llava(tiny) for name, tiny in TINY.items()},
    "qwen2": Family("Qwen2VLForConditionalGeneration", partial(tiny_qwen.build, generation="qwen2"), "image"),
    "qwen2.5": Family("Qwen2_5_VLForConditionalGeneration", partial(tiny_qwen.build, generation="qwen2.5"), "video"),
    "onevision": Family("LlavaOnevisionForConditionalGeneration", tiny_onevision.build, "image"),
    "nvila": Family("LlavaLlamaModel", partial(tiny_nvila.build, kind="nvila"), "image"),
    "longvila": Family("LlavaLlamaModel", partial(tiny_nvila.build, kind="longvila"), "video"),
    "radio": Family("LlavaLlamaModel", partial(tiny_nvila.build, kind="radio"), "image"),
}


class TinyFolders(Mapping[str, Path]):
    """The checkpoint folder of each family."""

    def __init__(self, new_folder: Callable[[str], Path], known: Mapping[str, Path]) -> None:
        self._new_folder = new_folder
        self._made = dict(known)

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            folder = self._new_folder(name)
            FAMILIES[name].build(folder)
            self._made[name] = folder
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(FAMILIES)

    def __len__(self) -> int:
        return len(FAMILIES)
