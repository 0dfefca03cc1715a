"""Conversations in ChatML, as Qwen's language models were trained on them."""

from __future__ import annotations

from dataclasses import dataclass

from .interface import PromptPiece, Special


@dataclass(frozen=True)
class ChatMLPrompt:
    """`<|im_start|>user\\n<media>Q<|im_end|>\\n<|im_start|>assistant\\nA<|im_end|>\\n`, as chat templates write it.

    `system` stands before the first turn unless the caller gives another; None for none. `behind_media` stands behind
    each item of a turn.
    """

    system: str | None = None
    behind_media: str = ""

    def opening(self, *, first: bool, system: str | None) -> list[PromptPiece]:
        user: list[PromptPiece] = [Special("<|im_start|>"), "user\n"]
        text = system or self.system
        if not first or text is None:
            return user
        return [Special("<|im_start|>"), f"system\n{text}", Special("<|im_end|>"), "\n", *user]

    def between_media(self) -> list[PromptPiece]:
        return [self.behind_media] if self.behind_media else []

    def question(self, text: str, *, after_media: bool) -> list[PromptPiece]:
        asked = self.behind_media + text if after_media else text
        return [asked, Special("<|im_end|>"), "\n", Special("<|im_start|>"), "assistant\n"]

    def closing(self) -> list[PromptPiece]:
        return [Special("<|im_end|>"), "\n"]
