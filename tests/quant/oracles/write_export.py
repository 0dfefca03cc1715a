"""Small checkpoints that our writer makes, for the tests and for `check_export.py`.

    python write_export.py FOLDER       the fixtures `tests/fixtures/quant/exported/`, but for what the oracles answer

A random LLaVA-NeXT with everything a writer meets. `mixed`: a tower of 8 bits whose last layer nothing uses and stays
dense, a decoder of 4 bits with zero points, one matrix whose width no group divides, an output head of 8 bits. `awq`:
the decoder alone, in AutoAWQ's format. Beside them `inputs.safetensors`, which the oracles run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
from random_checkpoint import NUM_PIECES, Shape, write_random_checkpoint

from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import Frames
from sparsevila.models.registry import load_model
from sparsevila.quant.awq import quantise_int4
from sparsevila.quant.export import CheckpointWriter, OutputFormat
from sparsevila.quant.scheme import Int4Weight, Int8Weight
from sparsevila.quant.smoothquant import quantise_int8

SHAPE = Shape(
    model="llava_next", vision_hidden=32, vision_ffn=56, vision_layers=3, vision_heads=2, image_size=28, patch_size=7,
    text_hidden=48, text_ffn=100, text_layers=2, text_heads=4, text_kv_heads=2, vocab_size=NUM_PIECES + 14,
)  # fmt: skip
GROUP_SIZE = 16  # divides 48 and not 100
USED_TOWER_LAYERS = SHAPE.vision_layers - 1
BEFORE, AFTER, DECODED = (1, 40, 41), (13, 60, 61, 62), (5, 70, 200, 9)  # token ids of the prompt that is compared

# From the names of hub files to each of the three in use.
LAYOUTS: dict[str, Callable[[str], str]] = {
    "hub": lambda name: name,
    "resaved": lambda name: _resaved(name),
    "transformers-5": lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
}


def _resaved(name: str) -> str:
    if name.startswith("language_model."):
        inner = name.removeprefix("language_model.")
        return inner if inner.startswith("lm_head") else inner.replace("model.", "model.language_model.", 1)
    return f"model.{name}"


@dataclass(frozen=True)
class Source:
    """A dense checkpoint, and which of its layers are to have which bits; by the names of hub files."""

    folder: Path
    tensors: Mapping[str, Tensor]
    layout: str = "hub"
    eight_bit: Callable[[str], bool] = field(default=lambda name: _is_used_tower_layer(name) or "lm_head" in name)
    four_bit: Callable[[str], bool] = field(default=lambda name: "language_model.model.layers" in name)
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.bfloat16

    def units(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Int4Weight | Int8Weight]]]:
        """(unit, dense, quantised): the tower, the decoder, the rest; names in the layout asked for."""
        for unit, part in (("tower", "vision_tower"), ("decoder", "language_model.model.layers"), ("rest", "")):
            named = {name: tensor for name, tensor in self.tensors.items() if _part_of(name) == part}
            dense: dict[str, Tensor] = {}
            quantised: dict[str, Int4Weight | Int8Weight] = {}
            for name, tensor in named.items():
                stored = LAYOUTS[self.layout](name)
                weight = self.quantise(name, tensor)
                if weight is None:
                    dense[stored] = tensor
                else:
                    quantised[stored.removesuffix(".weight")] = weight
            yield unit, dense, quantised

    def quantise(self, name: str, tensor: Tensor) -> Int4Weight | Int8Weight | None:
        if tensor.ndim != 2 or not name.endswith(".weight") or "embed" in name:
            return None
        if self.eight_bit(name):
            return quantise_int8(tensor, scale_dtype=torch.float32)
        if self.four_bit(name) and tensor.shape[1] % GROUP_SIZE == 0:
            return quantise_int4(tensor, GROUP_SIZE, self.symmetric, scale_dtype=self.scale_dtype)
        return None

    def documents(self) -> dict[str, bytes]:
        left_out = ("config.json", "model.safetensors")
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir()) if path.name not in left_out}

    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())


def _is_used_tower_layer(name: str) -> bool:
    return any(f"vision_model.encoder.layers.{index}." in name for index in range(USED_TOWER_LAYERS))


def _part_of(name: str) -> str:
    return next((part for part in ("vision_tower", "language_model.model.layers") if name.startswith(part)), "")


def random_source(folder: Path, shape: Shape = SHAPE, *, dtype: str = "bfloat16") -> Source:
    """Writes the dense checkpoint into `folder`."""
    write_random_checkpoint(folder, shape, dtype=dtype)
    return Source(folder, load_file(folder / "model.safetensors"))


def awq_source(folder: Path) -> Source:
    """With sizes, bits and scales that AutoAWQ's format holds."""
    source = random_source(folder, replace(SHAPE, text_ffn=104), dtype="float16")
    return replace(source, eight_bit=lambda name: False, scale_dtype=torch.float16)


def write(source: Source, folder: Path, form: OutputFormat = "compressed-tensors") -> Path:
    """The quantised checkpoint of a source."""
    writer = CheckpointWriter(folder, form=form, fingerprint="test", symmetric=source.symmetric)
    for unit, dense, quantised in source.units():
        if not writer.has(unit):
            writer.add(unit, dense=dense, quantised=quantised, record={"layers": len(quantised)})
    writer.finish(source.config(), documents=source.documents(), record={"calibration": "none"})
    return folder


def picture() -> Frames:
    rgb = np.random.default_rng(0).integers(0, 256, (1, 70, 90, 3), dtype=np.uint8)
    return Frames("image", rgb, np.zeros(1), "<test>", 0.0, key="picture")


def oracle_inputs(folder: Path) -> dict[str, Tensor]:
    """What transformers is to run: the tiles of the picture and a prompt around its tokens."""
    model = load_model(Checkpoint.open(folder, tokenizer=False), dtype=torch.float32, device=torch.device("cpu"))
    frames = picture()
    visual = model.preprocess(frames)
    image = model.config.media_tokens["<image>"]
    ids = [*BEFORE, *[image] * len(visual.token_map), *AFTER, *DECODED]
    return {
        "pixel_values": visual.pixels[None].contiguous(),
        "image_sizes": torch.tensor([frames.rgb.shape[1:3]]),
        "input_ids": torch.tensor([ids]),
        "text_ids": torch.tensor([[*BEFORE, *AFTER, *DECODED]]),
    }


def write_fixture(name: str, folder: Path, source: Source, form: OutputFormat) -> None:
    written = write(source, folder / name, form)
    for path in written.iterdir():
        if "token" in path.name or path.name.startswith(("processor", "generation")):
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(args.folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_fixture("mixed", args.folder, random_source(Path(scratch) / "mixed"), "compressed-tensors")
        write_fixture("awq", args.folder, awq_source(Path(scratch) / "awq"), "awq")
    save_file(oracle_inputs(args.folder / "mixed"), args.folder / "inputs.safetensors")
    for path in args.folder.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
