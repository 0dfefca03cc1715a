"""The chat program on a stand-in engine, in this process: flags, streams, exit codes, slash commands."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_engine
import pytest

from sparsevila import chat, errors
from sparsevila.engine import commands, hub
from sparsevila.engine.chat_loop import Chat, banner
from sparsevila.engine.config import EngineInfo, Image, SamplingParams, Sparsity, Video
from sparsevila.engine.quantise import QuantSettings
from sparsevila.engine.terminal import Screen


class ForbiddenStdin(io.StringIO):
    def isatty(self) -> bool:
        return False

    def read(self, *_: Any) -> str:
        raise AssertionError("stdin was read")

    readline = read  # type: ignore[assignment]
    buffer = property(read)  # type: ignore[assignment]


def exit_code(program: Callable[[], int]) -> int:
    """What the shell would see; argparse leaves by SystemExit."""
    try:
        return program()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for name in ("clip.mp4", "bad.mp4", "a.png"):
        (tmp_path / name).write_bytes(b"\x89PNG" if name == "a.png" else b"\0\0\0\x20ftyp")
    return "clip.mp4"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the program once; `run.engine` is what it loaded last."""

    def call(*argv: str, stdin: str | None = None) -> int:
        source: Any = ForbiddenStdin() if stdin is None else io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
        monkeypatch.setattr("sys.stdin", source)

        def load(*args: Any, **kwargs: Any) -> fake_engine.FakeEngine:
            call.engine = fake_engine.load(*args, **kwargs)  # type: ignore[attr-defined]
            return call.engine  # type: ignore[attr-defined]

        call.engine = None  # type: ignore[attr-defined]
        return exit_code(lambda: chat.main(list(argv), load=load))  # type: ignore[arg-type]

    return call


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ([], 0),
        (["--model", "missing"], 3),
        (["--model", "oom"], 5),
        (["--model", "boom"], 1),
        (["--model", "dead"], 1),
        (["--video", "bad.mp4"], 4),
        (["--video", "gone.mp4"], 4),
        (["--image", "a.png", "--video", "clip.mp4"], 0),
        (["--frames", "x"], 2),
        (["--frames", "0"], 2),
        (["--frames", "2", "--fps", "1"], 2),
        (["--start", "9", "--end", "3"], 2),
        (["--prefill-sparsity", "1.0"], 2),
        (["--decode-sparsity", "nan"], 2),
        (["--method", "magic"], 2),
        (["--switch", "magic=1"], 2),
        (["--switch", "sinks=-1"], 2),
        (["--switch", "sinks=1", "--switch", "sinks=2"], 2),
        (["--temperature", "-1"], 2),
        (["--ctx", "many"], 2),
        (["--system", "@gone.txt"], 2),
        (["--frobnicate"], 2),
        (["--prompt", ""], 2),
        (["--prompt", "y"], 0),
        (["--version"], 0),
    ],
)
def test_exit_codes(
    argv: list[str], code: int, run: Callable[..., int], clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "x", *argv) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    if code:
        assert out == ""
        assert err.count("error:") == 1


def test_stdout_is_the_models_text_alone(
    run: Callable[..., int], clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", "utf8", "--prompt", "hello", "--video", clip, "--stats") == 0
    out, err = capsys.readouterr()
    assert out == "naïve 数 🙂\n"
    assert "[1] clip.mp4: video 64x48, 2.0 s, 8 frames, 128 visual tokens, 48 kept" in err
    assert "ttft 412 ms" in err
    assert "\x1b" not in err


def test_escape_codes_pass_where_stdout_is_no_terminal(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", "escape", "--prompt", "x", "--quiet") == 0
    out, err = capsys.readouterr()
    assert out == "".join(fake_engine.ANSWERS["escape"]) + "\n"
    assert err == ""


def test_several_prompts_are_one_conversation(run: Any, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--video", clip, "--prompt", "one", "--prompt", "two", "--stats") == 0
    out, err = capsys.readouterr()
    assert out == "ONE [1]\nTWO [1]\n"
    assert err.index("[1] clip.mp4") < err.index("> one\n") < err.index("ttft") < err.index("> two\n")
    [session] = run.engine.sessions
    assert [turn.question for turn in session.history] == ["one", "two"]
    assert run("--prompt", "one", "--prompt", "two", "--json") == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in results if line["type"] == "result"] == ["ONE [0]", "TWO [0]"]
    assert run("--prompt", "one", "--prompt", " ") == 2
    assert run.engine is None


def test_a_lone_prompt_is_not_repeated(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "one") == 0
    assert "> one" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("note", "line"),
    [
        (None, ""),
        ("", ""),
        ("# Only a heading\n", ""),
        ("# A model\n\nIt knows nothing\nof cats. Nor dogs.\n\nMore.\n", "It knows nothing of cats. Nor dogs.\n"),
        ("No heading.\n", "No heading.\n"),
        ("# A model\n\n\x1b[31mred\x1b]0;title\x07\n", "red\n"),
        ("# A model\n\n" + "x" * 100_000, "x" * (4096 - len("# A model\n\n")) + "\n"),
    ],
    ids=["none", "empty", "heading", "paragraph", "bare", "escapes", "long"],
)
def test_the_banner_ends_with_the_models_own_note(note: str | None, line: str, tmp_path: Path) -> None:
    if note is not None:
        (tmp_path / "NOTE.md").write_text(note, encoding="utf-8")
    info = EngineInfo("m", "Arch", str(tmp_path), "bf16", "cpu", 1_000_000, 2_000_000, 4096, 0.1, notes=("a note",))
    err = io.StringIO()
    banner(Screen(io.StringIO(), err), info)
    assert err.getvalue().split("a note\n")[1] == line


def test_a_note_that_is_no_file_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "NOTE.md")  # opening it would wait for a writer
    err = io.StringIO()
    banner(Screen(io.StringIO(), err), EngineInfo("m", "Arch", str(tmp_path), "bf16", "cpu", 1, 2, 4096, 0.1))
    assert err.getvalue().endswith(f"from {tmp_path}\n")


def test_piped_stdin_is_the_whole_prompt(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(stdin="one\ntwo /exit\n") == 0
    assert capsys.readouterr().out == "ONE\nTWO /EXIT [0]\n"
    assert run(stdin=" \n") == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_stdin_that_is_not_text_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    assert chat.main([], load=fake_engine.load) == 2  # type: ignore[arg-type]
    assert "expected UTF-8 text" in capsys.readouterr().err


def test_a_missing_file_is_found_before_the_model_is_loaded(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in (("gone.mp4", "there is no such file"), ("http://here/clip.mp4", "got a http: address")):
        assert run("--prompt", "x", "--video", path) == 4
        assert message in capsys.readouterr().err
        assert run.engine is None


def test_flags_reach_the_engine(run: Any, clip: str, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be brief.", encoding="utf-8")
    machine = ["--device", "cpu", "--dtype", "float32", "--max-memory", "2GiB", "--ctx", "512", "--offline", "--w4a8",
               "--positions", "original"]  # fmt: skip
    media = ["--video", clip, "--image", "a.png", "--frames", "4", "--start", "0:01", "--end", "2", "--strict"]
    sampling = ["--max-new-tokens", "5", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "3", "--seed", "7"]
    assert (
        run("--prompt", "x", *machine, *media, *sampling, "--stop", "A", "--stop", "B", "--system", "@system.txt") == 0
    )
    options = {
        "device": "cpu",
        "dtype": "float32",
        "max_memory": "2GiB",
        "max_context": 512,
        "offline": True,
        "quantised": True,
        "w4a8": True,
        "positions": "original",
    }
    assert run.engine.options == options
    session = run.engine.sessions[0]
    assert session.system == "Be brief."
    assert session.sources == [Video(clip, frames=4, start=1.0, end=2.0, strict=True), Image("a.png")]
    assert session.asked == [("x", SamplingParams(5, 0.5, 0.9, 3, 7, ("A", "B")))]
    assert session.wanted is None
    assert session.closed
    assert run.engine.closed


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], None),
        (["--prefill-sparsity", "auto"], None),
        (["--dense"], Sparsity(0.0, 0.0)),
        (["--prefill-sparsity", "0.3"], Sparsity(0.3, 0.75)),
        (["--prefill-sparsity", "0.3", "--video", "clip.mp4"], Sparsity(0.3, 0.8)),
        (["--decode-sparsity", "0.95", "--method", "fastv"], Sparsity(0.6, 0.95, "fastv")),
        (
            ["--switch", "global", "--switch", "sinks=2,refresh=9"],
            Sparsity(0.6, 0.75, scope="global", sinks=2, refresh=9),
        ),
        (["--switch", "sinks=0"], Sparsity(0.6, 0.75)),
    ],
)
def test_sparsity_flags(flags: list[str], wanted: Sparsity | None, run: Any, clip: str) -> None:
    assert run("--prompt", "x", *flags) == 0
    assert run.engine.sessions[0].wanted == wanted


def test_json_lines(run: Any, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "hi", "--json", "--video", clip, "--stats") == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    chunks = "".join(line["text"] for line in lines if line["type"] == "chunk")
    assert {line["type"] for line in lines} == {"stage", "chunk", "result"}
    assert lines[-1]["text"] == chunks == "HI [1]"
    assert lines[-1]["finish_reason"] == "stop"
    assert err == ""
    assert run("--prompt", "hi", "--json", "--model", "oom") == 5
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["code"] == "insufficient_memory"


def test_an_unexpected_error_is_one_line(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "x", "--model", "boom", "-q") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("error: unexpected RuntimeError: the fake broke")
    assert run("--prompt", "x", "--model", "boom", "-v") == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_shows_the_defaults_of_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chat.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"longest answer in tokens (default: {SamplingParams().max_new_tokens})" in text
    for row in commands.OPTIONS:
        assert row.flag in text


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "code", "fetched"), [("y", 0, ["llava-next-7b"]), ("", 3, []), ("no", 3, [])])
def test_a_download_needs_a_yes(answer: str, code: int, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[str] = []
    monkeypatch.setattr(hub, "download", lambda model, *, progress: got.append(model))
    monkeypatch.setattr("sys.stdin", Tty(f"{answer}\n/exit\n"))
    monkeypatch.setattr("sys.stderr", Tty())

    def load(model: str, **options: Any) -> fake_engine.FakeEngine:
        return fake_engine.load(model if got else "missing", **options)

    assert exit_code(lambda: chat.main(["--model", "llava-next-7b", "--plain"], load=load)) == code  # type: ignore[arg-type]
    assert got == fetched


def test_an_unknown_name_is_not_offered_for_download(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin, stderr = Tty("y\n"), Tty()
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr("sys.stderr", stderr)
    assert chat.main(["--model", "missing", "--plain"], load=fake_engine.load) == 3  # type: ignore[arg-type]
    assert stdin.tell() == 0
    assert "Download" not in stderr.getvalue()


@pytest.mark.parametrize(
    ("typed", "flags", "made", "asked"),
    [
        ("y", [], ["made"], True),
        ("", [], [], True),
        ("y", ["--quantize", "never"], [], False),
        ("y", ["--prompt", "Hi"], [], False),
    ],
)
def test_a_large_model_is_quantised_after_a_yes(
    typed: str, flags: list[str], made: list[str], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsevila.engine import quantised_copy

    plan = quantised_copy.CopyPlan(
        Path("a"), Path("b"), QuantSettings(), quantised_copy.QuantCost(14_100_000_000, 4_200_000_000, 3_500_000_000)
    )
    got: list[str] = []
    stderr = Tty()
    monkeypatch.setattr(quantised_copy, "plan_copy", lambda model: plan)
    monkeypatch.setattr(quantised_copy, "make_copy", lambda plan, *, progress: got.append("made"))
    monkeypatch.setattr("sys.stdin", Tty(f"{typed}\n/exit\n"))
    monkeypatch.setattr("sys.stderr", stderr)
    wanted: list[bool] = []

    def load(model: str, *, quantised: bool, **options: Any) -> fake_engine.FakeEngine:
        wanted.append(quantised)
        return fake_engine.load(model, **options)

    assert chat.main(["--model", "llava-next-7b", "--plain", *flags], load=load) == 0  # type: ignore[arg-type]
    assert got == made
    assert ("14.1 GB of weights" in stderr.getvalue()) == ("Quantise it now?" in stderr.getvalue()) == asked
    assert wanted == ["never" not in flags]


def test_quantising_may_be_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsevila.engine import quantised_copy

    def make_copy(plan: object, *, progress: object) -> None:
        raise KeyboardInterrupt

    cost = quantised_copy.QuantCost(14_100_000_000, 4_200_000_000, 3_500_000_000)
    plan = quantised_copy.CopyPlan(Path("a"), Path("b"), QuantSettings(), cost)
    stderr = Tty()
    monkeypatch.setattr(quantised_copy, "plan_copy", lambda model: plan)
    monkeypatch.setattr(quantised_copy, "make_copy", make_copy)
    monkeypatch.setattr("sys.stdin", Tty("y\n/exit\n"))
    monkeypatch.setattr("sys.stderr", stderr)
    assert chat.main(["--model", "llava-next-7b", "--plain"], load=fake_engine.load) == 0  # type: ignore[arg-type]
    assert "goes on from there" in stderr.getvalue()


def test_models_get(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def download(model: str, *, progress: Any) -> hub.ModelFolder:
        progress(fake_engine.FakeStep("download", 5, 5, "bytes"))
        return hub.ModelFolder(Path("there"), "SPARSEVILA_HOME")

    monkeypatch.setattr(hub, "download", download)
    assert chat.main(["models", "--get", "llava-next-7b"]) == 0
    assert capsys.readouterr() == ("", "download 5 B of 5 B\nllava-next-7b is in there\n")


# ---- the conversation


class Script:
    """A keyboard: lines, or exceptions to raise."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines: Iterator[str | type[BaseException]] = iter(lines)

    def read(self) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


class Talk:
    """A conversation with the fake, and all that came of it."""

    def __init__(self, model: str = "demo") -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.engine = fake_engine.FakeEngine(model, {})
        self.chat = Chat(
            self.engine,  # type: ignore[arg-type]
            Screen(self.out, self.err),
            commands.Settings(),
            system=None,
            stats=False,
        )
        self.session = self.engine.sessions[0]

    def type(self, *lines: str | type[BaseException]) -> int:
        return self.chat.loop(Script(*lines))


def test_unknown_command_does_not_go_to_the_model() -> None:
    talk = Talk()
    assert talk.type("/imgae a.png", "/sparsty 1 1") == 0
    assert talk.session.asked == []
    assert "there is no command /imgae (did you mean /image?)" in talk.err.getvalue()
    assert talk.out.getvalue() == ""


def test_double_slash_goes_to_the_model() -> None:
    talk = Talk()
    talk.type("//help me")
    assert talk.session.asked[0][0] == "/help me"


def test_failed_attach_changes_nothing_and_ends_nothing(clip: str) -> None:
    talk = Talk()
    assert talk.type("/video clip.mp4", "/video bad.mp4", "/image gone.png", "/video", "what?") == 0
    assert [a.source for a in talk.session.media] == [clip]
    assert talk.out.getvalue() == "WHAT? [1]\n"
    assert talk.err.getvalue().count("error:") == 3
    assert "likely an unfinished recording" in talk.err.getvalue()


def test_dropped_file_with_a_question(clip: str) -> None:
    talk = Talk()
    talk.type("clip.mp4 a.png what is it?")
    assert [a.kind for a in talk.session.media] == ["video", "image"]
    assert talk.session.asked[0][0] == "what is it?"


def test_a_dropped_file_that_fails_does_not_ask(clip: str) -> None:
    talk = Talk()
    talk.type("bad.mp4 what is it?")
    assert talk.session.asked == []


def test_media_drop_clear_reset(clip: str) -> None:
    talk = Talk()
    talk.type("/media", "/video clip.mp4", "/image a.png", "q", "/media", "/drop 1", "/drop x", "/drop 7", "/clear")
    err = talk.err.getvalue()
    assert "nothing is attached" in err
    assert "[2] a.png: image 64x48, 16 visual tokens, 6 kept" in err
    assert "expected a whole number, got 'x'" in err
    assert "expected an item from 1 to 1, got 7" in err
    assert [a.source for a in talk.session.media] == ["a.png"]
    assert talk.session.history == ()
    talk.type("/reset")
    assert talk.session.media == ()


def test_undo_and_retry() -> None:
    talk = Talk()
    talk.type("/undo", "/retry", "one", "two", "/undo", "/retry")
    assert "there is no turn to undo" in talk.err.getvalue()
    assert [text for text, _ in talk.session.asked] == ["one", "two", "one"]
    assert [turn.question for turn in talk.session.history] == ["one"]


def test_retry_draws_anew_only_when_sampling() -> None:
    talk = Talk()
    talk.type("one", "/retry", "/set temperature 0.7", "/retry", "/retry", "two")
    assert [params.seed for _, params in talk.session.asked] == [0, 0, 2, 3, 0]


def test_retry_after_an_error_asks_the_same_question() -> None:
    talk = Talk("oom")
    assert talk.type("one", "/retry") == 0
    assert [text for text, _ in talk.session.asked] == ["one", "one"]


def test_set_and_show() -> None:
    talk = Talk()
    talk.type("/set max-new-tokens 9", "/set stop END", "/set seed x", "/set", "/set sed 3", "/show params", "q")
    err = talk.err.getvalue()
    assert talk.session.asked[0][1] == SamplingParams(max_new_tokens=9, stop=("END",))
    assert "seed: expected a whole number, got 'x'" in err
    assert "did you mean seed?" in err
    assert "max_new_tokens    9" in err
    talk.type("/show", "/show nothing", "/set stop default", "q")
    assert "architecture" in talk.err.getvalue()
    assert "there is no 'nothing' to show" in talk.err.getvalue()
    assert talk.session.asked[1][1].stop == ()


def test_sparsity_command(clip: str) -> None:
    talk = Talk()
    talk.type("/sparsity", "/sparsity 0.2 0.4")
    assert talk.session.wanted == Sparsity(0.2, 0.4)
    talk.type("/sparsity 2 0", "/sparsity 0.5", "/set method magic")
    assert talk.session.wanted == Sparsity(0.2, 0.4)
    assert talk.err.getvalue().count("error:") == 3
    talk.type("/sparsity 0.2 auto", "/video clip.mp4")
    assert talk.session.wanted == Sparsity(0.2, 0.8)
    talk.type("/sparsity auto")
    assert talk.session.wanted is None
    talk.type("/set switch budgets=mass,diversity=0.5", "/sparsity")
    assert talk.session.wanted == Sparsity(0.5, 0.8, budgets="mass", diversity=0.5)
    assert "not read (sparsevila with budgets=mass,diversity=0.5)\nMethod(prefill=" in talk.err.getvalue()
    talk.type("/set switch sinks=-1", "/set switch default")
    assert talk.err.getvalue().count("error:") == 4
    assert talk.session.wanted is None


def test_system_stats_help() -> None:
    talk = Talk()
    talk.type("/system Be brief.", "/stats on", "q", "/stats", "q")
    assert talk.session.system == "Be brief."
    assert talk.err.getvalue().count("ttft") == 1
    talk.type("/system", "/help", "/help video", "/help nothing")
    assert talk.session.system is None
    for command in commands.COMMANDS:
        assert f"/{command.name}" in talk.err.getvalue()
    assert "[--frames N | --fps R]" in talk.err.getvalue()


@pytest.mark.parametrize("word", ["/exit", "/bye", "/quit"])
def test_words_that_leave(word: str) -> None:
    talk = Talk()
    assert talk.type(word, "not asked") == 0
    assert talk.session.asked == []


def test_two_interrupts_at_the_prompt_leave() -> None:
    assert Talk().type(KeyboardInterrupt, KeyboardInterrupt, "not reached") == 130
    talk = Talk()
    assert talk.type(KeyboardInterrupt, "q") == 0
    assert "Ctrl-D or /exit leaves" in talk.err.getvalue()


def test_a_dead_engine_ends_the_program() -> None:
    with pytest.raises(errors.EngineDead):
        Talk("dead").type("q", "again")


def test_every_command_has_a_handler() -> None:
    for command in commands.COMMANDS:
        assert command.name in ("image", "video", "exit") or hasattr(Chat, f"_do_{command.name}")
