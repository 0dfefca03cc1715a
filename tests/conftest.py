"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from families import TinyFolders
from oracles import TINY, Oracle, build_oracle

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
