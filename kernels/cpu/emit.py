"""A small language for CPU kernels: Python that writes LLVM's intermediate code, which LLVM compiles at first use.

A kernel is a function of one argument, the address of an array of int64: how many units of work there are, two counters
from which threads take units and their own number, then the kernel's numbers and addresses. It is made with `Kernel`:
values are LLVM's and have operators, loops and conditions are `with` blocks, a Python loop unrolls. What a vector
operation becomes is LLVM's affair: sixteen floats are one register of AVX-512, two of AVX2, four of NEON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from llvmlite import ir


class _BFloat(ir.Type):
    """llvmlite has no bfloat. Constants of it, but for 0, are not needed."""

    null = "0.0"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)

    def format_constant(self, value: float) -> str:
        assert value == 0
        return self.null


I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, BF16, F32 = ir.HalfType(), _BFloat(), ir.FloatType()
POINTER, VOID = ir.PointerType(), ir.VoidType()
FLOATS = (F16, BF16, F32)
ELEMENTS = {torch.bfloat16: BF16, torch.float32: F32, torch.float16: F16}
_Int = int  # which is a method where `Kernel` is written

_ROUNDING = 1.5 * 2**23
_LOG2_E = 1.44269502162933349609375  # in float32, and what is left of it
_LOG2_E_REST = 1 / math.log(2) - _LOG2_E
_POWERS_OF_2 = [math.log(2) ** n / math.factorial(n) for n in range(7, -1, -1)]  # of 2^x for |x| <= 1/2
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def size_of(element: ir.Type) -> int:
    """Bytes of a float."""
    return 4 if element == F32 else 2


def vector(element: ir.Type, length: int) -> ir.VectorType:
    return ir.VectorType(element, length)


class Value:
    """An LLVM value with operators. Integers are unsigned; the other operand may be a Python number."""

    __slots__ = ("builder", "of")

    def __init__(self, builder: ir.IRBuilder, of: ir.Value) -> None:
        self.builder = builder
        self.of = of

    @property
    def type(self) -> ir.Type:
        return self.of.type

    @property
    def element(self) -> ir.Type:
        return self.type.element if isinstance(self.type, ir.VectorType) else self.type

    def like(self, value: Value | float) -> ir.Value:
        """The number as a constant of this value's type."""
        if isinstance(value, Value):
            assert value.type == self.type, f"{value.type} beside {self.type}"
            return value.of
        return constant(self.type, value)

    def _binary(self, name: str, other: Value | float) -> Value:
        return Value(self.builder, getattr(self.builder, name)(self.of, self.like(other)))

    def __add__(self, other: Value | float) -> Value:
        return self._binary("fadd" if self.element in FLOATS else "add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._binary("fsub" if self.element in FLOATS else "sub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._binary("fmul" if self.element in FLOATS else "mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary("fdiv", other)

    def __floordiv__(self, other: Value | int) -> Value:
        return self._binary("udiv", other)

    def __mod__(self, other: Value | int) -> Value:
        return self._binary("urem", other)

    def __and__(self, other: Value | int) -> Value:
        return self._binary("and_", other)

    def __or__(self, other: Value | int) -> Value:
        return self._binary("or_", other)

    def __xor__(self, other: Value | int) -> Value:
        return self._binary("xor", other)

    def __lshift__(self, other: Value | int) -> Value:
        return self._binary("shl", other)

    def __rshift__(self, other: Value | int) -> Value:
        return self._binary("lshr", other)

    def __lt__(self, other: Value | float) -> Value:
        return self._compare("<", other)

    def __ge__(self, other: Value | float) -> Value:
        return self._compare(">=", other)

    def equals(self, other: Value | float) -> Value:
        return self._compare("==", other)

    def _compare(self, sign: str, other: Value | float) -> Value:
        name = "fcmp_ordered" if self.element in FLOATS else "icmp_unsigned"
        return Value(self.builder, getattr(self.builder, name)(sign, self.of, self.like(other)))

    def choose(self, yes: Value, no: Value) -> Value:
        """This, a condition (or a vector of them): one or the other."""
        return Value(self.builder, self.builder.select(self.of, yes.of, yes.like(no)))

    def to(self, element: ir.Type) -> Value:
        """The same numbers as another type; integers are unsigned, floats are rounded to nearest even."""
        old, length = self.element, self.type.count if isinstance(self.type, ir.VectorType) else 0
        if old == element:
            return self
        new = vector(element, length) if length else element
        if old in FLOATS and element in FLOATS:
            name = "fptrunc" if old == F32 else "fpext"
        elif old in FLOATS:
            name = "fptosi"
        elif element in FLOATS:
            name = "uitofp"
        else:
            name = "trunc" if old.width > element.width else "zext"
        return Value(self.builder, getattr(self.builder, name)(self.of, new))

    def bf16_bits(self) -> Value:
        """Float32, rounded to nearest even, as the bits of bfloat16: for processors that have no instruction for it."""
        bits = self.bits(vector(I32, self.type.count))
        rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        # Rounding could carry a NaN into an infinity; one more bit keeps it one.
        is_number = (bits & 0x7FFFFFFF) < 0x7F800001
        return is_number.choose(rounded, (bits >> 16) | 0x40).to(I16)

    def signed_to_float(self) -> Value:
        """Integers that may be negative, as float32."""
        new = vector(F32, self.type.count) if isinstance(self.type, ir.VectorType) else F32
        return Value(self.builder, self.builder.sitofp(self.of, new))

    def bits(self, new: ir.Type) -> Value:
        """The same bits as another type of the same size."""
        return Value(self.builder, self.builder.bitcast(self.of, new))

    def shuffle(self, other: Value, lanes: Sequence[int]) -> Value:
        """Lanes of this and, behind them, of the other."""
        mask = ir.Constant(vector(I32, len(lanes)), list(lanes))
        return Value(self.builder, self.builder.shuffle_vector(self.of, other.of, mask))

    def pick(self, lanes: Sequence[int]) -> Value:
        return self.shuffle(self, lanes)

    def lane(self, index: int) -> Value:
        return Value(self.builder, self.builder.extract_element(self.of, ir.Constant(I32, index)))

    def splat(self, length: int) -> Value:
        one = self.builder.insert_element(
            ir.Constant(vector(self.type, length), ir.Undefined), self.of, ir.Constant(I32, 0)
        )
        return Value(self.builder, one).pick([0] * length)


def constant(of: ir.Type, number: float) -> ir.Constant:
    if isinstance(of, ir.VectorType):
        return ir.Constant(of, [ir.Constant(of.element, number)] * of.count)
    return ir.Constant(of, number)


class Variable:
    """A place that can be written again; LLVM makes a register of it."""

    def __init__(self, kernel: Kernel, first: Value) -> None:
        self._kernel = kernel
        self.type = first.type
        with kernel.builder.goto_entry_block():
            self._place = kernel.builder.alloca(self.type)
        self.set(first)

    def get(self) -> Value:
        return Value(self._kernel.builder, self._kernel.builder.load(self._place, typ=self.type))

    def set(self, value: Value) -> None:
        assert value.type == self.type
        self._kernel.builder.store(value.of, self._place)


class Kernel:
    """One function `name(address of int64s)` of a module."""

    def __init__(self, module: ir.Module, name: str) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(VOID, [POINTER]), name)
        entry = self.function.append_basic_block("entry")
        self.builder = ir.IRBuilder(self.function.append_basic_block("body"))
        # Variables are allocated in a block of their own, which the body follows at the end.
        self._body = self.builder.block
        ir.IRBuilder(entry).branch(self._body)

    def done(self) -> None:
        self.builder.ret_void()

    # Arguments and numbers

    def argument(self, index: int) -> Value:
        """A number; the first three are the work's and the counters."""
        array = Value(self.builder, self.function.args[0])
        return self.load(array, I64, index * 8)

    def address(self, index: int) -> Value:
        return self.as_address(self.argument(index))

    def as_address(self, number: Value) -> Value:
        return Value(self.builder, self.builder.inttoptr(number.of, POINTER))

    def lanes(self, count: int) -> Value:
        """0, 1, 2 and so on."""
        return Value(self.builder, ir.Constant(vector(I64, count), list(range(count))))

    def int(self, number: int) -> Value:
        return Value(self.builder, ir.Constant(I64, number))

    def fill(self, of: ir.Type, number: float) -> Value:
        return Value(self.builder, constant(of, number))

    def variable(self, first: Value) -> Variable:
        return Variable(self, first)

    # Memory

    def at(self, pointer: Value, offset: Value | _Int) -> Value:
        """The address so many bytes behind."""
        by = offset.of if isinstance(offset, Value) else ir.Constant(I64, offset)
        return Value(self.builder, self.builder.gep(pointer.of, [by], source_etype=I8))

    def load(self, pointer: Value, of: ir.Type, offset: Value | _Int = 0) -> Value:
        return Value(self.builder, self.builder.load(self.at(pointer, offset).of, align=1, typ=of))

    def store(self, value: Value, pointer: Value, offset: Value | _Int = 0) -> None:
        self.builder.store(value.of, self.at(pointer, offset).of, align=1)

    def prefetch(self, pointer: Value, offset: Value | _Int = 0, level: _Int = 1) -> None:
        """Asks for a line; it need not be there. Into the cache of that level."""
        where = self.at(pointer, offset)
        self.call("llvm.prefetch", VOID, where, self.fill(I32, 0), self.fill(I32, 4 - level), self.fill(I32, 1))

    def load_first(self, pointer: Value, of: ir.VectorType, count: Value) -> Value:
        """The first so many lanes; the others are 0 and their memory is not touched."""
        mask = self.lanes(of.count) < count.splat(of.count)
        return self.call("llvm.masked.load", of, pointer, self.fill(I32, 1), mask, self.fill(of, 0))

    def store_first(self, value: Value, pointer: Value, count: Value) -> None:
        """The first so many lanes of a vector."""
        length = value.type.count
        mask = self.lanes(length) < count.splat(length)
        self.call("llvm.masked.store", VOID, value, pointer, self.fill(I32, 1), mask)

    # Control

    def thread(self) -> Value:
        """Which of the threads this is that entered, from 0. Once in a kernel."""
        return self._claim(2)

    @contextmanager
    def units(self) -> Iterator[Value]:
        """Takes one unit of the work after the other, until the threads together have done all."""
        head, body, after = (self.builder.append_basic_block(name) for name in ("claim", "unit", "done"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        unit = self._claim(1)
        self.builder.cbranch((unit < self.argument(0)).of, body, after)
        self.builder.position_at_end(body)
        yield unit
        self.builder.branch(head)
        self.builder.position_at_end(after)

    def _claim(self, index: _Int) -> Value:
        place = self.at(Value(self.builder, self.function.args[0]), index * 8)
        return Value(self.builder, self.builder.atomic_rmw("add", place.of, ir.Constant(I64, 1), "monotonic"))

    @contextmanager
    def loop(self, start: Value | _Int, stop: Value, step: _Int = 1) -> Iterator[Value]:
        index = self.variable(start if isinstance(start, Value) else self.int(start))
        head, body, after = (self.builder.append_basic_block(name) for name in ("head", "body", "after"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch((index.get() < stop).of, body, after)
        self.builder.position_at_end(body)
        yield index.get()
        index.set(index.get() + step)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.of):
            yield

    @contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """`with kernel.either(c) as (yes, no):` and in it `with yes:` and `with no:`."""
        with self.builder.if_else(condition.of) as branches:
            yield branches

    # Operations that are no instructions

    def call(self, name: str, result: ir.Type, *values: Value) -> Value:
        """An intrinsic of LLVM by its full name, or, of one that is overloaded, by the stem."""
        types = [value.type for value in values]
        full = name + _suffix(name, result, types)
        if full not in self.module.globals:
            ir.Function(self.module, ir.FunctionType(result, types), full)
        return Value(self.builder, self.builder.call(self.module.globals[full], [value.of for value in values]))

    # Tile registers of AMX: eight of them, 16 rows of 64 bytes

    def configure_tiles(self) -> None:
        numbers = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
        self.call("llvm.x86.ldtilecfg", VOID, self.table("tile_configuration", numbers, I8))

    def tile(self, operation: str, number: _Int, pointer: Value | None = None, stride: _Int = 0) -> None:
        """ "zero", "loadd64" or "stored64"; the stride of its rows in bytes."""
        values = [] if pointer is None else [pointer, self.int(stride)]
        self.call(f"llvm.x86.tile{operation}", VOID, self.fill(I8, number), *values)

    def tile_product(self, operation: str, to: _Int, a: _Int, b: _Int) -> None:
        self.call(f"llvm.x86.t{operation}", VOID, *(self.fill(I8, number) for number in (to, a, b)))

    def table(self, name: str, numbers: Sequence[float], of: ir.Type) -> Value:
        """The address of constants in memory, on a border of 64 bytes."""
        if name not in self.module.globals:
            made = ir.GlobalVariable(self.module, ir.ArrayType(of, len(numbers)), name)
            made.initializer = ir.Constant(made.value_type, list(numbers))
            made.global_constant, made.align = True, 64
        return Value(self.builder, self.module.globals[name])

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.call("llvm.fma", a.type, a, b, c)

    def exp(self, x: Value) -> Value:
        """e^x of float32 up to 0, within 2 units of the last place; 0 below -87, where numbers lose their bits."""
        above = (x < -87.0).choose(self.fill(x.type, -87.0), x)
        high, low = self.fill(x.type, _LOG2_E), self.fill(x.type, _LOG2_E_REST)
        # Beside the large number a float has no fraction: its last bits are the nearest integer.
        shifted = self.fma(above, high, self.fill(x.type, _ROUNDING))
        rest = self.fma(above, low, self.fma(above, high, self.fill(x.type, _ROUNDING) - shifted))
        result = self.fill(x.type, _POWERS_OF_2[0])
        for coefficient in _POWERS_OF_2[1:]:
            result = self.fma(result, rest, self.fill(x.type, coefficient))
        bits = vector(I32, x.type.count)
        result = (result.bits(bits) + (shifted.bits(bits) << 23)).bits(x.type)
        return (x < -87.0).choose(self.fill(x.type, 0), result)

    def sigmoid(self, x: Value) -> Value:
        small = self.exp(self.call("llvm.fabs", x.type, x) * -1)  # e^-|x|: never more than a float holds
        return (x >= 0.0).choose(self.fill(x.type, 1), small) / (small + 1)

    def erf(self, x: Value) -> Value:
        """Within 2e-7 (Abramowitz and Stegun, 7.1.26)."""
        size = self.call("llvm.fabs", x.type, x)
        t = self.fill(x.type, 1) / (size * 0.3275911 + 1)
        series = self.fill(x.type, _ERF[0])
        for coefficient in _ERF[1:]:
            series = self.fma(series, t, self.fill(x.type, coefficient))
        found = self.fill(x.type, 1) - series * t * self.exp(size * size * -1)
        return (x < 0.0).choose(found * -1, found)

    def reduced(self, values: Value, join: Callable[[Value, Value], Value]) -> Value:
        """All lanes of a vector, joined two by two."""
        while (count := values.type.count // 2) > 0:
            values = join(values.pick(range(count)), values.pick(range(count, 2 * count)))
        return values.lane(0)

    def larger(self, a: Value, b: Value) -> Value:
        return self.call("llvm.maxnum" if a.element in FLOATS else "llvm.umax", a.type, a, b)

    def smaller(self, a: Value, b: Value) -> Value:
        return self.call("llvm.minnum" if a.element in FLOATS else "llvm.umin", a.type, a, b)


def as_float(bits: Value, element: ir.Type) -> Value:
    """The bits of a float, or of a vector of them, as float32."""
    length = bits.type.count if isinstance(bits.type, ir.VectorType) else 0
    if element == BF16:
        return (bits.to(I32) << 16).bits(vector(F32, length) if length else F32)
    return bits.bits(vector(element, length) if length else element).to(F32)


def to_bits(values: Value, element: ir.Type, of: str) -> Value:
    """Float32, rounded to nearest even, as bits of the other type; `of` a level of `compiled.LEVELS`."""
    if element == BF16 and of == "any":
        return values.bf16_bits()
    return values.to(element).bits(vector(I32 if size_of(element) == 4 else I16, values.type.count))


def load_floats(k: Kernel, pointer: Value, element: ir.Type, first: Value | int, left: Value | None) -> Value:
    """Sixteen numbers from that index on, as float32; of these only so many where `left` is given, then 0."""
    size = size_of(element)
    at, bits = k.at(pointer, first * size), vector(I32 if size == 4 else I16, 16)
    return as_float(k.load(at, bits) if left is None else k.load_first(at, bits, left), element)


def store_bits(k: Kernel, bits: Value, pointer: Value, first: Value | int, left: Value | None) -> None:
    """Sixteen numbers of `to_bits` from that index on, or only so many."""
    at = k.at(pointer, first * (bits.element.width // 8))
    if left is None:
        k.store(bits, at)
    else:
        k.store_first(bits, at, left)


def over_row(k: Kernel, length: Value, write: Callable[[Value, Value | None, int], None]) -> None:
    """Writes the loops over a row: `write(first, left, turn)` for sixteen numbers from `first` on, all of them where
    `left` is None. Turns are those of a step, 0 to 3, so that sums need not wait for each other."""
    whole = length - length % 64
    with k.loop(0, whole, 64) as first:
        for turn in range(4):
            write(first + 16 * turn, None, turn)
    with k.loop(whole, length, 16) as first:
        write(first, length - first, 0)


def write_outputs(
    k: Kernel, values: Value, out: Value, row: Value, length: Value, first: Value, element: ir.Type
) -> None:
    """Rounds float32 values and writes them into a row of so many numbers, from `first` on: those that have room."""
    count, size = values.type.count, size_of(element)
    rounded = values.bf16_bits() if element == BF16 else values.to(element)
    to = k.at(out, (row * length + first) * size)
    with k.either(length >= first + count) as (all_of_them, some):
        with all_of_them:
            k.store(rounded, to)
        with some, k.when(first < length):
            k.store_first(rounded.bits(vector(I32 if size == 4 else I16, count)), to, length - first)


def transposed(vectors: Sequence[Value]) -> list[Value]:
    """A square of lanes, as many vectors as each has lanes: what was lane i of vector j becomes lane j of vector i."""
    rows, size = list(vectors), len(vectors)
    assert all(row.type.count == size for row in rows)
    by = size // 2
    while by:
        for i in range(size):
            if not i & by:
                a, b = rows[i], rows[i + by]
                rows[i] = a.shuffle(b, [size + lane - by if lane & by else lane for lane in range(size)])
                rows[i + by] = a.shuffle(b, [size + lane if lane & by else lane + by for lane in range(size)])
        by //= 2
    return rows


def lane_sums(vectors: Iterable[Value]) -> Value:
    """The sum over the lanes of each vector, in a vector of as many lanes as there are vectors (a power of 2).

    They are taken one by one, and joined as soon as two are there, so that few must be held.
    """
    waiting: list[tuple[int, Value]] = []  # how many lanes belong to one sum, and the sums

    def halved(a: Value, b: Value, each: int, sums: int) -> Value:
        low = [start + lane for start in range(0, sums * each, each) for lane in range(each // 2)]
        return a.shuffle(b, low) + a.shuffle(b, [lane + each // 2 for lane in low])

    for one in vectors:
        each = width = one.type.count
        while waiting and waiting[-1][0] == each:
            one, each = halved(waiting.pop()[1], one, each, 2 * width // each), each // 2
        waiting.append((each, one))
    [(each, found)] = waiting
    while each > 1:  # fewer vectors than lanes: what is left is added in place
        found, each = halved(found, found, each, found.type.count // each), each // 2
    return found


def _suffix(name: str, result: ir.Type, types: list[ir.Type]) -> str:
    if name.startswith("llvm.x86."):
        return ""
    if name == "llvm.prefetch":
        return ".p0"
    if name.startswith("llvm.masked."):
        of = types[0] if name.endswith("store") else result
        return f".{_mangled(of)}.p0"
    return f".{_mangled(types[0])}"


def _mangled(of: ir.Type) -> str:
    if isinstance(of, ir.VectorType):
        return f"v{of.count}{_mangled(of.element)}"
    return {F16: "f16", BF16: "bf16", F32: "f32"}[of] if of in FLOATS else f"i{of.width}"
