"""Chat with a vision-language model about images and videos: the terminal program.

    python chat.py --model ALIAS | PATH | hf:USER/REPO --video clip.mp4
    python chat.py models | doctor

stdout carries the model's text alone; everything else goes to stderr. Exit codes: 0 ok, 1 internal,
2 usage, 3 model, 4 media, 5 out of memory, 130 interrupted, 141 closed pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

try:
    from sparsevila import __version__
    from sparsevila.engine import commands, terminal
    from sparsevila.engine.chat_loop import INTERRUPTED, Chat, banner, report_error, table
    from sparsevila.engine.config import Image, Video
    from sparsevila.errors import (
        Closed,
        EngineDead,
        InvalidRequest,
        MediaNotFound,
        ModelNotFound,
        SparseVILAError,
    )
except ModuleNotFoundError as missing:
    if missing.name != "sparsevila":
        raise
    sys.exit("error: sparsevila is not installed here: run `make demo` once, or `pip install -e .`")

if TYPE_CHECKING:
    from sparsevila.engine.engine import Engine

MAX_TEXT_BYTES = 16 * 2**20  # of a prompt on stdin or a system text in a file; far above any context
CLOSED_PIPE, TERMINATED = 141, 143
# Below this size an operation is quicker computed than handed out to several threads; beside another busy process the
# hand-over costs milliseconds each time.
ONE_THREAD_BYTES = 64 * 2**20


# ---- command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chat.py",
        description="Chat with a vision-language model about images and videos.",
        epilog="sub-commands: `models [--get ALIAS]` lists or fetches weights, `doctor` prints facts for a bug report",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="demo", metavar="NAME", help="alias, folder or hf:USER/REPO (default: demo)")
    media = parser.add_argument_group("media")
    for kind in ("image", "video"):
        help_ = f"attach {'a picture' if kind == 'image' else 'a clip'}; may be repeated"
        media.add_argument(f"--{kind}", dest="media", action="append", type=_tagged(kind), metavar="FILE", help=help_)
    commands.add_options(media, ("video",))
    text = parser.add_argument_group("text")
    text.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        metavar="TEXT",
        help="answer this and exit; may be repeated, for one conversation; stdin is not read",
    )
    text.add_argument("--system", metavar="TEXT|@FILE", help="system text")
    commands.add_options(parser.add_argument_group("sampling"), ("params",))
    sparsity = parser.add_argument_group("sparsity")
    commands.add_options(sparsity, ("sparsity",))
    sparsity.add_argument("--dense", action="store_true", help="both sparsities 0")
    sparsity.add_argument(
        "--positions",
        choices=["regrid", "original", "contiguous"],
        help="of multimodal RoPE: where tokens that survive pruning are placed",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", metavar="auto|cuda:0|cpu")
    machine.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    machine.add_argument("--max-memory", metavar="SIZE", help="a promise, e.g. 6GiB")
    machine.add_argument("--ctx", default="auto", metavar="auto|N", help="context in tokens")
    machine.add_argument("--threads", default="auto", metavar="auto|N", help="CPU threads of torch")
    machine.add_argument(
        "--quantize",
        default="auto",
        choices=["auto", "never"],
        help="auto: use the quantised copy of the model, and offer to make one once",
    )
    machine.add_argument(
        "--w4a8", action="store_true", help="8-bit products in 4-bit layers: faster prefill, more memory, less accurate"
    )
    machine.add_argument("--offline", action="store_true", help="never use the network, and ask nothing about it")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--stats", action=argparse.BooleanOptionalAction, help="figures after each answer (default: on a terminal)"
    )
    output.add_argument("--json", action="store_true", help="one JSON object per line instead of text")
    output.add_argument("--plain", action="store_true", help="nothing is redrawn or coloured")
    output.add_argument("--no-history", action="store_true", help="do not keep what is typed")
    volume = output.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="log, and show tracebacks")
    volume.add_argument("-q", "--quiet", action="store_true", help="answers and errors only")
    output.add_argument("--version", action="version", version=f"sparsevila {__version__}")
    return parser


def _tagged(kind: str) -> Callable[[str], tuple[str, str]]:
    return lambda text: (kind, text)


def settings_of(args: argparse.Namespace) -> commands.Settings:
    typed = commands.typed_options(args)
    if args.dense:
        typed |= {"prefill_sparsity": 0.0, "decode_sparsity": 0.0}
    return commands.apply(commands.Settings(), typed)


def media_of(args: argparse.Namespace, settings: commands.Settings) -> list[Image | Video]:
    """The items of the flags, in their order. A missing file is found here, before a model is loaded."""
    items: list[Image | Video] = []
    for kind, typed in args.media or ():
        path = commands.clean_path(typed)
        if not os.path.lexists(path):
            refuse_missing(typed)
        items.append(Image(path) if kind == "image" else replace(settings.video, source=path))
    return items


def refuse_missing(typed: str) -> NoReturn:
    from sparsevila.engine.media_file import refuse_address  # brings torch: only where something is wrong

    refuse_address(typed)
    raise MediaNotFound(f"{typed}: there is no such file")


def system_of(args: argparse.Namespace) -> str | None:
    if args.system is None or not args.system.startswith("@"):
        return args.system
    path = args.system[1:]
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return _decode(file.read(MAX_TEXT_BYTES + 1), path)
    except OSError as error:
        raise InvalidRequest(f"--system: {path}: {error.strerror}") from None


def _decode(data: bytes, name: str) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise InvalidRequest(f"{name}: expected at most {MAX_TEXT_BYTES} bytes of text, got more")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name}: expected UTF-8 text") from None


def questions_of(args: argparse.Namespace, stdin: TextIO) -> list[str] | None:
    """The questions of a run that is not interactive, one after the other; None at a terminal."""
    questions: list[str] | None = args.prompts
    if questions is None and stdin.isatty():
        return None
    if questions is None:
        questions = [_decode(stdin.buffer.read(MAX_TEXT_BYTES + 1), "stdin").strip()]
    if not all(text.strip() for text in questions):
        raise InvalidRequest("the prompt is empty", hint="give --prompt TEXT, text on stdin, or run it at a terminal")
    return questions


def main(argv: list[str] | None = None, *, load: Callable[..., Engine] | None = None) -> int:
    """Run the program; the exit code. `load` stands in for `Engine.load` in tests."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    verbose = "-v" in argv or "--verbose" in argv
    screen = terminal.Screen(sys.stdout, sys.stderr)
    with contextlib.suppress(ValueError):  # not the main thread of an embedding program
        signal.signal(signal.SIGTERM, _leave)
    try:
        if argv[:1] == ["models"]:
            return run_models(argv[1:], screen)
        if argv[:1] == ["doctor"]:
            return run_doctor()
        args = build_parser().parse_args(argv)
        screen = terminal.Screen(
            sys.stdout,
            sys.stderr,
            plain=args.plain or os.environ.get("TERM") == "dumb",
            quiet=args.quiet,
            as_json=args.json,
            color=not os.environ.get("NO_COLOR"),
        )
        return run_chat(args, screen, load or _load_engine)
    except SparseVILAError as error:
        report_error(screen, error)
        return error.exit_code
    except KeyboardInterrupt:
        screen.clear_progress()
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return CLOSED_PIPE
    except Exception as error:  # noqa: BLE001  the one place where the unexpected becomes a sentence
        if verbose:
            traceback.print_exc()
        more = "" if verbose else "-v shows where; `chat.py doctor` prints what a report needs"
        screen.error(f"unexpected {type(error).__name__}: {error}", hint=more)
        return 1


def _forget_stdout() -> None:
    """Python flushes stdout once more when it ends; into a closed pipe that would fail and change the exit code."""
    with contextlib.suppress(OSError, ValueError):  # an embedding program's own stream has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _leave(_signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _load_engine(*args: Any, **kwargs: Any) -> Engine:
    from sparsevila.engine.engine import Engine

    return Engine.load(*args, **kwargs)


def run_chat(args: argparse.Namespace, screen: terminal.Screen, load: Callable[..., Engine]) -> int:
    _set_up_messages(args, screen)
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    settings = settings_of(args)
    threads = None if args.threads == "auto" else commands.parse_int(args.threads)
    if threads is not None and threads < 1:
        raise InvalidRequest(f"--threads: expected at least 1, got {threads}")
    context = None if args.ctx == "auto" else commands.parse_int(args.ctx)
    media, system = media_of(args, settings), system_of(args)
    questions = questions_of(args, sys.stdin)

    def load_once() -> Engine:
        return load(
            args.model,
            device=args.device,
            dtype=args.dtype,
            max_memory=args.max_memory,
            max_context=context,
            offline=args.offline,
            quantised=args.quantize == "auto",
            w4a8=args.w4a8,
            positions=args.positions,
            progress=screen.progress,
        )

    may_ask = questions is None and sys.stderr.isatty() and not args.json
    if may_ask and args.quantize == "auto":
        offer_quantised(args.model, screen)
    try:
        engine = load_once()
    except ModelNotFound as error:
        if not may_ask or args.offline or not offer_download(args.model, screen, error):
            raise
        if args.quantize == "auto":
            offer_quantised(args.model, screen)
        engine = load_once()
    with engine:
        screen.clear_progress()
        _set_threads(threads, engine)
        banner(screen, engine.info)
        stats = sys.stderr.isatty() if args.stats is None else args.stats
        chat = Chat(engine, screen, settings, system=system, stats=stats)
        try:
            if questions is not None:
                return answer_all(chat, media, questions, screen)
            return converse(chat, media, screen, args)
        finally:
            chat.close()


def _set_threads(threads: int | None, engine: Engine) -> None:
    import torch

    if threads is None and engine.info.device == "cpu" and engine.info.weight_bytes < ONE_THREAD_BYTES:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def answer_all(chat: Chat, media: list[Image | Video], questions: list[str], screen: terminal.Screen) -> int:
    for item in media:
        chat.attach(item)
    for question in questions:
        if len(questions) > 1:
            screen.note(f"> {question}")
        if chat.ask(question) == "cancelled":
            return INTERRUPTED
    return 0


def converse(chat: Chat, media: list[Image | Video], screen: terminal.Screen, args: argparse.Namespace) -> int:
    for item in media:
        try:
            chat.attach(item)
        except (EngineDead, Closed):
            raise
        except SparseVILAError as error:
            report_error(screen, error)
    screen.note("/help lists the commands; Ctrl-D leaves", dim=True)
    return chat.loop(_reader(args))


def _reader(args: argparse.Namespace) -> terminal.LineReader:
    if args.plain or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty():
        return terminal.PlainReader(sys.stdin, sys.stderr)
    home = Path(os.environ.get("SPARSEVILA_HOME") or Path.home() / ".sparsevila")
    history = None if args.no_history else home / "history"
    return terminal.EditingReader(sys.stdin, sys.stderr, history=history, color=not os.environ.get("NO_COLOR"))


def _set_up_messages(args: argparse.Namespace, screen: terminal.Screen) -> None:
    """Our own warnings become notes; those of libraries, and all logging, need -v."""
    if args.verbose:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module=r"sparsevila\.")
    warnings.showwarning = lambda message, *_, **__: screen.note(f"warning: {message}")


# ---- weights


def offer_download(model: str, screen: terminal.Screen, error: ModelNotFound) -> bool:
    """Ask at the terminal whether to fetch the weights; True after they have come."""
    from sparsevila.engine import hub

    sizes = {row.alias: (row.repository, f" ({terminal.format_bytes(row.size_bytes)})") for row in hub.list_models()}
    if model.startswith("hf:"):
        sizes[model] = (model.removeprefix("hf:"), "")
    if model not in sizes:
        return False
    repository, size = sizes[model]
    report_error(screen, error)
    if not _agreed(f"Download {repository}{size}?"):
        raise SystemExit(error.exit_code)
    hub.download(model, progress=screen.progress)
    screen.clear_progress()
    return True


def offer_quantised(model: str, screen: terminal.Screen) -> None:
    """Ask at the terminal whether to quantise a large model that is here in floats; make the copy after a yes."""
    if model.startswith("demo"):
        return  # it is small, and asking about it would import torch before anything is shown
    from sparsevila.engine import quantised_copy

    plan = quantised_copy.plan_copy(model)
    if plan is None:
        return
    cost = plan.cost
    sizes = [terminal.format_bytes(size) for size in (cost.source_bytes, cost.out_bytes, cost.memory_bytes)]
    screen.note(
        f"{model} has {sizes[0]} of weights. A quantised copy (W8A8 vision, W4A16 language) takes {sizes[1]}, on the "
        f"disk and in memory. Making it once needs about {sizes[2]} of memory, and without a GPU it takes long: the "
        "time left is shown, and Ctrl-C pauses it."
    )
    if not _agreed("Quantise it now? (--quantize never stops asking)"):
        return
    try:
        quantised_copy.make_copy(plan, progress=screen.progress)
    except KeyboardInterrupt:
        screen.clear_progress()
        screen.note("paused: the next start asks again and goes on from there")
    screen.clear_progress()


def _agreed(question: str) -> bool:
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def run_models(argv: list[str], screen: terminal.Screen) -> int:
    parser = argparse.ArgumentParser(prog="chat.py models", description="List the known models, or fetch one.")
    parser.add_argument("--get", metavar="ALIAS", help="download the weights of ALIAS")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    from sparsevila.engine import hub

    if args.get:
        folder = hub.download(args.get, progress=screen.progress)
        screen.clear_progress()
        screen.note(f"{args.get} is in {folder.path}")
        return 0
    rows = [
        (
            f"{row.alias:22}{row.repository:46}{terminal.format_bytes(row.size_bytes):>9}  {row.licence}",
            str(row.found or "not here"),
        )
        for row in hub.list_models()
    ]
    print(table(rows), flush=True)
    return 0


def run_doctor() -> int:
    from sparsevila.engine import doctor

    for name, value in doctor.report(__version__):
        print(f"{name:24} {value}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
