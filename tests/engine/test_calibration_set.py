"""The built-in calibration samples and those of a user's own files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from sparsevila.engine.calibration_set import builtin_samples, fingerprint, read_samples
from sparsevila.errors import InvalidRequest, MediaError

ROOT = Path(__file__).resolve().parents[2]


def picture(path: Path) -> None:
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)


def test_the_built_in_set_has_pictures_and_text_and_depends_on_its_seed_alone():
    first, again, other = (builtin_samples(6, seed=s) for s in (0, 0, 1))
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    seen = [s for s in first if s.frames is not None]
    assert len(seen) == 6
    assert len(first) - len(seen) >= 20
    assert all(s.question and s.answer for s in first)
    # No two alike, and none of a single colour.
    assert len({s.frames.key for s in seen if s.frames is not None}) == 6
    assert all(s.frames.rgb.std() > 5 for s in seen if s.frames is not None)


def test_files_of_every_kind(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("word " * 1000)
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"question": "What is it?", "answer": "Noise.", "image": "a.png"}) + "\n\n"
        + json.dumps({"question": "Hello"}) + "\n"
    )  # fmt: skip
    samples = read_samples([tmp_path, ROOT / "assets" / "clips" / "world.mp4"])
    assert [(s.answer, s.frames is not None) for s in samples] == [
        ("", True), ("", False), ("", False), ("", False), ("Noise.", True), ("", False), ("", True)
    ]  # fmt: skip
    assert "".join(s.question for s in samples[1:4]) == "word " * 1000
    assert samples[-1].frames is not None
    assert samples[-1].frames.kind == "video"
    assert len(samples[-1].frames.rgb) > 1
    assert fingerprint(samples) != fingerprint(samples[:-1])


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ('{"answer": "x"}', InvalidRequest, "c.jsonl:1: expected question"),
        ('{"question": "x", "image": "a", "video": "b"}', InvalidRequest, "image or video"),
        ('{"question": "x", "picture": "a"}', InvalidRequest, "picture"),
        ('{"question": 3}', InvalidRequest, "question: expected a text, got 3"),
        ('{"question": " "}', InvalidRequest, "empty"),
        ("[1]", InvalidRequest, "expected an object"),
        ("{", InvalidRequest, "c.jsonl:1: not valid JSON"),
        ('{"question": "x", "image": "gone.png"}', MediaError, "gone.png"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, error, said):
    (tmp_path / "c.jsonl").write_text(line + "\n")
    with pytest.raises(error, match=said):
        read_samples([tmp_path / "c.jsonl"])


def test_nothing_to_read(tmp_path):
    with pytest.raises(InvalidRequest, match="nothing to read"):
        read_samples([tmp_path])
    with pytest.raises(InvalidRequest, match="does not exist"):
        read_samples([tmp_path / "gone"])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"broken\.png"):
        read_samples([tmp_path])
