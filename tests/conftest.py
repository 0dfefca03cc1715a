"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from families import TinyFolders
from oracles import TINY, Oracle, build_oracle

from sparsevila.kernels.backend import cpu_level

# The models of the tests are tiny: beside another busy process a second thread costs milliseconds per operation.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    """Every tiny checkpoint, made once."""
    return {name: build_oracle(tmp_path_factory.mktemp(name), tiny) for name, tiny in TINY.items()}


@pytest.fixture(scope="session")
def tiny_folders(oracles: dict[str, Oracle], tmp_path_factory: pytest.TempPathFactory) -> TinyFolders:
    """A checkpoint folder of every family."""
    return TinyFolders(tmp_path_factory.mktemp, {name: oracle.folder for name, oracle in oracles.items()})


@pytest.fixture(scope="session")
def media_script() -> ModuleType:
    """assets/make_media.py, which knows what the bundled pictures and clips show."""
    path = Path(__file__).resolve().parent.parent / "assets" / "make_media.py"
    spec = importlib.util.spec_from_file_location("make_media", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def limit_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets SPARSEVILA_CPU, which is otherwise read once."""

    def limit(word: str) -> None:
        monkeypatch.setenv("SPARSEVILA_CPU", word)
        cpu_level.cache_clear()

    yield limit
    cpu_level.cache_clear()
