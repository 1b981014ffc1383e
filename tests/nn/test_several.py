"""Several adapters on one model: a mixed batch is each example with its own adapter, in training too."""

import copy
import itertools

import pytest
import torch
from many import EIGHT, F64, LORA, WIDE, alone, grads, many, mixed, near, randomized, two, x_of
from stack import Stack
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.nn.model import named_layers
from glora_kernels.quant import dequantize
from glora_kernels.reference.tolerance import allowed_error, largest_error

NAMES = [*EIGHT, None, "rich", "default", None]
"""The adapters of a batch: each of the eight, some twice, and the base alone."""


def literal(layer, x, name):
    """y of a layer by the equation, written out."""
    weight, bias = layer.base_weight(), layer.bias
    if name == "default":
        p, config = layer.adapter(), layer.config
    elif name in layer.named():
        p, config = dict(layer.adapters[name].named_parameters()), layer.adapters[name].config
    else:
        p, config = {}, GLoRAConfig("none", "none")

    (n, k), zero = weight.shape, torch.zeros(1, dtype=x.dtype)

    def matrix(letter):
        if f"{letter}_up" in p:
            return p[f"{letter}_up"] @ p[f"{letter}_down"]
        return p.get(letter, zero)[:, None].expand(n, k)

    b = zero.expand(n) if bias is None else bias
    c = (p["C_up"] @ p["C_down"])[:, 0] if "C_up" in p else p.get("C", zero).expand(k)
    a, scale = matrix("A"), config.scale if config.B == "lora" else 1.0
    changed = weight + (weight @ a if config.variant == "matmul" else weight * a) + scale * matrix("B")
    return x @ changed.t() + b + b * p.get("D", zero) + p.get("E", zero) + weight @ c


@pytest.mark.parametrize("path", ["up", "mix", "down"])
def test_every_example_by_the_equation(path):
    model = many([name for name in EIGHT if name != "shared"])
    layer = getattr(model.blocks[1], path)
    names = [name for name in NAMES if name != "shared"]
    x = torch.randn(len(names), 3, layer.in_features, dtype=F64, requires_grad=True)
    y = mixed(layer, x, [name if name in gk.adapters(layer) else None for name in names])
    wanted = torch.stack([literal(layer, x[i], name) for i, name in enumerate(names)])
    near(y, wanted)
    dy = torch.randn(y.shape, dtype=F64)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for got, right in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy, allow_unused=True), strict=True
    ):
        near(got, torch.zeros_like(got) if right is None else right)


def test_the_adapters_differ_and_the_base_is_the_base():
    model, x = many(), x_of(1).expand(9, -1, -1)
    y = mixed(model, x, [*EIGHT, None])
    assert all(not torch.allclose(*pair, atol=1e-3) for pair in itertools.combinations(y, 2))
    near(y, alone(model, x, [*EIGHT, None]))
    assert gk.adapters(model) == tuple(EIGHT)


KINDS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_eight_equals_eight_steps(kind):
    model = many()
    separate, start = copy.deepcopy(model), copy.deepcopy(model)
    x, order = x_of(16), [*EIGHT, *reversed(EIGHT)]
    optimizer = KINDS[kind](gk.parameter_groups(model, by_adapter=True))
    own = {g["adapter"]: KINDS[kind]([g]) for g in gk.parameter_groups(separate, by_adapter=True)}
    assert set(own) == set(EIGHT)
    for shift in range(3):  # of an adapter other rows each time
        names = order[shift:] + order[:shift]
        optimizer.zero_grad()
        mixed(model, x, names).square().sum().backward()
        optimizer.step()
        for name, mine in own.items():
            gk.set_adapter(separate, name)
            mine.zero_grad()
            separate(x[[i for i, other in enumerate(names) if other == name]]).square().sum().backward()
            mine.step()
    after, first = dict(separate.named_parameters()), dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        near(parameter.detach(), after[name].detach(), 1e-11 if kind == "AdamW" else 1e-12)
        assert torch.equal(parameter, first[name]) is not parameter.requires_grad, name


def test_gradients_of_x_and_of_what_all_adapters_have_in_common():
    model, x = many(train=["head"]), x_of(len(NAMES)).requires_grad_()
    mixed(model, x, NAMES).square().sum().backward()
    got, dx = grads(model), x.grad
    model.zero_grad()
    x.grad = None
    alone(model, x, NAMES).square().sum().backward()
    wanted = grads(model)
    assert got.keys() == wanted.keys()
    assert {"head.weight", "head.bias"} <= got.keys()
    for name, value in wanted.items():
        near(got[name], value)
    near(dx, x.grad)
    groups = gk.parameter_groups(model, by_adapter=True)
    assert {id(p) for g in groups if g["adapter"] is None for p in g["params"]} == set(map(id, model.head.parameters()))
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_trained_biases_belong_to_all_adapters():
    model, x = many(), x_of(len(NAMES))
    biases = [layer.bias.requires_grad_() for layer in named_layers(model).values() if layer.bias is not None]
    assert set(map(id, of_adapter(model, None))) == set(map(id, biases))
    mixed(model, x, NAMES).square().sum().backward()
    got = [bias.grad for bias in biases]
    model.zero_grad()
    alone(model, x, NAMES).square().sum().backward()
    for grad, bias in zip(got, biases, strict=True):
        near(grad, bias.grad)


def of_adapter(model, name):
    groups = gk.parameter_groups(model, by_adapter=True)
    return [p for group in groups if group["adapter"] == name for p in group["params"]]


def test_an_adapter_without_examples():
    model, x = many(), x_of(3)
    mixed(model, x, ["wide", None, "wide"]).sum().backward()
    assert all(p.grad is not None for p in of_adapter(model, "wide"))
    assert all(p.grad is None for name in EIGHT if name != "wide" for p in of_adapter(model, name))
    model.zero_grad()
    mixed(model, x, torch.tensor([1, -1, 1])).sum().backward()
    assert all(p.grad.any() for p in of_adapter(model, "wide"))
    assert all(not p.grad.any() for name in EIGHT if name != "wide" for p in of_adapter(model, name))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
@pytest.mark.parametrize("each", ["example", "row"])
def test_an_index_tensor(each, dtype):
    model, x = many(), x_of(4)
    index = torch.tensor([1, -1, 7, 0], dtype=dtype)
    index = index if each == "example" else index[:, None].repeat(1, 3)
    near(mixed(model, x, index), alone(model, x, ["wide", None, "mapped", "default"]))
    if each == "row":
        index[0] = torch.tensor([1, 2, -1])
        y, one = mixed(model, x, index), x[:1].expand(3, -1, -1)
        near(y[0], torch.stack([row[t] for t, row in enumerate(alone(model, one, ["wide", "rich", None]))]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_an_index_tensor_is_read_anew(dtype, shape):
    model, x, index = many(), x_of(4), torch.zeros(shape, dtype=dtype)
    with gk.rows(model, index):
        near(model(x), alone_inside(model, x, "default"))
        index.fill_(2)
        near(model(x), alone_inside(model, x, "rich"))
        index.fill_(8)
        with pytest.raises(ValueError, match=r"'blocks.0.up'.*0 to 7, or -1 .*got 8 .*'default', 'wide'"):
            model(x)


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_an_index_made_in_inference_mode(shape):
    model, x = many(), x_of(4)
    with torch.inference_mode():
        index = torch.ones(shape, dtype=torch.int64)
        near(mixed(model, x, index), alone(model, x, ["wide"] * 4))
    with gk.rows(model, index):
        model(x).sum().backward()
        assert all(p.grad.any() for p in of_adapter(model, "wide"))
        with torch.inference_mode():
            index.fill_(2)
        near(model(x), alone_inside(model, x, "rich"))


def alone_inside(model, x, name):
    return alone(copy.deepcopy(model), x, [name] * len(x))  # a copy is outside of the context


class Four(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=bias), nn.Linear(64, 32, bias=bias)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def agree(got, exact, plain, dtype):
    """Values by name as exact as those of PyTorch's own operators in this dtype, judged by those in float64."""
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert largest_error(got[name], value) <= allowed_error(value, plain[name], dtype), name


def trained(model, x, names, of=mixed):
    """y and every gradient of a batch."""
    model.zero_grad()
    y = of(model, x, names)
    y.double().square().sum().backward()
    return {"y": y.detach(), **grads(model)}


@pytest.mark.parametrize("bias", [True, False])
def test_a_four_bit_base(bias):
    def adapted(base):
        gk.add_adapter(gk.inject(base, LORA, ["a"]), "b", GLoRAConfig("vector", "lora", "vector", rank=2), ["a", "b"])
        return randomized(base)

    torch.manual_seed(0)
    model, dense = adapted(gk.quantize(Four(bias))), adapted(Four(bias).double())
    for layer, twin in zip(named_layers(model).values(), named_layers(dense).values(), strict=True):
        assert layer.quant_state is not None
        twin.weight.copy_(dequantize(layer.codes(), F64))
        if bias:
            twin.bias.copy_(layer.bias)
    x, names = torch.randn(5, 64), ["b", None, "default", "b", "b"]
    exact, plain = trained(dense, x.double(), names), trained(model, x, names, alone)
    agree(trained(model, x, names), exact, plain, torch.float32)


def test_dropout_is_each_adapters_own():
    torch.manual_seed(0)
    model = gk.inject(nn.Sequential(nn.Linear(400, 1, bias=False)), GLoRAConfig.lora(1, dropout=0.25))
    gk.add_adapter(model, "more", GLoRAConfig.lora(1, dropout=0.5))
    gk.add_adapter(model, "whole", GLoRAConfig.lora(1))
    layer = model[0]
    with torch.no_grad():
        layer.weight.zero_()
        for own in (layer.adapter(), *(dict(a.named_parameters()) for a in layer.adapters.values())):
            for parameter in own.values():
                parameter.fill_(1.0)
    names = ["default", "more", "whole", None] * 50
    x, kept = torch.ones(len(names), 400), {"default": 0.75, "more": 0.5, "whole": 1.0, None: 0.0}
    y = mixed(model.train(), x, names)[:, 0].detach()
    for name, p in kept.items():
        mine = y[[i for i, own in enumerate(names) if own == name]]
        share = mine / 400 * (p or 1.0)  # of the elements that are kept, each divided by p
        assert abs(float(share.mean()) - p) < 0.02, name
        assert (len(mine.unique()) > 5) is (0 < p < 1), name
    assert not torch.equal(y, mixed(model, x, names)[:, 0]), "each call draws new masks"
    assert mixed(model.eval(), x, names)[:, 0].unique().tolist() == [0.0, 400.0]
    layer.adapters["more"].train()
    assert len(mixed(model, x, ["more"] * 200).unique()) > 5, "an adapter alone may be trained"


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(reentrant):
    model = gk.inject(Stack(dtype=F64), LORA)
    gk.add_adapter(model, "b", GLoRAConfig("vector", "lora", "lora", rank=2, dropout=0.5))
    randomized(gk.add_adapter(model, "c", WIDE))
    x, names = torch.randn(4, 12, dtype=F64), ["b", None, "c", "b"]
    found = []
    for model.reentrant in (None, reentrant):
        torch.manual_seed(3)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with gk.rows(model, names):
            y = model(leaf)
            y.square().sum().backward()
        found.append({"y": y.detach(), "x": leaf.grad, **grads(model)})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        near(found[1][name], value)


NARROW = ["b", None, "default", "b"]


def test_autocast():
    model, x = two(torch.float32), x_of(dtype=torch.float32)
    exact = trained(copy.deepcopy(model).double(), x.double(), NARROW)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = trained(model, x, NARROW), trained(model, x, NARROW, alone)
    assert got["y"].dtype == plain["y"].dtype == torch.bfloat16
    agree(got, exact, plain, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_is_cast(dtype):
    model = two(torch.float32)
    model = model.half() if dtype == torch.float16 else model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    got, plain = trained(model, x_of(dtype=dtype), NARROW), trained(model, x_of(dtype=dtype), NARROW, alone)
    agree(got, trained(model.double(), x_of(dtype=dtype).double(), NARROW), plain, dtype)


def test_fp32_adapters_over_a_bfloat16_base():
    model, x = two(torch.bfloat16), x_of(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    got, plain = trained(model, x, NARROW), trained(model, x, NARROW, alone)
    assert all(value.dtype == torch.float32 for name, value in got.items() if name != "y")
    agree(got, trained(copy.deepcopy(model).double(), x.double(), NARROW), plain, torch.bfloat16)
    narrow = gk.add_adapter(many(["default"], dtype=torch.bfloat16), "b", WIDE, adapter_dtype=torch.bfloat16)
    assert narrow.blocks[0].up.adapters["b"].B_up.dtype == torch.bfloat16


def test_contexts_nest_and_end_with_an_exception():
    model, x = many(), x_of(4)
    first, inner = ["wide"] * 4, ["rich", None, "rich", "default"]
    wanted = {tuple(names): alone(model, x, names) for names in (first, inner)}
    with gk.rows(model, first):
        with gk.rows(model, inner):
            near(model(x), wanted[tuple(inner)])
        with pytest.raises(KeyError), gk.rows(model, inner):
            raise KeyError
        near(model(x), wanted[tuple(first)])
        with gk.disabled(model):
            near(model(x), alone(model, x, [None] * 4))
        near(model(x), wanted[tuple(first)])
    assert all(layer._rows is None for layer in named_layers(model).values())


def test_a_part_of_a_model():
    model, x = many(), x_of(4)
    names = ["rich", None, "wide", "default"]
    with gk.rows(model.blocks[1], names):
        y = model(x)
    inner = model.blocks[0](x)  # by the active adapter
    near(y, model.head(alone(model.blocks[1], inner, names)))
    gk.set_adapter(model.blocks[0], "wide")
    near(model.blocks[0](x), mixed(model.blocks[0], x, ["wide"] * 4))


def test_contexts_of_all_layers():
    model, x = two(config=GLoRAConfig("vector", "lora", "lora", "vector", "vector", rank=2)), x_of(4)
    names = ["b", "default", None, "b"]
    wanted = alone(model, x, names)
    with gk.shift_once(model), gk.deferred_shared_grads(model), gk.rows(model, names):
        near(model(x), wanted)
    gk.set_adapter(model, "b")
    with gk.shift_once(model), gk.deferred_shared_grads(model):
        near(model(x[:1]), wanted[:1])
        gk.set_adapter(model, "default")
        near(model(x[1:2]), wanted[1:2])


def test_siblings_serve_the_first_adapter_alone(vit, calls):
    model = gk.inject(vit().double(), LORA, ["q_proj", "k_proj", "v_proj"])
    randomized(gk.add_adapter(model, "b", WIDE)).eval()
    x, names = torch.randn(3, 4, 12, dtype=F64), ["b", None, "default"]
    wanted = alone(model, x, names)
    assert gk.fuse_siblings(model)
    near(mixed(model, x, names), wanted)
    gk.set_adapter(model, "b")
    near(model(x[:1]), wanted[:1])
    assert not calls
    gk.set_adapter(model, "default")
    near(model(x[2:]), wanted[2:])
    assert calls


def test_tied_siblings_with_dropout(vit):
    config = gk.ShareLoRAConfig(rank=2, dropout=0.5, tie_siblings=True)
    model = randomized(gk.add_adapter(gk.inject(vit().double(), config), "b", WIDE))
    x, names = torch.randn(3, 4, 12, dtype=F64), ["b", None, "default"]
    with pytest.raises(RuntimeError, match=r"'blocks.0.attn.q_proj'.*one dropout mask"), gk.rows(model.train(), names):
        pass
    near(mixed(model.eval(), x, names), alone(model, x, names))
    with gk.rows(model, names), pytest.raises(RuntimeError, match="one dropout mask"):
        model.train()(x)
