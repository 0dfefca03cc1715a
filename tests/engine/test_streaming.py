"""Streamed text equals decoded text, whatever the cut; stop strings end it at the right token."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsevila.engine.streaming import TextStream


class Pieces:
    """A tokenizer of literal byte pieces: token i has the bytes pieces[i]."""

    def __init__(self, pieces: list[bytes], *, drops_first_space: bool = False) -> None:
        self.pieces = pieces
        self.drops_first_space = drops_first_space

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def decode(self, ids: list[int]) -> str:
        """As `Tokenizer.decode` does."""
        data = b"".join(map(self.token_bytes, ids))
        data = data.removeprefix(b" ") if self.drops_first_space else data
        return data.decode("utf-8", errors="replace")


def run(tokenizer: Pieces, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[TextStream, list[str]]:
    """Push until a stop string comes; the last piece is what `flush` returns."""
    stream, shown = TextStream(tokenizer, stop), []
    for token_id in ids:
        shown.append(stream.push(token_id))
        if stream.stopped:
            break
    return stream, [*shown, stream.flush()]


def first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """The definition: read on by one character until some stop string is complete."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return min(starts)
    return None


UNITS = [b"a", b"b", b"ab", b" ", b" a", b"", b"\n", "é".encode(), "猫".encode(), "😀".encode(), b"aba", b"\0"]
BYTES = [bytes([b]) for b in (0xC3, 0xA9, 0xE7, 0x8C, 0xAB, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0x61)]
PIECES = UNITS + BYTES
IDS = st.lists(st.integers(0, len(PIECES) - 1), max_size=25)
STOPS = st.lists(st.text("ab 猫é😀\n\ufffd", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(max_examples=500, deadline=None)
@given(IDS, st.booleans())
def test_pieces_concatenate_to_the_decoded_text(ids, drops):
    tokenizer = Pieces(PIECES, drops_first_space=drops)
    stream, shown = run(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids)
    assert stream.kept_tokens == len(ids)
    assert not stream.stopped


@settings(max_examples=1000, deadline=None)
@given(IDS, STOPS, st.booleans())
@example([0, 1, 0], ("ba",), False)
@example([0, 10], ("ab", "b"), False)
@example([10], ("aba", "b"), False)
@example([3, 0, 1], ("ab",), True)
@example([14, 15, 16, 0], ("猫a",), False)
@example([4, 4], ("a a",), True)
def test_stop_strings_against_the_definition(ids, stop, drops):
    tokenizer = Pieces(PIECES, drops_first_space=drops)
    whole = tokenizer.decode(ids)
    stream, shown = run(tokenizer, ids, stop)
    start = first_stop(whole, stop)
    assert "".join(shown) == whole[:start]
    assert stream.stopped == (start is not None)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, len(UNITS) - 1), max_size=25), STOPS, st.data())
def test_the_cut_into_tokens_does_not_matter(ids, stop, data):
    """The same bytes, cut anywhere, give the same text."""
    whole = b"".join(PIECES[i] for i in ids)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    _, one = run(Pieces([whole]), [0], stop)
    _, many = run(Pieces(pieces), list(range(len(pieces))), stop)
    assert "".join(one) == "".join(many)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, len(UNITS) - 1), max_size=25), STOPS)
def test_kept_tokens_are_those_wholly_before_the_stop(ids, stop):
    tokenizer = Pieces(PIECES)
    stream, shown = run(tokenizer, ids, stop)
    text, kept = "".join(shown), stream.kept_tokens
    if stream.stopped:
        assert text.startswith(tokenizer.decode(ids[:kept]))
        assert len(tokenizer.decode(ids[: kept + 1])) > len(text)  # one more would reach into the stop string
    else:
        assert kept == len(ids)


def test_half_characters_are_held_back():
    stream = TextStream(Pieces([b"\xf0", b"\x9f", b"\x98", b"\x80!"]))
    assert [stream.push(i) for i in range(4)] == ["", "", "", "😀!"]


def test_an_incomplete_character_at_the_end_is_shown_as_one():
    stream = TextStream(Pieces([b"a\xe7\x8c"]))
    assert stream.push(0) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_text_that_may_begin_a_stop_string_is_withheld_and_given_back():
    stream = TextStream(Pieces([b"x US", b"ER", b"!", b" USER", b":", b"more"]), ("USER:",))
    assert [stream.push(i) for i in range(4)] == ["x ", "", "USER!", " "]
    assert stream.push(4) == ""
    assert stream.stopped
    assert stream.kept_tokens == 3  # " USER" begins before the stop string and reaches into it
    assert stream.flush() == ""


def test_a_token_with_text_on_both_sides_of_the_stop():
    stream = TextStream(Pieces([b"one", b" two.STOP three"]), ("STOP",))
    assert stream.push(0) + stream.push(1) == "one two."
    assert stream.kept_tokens == 1


def test_a_character_begun_before_the_stop_string_counts_into_it():
    stream = TextStream(Pieces([b"a", b"\xe7", b"\x8c\xab"]), ("猫",))
    assert "".join(stream.push(i) for i in range(3)) == "a"
    assert stream.kept_tokens == 1


def test_tokens_without_text_before_the_stop_are_kept():
    stream = TextStream(Pieces([b"a", b"", b"STOP"]), ("STOP",))
    assert [stream.push(i) for i in range(3)] == ["a", "", ""]
    assert stream.kept_tokens == 2


@pytest.mark.parametrize(
    ("pieces", "expected"), [([b" a", b" b"], "a b"), ([b"", b" a"], "a"), ([b" ", b" a"], " a"), ([b"a"], "a")]
)
def test_only_the_very_first_space_is_dropped(pieces, expected):
    _, shown = run(Pieces(pieces, drops_first_space=True), list(range(len(pieces))))
    assert "".join(shown) == expected


def test_no_text_after_the_end():
    stream = TextStream(Pieces([b"STOP"]), ("STOP",))
    stream.push(0)
    with pytest.raises(AssertionError):
        stream.push(0)
