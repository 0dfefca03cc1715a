"""What `make aot` refuses, and that it finds the loop whose instructions it counts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks" / "kernels"))
from aot import INSTRUCTION_LIMITS, SHARED, SPILL_BUDGET, Compiled, main_loop, over_budget, variants

FINE = Compiled("int4_linear g=128 tokens=16 bf16", 86, 37376, 128, 0, 390, 32, 3.05)
CODE = """
.L_x_0:
        /*0010*/                   LOP3.LUT R1, R1, 0xf, RZ, 0xc0, !PT ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   SHF.R.U32.HI R2, RZ, 0x4, R2 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0070*/                   EXIT ;
"""


def test_the_main_loop() -> None:
    assert main_loop(CODE) == (3, 1)
    assert main_loop(CODE.replace("HMMA", "FFMA")) == (0, 0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (FINE, ""),
        (replace(FINE, shared=SHARED[86] + 1), "shared memory"),
        (replace(FINE, spilled=8), "8 bytes spilled, at most 0"),
        (replace(FINE, per_entry=4.01), "at most 4.0"),
        (replace(FINE, per_entry=None), "at most 4.0"),  # a loop that is not found is no proof
        (replace(FINE, name="int4_linear lop3 g=128 tokens=16 fp16"), "at most 2.6"),
        (replace(FINE, name="int4_linear g=64 tokens=16 bf16", per_entry=9.0), ""),
        (replace(FINE, arch=100, per_entry=9.0), ""),
        (replace(FINE, name="int8_linear rows=128 plain bf16", arch=120, spilled=8, per_entry=None), ""),
        (replace(FINE, name="int8_linear rows=128 plain bf16", arch=120, spilled=16, per_entry=None), "at most 8"),
    ],
)
def test_over_budget(row: Compiled, said: str) -> None:
    found = list(over_budget(row))
    assert len(found) == bool(said)
    assert all(said in line for line in found)


def test_limits_are_of_kernels_that_are_there() -> None:
    names = [variant.name for _, variant in variants(None, ["fp16", "bf16"])]
    assert len(names) == len(set(names))
    for beginning in INSTRUCTION_LIMITS:
        assert sum(name.startswith(beginning) for name in names) == 2
    for kernel, _ in SPILL_BUDGET:
        assert any(name.split()[0] == kernel for name in names)
