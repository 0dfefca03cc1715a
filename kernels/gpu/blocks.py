"""Block sizes that several kernels share."""

from __future__ import annotations

MIN_DOT = 16  # the least size of each side of a `tl.dot`
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def row_warps(size: int) -> int:
    """Warps of a program that holds a row of that many entries."""
    return min(16, max(1, power_of_two(size) // 512))


def head_parts(head_dim: int) -> tuple[int, int]:
    """A head dimension as two block sizes, powers of two, the second 0 where one is enough.

    72 and 80 are 64 + 16 instead of 128: a third of the products would multiply padding.
    """
    whole = power_of_two(head_dim)
    half = whole // 2
    if head_dim - half <= 0 or whole <= 2 * MIN_DOT:
        return max(MIN_DOT, whole), 0
    rest = max(MIN_DOT, power_of_two(head_dim - half))
    return (half, rest) if half + rest < whole else (whole, 0)
