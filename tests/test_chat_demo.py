"""The chat program on the real engine, most of it with the bundled demo model: few runs, each of a few seconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import Oracle
from PIL import Image
from pty_terminal import CTRL_C, TIMEOUT_S, Terminal
from safetensors.torch import load_file, save_file

from sparsevila.engine import hub

CHAT = Path(__file__).resolve().parent.parent / "chat.py"
DEMO = CHAT.parent / "assets" / "demo"
END_TOKEN = 2  # of the tiny models


def _chat(folder: Path, *argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SPARSEVILA_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / "cache")}
    command = [sys.executable, str(CHAT), *argv]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, cwd=folder, env=env, timeout=4 * TIMEOUT_S
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a picture and two clips."""
    import av

    home = tmp_path_factory.mktemp("chat")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (24, 6, 8, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)  # (T, 96, 128, 3)
    Image.fromarray(frames[0]).save(home / "a.png")
    with av.open(str(home / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8, width=128, height=96, pix_fmt="yuv420p")
        for rgb in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb)))
        container.mux(stream.encode())
    (home / "bad.mp4").write_bytes((home / "clip.mp4").read_bytes()[:200])
    return home


@pytest.fixture
def open_terminal(folder: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def call(*argv: str, **kwargs: Any) -> Terminal:
        opened.append(Terminal(CHAT, folder, *argv, **kwargs))
        return opened[-1]

    yield call
    for terminal in opened:
        terminal.kill()


def test_one_question_about_a_clip(folder: Path) -> None:
    done = _chat(folder, "--video", "clip.mp4", "--image", "a.png", "--prompt", "What happens?", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    stages = [line["stage"] for line in lines if line["type"] == "stage"]
    assert list(dict.fromkeys(stages)) == ["load", "decode", "encode", "prefill"]
    result = lines[-1]
    assert result["type"] == "result"
    assert result["text"] == "".join(line["text"] for line in lines if line["type"] == "chunk")
    assert result["text"]
    stats = result["stats"]
    assert 0 < stats["visual_tokens_active"] < stats["visual_tokens_kept"] < stats["visual_tokens_total"]
    again = _chat(folder, "--video", "clip.mp4", "--image", "a.png", stdin="What happens?\n")
    assert again.returncode == 0
    assert again.stdout == result["text"] + "\n"
    note = (DEMO / "NOTE.md").read_text(encoding="utf-8").split("\n\n")[1]
    assert f"\n{' '.join(note.split())}\n" in again.stderr


def test_a_second_question_reads_the_same_cache(folder: Path) -> None:
    prompts = ("--prompt", "what happens in the clip?", "--prompt", "what appears first?")
    done = _chat(folder, "--video", "clip.mp4", *prompts, "--stats", "--plain")
    assert done.returncode == 0
    first, second = done.stderr.split("> what appears first?\n")
    assert (first.count("encode "), second.count("encode ")) == (1, 0)
    assert (first.count("cache reused"), second.count("cache reused")) == (0, 1)


def test_errors_have_their_exit_codes(folder: Path) -> None:
    done = _chat(folder, "--video", "bad.mp4", "--prompt", "x", "-q")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert done.stderr.startswith("error: bad.mp4")


def test_a_conversation(open_terminal: Any, folder: Path) -> None:
    terminal = open_terminal("--video", "clip.mp4", "--max-new-tokens", "400", stdout=folder / "out")
    terminal.expect("[1] clip.mp4: video 128x96, 3.0 s")
    terminal.prompt()
    terminal.enter("What happens?")
    terminal.expect("ttft")
    terminal.prompt()
    first = (folder / "out").read_text()
    terminal.enter("/video bad.mp4")
    terminal.expect("error:")
    terminal.prompt()
    terminal.enter("/retry")
    terminal.expect("ttft")
    terminal.prompt()
    assert (folder / "out").read_text() == first * 2  # greedy, and the session as it was before the first time
    terminal.enter("/sparsity 0 0")
    terminal.expect("0% pruned")
    terminal.prompt()
    terminal.enter("And then?")
    terminal.expect("(-0%)")
    terminal.prompt()
    terminal.enter("/exit")
    assert terminal.code() == 0


@pytest.fixture(scope="module")
def endless(oracles: dict[str, Oracle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends an answer by itself: the end token's logit is 0, which is never the largest."""
    folder = tmp_path_factory.mktemp("endless")
    shutil.copytree(oracles["vicuna"].folder, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    [head] = [name for name in tensors if name.endswith("lm_head.weight")]
    tensors[head][END_TOKEN] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_ctrl_c_in_an_answer_and_the_next_one(open_terminal: Any, folder: Path, endless: Path) -> None:
    flags = ("--model", str(endless), "--image", "a.png", "--max-new-tokens", "3000")
    terminal = open_terminal(*flags, stdout=folder / "endless")
    terminal.prompt()
    terminal.enter("Tell me more.")
    terminal.expect("prefill ")
    while (folder / "endless").stat().st_size < 20:
        pass
    terminal.send(CTRL_C)
    terminal.expect("[stopped]")
    terminal.prompt()
    terminal.enter("/undo")
    terminal.expect("no turn")
    terminal.prompt()
    terminal.enter("/set max-new-tokens 20")
    terminal.prompt()
    terminal.enter("Tell me more.")
    terminal.expect("20 tok")
    terminal.prompt()
    terminal.enter("/exit")
    assert terminal.code() == 0


def test_weights_that_are_not_here(open_terminal: Any, tmp_path: Path) -> None:
    for flags, code in ((), 3), (("--offline",), 3):
        environ = {"HF_HUB_CACHE": str(tmp_path / "cache")}
        terminal = open_terminal("--model", "llava-next-7b", *flags, **environ)
        if not flags:
            terminal.expect("[y/N] ")
            terminal.enter("n")
        assert terminal.code() == code
        assert "no weights of llava-next-7b here" in terminal.shown
        assert "3. download it: python chat.py models --get llava-next-7b" in terminal.shown
        asked = f"Download {hub.ALIASES['llava-next-7b'].repository} (14.1 GB)?"
        assert (asked in terminal.shown) == (not flags)


def test_models_and_doctor(folder: Path) -> None:
    listing = _chat(folder, "models")
    assert listing.returncode == 0
    rows = {line.split()[0]: line for line in listing.stdout.splitlines()}
    assert rows.keys() == hub.ALIASES.keys()
    assert rows["demo"].endswith("demo")
    assert rows["llava-next-7b"].endswith("not here")
    assert all(hub.ALIASES[alias].licence in row for alias, row in rows.items())
    doctor = _chat(folder, "doctor")
    assert doctor.returncode == 0
    for word in ("sparsevila", "torch cpu", "codecs", "h264", "memory"):
        assert word in doctor.stdout
