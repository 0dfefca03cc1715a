"""Kernels in machine code of the processor at hand: LLVM compiles them at first use, torch's threads run them.

llvmlite brings LLVM ready-made: the machine needs no compiler, and nothing is built when installing. A kernel is
compiled once per process, in some hundredths of a second.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import sys
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llvmlite import ir

_LOG = logging.getLogger(__name__)
LEVELS = ("any", "avx512", "amx")  # what a kernel may rely on, each with what is before it
_NEEDS = {
    "any": frozenset({"avx2", "fma", "f16c"}),  # on x86; without them LLVM would call functions that are not there
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512bf16", "avx512vnni"}),
    "amx": frozenset({"amx-tile", "amx-bf16", "amx-int8"}),
}
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18  # Linux: a process must ask for the tile registers
_LINE = 64  # bytes
_FEW_NUMBERS = 1 << 15  # some microseconds of work, as many as it takes to wake a thread
_KEPT_BYTES = 1 << 24  # of scratch memory, per thread that calls


def level() -> str:
    """The highest of `LEVELS` here, or "": llvmlite is missing, or SPARSEVILA_CPU=torch is in the environment.

    SPARSEVILA_CPU may name a level too, beyond which nothing is used. Raises ValueError for any other word.
    """
    found, wanted = _highest(), os.environ.get("SPARSEVILA_CPU", "")
    if wanted not in ("", "torch", *LEVELS):
        raise ValueError(f"expected SPARSEVILA_CPU torch, {', '.join(LEVELS)} or nothing, got {wanted!r}")
    if wanted == "torch" or not found:
        return ""
    return min(found, wanted or found, key=LEVELS.index)


@functools.cache
def _highest() -> str:
    try:
        from llvmlite import binding
    except ImportError:
        _LOG.warning(
            "llvmlite is not installed: quantised layers on a CPU run torch's own operations, which are slower"
        )
        return ""
    has = {name for name, there in binding.get_host_cpu_features().items() if there}
    if platform.machine() in ("x86_64", "AMD64") and not has >= _NEEDS["any"]:
        return ""
    if not has >= _NEEDS["avx512"]:
        return "any"
    return "amx" if has >= _NEEDS["amx"] and _may_use_tiles() else "avx512"


def _may_use_tiles() -> bool:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0


def _target_machine(of: str) -> Any:
    """A new one: each engine frees its own when it goes."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    # The name of a processor would bring features of its own, of which a virtual machine may lack some.
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu="", features=_features(of), opt=3, jit=True)


@functools.cache
def _features(of: str) -> str:
    from llvmlite import binding

    has = {name for name, there in binding.get_host_cpu_features().items() if there}
    # Below the highest level, what comes above it is left out: so each can be tried on one machine.
    beyond = {"any": ("avx512", "avx10", "amx"), "avx512": ("amx",), "amx": ()}[of]
    return ",".join(("-" if of != _highest() and name.startswith(beyond) else "+") + name for name in sorted(has))


class Compiled:
    """A kernel: `write(module, name)` writes its function (`emit.Kernel`), for a level of `LEVELS`."""

    def __init__(self, write: Callable[[ir.Module, str], None], name: str, of: str) -> None:
        from llvmlite import binding, ir

        module = ir.Module(name)
        write(module, name)
        self._machine = _target_machine(of)
        self._code = binding.parse_assembly(str(module))
        self._code.verify()
        options = binding.create_pipeline_tuning_options(speed_level=2)
        options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False  # done by hand
        passes = binding.create_pass_builder(self._machine, options)
        passes.getModulePassManager().run(self._code, passes)
        self._engine = binding.create_mcjit_compiler(self._code, self._machine)
        self._engine.finalize_object()
        self._address = self._engine.get_function_address(name)
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)

    def __call__(self, units: int, threads: int, *arguments: int) -> None:
        """Does `units` of work on at most so many threads. Returns when all is done."""
        numbers = array("q", (units, 0, 0, *arguments))
        at, _ = numbers.buffer_info()
        threads = min(threads, units)
        if threads <= 1:
            self._function(at)
        elif run := _on_torchs_threads():
            run(self._address, at, threads, 0)
        else:
            list(_pool(threads).map(self._function, [at] * threads))

    def assembly(self) -> str:
        """For people who look for a reason."""
        text: str = self._machine.emit_assembly(self._code)
        return text


@functools.cache
def _on_torchs_threads() -> Any | None:
    """GOMP_parallel(function, data, threads, flags) of the runtime that torch uses: one pool of threads serves both."""
    try:
        run = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return run


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "sparsevila")


def threads_for(numbers: int) -> int:
    """How many threads a pass over so many numbers is worth."""
    return torch.get_num_threads() if numbers > _FEW_NUMBERS else 1


class Scratch(threading.local):
    """Memory of a calling thread for the time of a call, kept from one to the next.

    What is new from the system costs a fault at every page when it is first written, a tenth of a call's time.
    """

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> tuple[int, Tensor]:
        """An address of so many bytes on a border of 64, and what keeps them alive."""
        memory = self._kept
        if memory.numel() < size + _LINE:
            memory = torch.empty(size + _LINE, dtype=torch.uint8)
            if memory.numel() <= _KEPT_BYTES:
                self._kept = memory
        return -(-memory.data_ptr() // _LINE) * _LINE, memory
