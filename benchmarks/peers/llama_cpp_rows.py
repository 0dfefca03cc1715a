"""Prefill and decode times of llama.cpp on a language model with random Q4_0 weights; for `llama_cpp.py`.

    python llama_cpp_rows.py MODEL.gguf SHAPE.json

Runs in an environment of its own (`pip install llama-cpp-python==0.3.36 gguf`) and imports nothing of ours. SHAPE.json
has the sizes and what to run; the rows are printed as JSON. The file is written where it is missing.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

BLOCK = 32  # weights of a Q4_0 block: a float16 scale and 16 bytes
BATCH = 512  # tokens a call of the prefill, llama.cpp's default


def q4_0(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random blocks (rows, bytes) uint8 that stand for weights of standard deviation columns^-0.5."""
    blocks = rng.integers(0, 256, (rows, columns // BLOCK, 18), dtype=np.uint8)
    scale = np.full((rows, columns // BLOCK, 1), columns**-0.5 / 4.61, dtype=np.float16)
    blocks[..., :2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


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
    writer.add_tokenizer_model("no_vocab")
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


class Llama:
    """One loaded model and its context."""

    def __init__(self, path: Path, shape: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = shape["context"], BATCH, BATCH
        params.n_threads = params.n_threads_batch = shape["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = shape["vocab"]

    def run(self, ids: list[int]) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        code = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise SystemExit(f"llama_decode returned {code}")

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)


def rows(model: Llama, shape: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Each round: the whole prompt, then the longest answer, timed at every length that is asked for."""
    rng = np.random.default_rng(1)
    for _ in range(shape["rounds"]):
        model.forget()
        prompt = rng.integers(3, model.vocab, shape["prompt"]).tolist()
        start = time.perf_counter()
        for at in range(0, len(prompt), BATCH):
            model.run(prompt[at : at + BATCH])
        row = {"prefill": (time.perf_counter() - start) * 1e3}
        start = time.perf_counter()
        for done in range(1, max(shape["tokens"])):  # the first token comes from the prefill
            model.run([int(rng.integers(3, model.vocab))])
            if done + 1 in shape["tokens"]:
                row[f"decode {done + 1}"] = (time.perf_counter() - start) * 1e3
        yield row


def main() -> None:
    path, shape = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    if not path.exists():
        write_model(path, shape)
    if not shape["rounds"]:
        return
    model = Llama(path, shape)
    model.run([5] * 8)  # pages the weights in
    found = list(rows(model, shape))
    print(json.dumps({"version": llama_cpp.__version__, "bytes": path.stat().st_size, "rounds": found}))


if __name__ == "__main__":
    main()
