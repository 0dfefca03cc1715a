"""Makes `tests/fixtures/qwen/awq/`: a tiny Qwen2.5-VL as AutoAWQ writes it, and what it answers about a picture.

    python tests/models/oracles/awq_qwen.py

In a virtual environment of its own, the first one of tests/quant/oracles/build_fixtures.py:

    pip install torch==2.13.0
    pip install transformers==4.51.3 "datasets<4" zstandard triton==3.7.1 accelerate pillow setuptools wheel
    pip install --no-deps --no-build-isolation autoawq==0.2.9

Nothing of `sparsevila` is imported. `answer.safetensors` has the logits of the model with AutoAWQ's matrices
dequantised by AutoAWQ, in float32, for the picture `noise` between two texts.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "fixtures" / "qwen" / "awq"
GROUP_SIZE, CALIBRATION_LEN = 32, 48  # the tool wants output rows in multiples of 64
BEFORE, AFTER = [1, 40, 41], [13, 60, 61]
PICTURE, SEED = (60, 90), 11
PATCH = 4  # pixels; small, so that the fixture is
# Ids as in tests/tiny_qwen.py.
START, END, IMAGE, VIDEO, VOCAB = 323, 324, 326, 327, 334


def tiny() -> Any:
    """Weights spread as those of the other tiny models: wrong positions and windows show."""
    config = transformers.Qwen2_5_VLConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=VOCAB, max_position_embeddings=1024, rms_norm_eps=1e-6, rope_theta=1e6, use_sliding_window=False,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, tie_word_embeddings=True,
        vision_start_token_id=START, vision_end_token_id=END, image_token_id=IMAGE, video_token_id=VIDEO,
        eos_token_id=322, bos_token_id=320,
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 22, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": PATCH, "window_size": 4 * PATCH, "fullatt_block_indexes": [1], "tokens_per_second": 2,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                gain = 1.6 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 0.8
                parameter.copy_(torch.randn_like(parameter) * gain / parameter[0].numel() ** 0.5)
    return model.half().eval()


def quantise(model: Any) -> Any:
    from awq.models.qwen2_5_vl import Qwen2_5_VLAWQForCausalLM

    rng = torch.Generator().manual_seed(3)
    samples = [torch.randint(3, 300, (CALIBRATION_LEN,), generator=rng).tolist() for _ in range(8)]
    whole = Qwen2_5_VLAWQForCausalLM(model, "qwen2_5_vl", False, model.config, None, None)
    settings = {"zero_point": True, "q_group_size": GROUP_SIZE, "w_bit": 4, "version": "GEMM"}
    whole.quantize(None, quant_config=settings, calib_data=samples, max_calib_seq_len=CALIBRATION_LEN)
    return whole


def dequantised(model: Any) -> Any:
    """The same model in float32 with plain layers, made anew: rotary frequencies would keep the rounding to halves."""
    from awq.modules.linear import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    for name, layer in list(model.named_modules()):
        if isinstance(layer, WQLinear_GEMM):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, layer.group_size).t()
            plain.weight.data = weight.float().contiguous()
            if layer.bias is not None:
                plain.bias.data = layer.bias.float()
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, plain)
    config = transformers.Qwen2_5_VLConfig(**{k: v for k, v in model.config.to_dict().items() if k != "torch_dtype"})
    del config.quantization_config
    fresh = transformers.Qwen2_5_VLForConditionalGeneration(config).float()
    fresh.load_state_dict(model.float().state_dict())
    return fresh.eval()


def answer(model: Any) -> dict[str, Tensor]:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    noise = np.random.RandomState(SEED).randint(0, 256, (*PICTURE, 3)).astype(np.uint8)
    made = Qwen2VLImageProcessor(patch_size=PATCH)(noise, return_tensors="pt")
    tokens = int(made["image_grid_thw"].prod()) // 4
    ids = torch.tensor([[*BEFORE, START, *[IMAGE] * tokens, END, *AFTER]])
    logits = model(ids, attention_mask=torch.ones_like(ids), **made).logits[0, -len(AFTER) :]
    return {"noise": torch.from_numpy(noise), "logits": logits.contiguous(), "before": torch.tensor(BEFORE),
            "after": torch.tensor(AFTER)}  # fmt: skip


@torch.no_grad()
def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    whole = quantise(tiny())
    with tempfile.TemporaryDirectory() as scratch:
        whole.save_quantized(scratch)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(Path(scratch) / name, FOLDER / name)
    (FOLDER / "preprocessor_config.json").write_text(json.dumps({"patch_size": PATCH}))
    save_file(answer(dequantised(whole.model)), FOLDER / "answer.safetensors")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "autoawq": "0.2.9"}
    (FOLDER / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main()
