"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
import torch
from oracles import TINY, Oracle, build_oracle

# The models of the tests are tiny: beside another busy process a second thread costs milliseconds per operation.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    """Every tiny checkpoint, made once."""
    return {name: build_oracle(tmp_path_factory.mktemp(name), tiny) for name, tiny in TINY.items()}
