"""Writes one small quantised checkpoint again and again, each time killed one operation on its files later.

    python interrupted_write.py FOLDER

The n-th is FOLDER/out<n>, or what the kill has left of it; how many were killed is printed. A program of its own: a
process that forks should have no threads.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from sparsevila.quant.awq import quantise_int4
from sparsevila.quant.export import CheckpointWriter
from sparsevila.quant.scheme import Int4Weight, Int8Weight
from sparsevila.quant.smoothquant import quantise_int8

WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")


def int8(rows: int = 8, columns: int = 16) -> Int8Weight:
    return quantise_int8(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)))


def int4(rows: int = 8, columns: int = 16, group_size: int = 8, **options: Any) -> Int4Weight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    return quantise_int4(weight, group_size, **options)


def small_write(folder: Path) -> None:
    """Two units and a document, taken up wherever they were left."""
    writer = CheckpointWriter(folder, form="compressed-tensors", fingerprint="small")
    for i in range(2):
        if writer.has(f"unit {i}"):
            assert writer.record(f"unit {i}") == {"error": i / 3}
            continue
        quantised = {f"model.layers.{i}.proj": int4(), f"encoder.layers.{i}.proj": int8()}
        dense = {f"model.layers.{i}.norm.weight": torch.full((5,), float(i))}
        writer.add(f"unit {i}", dense=dense, quantised=quantised, record={"error": i / 3})
    writer.finish({"hidden_size": 8}, documents={"tokenizer.json": b"{}"}, record={"samples": 1})


def killed_at(operation: int, folder: Path) -> bool:
    """Runs `small_write` in a process that is killed before the n-th operation on its files; whether it was."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in WATCHED:
            count += str(arguments[0]).startswith(str(folder))
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(watch)
        small_write(folder)
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # what it is for only a power cut would show; it takes the time
    operation = 1
    while killed_at(operation, Path(sys.argv[1]) / f"out{operation}"):
        operation += 1
    sys.stdout.write(f"{operation - 1}\n")


if __name__ == "__main__":
    main()
