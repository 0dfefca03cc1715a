"""Text to token ids and back, from a checkpoint's own tokenizer files.

The only file that imports tokenizer packages. Two backends: SentencePiece (`tokenizer.model`) and BPE in a
`tokenizer.json`, both Llama-like (a space is U+2581, bytes are pieces) and byte-level (Qwen, Llama 3). Qwen's older
form, `vocab.json` with `merges.txt`, is turned into the latter. Of a folder of sub-models it is the language model's
folder that has them.

Where a folder has both files, `tokenizer.model` is taken: it is what the model was trained with, and
`tokenizer.json` is made from it by converters of which several left a wrong normaliser or prefix rule.

Added tokens, bos, eos and every other special token exist by id and by name only: what a user types is
text, also where it spells a special token.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from ..errors import CorruptCheckpoint, InvalidRequest, UnsupportedModel
from ..models.checkpoint import MAX_TOKENIZER_BYTES, Checkpoint, shown

SPACE: Final = "\u2581"  # how SentencePiece writes a space
MAX_VOCAB: Final = 1 << 22  # the largest vocabularies in use have 256 thousand entries
_QWEN2_CLASSES: Final = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# How Qwen2 cuts text before BPE. Source: Qwen2Converter of transformers.
_QWEN2_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PROBE: Final = "A b\n\u00e9 \U0001f600 1"  # encoded once at load: a backend that cannot is found out there

Encode = Callable[[str, bool], list[int]]  # (text, first) -> ids


@dataclass
class _Vocabulary:
    """What a backend knows: the text of its ids, and which of them are not text."""

    file: str
    encode: Encode
    texts: dict[int, bytes]
    has_prefix: bool  # a space is put before the first word, and taken away when decoding
    names: dict[str, int] = field(default_factory=dict)  # control tokens by name
    unk_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    adds_bos: bool = True
    ids: Mapping[str, int] = field(default_factory=dict)  # every piece, for tokens that only a config names


class Tokenizer:
    """Ids for text, bytes for ids. Immutable; may be shared by threads.

    `vocab_size` is the highest id + 1, added tokens included. `bos_id` begins a prompt and is None where this
    tokenizer begins none so; `eos_ids` end an answer. `drops_first_space`: the first space of decoded text
    stands for the prefix that encoding puts before the first word.
    """

    def __init__(
        self,
        vocabulary: _Vocabulary,
        names: Mapping[str, int],
        texts: Mapping[int, bytes],
        *,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
    ) -> None:
        """Use `load_tokenizer`."""
        self._vocabulary = vocabulary
        self._names = dict(names)
        self._texts = dict(texts)
        self.vocab_size = max(self._texts) + 1
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.drops_first_space = vocabulary.has_prefix
        # Ids that no text may produce. The unknown token is what a vocabulary without bytes gives.
        self._never_text = {i for i, text in self._texts.items() if not text} - {vocabulary.unk_id}
        names_longest_first = sorted((n for n in names if len(n) > 1), key=len, reverse=True)
        self._name_pattern = re.compile("|".join(map(re.escape, names_longest_first)) or r"(?!)")

    def encode(self, text: str, *, first: bool) -> list[int]:
        """The ids of plain text; never bos, eos or another special token, whatever the text spells.

        `first` says that the text stands at the start of the whole prompt (bos aside); only there a
        SentencePiece-like tokenizer puts its prefix space. Raises InvalidRequest for lone surrogates.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"text: not valid Unicode, a lone surrogate at character {error.start}") from None
        ids = self._raw(text, first)
        if self._never_text.isdisjoint(ids):
            return ids
        # A special token's name was matched. Cut every name after its first character, so that none is whole.
        cuts = [0, *(match.start() + 1 for match in self._name_pattern.finditer(text)), len(text)]
        ids = []
        for start, end in itertools.pairwise(cuts):
            ids += self._halved(text[start:end], first and start == 0)
        return ids

    def special_id(self, name: str) -> int:
        """The id of a control or added token. Raises CorruptCheckpoint if the tokenizer has none of that name."""
        if name not in self._names:
            raise CorruptCheckpoint(f"{self._vocabulary.file}: no special token {shown(name)}")
        return self._names[name]

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text: nothing for special tokens and for ids without a token."""
        return self._texts.get(token_id, b"")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(map(self.token_bytes, ids))
        if self.drops_first_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def _raw(self, text: str, first: bool) -> list[int]:
        return self._vocabulary.encode(text, first) if text else []

    def _halved(self, text: str, first: bool) -> list[int]:
        """Ids of a text without names in it; a normaliser may still make one, then smaller parts are taken."""
        ids = self._raw(text, first)
        if self._never_text.isdisjoint(ids):
            return ids
        if len(text) == 1:
            return [i for i in ids if i not in self._never_text]
        middle = len(text) // 2
        return self._halved(text[:middle], first) + self._halved(text[middle:], False)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises CorruptCheckpoint, or UnsupportedModel for another kind of tokenizer."""
    checkpoint = checkpoint.language
    config = checkpoint.read_json("tokenizer_config.json") or {}
    if checkpoint.has("tokenizer.model"):
        vocabulary = _sentencepiece(checkpoint.read_bytes("tokenizer.model", MAX_TOKENIZER_BYTES))
    elif checkpoint.has("vocab.json") and not checkpoint.has("tokenizer.json"):
        vocabulary = _tokenizer_json(_from_vocab_and_merges(checkpoint, config))
    else:
        whole = checkpoint.read_json("tokenizer.json", required=True, max_bytes=MAX_TOKENIZER_BYTES)
        vocabulary = _tokenizer_json(whole)
    names, texts = dict(vocabulary.names), dict(vocabulary.texts)
    for name, (token_id, is_special) in _added_tokens(checkpoint, config).items():
        known = vocabulary.ids.get(name, token_id)
        if known != token_id or (token_id in vocabulary.texts and vocabulary.ids.get(name) != token_id):
            _corrupt(vocabulary.file, f"added token {shown(name)} has the id {token_id} of another token")
        names[name] = token_id
        texts[token_id] = b"" if is_special else name.encode("utf-8", errors="replace")
    bos_id, eos_ids = _ends(checkpoint, config, vocabulary, names)
    texts.update(dict.fromkeys(eos_ids if bos_id is None else (bos_id, *eos_ids), b""))
    tokenizer = Tokenizer(vocabulary, names, texts, bos_id=bos_id, eos_ids=eos_ids)
    for first in (True, False):
        ids = tokenizer.encode(_PROBE, first=first)
        if not ids or not all(i in texts for i in ids):
            _corrupt(vocabulary.file, "gives no ids, or unknown ones, for plain text")
    return tokenizer


def _corrupt(file: str, reason: str) -> NoReturn:
    raise CorruptCheckpoint(f"{file}: {reason}", hint="download or copy the file again")


# Backends -----------------------------------------------------------------------------------------------------------


def _sentencepiece(data: bytes) -> _Vocabulary:
    import sentencepiece

    file = "tokenizer.model"
    if not data:  # the package accepts it and fails at the first use
        _corrupt(file, "empty")
    try:
        with_prefix = sentencepiece.SentencePieceProcessor(model_proto=data)
        plain = sentencepiece.SentencePieceProcessor(model_proto=data)
        plain.override_normalizer_spec(add_dummy_prefix=False)
        size = with_prefix.get_piece_size()
        if not 0 < size <= MAX_VOCAB:
            _corrupt(file, f"expected 1 to {MAX_VOCAB} pieces, got {size}")
        pieces = [with_prefix.id_to_piece(i) for i in range(size)]
        has_prefix = with_prefix.normalize("x").startswith(SPACE)
    except (RuntimeError, OSError, ValueError, TypeError, IndexError):
        _corrupt(file, "not a SentencePiece model")
    hidden = [i for i in range(size) if plain.is_control(i) or plain.is_unknown(i)]
    texts = {i: _piece_bytes(piece, is_byte=plain.is_byte(i)) for i, piece in enumerate(pieces)}
    texts.update(dict.fromkeys(hidden, b""))

    def encode(text: str, first: bool) -> list[int]:
        try:
            return (with_prefix if first else plain).encode(text)
        except (RuntimeError, ValueError):
            _corrupt(file, "cannot encode text")

    return _Vocabulary(
        file,
        encode,
        texts,
        has_prefix,
        names={pieces[i]: i for i in hidden},
        unk_id=plain.unk_id(),
        bos_id=_or_none(plain.bos_id()),
        eos_id=_or_none(plain.eos_id()),
        ids={piece: i for i, piece in enumerate(pieces)},
    )


def _or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _piece_bytes(piece: str, *, is_byte: bool) -> bytes:
    if is_byte and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode("utf-8", errors="replace")


def _tokenizer_json(values: dict[str, Any]) -> _Vocabulary:
    import tokenizers

    file = "tokenizer.json"
    model = values.get("model")
    if not isinstance(model, dict):
        _corrupt(file, "expected a model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise UnsupportedModel(f"{file}: expected a tokenizer of type BPE, got {shown(kind)}")
    ids = _checked_vocab(file, model.get("vocab"))
    steps = _Steps(file)
    stripped: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],  # so that special tokens in text stay text
        "normalizer": steps.strip(values.get("normalizer")),
        "pre_tokenizer": steps.strip(values.get("pre_tokenizer")),
        "post_processor": None,  # bos and eos are the prompt's business
        "decoder": None,
        "model": {**model, "dropout": None},  # training leaves dropout in, and then ids would be random
    }
    if steps.is_byte_level:
        table = _byte_level_table()
        texts = {i: _byte_level_bytes(piece, table) for piece, i in ids.items()}
    elif steps.marks_spaces:
        has_bytes = model.get("byte_fallback") is True
        texts = {i: _piece_bytes(piece, is_byte=has_bytes) for piece, i in ids.items()}
    else:
        raise UnsupportedModel(f"{file}: expected byte-level pieces, or spaces written as U+2581; found neither")
    unk_id = ids.get(model.get("unk_token") or "")
    if unk_id is not None:
        texts[unk_id] = b""
    backend = _guarded(file, "not a tokenizer", lambda: tokenizers.Tokenizer.from_str(json.dumps(stripped)))

    def encode(text: str, first: bool) -> list[int]:
        whole = SPACE + text if first and steps.has_prefix else text
        return _guarded(file, "cannot encode text", lambda: backend.encode(whole, add_special_tokens=False).ids)

    return _Vocabulary(
        file,
        encode,
        texts,
        steps.has_prefix,
        unk_id=unk_id,
        adds_bos=not steps.is_byte_level or _template_begins_with_token(values.get("post_processor")),
        ids=ids,
    )


def _from_vocab_and_merges(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `tokenizer.json` would hold of a Qwen2 tokenizer that was saved as `vocab.json` and `merges.txt`.

    Those two do not say how text is cut: the class that the config names does, and another one is refused.
    """
    kind = config.get("tokenizer_class")
    if kind not in _QWEN2_CLASSES:
        raise UnsupportedModel(f"vocab.json with merges.txt: expected a {_QWEN2_CLASSES[0]}, got {shown(kind)}")
    try:
        lines = checkpoint.read_bytes("merges.txt", MAX_TOKENIZER_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        _corrupt("merges.txt", "expected UTF-8 text")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if not all(len(pair) == 2 and all(pair) for pair in merges):
        _corrupt("merges.txt", "expected two pieces a line")
    split = {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {
            "type": "BPE",
            "vocab": checkpoint.read_json("vocab.json", required=True, max_bytes=MAX_TOKENIZER_BYTES),
            "merges": merges,
        },
    }


def _guarded(file: str, reason: str, call: Callable[[], Any]) -> Any:
    """The `tokenizers` package raises plain Exception for bad files, and a BaseException where its core panics."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:  # noqa: BLE001 - the package has no narrower type
        _corrupt(file, reason)


def _checked_vocab(file: str, vocab: object) -> dict[str, int]:
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= MAX_VOCAB:
        _corrupt(file, f"expected a vocabulary of 1 to {MAX_VOCAB} pieces")
    for piece, token_id in vocab.items():
        _check_id(file, piece, token_id)
    if len(set(vocab.values())) != len(vocab):
        _corrupt(file, "two pieces of the vocabulary share an id")
    return vocab


def _check_id(file: str, name: object, token_id: object) -> int:
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < MAX_VOCAB:
        _corrupt(file, f"token {shown(name)}: expected an id from 0 to {MAX_VOCAB - 1}, got {shown(token_id)}")
    return token_id


class _Steps:
    """Walks the normaliser and the pre-tokenizer and takes the prefix rule out of them.

    The prefix is then put before the text by hand where it is due. That is what SentencePiece does;
    `tokenizers` leaves it out before a text that begins with a space.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self.has_prefix = False
        self.marks_spaces = False
        self.is_byte_level = False

    def strip(self, step: object) -> dict[str, Any] | None:
        """The step without its prefix rule; None where nothing remains."""
        if step is None:
            return None
        if not isinstance(step, dict):
            _corrupt(self._file, f"expected a step with a type, got {shown(step)}")
        kind = step.get("type")
        if kind == "Sequence":
            key = "normalizers" if "normalizers" in step else "pretokenizers"
            inner = step.get(key)
            if not isinstance(inner, list):
                _corrupt(self._file, f"Sequence: expected a list of steps, got {shown(inner)}")
            return {"type": kind, key: [kept for each in inner if (kept := self.strip(each)) is not None]}
        if kind == "Prepend":
            if step.get("prepend") != SPACE:
                raise UnsupportedModel(f"{self._file}: Prepend: expected U+2581, got {shown(step.get('prepend'))}")
            self.has_prefix = True
            return None
        if kind == "Metaspace":
            return self._strip_metaspace(step)
        if kind == "Replace" and step.get("content") == SPACE:
            self.marks_spaces = True
        if kind == "ByteLevel":
            self.is_byte_level = True
            if step.get("add_prefix_space"):
                raise UnsupportedModel(f"{self._file}: ByteLevel with add_prefix_space is not supported")
        return step

    def _strip_metaspace(self, step: dict[str, Any]) -> dict[str, Any]:
        if step.get("replacement") != SPACE:
            raise UnsupportedModel(f"{self._file}: Metaspace: expected U+2581, got {shown(step.get('replacement'))}")
        self.marks_spaces = True
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        self.has_prefix = self.has_prefix or scheme != "never"
        return {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "never",
            "split": step.get("split", True),
        }


def _template_begins_with_token(processor: object) -> bool:
    """Whether a post-processor puts a special token first."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        inner = processor.get("processors")
        return isinstance(inner, list) and any(map(_template_begins_with_token, inner))
    template = processor.get("single")
    begins = template[0] if isinstance(template, list) and template else None
    return isinstance(begins, dict) and "SpecialToken" in begins


def _byte_level_bytes(piece: str, table: Mapping[str, int]) -> bytes:
    return b"".join(bytes([table[c]]) if c in table else c.encode("utf-8", errors="replace") for c in piece)


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes. Source: openai/gpt-2, src/encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


# Names --------------------------------------------------------------------------------------------------------------


def _added_tokens(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Name -> (id, whether it is special) from every file that lists added tokens."""
    found: dict[str, tuple[int, bool]] = {}
    for file, name, token_id, is_special in _added_entries(checkpoint, config):
        if not isinstance(name, str) or len(name) < 2:
            _corrupt(file, f"added token {shown(name)}: expected a name of two characters or more")
        checked = _check_id(file, name, token_id)
        if name in found and found[name][0] != checked:
            _corrupt(file, f"added token {shown(name)}: expected the id {found[name][0]}, got {checked}")
        found.setdefault(name, (checked, is_special))
    if len({token_id for token_id, _ in found.values()}) != len(found):
        _corrupt("tokenizer_config.json", "two added tokens share an id")
    return found


def _added_entries(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterable[tuple[str, Any, Any, bool]]:
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        _corrupt("tokenizer_config.json", "added_tokens_decoder: expected an object")
    for key, entry in decoder.items():
        token_id = int(key) if re.fullmatch(r"[0-9]{1,9}", key) else key
        if not isinstance(entry, dict):
            _corrupt("tokenizer_config.json", f"added token {shown(key)}: expected an object")
        yield "tokenizer_config.json", entry.get("content"), token_id, entry.get("special") is not False
    whole = checkpoint.read_json("tokenizer.json", max_bytes=MAX_TOKENIZER_BYTES) or {} if not decoder else {}
    listed = whole.get("added_tokens") or []
    if not isinstance(listed, list):
        _corrupt("tokenizer.json", "added_tokens: expected a list")
    for entry in listed:
        if not isinstance(entry, dict):
            _corrupt("tokenizer.json", "added_tokens: expected objects")
        yield "tokenizer.json", entry.get("content"), entry.get("id"), entry.get("special") is not False
    for name, token_id in (checkpoint.read_json("added_tokens.json") or {}).items():
        yield "added_tokens.json", name, token_id, True


def _ends(
    checkpoint: Checkpoint, config: dict[str, Any], vocabulary: _Vocabulary, names: dict[str, int]
) -> tuple[int | None, tuple[int, ...]]:
    """The id that begins a prompt and those that end an answer. Names that only a config knows join `names`."""
    named = {**(checkpoint.read_json("special_tokens_map.json") or {}), **config}

    def resolve(key: str, default: int | None) -> int | None:
        if key not in named:
            return default
        value = named[key]
        name = value.get("content") if isinstance(value, dict) else value
        if name is None:
            return None
        token_id = names.get(name, vocabulary.ids.get(name)) if isinstance(name, str) else None
        if token_id is None:
            _corrupt("tokenizer_config.json", f"{key}: {shown(name)} is not in the vocabulary")
        names[name] = token_id
        return token_id

    bos = resolve("bos_token", vocabulary.bos_id)
    eos = resolve("eos_token", vocabulary.eos_id)
    if config.get("add_bos_token", vocabulary.adds_bos) is not True:
        bos = None
    stated = _stated_eos(checkpoint, known={*vocabulary.texts, *names.values()})
    return bos, tuple(sorted({*stated, *(() if eos is None else (eos,))}))


def _stated_eos(checkpoint: Checkpoint, known: set[int]) -> list[int]:
    """`eos_token_id` of the first config that states one; a number or a list of numbers."""
    text_config = checkpoint.config.get("text_config")
    places = {
        "generation_config.json": checkpoint.read_json("generation_config.json"),
        "config.json": checkpoint.config,
        "config.json: text_config": text_config if isinstance(text_config, dict) else {},
    }
    for file, config in places.items():
        value = (config or {}).get("eos_token_id")
        if value is not None:
            stated = [_check_id(file, "eos_token_id", each) for each in (value if isinstance(value, list) else [value])]
            for token_id in stated:
                if token_id not in known:
                    _corrupt(file, f"eos_token_id: {token_id} is not in the vocabulary")
            return stated
    return []
