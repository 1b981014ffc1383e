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
    """One kernel launch. `args` holds every argument by name; `options` num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Launch on the current stream of the device of the arguments; nothing for an empty grid.

        Inside `planning` it is noted instead.
        """
        if 0 in self.grid:
            return
        if note(self):
            return
        device = next(_tensors(tuple(self.args.values()))).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.kernel[self.grid](**self.args, **self.options)
        else:
            self.kernel[self.grid](**self.args, **self.options)

    def compiled(self) -> Any:
        """What Triton's JIT compiles for this launch, without launching: on the card that is current.

        Raises:
            AssertionError: an argument follows M, and the code that is compiled would depend on its value.
        """
        for param in self.kernel.params:
            if not param.do_not_specialize and _is_compiled_in(self.args[param.name], param.is_constexpr):
                raise AssertionError(f"{param.name} of {self.kernel.__name__} follows M and is compiled in")
        args = {name: _mapped(value, lambda tensor: tensor, int) for name, value in self.args.items()}
        found = self.kernel.run(grid=self.grid, warmup=True, **args, **self.options)
        return found.result() if hasattr(found, "result") else found  # of a compilation in the background

    def bound(self, call: Bound) -> Launch:
        """A recorded launch with the tensors and numbers of a call."""

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
    """An argument with its tensors, its integers and its tensor descriptors replaced."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, tuple):
        parts = [_mapped(part, tensor, number, descriptor) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, int) and not isinstance(value, bool):
        return number(value)
    return descriptor(value) if hasattr(value, "block_shape") else value


def _is_compiled_in(value: Any, constant: bool) -> bool:
    """Whether code depends on a number that follows M: as a constant, or because Triton looks whether 16 divides it."""
    if isinstance(value, tuple):
        return any(_is_compiled_in(part, constant) for part in value)
    return isinstance(value, Rows) and (constant or value.multiple < 16)


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among arguments and in their structures; of a descriptor, the one that it describes."""
    for value in values:
        base = getattr(value, "base", value)
        if isinstance(base, Tensor):
            yield base
        elif isinstance(value, tuple):
            yield from _tensors(value)


@dataclass(frozen=True)
class LibraryProduct:
    """A product left·right of the vendor's library, added to `out` where `accumulates`: a step beside our launches."""

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
        """A recorded product with the tensors of a call."""
        left, right, out = map(call.view, (self.left, self.right, self.out))
        return LibraryProduct(left, right, out, self.accumulates)

    def __str__(self) -> str:
        (m, k), n = self.left.shape, self.right.shape[1]
        return f"library product {m}x{n}x{k}{', added' if self.accumulates else ''}"


def precision(dtype: torch.dtype) -> str:
    """How products of a dtype are taken: fp32 exactly, unless PyTorch itself may use TF32."""
    return "tf32" if dtype == torch.float32 and environment.allow_tf32() else "ieee"


def numerics(dtype: torch.dtype, *factors: Tensor | torch.dtype | None) -> Numerics:
    """How a kernel multiplies in a computation in `dtype`: its products, and the `factors` with what they meet.

    Factors are multiplied in fp32 where one is wider than 16 bits. Beside 16 bits that is taken as halves in bfloat16
    (`tile.dot`): two or three products of the matrix unit where TF32 would take three at half of the speed.
    """
    dtypes = (t.dtype if isinstance(t, Tensor) else t for t in factors)
    widens = dtype.itemsize == 2 and any(t is not None and t.itemsize > 2 for t in dtypes)
    own = str(dtype).removeprefix("torch."), precision(dtype)
    return Numerics(*own, *(("float32", "halves") if widens else own), environment.interpreting())


def matrix(tensor: Tensor | None) -> Matrix | None:
    """A matrix as an operand, or several bands (bands, M, C) of one, of which the next begins after M rows."""
    return None if tensor is None else Matrix(tensor, *tensor.stride()[-2:])


def vector(tensor: Tensor | None) -> Vector | Constant | None:
    """A vector (N,) as an operand; of a single number, a constant to be repeated."""
    if tensor is None:
        return None
    return Constant(tensor) if tensor.numel() == 1 else Vector(tensor, tensor.stride(0))


def sums_of(tensor: Tensor | None) -> Vector | None:
    """A vector of sums (bands, M) or (M,), contiguous, as an operand; its M may be 1."""
    return None if tensor is None else Vector(tensor, 1)


def terms_of(given: Terms) -> Terms:
    """Terms of tensors as operands: low (bands, M, P+R), sigma (bands, M); u, up contiguous; the rest as in `Terms`."""
    bias, wc, d, e, _ = map(vector, given.shift)
    return Terms(
        vector(given.a), matrix(given.low), given.u, given.up, vector(given.b), sums_of(given.sigma),
        Shift(bias, wc, d, e),
    )  # fmt: skip


def rank_step(p: int, r: int) -> int:
    """What the ranks are multiples of, as a kernel is told: enough for 16 bytes at a time, or nothing.

    Ranks that share it share what is compiled.
    """
    return 8 if p % 8 == r % 8 == 0 else 1


def halves(numbers: Numerics) -> bool:
    """Whether fp32 factors are multiplied beside 16 bits, which takes registers."""
    return numbers.factor_precision == "halves"


def factor_depth(config: dict[str, int], numbers: Numerics) -> int:
    """The depth of a step of x·downᵀ: of halves, which take registers, no more than 64."""
    return min(config["depth"], 64) if halves(numbers) else config["depth"]


def triton_dtype(dtype: torch.dtype) -> Any:
    return named_dtype(str(dtype).removeprefix("torch."))


def vector_stride(tensor: Tensor | None) -> int:
    """The stride that reads a vector (N,), or repeats a constant (1,)."""
    return 0 if tensor is None or tensor.numel() == 1 else tensor.stride(0)


def pair(up: Tensor | None, down: Tensor | None) -> Pair | None:
    """A low-rank pair as a kernel reads it; None without one."""
    return None if up is None or down is None else Pair(matrix(up), matrix(down))


def can_describe(tensor: Tensor) -> bool:
    """Whether TMA can read a matrix: base and row stride are multiples of 16 bytes, rows contiguous, sizes 32 bits."""
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
    """The probability, and the key of the mask: a number, or a tensor of one."""

    p: float = 0.0
    seed: Tensor | int | None = None

    def arguments(self, dropped: Tensor | None) -> dict[str, Any]:
        """Those of a kernel that drops the input of the factor `dropped`: seed (None: it does not) and so on.

        The key is a number where it is known on the host, else a pointer.
        """
        p = 0.0 if dropped is None else self.p
        seed = None if p == 0.0 else self.key()
        return {"seed": seed, "threshold": dropout_threshold(p), "inv_keep": 1.0 / (1.0 - p)}

    def key(self) -> Tensor | int | None:
        """The key as a kernel takes it."""
        if not isinstance(self.seed, Tensor):
            return self.seed
        if (recording := recorded()) is not None:
            value = recording.host_value(self.seed)
            return self.seed if value is None else value
        return int(self.seed) if self.seed.device.type == "cpu" else self.seed


NO_DROPOUT = Dropout()


def options(config: dict[str, int], args: dict[str, Any] | None = None) -> dict[str, int]:
    """The compiler's options of a configuration.

    Halves of fp32 factors take registers: beside them, more warps share a tile.
    """
    warps = config["num_warps"]
    if args is not None and "NUMERICS" in args and halves(args["NUMERICS"]):
        warps = max(warps, 8)
    cap = {"maxnreg": config["maxnreg"]} if "maxnreg" in config else {}
    return {"num_warps": warps, "num_stages": config["num_stages"], **cap}
