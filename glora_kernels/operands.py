"""The operands of kernels as structures: what belongs together travels together, and what is absent is None.

Triton takes NamedTuples as arguments, compiled and interpreted: their entries become arguments of the machine code one
by one, and None is folded away like a constant, so that `if terms.b is not None` costs nothing. The same classes serve
both sides: on the host an entry is a tensor or a number, in a kernel a pointer or a value.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """ptr[i·row + j·col]. Of several bands (bands, M, C), the next is M·row further."""

    ptr: Any
    row: Any
    col: Any


class Vector(NamedTuple):
    """ptr[i·step]. Of several bands (bands, M), the next is M further."""

    ptr: Any
    step: Any


class Constant(NamedTuple):
    """A vector that is one number repeated, behind ptr. A kernel knows it from a `Vector` by its length."""

    ptr: Any


class Shift(NamedTuple):
    """β = bias∘(1+d) + e + wc, of the terms there are; `d` only beside a bias."""

    bias: Any = None
    wc: Any = None
    d: Any = None
    e: Any = None
    end: None = None


class Terms(NamedTuple):
    """What is added to a product: y = Z∘(1+a) + P·Uᵀ + h·upᵀ + σ·bᵀ + β.

    `low` holds [P | h] (M, P+R), in bands; `u` (N, P) and `up` (N, R) are what its columns are multiplied by: of these
    two only the pointer, with rows that follow each other, so that a kernel is not compiled again for another rank.

    A kernel asks for the presence of entries, never of `shift`: Triton 3.6 compares no tuple that holds a None. And in
    a loop it forgets the constants of inner structures unless one of the outer structure follows them: `end`, always.
    """

    a: Any = None
    low: Any = None
    u: Any = None
    up: Any = None
    b: Any = None
    sigma: Any = None
    shift: Shift = Shift()
    end: None = None


W_ALONE = Terms()
"""Nothing is added."""


class Numerics(NamedTuple):
    """How numbers are multiplied, one constexpr: the operands of the large product, and factors with what they meet.

    Dtypes by name, as Triton writes a constexpr of this kind to JSON for whoever listens to compilations. `upcast` is
    for the interpreter, whose bfloat16 product is wrong.
    """

    name: str
    precision: str
    factor_name: str
    factor_precision: str
    upcast: bool

    @property
    def dtype(self) -> Any:
        return named_dtype(self.name)

    @property
    def factor_dtype(self) -> Any:
        return named_dtype(self.factor_name)


def named_dtype(name: str) -> Any:
    """Triton's dtype of a name that PyTorch's has too."""
    from triton import language

    return getattr(language, name)


class Parts(NamedTuple):
    """Partial sums of a matrix, contiguous along its rows, at ptr[0], ptr[step], ptr[2·step] … before `end`.

    `end` and not their number: that would be compiled in where it is one, and looked at for multiples of 16.
    """

    ptr: Any
    row: Any
    step: Any
    end: Any


class Sum(NamedTuple):
    """out[i] = ptr[i] + ptr[step + i] + ptr[2·step + i] … before `end`, for all i < step."""

    ptr: Any
    step: Any
    end: Any
    out: Any


class Columns(NamedTuple):
    """The sums of `_dy_kernel` along M, vectors (N,) in partial sums (as in `Parts`), and what is made of them.

    g: Σ dy, for dwc, de, dbias (with d) and dd (with bias). sigma: dyᵀσ, for db. q: Σ dy∘(Z∘(1+a)), for da (with a);
    where y holds more than Z, `judges` are two more sums, `end` apart, by which q is judged. No `end`: no columns.
    """

    g: Any = None
    sigma: Any = None
    q: Any = None
    judges: Any = None
    step: Any = None
    end: Any = None
    dwc: Any = None
    de: Any = None
    dbias: Any = None
    dd: Any = None
    db: Any = None
    da: Any = None
    a: Any = None
    bias: Any = None
    d: Any = None


NO_COLUMNS = Columns()


class Anew(NamedTuple):
    """What Z = x·Wᵀ is computed from again, and dy beside it: matrices."""

    dy: Any
    x: Any
    w: Any


class Pair(NamedTuple):
    """A low-rank pair of matrices: Σᵣ up[i,r]·down[r,j]."""

    up: Any
    down: Any


class Nested(NamedTuple):
    """absmax quantized in its turn: `code`[absmax[b]]·`absmax`[b // block] + `offset`."""

    absmax: Any
    code: Any
    offset: Any
    block: Any


class Codes(NamedTuple):
    """A weight (N,K) in 4 bits: two codes a byte, the higher bits first, over the flat matrix.

    Every `block` of codes has an `absmax`, of which `nested` says more where it is quantized itself. kind ("nf4" or
    "fp4"), both block sizes, the name of the dtype that decoded numbers are rounded to and whether whole words of eight
    codes may be read (`words`) are constants of the compiled kernel.
    """

    packed: Any
    absmax: Any
    nested: Any
    kind: Any
    block: Any
    dtype: Any
    words: Any


class Low(NamedTuple):
    """The low-rank part h·upᵀ of a member of a group: up (N,R) and h (M,R), contiguous.

    Where the kernel makes h, s·x·downᵀ, it takes `scale`, and stores h for backward if `leaves` is not 0.
    """

    up: Any
    h: Any
    leaves: Any
    rank: Any
    scale: Any


class Bias(NamedTuple):
    """The bias of a member of a group, contiguous; of size 0 where the member has none and others do."""

    ptr: Any
    size: Any


class Path(NamedTuple):
    """What a path of a group adds to dx: S·down, S (M,R) and down (R,K), contiguous."""

    s: Any
    down: Any
    rank: Any


class Masks(NamedTuple):
    """The dropout masks of several paths: a key each, a number or the address of one, the threshold and 1/(1-p).

    The threshold is a whole number in fp32: for an integer in a tuple Triton compiles another kernel at another p.
    """

    seeds: Any
    threshold: Any
    inv_keep: Any
