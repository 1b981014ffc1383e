"""The kernels over depth: many layers of ragged sizes in one launch, against the truth of each layer alone."""

from __future__ import annotations

import pytest
import torch

from glora_kernels import reference
from glora_kernels.depth import op as depth
from glora_kernels.depth.deferred import Deferred
from glora_kernels.depth.table import MAX_PRODUCT_RANK, Layer, SharedProduct, group_key, pointer_table
from glora_kernels.dispatch.common import given
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime.planning import planning
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig

LAYERS = [  # config, N, K, bias: every form of A, B, C, D and E, sizes that are no multiple of anything
    (GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=3, alpha=6), 37, 70, True),
    (GLoRAConfig("vector", "vector", "vector", "constant", "constant"), 45, 33, True),
    (GLoRAConfig("constant", "constant", "none", "vector", "none"), 16, 129, True),
    (GLoRAConfig("none", "lora", "lora", "none", "none", rank=16), 33, 31, False),
    (GLoRAConfig("lora", "none", "none", "none", "constant", rank=1), 1, 40, False),
    (GLoRAConfig("lora", "lora", "vector", "none", "vector", rank=3, variant="matmul"), 40, 70, False),
    (GLoRAConfig("lora", "vector", "none", "none", "vector", rank=16, variant="matmul"), 70, 1, True),
    (GLoRAConfig("vector", "lora", "none", "vector", "constant", rank=65), 20, 37, True),
]
EXACT = [1, 2]
"""The layers without a low-rank product, whose merged weight is the literal one bit for bit."""

pytestmark = pytest.mark.usefixtures("poison")


def draw(shape, generator, std=1.0, dtype=torch.float32, device="cpu"):
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype).to(device)


def make_layers(dtype, device, adapter=None, transposed=False, chosen=LAYERS, seed=0):
    """(Layer, config) of each of `chosen`, with every parameter away from zero."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for config, n, k, bias in chosen:
        if transposed and n == 1:  # (K,1) is stored as (1,K) is
            n = 2
        weight = draw((k, n) if transposed else (n, k), g, k**-0.5, dtype, device)
        shapes = config.parameter_shapes(k, n, bias)
        adapters = {name: draw(shape, g, 0.3, adapter or dtype, device) for name, shape in shapes.items()}
        b = draw((n,), g, 0.5, dtype, device) if bias else None
        layer = Layer(weight.t() if transposed else weight, b, adapters, config.scale, config.variant == "matmul")
        made.append((layer, config))
    return made


def literal(layer, config, dtype):
    """W_eff and the full bias of the original weight, everything in `dtype`."""
    weight, adapter = layer.weight.to(dtype), {name: t.to(dtype) for name, t in layer.adapter.items()}
    bias = None if layer.bias is None else layer.bias.to(dtype)
    effective = reference.effective_weight(weight, adapter, config)
    return effective, reference.effective_bias(weight, bias, adapter, config)


def ulps(left, right):
    """The largest distance of two 16-bit tensors in units of the last place."""

    def place(tensor):  # among all numbers of the dtype, in order
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(2**15) - bits, bits)

    return int((place(left) - place(right)).abs().max())


@pytest.mark.parametrize(("dtype", "adapter", "transposed"), [
    (torch.float32, None, False), (torch.float16, None, True), (torch.float16, torch.float32, False),
    *(pytest.param(torch.bfloat16, adapter, transposed, marks=pytest.mark.gpu)
      for adapter in (None, torch.float32) for transposed in (False, True)),
])  # fmt: skip
def test_merge(dtype, adapter, transposed, device):
    """bfloat16 on a GPU only: the interpreter truncates to it, and merged weights are compared bit for bit."""
    made = make_layers(dtype, device, adapter, transposed)
    layers = [layer for layer, _ in made]
    expected = [
        tuple(None if t is None else t.to(dtype) for t in literal(layer, c, torch.float32)) for layer, c in made
    ]
    exact = [literal(layer, config, torch.float64) for layer, config in made]
    betas = [None if config.C == config.D == config.E == "none" else
             layer.bias if layer.bias is not None else layer.weight.new_empty(layer.weight.shape[0])
             for layer, config in made]  # fmt: skip
    with planning("cpu") as steps:
        depth.merge(layers, betas)
    assert len(steps) == 1
    depth.merge(layers, betas)
    for i, (layer, beta, (weight, bias), (true, true_bias)) in enumerate(
        zip(layers, betas, expected, exact, strict=True)
    ):
        if i in EXACT:
            assert torch.equal(layer.weight, weight), i
        elif dtype == torch.float32:
            assert largest_error(layer.weight, true) <= allowed_error(true, weight, dtype), i
        else:
            assert ulps(layer.weight, weight) <= 1, i
        if beta is not None:
            assert largest_error(beta, true_bias) <= allowed_error(true_bias, bias, dtype), i


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_restore_gives_every_bit_back(dtype, device):
    layers = [layer for layer, _ in make_layers(dtype, device)]
    layers[0].weight.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-7])
    large = torch.randn(50, 70, device=device).to(dtype)  # several blocks of the copy
    layers.append(Layer(large, torch.randn(50, device=device).to(dtype), {}))
    before = [(layer.weight.clone(), layer.bias if layer.bias is None else layer.bias.clone()) for layer in layers]
    copies = [(layer.weight, depth.host_copy(layer.weight), layer.bias,
               None if layer.bias is None else depth.host_copy(layer.bias)) for layer in layers]  # fmt: skip
    if device == "cuda":
        torch.cuda.synchronize()
    for layer in layers:
        layer.weight.fill_(7)
        if layer.bias is not None:
            layer.bias.fill_(7)
    with backend("triton"):
        assert len({depth.restorable(copy) for copy in copies} - {None}) == 1
        depth.restore(copies)
    for layer, (weight, bias) in zip(layers, before, strict=True):
        assert torch.equal(layer.weight.view(torch.uint8), weight.view(torch.uint8))
        assert bias is None or torch.equal(layer.bias, bias)


SHIFTED = [i for i, (config, *_) in enumerate(LAYERS) if not config.C == config.D == config.E == "none"]


@pytest.mark.parametrize(("dtype", "adapter", "transposed"), [
    (torch.float32, None, False), (torch.float16, None, True), (torch.float16, torch.float32, False),
    (torch.bfloat16, None, False),
])  # fmt: skip
def test_shifts_and_their_gradients(dtype, adapter, transposed, device):
    made = [made for i, made in enumerate(make_layers(dtype, device, adapter, transposed)) if i in SHIFTED]
    leaves = [_leaves(layer) for layer, _ in made]
    g = torch.Generator().manual_seed(1)
    gs = [draw((layer.weight.shape[0],), g, device=device) for layer, _ in made]
    with backend("triton"):
        betas = depth.shifts(leaves)
        torch.autograd.backward(betas, gs)
    for (layer, config), leaf, beta, grad in zip(made, leaves, betas, gs, strict=True):
        assert beta.dtype == torch.float32
        true, plain = (_literal_shift(layer, config, grad, t) for t in (torch.float64, torch.float32))
        got = {"beta": beta.detach(), **{name: given(t.grad) for name, t in _named(leaf).items()}}
        for name, value in got.items():
            kind = dtype if name != "beta" and value.dtype == dtype else torch.float32
            literal_value = plain[name].to(kind)
            assert value.dtype == (torch.float32 if name == "beta" else _named(leaf)[name].dtype)
            assert value.shape == true[name].shape, name
            slack = 2.0 if kind == torch.bfloat16 and device == "cpu" else 1.0  # the interpreter truncates
            bound = slack * allowed_error(true[name], literal_value, kind, _size(name, layer, grad))
            assert largest_error(value, true[name]) <= bound, (config, name)


def test_shifts_launch_once_forward_and_twice_backward(device):
    made = [made for i, made in enumerate(make_layers(torch.float32, device)) if i in SHIFTED]
    leaves = [_leaves(layer) for layer, _ in made]
    with backend("triton"), planning("cpu") as steps:
        betas = depth.shifts(leaves)
        assert [step.kernel.__name__ for step in steps] == ["_shift_kernel"]
        torch.autograd.backward(betas, [torch.ones_like(beta) for beta in betas])
    assert [step.kernel.__name__ for step in steps[1:]] == ["_shift_grad_kernel", "_shift_down_kernel"]
    with backend("triton"), planning("cpu") as steps:  # no C_down: dc is complete where it is needed
        depth.shifts(leaves[1:3])[0].sum().backward()
    assert [step.kernel.__name__ for step in steps] == ["_shift_kernel", "_shift_grad_kernel"]


@pytest.mark.parametrize("route", ["eager", "triton"])
def test_only_the_wanted_gradients_of_the_used_layers(route, device):
    """Each parameter alone and all but each get what all together get; a layer that nobody used gets nothing."""
    small = [(GLoRAConfig("none", "none", "lora", "vector", "constant", rank=2), 9, 20, True), LAYERS[1]]
    layer, other = (layer for layer, _ in make_layers(torch.float32, device, chosen=small))
    names = list(_named(_leaves(layer)))
    assert sorted(names) == ["C_down", "C_up", "D", "E", "bias"]
    with backend(route):
        full = _leaves(layer)
        depth.shifts([full])[0].square().sum().backward()
        for chosen in [[name] for name in names] + [[n for n in names if n != name] for name in names]:
            some, unused = _leaves(layer, chosen), _leaves(other)
            depth.shifts([some, unused])[0].square().sum().backward()
            for name, tensor in _named(some).items():
                assert (tensor.grad is None) == (name not in chosen)
                assert tensor.grad is None or torch.equal(tensor.grad, _named(full)[name].grad), (chosen, name)
            assert all(tensor.grad is None for tensor in _named(unused).values())


@pytest.mark.parametrize("route", ["eager", "triton"])
def test_shifts_notice_an_overwritten_parameter(route, device):
    layer = _leaves(make_layers(torch.float32, device)[0][0])
    with backend(route):
        beta = depth.shifts([layer])[0]
    with torch.no_grad():
        layer.adapter["E"].add_(1)
    with pytest.raises(RuntimeError, match="overwritten between shift_once and backward"):
        beta.sum().backward()


def _leaves(layer, chosen=None):
    """The layer with leaves for b and what C, D and E are made of."""

    def leaf(name, tensor):  # fmt: skip
        return tensor.detach().clone().requires_grad_(chosen is None or name in chosen)

    adapter = {name: leaf(name, t) for name, t in layer.adapter.items() if name[0] in "CDE"}
    return Layer(layer.weight, None if layer.bias is None else leaf("bias", layer.bias), adapter)


def _named(layer):
    return {**layer.adapter, **({} if layer.bias is None else {"bias": layer.bias})}


def _literal_shift(layer, config, g, dtype):
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in _named(_leaves(layer)).items()}
    beta = reference.effective_bias(layer.weight.to(dtype), leaves.get("bias"), leaves, config)
    beta.backward(g.to(dtype))
    return {"beta": beta.detach(), **{name: t.grad for name, t in leaves.items()}}


def _size(name, layer, g):
    """The root of the sum of squared terms, of results that are one sum of many."""
    if name in ("D", "E") and layer.adapter[name].numel() == 1:
        return float((g * (layer.bias if name == "D" else torch.ones_like(g))).double().norm())
    if name == "C_down":
        return float((layer.adapter["C_up"].double() * (layer.weight.double().t() @ g.double())[:, None]).norm())
    return 0.0


# Gradients of shared factors.


def make_products(dtype, device, rank, cols, rows, p=0.0, seed=0, layout="contiguous"):
    g = torch.Generator().manual_seed(seed)
    products = []
    for i, m in enumerate(rows):
        left, right = draw((m, rank), g, dtype=dtype, device=device), draw((m, cols), g, dtype=dtype, device=device)
        if layout == "strided":  # h of the product variant is the last columns of a wider matrix
            left = torch.cat([torch.full_like(left, float("nan")), left], 1)[:, rank:]
            right = torch.cat([right, torch.full_like(right, float("nan"))], 1)[:, :cols]
        key = torch.tensor([2**62 + i], device=device if i % 2 else "cpu") if p else None
        products.append(SharedProduct(left, right, 0.5 + i, p, key))
    return products


def true_sum(products, dtype):
    """Σ scale·leftᵀ·drop(right) by the letter, in `dtype` throughout."""
    total = 0
    for left, right, scale, p, seed in products:
        x = right.to(dtype)
        if p:
            x = x * reference.keep_mask(seed, *right.shape, p).to(right.device) / (1.0 - p)
        total = total + scale * (left.to(dtype).t() @ x)
    return total


FACTORS = [  # name, R, columns, tokens of each layer, p, layout
    ("b_down", 3, 70, (37, 1, 9), 0.0, "contiguous"),
    ("b_down", 16, 37, (33, 40), 0.25, "strided"),
    ("b_up", 1, 20, (5, 0, 41), 0.0, "contiguous"),
    ("b_up", 17, 16, (37,), 0.0, "strided"),
    ("b_up", 16, 16, (9, 8), 0.0, "contiguous"),  # square: N = R must not be taken for its transpose
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shared_gradients(dtype, device):
    """All factors of a model in one launch, and in another order of handing over the same."""
    results = []
    for turn in (1, -1):
        deferred, expected = Deferred(), {}
        for i, (name, rank, cols, rows, p, layout) in enumerate(FACTORS):
            products = make_products(dtype, device, rank, cols, rows, p, i, layout)
            shape = (rank, cols) if name == "b_down" else (cols, rank)
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            expected[parameter] = name == "b_up", products
            for place, product in list(enumerate(products))[::turn]:
                deferred.add(parameter, place, product, name == "b_up", triton=True)
        with planning("cpu") as steps:
            planned = Deferred()
            planned._records = dict(deferred._records)
            planned.gradients(list(expected))
        assert [step.kernel.__name__ for step in steps] == ["_shared_grad_kernel"]
        grads = deferred.gradients(list(expected))
        assert not any(grad is not None for grad in deferred.gradients(list(expected))), "they are asked for once"
        results.append(grads)
        for (parameter, (transposed, products)), grad in zip(expected.items(), grads, strict=True):
            true, plain = true_sum(products, torch.float64), true_sum(products, dtype)
            if transposed:
                true, plain = true.t(), plain.t()
            assert grad.shape == parameter.shape
            assert largest_error(grad, true) <= allowed_error(true, plain, dtype), true.shape
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_two_runs_give_the_same_bits(device):
    def run():
        layers = [layer for layer, _ in make_layers(torch.float16, device, chosen=LAYERS[3:5])]
        depth.merge(layers, [None] * len(layers))
        leaves = [_leaves(layer) for layer, _ in make_layers(torch.float16, device, chosen=LAYERS[:2])]
        with backend("triton"):
            betas = depth.shifts(leaves)
            torch.autograd.backward(betas, [torch.ones_like(beta) for beta in betas])
        grads = [tensor.grad for leaf in leaves for tensor in _named(leaf).values()]
        return [layer.weight for layer in layers] + [beta.detach() for beta in betas] + grads

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# Tables and keys.


def test_layers_of_one_launch():
    """What the kernels take, what they leave to the eager path, and what needs a launch of its own."""
    weight, bias = torch.zeros(6, 4), torch.zeros(6)
    factor = {"A_up": torch.zeros(4, MAX_PRODUCT_RANK), "A_down": torch.zeros(MAX_PRODUCT_RANK, 4)}
    key = group_key(Layer(weight, bias, {}))
    assert (
        key == group_key(Layer(weight, None, {"E": torch.zeros(1)})) == group_key(Layer(weight, bias, factor, 1, True))
    )
    assert key != group_key(Layer(torch.zeros(4, 6).t(), bias, {}))
    assert key != group_key(Layer(weight, bias, {"E": torch.zeros(6, dtype=torch.float16)}))
    wider = {"A_up": torch.zeros(4, MAX_PRODUCT_RANK + 1), "A_down": torch.zeros(MAX_PRODUCT_RANK + 1, 4)}
    assert group_key(Layer(weight, bias, wider)) == key
    for refused in (
        Layer(weight, bias, wider, 1.0, True),
        Layer(weight.double(), None, {}),
        Layer(torch.zeros(12, 8)[::2, ::2], bias, {}),
        Layer(torch.zeros(1, 4).expand(6, 4), bias, {}),
        Layer(weight, torch.zeros(12)[::2], {}),
    ):
        assert group_key(refused) is None
    with pytest.raises(ValueError, match="one device, dtype and order of storage"):
        depth.merge([Layer(weight, None, {}), Layer(weight.half(), None, {})], [None, None])


def test_a_table_holds_addresses_numbers_and_bits_and_keeps_its_tensors():
    tensor = torch.zeros(3)
    table = pointer_table([{"b": tensor, "c": -2.5}, {"a": 7, "b": None}], ("a", "b", "c"), torch.device("cpu"))
    bits = int(torch.tensor(-2.5).view(torch.int32))
    assert table.entries.tolist() == [[0, tensor.data_ptr(), bits], [7, 0, 0]]
    assert table.tensors[0] is tensor
    assert pointer_table([{"a": 1}], ("a", "b"), torch.device("meta")).entries.shape == (1, 2)
    with pytest.raises(KeyError):
        pointer_table([{"d": 1}], ("a",), torch.device("cpu"))
