"""A launch as data: which kernel, on which grid, with which arguments. It can be printed, run or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.operands import Constant, Matrix, Numerics, Pair, Shift, Terms, Vector, named_dtype
from glora_kernels.reference.random import dropout_threshold
from glora_kernels.runtime import environment
from glora_kernels.runtime.planning import note
from glora_kernels.runtime.recording import Bound, recorded, rows
from glora_kernels.runtime.sizes import Rows

_SIZES = ("BLOCK_", "BANDS", "PARTS", "GROUP")


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `args`: every argument by name; `options`: num_warps, num_stages and so on."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Launch on the current stream of the arguments' device. An empty grid launches nothing.

        Inside `planning` the launch is only noted.
        """
        if 0 in self.grid:
            return
        if note(self):
            return
        device = next(tensors_of(tuple(self.args.values()))).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.kernel[self.grid](**self.args, **self.options)
        else:
            self.kernel[self.grid](**self.args, **self.options)

    def compiled(self) -> Any:
        """The kernel that Triton's JIT compiles for this launch on the current card; nothing is launched.

        Raises:
            AssertionError: an argument follows M, and the compiled code would depend on its value.
        """
        for param in self.kernel.params:
            if not param.do_not_specialize and _is_compiled_in(self.args[param.name], param.is_constexpr):
                raise AssertionError(f"{param.name} of {self.kernel.__name__} follows M and is compiled in")
        args = {name: _mapped(value, lambda tensor: tensor, int) for name, value in self.args.items()}
        found = self.kernel.run(grid=self.grid, warmup=True, **args, **self.options)
        return found.result() if hasattr(found, "result") else found  # it is compiled in the background

    def bound(self, call: Bound) -> Launch:
        """This recorded launch, with the tensors and numbers of a call."""

        def descriptor_of(value: Any) -> Any:
            shape = list(map(call.number, value.shape))
            return type(value)(call.view(value.base), shape, value.strides, value.block_shape)

        args = {name: _mapped(value, call.pointer, call.number, descriptor_of) for name, value in self.args.items()}
        return Launch(self.kernel, tuple(map(call.number, self.grid)), args, self.options)

    def __str__(self) -> str:
        flags = ", ".join(name for name, value in self.args.items() if value is True)
        blocks = ", ".join(f"{name}={value}" for name, value in self.args.items() if name.startswith(_SIZES))
        compiler = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.kernel.__name__}{list(self.grid)} {blocks}; {compiler}; {flags or 'no flags'}"


def _mapped(
    value: Any,
    tensor: Callable[[Tensor], Any],
    number: Callable[[int], int],
    descriptor: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """An argument with its tensors, integers and tensor descriptors replaced by what the functions return."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, tuple):
        parts = [_mapped(part, tensor, number, descriptor) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, int) and not isinstance(value, bool):
        return number(value)
    return descriptor(value) if hasattr(value, "block_shape") else value


def _is_compiled_in(value: Any, constant: bool) -> bool:
    """Whether compiled code depends on a number that follows M: a constant, or one tested for divisibility by 16."""
    if isinstance(value, tuple):
        return any(_is_compiled_in(part, constant) for part in value)
    return isinstance(value, Rows) and (constant or value.multiple < 16)


def tensors_of(values: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among arguments, in their structures and behind their tensor descriptors."""
    for value in values:
        base = getattr(value, "base", value)
        if isinstance(base, Tensor):
            yield base
        elif isinstance(value, tuple):
            yield from tensors_of(value)


@dataclass(frozen=True)
class LibraryProduct:
    """A step that is a GEMM of the vendor's library: out = left·right, or out += left·right where `accumulates`."""

    left: Tensor
    right: Tensor
    out: Tensor
    accumulates: bool

    def run(self) -> None:
        if note(self):
            return
        if self.accumulates:
            torch.addmm(self.out, self.left, self.right, out=self.out)
        else:
            torch.mm(self.left, self.right, out=self.out)

    def bound(self, call: Bound) -> LibraryProduct:
        """This recorded product, with the tensors of a call."""
        left, right, out = map(call.view, (self.left, self.right, self.out))
        return LibraryProduct(left, right, out, self.accumulates)

    def __str__(self) -> str:
        (m, k), n = self.left.shape, self.right.shape[1]
        return f"library product {m}x{n}x{k}{', added' if self.accumulates else ''}"


def precision(dtype: torch.dtype) -> str:
    """The precision of `tl.dot` for a dtype: fp32 is exact ("ieee"), unless PyTorch itself may use TF32."""
    return "tf32" if dtype == torch.float32 and environment.allow_tf32() else "ieee"


def numerics(dtype: torch.dtype, *factors: Tensor | torch.dtype | None) -> Numerics:
    """How a kernel computing in `dtype` multiplies: in its main products, and in those with low-rank `factors`.

    Factors are multiplied in fp32 where one of them is wider than 16 bits. In a 16-bit computation such a product is
    split into bfloat16 halves (`tile.dot`): two or three matrix instructions, where TF32 would take three at half the
    speed.
    """
    dtypes = (t.dtype if isinstance(t, Tensor) else t for t in factors)
    widens = dtype.itemsize == 2 and any(t is not None and t.itemsize > 2 for t in dtypes)
    own = str(dtype).removeprefix("torch."), precision(dtype)
    return Numerics(*own, *(("float32", "halves") if widens else own), environment.interpreting())


def matrix(tensor: Tensor | None) -> Matrix | None:
    """A matrix as an operand, or bands (bands, M, C) of one, of which each begins M rows after the one before."""
    return None if tensor is None else Matrix(tensor, *tensor.stride()[-2:])


def vector(tensor: Tensor | None) -> Vector | Constant | None:
    """A vector (N,) as an operand; a tensor of one number becomes a constant that is repeated."""
    if tensor is None:
        return None
    return Constant(tensor) if tensor.numel() == 1 else Vector(tensor, tensor.stride(0))


def sums_of(tensor: Tensor | None) -> Vector | None:
    """Contiguous sums (bands, M) or (M,) as an operand; unlike in `vector`, M = 1 makes no constant."""
    return None if tensor is None else Vector(tensor, 1)


def terms_of(given: Terms) -> Terms:
    """`Terms` that hold tensors, as operands. low: (bands, M, P+R); sigma: (bands, M); u, up: contiguous."""
    bias, wc, d, e, _ = map(vector, given.shift)
    return Terms(
        vector(given.a), matrix(given.low), given.u, given.up, vector(given.b), sums_of(given.sigma),
        Shift(bias, wc, d, e),
    )  # fmt: skip


def rank_step(p: int, r: int) -> int:
    """A divisor of both ranks, told to the kernel as a constant: 8, enough for loads of 16 bytes, or 1.

    Ranks with the same divisor share their compiled code.
    """
    return 8 if p % 8 == r % 8 == 0 else 1


def halves(numbers: Numerics) -> bool:
    """Whether fp32 factors are multiplied as bfloat16 halves, which takes registers."""
    return numbers.factor_precision == "halves"


def factor_depth(config: dict[str, int], numbers: Numerics) -> int:
    """The depth of a step of x·downᵀ: at most 64 where factors are split into halves, which takes registers."""
    return min(config["depth"], 64) if halves(numbers) else config["depth"]


def triton_dtype(dtype: torch.dtype) -> Any:
    return named_dtype(str(dtype).removeprefix("torch."))


def vector_stride(tensor: Tensor | None) -> int:
    """The stride with which a kernel reads a vector (N,); 0 repeats a constant (1,)."""
    return 0 if tensor is None or tensor.numel() == 1 else tensor.stride(0)


def pair(up: Tensor | None, down: Tensor | None) -> Pair | None:
    """A low-rank pair as an operand; None where one of its factors is absent."""
    return None if up is None or down is None else Pair(matrix(up), matrix(down))


def can_describe(tensor: Tensor) -> bool:
    """Whether TMA can read a matrix: base and row stride are multiples of 16 bytes, rows contiguous, sizes < 2³¹."""
    return (
        min(tensor.shape) > 0
        and max(tensor.shape) < 2**31
        and tensor.stride(1) == 1
        and tensor.stride(0) * tensor.dtype.itemsize % 16 == 0
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.data_ptr() % 16 == 0
    )


def descriptor(tensor: Tensor, tall: int, wide: int) -> Any:
    """A descriptor of (tall, wide) blocks of a matrix that TMA can read (`can_describe`)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, [rows(tensor), tensor.shape[1]], list(tensor.stride()), [tall, wide])


class Dropout(NamedTuple):
    """The probability of dropping, and the seed of the mask: a number, or a tensor that holds one.

    columns_before: of the mask; where x is a part of the columns of a matrix, those of the matrix before it.
    """

    p: float = 0.0
    seed: Tensor | int | None = None
    columns_before: int = 0

    def arguments(self, dropped: Tensor | None) -> dict[str, Any]:
        """A kernel's dropout arguments, for the input of the factor `dropped`; seed is None where nothing is dropped.

        The seed is a number where the host knows it, else a pointer.
        """
        p = 0.0 if dropped is None else self.p
        seed = None if p == 0.0 else self.key()
        before = self.columns_before if p else 0
        if before % 8:
            raise RuntimeError(
                "the Triton kernels draw a dropout mask for 8 columns at a time: where x is a part of the columns of a "
                f"matrix, a multiple of 8 must come before it, got {before}: use backend('eager')"
            )
        return {
            "seed": seed, "threshold": dropout_threshold(p), "inv_keep": 1.0 / (1.0 - p),
            "columns_before": before or None,
        }  # fmt: skip

    def key(self) -> Tensor | int | None:
        """The seed as a kernel takes it: a number, or a tensor on the device."""
        if not isinstance(self.seed, Tensor):
            return self.seed
        if (recording := recorded()) is not None:
            value = recording.host_value(self.seed)
            return self.seed if value is None else value
        return int(self.seed) if self.seed.device.type == "cpu" else self.seed


NO_DROPOUT = Dropout()


def options(config: dict[str, int], args: dict[str, Any] | None = None) -> dict[str, int]:
    """The compiler's options for a configuration: num_warps, num_stages, maxnreg.

    At least 8 warps share a tile where fp32 factors are split into halves, which takes registers.
    """
    warps = config["num_warps"]
    if args is not None and "NUMERICS" in args and halves(args["NUMERICS"]):
        warps = max(warps, 8)
    cap = {"maxnreg": config["maxnreg"]} if "maxnreg" in config else {}
    return {"num_warps": warps, "num_stages": config["num_stages"], **cap}
