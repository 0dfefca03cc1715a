"""The decoder that a whole model is compared with: its plain form against transformers', with the same weights."""

from __future__ import annotations

import sys

import pytest
import torch
from oracles import TINY  # puts benchmarks/ on the path
from peers import bf16_decoder
from peers.bf16_decoder import DecoderShape, PlainDecoder, TransformersDecoder, peer_turn
from torch import Tensor

assert TINY
SHAPE = DecoderShape(hidden=48, ffn=80, layers=2, heads=6, kv_heads=2, vocab=90)
CPU = torch.device("cpu")


def with_weights_of(theirs: TransformersDecoder) -> PlainDecoder:
    plain = PlainDecoder(SHAPE, 64, CPU, torch.float32)
    state: dict[str, Tensor] = theirs.model.state_dict()
    for i, layer in enumerate(plain.layers):
        root = f"model.layers.{i}"
        layer["qkv"] = torch.cat([state[f"{root}.self_attn.{part}_proj.weight"] for part in "qkv"])
        layer["o"] = state[f"{root}.self_attn.o_proj.weight"]
        layer["gate_up"] = torch.cat([state[f"{root}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
        layer["down"] = state[f"{root}.mlp.down_proj.weight"]
    plain.table, plain.head = state["model.embed_tokens.weight"], state["lm_head.weight"]
    return plain


@torch.inference_mode()
def test_both_say_the_same() -> None:
    torch.manual_seed(0)
    theirs = TransformersDecoder(SHAPE, 64, CPU, torch.float32)
    for name, weight in theirs.model.named_parameters():
        if weight.ndim == 2:
            weight.mul_(10 if "q_proj" in name or "k_proj" in name else 4)  # so that a wrong position shows
    plain = with_weights_of(theirs)
    for length in (20, 9):  # a second prefill begins anew
        embedded = torch.randn(length, SHAPE.hidden)
        found, want = [plain.prefill(embedded)], [theirs.prefill(embedded)]
        for _ in range(12):
            found.append(plain.step(found[-1]))
            want.append(theirs.step(want[-1]))
        assert torch.equal(torch.cat(found), torch.cat(want))
        assert len(set(torch.cat(found).tolist())) > 2


@pytest.mark.parametrize("there", [True, False])
def test_the_fallback_is_named(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not there:
        monkeypatch.setitem(sys.modules, "transformers", None)
    turn = peer_turn(SHAPE, 30, 3, CPU, torch.float32)
    assert turn.name == (bf16_decoder.TransformersDecoder if there else PlainDecoder).name
    assert turn.prefill_s > 0
    assert turn.token_s > 0
