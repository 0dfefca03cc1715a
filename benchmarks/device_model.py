"""A random model of a published shape, made where it will run: nothing of its size is written to a disk or moved.

W4A16 decoder layers and a W8A8 tower, as the quantiser leaves them; the rest in the engine's dtype. Its answers are
noise, its speed and its memory are those of the shape.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsevila import Engine
from sparsevila.engine.config import EngineInfo
from sparsevila.engine.tokenizer import load_tokenizer
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.registry import build_model
from sparsevila.quant.linear import LinearLayer, num_parameters, quantised_like
from sparsevila.quant.plan import scheme_name
from sparsevila.quant.scheme import Int4Weight, Int8Weight

sys.path.insert(0, str(Path(__file__).resolve().parent))
from random_checkpoint import Shape, train_tokenizer, write_documents

_CODES_STD = {4: 4.61, 8: 42.0}  # of codes: uniform over 16 values, normal below 127


def device_engine(
    shape: Shape,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    group_size: int = 128,
    quantised: bool = True,
) -> Engine:
    """An engine around such a model; `folder` takes its config and tokenizer, a few hundred KB.

    Not `quantised`: every layer in `dtype`.
    """
    start = time.perf_counter()
    write_documents(folder, shape, dtype=str(dtype).removeprefix("torch."), tokenizer=train_tokenizer())
    save_file({"image_newline": torch.zeros(1)}, folder / "model.safetensors")  # a checkpoint has a file of tensors
    checkpoint = Checkpoint.open(folder)
    model: Any = build_model(checkpoint)
    generator = torch.Generator(device).manual_seed(0)
    schemes = (("language_model.layers.", 4), ("vision_tower.encoder.layers.", 8)) if quantised else ()
    for prefix, bits in schemes:
        for parent, name, layer in list(_linear_layers(model, prefix)):
            setattr(parent, name, _quantised(layer, bits, group_size, dtype, device, generator))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = _drawn(module, name, tuple(parameter.shape), dtype, device, generator)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    info = EngineInfo(
        model="random",
        architecture=checkpoint.config["architectures"][0],
        folder="",
        scheme=scheme_name(model, dtype),
        device=str(device),
        parameters=num_parameters(model),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        max_context=model.decoder.config.max_context,
        load_s=time.perf_counter() - start,
    )
    engine = Engine(model.eval(), load_tokenizer(checkpoint), info, max_memory_bytes=None)
    engine.tokenizer.eos_ids = ()  # every answer has the same length
    return engine


def _linear_layers(model: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, LinearLayer]]:
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if isinstance(child, LinearLayer) and f"{path}.{name}".startswith(prefix):
                yield module, name, child


def _quantised(
    old: LinearLayer, bits: int, group_size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> LinearLayer:
    layer = quantised_like(old, group_size if bits == 4 else None)
    for part, (rows, columns) in layer.waits_for().items():
        step = columns**-0.5 / _CODES_STD[bits]
        weight: Int4Weight | Int8Weight
        if bits == 4:
            nibbles = torch.randint(
                256, (rows, -(-columns // 2)), generator=generator, device=device, dtype=torch.uint8
            )
            groups = (rows, -(-columns // group_size))
            zeros = torch.randint(7, 9, groups, generator=generator, device=device, dtype=torch.uint8)
            scales = torch.full(groups, step, device=device, dtype=torch.float16)
            weight = Int4Weight(nibbles, scales, zeros, columns, group_size)
        else:
            codes = torch.randn(rows, columns, generator=generator, device=device).mul_(_CODES_STD[8])
            codes = codes.round_().clamp_(-127, 127).to(torch.int8)
            weight = Int8Weight(codes, torch.full((rows,), step, device=device))
        layer.fill(part, weight, dtype=dtype, device=device)
    return layer


def _drawn(
    module: nn.Module, name: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Norms around 1, biases small, matrices of unit variance."""
    values = torch.randn(size, generator=generator, device=device)
    if name == "bias":
        values *= 0.1
    elif len(size) == 1:
        values = 1 + 0.1 * values if name == "weight" else values
    elif not isinstance(module, nn.Embedding):
        values *= torch.Size(size[1:]).numel() ** -0.5
    return values.to(dtype)
