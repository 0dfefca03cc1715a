"""Makes the quantised checkpoints under `tests/fixtures/quant/` with the tools that publish such files.

    python build_fixtures.py awq FOLDER           in the first environment
    python build_fixtures.py compressed FOLDER    in the second

The tests read what lies in the repository and need neither tool. Their pins contradict each other and ours, so each
has a virtual environment of its own (Python 3.11, no GPU, below a minute of work each):

    pip install torch==2.13.0
    pip install transformers==4.51.3 "datasets<4" zstandard triton==3.7.1 accelerate pillow setuptools wheel
    pip install --no-deps --no-build-isolation autoawq==0.2.9

    pip install torch==2.13.0
    pip install llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0

Nothing of `sparsevila` is imported: what the tools say is compared with what we compute, not made from it. Beside the
checkpoints stand the tools' own answers: `dequantised.safetensors` (matrices as the tool sees them, the layer's name
as key), `forward.safetensors` (inputs and outputs of a layer), `packers.safetensors` (random integers and what the
packer made of them), `targets.json` (which entry of a config decides about a layer). `versions.json` in each folder
names the versions. A rebuild may differ in a few codes: a search for scales need not end at the same one twice.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

IMAGE_TOKEN, VOCAB = 577, 590  # of the tests' own tokenizer
CALIBRATION_LEN = 48
AWQ_SHAPES = (  # N, K, group size; the packers drop what is over a multiple of 32
    (64, 256, 32), (96, 128, 64), (32, 384, 128), (128, 128, 64), (32, 64, 32), (32, 640, 64),
)  # fmt: skip
LAYER_NAMES = (
    "language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.11.mlp.down_proj",
    "model.layers.1.self_attn.o_proj", "vision_tower.encoder.layers.3.mlp.fc1", "lm_head", "language_model.lm_head",
    "model.visual.blocks.7.attn.qkv", "visual.merger.mlp.0", "multi_modal_projector.linear_1",
)  # fmt: skip
TARGETS_AND_IGNORED: tuple[tuple[list[str], list[str]], ...] = (
    (["Linear"], []),
    (["Linear"], ["lm_head", "re:.*vision_tower.*"]),
    (["Linear"], ["re:vision_tower", "re:.*lm_head", "re:visual.*"]),
    (["Linear", "lm_head", "re:.*mlp.*", "re:.*down_proj$"], ["re:.*multi_modal_projector.*"]),
    (["re:.*layers\\.[0-9]\\..*", "re:.*layers[.]\\d+[.]mlp.*"], []),
    (
        [
            "re:.*(q|k|v|o)_proj$",
            "re:^(model\\.)?visual\\.blocks\\.\\d+\\.(attn|mlp)",
            "model.layers.1.self_attn.o_proj",
        ],
        [],
    ),
    (["re:.*self_attn.*", "Linear"], ["Linear"]),
    (["re:.*mlp.*", "visual.merger.mlp.0", "vision_tower.encoder.layers.3.mlp.fc1"], []),
    (["re:.*[^.]+_proj", "re:lm_hea.?$", "re:language_model.lm_head$|visual"], ["model"]),
)
COMPRESSED_SHAPES = (  # N, K, group size; the last is K for a scale per row
    (16, 64, 32), (13, 60, 20), (269, 90, 30), (7, 37, 37), (1, 9, 9), (9, 128, 128),
)  # fmt: skip


def random_codes(rng: torch.Generator, *shape: int, low: int = 0, high: int = 16) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=rng)


def random_scales(rng: torch.Generator, N: int, G: int) -> torch.Tensor:
    """Powers of two times 5: every product with a code is exact in float16, so no tool can round a code away."""
    return 5 * 2.0 ** -torch.randint(6, 11, (N, G), generator=rng).to(torch.float32)


def llava_next(transformers: Any, *, hidden: int, dtype: torch.dtype) -> Any:
    """A tiny random LLaVA-NeXT whose weights are large enough for a wrong one to show."""
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56,
            patch_size=14, hidden_act="quick_gelu", projection_dim=24,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=4096, rms_norm_eps=1e-5,
        ),
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )  # fmt: skip
    return spread(transformers.LlavaNextForConditionalGeneration(config).to(dtype))


def llama(transformers: Any, *, hidden: int, dtype: torch.dtype) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=5 * hidden // 2, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=160, max_position_embeddings=512, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    return spread(transformers.LlamaForCausalLM(config).to(dtype))


@torch.no_grad()
def spread(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.mul_(10)
        elif name.endswith(("o_proj.weight", "v_proj.weight")) or "mlp" in name:
            parameter.mul_(3)
    return model.eval()


def write_versions(folder: Path, *packages: str) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    (folder / "versions.json").write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n")


def keep(source: Path, target: Path) -> None:
    """The files of a checkpoint that the tests read."""
    for path in sorted(source.glob("model*.safetensors*")):
        shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def calibration() -> list[list[int]]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randint(3, 150, (CALIBRATION_LEN,), generator=rng).tolist() for _ in range(8)]


# AutoAWQ ------------------------------------------------------------------------------------------------------------


def awq_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from awq.modules.linear import WQLinear_GEMM

    yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, WQLinear_GEMM))


def dequantised_by_awq(layer: Any) -> torch.Tensor:
    from awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size).t().contiguous()


@torch.no_grad()
def quantise_by_awq(folder: Path, kind: str, model: Any, wrap: Any, group_size: int) -> None:
    """Calibrates, saves in the gemm layout, and keeps what AutoAWQ's modules compute."""
    from awq.models.base import BaseAWQForCausalLM

    assert issubclass(wrap, BaseAWQForCausalLM)
    whole = wrap(model, kind, False, model.config, None, None)
    settings = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    whole.quantize(None, quant_config=settings, calib_data=calibration(), max_calib_seq_len=CALIBRATION_LEN)
    with tempfile.TemporaryDirectory() as scratch:
        whole.save_quantized(scratch)
        keep(Path(scratch), folder)
    rng = torch.Generator().manual_seed(5)
    forward, dequantised = {}, {}
    for name, layer in awq_layers(whole.model):
        x = torch.randn(3, layer.in_features, generator=rng).half()
        forward[f"{name}.x"], forward[f"{name}.y"] = x, layer(x).contiguous()
        if ".layers.1.self_attn." in name:
            dequantised[name] = dequantised_by_awq(layer)
    save_file(forward, folder / "forward.safetensors")
    save_file(dequantised, folder / "dequantised.safetensors")


def pack_by_awq(N: int, K: int, g: int, seed: int) -> dict[str, torch.Tensor]:
    """Random integers, and the tensors of the three layouts for them."""
    from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast

    rng = torch.Generator().manual_seed(seed)
    codes, zeros = random_codes(rng, N, K), random_codes(rng, N, K // g)
    scales = random_scales(rng, N, K // g)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = (codes - zeros.repeat_interleave(g, 1)) * scales.repeat_interleave(g, 1)
    tensors = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "group_scales": scales.half()}
    kinds: dict[str, Any] = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}
    for kind, module in kinds.items():
        turn: Callable[[torch.Tensor], torch.Tensor] = torch.t if kind == "gemm" else torch.clone
        packed = module.from_linear(
            linear, 4, g, scales=turn(scales).contiguous(), zeros=turn(zeros.float()).contiguous()
        )
        for suffix in ("qweight", "qzeros", "scales"):
            tensors[f"{kind}.{suffix}"] = getattr(packed, suffix).contiguous()
    return tensors


def build_awq(out: Path) -> None:
    import awq.modules.linear.gemm as gemm
    import transformers
    from awq.models.llama import LlamaAWQForCausalLM
    from awq.models.llava_next import LlavaNextAWQForCausalLM

    gemm.TRITON_AVAILABLE = False  # the plain implementation: the kernel needs a GPU
    for name, kind, make, wrap, hidden, group_size in (
        ("awq_llama", "llama", llama, LlamaAWQForCausalLM, 128, 32),
        ("awq_llava_next", "llava_next", llava_next, LlavaNextAWQForCausalLM, 128, 64),
    ):
        folder = fresh(out / name)
        torch.manual_seed(0)
        quantise_by_awq(folder, kind, make(transformers, hidden=hidden, dtype=torch.float16), wrap, group_size)
        write_versions(folder, "autoawq")
    folder = fresh(out / "awq_packers")
    packed = {}
    for seed, (N, K, g) in enumerate(AWQ_SHAPES):
        packed |= {f"{N}x{K}g{g}.{name}": tensor for name, tensor in pack_by_awq(N, K, g, seed).items()}
    save_file(packed, folder / "packers.safetensors")
    write_versions(folder, "autoawq")


# compressed-tensors -------------------------------------------------------------------------------------------------


def quantise_by_llmcompressor(folder: Path, model: Any, recipe: list[Any]) -> None:
    """Calibrates, saves compressed, reads back, and keeps the matrices that compressed-tensors unpacks itself."""
    import datasets
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor import oneshot

    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[assignment,method-assign]  # there is no GPU
    with tempfile.TemporaryDirectory() as scratch:
        dense, saved = Path(scratch) / "dense", Path(scratch) / "saved"
        model.save_pretrained(dense)
        ids = calibration()
        data = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        loaded = type(model).from_pretrained(dense, dtype=model.dtype)
        oneshot(
            model=loaded, processor=unused_tokenizer(), recipe=recipe, dataset=data, pipeline="basic",
            num_calibration_samples=len(ids), max_seq_length=CALIBRATION_LEN,
        )  # fmt: skip
        schemes: dict[str, QuantizationScheme] = {
            name: module.quantization_scheme
            for name, module in loaded.named_modules()
            if getattr(module, "quantization_scheme", None) is not None
        }
        loaded.save_pretrained(saved, save_compressed=True)
        keep(saved, folder)
    tensors = load_file(folder / "model.safetensors")
    layers = {name.rpartition(".")[0] for name in tensors if name.endswith("weight_scale")}
    dequantised = {}
    for layer in sorted(layers):
        if ".layers.1." not in layer:
            continue
        state = {name[len(layer) + 1 :]: t for name, t in tensors.items() if name.rpartition(".")[0] == layer}
        scheme = next(s for name, s in schemes.items() if ends_alike(name, layer))
        assert scheme.format is not None
        plain = BaseCompressor.get_value_from_registry(scheme.format.value).decompress(state, scheme)
        dequantised[layer] = plain["weight"].contiguous()
    save_file(dequantised, folder / "dequantised.safetensors")


def unused_tokenizer() -> Any:
    """What the tool demands beside a data set of token ids."""
    import tokenizers
    import transformers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="</s>")


def ends_alike(module: str, layer: str) -> bool:
    """Whether two spellings of a layer's name mean the same: prefixes differ between memory and disk."""
    return ("vision" in module) == ("vision" in layer) and module.split(".")[-4:] == layer.split(".")[-4:]


def pack_by_compressed_tensors(N: int, K: int, g: int, seed: int) -> dict[str, torch.Tensor]:
    """Random integers, and the tensors of both formats for them, by the tool's own compressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for kind in ("asymmetric", "symmetric", "int8"):
        whole = kind == "int8" or g == K
        low, high = (-128, 128) if kind == "int8" else (-8, 8)
        codes = random_codes(rng, N, K, low=low, high=high).to(torch.int8)
        scales = random_scales(rng, N, 1 if whole else K // g).bfloat16()
        zeros = random_codes(rng, *scales.shape, low=-8, high=8).to(torch.int8)
        zeros = zeros if kind == "asymmetric" else torch.zeros_like(zeros)
        args = QuantizationArgs(
            num_bits=8 if kind == "int8" else 4,
            type="int",
            symmetric=kind != "asymmetric",
            strategy="channel" if whole else "group",
            group_size=None if whole else g,
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        repeat = K // scales.shape[1]
        weight = (codes - zeros.repeat_interleave(repeat, 1).int()) * scales.float().repeat_interleave(repeat, 1)
        name = "int-quantized" if kind == "int8" else "pack-quantized"
        state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
        packed = BaseCompressor.get_value_from_registry(name).compress(state, scheme)
        tensors[f"{kind}.codes"], tensors[f"{kind}.zeros"] = codes, zeros
        tensors |= {f"{kind}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
        plain = BaseCompressor.get_value_from_registry(name).decompress(packed, scheme)
        tensors[f"{kind}.dequantised"] = plain["weight"].contiguous()
    return tensors


def build_compressed(out: Path) -> None:
    import transformers
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    def grouped(symmetric: bool, targets: list[str], **more: Any) -> Any:
        args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=32, **more)
        return QuantizationScheme(targets=targets, weights=args)

    def dynamic(targets: list[str]) -> Any:
        return QuantizationScheme(
            targets=targets,
            weights=QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel"),
            input_activations=QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True),
        )

    def groups(*schemes: Any, by: Any = QuantizationModifier) -> Any:
        named = {f"group_{i}": scheme for i, scheme in enumerate(schemes)}
        return by(config_groups=named, ignore=["lm_head", "re:.*multi_modal_projector.*"])

    tower = ["re:.*vision_tower.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"]
    decoder = ["re:.*language_model.*(q|k|v|o|gate|up|down)_proj$"]
    for name, make, recipe in (
        ("w4a16_asymmetric", llama, [AWQModifier(), groups(grouped(False, ["Linear"]))]),
        ("w4a16_symmetric", llama, [groups(grouped(True, ["Linear"], actorder="weight"), by=GPTQModifier)]),
        ("w8a8", llama, [SmoothQuantModifier(smoothing_strength=0.8), groups(dynamic(["Linear"]))]),
        ("mixed_llava_next", llava_next, [groups(dynamic(tower), grouped(False, decoder))]),
    ):
        folder = fresh(out / name)
        torch.manual_seed(1)
        quantise_by_llmcompressor(folder, make(transformers, hidden=64, dtype=torch.bfloat16), recipe)
        write_versions(folder, "llmcompressor", "compressed-tensors")
    folder = fresh(out / "compressed_packers")
    packed = {}
    for seed, (N, K, g) in enumerate(COMPRESSED_SHAPES):
        made = pack_by_compressed_tensors(N, K, g, seed)
        packed |= {f"{N}x{K}g{g}.{name}": tensor for name, tensor in made.items()}
    save_file(packed, folder / "packers.safetensors")
    (folder / "targets.json").write_text(json.dumps(matched_targets(), indent=1) + "\n")
    write_versions(folder, "compressed-tensors")


def matched_targets() -> list[dict[str, Any]]:
    """For each list of targets and exceptions: the target that decides about each name, or null."""
    from compressed_tensors.utils.match import is_match, match_targets

    linear = torch.nn.Linear(1, 1)
    return [
        {
            "targets": targets,
            "ignore": ignore,
            "decides": {
                name: match_targets(name, linear, targets)[0] if is_match(name, linear, targets, ignore) else None
                for name in LAYER_NAMES
            },
        }
        for targets, ignore in TARGETS_AND_IGNORED
    ]


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=("awq", "compressed"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (build_awq if args.tool == "awq" else build_compressed)(args.folder)


if __name__ == "__main__":
    main()
