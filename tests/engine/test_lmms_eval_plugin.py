"""The lmms-eval model, beside a stub of what lmms-eval offers a plug-in (tests/fixtures/lmms_eval)."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import Oracle, write_clip
from PIL import Image as Pillow

from sparsevila import Engine, Image, InvalidRequest, SamplingParams, Sparsity, UnsupportedModel

STUB = Path(__file__).resolve().parents[1] / "fixtures" / "lmms_eval"
PICTURE = Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def plugin() -> Any:
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(STUB)
    try:
        yield importlib.import_module("sparsevila.engine.lmms_eval_plugin")
    finally:
        patch.undo()
        for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval" or "lmms_eval_plugin" in name]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def model(plugin: Any, oracles: dict[str, Oracle]) -> Any:
    made = plugin.SparseVILA(
        str(oracles["video"].folder), prefill=0.5, decode=0.5, frames=3, device="cpu", dtype="float32"
    )
    yield made
    made.engine.close()


def request(model: Any, content: Any, options: dict[str, Any] | None = None, *, with_text: bool = True) -> Any:
    """As lmms-eval asks for one document; `content` is that of the user's message, or the messages."""
    from lmms_eval.api.instance import Instance

    messages = content if isinstance(content, list) and content and "role" in content[0] else [user(content)]
    model.task_dict = {"task": {"test": [None, {"messages": messages}]}}
    arguments = (lambda doc: doc["messages"], options or {"max_new_tokens": 5}, 1, "task", "test")
    return Instance(("text", *arguments) if with_text else arguments)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def image(question: str = "What is it?") -> list[dict[str, Any]]:
    return [{"type": "image", "url": PICTURE}, {"type": "text", "text": question}]


def test_lmms_eval_finds_it(plugin: Any) -> None:
    (found,) = [point for point in entry_points(group="lmms_eval.models") if point.name == "sparsevila"]
    assert found.load() is plugin.MANIFEST
    module, _, name = plugin.MANIFEST.chat_class_path.rpartition(".")
    found_class = getattr(importlib.import_module(module), name)
    assert found_class is plugin.SparseVILA
    assert found_class.is_simple is False


@pytest.mark.parametrize("with_text", [True, False])
def test_it_answers_as_a_session_does(model: Any, oracles: dict[str, Oracle], with_text: bool) -> None:
    (result,) = model.generate_until([request(model, image(), with_text=with_text)])
    with Engine.load(oracles["video"].folder, device="cpu", dtype="float32") as engine:
        session = engine.session(media=[Image(PICTURE)], sparsity=Sparsity(0.5, 0.5))
        want = session.ask("What is it?", params=SamplingParams(max_new_tokens=5), remember=False)
    assert result.text == want.text
    assert result.token_counts.output_tokens == len(want.token_ids)
    assert result.token_counts.input_tokens == want.stats.prompt_tokens


def test_clips_and_system_texts(model: Any, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=8).source
    parts = [{"type": "video", "url": str(clip)}, {"type": "text", "text": "What happens?"}]
    (plain,) = model.generate_until([request(model, parts)])
    (told,) = model.generate_until([request(model, [{"role": "system", "content": "Be brief."}, user(parts)])])
    assert told.token_counts.input_tokens > plain.token_counts.input_tokens
    (short,) = model.generate_until([request(model, parts, {"max_new_tokens": 2, "until": ["\n\n"]})])
    assert short.token_counts.output_tokens <= 2


def test_what_cannot_be_served_is_an_error(plugin: Any, model: Any, oracles: dict[str, Oracle]) -> None:
    for messages, words in (
        ([user(image()), {"role": "assistant", "content": "A cat."}, user("And?")], "one question"),
        ([user([{"type": "audio", "url": "a.wav"}])], "audio"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            model.generate_until([request(model, messages)])
    with pytest.raises(InvalidRequest, match="num_beams"):
        model.generate_until([request(model, image(), {"num_beams": 4})])
    for call in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UnsupportedModel, match="lmms-eval"):
            call([])
    for wrong, words in (({"batch_size": 4}, "batch_size"), ({"prefill": 0.5}, "both or neither")):
        with pytest.raises(InvalidRequest, match=words):
            plugin.SparseVILA(str(oracles["video"].folder), device="cpu", **wrong)
