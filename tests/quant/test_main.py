"""`python -m sparsevila.quant`: flags, messages, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import oracles  # noqa: F401 (puts benchmarks on the path)
import pytest
from random_checkpoint import preset, write_random_checkpoint

from sparsevila import Engine
from sparsevila.quant.__main__ import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_random_checkpoint(folder, preset("tiny"))
    return folder


def test_a_quantised_model_answers_and_is_not_written_over(model, tmp_path, capsys):
    command = [str(model), "--out", str(tmp_path / "q"), "--group", "32", "--samples", "6"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for said in ("6 calibration samples", "of memory", f"written: {tmp_path / 'q'}", "rank correlation"):
        assert said in err
    with Engine.load(tmp_path / "q", dtype="float32") as engine:
        assert engine.info.scheme == "W8A8 / W4A16 / float32"
        assert engine.session().ask("Hello").finish_reason in ("stop", "length")
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err


def test_rounding_alone_needs_no_samples(model, tmp_path, capsys):
    flags = ["--round", "--vision", "none", "--lm-head", "int8", "--group", "32", "-q"]
    assert main([str(model), "--out", str(tmp_path / "q"), *flags]) == 0
    assert capsys.readouterr() == ("", "")
    record = json.loads((tmp_path / "q" / "quantization.json").read_text())
    assert record["layers"]["language_model.lm_head"]["scheme"] == "W8A8"
    assert {layer["scheme"] for name, layer in record["layers"].items() if "vision" in name} == set()


def test_the_awq_format_leaves_the_tower_alone(model, tmp_path, capsys):
    assert main([str(model), "--out", str(tmp_path / "q"), "--format", "awq", "--round", "--group", "32"]) == 0
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "awq"
    assert config["group_size"] == 32


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--group", "128"], 2, "does not divide the 96 inputs"),
        (["--group", "32", "--max-memory", "10MB"], 5, "quantising this model"),
        (["--group", "32", "--calib", "nowhere"], 2, "nowhere does not exist"),
        (["--group", "32", "--samples", "0"], 2, "at least 1"),
        (["--group", "32", "--format", "awq", "--vision", "w8a8"], 2, "awq"),
        (["--llm", "none", "--vision", "none"], 2, "none"),
    ],
)
def test_what_cannot_be_done_is_one_line(model, tmp_path, capsys, flags, code, said):
    assert main([str(model), "--out", str(tmp_path / "q"), *flags]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "q").exists()


def test_a_model_that_is_not_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSEVILA_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["llava-next-7b", "--out", str(tmp_path / "q")]) == 3
    assert "models --get llava-next-7b" in capsys.readouterr().err


def test_it_is_a_module():
    command = [sys.executable, "-m", "sparsevila.quant", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--lm-head" in done.stdout
