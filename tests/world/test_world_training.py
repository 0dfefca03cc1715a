"""What is trained is what is shipped: batches, masks and the student against the engine on the exported checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from world.batches import FURTHER_TALKS, IGNORED, BatchMaker
from world.splits import make
from world.student import SHAPES, build, decode, embed_visual, export, tower_hidden
from world.train import Recipe, Trainer, make_tokenizer

from sparsevila.engine.engine import Engine
from sparsevila.engine.runner import TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.engine.tokenizer import load_tokenizer
from sparsevila.models.checkpoint import Checkpoint

LAYOUTS = [
    ("scene", {"width": 128, "height": 64}),
    ("page", {"width": 128, "height": 128}),
    ("clip", {"frames": 5}),
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, BatchMaker, Path]:
    folder = tmp_path_factory.mktemp("student")
    model = build(SHAPES["small"], folder, make_tokenizer(per_kind=30))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv" in name:
                parameter.mul_(3)  # peaked enough for a wrong mask or position to show
            parameter.copy_(parameter.bfloat16())
    export(model, folder)
    return model, BatchMaker(model, load_tokenizer(Checkpoint(folder))), folder


def logits(model: Any, batch: Any) -> torch.Tensor:
    """(B, Tt, V) of the text rows, without autocast."""
    with torch.no_grad():
        features = tower_hidden(model, batch.pixels.flatten(0, 1))[:, 1:].unflatten(0, batch.pixels.shape[:2])
        visual = embed_visual(model, features, batch.token_map, batch.sources)
        return model.decoder.logits(decode(model, visual, batch.rows)[0])


def test_every_word_of_the_world_is_in_the_tokenizer(student):
    _, maker, _ = student
    for text in ("the red star", "count the triangles", "kqz", "42", "top left"):
        assert maker.tokenizer.decode(maker.tokenizer.encode(f" {text}", first=False)) == text


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_batches_depend_on_their_number_alone(student, layout):
    _, maker, _ = student
    one, same, other = (maker.dialogues(n, 2, layout=layout) for n in (3, 3, 4))
    assert torch.equal(one.pixels, same.pixels)
    assert torch.equal(one.rows.text, same.rows.text)
    assert not torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_targets_spell_the_answers(student, layout):
    _, maker, _ = student
    batch = maker.dialogues(0, 4, layout=layout)
    eos = maker.tokenizer.special_id("</s>")
    for targets, turns, types in zip(batch.targets, batch.turns, batch.types, strict=True):
        assert len(types) > 0
        for turn in range(len(types)):
            answer = targets[(turns == turn) & (targets != IGNORED)].tolist()
            assert answer[-1] == eos
            assert eos not in answer[:-1]
            assert maker.tokenizer.decode(answer[:-1]).strip()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_a_batch_gives_the_logits_of_the_engine(student, layout):
    """A plain conversation is prefilled by the engine token for token; a block is a first question of its own."""
    model, maker, folder = student
    batch = maker.dialogues(1, 2, layout=layout)
    want = logits(model, batch)
    before = batch.rows.before.tolist()
    start = len(before) + len(batch.token_map)
    with Engine.load(folder, device="cpu", dtype="float32") as engine:
        for sample in range(2):
            pixels = batch.pixels[sample]
            kind = "video" if batch.sources is None else "image"
            inputs = _inputs(maker, layout, 1, sample)
            assert inputs.kind == kind
            assert torch.equal(inputs.pixels, pixels)
            with torch.no_grad():
                tokens = engine.model.encode(inputs)
            segments = batch.rows.segments[sample, start:]
            for segment in segments[segments > 0].unique().tolist():
                rows = torch.nonzero(segments == segment)[:, 0]
                ids = tuple(batch.rows.text[sample, rows].tolist())
                cache = engine.runner.new_cache()
                cache.reserve(visual=len(tokens), text=len(tokens) + 300)
                spans = [TextSpan(tuple(before)), VisualSpan(tokens), TextSpan(ids)]
                got = engine.runner.logits(engine.runner.prefill(cache, spans, method=Method()).hidden)
                row = want[sample, int(rows[-1])]
                assert (got - row).abs().max() < 2e-4 * row.abs().max()


def test_one_turn_of_a_block_does_not_see_another(student):
    model, maker, _ = student
    batch = maker.dialogues(2, 2, layout=LAYOUTS[0])
    start = len(batch.rows.before) + len(batch.token_map)
    segments = batch.rows.segments[0, start:]
    assert len(segments[segments > 0].unique()) > 1
    first = segments == 1
    changed = maker.dialogues(2, 2, layout=LAYOUTS[0])
    changed.rows.text[0, first] = 5
    a, b = logits(model, batch)[0], logits(model, changed)[0]
    assert torch.equal(a[segments > 1], b[segments > 1])
    assert not torch.equal(a[first], b[first])


def _inputs(maker: BatchMaker, layout: tuple[str, dict[str, int]], number: int, sample: int) -> Any:
    from world.batches import _frames

    kind, options = layout
    seed = maker._seeds(number, 2)[sample]
    return maker.model.preprocess(_frames(make(kind, seed, **options)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe of seconds, and an evaluation of one layout."""
    monkeypatch.setattr("world.train.LATE", [(*LAYOUTS[0], 1)])
    monkeypatch.setattr("world.train.EVALUATION_SIZE", 2)
    return Recipe(
        vision_steps=2,
        vision_batch=6,
        language_steps=4,
        language_batch=2,
        language_first=1,
        language_early=2,
        language_grounded=2,
        warmup=2,
    )


def trainer(run: Path, recipe: Recipe, **options: Any) -> Trainer:
    return Trainer(run, recipe, device=torch.device("cpu"), workers=0, **{"minutes": 60.0, **options})


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "state.pt", weights_only=True)["model"]


def test_a_run_cut_into_pieces_ends_with_the_same_bits(tmp_path: Path, quick: Recipe) -> None:
    assert trainer(tmp_path / "whole", quick).train()
    pieces = 0
    while not trainer(tmp_path / "cut", quick, minutes=0.0).train():
        pieces += 1
    assert pieces >= 4  # it stops after every step
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    fresh = build(SHAPES["small"], tmp_path, (tmp_path / "cut" / "tokenizer.model").read_bytes()).state_dict()
    same = [name for name in whole if torch.equal(whole[name], fresh[name])]
    assert same == []  # every parameter was trained


def test_a_run_is_not_continued_by_another_recipe(tmp_path: Path, quick: Recipe) -> None:
    trainer(tmp_path, quick, minutes=0.0).train()
    trainer(tmp_path, replace(quick, language_steps=6))  # no step of this kind was made yet
    with pytest.raises(SystemExit, match="another recipe"):
        trainer(tmp_path, replace(quick, vision_adam=1e-3))


def test_a_run_may_begin_with_an_exported_checkpoint(tmp_path: Path, quick: Recipe, student: Any) -> None:
    model, _, folder = student
    begun = trainer(tmp_path, quick, start=folder)
    assert begun.stage == "language"
    for name, parameter in model.named_parameters():
        assert torch.equal(begun.model.get_parameter(name), parameter), name
    tower = model.vision_tower.state_dict()
    assert begun.train()
    trained = {name.removeprefix("vision_tower."): t for name, t in state_of(tmp_path).items()}
    assert all(torch.equal(trained[name], tower[name]) for name in tower)  # frozen


def test_no_answer_weighs_more_than_the_root_of_its_length(student: Any) -> None:
    _, maker, _ = student
    batch = maker.dialogues(0, 4, layout=LAYOUTS[1])
    said = batch.targets != IGNORED
    assert (batch.weights[said] > 0).all()
    for targets, turns, weights, types in zip(batch.targets, batch.turns, batch.weights, batch.types, strict=True):
        for turn in range(len(types)):
            of_answer = weights[(turns == turn) & (targets != IGNORED)]
            assert float(of_answer.sum()) == pytest.approx(len(of_answer) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_answers_are_shown_where_they_are(student: Any, layout: Any) -> None:
    """Against the boxes of the tokens one by one, from the truth of the sample."""
    model, _, folder = student
    maker = BatchMaker(model, load_tokenizer(Checkpoint(folder)), grounded=1)
    assert maker.dialogues(1, 2, layout=layout).shown is None
    batch = maker.dialogues(0, 2, layout=layout)
    assert batch.shown is not None
    token_map, Tt = batch.token_map, batch.rows.text.shape[1]
    said = 0
    for i, seed in enumerate(maker._seeds(0, 2)):
        sample = make(layout[0], seed, talks=FURTHER_TALKS, **layout[1])
        _, height, width, _ = sample.rgb.shape
        known = [qa for talk in (sample.dialogue, *sample.further, sample.alone) for qa in talk]
        for turn, name in enumerate(batch.types[i]):
            rows = (batch.turns[i, -Tt:] == turn) & (batch.targets[i, -Tt:] != IGNORED)
            ids = batch.targets[i, -Tt:][rows][:-1].tolist()
            answer = maker.tokenizer.decode(ids).strip()
            found = {tuple(torch.nonzero(shown)[:, 0].tolist()) for shown in batch.shown[i][rows]}
            assert len(found) == 1  # all rows of an answer alike
            wanted = []
            for qa in known:
                if (qa.type, qa.answer) == (name, answer):
                    boxes = [
                        n
                        for n in range(len(token_map))
                        if not token_map.structural[n]
                        and any(
                            r.start <= token_map.frame[n] < r.stop
                            and token_map.box[n, 0] * height < r.y1
                            and token_map.box[n, 2] * height > r.y0
                            and token_map.box[n, 1] * width < r.x1
                            and token_map.box[n, 3] * width > r.x0
                            for r in qa.regions
                        )
                    ]
                    wanted.append(tuple(boxes))
            assert found.pop() in wanted
            said += bool(rows.any())
        silent = batch.targets[i, -Tt:] == IGNORED
        assert not batch.shown[i][silent].any()
    assert said > 4


def test_grounding_falls_as_attention_moves_to_the_answer(student: Any) -> None:
    """Showing everything asks for no more than attention to the picture; showing one token asks for more."""
    model, maker, _ = student
    batch = maker.dialogues(0, 2, layout=LAYOUTS[0])
    with torch.no_grad():
        features = tower_hidden(model, batch.pixels.flatten(0, 1))[:, 1:].unflatten(0, batch.pixels.shape[:2])
        visual = embed_visual(model, features, batch.token_map, batch.sources)
        Tt, V = batch.rows.text.shape[1], len(batch.token_map)
        says = (batch.targets[:, -Tt:] != IGNORED)[:, :, None]
        everything = says.expand(-1, -1, V)
        one = everything & (torch.arange(V) == 5)
        nothing, all_of_it, little = (
            decode(model, visual, batch.rows, None, s)[1] for s in (~says & says, everything, one)
        )
    assert float(nothing) == 0
    assert 0 < float(all_of_it) < float(little)
