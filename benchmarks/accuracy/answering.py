"""From questions to answers: the engine's public API, one session per sample, setting and protocol."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import PIL.Image
from accuracy.questions import Item, Question
from world.splits import make
from world.video import psnr, write_h264

from sparsevila import Engine, Image, InvalidRequest, Result, SamplingParams, Session, Sparsity, Video
from sparsevila.engine.media import load_media
from sparsevila.engine.sparsity.registry import make_method
from sparsevila.engine.switches import parse_switches, write_switches

ProtocolName = Literal["single", "history", "eviction"]
PictureName = Literal["own", "wrong", "none"]

MAX_NEW_TOKENS = 32  # of a short answer; the longest true one has 8 tokens or so
MAX_NEW_TOKENS_LONG = 160

# A clip is written at its own size and without loss in the encoder. What is lost is colour: one value for four pixels
# (4:2:0), about 36.5 dB. Pixels of twice the size would come back with 38 dB, but blurred by the way back to the
# tower's size, and models read them worse.
CLIP_SCALE, CLIP_CRF, CLIP_FPS = 1, 0, 4


@dataclass(frozen=True)
class Setting:
    """A sparsity policy by name: `dense`, or `METHOD:PREFILL/DECODE[:SWITCH[,SWITCH...]]`.

    A switch is `global` or `NAME=VALUE` (`engine/switches.py`). The name has those that are on, in one order.
    """

    name: str
    sparsity: Sparsity

    @staticmethod
    def parse(text: str) -> Setting:
        """Raises ValueError with the form that is expected, or what is wrong with a method, a fraction or a switch."""
        if text == "dense":
            return Setting(text, Sparsity(method="dense"))
        try:
            method, fractions, *switches = text.split(":")
            prefill, decode = map(float, fractions.split("/"))
            (named,) = switches or [""]
        except ValueError:
            raise ValueError(f"expected dense or METHOD:PREFILL/DECODE[:SWITCH[,SWITCH...]], got {text!r}") from None
        try:
            sparsity = Sparsity(prefill, decode, method, **(parse_switches(named) if switches else {}))
            make_method(sparsity)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
        return Setting(":".join(filter(None, (method, f"{prefill:g}/{decode:g}", write_switches(sparsity)))), sparsity)

    @property
    def needs_question(self) -> bool:
        """Whether the first question of a session decides what later ones can see."""
        return make_method(self.sparsity).needs_question


@dataclass(frozen=True)
class Task:
    """How a sample is asked about. Of `history` and `eviction` only the dialogue is asked."""

    setting: Setting
    protocol: ProtocolName
    picture: PictureName

    @property
    def key(self) -> str:
        return f"{self.setting.name} {self.protocol} {self.picture}"


@dataclass(frozen=True)
class Extras:
    """What else to find out about a sample: whether a fresh session answers the same, and agreement with dense."""

    fresh: bool = False
    agreement: bool = False


@dataclass(frozen=True)
class Reply:
    """One answer and what it cost. Times in seconds; counts of visual tokens leave out structural ones."""

    text: str
    was_cut: bool  # by the limit of new tokens
    output_tokens: int
    prompt_tokens: int  # prefilled for this question
    cached_tokens: int  # found in the cache
    visual_total: int
    visual_kept: int
    visual_active: float
    encode_s: float
    prefill_s: float
    retrieval_s: float
    decode_s: float
    ttft_s: float
    structural: int = 0
    layer_tokens: float = 0.0  # prefilled for this question, mean over layers
    layer_pairs: float = 0.0  # of a token that was prefilled and one that it attends to, mean over layers
    kv_read_bytes: int = 0  # by the first decode step
    same_when_fresh: bool | None = None  # the same token ids in a session of its own
    kl: tuple[float, ...] = ()  # KL(dense || sparse) per step from the second token on, nats
    top1: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """The replies to a sample's questions, in order; of a protocol that asks the dialogue, to those alone."""

    replies: tuple[Reply, ...]
    jaccard: tuple[float, ...] | None = None  # per layer, of neighbouring turns' active sets
    sinks: tuple[float, ...] | None = None  # per layer, share of the visual store that is active in all turns
    psnr: tuple[float, ...] = ()  # dB, per frame of a clip's file against what was drawn

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Conversation:
        def listed(value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else value

        replies = [Reply(**{name: listed(value) for name, value in reply.items()}) for reply in data["replies"]]
        return Conversation(**{name: listed(value) for name, value in data.items()} | {"replies": tuple(replies)})


class Answerer(Protocol):
    """Whatever can hold a conversation about a sample."""

    def converse(self, item: Item, task: Task, extras: Extras) -> Conversation:
        """Asks what the task's protocol asks of this sample."""
        ...

    def forget(self) -> None:
        """Called when a sample will not come again."""
        ...


def asked_questions(item: Item, protocol: ProtocolName) -> tuple[Question, ...]:
    """What a protocol asks: everything alone, or the dialogue."""
    return item.questions if protocol == "single" else item.dialogue


@dataclass(frozen=True)
class Shown:
    """A picture as the engine takes it, or nothing; the quality in dB of each frame of a clip's file."""

    media: tuple[Image | Video, ...]
    psnr: tuple[float, ...] = ()


class EngineAnswerer:
    """Asks an engine. Clips go through files in `folder`."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._shown: dict[tuple[str, PictureName], Shown] = {}

    def forget(self) -> None:
        self._shown.clear()
        self._engine.forget_features()
        for path in self._folder.glob("*.mp4"):
            path.unlink()

    def converse(self, item: Item, task: Task, extras: Extras) -> Conversation:
        shown = self.show(item, task.picture)
        questions = asked_questions(item, task.protocol)
        if task.protocol == "single" and task.setting.needs_question:
            # What such a method prunes for one question must not be all that the next one finds.
            return Conversation(tuple(self._ask_fresh(shown, task, q).reply for q in questions), psnr=shown.psnr)
        with closing(self._session(shown, task)) as session:
            replies = tuple(self._ask_in_turn(session, shown, task, question, extras) for question in questions)
            jaccard, sinks = _overlap(session)
        return Conversation(replies, jaccard, sinks, shown.psnr)

    def show(self, item: Item, picture: PictureName) -> Shown:
        """The picture that goes with this item's questions; made once."""
        key = item.key, picture
        if key not in self._shown:
            self._shown[key] = self._make(item, picture)
        return self._shown[key]

    def _make(self, item: Item, picture: PictureName) -> Shown:
        if picture == "none":
            return Shown(())
        seed = item.seed if picture == "own" else item.wrong_seed
        rgb = make(item.layout.kind, seed, **item.layout.options).rgb
        if item.layout.kind != "clip":
            return Shown((Image(rgb[0]),))
        path = self._folder / f"{item.layout.name} {seed}.mp4"
        write_h264(rgb, path, fps=CLIP_FPS, scale=CLIP_SCALE, crf=CLIP_CRF)
        video = Video(path, frames=len(rgb))
        return Shown((video,), frame_quality(video, rgb))

    def _session(self, shown: Shown, task: Task) -> Session:
        return self._engine.session(media=shown.media, sparsity=task.setting.sparsity)

    def _ask_in_turn(self, session: Session, shown: Shown, task: Task, question: Question, extras: Extras) -> Reply:
        if task.protocol == "history":
            return _ask(session, question, remember=True).reply
        asked = _ask(session, question, remember=False)
        reply = asked.reply
        if extras.fresh:
            same = self._ask_fresh(shown, task, question).token_ids == asked.token_ids
            reply = replace(reply, same_when_fresh=same)
        if extras.agreement and shown.media and task.setting.sparsity.decode > 0:
            compared = session.agreement(question.text, max_new_tokens=answer_limit(question))
            reply = replace(reply, kl=compared.kl, top1=compared.top1)
        return reply

    def _ask_fresh(self, shown: Shown, task: Task, question: Question) -> _Asked:
        with closing(self._session(shown, task)) as session:
            return _ask(session, question, remember=False)


@dataclass(frozen=True)
class _Asked:
    reply: Reply
    token_ids: tuple[int, ...]


def answer_limit(question: Question) -> int:
    """New tokens that an answer may have; fixed by the type, never by the true answer."""
    return MAX_NEW_TOKENS_LONG if question.is_long else MAX_NEW_TOKENS


def _ask(session: Session, question: Question, *, remember: bool) -> _Asked:
    params = SamplingParams(max_new_tokens=answer_limit(question))
    result = session.ask(question.text, params=params, remember=remember)
    return _Asked(reply_of(result), result.token_ids)


def reply_of(result: Result) -> Reply:
    """An answer of the engine's, without what is compared with others."""
    stats = result.stats
    return Reply(
        text=result.text,
        was_cut=result.finish_reason == "length",
        output_tokens=stats.output_tokens,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        visual_total=stats.visual_tokens_total,
        visual_kept=stats.visual_tokens_kept,
        visual_active=stats.visual_tokens_active,
        encode_s=stats.encode_s,
        prefill_s=stats.prefill_s,
        retrieval_s=stats.retrieval_s,
        decode_s=stats.decode_s,
        ttft_s=stats.ttft_s,
        structural=stats.structural_tokens,
        layer_tokens=stats.layer_tokens,
        layer_pairs=stats.layer_pairs,
        kv_read_bytes=stats.kv_read_bytes,
    )


def _overlap(session: Session) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Jaccard and share of sinks per layer; None where fewer than two turns were sparse."""
    sparse = [selection for selection in session.selections if selection.active is not None]
    if len(sparse) < 2:
        return None, None
    found = session.overlap()
    return tuple(found.jaccard), tuple(len(sinks) / len(sparse[0].store) for sinks in found.sinks)


def frame_quality(video: Video, rgb: np.ndarray) -> tuple[float, ...]:
    """PSNR in dB of each frame that the engine decodes, at the size drawn, against `rgb` (T, H, W, 3) uint8.

    Raises RuntimeError unless every frame comes back once and in order: none may be nearer to its neighbour's drawing.
    """
    frames = load_media(video, default_frames=len(rgb)).rgb
    if len(frames) != len(rgb):
        raise RuntimeError(f"{video.source}: expected {len(rgb)} frames, the engine decoded {len(frames)}")
    size = rgb.shape[2], rgb.shape[1]
    back = [np.asarray(PIL.Image.fromarray(frame).resize(size, PIL.Image.Resampling.BICUBIC)) for frame in frames]
    quality = tuple(psnr(one, drawn) for one, drawn in zip(back, rgb, strict=True))
    for i, one in enumerate(back):
        others = [psnr(one, rgb[j]) for j in (i - 1, i + 1) if 0 <= j < len(rgb)]
        if max(others, default=0.0) > quality[i]:
            raise RuntimeError(f"{video.source}: frame {i} came back as its neighbour, {quality[i]:.1f} dB")
    return quality
