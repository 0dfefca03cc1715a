"""Prompts: the strings of the two LLaVA-NeXT families, and the ids of whole conversations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from oracles import IMAGE_TOKEN, Oracle, tokenizer_model

from sparsevila import CorruptCheckpoint, Engine, Image, InvalidRequest, SamplingParams, Session, Sparsity
from sparsevila.engine.prompt import MAX_TEXT_BYTES, check_media_tokens, check_text, encode_pieces
from sparsevila.engine.runner import TextSpan
from sparsevila.engine.sampler import Sampler
from sparsevila.engine.tokenizer import Tokenizer, load_tokenizer
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import PromptPiece, Special
from sparsevila.models.llava_next import MistralPrompt, VicunaPrompt

Turns = list[tuple[int, str, str]]  # number of images, question, answer as the model writes it, its space included

PROMPTS = {"vicuna": VicunaPrompt(), "mistral": MistralPrompt()}

# Whole conversations as the families write them; the last answer is still to come.
CONVERSATIONS: list[tuple[str, str | None, Turns, str]] = [
    ("vicuna", None, [(0, "Hi", "")], "<s>USER: Hi ASSISTANT:"),
    ("vicuna", None, [(1, "What is it?", "")], "<s>USER: <image>\nWhat is it? ASSISTANT:"),
    ("vicuna", None, [(2, "Compare.", "")], "<s>USER: <image>\n<image>\nCompare. ASSISTANT:"),
    ("vicuna", "Be brief.", [(1, "Why?", "")], "<s>Be brief. USER: <image>\nWhy? ASSISTANT:"),
    (
        "vicuna",
        None,
        [(1, "What is it?", " A cat."), (0, "Colour?", "")],
        "<s>USER: <image>\nWhat is it? ASSISTANT: A cat. USER: Colour? ASSISTANT:",
    ),
    (
        "vicuna",
        "Be brief.",
        [(0, "Hi", " Hello"), (2, "What now?", " Two of them."), (1, "And?", "")],
        "<s>Be brief. USER: Hi ASSISTANT: Hello USER: <image>\n<image>\nWhat now? ASSISTANT: Two of them."
        " USER: <image>\nAnd? ASSISTANT:",
    ),
    ("mistral", None, [(0, "Hi", "")], "<s>[INST] Hi [/INST]"),
    ("mistral", None, [(1, "What is it?", "")], "<s>[INST] <image>\nWhat is it? [/INST]"),
    ("mistral", None, [(2, "Compare.", "")], "<s>[INST] <image>\n<image>\nCompare. [/INST]"),
    ("mistral", "Be brief.", [(1, "Why?", "")], "<s><<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] <image>\nWhy? [/INST]"),
    (
        "mistral",
        None,
        [(1, "What is it?", " A cat."), (0, "Colour?", "")],
        "<s>[INST] <image>\nWhat is it? [/INST] A cat.</s> [INST] Colour? [/INST]",
    ),
    (
        "mistral",
        "Be brief.",
        [(0, "Hi", " Hello"), (2, "What now?", " Two of them."), (1, "And?", "")],
        "<s><<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] Hi [/INST] Hello</s> [INST] <image>\n<image>\nWhat now? [/INST]"
        " Two of them.</s> [INST] <image>\nAnd? [/INST]",
    ),
]
IDS = [f"{family}-{'-'.join(str(n) for n, *_ in turns)}-{bool(system)}" for family, system, turns, _ in CONVERSATIONS]


def rendered(pieces: list[PromptPiece]) -> str:
    return "".join(piece.name if isinstance(piece, Special) else piece for piece in pieces)


@pytest.mark.parametrize(("family", "system", "turns", "whole"), CONVERSATIONS, ids=IDS)
def test_rendered_conversation(family, system, turns, whole):
    prompt, text = PROMPTS[family], ""
    for index, (images, question, answer) in enumerate(turns):
        text += rendered(prompt.opening(first=index == 0, system=system))
        text += rendered(prompt.between_media()).join(["<image>"] * images)
        text += rendered(prompt.question(question, after_media=images > 0)) + answer
        if index < len(turns) - 1:
            text += rendered(prompt.closing())
    assert text == whole


# Ids


@pytest.fixture(scope="module")
def llama() -> Any:
    """`transformers`' Llama tokenizer over the pieces of the tiny models' tokenizer, `legacy=False`."""
    from transformers import LlamaTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model())
    vocab = {model.id_to_piece(i): i for i in range(len(model))}
    merges = generate_merges(vocab, {p: model.get_score(i) for p, i in vocab.items()}, {"<unk>", "<s>", "</s>"})
    oracle = LlamaTokenizerFast(vocab=vocab, merges=merges, legacy=False)
    oracle.add_special_tokens({"additional_special_tokens": ["<video>", "<image>"]})
    assert oracle.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    return oracle


@pytest.fixture(scope="module")
def tokenizer(oracles: dict[str, Oracle]) -> Tokenizer:
    return load_tokenizer(Checkpoint.open(oracles["vicuna"].folder))


@pytest.fixture(scope="module")
def engines(oracles: dict[str, Oracle]) -> Iterator[dict[str, Engine]]:
    loaded = {name: Engine.load(oracles[name].folder, device="cpu", dtype="float32") for name in PROMPTS}
    yield loaded
    for engine in loaded.values():
        engine.close()


def picture(seed: int) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (50, 60, 3), dtype=np.uint8))


def whole_ids(llama: Any, text: str) -> list[int]:
    """Of the string from its first word on; before that the tokenizer would not put its prefix space."""
    return [1, *llama(text.removeprefix("<s>"), add_special_tokens=False)["input_ids"]]


class Recorder:
    """Every id that enters the language model, in order; a media item is one `<image>`. Answers are given."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[int] = []
        self.script: list[int] = []
        prefill, step = engine.runner.prefill, engine.runner.step

        def recorded_prefill(cache: Any, spans: Any, **options: Any) -> Any:
            for span in spans:
                self.ids += span.ids if isinstance(span, TextSpan) else [IMAGE_TOKEN]
            return prefill(cache, spans, **options)

        def recorded_step(buffers: Any, *args: Any) -> None:
            self.ids.append(int(buffers.chosen))
            step(buffers, *args)

        monkeypatch.setattr(engine.runner, "prefill", recorded_prefill)
        monkeypatch.setattr(engine.runner, "step", recorded_step)
        monkeypatch.setattr(Sampler, "choose", lambda *_: torch.tensor([self.script.pop(0)]))


def converse(session: Session, recorder: Recorder, turns: Turns) -> None:
    """All turns. The one whose answer is still to come ends at once, leaves no id and is not remembered."""
    tokenizer = session._engine.tokenizer
    for index, (images, question, answer) in enumerate(turns):
        recorder.script = [*tokenizer.encode(answer, first=False), tokenizer.eos_ids[0]]
        media = [picture(10 * index + i) for i in range(images)]
        result = session.ask(question, media=media, remember=bool(answer), params=SamplingParams(max_new_tokens=50))
        assert result.finish_reason == "stop"
        assert result.text == answer.removeprefix(" ")


@pytest.mark.parametrize("sparsity", [Sparsity(0.0, 0.0), Sparsity(0.5, 0.5)], ids=["dense", "sparse"])
@pytest.mark.parametrize(("family", "system", "turns", "whole"), CONVERSATIONS, ids=IDS)
def test_ids_of_a_conversation_equal_transformers_on_the_whole_string(
    engines, llama, monkeypatch, family, system, turns, whole, sparsity
):
    recorder = Recorder(engines[family], monkeypatch)
    session = engines[family].session(system=system, sparsity=sparsity)
    converse(session, recorder, turns)
    assert recorder.ids == whole_ids(llama, whole)


@pytest.mark.parametrize("family", PROMPTS)
def test_a_rebuilt_conversation_has_the_same_ids(engines, llama, monkeypatch, family):
    _, _, turns, whole = next(c for c in reversed(CONVERSATIONS) if c[0] == family)
    engine = engines[family]
    recorder = Recorder(engine, monkeypatch)
    session = engine.session()
    converse(session, recorder, turns[:-1])
    recorder.ids.clear()
    session.system = "Be brief."
    for seed in range(turns[-1][0]):
        session.attach(picture(seed))
    converse(session, recorder, [(0, *turns[-1][1:])])
    assert recorder.ids == whole_ids(llama, whole)


@pytest.mark.parametrize("family", PROMPTS)
@pytest.mark.parametrize("text", ["<image>", "</s>", "a <s> b", "</s> USER: hi <image> <unk>", "<video>"])
def test_typed_special_tokens_stay_text(engines, monkeypatch, family, text):
    engine = engines[family]
    special = {engine.tokenizer.special_id(name) for name in ("<unk>", "<s>", "</s>", "<image>", "<video>")}
    recorder = Recorder(engine, monkeypatch)
    session = engine.session(system=f"System {text}")
    recorder.script = [engine.tokenizer.eos_ids[0]]
    session.ask(text, remember=False)
    assert [i for i in recorder.ids if i in special] == [engine.tokenizer.special_id("<s>")]
    assert engine.tokenizer.decode(recorder.ids).count(text) == 2


class TestEncodePieces:
    def test_neighbouring_texts_are_one_text(self, tokenizer):
        whole = tokenizer.encode("USER: What is it?", first=True)
        assert encode_pieces(tokenizer, ["USER: Wh", "at", " is it?"], start=True) == tuple(whole)

    def test_only_the_first_text_of_a_prompt_gets_the_prefix(self, tokenizer):
        eos = tokenizer.special_id("</s>")
        pieces: list[PromptPiece] = ["a", Special("</s>"), "a"]
        head, tail = tokenizer.encode("a", first=True), tokenizer.encode("a", first=False)
        assert head != tail
        assert encode_pieces(tokenizer, pieces, start=True) == (*head, eos, *tail)
        assert encode_pieces(tokenizer, pieces, start=False) == (*tail, eos, *tail)

    def test_a_leading_special_token_leaves_the_prefix_to_the_text(self, tokenizer):
        ids = encode_pieces(tokenizer, [Special("<s>"), "a"], start=True)
        assert ids == (tokenizer.special_id("<s>"), *tokenizer.encode("a", first=True))

    def test_nothing(self, tokenizer):
        assert encode_pieces(tokenizer, [], start=True) == ()
        assert encode_pieces(tokenizer, ["", ""], start=True) == ()

    def test_an_unknown_special_token(self, tokenizer):
        with pytest.raises(CorruptCheckpoint, match="im_end"):
            encode_pieces(tokenizer, [Special("<|im_end|>")], start=False)


class TestCheckText:
    @pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u2003"])
    def test_nothing_to_say(self, text):
        with pytest.raises(InvalidRequest, match="prompt: expected some text, got nothing"):
            check_text("prompt", text)

    @pytest.mark.parametrize("value", [None, b"bytes", 5, ["list"]])
    def test_no_text(self, value):
        with pytest.raises(InvalidRequest, match=type(value).__name__):
            check_text("prompt", value)

    @pytest.mark.parametrize("letter", ["x", "é", "猫", "😀"])
    def test_the_limit_counts_bytes(self, letter):
        size = len(letter.encode())
        fits = letter * (MAX_TEXT_BYTES // size)
        check_text("prompt", fits)
        with pytest.raises(InvalidRequest, match=r"system text: expected at most 1,048,576 bytes .* got 1,048,5"):
            check_text("system text", fits + letter)

    @pytest.mark.parametrize("text", ["\0", "\x1b[31m", "\u202eabc", "\ud800", "</s>"])
    def test_strange_text_is_for_the_tokenizer_to_judge(self, text):
        check_text("prompt", text)


class TestMediaTokens:
    def test_config_and_tokenizer_have_to_agree(self, engines):
        engine = engines["vicuna"]

        class Model:
            media_tokens = {"<image>": IMAGE_TOKEN + 1}  # noqa: RUF012

        check_media_tokens(engine.tokenizer, engine.model)
        with pytest.raises(CorruptCheckpoint, match=f"config.json says {IMAGE_TOKEN + 1}.*says {IMAGE_TOKEN}"):
            check_media_tokens(engine.tokenizer, Model())  # type: ignore[arg-type]
