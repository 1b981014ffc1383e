"""`batch_invariant`: a row's bits are its own, whatever else is in the call; each test compares within one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import mixed
from groups import build
from helpers import compiled, interpreted, problem
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import glora_kernels as gk
from glora_kernels.ops import glora_linear, multi_glora_linear
from glora_kernels.quant import quantize_weight
from glora_kernels.runtime import routes
from glora_kernels.runtime.launch import Launch
from glora_kernels.runtime.program import launching
from glora_kernels.runtime.routes import backend, batch_invariant
from glora_kernels.spec import GLoRAConfig
from glora_kernels.tools import planned

pytestmark = pytest.mark.usefixtures("poison")
CONFIGS = [
    GLoRAConfig("none", "none", "none", "none", "none"), GLoRAConfig.lora(3, 6.0),
    GLoRAConfig.lora(1, 3.0, dropout=0.3),
    GLoRAConfig("vector", "lora", "vector", "vector", "vector", 5, 2.0),
    GLoRAConfig("lora", "lora", "none", "none", "constant", 2),
    GLoRAConfig("constant", "vector", "lora", "none", "none", 1), GLoRAConfig("none", "none", "none", "none", "vector"),
    GLoRAConfig("lora", "lora", "vector", "constant", "none", 3, variant="matmul", dropout=0.2),
]  # fmt: skip
ROWS = [0, 2, 1, -1, 3, 3, 3, 2, 7, 0, 6, 1, -1, 2, 5, 4, 6, 7, 7, 1, 1]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def keywords(p):
    own = {name.lower(): tensor for name, tensor in p.params.items()}
    own |= {"scale": p.config.scale, "variant": p.config.variant}
    return own if p.seed is None else {**own, "dropout_p": p.config.dropout, "seed": p.seed}


def both(x, dy, call):
    """y and dx; y once more, without gradients, has the same bits."""
    x = x.detach().requires_grad_()
    y = call(x)
    with torch.no_grad():
        assert torch.equal(call(x), y)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def rows_alone(x, dy, call):
    each = [both(x[m : m + 1], dy[m : m + 1], call) for m in range(len(x))]
    return tuple(map(torch.cat, zip(*each, strict=True)))


def equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_row_has_the_same_bits_anywhere(config, dtype):
    """Among the first m rows, as dropout goes by the number of a row; without dropout at any place."""
    p = problem(config, (19,), k=37, n=70, dtype=dtype, seed=1)

    def call(x):
        return glora_linear(x, p.weight, p.bias, **keywords(p))

    with batch_invariant():
        whole = both(p.x, p.dy, call)
        for m in (1, 3, 7):
            equal(both(p.x[:m], p.dy[:m], call), [t[:m] for t in whole])
        equal(both(p.x.view(1, 19, 37), p.dy.view(1, 19, 70), call), [t[None] for t in whole])
        wide = torch.zeros(19, 2 * 37 + 1, dtype=dtype)
        wide[:, 1::2] = p.x
        equal(both(wide[:, 1::2], p.dy.t().contiguous().t(), call), whole)
        if p.seed is None:
            order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
            equal(both(p.x[order], p.dy[order], call), [t[order] for t in whole])
            equal(rows_alone(p.x, p.dy, call), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_a_blas_tells_places_apart(dtype):
    """An odd depth and many columns: a row of float64 may have other bits at another place of the same eight."""
    p = problem(GLoRAConfig.lora(3, 6.0), (8,), k=37, n=1000, dtype=dtype)

    def call(x):
        return glora_linear(x, p.weight, p.bias, **keywords(p))

    with batch_invariant():
        equal(rows_alone(p.x, p.dy, call), both(p.x, p.dy, call))


@pytest.mark.parametrize("adapters", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_adapters_have_the_bits_of_each_alone(dtype, adapters):
    p = mixed(CONFIGS, ROWS, k=37, n=70, dtype=dtype, adapters=adapters, size=0.1)
    with batch_invariant():
        found, wanted = p.ours(), p.loop()
        if adapters is None:
            p.check(found, dtype)
        ordered = mixed(CONFIGS, sorted(j for j in ROWS if j >= 0), k=37, n=70, dtype=dtype, adapters=adapters)
        by_index = ordered.ours()
        ordered.lengths = torch.bincount(ordered.rows, minlength=len(CONFIGS)).tolist()
        equal(ordered.ours().values(), by_index.values())
    found.pop("dbias"), wanted.pop("dbias")  # of all adapters: a sum over them
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def test_a_stack_has_the_bits_of_separate_tensors():
    """Views at any address, with the rows of a padded rank."""
    p = mixed([GLoRAConfig.lora(3, 6.0)] * 3, [0, 1, 2, 1, 1, 0], k=37, n=70, dtype=torch.float32)
    ups, downs = ([each[name].detach() for each in p.adapters] for name in ("B_up", "B_down"))
    stack = {"b_up": torch.zeros(3, 70, 5), "b_down": torch.zeros(3, 5, 37), "ranks": [3] * 3, "scale": 2.0}
    for j in range(3):
        stack["b_up"][j, :, :3], stack["b_down"][j, :3] = ups[j], downs[j]
    apart = [{"b_up": up, "b_down": down, "scale": 2.0} for up, down in zip(ups, downs, strict=True)]
    with batch_invariant():
        equal(
            [multi_glora_linear(p.x, p.weight, p.bias, stack, p.rows)],
            [multi_glora_linear(p.x, p.weight, p.bias, apart, p.rows)],
        )


@pytest.mark.parametrize("double_quant", [False, True])
def test_over_4_bits(double_quant):
    p = mixed(CONFIGS[:5], [0, 1, 2, 1, 4, 3, -1, 2, 3, 3], k=64, n=70, dtype=torch.bfloat16, size=0.1)
    p.weight = quantize_weight(p.weight, "nf4", double_quant=double_quant)
    with batch_invariant():
        found, wanted = p.ours(), p.loop()
        assert [name for name in found if name != "dbias" and not torch.equal(found[name], wanted[name])] == []
        equal(
            rows_alone(p.x, p.dy, lambda x: glora_linear(x, p.weight)),
            both(p.x, p.dy, lambda x: glora_linear(x, p.weight)),
        )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_siblings_have_the_bits_that_each_has_alone(dtype, dropout):
    group = build((33, 16, 70), k=37, dropout=dropout, dtype=dtype)
    with batch_invariant():
        found = group.ours()
        group.check(found, dtype)
        for i, (y, alone) in enumerate(zip(group.call(), group.loop(), strict=True)):
            assert torch.equal(y, alone), i
        if not dropout:
            part = replace(group, xs=[group.xs[0][2:5]] * 3, dys=[dy[2:5] for dy in group.dys])
            (dx,) = torch.autograd.grad(part.call(), part.xs[0], part.dys)
            assert torch.equal(dx, found["xs[0]"][2:5])


def test_under_autocast_and_through_the_registered_operators():
    p = mixed(CONFIGS, ROWS, k=37, n=70, dtype=torch.float32, size=0.1)
    with batch_invariant():
        with torch.autocast("cpu", torch.bfloat16):
            rows = torch.cat(
                [p.call()[:0], *(replace(p, x=p.x[m : m + 1], rows=p.rows[m : m + 1]).call() for m in (0, 2, 5))]
            )
            assert torch.equal(rows, p.call()[[0, 2, 5]])
            assert rows.dtype == torch.bfloat16
        plain = p.ours()
        with FlopCounterMode(display=False):
            watched = p.ours()
        equal(watched.values(), plain.values())


def test_a_compiled_call_keeps_the_mode_it_was_compiled_in():
    p = problem(CONFIGS[3], (6,), k=37, n=70, dtype=torch.float32)

    def call(x):
        return glora_linear(x, p.weight, p.bias, **keywords(p))

    run = compiled("aot_eager")(call)
    outside = run(p.x)
    with batch_invariant():
        inside = run(p.x)
        assert torch.equal(inside, torch.cat([run(p.x[m : m + 1]) for m in range(6)]))
        assert torch.equal(inside, call(p.x))
    assert torch.equal(run(p.x), outside)


# Layers


def model(*configs):
    torch.manual_seed(0)
    layers = [gk.GLoRALinear(37, 70, config=config) for config in configs]
    for parameter in (p for each in layers for p in each.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    return layers


@pytest.mark.parametrize("state", ["trained", "merged", "disabled"])
def test_layers(state):
    (layer,) = model(CONFIGS[3])
    x, dy = torch.randn(9, 37), torch.randn(9, 70)
    if state == "merged":
        gk.merge(layer.eval())
    with batch_invariant():
        if state == "disabled":
            with gk.disabled(layer):
                equal(rows_alone(x, dy, layer), both(x, dy, layer))
        else:
            equal(rows_alone(x, dy, layer), both(x, dy, layer))


def test_factors_shared_over_depth_and_left_to_the_end_of_backward():
    first, second = model(GLoRAConfig.lora(3, 6.0), GLoRAConfig.lora(3, 6.0))
    second.B_down = first.B_down
    both_layers = torch.nn.ModuleList([first, second])
    x, dy = torch.randn(9, 37), torch.randn(9, 70)

    def call(x):
        return first(x) + second(x)

    with batch_invariant():
        wanted = both(x, dy, call)
        with gk.deferred_shared_grads(both_layers):
            equal(both(x, dy, call), wanted)
            equal(rows_alone(x, dy, call), wanted)


def test_the_choice_is_that_of_forward():
    p = problem(CONFIGS[1], (8,), k=37, n=70, dtype=torch.float32)

    def call(x):
        return glora_linear(x, p.weight, p.bias, **keywords(p))

    x = p.x.requires_grad_()
    with batch_invariant():
        wanted = both(p.x, p.dy, call)[1]
        y = call(x)
    assert torch.equal(torch.autograd.grad(y, x, p.dy)[0], wanted)


def test_nesting_and_exceptions():
    assert not routes.invariant()
    with batch_invariant():
        with batch_invariant(), backend("eager"):
            assert routes.route("cpu", torch.float32) == "eager invariant"
        assert routes.invariant()
    with pytest.raises(KeyError), batch_invariant():
        raise KeyError
    assert not routes.invariant()
    assert routes.route("cpu", torch.float32) == "eager"


def test_what_runs_as_operations_of_pytorch_is_refused():
    p = problem(CONFIGS[1], (8,), k=37, n=70)

    def call(x):
        return glora_linear(x, p.weight, p.bias, **keywords(p))

    with batch_invariant():
        with pytest.raises(RuntimeError, match=r"torch\.func.*leave batch_invariant"):
            torch.func.vmap(call)(p.x)
        y = call(p.x.requires_grad_())
        with pytest.raises(RuntimeError, match=r"batched gradients.*leave batch_invariant"):
            torch.autograd.grad(y, p.x, torch.stack([p.dy, p.dy]), is_grads_batched=True)


# Kernels


def steps(m, layer, **how):
    found = planned.linear(layer, planned.How(m, torch.bfloat16, "sm_90", route="triton invariant", **how))
    return [*found.forward, *found.backward]


def forms(launches):
    """What is compiled and how: everything of a launch but its grid, M and what has memory."""
    return [
        (
            one.kernel.__name__,
            {name: value for name, value in one.args.items() if name.isupper() and name != "M"},
            one.options,
        )
        for one in launches
    ]


@pytest.mark.parametrize("quant_type", ["", "nf4"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_every_m_has_the_same_kernels_and_none_of_the_vendor(config, training, quant_type):
    layer = planned.Linear(config, 4096, 4096, bias=config.D != "none", quant_type=quant_type)
    first, *others = ([*steps(m, layer, training=training)] for m in (1, 7, 512, 8192))
    assert all(isinstance(one, Launch) for one in first)
    for each in others:
        assert forms(each) == forms(first)


@pytest.fixture
def as_on_a_card(monkeypatch):
    """Every number of a product is a sum of its own, in one order; numpy's depend on the place in the tile."""
    from triton.runtime import interpreter

    def dot(self, a, b, acc, *_):
        value = acc.data + (a.data[:, :, None] * b.data[None, :, :]).sum(axis=1, dtype=acc.data.dtype)
        return interpreter.TensorHandle(value, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@interpreted
@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("config", [CONFIGS[1], *CONFIGS[3:5], CONFIGS[7]], ids=str)
def test_interpreted_kernels(config):
    p = problem(replace(config, dropout=0.0), (37,), k=70, n=33, dtype=torch.float32)

    def call(x):
        return glora_linear(x, p.weight, p.bias, **keywords(p))

    with batch_invariant(), backend("triton"):
        whole = both(p.x, p.dy, call)
        equal(both(p.x[5:6], p.dy[5:6], call), [t[5:6] for t in whole])
        equal(both(p.x[30:], p.dy[30:], call), [t[30:] for t in whole])
        with launching(cached=False):
            equal(both(p.x[:3], p.dy[:3], call), [t[:3] for t in whole])


@interpreted
@pytest.mark.usefixtures("as_on_a_card")
def test_interpreted_kernels_of_mixed_adapters_and_siblings():
    p = mixed(CONFIGS, ROWS, k=40, n=33, dtype=torch.float32, size=0.1)
    group = build((33, 16), k=40, dtype=torch.float32)
    with batch_invariant(), backend("triton"):
        found, wanted = p.ours(), p.loop()
        assert [name for name in found if name != "dbias" and not torch.equal(found[name], wanted[name])] == []
        equal(group.call(), group.loop())
        group.check(group.ours("triton"), torch.float32)


def test_in_batch_invariant_a_mixed_step_has_the_bits_of_separate_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 80), nn.ReLU(), nn.Linear(80, 70), nn.ReLU(), nn.Linear(70, 50))
    gk.inject(model, gk.GLoRAConfig.lora(rank=4), ["0", "2", "4"])
    forms = [
        gk.GLoRAConfig(rank=2), gk.GLoRAConfig.lora(rank=3, alpha=6), gk.GLoRAConfig("none", "vector", E="vector"),
        gk.GLoRAConfig("lora", "lora", "vector", "vector", "vector", rank=2),
    ]  # fmt: skip
    for place, config in enumerate([*forms, *forms[:3]]):
        gk.add_adapter(model, f"a{place}", config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.2)
    names = gk.adapters(model)
    owners = [names[place] for place in torch.randint(len(names), (24,)).tolist()]
    x = torch.randn(24, 5, 60)
    found = []
    with gk.batch_invariant():
        for parts in ([range(24)], [[i for i, own in enumerate(owners) if own == name] for name in names]):
            for part in filter(len, parts):
                with gk.rows(model, [owners[i] for i in part]):
                    model(x[list(part)]).square().sum((1, 2)).sum().backward()
            found.append([parameter.grad for parameter in trained])
            model.zero_grad(set_to_none=True)
    together, apart = found
    for left, right in zip(together, apart, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)
