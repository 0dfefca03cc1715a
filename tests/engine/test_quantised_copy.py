"""The copy of a model that is quantised once and found by its name."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import oracles  # noqa: F401 (puts benchmarks on the path)
import pytest
from random_checkpoint import preset, write_random_checkpoint

from sparsevila import Engine
from sparsevila.engine import hub, quantised_copy
from sparsevila.engine.calibration_set import CalibrationSample
from sparsevila.engine.quantise import QuantSettings
from sparsevila.engine.quantised_copy import estimate, make_copy, plan_copy
from sparsevila.errors import InsufficientMemory, InvalidRequest
from sparsevila.models.checkpoint import Checkpoint

NAME = "llava-next-7b"
SMALL = QuantSettings(group_size=32, search=False)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A home with a tiny model under a known name, for which nothing is too small to quantise."""
    monkeypatch.setattr(quantised_copy, "WORTH_BYTES", 1000)
    monkeypatch.setattr(quantised_copy, "QuantSettings", lambda: SMALL)
    monkeypatch.setattr(quantised_copy, "builtin_samples", lambda: [CalibrationSample("Hello there.")])
    home = tmp_path / "home"
    write_random_checkpoint(home / "models" / NAME, preset("tiny"))
    return {"home": home, "hf_cache": tmp_path / "cache"}


def test_a_copy_is_made_once_and_taken_from_then_on(places):
    plan = plan_copy(NAME, **places)
    assert plan is not None
    assert plan.source == places["home"] / "models" / NAME
    assert make_copy(plan).out == plan.out
    assert hub.resolve(NAME, quantised=True, **places).path == plan.out
    assert plan_copy(NAME, **places) is None
    written = sum(file.stat().st_size for file in plan.out.glob("*.safetensors"))
    assert plan.cost.out_bytes == pytest.approx(written, rel=0.1)
    assert plan.cost.out_bytes < plan.cost.source_bytes


def test_nothing_is_offered_where_it_makes_no_sense(places, monkeypatch, tmp_path):
    assert plan_copy("demo", **places) is None
    assert plan_copy(str(places["home"] / "models" / NAME), **places) is None  # a folder: that of the caller
    assert plan_copy("llava-next-13b", **places) is None  # not here
    monkeypatch.setattr(quantised_copy, "WORTH_BYTES", 1 << 30)
    assert plan_copy(NAME, **places) is None


def test_a_full_disk_is_found_before_the_work(places, monkeypatch):
    plan = plan_copy(NAME, **places)
    usage = shutil.disk_usage(places["home"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InvalidRequest, match="GB are free"):
        make_copy(plan)
    assert not plan.out.exists()


def test_the_memory_limit_is_held_by_the_estimate(places):
    cost = estimate(Checkpoint.open(places["home"] / "models" / NAME), SMALL)
    cost.check_memory(None)
    cost.check_memory(cost.memory_bytes)
    with pytest.raises(InsufficientMemory, match="quantising this model"):
        cost.check_memory(cost.memory_bytes - 1)


def test_closing_gives_quantised_weights_back(places):
    plan = plan_copy(NAME, **places)
    make_copy(plan)
    engine = Engine.load(plan.out, dtype="float32")
    parameters = [weakref.ref(parameter) for parameter in engine.model.parameters()]
    assert len(parameters) > 50
    engine.close()
    gc.collect()
    assert [ref for ref in parameters if ref() is not None] == []
