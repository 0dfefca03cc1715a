"""What a person types: flags, slash commands, dropped paths. Text to values, no engine, no terminal.

The command line and the prompt share the tables and parsers below, so what works in one way works in
the other: `--frames 8`, `/video clip.mp4 --frames 8` and `/set frames 8` are the same option.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn
from urllib.parse import unquote

from ..errors import InvalidRequest
from .config import Image, SamplingParams, Sparsity, Video
from .switches import SWITCHES, parse_switches

MAX_CHAT_SPARSITY = 0.95  # the API takes anything below 1; a person who types 0.99 has mistaken the direction

MediaKind = Literal["image", "video"]


# ---- values


def parse_time(text: str) -> float:
    """Seconds from `12.5`, `1:30` or `1:02:03.5`."""
    parts = text.split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    whole = all(part.isdigit() for part in parts[:-1])
    small = all(0 <= n < 60 for n in numbers[1:])
    if not 1 <= len(numbers) <= 3 or not whole or not small or not math.isfinite(numbers[0]):
        raise InvalidRequest(f"expected a time in seconds or as [h:]m:s, got {text!r}")
    return math.fsum(n * 60**i for i, n in enumerate(reversed(numbers)))


def parse_sparsity(text: str) -> float | None:
    """A fraction removed, 0 to 0.95; None for `auto`."""
    if text == "auto":
        return None
    value = parse_float(text)
    if not 0 <= value <= MAX_CHAT_SPARSITY:
        raise InvalidRequest(f"expected auto or a fraction from 0 to {MAX_CHAT_SPARSITY}, got {text}")
    return value


def parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidRequest(f"expected a whole number, got {text!r}") from None


def parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"expected a number, got {text!r}") from None


def parse_policy(text: str) -> str:
    """`NAME=VALUE[,NAME=VALUE...]` of a policy's switches, as it stands once it can be read."""
    parse_switches(text)
    return text


def parse_switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise InvalidRequest(f"expected on or off, got {text!r}")
    return text == "on"


# ---- options: one table for the flags, `/set` and the options of `/video`


@dataclass(frozen=True)
class Settings:
    """What the next question is asked with. `video` is a pattern whose source is filled in later."""

    params: SamplingParams = field(default_factory=SamplingParams)
    video: Video = field(default_factory=lambda: Video(""))
    prefill_sparsity: float | None = None  # None: the default of the model and the media kind
    decode_sparsity: float | None = None
    method: str = Sparsity.method
    switch: tuple[str, ...] = ()  # as `parse_switches` reads them


Owner = Literal["params", "video", "sparsity"]


@dataclass(frozen=True)
class Option:
    """One setting: `key` is the field's name, `owner` the value it belongs to."""

    key: str
    owner: Owner
    parse: Callable[[str], Any]
    metavar: str
    help: str
    repeat: bool = False  # the flag may be given several times

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")


OPTIONS = (
    Option("frames", "video", parse_int, "N", "frames to take from a video"),
    Option("fps", "video", parse_float, "R", "frames per second to take, instead of --frames"),
    Option("start", "video", parse_time, "T", "where to begin: seconds or [h:]m:s"),
    Option("end", "video", parse_time, "T", "where to end"),
    Option("strict", "video", parse_switch, "", "refuse a damaged file instead of using its readable part"),
    Option("max_new_tokens", "params", parse_int, "N", "longest answer in tokens"),
    Option("temperature", "params", parse_float, "X", "0 is greedy"),
    Option("top_p", "params", parse_float, "X", "keep the likeliest tokens up to this share; 1 is off"),
    Option("top_k", "params", parse_int, "N", "keep the N likeliest tokens; 0 is off"),
    Option("seed", "params", parse_int, "N", "of the sampler; the same seed gives the same answer"),
    Option("stop", "params", str, "TEXT", "end the answer before TEXT; may be repeated", repeat=True),
    Option("prefill_sparsity", "sparsity", parse_sparsity, "auto|X", "share of visual tokens pruned before prefill"),
    Option("decode_sparsity", "sparsity", parse_sparsity, "auto|X", "share of kept visual tokens not read per answer"),
    Option("method", "sparsity", str, "NAME", "sparsity method"),
    Option("switch", "sparsity", parse_policy, "NAME=VALUE", f"of the method: {', '.join(SWITCHES)}", repeat=True),
)


def option(key: str) -> Option:
    """The option called `key`, with `-` or `_`. Raises InvalidRequest with the nearest name."""
    wanted = key.lower().replace("-", "_")
    for row in OPTIONS:
        if row.key == wanted:
            return row
    near = nearest(wanted, [row.key for row in OPTIONS])
    raise InvalidRequest(f"no setting is called {key!r}", hint=f"did you mean {near}?" if near else "see /show params")


def default_of(row: Option) -> Any:
    """The default of an option, read from the dataclass field that owns it."""
    settings = Settings()
    return getattr(getattr(settings, row.owner, settings), row.key)


def apply(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """`settings` with parsed `values` by key. All at once, so that a contradiction among them is seen."""
    grouped: dict[Owner, dict[str, Any]] = {"params": {}, "video": {}, "sparsity": {}}
    for key, value in values.items():
        grouped[option(key).owner][key] = value
    return replace(
        settings,
        params=replace(settings.params, **grouped["params"]),
        video=replace(settings.video, **grouped["video"]),
        **grouped["sparsity"],
    )


def set_option(settings: Settings, key: str, text: str) -> Settings:
    """`settings` after `/set key text`; `default` brings the default back. Frames and fps replace each other."""
    row = option(key)
    if text == "default":
        return apply(settings, {row.key: default_of(row)})
    try:
        value = row.parse(text)
    except InvalidRequest as error:
        raise InvalidRequest(f"{row.key}: {error}") from None
    values = {row.key: (value,) if row.repeat else value}
    values |= {"frames": {"fps": None}, "fps": {"frames": None}}.get(row.key, {})
    return apply(settings, values)


def add_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup, owners: tuple[Owner, ...]) -> None:
    """Give `parser` the flags of `owners`. What is not typed is not in the namespace: defaults stay in the fields."""
    for row in OPTIONS:
        if row.owner not in owners:
            continue
        default = default_of(row)
        shown = "" if default is None or default is False or default == () else f" (default: {default})"
        common: dict[str, Any] = {"dest": row.key, "default": argparse.SUPPRESS, "help": row.help + shown}
        if row.parse is parse_switch:
            parser.add_argument(row.flag, action="store_true", **common)
        else:
            action = "append" if row.repeat else "store"
            parser.add_argument(row.flag, type=_argument(row.parse), metavar=row.metavar, action=action, **common)


def typed_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """The values of the options that were typed, by key, as `apply` takes them."""
    found = {row.key: getattr(namespace, row.key) for row in OPTIONS if hasattr(namespace, row.key)}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` in the manner of argparse, which adds the flag's name to the message."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except InvalidRequest as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


# ---- words and paths


def take_word(text: str) -> tuple[str, str]:
    r"""The first word and the rest. `'...'`, `"..."` and `\ ` join; a quote that is never closed is a character."""
    text = text.lstrip()
    word: list[str] = []
    i = 0
    while i < len(text) and not text[i].isspace():
        char = text[i]
        if char == "\\" and i + 1 < len(text):
            word.append(text[i + 1])
            i += 2
        elif char in "'\"" and (close := text.find(char, i + 1)) > 0:
            word.append(text[i + 1 : close])
            i = close + 1
        else:
            word.append(char)
            i += 1
    return "".join(word), text[i:].lstrip()


def split_words(text: str) -> list[str]:
    """All words of a line."""
    words = []
    while text := text.lstrip():
        word, text = take_word(text)
        words.append(word)
    return words


def clean_path(word: str) -> str:
    """A local path from what a terminal or a file manager pastes: `file://` addresses and `~` are resolved."""
    if word.startswith("file://"):
        host, slash, path = word.removeprefix("file://").partition("/")
        if host not in ("", "localhost"):
            raise InvalidRequest(f"expected a file on this machine, got {word!r}")
        return unquote(slash + path)
    return os.path.expanduser(word)


def is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except (ValueError, OSError):  # a NUL byte, a name that is too long
        return False


def media_kind(path: str) -> MediaKind:
    """Whether a dropped file is a picture or a clip, by its first bytes. What is neither is refused as a picture."""
    from .media_file import read_head, sniff  # brings torch, which a line at the prompt finds loaded and --help not

    try:
        with open(path, "rb") as file:
            return "video" if sniff(read_head(file)).kind == "video" else "image"
    except OSError:
        return "image"


# ---- slash commands


@dataclass(frozen=True)
class Command:
    """One slash command, as `/help` shows it."""

    name: str
    usage: str
    summary: str
    aliases: tuple[str, ...] = ()


COMMANDS = (
    Command("image", "/image FILE...", "attach pictures to the next question"),
    Command("video", "/video FILE... [--frames N | --fps R] [--start T] [--end T] [--strict]", "attach clips"),
    Command("media", "/media", "list what is attached, with tokens kept and in all"),
    Command("drop", "/drop N", "remove item N of /media"),
    Command("clear", "/clear", "forget the turns, keep the media"),
    Command("reset", "/reset", "forget the turns and the media"),
    Command("undo", "/undo", "drop the last question and its answer"),
    Command("retry", "/retry", "ask the last question again"),
    Command("sparsity", "/sparsity [PREFILL DECODE | auto]", "show or set the shares of visual tokens removed"),
    Command("set", "/set KEY VALUE", "change a setting; the value `default` brings the default back"),
    Command("show", "/show [params | model | memory]", "show the state"),
    Command("stats", "/stats [on | off]", "the line of figures after each answer"),
    Command("system", "/system [TEXT]", "set the system text; without TEXT, remove it"),
    Command("help", "/help [COMMAND]", "this list, or one command"),
    Command("exit", "/exit", "leave (also Ctrl-D)", aliases=("bye", "quit")),
)


def command(name: str) -> Command | None:
    """The command called `name` or by one of its aliases."""
    return next((c for c in COMMANDS if name == c.name or name in c.aliases), None)


def command_names() -> list[str]:
    return [name for c in COMMANDS for name in (c.name, *c.aliases)]


def nearest(word: str, names: list[str]) -> str | None:
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return found[0] if found else None


# ---- a line at the prompt


@dataclass(frozen=True)
class Ask:
    """A question for the model."""

    text: str


@dataclass(frozen=True)
class Attach:
    """Media to attach, and the question that stood behind them on the line, if any."""

    items: tuple[Image | Video, ...]
    question: str = ""


@dataclass(frozen=True)
class Run:
    """A slash command other than `/image` and `/video`."""

    name: str
    rest: str


def parse_line(line: str, settings: Settings) -> Ask | Attach | Run | None:
    """What a typed line means; None for an empty one.

    A first word that names a file is media, otherwise a leading `/` is a command, `//` sends the line
    with one slash to the model. A bare word without `/` or `.` counts as a file only when it stands
    alone, so that a question may begin with a word that happens to be a file name.
    Raises InvalidRequest for an unknown command, with the nearest name.
    """
    line = line.strip()
    if not line:
        return None
    if line.startswith("//"):
        return Ask(line[1:])
    if (dropped := _dropped_media(line, settings)) is not None:
        return dropped
    if not line.startswith("/"):
        return Ask(line)
    name, _, rest = line[1:].partition(" ")
    found = command(name)
    if found is None:
        raise InvalidRequest(f"there is no command /{name}", hint=_unknown_hint(name))
    if found.name in ("image", "video"):
        return Attach(_named_media(found, rest.strip(), settings))
    return Run(found.name, rest.strip())


def _unknown_hint(name: str) -> str:
    near = nearest(name, command_names())
    if "/" in name:
        return "and no file of that name"
    return f"did you mean /{near}?" if near else "/help lists them; begin with // to send a line that starts with /"


def _dropped_media(line: str, settings: Settings) -> Attach | None:
    if is_file(path := clean_or_none(line)):
        return Attach((media_item(path, settings.video),))
    items: list[Image | Video] = []
    rest = line
    while rest:
        word, after = take_word(rest)
        path = clean_or_none(word)
        if not is_file(path) or not (_looks_like_path(rest, word) or not (after or items)):
            break
        items.append(media_item(path, settings.video))
        rest = after
    return Attach(tuple(items), rest) if items else None


def _looks_like_path(text: str, word: str) -> bool:
    return text[0] in "'\"" or "/" in word or "." in word.strip(".")


def clean_or_none(word: str) -> str:
    """`clean_path`, with the empty path for an address of another machine."""
    try:
        return clean_path(word)
    except InvalidRequest:
        return ""


def media_item(path: str, pattern: Video) -> Image | Video:
    """The media value of a file, its kind told from the content."""
    return Image(path) if media_kind(path) == "image" else replace(pattern, source=path)


def _named_media(found: Command, rest: str, settings: Settings) -> tuple[Image | Video, ...]:
    """The items of `/image` or `/video`. A rest that is one existing path needs no quotes."""
    parser = LineParser(prog=f"/{found.name}", add_help=False, usage=found.usage)
    parser.add_argument("files", nargs="+", metavar="FILE")
    if found.name == "video":
        add_options(parser, ("video",))
    whole = clean_or_none(rest)
    namespace = parser.parse_args(["--", whole] if is_file(whole) else split_words(rest))
    paths = [clean_path(word) for word in namespace.files]
    if found.name == "image":
        return tuple(Image(path) for path in paths)
    typed = typed_options(namespace)
    if "frames" in typed and "fps" not in typed:
        typed["fps"] = None  # what stands on the line replaces what was set before
    elif "fps" in typed and "frames" not in typed:
        typed["frames"] = None
    pattern = apply(settings, typed).video
    return tuple(replace(pattern, source=path) for path in paths)


class LineParser(argparse.ArgumentParser):
    """argparse for a line at the prompt: a mistake is an InvalidRequest, not the end of the program."""

    def error(self, message: str) -> NoReturn:
        raise InvalidRequest(f"{self.prog}: {message}", hint=f"usage: {self.usage}")


# ---- completion


def complete(line: str) -> Iterator[tuple[int, str]]:
    """Completions of `line`: how many characters to replace at its end, and with what."""
    if not line.startswith("/"):
        return
    name, space, rest = line[1:].partition(" ")
    if not space:
        yield from ((len(name), f"{n} ") for n in command_names() if n.startswith(name))
    elif name in ("image", "video"):
        yield from _complete_path(rest)
    elif name == "set" and " " not in rest:
        yield from ((len(rest), f"{row.key} ") for row in OPTIONS if row.key.startswith(rest))
    elif name == "help":
        yield from ((len(rest), n) for n in command_names() if n.startswith(rest))


def _complete_path(text: str) -> Iterator[tuple[int, str]]:
    start = _last_word_start(text)
    typed = take_word(text[start:])[0].lstrip("'\"")
    folder, _, stem = os.path.expanduser(typed).rpartition("/")
    folder = folder + "/" if "/" in typed else folder
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        return
    head = typed[: len(typed) - len(stem)]
    for entry in entries:
        if entry.name.startswith(stem) and (stem or not entry.name.startswith(".")):
            end = "/" if entry.is_dir() else " "
            yield len(text) - start, _escape(head + entry.name) + end


def _last_word_start(text: str) -> int:
    """Where the word at the end of `text` begins, escapes and open quotes respected."""
    start, quote, i = 0, "", 0
    while i < len(text):
        char = text[i]
        if char == "\\":
            i += 1
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char.isspace():
            start = i + 1
        i += 1
    return start


def _escape(path: str) -> str:
    return "".join("\\" + c if c in " '\"\\" else c for c in path)


def describe(value: Any) -> str:
    """A setting's value as `/show` prints it."""
    if value is None:
        return "auto"
    if isinstance(value, tuple):
        return " ".join(repr(v) for v in value) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def show_settings(settings: Settings) -> list[tuple[str, str]]:
    """Every option with its present value."""
    return [(row.key, describe(getattr(getattr(settings, row.owner, settings), row.key))) for row in OPTIONS]
