"""Every architecture of the registry has a tiny checkpoint, and talks about the bundled clip from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES, TinyFolders

from sparsevila import Engine, InvalidRequest
from sparsevila.models.registry import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]


def test_every_architecture_has_a_tiny_checkpoint() -> None:
    assert {family.architecture for family in FAMILIES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ["video", "qwen2", "qwen2.5", "onevision", "nvila", "longvila", "radio"])
def test_the_bundled_clip_is_chatted_about(name: str, tiny_folders: TinyFolders) -> None:
    command = [
        sys.executable, "chat.py", "--model", str(tiny_folders[name]), "--video", "assets/clips/world.mp4",
        "--frames", "4", "--prompt", "What is it?", "--prompt", "And then?", "--max-new-tokens", "5", "--threads", "1",
        "--stats",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100, check=False)
    told = done.stderr.decode()
    assert done.returncode == 0, told
    assert done.stdout
    assert FAMILIES[name].architecture in told
    assert told.count("ttft ") == 2
    assert told.count("cache reused") == 1  # the second turn encodes nothing
    assert " kept (-" in told
    assert " active (-" in told


def test_survivors_are_placed_as_asked_where_there_is_a_choice(tiny_folders: TinyFolders) -> None:
    with Engine.load(tiny_folders["qwen2.5"], device="cpu", positions="original") as engine:
        assert vars(engine.model)["positions"] == "original"
    with pytest.raises(InvalidRequest, match="regrid, original, contiguous"):
        Engine.load(tiny_folders["qwen2.5"], device="cpu", positions="elsewhere")
    with pytest.raises(InvalidRequest, match="has one axis"):
        Engine.load(tiny_folders["nvila"], device="cpu", positions="regrid")
