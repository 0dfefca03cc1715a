"""Counted cost against torch's own counter, dense and pruned, and against counts by hand."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from accuracy.answering import Reply, reply_of
from accuracy.cost import (
    Cost,
    Manner,
    ModelSizes,
    Work,
    conversation_cost,
    decoding,
    encoding,
    own_steps,
    prefilling,
    projecting,
    retrieving,
    turn_cost,
)
from accuracy.questions import draw
from torch.utils.flop_counter import FlopCounterMode
from world.splits import make

from sparsevila import Engine, Image, SamplingParams, Sparsity

QUESTIONS = ("what colour is the triangle?", "how many shapes are there?")


@pytest.fixture(scope="module")
def engine(student):
    with Engine.load(student, device="cpu", dtype="float32") as engine:
        engine.tokenizer.eos_ids = ()  # every answer has the same length
        yield engine


@pytest.fixture(scope="module")
def picture():
    item = next(item for item in draw(100) if item.layout.name == "scene 192x128")
    return Image(make("scene", item.seed, **item.layout.options).rgb[0])


@pytest.fixture(scope="module")
def sizes(engine) -> ModelSizes:
    return ModelSizes.of(engine.model.config, 4)


def attended(q, k, v, dropout=0.0, causal=False, **_) -> int:
    """Operations of one call of torch's attention on a CPU; of a causal one, those that are needed."""
    batch, heads, rows, width = q
    pairs = rows * (rows + 1) // 2 if causal else rows * k[2]
    return 2 * 2 * batch * heads * pairs * width


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attended}


def counted(engine, picture, sparsity: Sparsity, tokens: int) -> tuple[list[int], list[Reply]]:
    """Operations as torch counts them, and what each of two turns says of itself."""
    engine.forget_features()
    flop, replies = [], []
    with closing(engine.session(media=[picture], sparsity=sparsity)) as session:
        for question in QUESTIONS:
            with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
                result = session.ask(question, params=SamplingParams(max_new_tokens=tokens), remember=False)
            flop.append(counter.get_total_flops())
            replies.append(reply_of(result))
    return flop, replies


def tiles_of(engine, picture) -> int:
    return 1 + 3 * 2  # 192 x 128 in tiles of 64, and the base view


class TestAgainstTorch:
    """torch counts what is really multiplied, so what a method saves is really not computed."""

    @pytest.fixture(autouse=True)
    def by_torch(self, limit_cpu):
        """What machine code multiplies, torch does not see."""
        limit_cpu("torch")

    @pytest.mark.parametrize(
        "sparsity",
        [Sparsity(method="dense"), Sparsity(0.6, 0.0), Sparsity(0.6, 0.0, "visionzip"), Sparsity(0.6, 0.0, "fastv")],
        ids=lambda s: s.method,
    )
    def test_every_part_but_ranking(self, engine, sizes, picture, sparsity):
        flop, replies = counted(engine, picture, sparsity, tokens=5)
        tiles = tiles_of(engine, picture)
        assert [own_steps(reply) for reply in replies] == [4, 4]
        turns = [turn_cost(sizes, reply, 4, Manner(inside=sparsity.method == "fastv")) for reply in replies]
        ours = [2 * (turns[0].total.macs + encoding(sizes, tiles).macs), 2 * turns[1].total.macs]
        if sparsity.method in ("dense", "sparsevila"):
            assert flop == ours
        else:  # rating rows, or keys compared: less than a hundredth
            assert ours[0] <= flop[0] < 1.01 * ours[0]
            assert flop[1] == ours[1]

    def test_retrieval(self, engine, sizes, picture):
        flop, replies = counted(engine, picture, Sparsity(0.5, 0.75), tokens=3)
        ours = [turn_cost(sizes, reply, own_steps(reply), Manner(retrieves=True)) for reply in replies]
        assert flop[1] == 2 * ours[1].total.macs
        without = turn_cost(sizes, replies[1], own_steps(replies[1]), Manner())
        assert ours[1].retrieval.macs == ours[1].total.macs - without.total.macs > 0

    def test_fewer_tokens_cost_less_where_they_are_saved(self, engine, sizes, picture):
        def cost(sparsity: Sparsity) -> Cost:
            replies = counted(engine, picture, sparsity, tokens=3)[1]
            return conversation_cost(sizes, 7, replies, [2, 2], Manner(retrieves=sparsity.decode > 0))

        dense, pruned, retrieved = cost(Sparsity()), cost(Sparsity(0.6)), cost(Sparsity(0, 0.75))
        assert pruned.encoder == retrieved.encoder == dense.encoder
        assert pruned.prefill.macs < 0.5 * dense.prefill.macs
        assert retrieved.prefill == dense.prefill
        assert retrieved.decode.bytes < dense.decode.bytes
        assert retrieved.retrieval.bytes > dense.retrieval.bytes == 0


class TestByHand:
    # 2 layers of width 6, queries 8, keys 4, FFN 10, vocabulary 7; a tower of 3 layers of width 5 over 4 patches
    SIZES = ModelSizes(4, 2, 5, 9, 3, 6, 10, 2, 8, 4, 7, element_bytes=2)
    LAYER = 6 * 8 + 6 * 4 + 6 * 4 + 8 * 6 + 3 * 6 * 10

    def test_weights(self):
        assert self.SIZES.layer_weights == self.LAYER
        assert self.SIZES.entry_bytes == 2 * 4 * 2

    def test_encoder_and_projector(self):
        patch, layer = 3 * 2 * 2 * 5, 4 * 25 + 2 * 5 * 9
        each = 4 * patch + 3 * (5 * layer + 2 * 25 * 5) + 5 * 5
        assert encoding(self.SIZES, 3) == Work(3 * each, 2 * (patch + 3 * layer))
        assert projecting(self.SIZES, 11) == Work(11 * (5 * 6 + 36), 2 * (5 * 6 + 36))

    def test_a_prompt_that_is_pruned_behind_the_first_layer(self):
        # 9 tokens in the first layer, 5 in the second; 4 entries were there before
        pairs = [9 * 4 + 45, 5 * 4 + 15]
        work = prefilling(self.SIZES, fmean([9, 5]), fmean(pairs))
        assert work.macs == 9 * self.LAYER + 5 * self.LAYER + 2 * 8 * sum(pairs) + 6 * 7
        assert work.bytes == 2 * (2 * self.LAYER + 42) + 14 * 16

    def test_steps_read_one_entry_more_each(self):
        # 10 and 6 entries in the two layers, then 3 steps
        entries = (11 + 7) + (12 + 8) + (13 + 9)
        work = decoding(self.SIZES, 3, 16 * 16)
        assert work.macs == 3 * (2 * self.LAYER + 42) + 2 * 8 * entries
        assert work.bytes == 3 * 2 * (2 * self.LAYER + 42) + 16 * entries
        assert decoding(self.SIZES, 0, 99) == Work()

    def test_ranking(self):
        assert retrieving(self.SIZES, 3, 20, 5).macs == 2 * 3 * 20 * 8
        assert retrieving(self.SIZES, 3, 20, 5).bytes == 2 * (20 * 4 * 2 + 2 * 5 * 16)

    def test_a_conversation_encodes_once(self):
        first = Reply("", False, 3, 30, 0, 40, 16, 4.0, 0, 0, 0, 0, 0, 2, 30.0, 465.0, 100)
        later = replace(first, prompt_tokens=7, cached_tokens=30, layer_tokens=7.0, layer_pairs=200.0)
        whole = conversation_cost(self.SIZES, 3, [first, later], [3, 3], Manner(retrieves=True))
        assert whole.encoder == encoding(self.SIZES, 3)
        assert whole.projector == projecting(self.SIZES, 16 + 2)
        assert whole.retrieval == retrieving(self.SIZES, 30 - 18, 16, 4) + retrieving(self.SIZES, 7, 16, 4)
        inside = conversation_cost(self.SIZES, 3, [first, later], [3, 3], Manner(inside=True))
        assert inside.projector == projecting(self.SIZES, 40 + 2)  # all that the encoder made
        assert own_steps(first) == 3
        assert own_steps(replace(first, was_cut=True)) == 2
        made = whole.to_json(conversations=2)
        assert made["gflop"]["total"] == pytest.approx(1e-9 * whole.total.macs)
        assert made["gflop"]["total"] == pytest.approx(sum(v for k, v in made["gflop"].items() if k != "total"))
