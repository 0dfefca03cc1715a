"""What a typed line means: paths, quotes, commands, options."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparsevila.engine import commands
from sparsevila.engine.commands import Ask, Attach, Run, Settings, parse_line
from sparsevila.engine.config import Image, SamplingParams, Video
from sparsevila.errors import InvalidRequest

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
MP4 = b"\x00\x00\x00\x20ftypisom" + bytes(8)
NONE = Settings()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, data in {"a.png": PNG, "my clip.mp4": MP4, "what": PNG, "it's.png": PNG, "b.webp": MP4}.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("12.5", 12.5), ("1:30", 90.0), ("1:02:03.5", 3723.5), ("90", 90.0), ("100:00", 6000.0)],
)
def test_times(text: str, seconds: float) -> None:
    assert commands.parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1:60", "1:2:3:4", "-1:30", "1:-5", "nan", "inf", "1.5:30", ":30"])
def test_times_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a time"):
        commands.parse_time(text)


@pytest.mark.parametrize("text", ["-1", "1.0", "0.96", "nan", "inf", "x", ""])
def test_sparsity_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        commands.parse_sparsity(text)


def test_every_field_a_person_may_set_has_an_option_with_its_default() -> None:
    fields = {f.name for cls in (SamplingParams, Video) for f in dataclasses.fields(cls)} - {"source"}
    assert fields - {row.key for row in commands.OPTIONS} == set()
    for row in commands.OPTIONS:
        if row.owner == "params":
            assert commands.default_of(row) == getattr(SamplingParams(), row.key)


def test_flags_and_set_give_the_same_settings() -> None:
    typed = {
        "frames": "8",
        "start": "1:00",
        "end": "70",
        "max_new_tokens": "9",
        "temperature": "0.5",
        "top_p": "0.9",
        "top_k": "4",
        "seed": "3",
        "stop": "END",
        "prefill_sparsity": "0.5",
        "decode_sparsity": "auto",
        "method": "fastv",
        "switch": "sinks=2,rerotate=on",
    }
    parser = argparse.ArgumentParser()
    commands.add_options(parser, ("params", "video", "sparsity"))
    argv = [word for key, text in typed.items() for word in (commands.option(key).flag, text)]
    by_flags = commands.apply(NONE, commands.typed_options(parser.parse_args([*argv, "--strict"])))
    by_set = NONE
    for key, text in {**typed, "end": "70", "start": "1:00", "strict": "on"}.items():
        by_set = commands.set_option(by_set, key, text) if key != "start" else by_set
    by_set = commands.set_option(by_set, "start", "1:00")
    assert by_flags == by_set
    assert by_set.video == Video("", frames=8, start=60.0, end=70.0, strict=True)
    assert by_set.params.stop == ("END",)
    assert by_set.switch == ("sinks=2,rerotate=on",)


def test_set_default_and_contradictions() -> None:
    changed = commands.set_option(NONE, "frames", "8")
    assert commands.set_option(changed, "fps", "2").video == Video("", fps=2.0)
    assert commands.set_option(changed, "frames", "default") == NONE
    with pytest.raises(InvalidRequest, match="exclude each other"):
        commands.apply(NONE, {"frames": 8, "fps": 2.0})
    with pytest.raises(InvalidRequest) as caught:
        commands.set_option(NONE, "temprature", "1")
    assert "temperature" in caught.value.hint
    with pytest.raises(InvalidRequest, match="top_k: expected a whole number, got 'x'"):
        commands.set_option(NONE, "top-k", "x")


@pytest.mark.parametrize(
    ("line", "word", "rest"),
    [
        ("a b", "a", "b"),
        ("'my clip.mp4' what?", "my clip.mp4", "what?"),
        ('"my clip.mp4"', "my clip.mp4", ""),
        (r"my\ clip.mp4 what's that?", "my clip.mp4", "what's that?"),
        ("it's a b", "it's", "a b"),
        ("x'y z'w", "xy zw", ""),
        ("a\\", "a\\", ""),
    ],
)
def test_take_word(line: str, word: str, rest: str) -> None:
    assert commands.take_word(line) == (word, rest)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", None),
        ("  \n ", None),
        ("Hello there", Ask("Hello there")),
        ("//image is a word", Ask("/image is a word")),
        ("What is it?\nAnd this?", Ask("What is it?\nAnd this?")),
        ("/exit", Run("exit", "")),
        ("/bye", Run("exit", "")),
        ("/quit", Run("exit", "")),
        ("/set  seed 3", Run("set", "seed 3")),
        ("a.png", Attach((Image("a.png"),))),
        ("a.png what is it?", Attach((Image("a.png"),), "what is it?")),
        ("a.png 'my clip.mp4' b.webp it's?", Attach((Image("a.png"), Video("my clip.mp4"), Video("b.webp")), "it's?")),
        ("my clip.mp4", Attach((Video("my clip.mp4"),))),
        (r"my\ clip.mp4 ", Attach((Video("my clip.mp4"),))),
        ("what", Attach((Image("what"),))),
        ("what is this?", Ask("what is this?")),
        ("./what is this?", Attach((Image("./what"),), "is this?")),
        ("/image a.png", Attach((Image("a.png"),))),
        ("/image missing.png", Attach((Image("missing.png"),))),
        ("/image a.png b.png", Attach((Image("a.png"), Image("b.png")))),
        ("/image it's.png", Attach((Image("it's.png"),))),
        ("/video my clip.mp4", Attach((Video("my clip.mp4"),))),
        ("/video 'my clip.mp4' --frames 4 --start 1:00", Attach((Video("my clip.mp4", frames=4, start=60.0),))),
        ("/video --fps 2 a b --strict", Attach((Video("a", fps=2.0, strict=True), Video("b", fps=2.0, strict=True)))),
    ],
)
def test_lines(folder: Path, line: str, expected: object) -> None:
    assert parse_line(line, NONE) == expected


def test_absolute_home_and_address_paths(folder: Path) -> None:
    path = str(folder / "my clip.mp4")
    clip = Attach((Video(path),))
    assert parse_line(path, NONE) == clip
    assert parse_line(f"'{path}' ", NONE) == clip
    assert parse_line("file://" + path.replace(" ", "%20"), NONE) == clip
    assert parse_line("~/my\\ clip.mp4", NONE) == clip
    assert parse_line("/video ~/my\\ clip.mp4", NONE) == clip
    assert parse_line(f"/video file://localhost{path.replace(' ', '%20')}", NONE) == clip
    with pytest.raises(InvalidRequest, match="on this machine"):
        parse_line("/video file://elsewhere/clip.mp4", NONE)


def test_settings_fill_in_a_clip_and_the_line_wins(folder: Path) -> None:
    settings = commands.set_option(NONE, "frames", "8")
    assert parse_line("a.png", settings) == Attach((Image("a.png"),))
    assert parse_line("b.webp", settings) == Attach((Video("b.webp", frames=8),))
    assert parse_line("/video b.webp --fps 2", settings) == Attach((Video("b.webp", fps=2.0),))


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("/imgae a.png", "/image"),
        ("/sparsty", "/sparsity"),
        ("/hlep", "/help"),
        ("/zzzz", "/help lists them"),
        ("/home/me/gone.png", "no file"),
    ],
)
def test_unknown_command_names_the_nearest(folder: Path, line: str, hint: str) -> None:
    with pytest.raises(InvalidRequest, match="there is no command") as caught:
        parse_line(line, NONE)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "line",
    ["/image", "/video", "/video a --frames x", "/video a --frames 0", "/video a --frames 2 --fps 1", "/video a --foo"],
)
def test_bad_options_of_a_command(folder: Path, line: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_line(line, NONE)


@given(st.text())
@example("/image \x00")
@example("file://[")
@example("'" * 9)
def test_any_text_is_a_question_a_command_or_a_typed_error(text: str) -> None:
    try:
        meant = parse_line(text, NONE)
    except InvalidRequest:
        return
    assert meant is None or isinstance(meant, (Ask, Attach, Run))
    if isinstance(meant, Ask):
        assert meant.text
        assert meant.text in text


@given(st.lists(st.text(min_size=1), max_size=4))
def test_escaped_words_come_back(words: list[str]) -> None:
    line = " ".join("".join("\\" + c for c in word) for word in words)
    assert commands.split_words(line) == words


def test_completion(folder: Path) -> None:
    (folder / "clips").mkdir()
    (folder / "clips" / "one.mp4").touch()

    def offers(line: str) -> list[str]:
        return [line[: len(line) - replaced] + text for replaced, text in commands.complete(line)]

    assert offers("/im") == ["/image "]
    assert offers("/image a") == ["/image a.png "]
    assert offers("/video my") == ["/video my\\ clip.mp4 "]
    assert offers("/video 'my c") == ["/video my\\ clip.mp4 "]
    assert offers("/video my\\ c") == ["/video my\\ clip.mp4 "]
    assert offers("/video a.png cl") == ["/video a.png clips/"]
    assert offers("/video clips/") == ["/video clips/one.mp4 "]
    assert offers("/video ~/clips/o") == ["/video ~/clips/one.mp4 "]
    assert offers("/set temp") == ["/set temperature "]
    assert offers("hello") == []
