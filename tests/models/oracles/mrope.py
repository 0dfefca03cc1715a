"""Makes `tests/fixtures/qwen/` with the last `transformers` whose positions of a clip are those of the models.

    python tests/tiny_qwen.py FOLDER/qwen2 qwen2            in the environment of the tests
    python tests/tiny_qwen.py FOLDER/qwen2.5 qwen2.5
    python tests/models/oracles/mrope.py FOLDER             in a virtual environment of its own

    pip install torch==2.13.0
    pip install transformers==4.51.3 pillow

Which version of `transformers` can be asked about what, as its code stands and as runs of it have shown:

    4.49 to 4.51.3      fractions of a second kept, text goes on behind the largest position: the models' own rule
    4.52.4 to 5.0.0     seconds between frames cut to whole ones: 0.5 s gives every frame the same time
    5.3 to 5.16         so too, and text goes on behind the picture's sides, whatever the time: it meets later frames
    5.23.0              fractions kept, text goes on behind the sides

All of them agree about pictures. Nothing of `sparsevila` is imported: what the version says is compared with what we
compute, not made from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "qwen"
NEW_TOKENS = 12
PIXEL_STEP = 199  # of the patches' numbers every such one is kept

# A sequence: ids of text, or a picture or clip: (frames, height, width), the seed of its noise, its frames a second.
CASES: dict[str, list[dict[str, Any]]] = {
    "clip": [{"text": [1, 40, 41]}, {"video": [6, 60, 90], "seed": 1, "fps": 2.0}, {"text": [13, 60]}],
    "odd clip, fractions": [
        {"text": [1, 40]}, {"video": [5, 90, 60], "seed": 2, "fps": 1.25}, {"text": [13, 60, 61]}
    ],
    "slow clip": [{"text": [1]}, {"video": [4, 60, 60], "seed": 3, "fps": 0.3}, {"text": [13, 60, 61, 62]}],
    "mixed": [
        {"text": [1, 40]}, {"image": [1, 80, 120], "seed": 4}, {"text": [50]},
        {"video": [8, 60, 90], "seed": 5, "fps": 3.3}, {"text": [51, 52]}, {"image": [1, 60, 60], "seed": 6},
        {"video": [2, 60, 60], "seed": 7, "fps": 1.0}, {"text": [13, 60, 61]},
    ],
}  # fmt: skip

# Positions alone: parts are a number of text tokens, or (temporal patches, rows, columns of patches, seconds or None).
SEQUENCES: list[list[Any]] = [
    [3, (1, 4, 6, None), 3],
    *[[2, (4, 4, 4, seconds), 3] for seconds in (0.5, 1.0, 1.5, 2.0)],
    [2, (1, 4, 4, None), 2, (3, 4, 4, 0.4), 2],
    [2, (10, 4, 4, 1.0), 3],
    [2, (3, 8, 4, 0.1), 2, (5, 4, 8, 0.9), 2, (1, 4, 4, None), 2],
]
LONG_CLIPS = (0.7, 0.35, 1.1)  # seconds from patch to patch of 400


def noise(shape: list[int], seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (*shape, 3)).astype(np.uint8)


def positions_of(parts: list[Any], generation: str) -> Tensor:
    """(3, tokens) by the version's own function, without a model."""
    start, end, image, video = 301, 302, 303, 304
    ids: list[int] = []
    images, videos, seconds = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += [7] * part
            continue
        times, rows, cols, step = part
        ids[-1] = start
        ids += [image if step is None else video] * (times * rows * cols // 4)
        (images if step is None else videos).append([times, rows, cols])
        seconds += [] if step is None else [step]
    config = SimpleNamespace(
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2),
    )  # fmt: skip
    grids = {
        "image_grid_thw": torch.tensor(images) if images else None,
        "video_grid_thw": torch.tensor(videos) if videos else None,
    }
    if generation == "qwen2.5":
        grids["second_per_grid_ts"] = torch.tensor(seconds)
    found, _ = model_class(generation).get_rope_index(SimpleNamespace(config=config), torch.tensor([ids]), **grids)
    return found[:, 0]


def model_class(generation: str) -> Any:
    names = {"qwen2": "Qwen2VLForConditionalGeneration", "qwen2.5": "Qwen2_5_VLForConditionalGeneration"}
    return getattr(transformers, names[generation])


def run_case(model: Any, folder: Path, parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Positions of the prompt, a sample of the patches, greedy tokens and their logits."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    area = json.loads((folder / "video_preprocessor_config.json").read_text())["size"]
    processors = {
        "image": Qwen2VLImageProcessor(min_pixels=pictures["min_pixels"], max_pixels=pictures["max_pixels"]),
        "video": Qwen2VLImageProcessor(min_pixels=area["shortest_edge"], max_pixels=area["longest_edge"]),
    }
    keys = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
    config = model.config
    pads = {"image": config.image_token_id, "video": config.video_token_id}
    ids: list[int] = []
    feeds: dict[str, list[Tensor]] = {}
    seconds = []
    for part in parts:
        kind = next(iter(part))
        if kind == "text":
            ids += part["text"]
            continue
        frames = noise(part[kind], part["seed"])
        media = {"images": frames[0], "videos": None} if kind == "image" else {"images": None, "videos": [list(frames)]}
        made = processors[kind](**media, return_tensors="pt")
        for key in keys[kind]:
            feeds.setdefault(key, []).append(made[key])
        grid = made[keys[kind][1]][0]
        ids += [config.vision_start_token_id, *[pads[kind]] * (int(grid.prod()) // 4), config.vision_end_token_id]
        seconds += [2 / part["fps"]] if kind == "video" else []
    whole = {key: torch.cat(parts) for key, parts in feeds.items()}
    if hasattr(config.vision_config, "tokens_per_second"):
        whole["second_per_grid_ts"] = torch.tensor(seconds)
    prompt = torch.tensor([ids])
    grids = {key: value for key, value in whole.items() if "pixel" not in key}
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), **whole, max_new_tokens=NEW_TOKENS, do_sample=False,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    patches = torch.cat([whole[key].flatten() for key in ("pixel_values", "pixel_values_videos") if key in whole])
    return {
        "positions": model.get_rope_index(prompt, **grids)[0][:, 0].to(torch.int16),
        "patches": patches[::PIXEL_STEP].contiguous(),
        "tokens": answer.sequences[0, len(ids) :].to(torch.int16),
        "logits": torch.cat(answer.logits),
    }


@torch.inference_mode()
def main(root: Path) -> None:
    assert transformers.__version__ == "4.51.3", transformers.__version__
    FIXTURES.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__, "cases": CASES}
    found["patch_step"] = PIXEL_STEP
    for generation in ("qwen2", "qwen2.5"):
        model = model_class(generation).from_pretrained(root / generation, torch_dtype=torch.float32).eval()
        cases = {name: run_case(model, root / generation, parts) for name, parts in CASES.items()}
        tensors = {f"{name}/{key}": value for name, case in cases.items() for key, value in case.items()}
        save_file(tensors, FIXTURES / f"{generation}.safetensors")
        found[generation] = [
            {"parts": parts, "positions": positions_of(parts, generation).tolist()} for parts in SEQUENCES
        ]
    found["long_clips"] = {
        str(step): positions_of([1, (400, 2, 2, step), 1], "qwen2.5")[0, 1:-1].tolist() for step in LONG_CLIPS
    }
    (FIXTURES / "positions.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
