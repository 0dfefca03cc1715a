"""What the engine leaves alone: memory that grows with a square, sockets, torch's global state, threads.

Each measurement runs in a child process of its own, so that nothing of the other tests is in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracles import TINY, Oracle, Tiny, build_oracle

MIB = 2**20

# The peak of resident memory while a piece of work runs. Linux lets a process reset its own high-water mark.
_METER = """
import gc, json, sys
import numpy as np
import torch

torch.set_num_threads(1)  # every thread would bring its own buffers

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

def peak_of(work):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = kilobytes("VmRSS")
    work()
    return (kilobytes("VmHWM") - before) * 1024

report = {}
"""


def run_child(script: str, *arguments: object) -> dict[str, Any]:
    """The JSON object that the script prints last."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


linux_only = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")

_PREFILL = (
    _METER
    + """
from sparsevila import Engine
from sparsevila.engine.runner import TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.models.interface import TokenMap, VisualTokens

engine = Engine.load(sys.argv[1], device="cpu", dtype="float32")
runner, size = engine.runner, engine.model.config.vision.hidden_size

def visual(n):
    zeros, no_line = torch.zeros(n, dtype=torch.int32), torch.full((n,), -1, dtype=torch.int32)
    return VisualTokens(torch.randn(n, size), TokenMap(zeros, zeros, torch.zeros(n, 4), zeros.bool(), no_line), None)

def measured(n, question_len):
    cache, tokens = runner.new_cache(), visual(n)
    cache.reserve(visual=n, text=question_len + 2)
    ids = tuple(3 + i % 500 for i in range(question_len))
    media = peak_of(lambda: runner.prefill(cache, [TextSpan((1, 5)), VisualSpan(tokens)], method=Method()))
    question = peak_of(lambda: runner.prefill(cache, [TextSpan(ids)], method=Method(), score=True))
    return {"media": media, "question": question}

measured(1100, 1100)  # the first use of every operator
report["square"] = peak_of(lambda: torch.ones(6000, 6000) * 2)
report["short"] = measured(6000, 20)
report["long"] = measured(6000, 1500)
print(json.dumps(report))
"""
)


@linux_only
def test_a_prefill_allocates_nothing_quadratic(oracles: dict[str, Oracle]):
    tiny = oracles["vicuna"].tiny
    n, chunk = 6000, 1024
    report = run_child(_PREFILL, oracles["vicuna"].folder)
    # One head's N x N scores in float32 are 137 MiB, and one chunk's rows over all keys of all heads as much: the
    # meter sees such a thing, and the bounds below leave no room for the smallest of them (1024 x 6000, one head).
    assert report["square"] > 200 * MIB
    one_head = chunk * n * 4
    # What has to be there: keys and values, and for a chunk some ten rows of each width.
    cache = tiny.layers * 2 * tiny.kv_heads * (tiny.hidden // tiny.heads) * n * 4
    widths = tiny.hidden * 10 + 3 * (tiny.hidden * 2 + 8)
    bound = cache + chunk * widths * 4 + 12 * MIB  # the rest is the allocator's and torch's own buffers
    assert bound < one_head
    assert report["short"]["media"] < bound
    assert report["short"]["question"] < bound
    assert report["long"]["media"] < bound
    # Retrieval scores the store in tiles of 16 MiB; two may be alive at once, and a third not yet given back.
    assert report["long"]["question"] < bound + 3 * 16 * MIB < tiny.heads * one_head / 2


_VISION = (
    _METER
    + """
from sparsevila import Engine
from sparsevila.models.interface import Frames

engine = Engine.load(sys.argv[1], device="cpu", dtype="float32")

def inputs(frames):
    rgb = np.random.default_rng(0).integers(0, 256, (frames, 336, 336, 3), dtype=np.uint8)
    return engine.model.preprocess(Frames("video", rgb, np.arange(frames, dtype=float), "<array>", 1.0, "key"))

many, one_chunk = inputs(64), inputs(8)
with torch.inference_mode():
    engine.model.encode(one_chunk)
    report["chunk"] = peak_of(lambda: engine.model.encode(one_chunk))
    report["all"] = peak_of(lambda: engine.model.encode(many))
    report["tower_at_once"] = peak_of(lambda: engine.model.vision_tower(many.pixels))
print(json.dumps(report))
"""
)


@linux_only
def test_the_vision_tower_works_in_chunks(tmp_path: Path):
    """64 frames take the memory of 8, and their pooled features."""
    tiny = Tiny(video=True, image=336, pinpoints=((336, 672), (672, 336)))
    build_oracle(tmp_path, tiny)
    report = run_child(_VISION, tmp_path)
    features = 64 * 12 * 12 * 40 * 4
    pixels = 8 * 3 * 336 * 336 * 4  # a chunk of them, converted
    # A tile has 577 rows; some eight of the tower's width and three of the MLP's live at once.
    chunk = pixels + 8 * 577 * (8 * 40 + 3 * 72) * 4
    assert report["all"] < chunk + 2 * features + 8 * MIB
    assert report["tower_at_once"] > 2 * report["all"]  # the meter would have seen it


_MANNERS = """
import asyncio, json, os, random, signal, sys, threading, warnings

events = []
sys.addaudithook(lambda name, args: events.append(name) if name.startswith("socket.") else None)

import numpy as np
import torch
from sparsevila import Engine, Image, SamplingParams, Sparsity, SparseVILAError

def state():
    return {
        "default_dtype": str(torch.get_default_dtype()),
        "default_device": str(torch.get_default_device()),
        "num_threads": torch.get_num_threads(),
        "num_interop_threads": torch.get_num_interop_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "flush_denormal": float(torch.tensor(1e-40) * 1.0),
        "torch_rng": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy_rng": hash(np.random.get_state()[1].tobytes()),
        "python_rng": hash(random.getstate()),
        "sigint": str(signal.getsignal(signal.SIGINT)),
        "warnings": str(warnings.filters),
        "environment": sorted(os.environ),
        # Half a second to seconds each, and nothing here compiles: torch imports them where one asks for random weights
        # on the meta device.
        "compilers": [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules],
        "threads": [thread.name for thread in threading.enumerate()],
    }

def differences(a, b):
    # Of a list what differs: the environment is nobody's business.
    return {
        key: sorted(set(a[key]) ^ set(b[key])) if isinstance(a[key], list) else [str(a[key]), str(b[key])]
        for key in a
        if a[key] != b[key]
    }

async def later(session):
    return [chunk async for chunk in session.astream("And then?", params=SamplingParams(max_new_tokens=3))]

before = state()
report = {"during": {}}
engine = Engine.load(sys.argv[1], device="cpu", dtype=sys.argv[2], offline=True)
rgb = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
session = engine.session(media=[Image(rgb)], sparsity=Sparsity(0.5, 0.5))
session.ask("What is it?", params=SamplingParams(max_new_tokens=4, temperature=1.0, top_p=0.9))
stream = session.stream("Why?", params=SamplingParams(max_new_tokens=6))
for _ in stream:
    # A generator hands control back in the middle of its work: what it set for itself must not be seen here.
    report["during"].update(differences(before, state()))
session.cancel()
stream = session.stream("Why?", params=SamplingParams(max_new_tokens=6))
next(stream)
stream.close()
try:
    session.ask("x" * (2 << 20))
except SparseVILAError:
    pass
if sys.argv[3] == "asyncio":
    asyncio.run(later(session))
session.close()
engine.close()
report["after"] = differences(before, state())
report["sockets"] = [name for name in events if "socketpair" not in name]
events.clear()
import socket
socket.socket().close()
report["seen"] = events
print(json.dumps(report))
"""


@pytest.mark.parametrize(
    ("dtype", "loop"),
    [
        ("float32", "plain"),
        ("bfloat16", "plain"),
        pytest.param("float32", "asyncio", marks=pytest.mark.event_loop),
    ],
)
def test_global_state_sockets_and_threads(oracles: dict[str, Oracle], dtype: str, loop: str):
    """A model from load to close, with an answer, a cancelled and a refused one, and maybe one through asyncio."""
    report = run_child(_MANNERS, oracles["vicuna"].folder, dtype, loop)
    assert report["during"] == {}
    assert report["after"] == {}
    # An event loop opens a pair of sockets to itself before anything of ours runs.
    assert set(report["sockets"]) <= {"socket.__new__"}
    assert len(report["sockets"]) <= (2 if loop == "asyncio" else 0)
    assert report["seen"] == ["socket.__new__"]


def test_the_tiny_model_is_what_the_bounds_assume():
    assert (TINY["vicuna"].layers, TINY["vicuna"].hidden, TINY["vicuna"].heads) == (2, 48, 6)
