"""Processes that share gradients: everyone takes the leader's step, and a failure ends all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from threading import BrokenBarrierError

import pytest
import torch
from torch import nn
from world.crew import Crew, run_crew

STEPS, BATCHES = 4, 3


def _descend(folder: Path, crew: Crew) -> None:
    """A few steps of plain gradient descent on sums of squares; each process writes what it ends with."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(4))]
    for step in range(STEPS):
        for batch in crew.share(BATCHES):
            data = torch.randn(5, generator=torch.Generator().manual_seed(step * BATCHES + batch))
            (((weights[0] ** 2).sum() + (weights[1] * data).sum() ** 2) / BATCHES).backward()
        assert not crew.sum_gradients(weights, stop=False)
        with torch.no_grad():
            for weight in weights[:2]:
                assert weight.grad is not None
                weight -= 0.1 * weight.grad
                weight.grad = None
    torch.save(weights[:2], folder / f"{crew.size}-{crew.rank}.pt")


def _stop_at_two(folder: Path, crew: Crew) -> None:
    weight = nn.Parameter(torch.zeros(1))
    steps = 0
    while True:
        steps += 1
        if crew.sum_gradients([weight], stop=crew.leads and steps == 2):
            break
    (folder / str(crew.rank)).write_text(str(steps))


def _fail(folder: Path, crew: Crew) -> None:
    weight = nn.Parameter(torch.zeros(1))
    if crew.rank == 1:
        raise ValueError("on purpose")
    crew.sum_gradients([weight], stop=False)
    (folder / "went on").touch()


def test_all_end_with_the_same_bits_and_where_one_process_ends(tmp_path: Path) -> None:
    for size in (1, 2):
        run_crew(size, 100, partial(_descend, tmp_path))
    alone, leader, other = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for a, b, c in zip(alone, leader, other, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_leader_stops_everyone_after_the_same_step(tmp_path: Path) -> None:
    run_crew(2, 100, partial(_stop_at_two, tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2", "2"]


def test_a_failure_of_one_ends_all(tmp_path: Path) -> None:
    with pytest.raises(BrokenBarrierError):
        run_crew(2, 100, partial(_fail, tmp_path))
    assert not (tmp_path / "went on").exists()
