"""Writes a language model with random Q4_0 weights in llama.cpp's format; for `llama_cpp.py`.

    python llama_cpp_model.py MODEL.gguf SHAPE.json

Runs in an environment of its own (`pip install gguf`) and imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BLOCK = 32  # weights of a Q4_0 block: a float16 scale and 16 bytes


def q4_0(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random blocks (rows, bytes) uint8 that stand for weights of standard deviation columns^-0.5."""
    blocks = rng.integers(0, 256, (rows, columns // BLOCK, 18), dtype=np.uint8)
    scale = np.full((rows, columns // BLOCK, 1), columns**-0.5 / 4.61, dtype=np.float16)
    blocks[..., :2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Llama's kind of vocabulary: three special tokens, 256 bytes, and words that nothing is ever encoded into."""
    kinds = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    words = size - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"\u2581w{i}" for i in range(words))])
    writer.add_token_scores([0.0] * len(tokens) + [-float(i) for i in range(words)])
    writer.add_token_types([*types, *[kinds.NORMAL] * words])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_model(path: Path, shape: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    hidden, ffn, head = shape["hidden"], shape["ffn"], shape["hidden"] // shape["heads"]
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab"])
    add_vocabulary(writer, shape["vocab"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, q4_0(rng, rows, columns), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))

    kv = shape["kv_heads"] * head
    matrix("token_embd.weight", shape["vocab"], hidden)
    for i in range(shape["layers"]):
        norm(f"blk.{i}.attn_norm.weight")
        for name, rows in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv), ("attn_output", hidden)):
            matrix(f"blk.{i}.{name}.weight", rows, hidden)
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.ffn_gate.weight", ffn, hidden)
        matrix(f"blk.{i}.ffn_up.weight", ffn, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, ffn)
    norm("output_norm.weight")
    matrix("output.weight", shape["vocab"], hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    path, shape = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    partial = path.with_suffix(".partial")
    write_model(partial, shape)
    partial.rename(path)


if __name__ == "__main__":
    main()
