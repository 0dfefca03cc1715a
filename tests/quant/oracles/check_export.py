"""What transformers sees in a checkpoint that our writer made (`write_export.py`).

    python check_export.py FOLDER OUT       FOLDER: the checkpoint, beside `inputs.safetensors`; OUT: gets the answers

Runs in the environments of `build_fixtures.py`: the first for AutoAWQ's format, the second for compressed-tensors'.
Nothing of `sparsevila` is imported. The answers: `answers.safetensors` with the logits behind the picture and the
prompt, the last hidden states of the prompt without the picture, and two rows that went into each quantised layer with
what came out (`<module>.x`, `<module>.y`), computed in float32, for AutoAWQ in float16 as its layers want;
`modules.json` with each linear module's bits, group size and whether its inputs are quantised, or null;
`versions.json`. Exits with an error where transformers reports a missing, unexpected or misshapen tensor.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROWS = 2  # kept of what a layer reads and gives
POSITIONS = 5  # the last ones, whose logits are kept


def load(folder: Path) -> Any:
    import transformers

    is_awq = method_of(folder) == "awq"
    if is_awq:
        compute_awq_without_a_gpu()
    dtype = torch.float16 if is_awq else torch.float32
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, torch_dtype=dtype, output_loading_info=True
    )
    faults = {key: sorted(map(str, found)) for key, found in report.items() if found}
    if faults:
        sys.exit(f"{folder}: transformers reports {faults}")
    if not is_awq:
        torch.nn.Module.float(model)  # PreTrainedModel refuses, for the sake of the packed weights
    return model.eval()


def method_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]


def compute_awq_without_a_gpu() -> None:
    """transformers' loader asks for a GPU, AutoAWQ's layer has a plain implementation beside its kernels."""
    import awq.modules.linear.gemm as gemm
    from transformers.quantizers.quantizer_awq import AwqQuantizer

    gemm.TRITON_AVAILABLE = False
    AwqQuantizer.validate_environment = lambda self, *_, **__: None


def linear_modules(model: Any) -> dict[str, Any]:
    kinds = ("Linear", "WQLinear_GEMM", "NonDynamicallyQuantizableLinear")
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}


def scheme_of(module: Any) -> list[Any] | None:
    """[bits, group size or null, whether the inputs are quantised], of what is to be computed here."""
    if type(module).__name__ == "WQLinear_GEMM":
        return [module.w_bit, module.group_size, False]
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return None
    return [scheme.weights.num_bits, scheme.weights.group_size, scheme.input_activations is not None]


@torch.inference_mode()
def answers(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, arguments: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            x, y = arguments[0].flatten(0, -2), out.flatten(0, -2)
            found.setdefault(f"{name}.x", x[-ROWS:].float().clone())
            found.setdefault(f"{name}.y", y[-ROWS:].float().clone())

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in linear_modules(model).items()]
    pixels = inputs["pixel_values"].to(next(model.parameters()).dtype)
    whole = model(input_ids=inputs["input_ids"], pixel_values=pixels, image_sizes=inputs["image_sizes"])
    for handle in handles:
        handle.remove()
    decoder = model.model.language_model if hasattr(model, "model") else model.language_model.model
    text = decoder(input_ids=inputs["text_ids"])
    found["logits"] = whole.logits[0, -POSITIONS:].float().contiguous()
    found["text_hidden"] = text.last_hidden_state[0].float().contiguous()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load(args.folder)
    schemes = {name: scheme_of(module) for name, module in linear_modules(model).items()}
    found = answers(model, load_file(args.folder.parent / "inputs.safetensors"))
    kept = {k: v for k, v in found.items() if schemes.get(k.rpartition(".")[0], True) is not None}
    save_file(kept, args.out / "answers.safetensors")
    (args.out / "answers.safetensors").chmod(0o644)
    (args.out / "modules.json").write_text(json.dumps(schemes, indent=1) + "\n")
    packages = ("torch", "transformers", "autoawq" if method_of(args.folder) == "awq" else "compressed-tensors")
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    (args.out / "versions.json").write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
