"""dA of a vector or constant A, whose y may hold little of Z: the bound of `glora.recover`, where it is hard.

For each row n of the weight, with u the unit roundoff, c the roundings of y and Z = xWᵀ in float64:

    |error of dA[n]| ≤ 1.5·c·u·Σₘ |dy∘Z| + what the accumulation of sums costs

The last is taken from dA computed from Z in the same dtype.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from glora_kernels.glora import recover
from glora_kernels.ops import glora_linear
from glora_kernels.quant import dequantize, quantize_weight

K, N = 64, 32
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=["fp64", "fp32", "bf16", "fp16"]
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(name: str, length: int = 16) -> dict[str, Tensor]:
    """Inputs in float64: x (sequences, length, K), dy, a and what else is in y."""
    x, dy = draw(256 // length, length, K, seed=1), draw(256 // length, length, N, seed=2)
    found = {"x": x, "dy": dy, "a": 0.1 * draw(N, seed=3), "bias": 0.3 * draw(N, seed=4)}
    hundreds = 100 * (2 * torch.rand(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 1)
    kind, _, place = name.partition("@")
    if kind == "sinks":  # one token of every sequence is large and has little gradient
        at = {"first": 0, "third": 2, "last": length - 1}[place]
        x[:, at] *= 100
        dy[:, at] /= 100
        found["bias"] = hundreds
    elif kind == "hundreds":
        found["bias"] = hundreds
    elif kind == "near zero":
        found["a"] = torch.tensor([-1.0, -1 + 2.0**-9, -1 + 2.0**-11, -0.99] * (N // 4), dtype=torch.float64)
    elif kind == "one row":
        x[0, 0] *= 100
        dy[0, 0] /= 1000
        found["bias"] = hundreds / 10
    elif kind == "one small row":
        x[0, 0] /= 1000
        dy[0, 0] *= 300
    elif kind == "tiny z":
        x[1:] /= 1000
        dy[1:] *= 30
    elif kind == "aligned":
        x.abs_()
        dy.abs_()
        found["bias"] = torch.full_like(found["bias"], 257.0 / 3)
    elif kind == "large a":
        found["a"], found["bias"] = torch.full_like(found["a"], 300.0), 3 * hundreds
    elif kind == "cancelling":  # the bias and a low-rank or constant B that take it away again
        x[..., 0] = 1
        found |= {"b_up": 100 * draw(N, 2, seed=6), "b_down": torch.zeros(2, K, dtype=torch.float64)}
        found["b_down"][:, 0] = 1
        found["bias"] = -found["b_up"].sum(1)
    elif kind == "constant b":
        found["b"] = 20 * draw(1, seed=6)
    return found


CASES = [*(f"sinks@{place}" for place in ("first", "third", "last")), "hundreds", "near zero", "one row",
         "one small row", "tiny z", "aligned", "large a", "cancelling", "constant b", "plain"]  # fmt: skip


def errors(given: dict[str, Tensor], dtype: torch.dtype, four_bit: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """|error of dA|, of dA from Z in the same dtype, and Σₘ|dy∘Z|; each (N,), or (1,) of a constant."""
    of = {name: tensor.to(dtype) for name, tensor in given.items()}
    dense = (draw(N, K, seed=7) / 8).to(dtype)
    weight = dense
    if four_bit:
        weight = quantize_weight(dense.to(torch.float32 if dtype == torch.float64 else dtype), "nf4", 64, True)
        dense = dequantize(weight, dtype)
    a, dy = of.pop("a").clone().requires_grad_(), of.pop("dy")
    glora_linear(of.pop("x"), weight, **of, a=a).backward(dy)
    x, dims = given["x"].to(dtype), (0, 1) if len(a) > 1 else (0, 1, 2)
    terms = dy.double() * linear(x.double(), dense.double())
    from_z = (dy.to(torch.promote_types(dtype, torch.float32)) * linear(x, dense)).sum(dims)
    truth = terms.sum(dims)
    return (a.grad.double() - truth).abs(), (from_z.double() - truth).abs(), terms.abs().sum(dims)


def within(given: dict[str, Tensor], dtype: torch.dtype, four_bit: bool = False) -> None:
    error, from_z, size = errors(given, dtype, four_bit)
    u, roundings = torch.finfo(dtype).eps / 2, 3 if dtype.itemsize == 2 else 2
    # A 16-bit gradient is itself rounded once.
    rounded = u * size if dtype.itemsize == 2 else 0.0
    slack = 2 * from_z.max() + 1e-15 * size
    assert (error <= 1.5 * roundings * u * size + rounded + slack).all(), (error / size / u).max()
    # In the root mean square a bound of random roundings: never that of the worst case.
    assert error.square().mean().sqrt() <= 4 * from_z.square().mean().sqrt() + 0.5 * u * size.max()


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_the_bound(name, dtype):
    given = case(name)
    within(given, dtype)
    within(given, dtype, four_bit=True)
    if name not in ("near zero", "large a"):
        within(given | {"a": given["a"][:1]}, dtype)


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_a_small_layer_takes_da_from_x(name, dtype, monkeypatch):
    monkeypatch.setattr(recover, "SMALL", 256 * N * K)
    monkeypatch.setattr(recover, "_from_y", None)
    given = case(name)
    within(given, dtype)
    within(given | {"a": given["a"][:1]}, dtype)
    monkeypatch.setattr(recover, "SMALL", 256 * N * K - 1)
    with pytest.raises(TypeError, match="not callable"):
        within(given, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 4, 8, 32, 64, 128, 256])
def test_sinks_at_any_length(length, dtype):
    within(case("sinks@first", length), dtype)
    within(case("sinks@last", length), dtype)


@pytest.mark.parametrize("beside", [{}, {"b": 0.1 * draw(N, seed=6)}], ids=["bias", "bias and b"])
def test_no_rounding_is_the_same_in_all_rows(beside):
    """Gradients of one sign and many rows: a rounding of the bias would add up, where those of y average out."""
    given = case("plain") | {"x": draw(8, 1024, K, seed=1), "dy": 1 + 0.1 * draw(8, 1024, N, seed=2).abs()}
    error, from_z, _ = errors(given | {"bias": draw(N, seed=4), **beside}, torch.float32)
    assert error.square().mean() <= 4 * from_z.square().mean()


def test_an_overflow_of_y_does_not_reach_da():
    """y overflows where dy is zero: from Z the product is 0, from y it would be no number."""
    given = case("plain")
    given["bias"][3] = 65504.0
    given["x"][0, 0] = 200.0 * (draw(N, K, seed=7)[3]).sign()
    given["dy"][0, 0] = 0.0
    error, _, _ = errors(given, torch.float16)
    assert error.isfinite().all()
    assert error[3] < 1.0
