"""The engine's greedy answers against those of `transformers`: the same checkpoint, pictures and questions, float32.

    python benchmarks/accuracy/oracle.py --model demo --questions 200 --out benchmarks/results/oracle_demo.json

Nothing but the checkpoint is shared. `transformers` resizes with its own image processors, reads a clip's frames
from the file with PyAV, counts visual tokens by what its model makes of the picture, and its Llama tokenizer cuts the
prompt's text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from sparsevila import Engine, Image, SamplingParams, SparseVILAError, Sparsity, Video
from sparsevila.engine.hub import resolve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.answering import EngineAnswerer, answer_limit
from accuracy.questions import Item, Question, draw
from accuracy.run import shown_name
from accuracy.workfile import checksum_of_checkpoint
from environment import describe
from world.video import read_frames


class Oracle:
    """A LLaVA-NeXT-Video checkpoint in `transformers`, dense, float32."""

    def __init__(self, folder: Path) -> None:
        import transformers
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        self._model = transformers.LlavaNextVideoForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._tokenizer = load_tokenizer(folder)
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        own = {name: settings[name] for name in ("size", "crop_size", "image_mean", "image_std")}
        self._frames = CLIPImageProcessorPil(**own)
        self._image = LlavaNextImageProcessorPil(**own, image_grid_pinpoints=settings["image_grid_pinpoints"])

    def answer(self, media: Image | Video, question: Question) -> tuple[int, ...]:
        """Greedy token ids, the end token left out."""
        feeds = self._feeds(media, question.text)
        with torch.inference_mode():
            whole = self._model.generate(
                **feeds, max_new_tokens=answer_limit(question), do_sample=False, pad_token_id=0
            )
        ids = whole[0, feeds["input_ids"].shape[1] :].tolist()
        end = self._tokenizer.eos_token_id
        return tuple(ids[: ids.index(end)] if end in ids else ids)

    def _feeds(self, media: Image | Video, question: str) -> dict[str, torch.Tensor]:
        model = self._model.model
        with torch.inference_mode():
            if isinstance(media, Video):
                frames = [PIL.Image.fromarray(frame) for frame in read_frames(Path(media.source))]
                tiles = self._frames(frames, return_tensors="pt")["pixel_values"][None]
                pixels, token = {"pixel_values_videos": tiles}, "<video>"
                visual = model.get_video_features(tiles).pooler_output
            else:
                assert isinstance(media.source, np.ndarray)
                pixels, token = dict(self._image(PIL.Image.fromarray(media.source), return_tensors="pt")), "<image>"
                visual = model.get_image_features(**pixels).pooler_output
        count = sum(one.numel() // one.shape[-1] for one in visual)
        text = self._tokenizer(f"USER: {token * count}\n{question} ASSISTANT:", return_tensors="pt")
        return {**pixels, "input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}


def load_tokenizer(folder: Path) -> Any:
    """`transformers`' Llama tokenizer, given the pieces of a SentencePiece file, for which it would need protobuf."""
    import sentencepiece
    from transformers import LlamaTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    scores = {piece: pieces.get_score(i) for piece, i in vocabulary.items()}
    merges = generate_merges(vocabulary, scores, {"<unk>", "<s>", "</s>"})
    tokenizer = LlamaTokenizerFast(vocab=vocabulary, merges=merges, legacy=False, add_bos_token=True)
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    behind = {int(i): token["content"] for i, token in added.items() if int(i) >= len(pieces)}
    tokenizer.add_special_tokens({"additional_special_tokens": [behind[i] for i in sorted(behind)]})
    got = {i: tokenizer.convert_ids_to_tokens(i) for i in behind}
    if got != behind:
        raise ValueError(f"special tokens: expected {behind}, got {got}")
    return tokenizer


@dataclass(frozen=True)
class Comparison:
    """One question, and what both sides answered."""

    item: str
    kind: str
    type: str
    question: str
    truth: str
    engine: tuple[int, ...]  # token ids
    transformers: tuple[int, ...]


def compare(engine: Engine, oracle: Oracle, questions: Sequence[tuple[Item, Question]]) -> list[Comparison]:
    """Each question alone, dense and greedy."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        answerer = EngineAnswerer(engine, Path(folder))
        for item, question in questions:
            (media,) = answerer.show(item, "own").media
            with closing(engine.session(media=[media], sparsity=Sparsity(method="dense"))) as session:
                params = SamplingParams(max_new_tokens=answer_limit(question))
                ours = session.ask(question.text, params=params).token_ids
            theirs = oracle.answer(media, question)
            found.append(
                Comparison(item.key, item.layout.kind, question.type, question.text, question.answer, ours, theirs)
            )
    return found


def first_questions(number: int) -> list[tuple[Item, Question]]:
    """`number` questions, mixed over the layouts."""
    return [(item, question) for item in draw(number) for question in item.questions][:number]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder or alias of a LLaVA-NeXT-Video checkpoint")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        folder = resolve(args.model).path
    except SparseVILAError as error:
        parser.error(f"--model: {error}")
    import transformers

    with Engine.load(folder, device="cpu", dtype="float32") as engine:
        compared = compare(engine, Oracle(folder), first_questions(args.questions))
        texts = {ids: engine.tokenizer.decode(list(ids)) for one in compared for ids in (one.engine, one.transformers)}
    same = [one.engine == one.transformers for one in compared]
    kinds = sorted({one.kind for one in compared})
    data = {
        "environment": describe() | {"transformers": transformers.__version__},
        "model": {"name": shown_name(args.model), "checksum": checksum_of_checkpoint(folder), "dtype": "float32"},
        "asked": len(compared),
        "identical": sum(same),
        "tokens": sum(len(one.engine) for one in compared),
        "by_kind": {
            kind: {
                "asked": sum(one.kind == kind for one in compared),
                "identical": sum(s for s, one in zip(same, compared, strict=True) if one.kind == kind),
            }
            for kind in kinds
        },
        "differences": [
            asdict(one) | {"engine": texts[one.engine], "transformers": texts[one.transformers]}
            for s, one in zip(same, compared, strict=True)
            if not s
        ],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{data['identical']} of {data['asked']} answers identical, token for token ({data['tokens']} tokens)")


if __name__ == "__main__":
    main()
