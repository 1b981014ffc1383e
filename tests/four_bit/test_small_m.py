"""The product of few tokens over a 4-bit weight against float64 on the dequantized one: interpreted, or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from glora_kernels.four_bit import small_m
from glora_kernels.four_bit.served import why_not
from glora_kernels.four_bit.small_m import Launches, h_before, small_m_launch
from glora_kernels.operands import Shift, Terms
from glora_kernels.quant import QuantizedWeight, dequantize, quantize_weight
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime import configs
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Launch
from glora_kernels.runtime.planning import arch_of

pytestmark = pytest.mark.usefixtures("poison")

VECTORS = ("a", "b", "bias", "wc", "d", "e")
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@dataclass
class Call:
    """x, a weight in 4 bits and the terms of one call, rounded to the dtype they are used in."""

    x: Tensor
    weight: QuantizedWeight
    terms: dict[str, Tensor]
    scale: float = 1.7

    def literal(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """y, h and σ by the letter, in a dtype; W has been rounded to x's first."""
        w, x = dequantize(self.weight, self.x.dtype).to(dtype), self.x.to(dtype)
        t = {name: value.to(dtype) for name, value in self.terms.items()}
        found = {"sigma": x.sum(1)}
        y = x @ w.T
        if "a" in t:
            y = y * (1 + t["a"])
        if "b_down" in t:
            found["h"] = self.scale * (x @ t["b_down"].T)
            y = y + found["h"] @ t["b_up"].T
        if "b" in t:
            y = y + found["sigma"][:, None] * t["b"]
        if "bias" in t:
            y = y + t["bias"] * (1 + t.get("d", torch.zeros((), dtype=dtype, device=x.device)))
        return found | {"y": y + t.get("e", 0) + t.get("wc", 0)}

    def launch(self, y: Tensor, **outputs: Tensor) -> Launch | Launches:
        return small_m_launch(
            self.x, self.weight, y, added(self.terms), b_down=self.terms.get("b_down"), **outputs, scale=self.scale,
            arch=arch_of(self.x),
        )  # fmt: skip

    def check(self, y: Tensor | None = None, outputs: bool = True) -> None:
        """y, and h and σ where there is something to store, no worse than twice plain PyTorch and a floor."""
        m, dtype, device = self.x.shape[0], self.x.dtype, self.x.device
        got = {"y": torch.empty(m, self.weight.shape[0], dtype=dtype, device=device) if y is None else y}
        if outputs:
            got["sigma"] = torch.empty(m, device=device)
            if "b_down" in self.terms:
                got["h"] = torch.empty(m, self.terms["b_down"].shape[0], dtype=dtype, device=device)
        self.launch(**got).run()
        truth, plain = self.literal(torch.float64), self.literal(dtype)
        plain["sigma"] = self.x.float().sum(1)  # stored in fp32, whatever x is
        for name, value in got.items():
            error, allowed = largest_error(value, truth[name]), allowed_error(truth[name], plain[name], value.dtype)
            assert error <= allowed, f"{name}: {error:.3e} over {allowed:.3e}"


def added(terms: dict[str, Tensor]) -> Terms:
    shift = Shift(*(terms.get(name) for name in Shift._fields))
    return Terms(a=terms.get("a"), up=terms.get("b_up"), b=terms.get("b"), shift=shift)


def call(
    m: int, n: int = 45, k: int = 192, rank: int = 0, terms: tuple[str, ...] = (), *, dtype: torch.dtype = SINGLE,
    quant_type: str = "nf4", blocksize: int = 64, nested: bool = False, adapters: torch.dtype | None = None,
    device: str = "cpu",
) -> Call:  # fmt: skip
    generator = torch.Generator().manual_seed(7 * m + n + rank)

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(device, dtype)

    weight = quantize_weight(draw(n, k, std=k**-0.5), quant_type, blocksize, nested)
    found = {name: draw(n, std=0.5, dtype=SINGLE if name == "wc" else adapters or dtype) for name in terms}
    if rank:
        found |= {"b_up": draw(n, rank, std=0.3, dtype=adapters or dtype)}
        found |= {"b_down": draw(rank, k, std=k**-0.5, dtype=adapters or dtype)}
    return Call(draw(m, k), weight, found)


@pytest.mark.parametrize("m", [1, 3, 17, 64])
@pytest.mark.parametrize(("dtype", "quant_type", "blocksize", "nested", "rank"), [
    (SINGLE, "nf4", 64, False, 3), (HALF, "nf4", 32, True, 16), (BRAIN, "fp4", 64, True, 1),
])  # fmt: skip
def test_every_term_together(m, dtype, quant_type, blocksize, nested, rank, device):
    call(
        m, rank=rank, terms=VECTORS, dtype=dtype, quant_type=quant_type, blocksize=blocksize, nested=nested,
        device=device,
    ).check()  # fmt: skip


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("terms", [(), *((name,) for name in VECTORS if name != "d"), ("bias", "d"), ("low rank",)])
def test_every_term_alone(m, terms, device):
    """A term that is absent is not read: its pointer is None. h and σ are made for y where nobody stores them."""
    rank = 5 if terms == ("low rank",) else 0
    call(m, k=128, rank=rank, terms=() if rank else terms, device=device).check(outputs=False)


@pytest.mark.parametrize("m", [1, 3])
def test_constants_strides_and_wider_adapters(m, device):
    """(1,) in the place of (N,); rows of x and y, and factors, that do not lie side by side; fp32 over 16 bits."""
    p = call(m, rank=3, terms=VECTORS, dtype=HALF, adapters=SINGLE, device=device)
    p.terms |= {name: p.terms[name][:1] for name in ("a", "b", "d", "e")}
    p.terms["b_down"] = p.terms["b_down"].t().contiguous().t()
    rows = torch.empty(m, 256, dtype=HALF, device=device)
    rows[:, :192] = p.x
    p.x = rows[:, :192]
    p.check(torch.empty(45, 2 * m, dtype=HALF, device=device).t()[::2])


@pytest.mark.parametrize(("m", "blocksize", "k"), [(1, 128, 384), (2, 128, 384), (2, 2048, 4096)])
def test_blocks_longer_than_a_step(m, blocksize, k, device):
    call(m, n=3, k=k, blocksize=blocksize, device=device).check(outputs=False)


@pytest.mark.parametrize("m", [1, 17])
def test_equals_dequantize_then_product(m, device):
    """x with a single 3: y is three times a column of the dequantized weight, which was rounded first, bit for bit."""
    for dtype, nested in ((HALF, True), (BRAIN, False), (SINGLE, True)):
        p = call(m, k=128, dtype=dtype, nested=nested, device=device)
        p.x.zero_()
        hot = [(37 * i) % 128 for i in range(m)]
        p.x[range(m), hot] = 3
        y = torch.empty(m, 45, dtype=dtype, device=device)
        p.launch(y).run()
        assert torch.equal(y, (3 * dequantize(p.weight, dtype)[:, hot].T.float()).to(dtype))


@pytest.mark.parametrize("m", [1, 3])
def test_h_made_before(m, device, monkeypatch):
    """Two launches give what one gives."""
    p = call(m, rank=16, terms=VECTORS, dtype=HALF, device=device)
    monkeypatch.setattr(small_m, "h_before", lambda shape, cols: True)
    h, y = torch.empty(m, 16, dtype=HALF, device=device), torch.empty(m, 45, dtype=HALF, device=device)
    assert [step.kernel.__name__ for step in p.launch(y, h=h).steps] == ["_small_h_kernel", "_small_m_kernel"]
    assert isinstance(p.launch(y), Launch), "without memory for h it is made inside"
    p.check()


def test_where_h_is_made():
    """By bytes on an H100 at rank 16 of LLaMA-3-8B: inside, but for down_proj; before at rank 64."""
    where = {}
    for name, (n, k) in {"gate": (14336, 4096), "down": (4096, 14336), "q": (4096, 4096), "k": (1024, 4096)}.items():
        for r in (16, 64):
            shape = Shape(1, n, k, r)
            where[name, r] = h_before(shape, configs.default("small_m", "sm_90", BRAIN, shape)["cols"])
    assert {name for (name, r), before in where.items() if before and r == 16} == {"down"}
    assert {name for (name, r), before in where.items() if before and r == 64} >= {"gate", "down", "q"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_configurations_fill_the_card(arch):
    for m in (1, 2, 16, 17, 64):
        for n in (1024, 4096, 14336):
            for r in (0, 16, 64):
                config = configs.default("small_m", arch, BRAIN, Shape(m, n, 4096, r))
                assert configs.tokens(m) >= m
                assert configs.tokens(m) == 1 or configs.tokens(m) % 16 == 0
                assert config["cols"] * config["depth"] <= configs.DECODED
                assert config["depth"] % 32 == 0, "whole runs of bytes under one absmax"
                assert config["cols"] == 16 or -(-n // config["cols"]) >= 0.9 * configs.programs(arch)


def test_what_is_not_served_is_named():
    p = call(3, k=128)
    ragged = quantize_weight(torch.randn(6, 96), "nf4", 64)
    odd = replace(p.weight, packed=torch.empty(45 * 64 + 1, dtype=torch.uint8)[1:])
    wide = torch.zeros(3, 136)
    for x, weight, rank, words in [
        (torch.zeros(65, 128), p.weight, 0, "1 to 64 tokens, got 65"),
        (torch.zeros(0, 128), p.weight, 0, "1 to 64 tokens, got 0"),
        (p.x, p.weight, 33, "ranks up to 32, got 33"),
        (p.x.half(), p.weight, 65, "ranks up to 64, got 65"),
        (p.x.double(), p.weight, 0, "got torch.float64"),
        (torch.zeros(3, 96), p.weight, 0, "x has 96 columns"),
        (torch.zeros(3, 96), ragged, 0, "K = 96 is no multiple of the block size 64"),
        (p.x, odd, 0, "the packed weight does not begin"),
        (torch.zeros(128, 3).t(), p.weight, 0, "must be neighbours"),
        (wide[:, 1:129], p.weight, 0, "rows of x must begin"),
        (torch.zeros(3, 129)[:, :128], p.weight, 0, "rows of x must begin"),
    ]:
        reason = why_not("triton", x, weight, rank)
        assert reason is not None
        assert words in reason, reason
    assert why_not("triton", p.x.half(), p.weight, 64) is None
    assert why_not("triton", torch.zeros(1, 129)[:, :128], p.weight) is None, "one row has no row after it"


def test_a_refused_call_writes_nothing():
    p = call(3, k=128, rank=2)
    y = torch.full((3, 45), 7.0)
    up, down = p.terms["b_up"], p.terms["b_down"]
    for terms, given, words in [
        (Terms(up=up), {}, "come together"), (Terms(), {"h": torch.empty(3, 2)}, "no b_down"),
        (Terms(up=up.t().contiguous().t()), {"b_down": down}, "up must be contiguous"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            small_m_launch(p.x, p.weight, y, terms, **given, arch="cpu")
    with pytest.raises(ValueError, match="does not serve this call: it takes 1 to 64 tokens, got 65"):
        small_m_launch(torch.zeros(65, 128), p.weight, y, Terms(up=up), b_down=down, arch="cpu")
    assert (y == 7).all()
