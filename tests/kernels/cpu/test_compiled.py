"""What compiles and runs machine code: levels of the processor, units of work on threads, scratch memory; and that the
portable kernels translate for processors that are not at hand."""

from __future__ import annotations

import gc
import logging
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from llvmlite import binding, ir

from sparsevila.kernels.cpu import compiled, int4_linear, rms_norm, rope_append, silu_mul
from sparsevila.kernels.cpu.compiled import Compiled, Scratch, level
from sparsevila.kernels.cpu.emit import BF16, F16, F32, I64, Kernel
from sparsevila.kernels.w4a16 import pack_w4a16, w4a16, w4a16_ref

AVX2 = dict.fromkeys(["avx2", "fma", "f16c"], True)
AVX512 = AVX2 | dict.fromkeys(["avx512f", "avx512bw", "avx512vl", "avx512bf16", "avx512vnni"], True)
AMX = AVX512 | dict.fromkeys(["amx-tile", "amx-bf16", "amx-int8"], True)


@pytest.fixture
def highest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The processor is looked at again, and once more afterwards."""
    monkeypatch.delenv("SPARSEVILA_CPU", raising=False)
    compiled._highest.cache_clear()
    yield
    compiled._highest.cache_clear()


class TestLevel:
    @pytest.mark.parametrize(
        ("machine", "features", "tiles", "want"),
        [
            ("x86_64", {}, True, ""),
            ("x86_64", AVX2 | {"f16c": False}, True, ""),
            ("AMD64", AVX2, True, "any"),
            ("x86_64", AVX512 | {"avx512bf16": False}, True, "any"),
            ("x86_64", AVX512, True, "avx512"),
            ("x86_64", AMX | {"amx-int8": False}, True, "avx512"),
            ("x86_64", AMX, False, "avx512"),
            ("x86_64", AMX, True, "amx"),
            ("aarch64", {"neon": True}, True, "any"),
            ("arm64", {"neon": True}, True, "any"),
        ],
    )
    def test_of_processors(
        self, monkeypatch: pytest.MonkeyPatch, highest: None, machine: str, features: dict, tiles: bool, want: str
    ) -> None:
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
        monkeypatch.setattr(compiled, "_may_use_tiles", lambda: tiles)
        assert level() == want

    @pytest.mark.parametrize("has", ["", *compiled.LEVELS])
    @pytest.mark.parametrize("word", ["", "torch", *compiled.LEVELS])
    def test_a_word_can_only_lower_it(self, monkeypatch: pytest.MonkeyPatch, has: str, word: str) -> None:
        monkeypatch.setattr(compiled, "_highest", lambda: has)
        monkeypatch.setenv("SPARSEVILA_CPU", word)
        order = ["", *compiled.LEVELS]
        wanted = {"": len(order), "torch": 0}.get(word, order.index(word) if word in order else 0)
        assert level() == order[min(order.index(has), wanted)]

    @pytest.mark.parametrize("word", ["AMX", "avx2", "0", "any "])
    def test_other_words_are_refused(self, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
        monkeypatch.setenv("SPARSEVILA_CPU", word)
        with pytest.raises(
            ValueError, match=f"expected SPARSEVILA_CPU torch, any, avx512, amx or nothing, got '{word}'"
        ):
            level()

    def test_without_llvmlite(
        self, monkeypatch: pytest.MonkeyPatch, highest: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "llvmlite", None)
        with caplog.at_level(logging.WARNING):
            assert [level(), level()] == ["", ""]
        assert [record.getMessage() for record in caplog.records] == [
            "llvmlite is not installed: quantised layers on a CPU run torch's own operations, which are slower"
        ]

    def test_code_keeps_to_its_level(self, of: str) -> None:
        """Registers of AVX-512 and of AMX stand only where the level has them."""
        text = int4_linear._weights_kernel(of != "any", (1, torch.float16), of).assembly()
        if platform.machine() in ("x86_64", "AMD64"):
            assert ("zmm" in text) == (of != "any")
            assert "ymm" in text or of != "any"
        if of == "amx":
            assert "tmm" in int4_linear._panel_kernel((1, torch.float16), torch.bfloat16).assembly()


def _adds_one(k: Kernel) -> None:
    """To the numbers of its thread and of each of its units; an address of int64s for each."""
    number = k.thread()
    k.store(k.load(k.address(4), I64, number * 8) + 1, k.address(4), number * 8)
    with k.units() as unit:
        k.store(k.load(k.address(3), I64, unit * 8) + 1, k.address(3), unit * 8)
        # Long enough that every thread comes to some.
        total = k.variable(unit)
        with k.loop(0, k.int(1000)) as i:
            total.set((total.get() * 7 + i) % 1000003)
        k.store(total.get(), k.address(5), unit * 8)
    k.done()


@pytest.fixture(scope="module")
def adds_one() -> Compiled:
    return Compiled(lambda module, name: _adds_one(Kernel(module, name)), "adds_one", "any")


class TestUnits:
    @pytest.fixture(params=["torch's threads", "a pool"], autouse=True)
    def _threads(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param == "a pool":
            monkeypatch.setattr(compiled, "_on_torchs_threads", lambda: None)
        elif compiled._on_torchs_threads() is None:
            pytest.skip("torch brings no threads of OpenMP here")

    @pytest.mark.parametrize("threads", [1, 2, 5])
    @pytest.mark.parametrize("units", [0, 1, 3, 1000])
    def test_each_is_done_once(self, adds_one: Compiled, units: int, threads: int) -> None:
        done, numbers, rest = (torch.zeros(1003, dtype=torch.int64) for _ in range(3))
        for _ in range(3):
            adds_one(units, threads, done.data_ptr(), numbers.data_ptr(), rest.data_ptr())
        assert done.tolist() == [3] * units + [0] * (1003 - units)
        # Threads are numbered from 0; those that found nothing to do count too.
        most = max(1, min(threads, units))
        assert numbers[:most].max() == 3
        assert not numbers[most:].any()
        assert 3 <= numbers.sum() <= 3 * most

    def test_several_callers_at_once(self, adds_one: Compiled) -> None:
        def call(_: int) -> list[int]:
            done, numbers, rest = (torch.zeros(200, dtype=torch.int64) for _ in range(3))
            for _ in range(20):
                adds_one(200, 2, done.data_ptr(), numbers.data_ptr(), rest.data_ptr())
            return done.tolist()

        with ThreadPoolExecutor(4) as pool:
            assert all(found == [20] * 200 for found in pool.map(call, range(4)))


def test_the_runtime_of_threads_is_torchs() -> None:
    if sys.platform != "linux":
        pytest.skip("looked for in the library that torch has on Linux")
    assert compiled._on_torchs_threads() is not None


def test_layers_of_several_callers_at_once(of: str) -> None:
    """Each caller has scratch memory of its own; the first calls compile the same kernel at the same time."""
    for kernel in (int4_linear._dot_kernel, int4_linear._panel_kernel, int4_linear._tile_rows_kernel):
        kernel.cache_clear()
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (70, 128), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (70, 2), generator=rng, dtype=torch.uint8)
    tensors = pack_w4a16(codes, torch.rand(70, 2, generator=rng), zeros, 256, 128)
    xs = [torch.randn(M, 256, generator=rng).bfloat16() for M in (1, 3, 30, 100, 90, 100)]
    begin = threading.Barrier(len(xs))

    def call(x: torch.Tensor) -> list[torch.Tensor]:
        begin.wait()
        return [w4a16(x, *tensors) for _ in range(15)]

    with ThreadPoolExecutor(len(xs)) as pool:
        found = list(pool.map(call, xs))
    for x, answers in zip(xs, found, strict=True):
        want = w4a16_ref(x, *tensors)
        assert (answers[0].double() - want).abs().max() / want.abs().max() < 8e-3
        assert all(torch.equal(answer, answers[0]) for answer in answers)


class TestCompiled:
    def test_one_that_goes_takes_nothing_with_it(self, of: str) -> None:
        out = torch.zeros(1, dtype=torch.int64)

        def write(module: ir.Module, name: str) -> None:
            k = Kernel(module, name)
            k.store(k.int(7), k.address(3))
            k.done()

        kept = Compiled(write, "kept", of)
        for _ in range(3):
            Compiled(write, "lost", of)(1, 1, out.data_ptr())
            gc.collect()
        out.zero_()
        kept(1, 1, out.data_ptr())
        assert out.item() == 7
        assert "kept" in kept.assembly()

    def test_code_that_is_wrong_is_refused(self) -> None:
        def write(module: ir.Module, name: str) -> None:
            k = Kernel(module, name)
            k.call("llvm.fma", F32, k.fill(F32, 1), k.fill(F32, 1), k.int(1))
            k.done()

        with pytest.raises(RuntimeError, match=r"llvm\.fma"):
            Compiled(write, "wrong", "any")


class TestScratch:
    def test_an_address_of_that_much_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        empty = torch.empty
        # Wherever the memory begins.
        monkeypatch.setattr(torch, "empty", lambda size, dtype: empty(size + 7, dtype=dtype)[7:])
        scratch = Scratch()
        for size in (0, 1, 63, 64, 65, 10_000, 100):
            at, memory = scratch.take(size)
            assert at % 64 == 0
            assert memory.data_ptr() <= at
            assert at + size <= memory.data_ptr() + memory.numel()

    def test_it_is_kept_up_to_a_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiled, "_KEPT_BYTES", 1 << 12)
        scratch = Scratch()
        first = scratch.take(1000)[0]
        assert scratch.take(500)[0] == first
        assert scratch.take(1 << 13)[1].numel() >= 1 << 13
        assert scratch.take(1000)[0] == first

    def test_each_thread_has_its_own(self) -> None:
        scratch = Scratch()
        own = scratch.take(1000)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(scratch.take, 1000).result()[0] != own[0]
        assert scratch.take(1000)[0] == own[0]


TARGETS = [
    ("aarch64-unknown-linux-gnu", "+neon,+fullfp16"), ("aarch64-unknown-linux-gnu", "+neon"),
    ("x86_64-unknown-linux-gnu", "+avx2,+fma,+f16c"),
]  # fmt: skip
PORTABLE: dict[str, Callable[[Kernel], None]] = {
    **{
        f"few rows, {rows}": lambda k, rows=rows: int4_linear._write_few(k, rows, False, (1, torch.float32), F32)
        for rows in (1, 4)
    },
    "few rows, bfloat16": lambda k: int4_linear._write_few(k, 3, False, (4, torch.bfloat16), BF16),
    "few rows, float16": lambda k: int4_linear._write_few(k, 1, False, (2, torch.float16), F16),
    "weights": lambda k: int4_linear._write_weights(k, False, (1, torch.float16)),
    "weights, small groups": lambda k: int4_linear._write_weights(k, False, (4, torch.float32)),
    "norm, bfloat16": lambda k: rms_norm._write(k, BF16, 1e-5, True, "any"),
    "norm, float16": lambda k: rms_norm._write(k, F16, 1e-5, False, "any"),
    "gate, bfloat16": lambda k: silu_mul._write(k, BF16, "any"),
    "gate, float32": lambda k: silu_mul._write(k, F32, "any"),
}
PRODUCTS_ALONE = {f"rotation, {of}": lambda k, of=of: rope_append._write(k, 80, of, "any") for of in (BF16, F16, F32)}


def translated(write: Callable[[Kernel], None], triple: str, features: str) -> str:
    """Assembly of a kernel for another processor. It is read, never executed."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module("translated")
    write(Kernel(module, "kernel"))
    code = binding.parse_assembly(str(module))
    code.verify()
    machine = binding.Target.from_triple(triple).create_target_machine(features=features, opt=3, jit=True)
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(code, passes)
    text: str = machine.emit_assembly(code)
    return text


def calls(assembly: str) -> list[str]:
    """Lines that call anything, or jump to what is no label of the function's own."""
    return re.findall(r"^\s*(?:(?:bl|blr|br|call[a-z]*)\s.*|(?:b|jmp[a-z]*)\s+(?!\.?L)\S.*)", assembly, re.MULTILINE)


@pytest.mark.parametrize(("triple", "features"), TARGETS)
@pytest.mark.parametrize("name", [*PORTABLE, *PRODUCTS_ALONE])
def test_portable_kernels_translate_for_other_processors(name: str, triple: str, features: str) -> None:
    """Into instructions alone: no function is called, which might not be there. What comes out is never executed."""
    text = translated((PORTABLE | PRODUCTS_ALONE)[name], triple, features)
    assert name in PRODUCTS_ALONE or "fmla" in text or "vfmadd" in text
    assert calls(text) == []


def test_a_call_would_show() -> None:
    """AVX2 without its companions has no instruction for one rounding of a product and a sum, nor for float16."""
    text = translated(PORTABLE["few rows, float16"], "x86_64-unknown-linux-gnu", "+avx2")
    assert "fmaf" in text
    assert "__truncsfhf2" in text
    assert calls(text)
    assert calls("\tbl\t__truncsfbf2\n\tb\t.LBB0_3\n\tb\tLBB0_2\n\tb.eq\t.LBB0_1\n\tjmp\t.LBB0_9\n") == [
        "\tbl\t__truncsfbf2"
    ]
    assert len(calls("\tjmpq\t*%rax\n\tb\tfmaf\n\tcallq\t*%rbx\n\tblr\tx8\n")) == 4
