"""Frequencies of every scaling type against transformers' own functions."""

from __future__ import annotations

import pytest
import torch

from sparsevila import CorruptCheckpoint, UnsupportedModel
from sparsevila.models.checkpoint import ConfigReader
from sparsevila.models.decoder import DecoderConfig
from sparsevila.models.rotary import RopeConfig

CASES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 1024},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn sharp": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "beta_fast": 16.0,
                   "beta_slow": 2.0, "attention_factor": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling", "rope_scaling with type"])
def test_equal_to_transformers(name, style):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values, theta, dim = CASES[name], 50000.0, 64
    config = LlamaConfig(
        hidden_size=dim * 2, num_attention_heads=2, max_position_embeddings=2048,
        rope_parameters={"rope_theta": theta, **values},
    )  # fmt: skip
    if name == "default":
        want, factor = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim), 1.0
    else:
        want, factor = ROPE_INIT_FUNCTIONS[values["rope_type"]](config, torch.device("cpu"))
    if style == "rope_parameters":
        text = {"rope_parameters": {"rope_theta": theta, **values}}
    else:
        scaling = dict(values)
        if style.endswith("type"):
            scaling["type"] = scaling.pop("rope_type")
        text = {"rope_theta": theta, "rope_scaling": scaling}
    rope = RopeConfig.from_hf(ConfigReader(text), default_theta=1e4, max_positions=2048)
    torch.testing.assert_close(rope.frequencies(dim), want, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor)


def test_null_scaling_is_none():
    rope = RopeConfig.from_hf(ConfigReader({"rope_scaling": None}), default_theta=1e4, max_positions=2048)
    assert rope == RopeConfig(theta=1e4)


@pytest.mark.parametrize("scaling", [{"type": "longrope"}, {"type": "mrope", "mrope_section": [2, 3, 3]}])
def test_other_types_are_refused(scaling):
    with pytest.raises(UnsupportedModel):
        RopeConfig.from_hf(ConfigReader({"rope_scaling": scaling}), default_theta=1e4, max_positions=2048)


def test_missing_factor_names_file_and_key():
    with pytest.raises(CorruptCheckpoint, match=r"config\.json: rope_scaling\.factor"):
        RopeConfig.from_hf(ConfigReader({"rope_scaling": {"type": "linear"}}), default_theta=1e4, max_positions=2048)


@pytest.mark.parametrize(
    ("text", "context"),
    [
        ({"model_type": "llama", "max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.5}}, 10240),
        ({"model_type": "mistral"}, 4096),  # the class's sliding window
        ({"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768}, 32768),
        ({"model_type": "mistral", "sliding_window": 1000}, 1000),
        ({"model_type": "qwen2", "sliding_window": 1000, "max_position_embeddings": 32768}, 32768),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 2048),
    ],
)  # fmt: skip
def test_context(text, context):
    assert DecoderConfig.from_hf(ConfigReader(text)).max_context == context


def test_class_defaults_fill_a_partial_config():
    mistral = DecoderConfig.from_hf(ConfigReader({"model_type": "mistral"}))
    assert (mistral.num_kv_heads, mistral.intermediate_size, mistral.rms_norm_eps) == (8, 14336, 1e-6)
    llama = DecoderConfig.from_hf(ConfigReader({"model_type": "llama", "num_key_value_heads": None}))
    assert (llama.num_kv_heads, llama.intermediate_size, llama.head_dim) == (32, 11008, 128)
