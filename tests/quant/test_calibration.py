"""What is collected of a module's inputs, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from sparsevila.quant.calibration import ChannelStats, collect


def calls_of(module: nn.Module, inputs: Sequence[Tensor]) -> list[Callable[[], object]]:
    return [lambda x=x: module(x) for x in inputs]  # type: ignore[misc]


def inputs_of(K: int, sizes: Sequence[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, K, generator=rng) for size in sizes]


def test_statistics_are_those_of_all_rows() -> None:
    layer = nn.Linear(6, 3)
    inputs = inputs_of(6, [(5,), (2, 3, 4), (1, 7), ()])
    stats = collect({"a": layer}, calls_of(layer, inputs), num_rows=100)["a"]
    rows = torch.cat([x.reshape(-1, 6) for x in inputs])
    assert stats.num_rows == len(rows) == 37
    torch.testing.assert_close(stats.mean_abs, rows.abs().mean(0))
    assert torch.equal(stats.max_abs, rows.abs().amax(0))
    # Fewer rows than the sample holds: it holds them all.
    assert sorted(stats.rows.tolist()) == sorted(rows.tolist())


def test_half_precision_inputs_give_float32_statistics() -> None:
    layer = nn.Linear(4, 2).to(torch.bfloat16)
    inputs = [x.to(torch.bfloat16) for x in inputs_of(4, [(300,)] * 4)]
    stats = collect({"a": layer}, calls_of(layer, inputs), num_rows=16)["a"]
    assert {stats.mean_abs.dtype, stats.max_abs.dtype, stats.rows.dtype} == {torch.float32}
    torch.testing.assert_close(stats.mean_abs, torch.cat(inputs).float().abs().mean(0))


def test_the_sample_is_bounded_distinct_seeded_and_from_the_input() -> None:
    layer = nn.Identity()
    inputs = [torch.arange(start, start + 100).float()[:, None] for start in range(0, 2000, 100)]

    def sample(seed: int) -> list[float]:
        return collect({"a": layer}, calls_of(layer, inputs), num_rows=64, seed=seed)["a"].rows[:, 0].tolist()

    first = sample(1)
    assert len(first) == len(set(first)) == 64
    assert set(first) <= set(range(2000))
    assert sample(1) == first
    assert sample(2) != first


def test_the_sample_favours_no_part_of_the_stream() -> None:
    layer = nn.Identity()
    inputs = [torch.full((50, 1), float(i)) for i in range(10)]
    counts = torch.zeros(10)
    for seed in range(200):
        rows = collect({"a": layer}, calls_of(layer, inputs), num_rows=20, seed=seed)["a"].rows
        counts += torch.bincount(rows[:, 0].long(), minlength=10)
    # 400 expected of each call, standard deviation below 20.
    assert counts.sum() == 4000
    assert (counts - 400).abs().max() < 100


def test_modules_that_see_the_same_calls_keep_the_same_rows() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    stats = collect({"a": model[0], "b": model[1]}, calls_of(model, inputs_of(3, [(40,), (50,)])), num_rows=8)
    assert torch.equal(stats["a"].rows, stats["b"].rows)
    assert stats["b"].name == "b"


def test_progress_counts_calls() -> None:
    layer, seen = nn.Identity(), []
    collect({"a": layer}, calls_of(layer, inputs_of(2, [(3,)] * 3)), progress=seen.append)
    assert seen == [1, 2, 3]


def test_hooks_are_gone_afterwards() -> None:
    layer = nn.Linear(4, 4)
    collect({"a": layer}, calls_of(layer, inputs_of(4, [(3,)])))
    assert not layer._forward_pre_hooks

    def fail() -> None:
        raise RuntimeError("in the call")

    with pytest.raises(RuntimeError, match="in the call"):
        collect({"a": layer}, [fail])
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_names_the_layer(value: float) -> None:
    layer = nn.Linear(4, 4)
    bad = torch.zeros(5, 4)
    bad[2, 3] = value
    with pytest.raises(ValueError, match=r"layers\.7\.qkv: inputs: expected finite numbers, got 1 of 20"):
        collect({"layers.7.qkv": layer}, calls_of(layer, [bad]))
    assert not layer._forward_pre_hooks


def test_a_module_that_no_call_reaches_is_named() -> None:
    used, idle = nn.Identity(), nn.Identity()
    with pytest.raises(ValueError, match="idle: no call reached"):
        collect({"used": used, "idle": idle}, calls_of(used, inputs_of(2, [(3,)])))


def test_empty_calls_count_for_nothing() -> None:
    layer = nn.Identity()
    stats = collect({"a": layer}, calls_of(layer, [torch.zeros(0, 3), torch.ones(2, 3)]))["a"]
    assert stats.num_rows == 2


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_rows of at least 1, got 0"):
        collect({}, [], num_rows=0)
    with pytest.raises(ValueError, match="x: expected rows"):
        ChannelStats("x", torch.ones(3), torch.ones(2), torch.ones(4, 3), 4)
    with pytest.raises(ValueError, match="x: expected at least one"):
        ChannelStats("x", torch.ones(3), torch.ones(3), torch.ones(0, 3), 0)


def test_divided_is_what_the_divided_inputs_give() -> None:
    (rows,) = inputs_of(5, [(9,)])
    s = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.125])
    direct, derived = ChannelStats.of("a", rows / s), ChannelStats.of("a", rows).divided(s)
    for one, other in (
        (direct.mean_abs, derived.mean_abs),
        (direct.max_abs, derived.max_abs),
        (direct.rows, derived.rows),
    ):
        torch.testing.assert_close(one, other)
