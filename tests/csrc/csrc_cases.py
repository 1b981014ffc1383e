"""Calls of both kernels and their literal results in float64, for the host and for a card."""

from __future__ import annotations

import math

import torch

from glora_kernels.four_bit import cuda
from glora_kernels.operands import Shift, Terms
from glora_kernels.quant import dequantize, quantize_weight
from glora_kernels.reference.random import round_dithered


def small_m_launch(x, weight, y, arch, a=None, b=None, b_up=None, bias=None, wc=None, d=None, e=None, **given):
    """`four_bit.cuda.small_m_launch` of terms by name."""
    return cuda.small_m_launch(x, weight, y, Terms(a=a, b=b, up=b_up, shift=Shift(bias, wc, d, e)), arch=arch, **given)


SMALL_M = [  # m, n, k, rank, terms, dtype of x, quant type, block size, nested
    (1, 40, 96, 0, False, torch.bfloat16, "nf4", 32, False),
    (1, 40, 1056, 16, True, torch.bfloat16, "nf4", 32, True),
    (2, 33, 2048, 64, True, torch.float16, "fp4", 2048, False),
    (3, 70, 2080, 0, True, torch.float16, "nf4", 32, False),
    (8, 40, 96, 1, False, torch.bfloat16, "fp4", 32, True),
    (13, 70, 320, 16, True, torch.bfloat16, "nf4", 64, False),
    (33, 70, 640, 3, True, torch.float16, "nf4", 128, True),
    (64, 100, 256, 64, True, torch.bfloat16, "nf4", 256, False),
]
DEQUANTIZE = [  # n, k, rank, terms of both kinds, quant type, block size, nested
    (3, 7, 0, False, "nf4", 32, False),
    (37, 70, 0, False, "fp4", 64, True),
    (40, 528, 0, False, "nf4", 128, False),
    (33, 71, 0, True, "nf4", 64, False),
    (37, 70, 3, False, "nf4", 32, False),
    (40, 528, 17, False, "fp4", 64, True),
]


def random(generator, *shape, size=1.0):
    return torch.randn(shape, generator=generator) * size


def small_m_call(m, n, k, rank, terms, dtype, quant_type, blocksize, nested, device):
    """(x, weight, y, keyword arguments, truth of every output by name)."""
    g = torch.Generator().manual_seed(m + n + k)
    weight = quantize_weight(random(g, n, k, size=0.05).to(device), quant_type, blocksize, nested)
    x = random(g, m, k).to(dtype)
    given: dict = {}
    if rank:
        given |= {"b_up": random(g, rank, n, size=0.1).T.to(dtype), "b_down": random(g, rank, k, size=0.1).to(dtype)}
    if terms:
        given |= {"a": random(g, n, size=0.1), "b": random(g, n, size=0.1).to(dtype), "bias": random(g, n).to(dtype)}
        given |= {"wc": random(g, n), "d": random(g, n), "e": random(g, 1)}
    exact = {name: value.double() for name, value in given.items()}
    # Tensor cores take w rounded to x's dtype, the path without them as it is.
    w = dequantize(weight, torch.float32 if m <= cuda.GEMV_TOKENS else dtype).cpu().double()
    truth, z = {}, x.double() @ w.T
    y = z * (1 + exact.get("a", 0.0))
    given = {name: value.to(device) for name, value in given.items()}
    if rank:
        truth["h"] = 0.5 * x.double() @ exact["b_down"].T
        y = y + truth["h"] @ exact["b_up"].T
        given |= {"scale": 0.5, "h": torch.full((m, rank), math.nan, dtype=dtype, device=device)}
    if terms:
        truth["sigma"] = x.double().sum(1)
        y = y + truth["sigma"][:, None] * exact["b"] + exact["bias"] * (1 + exact["d"]) + exact["e"] + exact["wc"]
        given |= {"sigma": torch.full((m,), math.nan, device=device)}
    truth["y"] = y
    return x.to(device), weight, torch.full((m, n), math.nan, dtype=dtype, device=device), given, truth


def check_small_m(y, given, truth, k):
    """One rounding of an fp32 sum: half an eps of each value, and the fp32 sum's error in the largest."""
    for name, true in truth.items():
        value = y if name == "y" else given[name]
        allowed = torch.finfo(value.dtype).eps * true.abs() + k * torch.finfo(torch.float32).eps * true.abs().max()
        assert bool(((value.cpu().double() - true).abs() <= allowed).all()), name


def dequantize_call(n, k, rank, terms, quant_type, blocksize, nested, dtype, device, quantized_from=torch.float32):
    """(weight, out, keyword arguments, what comes out: of the terms, before the rounding)."""
    g = torch.Generator().manual_seed(n + k)
    dense = random(g, n, k, size=0.05).to(device, quantized_from)
    weight = quantize_weight(dense, quant_type, blocksize, nested)
    given: dict = {}
    if rank:
        given = {"a_up": random(g, rank, n, size=0.1).T, "a_down": random(g, rank, k).to(torch.bfloat16)}
        given |= {"b_up": random(g, n, rank, size=0.01), "b_down": random(g, k, rank, size=0.1).T.half()}
    if terms:
        given = {"a": random(g, n, size=0.1).half(), "b": random(g, 1, size=0.01)}
    exact = {name: value.double() for name, value in given.items()}
    w = dequantize(weight, dtype).cpu().double()
    if rank:
        w = w + w * (exact["a_up"] @ exact["a_down"]) + 0.5 * exact["b_up"] @ exact["b_down"]
        given["scale"] = 0.5
    if terms:
        w = w + w * exact["a"][:, None] + exact["b"]
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    return weight, torch.full((n, k), math.nan, dtype=dtype, device=device), given, w


def check_dequantize(weight, out, given, truth):
    """Bit for bit the decode without terms; with them the same dither, of an fp32 sum in another order."""
    if not given:
        assert torch.equal(out, dequantize(weight, out.dtype))
        return
    out = out.cpu()
    eps, single = torch.finfo(out.dtype).eps, torch.finfo(torch.float32).eps
    allowed = (eps if out.dtype != torch.float32 else 0.0) * truth.abs() + 64 * single * truth.abs().max()
    assert bool(((out.double() - truth).abs() <= allowed).all())
    if out.dtype != torch.float32:
        # A sum that differs in its last bit is dithered elsewhere once in thousands.
        assert float((out != round_dithered(truth.float(), out.dtype)).double().mean()) < 0.01
