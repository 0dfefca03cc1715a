"""A model for lmms-eval, found through its entry point: no fork of either side.

    lmms_eval --model sparsevila --model_args pretrained=llava-next-7b,prefill=0.6,decode=0.75 --tasks gqa ...

An entry point: nothing imports it, and it needs `lmms_eval`, which is no dependency. Each request is a conversation of
its own; requests about one picture that follow each other share its features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from ..errors import InvalidRequest, UnsupportedModel
from .config import Image, SamplingParams, Sparsity, Video
from .engine import Engine

MANIFEST = ModelManifest(model_id="sparsevila", chat_class_path=f"{__name__}.SparseVILA")

MAX_NEW_TOKENS = 1024  # of a task that states none
_SEARCHES = {"num_beams": 1, "do_sample": False}  # ways to generate that are not offered, and what is


@dataclass(frozen=True)
class _Prompt:
    """What one request shows and asks."""

    system: str | None
    media: tuple[Image | Video, ...]
    question: str


class SparseVILA(lmms):
    """`prefill` and `decode` are the fractions removed; without them, the engine's own for the kind of media."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = "demo",
        *,
        method: str = "sparsevila",
        prefill: float | None = None,
        decode: float | None = None,
        frames: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
    ) -> None:
        """Raises InvalidRequest for arguments that cannot be served, and what `Engine.load` raises."""
        super().__init__()
        if str(batch_size) != "1":
            raise InvalidRequest(f"batch_size: expected 1, got {batch_size!r}")
        if (prefill is None) != (decode is None):
            raise InvalidRequest(f"prefill and decode: expected both or neither, got {prefill!r} and {decode!r}")
        given = None if prefill is None or decode is None else Sparsity(float(prefill), float(decode), method)
        self._frames = frames
        # lmms-eval says "cuda" for the first device.
        place = "cuda:0" if device == "cuda" else device or "auto"
        self.engine = Engine.load(pretrained, device=place, dtype=dtype, sparsity=given)

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """One answer a request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> GenerationResult:
        # With the prompt's text before them in current versions, without it in others.
        doc_to_messages, options, doc_id, task, split = request.args[-5:]
        prompt = _prompt(doc_to_messages(self.task_dict[task][split][doc_id]), self._frames)
        with closing(self.engine.session(media=prompt.media, system=prompt.system)) as session:
            result = session.ask(prompt.question, params=_params(options), remember=False)
        counts = TokenCounts(input_tokens=result.stats.prompt_tokens, output_tokens=len(result.token_ids))
        return GenerationResult(text=result.text, token_counts=counts)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: raises UnsupportedModel."""
        raise UnsupportedModel("lmms-eval: tasks that score given answers are not offered, only generating ones")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: raises UnsupportedModel."""
        raise UnsupportedModel("lmms-eval: tasks of several rounds are not offered, only those of one")


def _prompt(messages: Iterable[dict[str, Any]], frames: int | None) -> _Prompt:
    """A chat of one question, as lmms-eval writes it. Raises InvalidRequest for answers in it, and for sound."""
    system: str | None = None
    media: list[Image | Video] = []
    texts: list[str] = []
    for message in messages:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        if message["role"] == "system":
            system = "\n".join(part["text"] for part in parts)
            continue
        if message["role"] != "user":
            raise InvalidRequest(f"lmms-eval: expected one question, got a message of {message['role']!r}")
        for part in parts:
            if part["type"] == "text":
                texts.append(part["text"])
            elif part["type"] == "image":
                media.append(Image(part["url"]))
            elif part["type"] == "video":
                end = part.get("end_time")
                media.append(Video(part["url"], frames=frames, start=part.get("start_time") or 0.0, end=end))
            else:
                raise InvalidRequest(f"lmms-eval: expected text, image or video, got {part['type']!r}")
    return _Prompt(system, tuple(media), "\n".join(texts))


def _params(options: dict[str, Any]) -> SamplingParams:
    """A task's generation settings. Raises InvalidRequest for searches that are not offered."""
    for name, only in _SEARCHES.items():
        if options.get(name) not in (None, only) and not (name == "do_sample" and options.get("temperature")):
            raise InvalidRequest(f"lmms-eval: {name}: expected {only}, got {options[name]!r}")
    until = options.get("until") or ()
    return SamplingParams(
        max_new_tokens=int(options.get("max_new_tokens") or MAX_NEW_TOKENS),
        temperature=float(options.get("temperature") or 0.0),
        top_p=float(options.get("top_p") or 1.0),
        stop=(until,) if isinstance(until, str) else tuple(until),
    )
