"""The operands of kernels as NamedTuples, in which an absent operand is None.

Triton accepts NamedTuples as kernel arguments: each entry becomes one argument of the compiled kernel, and None is a
constant, so that `if terms.b is not None` costs nothing. Host and kernel use the same classes: on the host an entry is
a tensor or a number, in a kernel a pointer or a value.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """ptr[i·row + j·col]. With several bands (bands, M, C), each is M·row after the one before."""

    ptr: Any
    row: Any
    col: Any


class Vector(NamedTuple):
    """ptr[i·step]. With several bands (bands, M), each is M after the one before."""

    ptr: Any
    step: Any


class Constant(NamedTuple):
    """A vector whose entries all equal the number at ptr. A kernel tells it from a `Vector` by `len`."""

    ptr: Any


class Shift(NamedTuple):
    """β = bias∘(1+d) + e + wc, where absent terms are None; `d` only with a bias."""

    bias: Any = None
    wc: Any = None
    d: Any = None
    e: Any = None
    end: None = None


class Terms(NamedTuple):
    """The terms added to a product: y = Z∘(1+a) + P·Uᵀ + h·upᵀ + σ·bᵀ + β.

    `low` holds [P | h] (M, P+R), in bands; its columns are multiplied by `u` (N, P) and `up` (N, R). For these two a
    kernel gets only the pointer of a contiguous matrix, so that another rank needs no other compilation.

    Two limits of Triton 3.6: a tuple that holds a None cannot be compared, so kernels test the entries and never
    `shift` itself; and inside a loop the constants of an inner structure are lost unless the outer structure has a
    constant after it, which `end` is.
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
"""No terms: the product alone."""


class Numerics(NamedTuple):
    """The dtype and precision of large products, and of products with factors, as one constexpr.

    Dtypes are given by name, since Triton writes such a constexpr to JSON for listeners to compilations. `upcast` is
    for the interpreter, whose bfloat16 product is wrong.
    """

    name: str
    precision: str
    factor_name: str
    factor_precision: str
    upcast: bool


def named_dtype(name: str) -> Any:
    """Triton's dtype of a name, which is PyTorch's name as well."""
    from triton import language

    return getattr(language, name)


class Parts(NamedTuple):
    """Partial sums of a matrix, contiguous along its rows, at ptr[0], ptr[step], ptr[2·step] … before `end`.

    `end` instead of their number, since Triton compiles a kernel again for the number 1 and for multiples of 16.
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
    """The sums of `_dy_kernel` along M, vectors (N,) in partial sums (as in `Parts`), and the gradients from them.

    g: Σ dy, for dwc, de, dbias (with d) and dd (with bias). sigma: dyᵀσ, for db. q: Σ dy∘(Z∘(1+a)), for da (with a).
    judges: where y has other terms, two more sums, `end` apart, that tell whether q is accurate. end None: no columns.
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
    """The matrices for computing da = Σₘ dy∘Z with Z = x·Wᵀ computed again."""

    dy: Any
    x: Any
    w: Any


class Pair(NamedTuple):
    """A low-rank pair of matrices: Σᵣ up[i,r]·down[r,j]."""

    up: Any
    down: Any


class Nested(NamedTuple):
    """An absmax that is itself quantized: `code`[absmax[b]]·`absmax`[b // block] + `offset`."""

    absmax: Any
    code: Any
    offset: Any
    block: Any


class Codes(NamedTuple):
    """A weight (N,K) in 4 bits: two codes per byte, high bits first, over the flattened matrix.

    Every `block` of codes has one `absmax`; where that is quantized itself, `nested` has the rest. Constants of the
    compiled kernel are kind ("nf4" or "fp4"), both block sizes, dtype (the name of the dtype that decoded numbers are
    rounded to) and words (whether whole words of eight codes may be read).
    """

    packed: Any
    absmax: Any
    nested: Any
    kind: Any
    block: Any
    dtype: Any
    words: Any


class Low(NamedTuple):
    """The low-rank term h·upᵀ of a member of a group: up (N,R) and h (M,R), contiguous.

    A kernel that computes h itself multiplies it by `scale`, and stores it for backward if `leaves` is not 0.
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
    """The term S·down that a path of a group adds to dx: S (M,R) and down (R,K), contiguous."""

    s: Any
    down: Any
    rank: Any


class Masks(NamedTuple):
    """The dropout masks of several paths: a seed each (a number or its address), the threshold and 1/(1-p).

    The threshold is a whole number in fp32, since Triton may compile a kernel again for another integer in a tuple.
    """

    seeds: Any
    threshold: Any
    inv_keep: Any
