"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
from oracles import TINY, Oracle, build_oracle


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    """Every tiny checkpoint, made once."""
    return {name: build_oracle(tmp_path_factory.mktemp(name), tiny) for name, tiny in TINY.items()}
