"""Puts `accuracy` and `world`, which belong to the benchmarks, where tests can import it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import pytest
import torch


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the demo model's shape with random weights, peaked enough for pictures to matter."""
    from world.student import SHAPES, build, export
    from world.train import make_tokenizer

    folder = tmp_path_factory.mktemp("student")
    model = build(SHAPES["small"], folder, make_tokenizer(per_kind=30))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv" in name:
                parameter.mul_(3)
        model.decoder.lm_head.weight[2] *= 16  # the end token: answers of a few words
    export(model, folder)
    return folder
