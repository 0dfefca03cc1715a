"""Prompt pieces to token ids: text is tokenised as text, special tokens by name."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CorruptCheckpoint, InvalidRequest
from ..models.interface import PromptPiece, Special, VisionLanguageModel
from .tokenizer import Tokenizer

MAX_TEXT_BYTES = 1 << 20  # of one prompt: above any context, and small enough to tokenise in a second


def check_text(name: str, text: str) -> None:
    """Raises InvalidRequest for what is no usable text, before any work is done on it."""
    if not isinstance(text, str) or not text.strip():
        raise InvalidRequest(f"{name}: expected some text, got {'nothing' if isinstance(text, str) else type(text)}")
    size = len(text.encode("utf-8", errors="surrogatepass"))
    if size > MAX_TEXT_BYTES:
        raise InvalidRequest(f"{name}: expected at most {MAX_TEXT_BYTES:,} bytes of text, got {size:,}")


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[PromptPiece], *, start: bool) -> tuple[int, ...]:
    """Ids of the pieces; neighbouring texts are tokenised as one.

    `start`: the pieces begin the whole prompt, so their first text gets the tokenizer's prefix.
    """
    ids: list[int] = []
    text = ""
    for piece in [*pieces, None]:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            ids += tokenizer.encode(text, first=start)
            start, text = False, ""
        if isinstance(piece, Special):
            ids.append(tokenizer.special_id(piece.name))
    return tuple(ids)


def check_media_tokens(tokenizer: Tokenizer, model: VisionLanguageModel) -> None:
    """Raises CorruptCheckpoint if config and tokenizer disagree about a media token."""
    for name, expected in model.media_tokens.items():
        found = tokenizer.special_id(name)
        if found != expected:
            raise CorruptCheckpoint(f"token {name}: config.json says {expected}, the tokenizer says {found}")
