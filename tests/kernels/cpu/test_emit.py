"""The language of the CPU kernels: what each word of it computes, in kernels of a few lines, against torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from guarded_memory import PAGE, at_the_end
from llvmlite import ir
from torch import Tensor

from sparsevila.kernels.cpu.compiled import Compiled
from sparsevila.kernels.cpu.emit import (
    BF16,
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    VOID,
    Kernel,
    Value,
    lane_sums,
    transposed,
    vector,
)

LANES = 16
TYPES = {
    torch.uint8: I8, torch.int16: I16, torch.int32: I32, torch.int64: I64,
    torch.float16: F16, torch.bfloat16: BF16, torch.float32: F32,
}  # fmt: skip
Bodies = Callable[[Kernel], None]


def compiled(write: Bodies, of: str = "any") -> Compiled:
    def whole(module: ir.Module, name: str) -> None:
        k = Kernel(module, name)
        write(k)
        k.done()

    return Compiled(whole, "tried", of)


def run(write: Bodies, *arguments: Tensor | int, of: str = "any", units: int = 1) -> None:
    """Tensors as addresses; the first argument is `argument(3)`."""
    numbers = [part if isinstance(part, int) else part.data_ptr() for part in arguments]
    compiled(write, of)(units, 1, *numbers)


def lanes(
    operation: str | Callable[..., Value], *given: Tensor, into: torch.dtype | None = None, of: str = "any"
) -> Tensor:
    """Applies an operation, or the kernel's of that name, to vectors of 16 lanes of tensors of as many numbers."""
    out = torch.empty(given[0].shape, dtype=into or given[0].dtype)
    bytes_of = [part.element_size() * LANES for part in (*given, out)]

    def write(k: Kernel) -> None:
        with k.units() as unit:
            values = [
                k.load(k.address(3 + i), vector(TYPES[part.dtype], LANES), unit * bytes_of[i])
                for i, part in enumerate(given)
            ]
            made = getattr(k, operation)(*values) if isinstance(operation, str) else operation(*values)
            k.store(made, k.address(3 + len(given)), unit * bytes_of[-1])

    run(write, *given, out, of=of, units=out.numel() // LANES)
    return out


def integers(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of every size, with the largest and those around the sign's bit."""
    info = torch.iinfo(dtype)
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.randint(info.min, info.max, (58,), generator=rng, dtype=dtype)
    ends = torch.tensor([info.min, info.max, 1, 2, 7, info.max - 1], dtype=dtype)
    return torch.cat((mixed, ends)) if dtype == torch.uint8 else torch.cat((mixed >> (mixed & 15), ends))


def unsigned(tensor: Tensor) -> list[int]:
    modulus = 1 << 8 * tensor.element_size()
    return [int(number) % modulus for number in tensor]


def floats(seed: int = 0) -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


INTEGER_OPERATIONS: dict[str, Callable[..., object]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // (b | 1),
    "%": lambda a, b: a % (b | 1),
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "<<": lambda a, b: a << (b & 7),
    ">>": lambda a, b: a >> (b & 7),
    "with numbers": lambda a, b: (((a + 3) * 5 - 1) // 7 & 0x3F) + ((b % 11) | 64) + ((a >> 2) << 1),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", INTEGER_OPERATIONS)
def test_integers_are_unsigned(name: str, dtype: torch.dtype) -> None:
    operation, a, b = INTEGER_OPERATIONS[name], integers(dtype), integers(dtype, 1)
    got, modulus = lanes(operation, a, b), 1 << 8 * a.element_size()
    pairs = zip(unsigned(a), unsigned(b), strict=True)
    if name == "with numbers":
        want = [(((x + 3) * 5 - 1) % modulus // 7 & 0x3F) + ((y % 11) | 64) + ((x >> 2) << 1) for x, y in pairs]
    else:
        want = [operation(x, y) for x, y in pairs]  # type: ignore[misc]
    assert unsigned(got) == [number % modulus for number in want]


def test_floats(of: str) -> None:
    a, b = floats(), floats(1)
    for operation in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b):
        assert torch.equal(lanes(operation, a, b, of=of), operation(a, b))
    assert torch.equal(lanes(lambda a: (a + 0.5) * -3 - 1.25, a, of=of), (a + 0.5) * -3 - 1.25)


def test_one_rounding_of_a_product_and_a_sum(of: str) -> None:
    a, b = floats(), floats(1)
    rest = -(a * b)  # what the rounding of the product lost is left
    got = lanes("fma", a, b, rest, of=of)
    assert torch.equal(got, (a.double() * b.double() + rest.double()).float())
    assert got.count_nonzero() > 32


def test_powers_of_e(of: str) -> None:
    """Up to 0, where a softmax has them."""
    x = torch.cat((torch.linspace(-87, 0, 1 << 16), -floats().abs() * 1e-4, torch.tensor([-0.0] * 16)))
    got, want = lanes("exp", x, of=of), x.double().exp()
    last_place = torch.finfo(torch.float32).eps * 2.0 ** want.log2().floor()
    assert ((got.double() - want).abs() / last_place).max() < 2
    assert (got[-16:] == 1).all()
    assert not lanes("exp", torch.tensor([-87.5, -1e4, -3e38, -torch.inf] * 4), of=of).any()
    assert lanes("exp", torch.full((16,), torch.nan), of=of).isnan().all()


def test_the_larger_and_the_smaller(of: str) -> None:
    a, b = floats(), floats(1)
    assert torch.equal(lanes("larger", a, b, of=of), torch.maximum(a, b))
    assert torch.equal(lanes("smaller", a, b, of=of), torch.minimum(a, b))
    # Beside NaN the number counts.
    a[::3] = torch.nan
    assert torch.equal(lanes("larger", a, b, of=of), torch.fmax(a, b))
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        c, d = integers(dtype), integers(dtype, 1)
        pairs = list(zip(unsigned(c), unsigned(d), strict=True))
        assert unsigned(lanes("larger", c, d, of=of)) == [max(p) for p in pairs]
        assert unsigned(lanes("smaller", c, d, of=of)) == [min(p) for p in pairs]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_comparisons_of_integers(dtype: torch.dtype) -> None:
    a, b = integers(dtype), integers(dtype, 1)
    b[::4] = a[::4]
    pairs = list(zip(unsigned(a), unsigned(b), strict=True))
    for compare, want in (
        (lambda x, y: x < y, [x < y for x, y in pairs]),
        (lambda x, y: x >= y, [x >= y for x, y in pairs]),
        (lambda x, y: x.equals(y), [x == y for x, y in pairs]),
    ):
        got = lanes(lambda x, y, compare=compare: compare(x, y).choose(x, y), a, b)
        assert unsigned(got) == [x if yes else y for (x, y), yes in zip(pairs, want, strict=True)]
        assert len(set(want)) == 2


def test_comparisons_of_floats_are_false_of_nan() -> None:
    a, b = floats(), floats(1)
    b[::4], a[::5], b[::7] = a[::4], torch.nan, torch.nan
    one, two = torch.ones(64), torch.full((64,), 2.0)
    for compare in (lambda x, y: x < y, lambda x, y: x >= y):
        got = lanes(lambda x, y, p, q, compare=compare: compare(x, y).choose(p, q), a, b, one, two)
        assert torch.equal(got == 1, compare(a, b))
    got = lanes(lambda x, y, p, q: x.equals(y).choose(p, q), a, b, one, two)
    assert torch.equal(got == 1, a == b)


class TestConversions:
    def test_widths_of_integers(self) -> None:
        a = integers(torch.uint8)
        for wide in (torch.int16, torch.int32, torch.int64):
            made = lanes(lambda x, wide=wide: x.to(TYPES[wide]), a, into=wide)
            assert made.tolist() == unsigned(a)
            back = lanes(lambda x: (x + 0x300).to(I8), made, into=torch.uint8)
            assert torch.equal(back, a)
        assert lanes(lambda x: x.to(I8), a).tolist() == a.tolist()

    def test_integers_to_floats_and_back(self) -> None:
        a = integers(torch.int32)
        assert torch.equal(lanes(lambda x: x.signed_to_float(), a, into=torch.float32), a.float())
        want = torch.tensor(unsigned(a), dtype=torch.float64).float()
        assert torch.equal(lanes(lambda x: x.to(F32), a, into=torch.float32), want)
        b = floats() * 1000
        assert torch.equal(lanes(lambda x: x.to(I32), b, into=torch.int32), b.to(torch.int32))
        assert (b < -1).any()

    def test_half_floats(self, of: str) -> None:
        every = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.float16)
        wide = lanes(lambda x: x.to(F32), every, into=torch.float32, of=of)
        assert torch.equal(wide.nan_to_num(1.5), every.float().nan_to_num(1.5))
        assert torch.equal(wide.isnan(), every.isnan())
        near = torch.cat((wide * (1 + 2.0**-12), wide * (1 - 3 * 2.0**-13), wide))  # ties and neighbours of them
        back = lanes(lambda x: x.to(F16), near, into=torch.float16, of=of)
        assert torch.equal(back.nan_to_num(1.5), near.half().nan_to_num(1.5))
        assert torch.equal(back.isnan(), near.isnan())

    def test_bits_of_bfloat16(self, of: str) -> None:
        """All high halves of a float32, with low halves below, at and above a tie."""
        rng = torch.Generator().manual_seed(0)
        high = torch.arange(1 << 16, dtype=torch.int64) << 16
        low = [torch.full_like(high, number) for number in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
        low.append(torch.randint(0, 1 << 16, high.shape, generator=rng))
        given = torch.cat([(high | part).to(torch.int32) for part in low]).view(torch.float32)
        got = lanes(lambda x: x.bf16_bits(), given, into=torch.int16, of=of).view(torch.bfloat16)
        want = given.to(torch.bfloat16)
        assert torch.equal(got.isnan(), given.isnan())
        numbers = ~given.isnan()
        assert torch.equal(got[numbers].view(torch.int16), want[numbers].view(torch.int16))

    def test_rounding_by_the_processor(self, of: str) -> None:
        if of == "any":
            pytest.skip("needs an instruction for it")
        a = torch.cat((floats(), floats(1) * 1e30, floats(2) * 1e-30, torch.full((16,), torch.inf)))
        assert torch.equal(lanes(lambda x: x.to(BF16), a, into=torch.bfloat16, of=of), a.bfloat16())
        assert torch.equal(lanes(lambda x: x.to(BF16).to(F32), a, of=of), a.bfloat16().float())
        nan = torch.full((16,), torch.nan)
        assert lanes(lambda x: x.to(BF16), nan, into=torch.bfloat16, of=of).isnan().all()

    def test_bits(self) -> None:
        a = floats()
        assert torch.equal(lanes(lambda x: x.bits(vector(I32, LANES)), a, into=torch.int32), a.view(torch.int32))


class TestLanes:
    def test_shuffles(self) -> None:
        a, b, order = floats()[:16], floats(1)[:16], torch.randperm(32, generator=torch.Generator().manual_seed(0))
        got = lanes(lambda x, y: x.shuffle(y, order[:16].tolist()), a, b)
        assert torch.equal(got, torch.cat((a, b))[order[:16]])
        assert torch.equal(lanes(lambda x: x.pick(list(range(15, -1, -1))), a), a.flip(0))
        assert torch.equal(lanes(lambda x: x.lane(5).splat(LANES), a), a[5].expand(16))
        narrow = torch.empty(4)

        def write(k: Kernel) -> None:
            k.store(k.load(k.address(3), vector(F32, 16)).pick(range(4, 8)), k.address(4))

        run(write, a, narrow)
        assert torch.equal(narrow, a[4:8])

    @pytest.mark.parametrize("size", [2, 4, 8, 16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
    def test_transposed(self, size: int, dtype: torch.dtype, of: str) -> None:
        given, out = torch.arange(size * size).to(dtype), torch.empty(size, size, dtype=dtype)

        def write(k: Kernel) -> None:
            rows = [k.load(k.address(3), vector(TYPES[dtype], size), i * size * 4) for i in range(size)]
            for i, row in enumerate(transposed(rows)):
                k.store(row, k.address(4), i * size * 4)

        run(write, given, out, of=of)
        assert torch.equal(out, given.view(size, size).t())

    @pytest.mark.parametrize("width", [1, 2, 16])
    def test_all_lanes_joined(self, width: int) -> None:
        given, out = torch.randperm(width, generator=torch.Generator().manual_seed(0)).float(), torch.empty(2)

        def write(k: Kernel) -> None:
            values = k.load(k.address(3), vector(F32, width))
            k.store(k.reduced(values, k.larger), k.address(4))
            k.store(k.reduced(values, lambda a, b: a + b), k.address(4), 4)

        run(write, given, out)
        assert out.tolist() == [width - 1, sum(range(width))]

    def test_numbers_of_lanes(self) -> None:
        out = torch.empty(8, dtype=torch.int64)
        run(lambda k: k.store(k.lanes(8), k.address(3)), out)
        assert out.tolist() == list(range(8))

    @pytest.mark.parametrize("count", [2, 4, 8, 16])
    @pytest.mark.parametrize("width", [4, 8, 16])
    def test_sums_of_lanes(self, count: int, width: int, of: str) -> None:
        if count > width:
            pytest.skip("there are as many lanes as vectors, or more")
        given = torch.randint(-99, 99, (count, width), generator=torch.Generator().manual_seed(0)).float()
        out = torch.empty(count)

        def write(k: Kernel) -> None:
            vectors = [k.load(k.address(3), vector(F32, width), i * width * 4) for i in range(count)]
            k.store(lane_sums(vectors), k.address(4))

        run(write, given, out, of=of)
        assert torch.equal(out, given.sum(1))

    def test_other_sizes_are_refused(self) -> None:
        with pytest.raises(AssertionError, match="beside"):
            lanes(lambda x: x + x.pick(range(4)), floats())
        with pytest.raises(AssertionError):
            lanes(lambda x: transposed([x, x])[0], floats())


@pytest.fixture
def page() -> Tensor:
    """Memory; a touch of what lies behind it ends the process."""
    return at_the_end(torch.zeros(PAGE, dtype=torch.uint8))


FIRST = [(I8, 16, torch.uint8), (I16, 32, torch.int16), (I16, 4, torch.int16), (I32, 16, torch.int32),
         (I32, 4, torch.int32), (F32, 16, torch.float32), (I64, 8, torch.int64)]  # fmt: skip


@pytest.mark.parametrize(("element", "length", "dtype"), FIRST, ids=str)
class TestTheFirstLanes:
    def test_loads(self, element: ir.Type, length: int, dtype: torch.dtype, page: Tensor, of: str) -> None:
        given, out = torch.arange(1, length + 1).to(dtype), torch.empty(length, dtype=dtype)
        width, border = given.element_size(), page.data_ptr() + PAGE
        load = compiled(
            lambda k: k.store(k.load_first(k.address(3), vector(element, length), k.argument(4)), k.address(5)), of
        )
        for count in range(length + 1):
            start = border - count * width  # up to the last byte that may be read
            ctypes.memmove(start, given.data_ptr(), count * width)
            load(1, 1, start, count, out.data_ptr())
            assert out.tolist() == [*range(1, count + 1), *[0] * (length - count)]
        load(1, 1, given.data_ptr(), 1 << 40, out.data_ptr())
        assert torch.equal(out, given)

    def test_stores(self, element: ir.Type, length: int, dtype: torch.dtype, page: Tensor, of: str) -> None:
        given = torch.arange(1, length + 1).to(dtype)
        width, border = given.element_size(), page.data_ptr() + PAGE
        store = compiled(
            lambda k: k.store_first(k.load(k.address(3), vector(element, length)), k.address(4), k.argument(5)), of
        )
        for count in range(length + 1):
            out = torch.full((length + 2,), 77).to(dtype)
            store(1, 1, given.data_ptr(), out[1:].data_ptr(), count)
            assert out.tolist() == [77, *range(1, count + 1), *[77] * (length + 1 - count)]
            store(1, 1, given.data_ptr(), border - count * width, count)
            assert ctypes.string_at(border - count * width, count * width) == given[:count].numpy().tobytes()


class TestControl:
    @pytest.mark.parametrize("step", [1, 3])
    @pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (6, 5), (0, 1), (2, 9)])
    def test_loops(self, start: int, stop: int, step: int) -> None:
        seen = torch.zeros(32, dtype=torch.int64)

        def write(k: Kernel) -> None:
            with k.loop(k.argument(4), k.argument(5), step) as index:
                k.store(k.load(k.address(3), I64, index * 8) + 1, k.address(3), index * 8)

        run(write, seen, start, stop)
        assert seen.nonzero().flatten().tolist() == list(range(start, stop, step))
        assert seen.max() <= 1

    def test_variables_go_through_loops_in_loops(self) -> None:
        out = torch.zeros(2, dtype=torch.int64)

        def write(k: Kernel) -> None:
            total, pairs = k.variable(k.int(0)), k.variable(k.int(100))
            with k.loop(0, k.argument(4)) as i, k.loop(i, k.argument(4)) as j:
                total.set(total.get() + i * j)
                pairs.set(pairs.get() + 1)
            k.store(total.get(), k.address(3))
            k.store(pairs.get(), k.address(3), 8)

        run(write, out, 7)
        pairs = [(i, j) for i in range(7) for j in range(i, 7)]
        assert out.tolist() == [sum(i * j for i, j in pairs), 100 + len(pairs)]

    def test_conditions(self) -> None:
        out = torch.zeros(10, dtype=torch.int64)

        def write(k: Kernel) -> None:
            with k.loop(0, k.int(10)) as i:
                place = k.at(k.address(3), i * 8)
                with k.either(i % 3 < 1) as (yes, no):
                    with yes:
                        k.store(i * 0 + 1, place)
                    with no, k.when(i >= 5):
                        k.store(i * 10, place)
                with k.when(i.equals(4)):
                    k.store(k.int(-1), place)

        run(write, out)
        assert out.tolist() == [1, 0, 0, 1, -1, 50, 1, 70, 80, 1]

    def test_a_condition_on_an_unsigned_number(self) -> None:
        out = torch.zeros(2, dtype=torch.int64)

        def write(k: Kernel) -> None:
            with k.when(k.argument(4) < 10):
                k.store(k.int(1), k.address(3))
            with k.when(k.argument(4) >= 10):
                k.store(k.int(1), k.address(3), 8)

        run(write, out, -1)  # the largest
        assert out.tolist() == [0, 1]

    def test_numbers_in_the_code(self) -> None:
        """Tables that two parts of a kernel name are one, on a border of 64 bytes."""
        out, where = torch.empty(20, dtype=torch.int16), torch.zeros(1, dtype=torch.int64)

        def write(k: Kernel) -> None:
            numbers = list(range(-10, 10))
            first, again = (k.table("numbers", numbers, I16) for _ in range(2))
            k.prefetch(first, 64)
            k.store(k.load(first, vector(I16, 16)), k.address(3))
            k.store(k.load(again, vector(I16, 4), 32), k.address(3), 32)
            k.store(Value(k.builder, k.builder.ptrtoint(first.of, I64)), k.address(4))
            assert [name for name in k.module.globals if "numbers" in name] == ["numbers"]

        run(write, out, where)
        assert out.tolist() == list(range(-10, 10))
        assert where % 64 == 0


class TestTiles:
    """The registers of AMX, one product of 16 x 16 sums over 64 bytes."""

    @pytest.fixture(autouse=True)
    def _needs_them(self, of: str) -> None:
        if of != "amx":
            pytest.skip("needs tile registers")

    @staticmethod
    def _multiply(operation: str) -> Bodies:
        def write(k: Kernel) -> None:
            k.configure_tiles()
            k.tile("zero", 0)
            k.tile("loadd64", 4, k.address(3), 64)
            k.tile("loadd64", 7, k.address(4), 64)
            k.tile_product(operation, 0, 4, 7)
            k.tile_product(operation, 0, 4, 7)
            k.tile("stored64", 0, k.address(5), 128)
            k.call("llvm.x86.tilerelease", VOID)

        return write

    def test_products_of_bfloat16(self) -> None:
        rng = torch.Generator().manual_seed(0)
        a, b = (torch.randint(-9, 9, (16, 32), generator=rng).bfloat16() for _ in range(2))
        out = torch.full((16, 32), 5.0)
        pairs = b.view(16, 16, 2).transpose(0, 1).contiguous()  # pairs of inputs x outputs
        run(self._multiply("dpbf16ps"), a, pairs, out, of="amx")
        assert torch.equal(out[:, :16], 2 * a.float() @ b.float().t())
        assert (out[:, 16:] == 5).all()

    def test_products_of_signed_bytes(self) -> None:
        rng = torch.Generator().manual_seed(0)
        a, b = (torch.randint(-128, 128, (16, 64), generator=rng).to(torch.int8) for _ in range(2))
        out = torch.full((16, 32), 5, dtype=torch.int32)
        fours = b.view(16, 16, 4).transpose(0, 1).contiguous()
        run(self._multiply("dpbssd"), a, fours, out, of="amx")
        assert torch.equal(out[:, :16].long(), 2 * a.long() @ b.long().t())
        assert (out[:, 16:] == 5).all()
