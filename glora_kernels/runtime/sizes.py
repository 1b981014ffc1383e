"""Numbers computed from the row count M, so that a program planned once for a class of M can be resized.

While a pass is recorded, `recording.rows` of a tensor with M rows returns a `Rows`: the M that is planned for, as an
int that remembers how it was computed. Grids, sizes and arguments computed from it by +, -, *, // and `lesser` can then
be computed again for another M. Outside a recording the same code computes with plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def _itself(m: int) -> int:
    return m


class Rows(int):
    """A number that follows M. Its int value is that of the planned M.

    Attributes:
        of: computes it for another M.
        multiple: a divisor, up to 16, that it has for every M.
    """

    of: Callable[[int], int]
    multiple: int

    def __new__(cls, value: int, of: Callable[[int], int] | None = None, multiple: int = 1) -> Rows:
        made = super().__new__(cls, value)
        made.of, made.multiple = of or _itself, math.gcd(multiple, 16)
        return made

    @property
    def is_m(self) -> bool:
        """Whether this is M itself."""
        return self.of is _itself

    def __add__(self, other: int) -> Rows:
        divisor = math.gcd(self.multiple, _divisor(other))
        return Rows(int(self) + int(other), lambda m: self.of(m) + at(other, m), divisor)

    __radd__ = __add__

    def __sub__(self, other: int) -> Rows:
        return self + other * -1

    def __mul__(self, other: int) -> Rows:
        return Rows(int(self) * int(other), lambda m: self.of(m) * at(other, m), self.multiple * _divisor(other))

    __rmul__ = __mul__

    def __neg__(self) -> Rows:
        return self * -1

    def __floordiv__(self, other: int) -> Rows:
        return Rows(int(self) // int(other), lambda m: self.of(m) // at(other, m))


def _divisor(value: int) -> int:
    return value.multiple if isinstance(value, Rows) else math.gcd(value, 16)


def at(value: int, m: int) -> int:
    """The number for another M; a number that does not follow M stays as it is."""
    return value.of(m) if isinstance(value, Rows) else value


def lesser(a: int, b: int) -> int:
    """The smaller of two numbers, for every M; `min` would forget the one that is larger now."""
    if isinstance(a, Rows) or isinstance(b, Rows):
        return Rows(min(a, b), lambda m: min(at(a, m), at(b, m)))
    return min(a, b)


class HostValue(int):
    """A number that each call reads from a CPU tensor: the seed of a dropout mask. `slot`: that tensor's slot."""

    slot: int

    def __new__(cls, value: int, slot: int) -> HostValue:
        made = super().__new__(cls, value)
        made.slot = slot
        return made
