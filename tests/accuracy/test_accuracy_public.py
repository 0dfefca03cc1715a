"""Public benchmarks: small files in the form that their authors publish, read, asked and scored."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accuracy.public import Answer, mean_with_interval, table
from accuracy.public_sets import SETS, MissingData, read
from oracles import Oracle, write_clip
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def ai2d(folder: Path) -> None:
    put(
        folder / "questions" / "0.png.json",
        {
            "imageName": "0.png",
            "questions": {
                "What eats grass?": {
                    "abcLabel": False, "answerTexts": ["fox", "hare", "owl", "tree"], "correctAnswer": 1,
                    "questionId": "0.png-0",
                }
            },
        },
    )  # fmt: skip


def docvqa(folder: Path) -> None:
    rows = [
        {"questionId": 7, "question": "What is the date?", "image": "documents/a_1.png", "answers": ["1 May", "May 1"],
         "question_types": ["form"], "data_split": "val"}
    ]  # fmt: skip
    put(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": rows})


def gqa(folder: Path) -> None:
    rows = {"201": {"imageId": "n1", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}}}
    put(folder / "testdev_balanced_questions.json", rows)


def pope(folder: Path) -> None:
    for name in ("random", "popular", "adversarial"):
        row = {"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "Is there a dog?", "label": "no"}
        put(folder / f"coco_pope_{name}.json", json.dumps(row) + "\n\n")


def textvqa(folder: Path) -> None:
    row = {"question_id": 3, "question": "What brand?", "image_id": "0a1b", "answers": ["acme"] * 7 + ["none"] * 3}
    put(folder / "TextVQA_0.5.1_val.json", {"data": [row]})


def chartqa(folder: Path) -> None:
    for name in ("human", "augmented"):
        put(folder / "test" / f"test_{name}.json", [{"imgname": "1.png", "query": "How many?", "label": "14"}])


def videomme(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    row = {
        "videoID": "abc", "duration": "short", "question_id": "001-1", "question": "What happens?",
        "options": ["A. It rains.", "B. It snows.", "C. Nothing.", "D. A bird sings."], "answer": "C",
    }  # fmt: skip
    (folder / "videomme").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "videomme" / "test-00000-of-00001.parquet")


def mlvu(folder: Path) -> None:
    row = {"video": "v.mp4", "duration": 480.0, "question": "What colour?", "candidates": ["red", "blue"],
           "answer": "blue", "question_type": "needle"}  # fmt: skip
    put(folder / "json" / "2_needle.json", [row])


def nextqa(folder: Path) -> None:
    put(
        folder / "val.csv",
        "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
        '4010,369,640,480,"why did the boy, in red, run",3,6,CW,tired,cold,hungry,to play,lost\n',
    )
    put(folder / "map_vid_vidorID.json", {"4010": "1164/4010"})


def longvideobench(folder: Path) -> None:
    row = {"id": "x_0", "video_id": "x", "video_path": "x.mp4", "question": "Who speaks?", "candidates": ["he", "she"],
           "correct_choice": 1, "duration_group": 60}  # fmt: skip
    put(folder / "lvb_val.json", [row])


def robovqa(folder: Path) -> None:
    asked = {"question": "Is it possible to open the door?", "index2ans": {"A": "yes", "B": "no"}, "answer": "B"}
    put(folder / "robovqa_benchmark_qa_pairs.json", [{"video": "clips/1.mp4", "qa_pairs": asked}])


WRITERS: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (ai2d, docvqa, gqa, pope, textvqa, chartqa, videomme, mlvu, nextqa, longvideobench, robovqa)
}
# How many questions, the first one's media below the folder, its right answers, a right and a wrong reply.
WANTED = {
    "ai2d": (1, "images/0.png", ("B",), "B", "A"),
    "docvqa": (1, "documents/a_1.png", ("1 May", "May 1"), "may 1", "June"),
    "gqa": (1, "images/n1.jpg", ("yes",), "Yes.", "no"),
    "pope": (3, "val2014/COCO_val2014_1.jpg", ("no",), "No, there is none.", "yes"),
    "textvqa": (1, "train_images/0a1b.jpg", ("acme",) * 7 + ("none",) * 3, "Acme", "other"),
    "chartqa": (2, "test/png/1.png", ("14",), "14.2", "15"),
    "videomme": (1, "data/abc.mp4", ("C",), "C. Nothing.", "D"),
    "mlvu": (1, "video/2_needle/v.mp4", ("B",), "(B) blue", "A"),
    "nextqa": (1, "videos/1164/4010.mp4", ("D",), "D", "E"),
    "longvideobench": (1, "videos/x.mp4", ("B",), "The answer is B.", "A"),
    "robovqa": (1, "clips/1.mp4", ("B",), "B. no", "A"),
}


def test_every_set_is_tested() -> None:
    assert WRITERS.keys() == WANTED.keys() == SETS.keys()


@pytest.mark.parametrize("name", SETS)
def test_a_published_file_is_read(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    count, media, truths, right, wrong = WANTED[name]
    questions = read(name, tmp_path)
    assert len(questions) == count
    assert questions[0].media == tmp_path / media
    assert questions[0].truths == truths
    assert SETS[name].metric(right, truths) == 1
    assert SETS[name].metric(wrong, truths) == 0


def test_an_answer_that_is_no_option_is_named(tmp_path: Path) -> None:
    asked = {"question": "Is it?", "index2ans": {"A": "yes"}, "answer": "C"}
    put(tmp_path / "robovqa_benchmark_qa_pairs.json", [{"video": "clips/1.mp4", "qa_pairs": asked}])
    with pytest.raises(MissingData, match=r"entry 0: the answer 'C' is none of \['A'\]"):
        read("robovqa", tmp_path)


def test_options_stand_behind_their_letters(tmp_path: Path) -> None:
    nextqa(tmp_path)
    (question,) = read("nextqa", tmp_path)
    assert question.question == "why did the boy, in red, run?\nA. tired\nB. cold\nC. hungry\nD. to play\nE. lost"


@pytest.mark.parametrize("name", SETS)
def test_a_folder_without_the_files_is_told_what_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="expected "):
        read(name, tmp_path)


@pytest.mark.parametrize("content", ["{", '{"data": [{"question": "x"}]}', '{"data": ["x"]}', "{}"])
def test_a_file_of_another_form_is_refused(content: str, tmp_path: Path) -> None:
    put(tmp_path / "TextVQA_0.5.1_val.json", content)
    with pytest.raises(MissingData, match="TextVQA_0"):
        read("textvqa", tmp_path)


def answer(setting: str, key: str, score: float) -> Answer:
    return Answer(setting, key, "", score, "", 40, 10.0, 0.1)


def test_intervals_and_paired_differences() -> None:
    assert mean_with_interval([1.0]) == (1.0, pytest.approx(float("nan"), nan_ok=True))
    mean, half = mean_with_interval([0.0, 1.0] * 50)
    assert (mean, half) == (0.5, pytest.approx(1.96 * 0.5025 / 10, rel=1e-3))
    answers = [answer("dense", str(i), float(i < 8)) for i in range(10)]
    answers += [answer("sparse", str(i), float(i < 6)) for i in range(10)]
    answers.append(answer("elsewhere", "0", 1.0))
    rows = list(table(answers, ["dense", "sparse"]))[2:]
    assert rows[0].startswith("| dense | 10 | 80.0 ± 26.1 |  | 40 | 10 |")
    assert rows[1].startswith("| sparse | 10 | 60.0 ± 32.0 | -20.0 ± 26.1 |")
    assert len(rows) == 2


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/accuracy/public.py", "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_a_run_is_gone_on_with(oracles: dict[str, Oracle], tmp_path: Path) -> None:
    gqa(tmp_path)
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "images" / "n1.jpg")
    arguments = [
        "--set",
        "gqa",
        "--data",
        tmp_path,
        "--model",
        oracles["vicuna"].folder,
        "--out",
        tmp_path / "out.jsonl",
    ]
    first = run(*arguments, "--settings", "dense", "--max-new-tokens", 3)
    assert first.returncode == 0, first.stderr
    second = run(*arguments, "--settings", "dense", "sparsevila:0.5/0.5", "--max-new-tokens", 3)
    assert second.returncode == 0, second.stderr
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["setting"] for line in lines[1:]] == ["dense", "sparsevila:0.5/0.5"]
    assert "| sparsevila:0.5/0.5 | 1 |" in second.stdout
    other = run(*arguments, "--settings", "dense", "--max-new-tokens", 4)
    assert other.returncode == 1
    assert "another run" in other.stderr


def test_a_clip_is_asked_about(oracles: dict[str, Oracle], tmp_path: Path) -> None:
    longvideobench(tmp_path)
    (tmp_path / "videos").mkdir()
    arguments = ["--set", "longvideobench", "--data", tmp_path, "--model", oracles["video"].folder, "--frames", 3]
    arguments += ["--out", tmp_path / "out.jsonl", "--settings", "dense", "--max-new-tokens", 2]
    missing = run(*arguments)
    assert missing.returncode == 1
    assert "expected x.mp4" in missing.stderr
    write_clip(tmp_path / "videos" / "x.mp4", frames=6)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "| dense | 1 |" in done.stdout
