"""What the published configs say, built without weights: sizes, counts of tokens, planned memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_table import entry_bytes, families, licences
from planned_memory import blank, fits, plan
from published import PUBLISHED, model_of, stored_bytes

from sparsevila import Sparsity
from sparsevila.engine.hub import ALIASES
from sparsevila.models.interface import TokenMap


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


def test_longvila_at_256_frames_fits_a_card_of_24_gb() -> None:
    model = model_of("longvila-7b")
    token_map = model.preprocess(blank("video", 256, 4, 6)).token_map
    planned = plan(model, token_map, "video", Sparsity(0.0, 0.0))
    assert (planned.visual_tokens, planned.structural_tokens, planned.kept) == (65_536, 256, 65_536)
    assert planned.cache_bytes >= 65_536 * entry_bytes(model)
    assert fits(model, planned, token_map, 24 * 10**9)
    assert not fits(model, planned, token_map, planned.total_bytes - 10**6)
    pruned = plan(model, token_map, "video", Sparsity(0.75, 0.90))
    assert (pruned.kept, pruned.active) == (16_384, 1_638)
    saved = planned.total_bytes - pruned.total_bytes
    assert 0.9 < saved / ((65_536 - 16_384 - 1_638) * entry_bytes(model)) < 1.1


def test_quantised_weights_are_about_a_quarter() -> None:
    """Of a 7B model: the decoder's layers in 4 bits, the tower in 8, embedding and head as they are."""
    planned = plan(model := model_of("llava-next-7b"), tokens_of(model), "image", Sparsity(0.6, 0.75))
    assert planned.visual_tokens == 1_920
    assert planned.structural_tokens == 28
    assert (planned.kept, planned.active) == (768, 192)
    assert 0.28 < planned.weight_bytes / stored_bytes("llava-next-7b") < 0.34


def tokens_of(model: Any) -> TokenMap:
    token_map: TokenMap = model.preprocess(blank("image", 1, 1080, 1920)).token_map
    return token_map


def test_the_page_names_every_architecture_and_alias() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
    for line in [*families(), *licences()]:
        assert line in page, "run: python benchmarks/model_table.py --out docs/models.md"
