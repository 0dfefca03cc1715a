"""Token ids to text, piece by piece: never half a character, never the start of a stop string.

The pieces concatenate to the whole answer byte for byte, however the text is cut into tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .tokenizer import Tokenizer


class TextStream:
    """The text of one answer while it is made.

    `stopped` is True once a stop string came: the text before it was returned, the text from it on is dropped.
    Where several stop strings match, the one that is complete first counts, so the answer does not depend on
    how it was cut into tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        assert all(stop), "an empty stop string would match everywhere"
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._may_drop_space = tokenizer.drops_first_space
        self._held = ""  # decoded and not returned: it may be the start of a stop string
        self._returned_len = 0  # characters
        self._ends: list[int] = []  # of each pushed token: the characters up to its end, a begun one included
        self._stop_start: int | None = None  # characters before the stop string

    @property
    def kept_tokens(self) -> int:
        """How many of the pushed tokens, from the first, have their whole text before the stop string."""
        if self._stop_start is None:
            return len(self._ends)
        return sum(end <= self._stop_start for end in self._ends)

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that may be shown now, often empty."""
        assert not self.stopped, "the answer has ended"
        data = self._tokenizer.token_bytes(token_id)
        if self._may_drop_space and data:
            data = data.removeprefix(b" ")
            self._may_drop_space = False
        text = self._decoder.decode(data)
        begun = bool(self._decoder.getstate()[0])  # bytes of a character that is not complete
        self._ends.append(self._returned_len + len(self._held) + len(text) + begun)
        return self._advance(text, is_last=False)

    def flush(self) -> str:
        """The rest of the text, after the last token. An incomplete character becomes U+FFFD."""
        return "" if self.stopped else self._advance(self._decoder.decode(b"", final=True), is_last=True)

    def _advance(self, text: str, *, is_last: bool) -> str:
        seen = self._held + text
        start = self._find_stop(seen)
        if start is not None:
            self.stopped = True
            self._stop_start = self._returned_len + start
            ready, self._held = seen[:start], ""
        else:
            cut = len(seen) if is_last else len(seen) - self._withheld(seen)
            ready, self._held = seen[:cut], seen[cut:]
        self._returned_len += len(ready)
        return ready

    def _find_stop(self, text: str) -> int | None:
        """Where the stop string begins that ends first; of those with one end, the longest."""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _withheld(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
