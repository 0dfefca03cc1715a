"""Which layers are quantised follows from tensors, and a model is changed accordingly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsevila import CorruptCheckpoint, InvalidRequest, UnsupportedModel
from sparsevila.kernels.w8a8 import MAX_IN_FEATURES
from sparsevila.quant.linear import Linear, W4A8Linear, W4A16Linear, W8A8Linear
from sparsevila.quant.plan import QuantPlan, matrices_of, scheme_name
from sparsevila.quant.quantization_config import Scheme, SchemeGroup, awq_config, compressed_config

INT8, INT4, INT4_FINE = Scheme(8, None, True), Scheme(4, 64, True), Scheme(4, 32, True)
CONFIG = compressed_config((SchemeGroup(("re:.*fc$",), INT8), SchemeGroup(("re:.*_proj$",), INT4)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Linear(48, 40, bias=True)
        self.qkv_proj = Linear(128, {"q_proj": 64, "k_proj": 32, "v_proj": 32}, bias=True)
        self.head = Linear(128, 80)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.norm = nn.LayerNorm(8)


def model() -> Model:
    with torch.device("meta"):
        return Model()


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def int8(name: str, N: int, K: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": meta(N, K, dtype=torch.int8), f"{name}.weight_scale": meta(N, 1)}


def int4(name: str, N: int, K: int, g: int = 64) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight_packed": meta(N, K // 8, dtype=torch.int32),
        f"{name}.weight_scale": meta(N, K // g),
        f"{name}.weight_shape": meta(2, dtype=torch.int64),
    }


def headers() -> dict[str, torch.Tensor]:
    found = {"a.block.fc.bias": meta(40), "a.block.head.weight": meta(80, 128), "a.norm.weight": meta(8)}
    found |= int8("a.block.fc", 40, 48)
    for part, rows in (("q", 64), ("k", 32), ("v", 32)):
        found |= int4(f"a.block.{part}_proj", rows, 128) | {f"a.block.{part}_proj.bias": meta(rows)}
    return found


def rename(name: str) -> str | None:
    return None if name.startswith("unused.") else name.removeprefix("a.")


def test_layers_become_what_their_tensors_are():
    changed = model()
    plan = QuantPlan.of(changed, headers(), rename, CONFIG)
    assert sorted(plan.matrices) == ["block.fc", "block.k_proj", "block.q_proj", "block.v_proj"]
    assert plan.matrices["block.fc"].suffixes == {"weight", "weight_scale"}
    plan.apply(changed)
    assert isinstance(changed.block.fc, W8A8Linear)
    assert isinstance(changed.block.qkv_proj, W4A16Linear)
    assert isinstance(changed.block.head, Linear)
    assert changed.block.qkv_proj.group_size == 64
    assert changed.block.qkv_proj.waits_for() == {"q_proj": (64, 128), "k_proj": (32, 128), "v_proj": (32, 128)}
    assert changed.block.qkv_proj.bias.shape == (128,)
    assert changed.block.fc.bias.shape == (40,)
    assert scheme_name(changed, torch.bfloat16) == "W8A8 / W4A16 / bfloat16"
    assert [name for name, *_ in matrices_of(changed)] == [name for name, *_ in matrices_of(model())]


def test_activations_of_four_bit_layers_in_eight_bits():
    changed = model()
    QuantPlan.of(changed, headers(), rename, CONFIG).apply(changed, w4a8=True)
    assert isinstance(changed.block.fc, W8A8Linear)
    assert isinstance(changed.block.qkv_proj, W4A8Linear)
    assert changed.block.qkv_proj.bias.shape == (128,)
    assert scheme_name(changed, torch.bfloat16) == "W8A8 / W4A8 / bfloat16"


def test_eight_bit_activations_need_four_bit_layers():
    found = {name: tensor for name, tensor in headers().items() if "_proj" not in name}
    found |= {f"a.block.{part}_proj.weight": meta(rows, 128) for part, rows in (("q", 64), ("k", 32), ("v", 32))}
    plan = QuantPlan.of(model(), found, rename, CONFIG)
    with pytest.raises(InvalidRequest, match="w4a8: expected a model with 4-bit layers"):
        plan.apply(model(), w4a8=True)


def test_a_dense_checkpoint_changes_nothing():
    dense = {
        name: tensor for name, tensor in headers().items() if tensor.dtype == torch.float16 and "scale" not in name
    }
    for config in (None, CONFIG):
        same = model()
        plan = QuantPlan.of(same, dense, rename, config)
        plan.apply(same)
        assert not plan.matrices
        assert scheme_name(same, torch.float32) == "float32"


def test_a_layer_that_is_not_needed_is_not_looked_at():
    assert not QuantPlan.of(model(), int8("unused.layer", 3, 5), rename, None).matrices


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        ({}, None, r"a\.block\.fc.*no quantization_config"),
        ({}, awq_config(64), r"a\.block\.fc.*quantization_config says awq"),
        (int8("a.block.other", 8, 8), CONFIG, r"a\.block\.other.*no such linear layer"),
        (int8("a.norm", 8, 8), CONFIG, r"a\.norm.*no such linear layer"),
        (int8("block.fc", 40, 48), CONFIG, r"block\.fc: it came twice, also as a\.block\.fc"),
        (int8("a.block.fc", 40, 47), CONFIG, r"a\.block\.fc\.weight: expected shape \(40, 48\)"),
        (int4("a.block.fc", 40, 48), CONFIG, "two formats"),
    ],
)
def test_refused(change, config, said):
    with pytest.raises(CorruptCheckpoint, match=said):
        QuantPlan.of(model(), headers() | change, rename, config)


def test_a_sum_that_could_leave_int32():
    with torch.device("meta"):
        wide = nn.ModuleDict({"fc": Linear(MAX_IN_FEATURES + 1, 2)})
    with pytest.raises(UnsupportedModel, match=f"fc: expected at most {MAX_IN_FEATURES} inputs"):
        QuantPlan.of(wide, int8("fc", 2, MAX_IN_FEATURES + 1), rename, CONFIG)


class TestFusedLayersAreOfOneKind:
    def test_a_dense_part(self):
        found = {k: v for k, v in headers().items() if "k_proj" not in k} | {"a.block.k_proj.weight": meta(32, 128)}
        changed = model()
        plan = QuantPlan.of(changed, found, rename, CONFIG)
        with pytest.raises(CorruptCheckpoint, match=r"q_proj is W4A16 in groups of 64, block\.k_proj is dense"):
            plan.apply(changed)

    def test_another_group_size(self):
        found = {k: v for k, v in headers().items() if "k_proj" not in k} | int4("a.block.k_proj", 32, 128, 32)
        groups = (SchemeGroup(("re:.*fc$",), INT8), SchemeGroup(("re:.*k_proj$",), INT4_FINE))
        config = compressed_config((*groups, SchemeGroup(("re:.*[qv]_proj$",), INT4)))
        changed = model()
        plan = QuantPlan.of(changed, found, rename, config)
        with pytest.raises(
            CorruptCheckpoint, match=r"k_proj is W4A16 in groups of 32, .*v_proj is W4A16 in groups of 64"
        ):
            plan.apply(changed)

    def test_another_scheme(self):
        found = {k: v for k, v in headers().items() if "k_proj" not in k} | int8("a.block.k_proj", 32, 128)
        changed = model()
        plan = QuantPlan.of(changed, found, rename, CONFIG)
        with pytest.raises(CorruptCheckpoint, match="k_proj is W8A8"):
            plan.apply(changed)
