"""GLoRAConv against the equation with a dense W_eff, in float64, and what else a call promises."""

import copy
import itertools
import pickle

import pytest
import torch
from convs import FORMS, GEOMETRIES, KINDS, SHIFTS, away, channels_last, config, conv, images, literal, near
from helpers import thinned
from torch import nn
from torch.utils.checkpoint import checkpoint

from glora_kernels import GLoRAConfig, GLoRAConv

CASES = itertools.product(GEOMETRIES, FORMS, KINDS, SHIFTS, (False, True))
DEFAULT = config("vector", "lora")
LORA = GLoRAConfig.lora(2, 4)
PRODUCT = config("lora", "lora", "matmul")
SOME = [DEFAULT, LORA, PRODUCT, config("lora", "vector", shift=SHIFTS[1]), config("constant", "constant")]
some = pytest.mark.parametrize("own", SOME, ids=["vector", "lora", "product", "elementwise", "constant"])


def gradients(y, dy, *inputs):
    return torch.autograd.grad(y, inputs, dy)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("geometry", "form", "dims", "shift", "last"), thinned(17, CASES))
def test_a_layer_computes_the_equation(geometry, form, dims, shift, last):
    base, x = conv(dims, **GEOMETRIES[geometry]), images(dims, last=last)
    layer = GLoRAConv.from_conv(copy.deepcopy(base), config(*form, shift))
    near(layer(x), base(x))
    if dims == 2:  # elsewhere the vendor's y does not always follow an x with its channels last
        assert layer(x).stride() == base(x).stride()
    away(layer)
    y, expected = layer(x), literal(base, layer, x)
    near(y, expected)
    dy, adapter = torch.randn_like(y), layer.adapter().values()
    for got, right in zip(gradients(y, dy, x, *adapter), gradients(expected, dy, x, *adapter), strict=True):
        near(got, right)
    assert layer.weight.grad is None
    layer.eval().merge()
    near(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.weight, base.weight)
    near(layer.to_conv()(x), expected)


@some
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_layer_is_its_base_bit_for_bit(own, dtype):
    for dims, size, last in itertools.product(KINDS, (1, 3), (False, True)):
        base, x = conv(dims, kernel_size=size).to(dtype), images(dims, dtype=dtype, last=last)
        assert torch.equal(GLoRAConv.from_conv(copy.deepcopy(base), own)(x), base(x))


@pytest.mark.parametrize(("size", "last", "own"), thinned(3, itertools.product((1, 3), (True, False), SOME)))
def test_ways_to_call(size, last, own):
    """Compiled, checkpointed, transformed, copied, pickled, of one example, of none: one function."""
    x = images(size=6, last=last)
    layer = away(GLoRAConv.from_conv(conv(kernel_size=size, stride=2), own))
    y = layer(x)
    dy, leaves = torch.randn_like(y), [x, *layer.adapter().values()]
    right = gradients(y, dy, *leaves)
    torch._dynamo.reset()
    for call in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        lambda x: checkpoint(layer, x, use_reentrant=False),
    ):
        again = call(x)
        near(again, y)
        for got, expected in zip(gradients(again, dy, *leaves), right, strict=True):
            near(got, expected)
    checkpoint(layer, x, use_reentrant=True).backward(dy)
    near(x.grad, right[0])
    transformed = torch.func.grad(lambda x: (layer(x) * dy).sum())(x.detach())
    near(transformed, right[0])
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), y)
    near(layer(x[0]), y[0])
    empty = layer(x[:0])
    assert empty.shape == (0, *y.shape[1:])
    empty.sum().backward()
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0].sum(), x)


@pytest.mark.parametrize("size", [1, 3])
def test_dropout_is_on_the_input_of_the_low_rank_path(size):
    base, x = conv(kernel_size=size), images()
    layer = away(GLoRAConv.from_conv(copy.deepcopy(base), config("vector", "lora", dropout=0.5)))
    draws = torch.stack([layer(x).detach() for _ in range(2000)])
    layer.eval()
    near(layer(x), literal(base, layer, x))
    error, spread = draws.mean(0) - layer(x), draws.std(0) / len(draws) ** 0.5
    assert ((error / spread.clamp_min(1e-12)).abs() < 5).all()
    assert (spread > 0).all()
    layer.train()
    seeded = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        seeded.append(gradients(call(x).sum(), None, x, *layer.adapter().values()))
    assert all(map(torch.equal, *seeded))
    # The mask of backward is that of forward: y is linear in x, so that y = dy/dx · x.
    torch.manual_seed(4)
    y = GLoRAConv.from_conv(conv(kernel_size=size, bias=False), GLoRAConfig.lora(2, dropout=0.5))(x).sum()
    near((gradients(y, None, x)[0] * x).sum(), y)


def test_what_is_repeated_outside_is_dropped_with_what_it_repeats():
    layer = GLoRAConv.from_conv(
        conv(channels=1, out=1, kernel_size=3, padding=1, padding_mode="reflect"), GLoRAConfig.lora(1, dropout=0.5)
    )
    x, found = images(channels=1, size=30), []
    for tap in (3, 4):  # the place before in a row, and the place itself
        with torch.no_grad():
            layer.B_up.fill_(1.0)
            layer.B_down.copy_(torch.eye(9)[tap].view(1, 9))
            torch.manual_seed(2)
            found.append(layer(x) - layer._base_alone(x))
    before, here = found
    assert (here[..., 1].abs() < 1e-12).any()
    near(before[..., 0], here[..., 1])


def saved_by(call):
    """The bytes of distinct memory that a call saves for backward."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    return sum(found.values()), y.untyped_storage()


@pytest.mark.parametrize("own", [*SOME, config("none", "lora", dropout=0.1)], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["", "fp32 adapters over bf16"])
def test_no_copy_of_x_and_nothing_of_the_size_of_y_is_kept(own, wide):
    dtype = torch.bfloat16 if wide else torch.float32
    for size, last in itertools.product((1, 3), (False, True)):
        base = conv(channels=32, out=32, kernel_size=size, padding=size // 2).to(dtype).requires_grad_(False)
        x = images(channels=32, size=16, last=last, dtype=dtype)
        layer = GLoRAConv.from_conv(copy.deepcopy(base), own, adapter_dtype=torch.float32 if wide else None)
        frozen, _ = saved_by(lambda base=base, x=x: base(x))
        ours, y = saved_by(lambda layer=layer, x=x: layer(x))
        is_operator = size == 1 and last  # which reads y for a vector A, and it is there anyway
        allowed = y.nbytes() if is_operator and own.A in ("vector", "constant") else 0
        parameters = sum(p.numel() * p.element_size() for p in layer.adapter().values())
        low = 2 * own.rank * x.numel() // 32 * 4 * 2
        mask = x.numel() if own.dropout else 0
        assert ours <= frozen + parameters + low + mask + allowed + 1000


@pytest.mark.parametrize("own", [DEFAULT, LORA, PRODUCT], ids=str)
def test_an_activation_in_place_may_follow(own):
    base, x = conv(kernel_size=3), images()
    layer = away(GLoRAConv.from_conv(copy.deepcopy(base), own))
    got = gradients(torch.relu_(layer(x)).sum(), None, x)[0]
    near(got, gradients(torch.relu(literal(base, layer, x)).sum(), None, x)[0])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("scale", [1e-3, 1e-2])
@pytest.mark.parametrize("form", [("vector", "none"), ("none", "lora"), ("lora", "none"), ("lora", "none", "matmul")])
def test_a_small_adapter_survives_bfloat16(form, scale, size, last):
    """The share of Δ = y − y_base that is in the rounded y, beside the vendor's base in 16 bits."""
    base = conv(channels=64, out=64, kernel_size=size, padding=size // 2, bias=False).bfloat16()
    x = images(channels=64, size=16, dtype=torch.bfloat16, last=last)
    layer = GLoRAConv.from_conv(copy.deepcopy(base), config(*form), adapter_dtype=torch.float32)
    truth = GLoRAConv.from_conv(copy.deepcopy(base).double(), config(*form), adapter_dtype=torch.float64)
    away(truth)
    wide = x.detach().double()
    plain = truth._base_alone(wide)
    with torch.no_grad():  # all forms are linear in the adapter's first factor
        first = next(p for name, p in truth.adapter().items() if not name.endswith("_down"))
        first *= scale * plain.norm() / (truth(wide) - plain).norm()
        for name, parameter in truth.adapter().items():
            getattr(layer, name).copy_(parameter)
    delta = (truth(wide) - plain).detach().flatten()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for call in [layer, compiled] if scale > 5e-3 and size == 3 and not last else [layer]:
        found = (call(x).double() - base(x).double()).detach().flatten()
        assert abs(float(found @ delta / (delta @ delta)) - 1) < (0.1 if scale < 5e-3 else 0.02)


@some
def test_autocast(own):
    """y in 16 bits; the error beside float64 is at most twice that of the dense W_eff in 16 bits, and a floor."""
    for size, last in itertools.product((1, 3), (False, True)):
        base = conv(kernel_size=size, channels=16, out=16)
        truth = away(GLoRAConv.from_conv(copy.deepcopy(base), own))
        layer, x = copy.deepcopy(truth).float(), images(channels=16, last=last)
        narrow = x.detach().float().requires_grad_()
        exact = truth(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(narrow)
            dense = literal(copy.deepcopy(base).float(), layer, narrow)
        assert y.dtype == torch.bfloat16
        dy = torch.randn_like(exact).bfloat16().double()
        named = {"x": (x, narrow)} | {n: (p, layer.adapter()[n]) for n, p in truth.adapter().items()}
        right = gradients(exact, dy, *(pair[0] for pair in named.values()))
        ours, theirs = (gradients(of, dy.bfloat16(), *(pair[1] for pair in named.values())) for of in (y, dense))
        triples = [(exact, y, dense), *zip(right, ours, theirs, strict=True)]
        for true, got, plain in triples:
            floor = 2**-7 * true.abs().max()
            assert (got.double() - true).abs().max() <= 2 * (plain.double() - true).abs().max() + floor


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.zeros(2, 3, 5, dtype=torch.int64), TypeError, "floating-point"),
        (torch.zeros(2, 2, 5, 5), ValueError, r"x must be \(B, 3, \.\.\., \.\.\.\) for a convolution of 2 dimensions"),
        (torch.zeros(2, 3, 5, 5, 5), ValueError, r"got \(2, 3, 5, 5, 5\)"),
        (torch.zeros(2, 3, 5, 5).double(), TypeError, "x is torch.float64 and the weight torch.float32"),
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_bad_inputs(x, error, match, size):
    layer = GLoRAConv.from_conv(conv(kernel_size=size).float(), LORA)
    with pytest.raises(error, match=match):
        layer(x)


def test_a_thawed_weight_is_refused():
    layer = GLoRAConv.from_conv(conv(kernel_size=3), LORA)
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight requires a gradient, but the base of an adapted layer is frozen"):
        layer(images())
    with torch.no_grad():
        assert layer(images()).shape == (2, 4, 3, 3)


class Causal(nn.Conv3d):
    def forward(self, x):
        return super().forward(x[:, :, 1:])


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize(
    ("module", "error", "match"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), ValueError, r"grouped convolution \(groups=2\); accepted are .* groups=1"),
        (nn.ConvTranspose2d(4, 4, 3), TypeError, "got ConvTranspose2d"),
        (nn.Linear(4, 4), TypeError, "takes an nn.Conv1d, nn.Conv2d or nn.Conv3d; got Linear"),
        (Causal(4, 4, 3), ValueError, "its forward is not that of Conv3d"),
        (Standardized(4, 4, 3), ValueError, "its forward is not that of Conv2d"),
        (nn.LazyConv2d(4, 3), ValueError, "its sizes are not known yet"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), ValueError, "parametrized"),
        (nn.Conv2d(4, 4, 3, dtype=torch.complex64), ValueError, "its weight is complex64"),
    ],
)
def test_what_cannot_be_adapted(module, error, match):
    with pytest.raises(error, match=match):
        GLoRAConv.from_conv(module, LORA)


def test_what_is_not_of_convolutions():
    layer = GLoRAConv.from_conv(conv(kernel_size=3), LORA)
    with pytest.raises(TypeError, match="to_conv"):
        layer.to_linear()
    with pytest.raises(TypeError, match="from_conv takes convolutions"):
        GLoRAConv.from_linear(nn.Linear(3, 4), LORA)
    with pytest.raises(TypeError, match="config must be a GLoRAConfig"):
        GLoRAConv.from_conv(conv(kernel_size=3), {"rank": 2})


def test_memory_formats_stay():
    """y lies in memory as the base's y does, whatever the layout of x and of the weight."""
    for size, own, last, of_weight in itertools.product((1, 3), SOME, (False, True), (False, True)):
        base = conv(kernel_size=size).float()
        base = base.to(memory_format=torch.channels_last) if of_weight else base
        x = images(dtype=torch.float32, last=last)
        layer = away(GLoRAConv.from_conv(copy.deepcopy(base), own))
        near(layer(x), literal(base, layer, x), 1e-5)
        if size == 3 or not of_weight:  # the strides of a 1 x 1 weight are those of both formats
            assert layer(x).stride() == layer._base_alone(x).stride()
        near(layer(channels_last(x)), layer(x.contiguous()), 1e-5)
