"""The choice of tokens, against the logits processors of transformers."""

from __future__ import annotations

import math

import pytest
import torch

from sparsevila import InvalidRequest, SamplingParams, SparseVILAError
from sparsevila.engine.sampler import Sampler

SIZE = 301


def random_logits(seed: int, *, size: int = SIZE, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def oracle(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """(V,) float64: the probabilities that transformers would sample from."""
    import transformers as hf

    ids, scores = torch.zeros(1, 1, dtype=torch.long), logits[None].double()
    scores = hf.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = hf.TopPLogitsWarper(params.top_p)(ids, scores)
    return scores[0].softmax(-1)


def draws(sampler: Sampler, logits: torch.Tensor, count: int) -> list[int]:
    return [sampler(logits) for _ in range(count)]


class TestGreedy:
    def test_takes_the_largest_and_the_first_of_equals(self):
        logits = torch.tensor([0.5, 2.0, -1.0, 2.0])
        assert draws(Sampler(SamplingParams(seed=5)), logits, 3) == [1, 1, 1]

    def test_ignores_the_other_parameters(self):
        logits = random_logits(0)
        assert Sampler(SamplingParams(top_k=5, top_p=0.1))(logits) == int(logits.argmax())

    @pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}])
    def test_what_leaves_one_token_is_greedy(self, params):
        for seed in range(20):
            logits = random_logits(seed)
            sampler = Sampler(SamplingParams(**{"temperature": 1.0, **params}))
            assert draws(sampler, logits, 5) == [int(logits.argmax())] * 5

    @pytest.mark.parametrize("temperature", [1e-30, 1e-45, 5e-324])
    def test_the_smallest_temperatures_are_numbers_too(self, temperature):
        logits = random_logits(1)
        assert Sampler(SamplingParams(temperature=temperature))(logits) == int(logits.argmax())


class TestAgainstTransformers:
    @pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
    @pytest.mark.parametrize("top_k", [0, 1, 2, 40, SIZE - 1, SIZE, 5000])
    @pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.03])
    def test_kept_sets_and_probabilities(self, temperature, top_k, top_p):
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        sampler = Sampler(params)
        for seed in range(10):
            logits = random_logits(seed)
            want, got = oracle(logits, params), sampler.probabilities(logits)
            assert torch.equal(got > 0, want > 0)
            torch.testing.assert_close(got / got.sum(), want, rtol=1e-9, atol=0)

    def test_equal_logits_at_the_edge_of_top_k_stay_together(self):
        logits = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 0.0])
        params = SamplingParams(temperature=1.0, top_k=3)
        got = Sampler(params).probabilities(logits)
        assert (got > 0).tolist() == [True, True, True, True, True, False] == (oracle(logits, params) > 0).tolist()

    def test_top_p_is_the_smallest_set_that_holds_it(self):
        logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
        for top_p, kept in ((0.39, {1}), (0.41, {1, 3}), (0.71, {1, 2, 3}), (0.95, {0, 1, 2, 3})):
            p = Sampler(SamplingParams(temperature=1.0, top_p=top_p)).probabilities(logits)
            assert set(torch.nonzero(p)[:, 0].tolist()) == kept

    def test_top_p_acts_on_what_top_k_left(self):
        logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        p = Sampler(SamplingParams(temperature=1.0, top_k=2, top_p=0.5)).probabilities(logits)
        assert (p > 0).tolist() == [True, False, False, False]  # 0.4 of 0.7 holds the half; of 1.0 it would not

    @pytest.mark.parametrize("params", [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.7}])
    def test_draws_follow_the_probabilities(self, params):
        params = SamplingParams(temperature=1.3, seed=2, **params)
        logits = random_logits(3, size=9, spread=1.0)
        count = 4000
        seen = torch.bincount(torch.tensor(draws(Sampler(params), logits, count)), minlength=9) / count
        want = oracle(logits, params)
        assert (seen[want == 0] == 0).all()
        error = (seen - want).abs()
        # Five standard deviations; a sampler that ignored one parameter is off by far more.
        assert (error <= 5 * (want * (1 - want) / count).sqrt()).all()


class TestGenerator:
    PARAMS = SamplingParams(temperature=1.0, seed=11)

    def test_one_seed_one_sequence(self):
        logits = random_logits(4)
        a, b = (draws(Sampler(self.PARAMS), logits, 40) for _ in range(2))
        assert a == b
        assert len(set(a)) > 5
        assert draws(Sampler(SamplingParams(temperature=1.0, seed=12)), logits, 40) != a

    def test_the_global_generator_is_neither_read_nor_moved(self):
        logits = random_logits(5)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        a = draws(Sampler(self.PARAMS), logits, 20)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert draws(Sampler(self.PARAMS), logits, 20) == a

    def test_interleaved_samplers_do_not_meet(self):
        logits = random_logits(6)
        alone = draws(Sampler(self.PARAMS), logits, 10)
        a, b = Sampler(self.PARAMS), Sampler(self.PARAMS)
        both = [(a(logits), b(logits)) for _ in range(10)]
        assert [x for x, _ in both] == [y for _, y in both] == alone

    def test_logits_are_left_as_they_were(self):
        logits = random_logits(7)
        kept = logits.clone()
        Sampler(SamplingParams(temperature=0.5, top_k=3, top_p=0.5))(logits)
        assert torch.equal(logits, kept)

    @pytest.mark.parametrize("seed", [0, 2**63 - 1])
    def test_every_seed_that_is_accepted_works(self, seed):
        Sampler(SamplingParams(temperature=1.0, seed=seed))(random_logits(8))

    @pytest.mark.parametrize("seed", [-1, 2**63, 2**70, 1.5, True, "1"])
    def test_other_seeds_are_refused(self, seed):
        with pytest.raises(InvalidRequest, match="seed"):
            SamplingParams(seed=seed)


class TestBadLogits:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_one_that_is_no_number(self, value, temperature):
        logits = random_logits(9)
        logits[17] = value
        with pytest.raises(SparseVILAError, match="not finite"):
            Sampler(SamplingParams(temperature=temperature))(logits)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_nothing_but_minus_infinity(self, temperature):
        with pytest.raises(SparseVILAError, match="not finite"):
            Sampler(SamplingParams(temperature=temperature))(torch.full((5,), -math.inf))

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_minus_infinity_means_never(self, temperature):
        logits = torch.full((5,), -math.inf)
        logits[3] = -1e30
        assert draws(Sampler(SamplingParams(temperature=temperature, top_p=0.9)), logits, 5) == [3] * 5
