"""The kernels over a 4-bit weight: against bitsandbytes, float64, and the same kernels over the dense weight."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glora_kernels import quant
from glora_kernels.glora.call import C
from glora_kernels.quant import QuantizedWeight, QuantState, quantize_weight
from glora_kernels.quant.bnb import from_state
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.planning import arch_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def kernels():
    """The launchers, imported after conftest has chosen between the interpreter and the card."""
    from glora_kernels.four_bit import dequantize
    from glora_kernels.glora import weight

    return dequantize, weight


def draw(*shape: int, seed: int = 0, std: float = 1.0, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * std).to(dtype).to(device)


def quantized(
    n: int, k: int, device: str, quant_type: str = "nf4", nested: bool = True, dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:  # fmt: skip
    """Of a bfloat16 weight, which rounds it before any other dtype does."""
    return quantize_weight(draw(n, k, std=k**-0.5, dtype=dtype, device=device), quant_type, 64, nested)


def dense(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return quant.dequantize(weight, dtype)


@pytest.mark.parametrize(("quant_type", "blocksize", "nested", "n", "k"), [
    ("nf4", 64, True, 130, 128),   # more than one block of nested absmax
    ("nf4", 32, False, 7, 33),     # an odd number of codes: the last byte holds one
    ("fp4", 64, True, 33, 129),    # rows that begin within a byte
    ("fp4", 4096, False, 3, 1400),  # a last block that is not full
    ("nf4", 128, True, 1, 1),
])  # fmt: skip
def test_dequantize_equals_bitsandbytes(quant_type, blocksize, nested, n, k, device, kernels):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        draw(n, k, device=device), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    weight = from_state(packed, state)
    for dtype in DTYPES:
        state.dtype = dtype
        with torch.compiler.set_stance("force_eager"):  # on a CPU it would compile itself, for seconds a shape
            expected = functional.dequantize_4bit(packed, state)
        memory = torch.full((n * k + 8,), 7.0, dtype=dtype, device=device)
        out = memory[: n * k].view(n, k)
        kernels[0].dequantize_launch(weight, out, arch=arch_of(out)).run()
        assert torch.equal(out, expected), dtype
        assert memory[n * k :].eq(7.0).all(), "written beyond the weight"


@pytest.mark.parametrize("shift", [0, 1])
def test_words_are_read_only_where_aligned(shift, device, kernels):
    """A packed weight that starts off 4 bytes is read by bytes, to the same bits, also tile by tile."""
    weight = quantized(20, 72, device)
    memory = torch.zeros(weight.packed.numel() + 4, dtype=torch.uint8, device=device)
    packed = memory[shift : shift + weight.packed.numel()]
    packed.copy_(weight.packed.view(-1))
    moved = QuantizedWeight(packed, weight.state)
    assert kernels[0].reads_words(moved, 72) == (shift == 0)
    plain, tiles = torch.empty(2, 20, 72, device=device)
    kernels[0].dequantize_launch(moved, plain, arch=arch_of(plain)).run()
    kernels[0].dequantize_launch(moved, tiles, b=torch.zeros(1, device=device), arch=arch_of(tiles)).run()
    assert torch.equal(plain, dense(weight, torch.float32))
    assert torch.equal(tiles, plain)


def test_the_nested_absmax_is_rounded_twice(device, kernels):
    """code·absmax + offset by a fused multiply-add would give other bits here."""
    weight = quantized(130, 128, device, dtype=torch.float32)
    nested = weight.state.nested
    assert nested is not None
    code, scale = nested.code[weight.state.absmax.int()], nested.absmax.repeat_interleave(256)[: 130 * 2]
    fused = (code.double() * scale.double() + nested.offset.double()).float()
    assert not torch.equal(fused, code * scale + nested.offset)
    out = torch.empty(130, 128, device=device)
    kernels[0].dequantize_launch(weight, out, arch=arch_of(out)).run()
    assert torch.equal(out, dense(weight, torch.float32))


def adapters(a: str, b: str, n: int, k: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Strided factors of ranks 3 (A) and 65 (B), vectors and constants."""
    made: dict[str, Tensor] = {}
    for seed, (name, form, rank) in enumerate((("a", a, 3), ("b", b, 65))):
        if form == "lora":
            made[f"{name}_up"] = draw(rank, n, seed=seed, std=0.3, dtype=dtype, device=device).t()
            made[f"{name}_down"] = draw(rank, 2 * k, seed=seed + 9, std=0.1, dtype=dtype, device=device)[:, ::2]
        elif form != "none":
            size = n if form == "vector" else 1
            made[name] = draw(size, seed=seed, std=0.3, dtype=dtype, device=device)
    return made


def adapted(w: Tensor, terms: dict[str, Tensor], scale: float) -> Tensor:
    """w + w∘A + B in w's dtype."""
    t = {name: value.to(w.dtype) for name, value in terms.items()}
    zero = w.new_zeros(1)
    a = t["a_up"] @ t["a_down"] if "a_up" in t else t.get("a", zero)[:, None]
    b = scale * (t["b_up"] @ t["b_down"]) if "b_up" in t else t.get("b", zero)[:, None]
    return w + w * a + b


@pytest.mark.parametrize(("a", "b", "k", "wide"), [
    ("lora", "lora", 72, False), ("lora", "vector", 33, True), ("vector", "lora", 72, True),
    ("vector", "constant", 33, False), ("constant", "none", 72, False), ("none", "lora", 33, False),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_with_adapters(a, b, k, wide, dtype, device, kernels):
    """`wide`: the adapters in fp32 over a 16-bit result."""
    n, scale = 37, 1.5
    weight = quantized(n, k, device, "fp4" if k % 8 else "nf4", nested=k % 8 == 0)
    terms = adapters(a, b, n, k, torch.float32 if wide else dtype, device)
    out = torch.empty(n, k, dtype=dtype, device=device)
    kernels[0].dequantize_launch(weight, out, **terms, scale=scale, arch=arch_of(out)).run()
    truth = adapted(dense(weight, torch.float64), terms, scale)
    literal = adapted(dense(weight, dtype), terms, scale)
    assert largest_error(out, truth) <= allowed_error(truth, literal, dtype)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e-4), (torch.bfloat16, 1e-3)])
def test_small_adapters_survive_16_bits(dtype, size, device, kernels):
    """Weights that 16 bits hold exactly, so that rounding to nearest would give w back for every w·(1 + size)."""
    n, k = 96, 64
    generator = torch.Generator().manual_seed(0)
    nibbles = torch.tensor([0, 15], dtype=torch.uint8)[torch.randint(0, 2, (2, n * k // 2), generator=generator)]
    absmax = 2.0 ** torch.randint(-3, 3, (n * k // 64,), generator=generator)
    state = QuantState(absmax, "nf4", 64, (n, k), dtype).to(device)
    weight = QuantizedWeight(((nibbles[0] << 4) | nibbles[1]).to(device), state)
    w = dense(weight, torch.float64)
    assert set(w.abs().log2().unique().tolist()) <= {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0}
    out = torch.empty(n, k, dtype=dtype, device=device)
    kernels[0].dequantize_launch(weight, out, a=torch.tensor([size], device=device), arch=arch_of(out)).run()
    change = size * w
    assert torch.equal((w + change).to(dtype).double(), w)
    kept = float(((out.double() - w) * change).sum() / change.square().sum())
    # A share size/eps of the elements goes up by a step of eps: ten times the binomial deviation of what is kept.
    bound = 10 * (torch.finfo(dtype).eps / size / (n * k)) ** 0.5
    assert bound < 0.5
    assert abs(kept - 1) < bound


@pytest.mark.parametrize(("k", "dtype"), [(72, torch.float16), (33, torch.bfloat16), (33, torch.float32)])
def test_hadamard_grad_over_4_bits_equals_dense(k, dtype, device, kernels):
    """The decoded tile is rounded as the dense weight is, so that every number is the same, and W_eff too."""
    m, n, r = 40, 45, 5
    weight = quantized(n, k, device, "fp4" if k % 8 else "nf4", nested=k % 8 == 0)
    dy, x = draw(m, n, dtype=dtype, device=device), draw(m, k, seed=1, dtype=dtype, device=device)
    pair = {"a_up": draw(n, r, seed=2, dtype=dtype, device=device),
            "a_down": draw(r, k, seed=3, dtype=dtype, device=device)}  # fmt: skip
    s = draw(1, m, r, seed=4, device=device)
    n_tiles, k_tiles = kernels[1].hadamard_grad_tiles(Shape(m, n, k, r), dtype, arch_of(x))
    found = []
    for w in (weight, dense(weight, dtype)):
        outputs = {
            "dup": torch.empty(k_tiles, n, r, device=device), "ddown": torch.empty(n_tiles, r, k, device=device),
            "weff": torch.empty(n, k, dtype=dtype, device=device), "db_down": torch.empty(r, k, device=device),
        }  # fmt: skip
        out = kernels[1].HadamardGrad(**outputs)
        kernels[1].hadamard_grad_launch(dy, x, w, **pair, out=out, s=s, arch=arch_of(x)).run()
        found.append(outputs)
    for name, value in found[0].items():
        check_same(value, found[1][name], dtype, name)


@pytest.mark.parametrize(("n", "k", "dtype"), [(45, 72, torch.bfloat16), (300, 33, torch.float32)])
def test_wc_and_its_gradient_over_4_bits_equal_dense(n, k, dtype, device, kernels):
    made = quantized(n, k, device, "fp4" if k % 8 else "nf4", nested=k % 8 == 0)
    weight = QuantizedWeight(made.packed, dataclasses.replace(made.state, dtype=dtype))
    c, g = draw(k, dtype=dtype, device=device), draw(n, seed=1, device=device)
    c_up, c_down = draw(k, 3, seed=2, dtype=dtype, device=device), draw(3, 1, seed=3, dtype=dtype, device=device)
    arch = arch_of(c)
    splits = kernels[1].wc_grad_splits(weight, arch)
    found = []
    for w in (weight, dense(weight, dtype)):
        given, low_rank = torch.empty(2, n, device=device)
        part = torch.empty(splits, k, device=device)
        kernels[1].wc_launch(w, C(c), given, arch=arch).run()
        kernels[1].wc_launch(w, C(None, c_up, c_down), low_rank, arch=arch).run()
        kernels[1].wc_grad_launch(w, g, part, arch=arch).run()
        found.append({"W·c": given, "W·C_up·C_down": low_rank, "Wᵀg": part})
    for name, value in found[0].items():
        check_same(value, found[1][name], torch.float32, name)


def check_same(value: Tensor, other: Tensor, dtype: torch.dtype, name: str) -> None:
    """Equal in the interpreter; a card may add in another order."""
    if value.device.type == "cpu":
        assert torch.equal(value, other), name
    else:
        assert largest_error(value, other) <= allowed_error(other.double(), other, dtype), name


MACHINE_CODE = """
import json, re, sys
import torch
from glora_kernels.tools import elsewhere, planned, shipped
arch, pattern = sys.argv[1:]
layer = planned.Linear(shipped.LORA, 4096, 4096, quant_type="nf4", nested=True)
launch = planned.linear(layer, planned.How(512, torch.bfloat16, arch)).forward[0]
assert launch.kernel.__name__ == "_dequantize_kernel"
with elsewhere.on_card(arch):
    compiled, _ = elsewhere.compile_launch(launch)
print(json.dumps(re.findall(pattern, compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"])))
"""


@pytest.mark.aot
@pytest.mark.parametrize(("arch", "pattern", "exact"), [
    ("sm_90", r"\bfma\S*\s.*", ", 0f00000000;"), ("gfx942", r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)\S*\s.*", ", 0"),
])  # fmt: skip
def test_no_compiler_merges_the_two_roundings(arch, pattern, exact):
    """In the machine code every fused multiply-add adds zero: it is the product of the nested absmax, rounded."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", MACHINE_CODE, arch, pattern], capture_output=True, text=True, env=environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found
    assert all(line.strip().endswith(exact) for line in found), found
