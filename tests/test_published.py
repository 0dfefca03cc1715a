"""The sizes that the list of models shows are those of the published configs, built without weights."""

from __future__ import annotations

import pytest
from published import PUBLISHED, model_of, stored_bytes

from sparsevila.engine.hub import ALIASES


@pytest.mark.parametrize("alias", PUBLISHED)
def test_the_listed_size_is_that_of_the_config(alias: str) -> None:
    assert ALIASES[alias].size_bytes == stored_bytes(alias)


def test_every_alias_has_a_config() -> None:
    """But for what is bundled, and for quantised forms of another one."""
    with_weights = {alias for alias, entry in ALIASES.items() if entry.repository and not alias.endswith("-awq")}
    assert with_weights == set(PUBLISHED)


def test_known_counts_of_parameters() -> None:
    """As the model cards say: billions, both halves of a tied matrix once."""
    assert round(stored_bytes("qwen2.5-vl-7b") / 2e9, 2) == 8.29
    assert round(stored_bytes("qwen2-vl-2b") / 2e9, 1) == 2.2
    assert round(stored_bytes("llava-next-7b") / 2e9, 1) == 7.1


def test_contexts_and_frames() -> None:
    assert model_of("longvila-7b").decoder.config.max_context == 131072
    assert model_of("longvila-7b-1m").decoder.config.max_context == 1_048_576
    assert model_of("llava-next-video-7b").decoder.config.max_context == 10240
