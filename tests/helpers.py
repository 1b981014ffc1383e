"""The truth, the one tolerance, and problems to try them on.

The truth is written here once more, from the equation and in float64, so that it shares no line with the library:

    y = x (W + W∘A + s·B)ᵀ + [ b + b∘D + E + W·C ]

The tolerance (`check`) is `reference.tolerance.judge`, with this truth and eager PyTorch (`reference.glora_linear` and
autograd) in the same dtype beside it. Triton's interpreter (3.7.1) truncates when it casts fp32 to bfloat16 where a GPU
rounds to nearest, which doubles an error: its bfloat16 floor is twice that.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor

import glora_kernels
from glora_kernels import reference
from glora_kernels.ops import glora_linear, glora_wc
from glora_kernels.reference.tolerance import judge, largest_error, unlucky_error
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig

EVERYTHING = os.environ.get("GLORA_KERNELS_TEST_ALL") == "1"
"""Whether what else runs a part of its cases (`thinned`, tests/tools/test_aot.py) runs all of them."""


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="CPU tensors need the interpreter")
NAMES = ("A", "A_up", "A_down", "B", "B_up", "B_down", "bias", "wc", "D", "E")
"""Where the registered operators have which of a problem's tensors."""


def thinned(step: int, cases: Iterable) -> list:
    """One case in `step`, the first among them, where a case takes long (the interpreter, processes) or they are many.

    Of a product of lists each entry of each list is met where `step` has no common divisor with the length of any but
    the first of them. A GPU runs all cases.
    """
    return list(cases)[:: 1 if EVERYTHING or torch.cuda.is_available() else step]


@dataclass
class Problem:
    """The inputs of one call, rounded to the dtype they are used in."""

    config: GLoRAConfig
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    params: dict[str, Tensor]
    dy: Tensor
    seed: Tensor | None = None
    trained: frozenset[str] = field(default_factory=frozenset)

    def leaves(self) -> dict[str, Tensor]:
        found = {"x": self.x, **self.params}
        return found if self.bias is None else {**found, "bias": self.bias}

    def keep(self) -> Tensor | None:
        if self.seed is None or self.config.dropout == 0.0 or self.config.B != "lora":
            return None
        k = self.x.shape[-1]
        rows = self.x.numel() // k if k else 0
        return reference.keep_mask(self.seed, rows, k, self.config.dropout).view(self.x.shape)


def problem(
    config: GLoRAConfig,
    lead: tuple[int, ...] = (37,),
    k: int = 20,
    n: int = 11,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    adapters: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    size: float = 0.3,
    layout: str = "contiguous",
) -> Problem:
    """Random inputs. `size` scales the adapters; layout "strided" makes x, W and dy non-contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype).to(device)

    x, weight, dy = draw(*lead, k), draw(n, k, std=k**-0.5), draw(*lead, n)
    b = draw(n, std=0.5) if bias else None
    shapes = config.parameter_shapes(k, n, bias)
    params = {name: draw(*shape, std=size, dtype=adapters or dtype) for name, shape in shapes.items()}
    if layout == "strided":
        wide = draw(*lead, 2 * k + 1)
        wide[..., 1::2] = x
        x = wide[..., 1::2]
        weight = weight.t().contiguous().t()
        dy = dy.transpose(0, -1).contiguous().transpose(0, -1)
        assert not x.is_contiguous()
    drops = config.dropout > 0.0 and config.B == "lora"
    key = torch.tensor([0x1234_5678_9ABC_DEF + seed], dtype=torch.int64, device=device) if drops else None
    return Problem(config, x, weight, b, params, dy, key, frozenset(["x", "bias", *params]))


def config(
    a: str, b: str, variant: str = "hadamard", cde: str = "vector", rank: int = 3, alpha: float = 5.0,
    dropout: float = 0.0,
) -> GLoRAConfig:  # fmt: skip
    """C, D and E in one form; alpha and dropout where B is lora."""
    return GLoRAConfig.of((a, b, cde, cde, cde), rank=rank, alpha=alpha, dropout=dropout, variant=variant)


def literal(
    x: Tensor, weight: Tensor, bias: Tensor | None, p: dict[str, Tensor], config: GLoRAConfig,
    keep: Tensor | None = None, scale: float | None = None, inv_keep: float | None = None,
) -> Tensor:  # fmt: skip
    """y by the letter, with every dense matrix in place."""
    scale = config.scale if scale is None else scale
    n, k = weight.shape
    low_rank = torch.zeros(n, k, dtype=weight.dtype, device=weight.device)
    effective = weight
    if config.A == "lora" and config.variant == "matmul":
        effective = effective + torch.einsum("nj,jr,rk->nk", weight, p["A_up"], p["A_down"])
    elif config.A == "lora":
        effective = effective + weight * torch.einsum("nr,rk->nk", p["A_up"], p["A_down"])
    elif config.A != "none":
        effective = effective + weight * p["A"].reshape(-1, 1)
    if config.B == "lora":
        low_rank = torch.einsum("nr,rk->nk", p["B_up"], p["B_down"]) * scale
    elif config.B != "none":
        effective = effective + p["B"].reshape(-1, 1).expand(n, k)
    dropped = x if keep is None else x * keep * (1.0 / (1.0 - config.dropout) if inv_keep is None else inv_keep)
    y = torch.einsum("...k,nk->...n", x, effective) + torch.einsum("...k,nk->...n", dropped, low_rank)
    if bias is not None:
        y = y + bias
        if config.D != "none":
            y = y + bias * p["D"]
    if config.E != "none":
        y = y + p["E"]
    if config.C == "lora":
        y = y + torch.einsum("nk,kr,ro->n", weight, p["C_up"], p["C_down"])
    elif config.C == "vector":
        y = y + torch.einsum("nk,k->n", weight, p["C"])
    return y


def _gradients(y: Tensor, dy: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    filled = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted.values(), strict=True))
    return {"y": y.detach(), **dict(zip(wanted, filled, strict=True))}


def truth(p: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every result in float64, and for each element the root sum of squares of its terms.

    All results are multilinear in the inputs, so that the sum of the squared terms is the same formula of the
    squared inputs.
    """
    keep = p.keep()

    def run(power: int) -> dict[str, Tensor]:
        leaves = {name: (t.detach().double() ** power).requires_grad_() for name, t in p.leaves().items()}
        params = {name: leaves[name] for name in p.params}
        scale, inv_keep = p.config.scale**power, (1.0 / (1.0 - p.config.dropout)) ** power
        weight, dy = p.weight.double() ** power, p.dy.double() ** power
        y = literal(leaves["x"], weight, leaves.get("bias"), params, p.config, keep, scale, inv_keep)
        return _gradients(y, dy, leaves)

    return run(1), {name: value.sqrt() for name, value in run(2).items()}


def eager(p: Problem, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """The plain way in the problem's own dtype: a dense W_eff and autograd."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in p.leaves().items()}
    params = {name: leaves[name] for name in p.params}
    with torch.autocast(p.x.device.type, autocast, enabled=autocast is not None):
        y = reference.glora_linear(leaves["x"], p.weight, leaves.get("bias"), params, p.config, p.keep())
        y = y if autocast is None else y.to(autocast)
    return _gradients(y, p.dy.to(y.dtype), leaves)


def ours(p: Problem, route: str = "auto", autocast: torch.dtype | None = None, through: Callable | None = None) -> dict:
    """y and the gradients of the trained leaves through the public operators; None for the others.

    `through` may wrap the function of (x, weight, bias, params) that is called (torch.compile, say).
    """
    leaves = {name: t.detach().requires_grad_(name in p.trained) for name, t in p.leaves().items()}

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, params: dict[str, Tensor], seed: Tensor | None) -> Tensor:
        return layer(x, weight, bias, params, p.config, seed)

    function = call if through is None else through(call)
    with backend(route), torch.autocast(p.x.device.type, autocast, enabled=autocast is not None):
        y = function(leaves["x"], p.weight, leaves.get("bias"), {k: leaves[k] for k in p.params}, p.seed)
    if y.requires_grad:
        y.backward(p.dy.to(y.dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, params: dict[str, Tensor], config: GLoRAConfig,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A GLoRA layer out of the two public operators, as `nn` puts it together."""
    wc = None
    if config.C != "none":
        wc = glora_wc(weight, params.get("C"), c_up=params.get("C_up"), c_down=params.get("C_down"))
    return glora_linear(
        x, weight, bias, a=params.get("A"), a_up=params.get("A_up"), a_down=params.get("A_down"), b=params.get("B"),
        b_up=params.get("B_up"), b_down=params.get("B_down"), wc=wc, d=params.get("D"), e=params.get("E"),
        scale=config.scale, dropout_p=config.dropout if seed is not None else 0.0, seed=seed, variant=config.variant,
    )  # fmt: skip


def check(
    p: Problem,
    got: dict,
    route: str = "",
    autocast: torch.dtype | None = None,
    loosened: dict[str, float] | None = None,
) -> None:
    """Every result of `ours` within the tolerance; gradients exactly where trained, in shape and dtype.

    `loosened` multiplies the bound of a result whose documented promise is a weaker one.
    """
    values, scales = truth(p)
    plain = eager(p, autocast)
    dtype = autocast or p.x.dtype
    truncates = route == "triton" and p.x.device.type == "cpu" and dtype == torch.bfloat16
    eps = torch.finfo(dtype).eps * (2 if truncates else 1)
    faults = []
    for name, value in got.items():
        if name != "y":
            leaf = p.leaves()[name]
            assert (value is not None) == (name in p.trained), f"gradient of {name}: {value}"
            if value is None:
                continue
            assert value.shape == leaf.shape, f"{name}: {value.shape} for {leaf.shape}"
            assert value.dtype == leaf.dtype, f"{name}: {value.dtype} for {leaf.dtype}"
        if value.numel() == 0:
            continue
        assert value.isfinite().all(), f"{name} is not finite ({p.config})"
        judged = judge(value, values[name], plain[name], scales[name], eps, partial(_unlucky, p, name, autocast))
        for norm, error, allowed in judged:
            bound = allowed * (loosened or {}).get(name, 1.0)
            if not error <= bound:
                faults.append(f"{name} ({norm}): error {error:.3e} over {bound:.3e}")
    assert not faults, f"{p.config} {route}: " + "; ".join(faults)


def exact(p: Problem, got: dict, tolerance: float = 1e-12) -> None:
    """y and the gradients of what is trained are the truth but for rounding in float64; there are no others."""
    for name, value in truth(p)[0].items():
        if name == "y" or name in p.trained:
            assert got[name] is not None, (p.config, name)
            assert got[name].shape == value.shape, (p.config, name)
            assert torch.allclose(got[name], value, rtol=tolerance, atol=tolerance), (p.config, name)
        else:
            assert got[name] is None, (p.config, name)


def close(got: dict, expected: dict, tolerance: float = 1e-12) -> None:
    """The same results are there, and alike."""
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        assert value is None or torch.allclose(got[name], value, rtol=tolerance, atol=tolerance), name


def compiled(compiler: str | Callable, dynamic: bool = False) -> Callable:
    """For `ours`: calls go through torch.compile without a break."""
    return lambda call: torch.compile(call, backend=compiler, fullgraph=True, dynamic=dynamic)


def _unlucky(p: Problem, name: str, autocast: torch.dtype | None) -> float:
    """The largest eager error of one tensor over draws of the signs of dy."""

    def of_eager(dy: Tensor) -> float:
        drawn = replace(p, dy=dy)
        return largest_error(eager(drawn, autocast)[name], truth(drawn)[0][name])

    return unlucky_error(p.dy, of_eager)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, `torch.empty` and its kin are filled with NaN: what reads memory nobody wrote shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def warmup(model: torch.nn.Module, *args: object, **kwargs: object) -> list[str]:
    """`glora_kernels.warmup` of the interpreted kernels, without a bar."""
    with backend("triton"):
        return glora_kernels.warmup(model, *args, progress=False, **kwargs)


def interrupted(act: Callable[[], object], line: int) -> bool:
    """Call `act`; KeyboardInterrupt is raised at that line of the package's. Whether there was one."""
    root = str(Path(glora_kernels.__file__).parent)
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        nonlocal count
        if not frame.f_code.co_filename.startswith(root):
            return None
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before, grad = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        # Python may raise between the last line of `with torch.no_grad():` and its end, which then never comes.
        torch.set_grad_enabled(grad)
    return False


def same(left: dict, right: dict) -> bool:
    """Whether two results are equal bit for bit."""
    return left.keys() == right.keys() and all(
        (a is None and b is None) or torch.equal(a, b) for a, b in ((left[k], right[k]) for k in left)
    )


def train_only(p: Problem, names: Iterable[str]) -> Problem:
    return replace(p, trained=frozenset(names))
