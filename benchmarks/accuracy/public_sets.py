"""Questions of public benchmarks, read from local copies in the files that their authors publish.

Nothing is fetched. Each reader takes the folder of one benchmark, with the names that it has when it is unpacked:

ai2d            questions/*.json, images/                   (allenai.org/data/diagrams)
docvqa          val_v1.0*.json, documents/                  (docvqa.org)
gqa             testdev_balanced_questions.json, images/    (cs.stanford.edu/people/dorarad/gqa)
pope            coco_pope_{random,popular,adversarial}.json, val2014/   (github.com/RUCAIBox/POPE)
textvqa         TextVQA_0.5.1_val.json, train_images/       (textvqa.org)
chartqa         test/test_{human,augmented}.json, test/png/ (github.com/vis-nlp/ChartQA)
videomme        videomme/test-*.parquet, data/*.mp4         (huggingface.co/datasets/lmms-lab/Video-MME)
mlvu            json/*.json, video/<name of the json>/      (huggingface.co/datasets/MLVU/MVLU)
nextqa          val.csv or test.csv, map_vid_vidorID.json, videos/   (github.com/doc-doc/NExT-QA)
longvideobench  lvb_val.json, videos/                       (huggingface.co/datasets/longvideobench/LongVideoBench)
robovqa         robovqa_benchmark_qa_pairs.json, clips/     (robovqa in huggingface.co/datasets/nvidia/
                                                             Cosmos-Reason1-Benchmark: its questions with options)

RoboVQA's own release, TFRecords of free answers that BLEU scores, is not read. The parquet file needs pyarrow. Prompts
are those of lmms-eval's tasks of the same names; RoboVQA, which has none, is asked as the others with options.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accuracy.metrics import Metric, anls, choice, exact, relaxed, vqa, yes_or_no

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WORD = "\nAnswer the question using a single word or phrase."
_OPTION = "\nAnswer with the option's letter from the given choices directly."


class MissingData(ValueError):
    """A file of a benchmark that is not where its authors put it, or does not hold what they write."""


@dataclass(frozen=True)
class PublicQuestion:
    """One question about one picture or clip."""

    key: str  # unique within its benchmark
    media: Path
    question: str  # with the options, without the instruction
    truths: tuple[str, ...]
    group: str = ""  # the benchmark's own kind of question or length of video


@dataclass(frozen=True)
class PublicSet:
    """How a benchmark is read, asked and scored."""

    read: Callable[[Path], Iterator[PublicQuestion]]
    metric: Metric
    instruction: str
    kind: Literal["image", "video"]


def _json(path: Path) -> Any:
    if not path.is_file():
        raise MissingData(f"expected {path.name} in {path.parent}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MissingData(f"{path}: no JSON ({error})") from None


def _found(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise MissingData(f"expected {pattern} in {folder}")
    return found


def _field(row: Any, name: str, place: Path) -> Any:
    if not isinstance(row, dict) or name not in row:
        raise MissingData(f"{place}: expected an entry with {name!r}, got {str(row)[:80]!r}")
    return row[name]


def with_options(question: str, options: list[str]) -> str:
    """The question, and every option behind its letter."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))])


# Pictures -----------------------------------------------------------------------------------------------------------


def _ai2d(folder: Path) -> Iterator[PublicQuestion]:
    for path in _found(folder, "questions/*.json"):
        diagram = _json(path)
        media = folder / "images" / _field(diagram, "imageName", path)
        for text, entry in sorted(_field(diagram, "questions", path).items()):
            options, right = _field(entry, "answerTexts", path), _field(entry, "correctAnswer", path)
            key = str(_field(entry, "questionId", path))
            yield PublicQuestion(key, media, with_options(text, options), (LETTERS[right],))


def _docvqa(folder: Path) -> Iterator[PublicQuestion]:
    path = _found(folder, "val_v1.0*.json")[0]
    for row in _field(_json(path), "data", path):
        media = folder / "documents" / Path(_field(row, "image", path)).name
        kinds = row.get("question_types") or [""]
        truths = tuple(_field(row, "answers", path))
        yield PublicQuestion(
            str(_field(row, "questionId", path)), media, _field(row, "question", path), truths, kinds[0]
        )


def _gqa(folder: Path) -> Iterator[PublicQuestion]:
    path = folder / "testdev_balanced_questions.json"
    for key, row in sorted(_json(path).items()):
        media = folder / "images" / f"{_field(row, 'imageId', path)}.jpg"
        kind = (row.get("types") or {}).get("structural", "")
        yield PublicQuestion(key, media, _field(row, "question", path), (_field(row, "answer", path),), kind)


def _pope(folder: Path) -> Iterator[PublicQuestion]:
    for path in _found(folder, "coco_pope_*.json"):
        group = path.stem.removeprefix("coco_pope_")
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            row = json.loads(line)
            key = f"{group} {_field(row, 'question_id', path)}"
            media = folder / "val2014" / _field(row, "image", path)
            yield PublicQuestion(key, media, _field(row, "text", path), (_field(row, "label", path),), group)


def _textvqa(folder: Path) -> Iterator[PublicQuestion]:
    path = folder / "TextVQA_0.5.1_val.json"
    for row in _field(_json(path), "data", path):
        media = folder / "train_images" / f"{_field(row, 'image_id', path)}.jpg"
        truths = tuple(_field(row, "answers", path))
        yield PublicQuestion(str(_field(row, "question_id", path)), media, _field(row, "question", path), truths)


def _chartqa(folder: Path) -> Iterator[PublicQuestion]:
    for path in _found(folder, "test/test_*.json"):
        group = path.stem.removeprefix("test_")
        for number, row in enumerate(_json(path)):
            media = folder / "test" / "png" / _field(row, "imgname", path)
            truth = str(_field(row, "label", path))
            yield PublicQuestion(f"{group} {number}", media, _field(row, "query", path), (truth,), group)


# Clips --------------------------------------------------------------------------------------------------------------


def _videomme(folder: Path) -> Iterator[PublicQuestion]:
    import pyarrow.parquet

    for path in _found(folder, "videomme/test-*.parquet"):
        for row in pyarrow.parquet.read_table(path).to_pylist():
            media = folder / "data" / f"{_field(row, 'videoID', path)}.mp4"
            # Options come with their letters.
            question = "\n".join([_field(row, "question", path), *_field(row, "options", path)])
            key, truth = _field(row, "question_id", path), _field(row, "answer", path)
            yield PublicQuestion(key, media, question, (truth,), row.get("duration", ""))


def _mlvu(folder: Path) -> Iterator[PublicQuestion]:
    for path in _found(folder, "json/*.json"):
        for number, row in enumerate(_json(path)):
            options = _field(row, "candidates", path)
            right = _field(row, "answer", path)
            if right not in options:
                raise MissingData(f"{path}: entry {number}: the answer {right!r} is none of {options}")
            media = folder / "video" / path.stem / _field(row, "video", path)
            question = with_options(_field(row, "question", path), options)
            truth = LETTERS[options.index(right)]
            yield PublicQuestion(f"{path.stem} {number}", media, question, (truth,), row.get("question_type", ""))


def _nextqa(folder: Path) -> Iterator[PublicQuestion]:
    path = next((p for p in (folder / "test.csv", folder / "val.csv") if p.is_file()), None)
    if path is None:
        raise MissingData(f"expected test.csv or val.csv in {folder}")
    places = _json(folder / "map_vid_vidorID.json")
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            video = _field(row, "video", path)
            media = folder / "videos" / f"{_field(places, video, folder / 'map_vid_vidorID.json')}.mp4"
            options = [_field(row, f"a{i}", path) for i in range(5)]
            question = with_options(f"{_field(row, 'question', path)}?", options)
            key = f"{video} {_field(row, 'qid', path)}"
            yield PublicQuestion(
                key, media, question, (LETTERS[int(_field(row, "answer", path))],), row.get("type", "")
            )


def _longvideobench(folder: Path) -> Iterator[PublicQuestion]:
    path = folder / "lvb_val.json"
    for row in _json(path):
        question = with_options(_field(row, "question", path), _field(row, "candidates", path))
        media = folder / "videos" / _field(row, "video_path", path)
        truth = LETTERS[_field(row, "correct_choice", path)]
        group = str(row.get("duration_group", ""))
        yield PublicQuestion(str(_field(row, "id", path)), media, question, (truth,), group)


def _robovqa(folder: Path) -> Iterator[PublicQuestion]:
    path = folder / "robovqa_benchmark_qa_pairs.json"
    for number, row in enumerate(_json(path)):
        asked = _field(row, "qa_pairs", path)
        options, right = _field(asked, "index2ans", path), _field(asked, "answer", path)
        if right not in options:
            raise MissingData(f"{path}: entry {number}: the answer {right!r} is none of {sorted(options)}")
        question = "\n".join(
            [_field(asked, "question", path), *(f"{letter}. {text}" for letter, text in options.items())]
        )
        yield PublicQuestion(str(number), folder / _field(row, "video", path), question, (right,))


SETS: dict[str, PublicSet] = {
    "ai2d": PublicSet(_ai2d, choice, _OPTION, "image"),
    "docvqa": PublicSet(_docvqa, anls, _WORD, "image"),
    "gqa": PublicSet(_gqa, exact, _WORD, "image"),
    "pope": PublicSet(_pope, yes_or_no, _WORD, "image"),
    "textvqa": PublicSet(_textvqa, vqa, _WORD, "image"),
    "chartqa": PublicSet(_chartqa, relaxed, "\nAnswer the question with a single word.", "image"),
    "videomme": PublicSet(_videomme, choice, _OPTION, "video"),
    "mlvu": PublicSet(_mlvu, choice, _OPTION, "video"),
    "nextqa": PublicSet(_nextqa, choice, _OPTION, "video"),
    "longvideobench": PublicSet(_longvideobench, choice, _OPTION, "video"),
    "robovqa": PublicSet(_robovqa, choice, _OPTION, "video"),
}


def read(name: str, folder: Path) -> list[PublicQuestion]:
    """All questions of a benchmark, in the order of its files. Raises MissingData; media are looked for when asked."""
    questions = list(SETS[name].read(folder))
    keys = {question.key for question in questions}
    if not questions or len(keys) != len(questions):
        raise MissingData(f"{folder}: expected questions with keys of their own, got {len(questions)} with {len(keys)}")
    return questions
