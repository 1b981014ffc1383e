"""A group of siblings: what it computes, when its members compute alone, and what it keeps and copies."""

import contextlib
import copy
import gc
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from glora_kernels import GLoRAConfig, GLoRALinear, reference
from glora_kernels.nn import siblings
from glora_kernels.nn.depth import KeptShift
from glora_kernels.nn.siblings import install, tied_sets
from glora_kernels.reference.tolerance import allowed_error, largest_error

LORA = GLoRAConfig.lora(rank=3, alpha=6)
RICH = GLoRAConfig("none", "lora", "lora", "vector", "constant", rank=2)
GROUPS = {
    "lora": [LORA] * 3,
    "rich": [RICH] * 2,
    "ragged": [
        GLoRAConfig("none", "lora", "vector", "constant", "none", rank=5, alpha=5),
        GLoRAConfig("none", "none", "none", "none", "vector"),
        LORA,
    ],
}
DROPS = GLoRAConfig.lora(rank=3, dropout=0.5)


@pytest.fixture
def calls(monkeypatch):
    """The number of members of every grouped call."""
    found = []
    grouped = siblings.grouped_call

    def counted(flat, layout, scales, dropout_p):
        found.append(len(scales))
        return grouped(flat, layout, scales, dropout_p)

    monkeypatch.setattr(siblings, "grouped_call", counted)
    return found


@pytest.fixture
def seeds(monkeypatch):
    """Every key of a dropout mask that is drawn, by a group or by a layer alone."""
    found = []
    draw = siblings.dropout_seed

    def drawn(device):
        found.append(draw(device))
        return found[-1]

    monkeypatch.setattr(siblings, "dropout_seed", drawn)
    monkeypatch.setattr("glora_kernels.nn.adapted.dropout_seed", drawn)
    return found


@pytest.fixture
def brood(randomize):
    """A function that builds layers on one input, with 7, 8, ... outputs, the first two in the layout of a Conv1D."""

    def build(configs, dtype=torch.float64, k=12, tied=False):
        layers = nn.ModuleDict()
        for i, config in enumerate(configs):
            layers[f"layer{i}"] = layer = GLoRALinear(k, 7 + i, config, bias=i != 1, dtype=dtype)
            if i < 2:
                layer.weight.data, layer._transposed = layer.weight.data.t().contiguous(), True
        randomize(layers)
        if tied:
            for layer in layers.values():
                layer.B_down = layers["layer0"].B_down
        return layers

    return build


def group_of(layers):
    return next(iter(layers.values()))._siblings


def waiting(layers):
    """Whether the group of the layers keeps anything for a later call."""
    group = group_of(layers)
    stores = (group._outputs, group._seeds, group._traced_outputs, group._traced_seeds)
    return any(store.pending is not None for store in stores)


def outputs(layers, x):
    return [layer(x) for layer in layers.values()]


def step(layers, x, dys, keeps=None):
    """Every output and gradient of the layers on one x, by themselves (or by the reference, with given masks)."""
    x = x.detach().clone().requires_grad_()
    if keeps is None:
        ys, leaves = outputs(layers, x), [layer.adapter() for layer in layers.values()]
    else:
        ys, leaves = [], []
        for layer, keep in zip(layers.values(), keeps, strict=True):
            leaves.append({name: p.detach().clone().requires_grad_() for name, p in layer.adapter().items()})
            weight = layer.weight.t() if layer._transposed else layer.weight
            ys.append(reference.glora_linear(x, weight, layer.bias, leaves[-1], layer.config, keep))
    wanted = [x, *{id(p): p for own in leaves for p in own.values()}.values()]
    grads = torch.autograd.grad(ys, wanted, dys)
    by_id = {id(p): grad for p, grad in zip(wanted, grads, strict=True)}
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": by_id[id(x)]}
    return found | {f"{name}{i}": by_id[id(p)] for i, own in enumerate(leaves) for name, p in own.items()}


def agree(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert largest_error(got[name], value) <= allowed_error(value, value, torch.float64), name


@pytest.mark.parametrize("configs", GROUPS.values(), ids=GROUPS.keys())
def test_values_and_gradients_are_those_of_the_reference_in_one_call(configs, brood, calls):
    layers = brood(configs)
    x, dys = torch.randn(2, 5, 12).double(), [torch.randn(2, 5, 7 + i).double() for i in range(len(configs))]
    expected = step(layers, x, dys, keeps=[None] * len(configs))
    agree(step(layers, x, dys), expected)
    assert not calls
    install(layers)
    for _ in range(2):
        agree(step(layers, x, dys), expected)
        assert not waiting(layers)
    assert calls == [len(configs)] * 2


def test_a_beta_computed_beforehand_takes_the_place_of_its_terms(brood):
    layers = brood([RICH] * 2)
    x = torch.randn(4, 12).double()
    expected, betas = outputs(layers, x), []
    for layer in layers.values():
        weight = layer.weight.t() if layer._transposed else layer.weight
        betas.append(reference.effective_bias(weight, layer.bias, layer.adapter(), RICH))
        layer._beta = KeptShift(layer, 3 * betas[-1].detach().requires_grad_())
    install(layers)
    for got, y, beta in zip(outputs(layers, x), expected, betas, strict=True):
        torch.testing.assert_close(got, y + 2 * beta, rtol=1e-12, atol=1e-12)


def masks(seeds, rows=6, k=12):
    return [reference.keep_mask(seed, rows, k, 0.5) for seed in seeds]


def test_every_sibling_draws_the_mask_it_would_draw_alone(brood, calls, seeds):
    layers = brood([DROPS] * 3)
    x, dys = torch.randn(6, 12).double(), [torch.randn(6, 7 + i).double() for i in range(3)]
    torch.manual_seed(1)
    alone = step(layers, x, dys)
    install(layers)
    torch.manual_seed(1)
    agree(step(layers, x, dys), alone)
    assert [int(seed) for seed in seeds[:3]] == [int(seed) for seed in seeds[3:]]
    assert len({int(seed) for seed in seeds}) == 3
    agree(step(layers, x, dys, keeps=masks(seeds[3:])), alone)
    layers.eval()
    outputs(layers, x)
    assert (len(seeds), calls) == (6, [3, 3])


@pytest.mark.parametrize("a", ["none", "vector"])
def test_tied_siblings_have_one_mask_in_one_call_and_alone(a, brood, calls, seeds):
    layers = brood([GLoRAConfig(a, "lora", "none", "none", "none", rank=3, dropout=0.5)] * 3, tied=True)
    x, dys = torch.randn(6, 12).double(), [torch.randn(6, 7 + i).double() for i in range(3)]
    assert tied_sets(layers) == []
    group = install(layers, fused=a == "none")
    assert group.tied
    assert tied_sets(layers) == [["layer0", "layer1", "layer2"]]
    for count in (1, 2):
        got = step(layers, x, dys)
        assert len(seeds) == count
        expected = step(layers, x, dys, keeps=masks(seeds[-1:] * 3))
        shared = sum(expected[f"B_down{i}"] for i in range(3))  # the reference's leaves are one each
        agree(got, expected | {f"B_down{i}": shared for i in range(3)})
    assert calls == ([3, 3] if a == "none" else [])
    assert not waiting(layers)


def merged(layers):
    layers["layer1"].merge()


def in_another_mode(layers):
    layers["layer1"].eval()


def offloaded(layers):
    layers["layer2"].to_empty(device="meta")


def disabled(layers):
    layers["layer1"]._disabled = (object(),)


def hooked(layers):
    for layer in layers.values():
        layer.register_full_backward_hook(lambda *_: None)  # gives the layer an alias of its input


@pytest.mark.parametrize("change", [merged, in_another_mode, offloaded, disabled, hooked])
def test_members_compute_alone_where_one_cannot_take_part(change, brood, calls):
    layers = brood([LORA] * 3).train(change is not merged)
    alone = copy.deepcopy(layers)
    install(layers)
    for some in (layers, alone):
        change(some)
    x = torch.randn(4, 12).double().requires_grad_()
    for name in ("layer0", "layer1"):
        assert torch.equal(layers[name](x), alone[name](x))
    assert not calls
    assert not waiting(layers)


def test_data_parallel_replicas_compute_alone_with_the_mask_of_their_siblings(brood, calls, seeds):
    layers = brood([DROPS] * 2, tied=True)
    install(layers)
    replicas = []
    for layer in layers.values():
        replicas.append(layer._replicate_for_data_parallel())
        for name, parameter in layer._parameters.items():
            setattr(replicas[-1], name, parameter)
    x = torch.randn(6, 12).double()
    got = [replica(x) for replica in replicas]
    assert (calls, len(seeds)) == ([], 1)
    for i, y in enumerate(got):
        torch.testing.assert_close(y, step(layers, x, got, keeps=masks(seeds[:1] * 2))[f"y{i}"])


def test_another_tensor_is_an_error_that_names_the_modules_and_leaves_nothing(brood, calls):
    layers = brood([LORA] * 3)
    q, k, v = layers.values()
    x, other = torch.randn(4, 12).double(), torch.randn(4, 12).double()
    expected = outputs(layers, other)
    install({"block.q_proj": q, "block.k_proj": k, "block.v_proj": v})
    q(x)
    with pytest.raises(RuntimeError, match=r"'block.v_proj' are grouped .* but 'block.k_proj' .* than 'block.q_proj'"):
        k(other)
    assert not waiting(layers)
    assert all(torch.equal(y, z) for y, z in zip(outputs(layers, other), expected, strict=True))
    assert calls == [3, 3]
    with pytest.raises(ValueError, match=r"\(4, 11\)"):
        q(torch.randn(4, 11).double())
    assert not waiting(layers)


def overwritten(layers, x):
    x.mul_(2)


def trained(layers, x):
    with torch.no_grad():
        layers["layer1"].B_up.add_(1)


def evaluated(layers, x):
    layers.eval()


@pytest.mark.parametrize("change", [overwritten, trained, evaluated])
def test_an_output_is_not_handed_out_after_something_changed(change, brood, calls):
    layers = brood([DROPS] * 2)
    install(layers)
    x = torch.randn(4, 12).double()
    layers["layer0"](x)
    change(layers, x)
    torch.manual_seed(5)
    got = layers["layer1"](x)
    torch.manual_seed(5)
    assert torch.equal(got, outputs(layers, x)[1])
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_an_output_is_not_handed_out_after_a_backward_of_the_group(grad, brood, calls):
    layers = brood([LORA] * 3)
    q, k, v = layers.values()
    x, other = torch.randn(2, 4, 12).double()
    install(layers)
    with torch.set_grad_enabled(grad):
        y = q(x)
    if not grad:
        y = v(other)
    y.sum().backward()
    k.B_up.data.add_(1)  # as a fused optimizer, which no counter of versions notices
    expected = copy.deepcopy(k)(x)
    with torch.set_grad_enabled(grad):
        assert torch.equal(k(x), expected)
    assert calls == [3, 3] if grad else [3, 3, 3]


def test_a_member_called_alone_with_a_tensor_that_lives_on_is_no_error_later(brood, calls):
    layers = brood([LORA] * 3)
    k, v = layers["layer1"], layers["layer2"]
    x, prefix = torch.randn(2, 4, 12).double()
    expected = outputs(layers, x)
    install(layers)
    kept = k(prefix), v(prefix)
    assert all(torch.equal(y, z) for y, z in zip(outputs(layers, x), expected, strict=True))
    assert calls == [3, 3]
    assert not waiting(layers)
    assert kept[0].shape == (4, 8)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_tied_siblings_that_read_different_inputs_are_an_error_in_training(dropout, brood):
    layers = brood([GLoRAConfig.lora(rank=3, dropout=dropout)] * 2, tied=True)
    q, k = layers.values()
    x, other = torch.randn(2, 4, 12).double()
    install(layers, fused=False)
    q(x)
    with pytest.raises(RuntimeError, match=r"'layer1' are tied as siblings \(tie_siblings=True\).*; name other proj"):
        k(other)
    assert not waiting(layers)
    with torch.no_grad() if dropout == 0 else contextlib.nullcontext():
        layers.train(dropout == 0)
        q(x)
        k(other)
    assert not waiting(layers)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_an_output_is_not_handed_out_in_another_mode(mode, brood, calls):
    layers = brood([LORA] * 2, dtype=torch.float32)
    install(layers)
    x = torch.randn(4, 12)
    first = layers["layer0"](x)
    with mode():
        second = layers["layer1"](x)
        assert torch.equal(layers["layer0"](x).float(), first) == (second.dtype == torch.float32)
    assert calls == [2, 2]
    assert not waiting(layers)


def test_what_was_computed_for_a_tensor_that_is_gone_is_dropped(brood, calls):
    layers = brood([LORA] * 2)
    q, k = layers.values()
    x = torch.randn(4, 12).double()
    expected = outputs(layers, x)
    install(layers)
    with torch.no_grad():
        q(torch.randn(4, 12).double())
        gc.collect()
        assert torch.equal(k(x), expected[1])
        assert torch.equal(q(x), expected[0])
    assert calls == [2, 2]
    assert not waiting(layers)


def test_threads_do_not_see_each_others_inputs(brood, calls):
    layers = brood([LORA] * 2)
    q, k = layers.values()
    here, there = torch.randn(4, 12).double(), torch.randn(3, 12).double()
    expected = k(here), k(there)
    install(layers)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(q, there).result()
        q(here)
        assert torch.equal(thread.submit(k, there).result(), expected[1])
        assert torch.equal(k(here), expected[0])
    assert calls == [2, 2]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_the_group_of_a_copy_is_of_the_copies(how, brood, calls):
    layers = brood([LORA] * 3)
    group = install(layers)
    x = torch.randn(4, 12).double()
    layers["layer0"](x)  # what waits is not copied
    if how == "deepcopy":
        other = copy.deepcopy(layers)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layers))
    else:
        buffer = io.BytesIO()
        torch.save(layers, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert group_of(other).members == list(other.values())
    assert group_of(other).names == group.names
    assert not group_of(other).tied
    assert tied_sets(other) == []
    assert not waiting(other)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_()
    assert all(y.ne(0).all() for y in outputs(other, x))
    assert calls == [3, 3]


def test_a_copy_of_one_layer_computes_alone_and_copies_nothing_else(brood, calls):
    layers = brood([LORA] * 3)
    x = torch.randn(4, 12).double()
    expected = outputs(layers, x)
    group = install(layers)
    deep, shallow = copy.deepcopy(layers["layer1"]), copy.copy(layers["layer1"])
    assert deep._siblings.members == [None, deep, None]
    assert group.members == list(layers.values())
    assert torch.equal(deep(x), expected[1])
    assert torch.equal(shallow(x), expected[1])
    assert not calls


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_no_worse_than_alone_and_gradients_keep_their_dtype(autocast, brood, calls):
    layers = brood([RICH] * 3, k=64)
    x = torch.randn(16, 64).double()
    exact = outputs(layers, x)
    for layer in layers.values():
        layer.float()
        if not autocast:
            layer.weight.data = layer.weight.data.bfloat16()
    x = x.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        alone = outputs(layers, x)
        install(layers)
        ys = outputs(layers, x)
    for y, other, truth in zip(ys, alone, exact, strict=True):
        assert y.dtype == torch.bfloat16
        assert largest_error(y, truth) <= allowed_error(truth.detach(), other, torch.bfloat16)
    sum(y.float().sum() for y in ys).backward()
    assert {p.grad.dtype for layer in layers.values() for p in layer.adapter().values()} == {torch.float32}
    assert calls == [3]


class Block(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        first, *others = outputs(self.layers, x.tanh())
        return first.sum(-1) + sum(other.cos().sum(-1) for other in others)


def compiled(module, **kwargs):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "grouped_lora" in str(node.target)])
        return graph

    return torch.compile(module, fullgraph=True, backend=backend), graphs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_as_one_graph_with_one_grouped_call(brood):
    layers = brood([RICH] * 3)
    block, x = Block(layers), torch.randn(5, 12).double()
    expected = block(x)
    wanted = [p for layer in layers.values() for p in layer.adapter().values()]
    grads = torch.autograd.grad(expected.sum(), wanted)
    install(layers)
    function, graphs = compiled(block)
    for _ in range(2):
        y = function(x)
        torch.testing.assert_close(y, expected)
        for got, grad in zip(torch.autograd.grad(y.sum(), wanted), grads, strict=True):
            torch.testing.assert_close(got, grad)
    assert [len(graph) for graph in graphs] == [1]
    assert not waiting(layers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("a", ["none", "vector"])
def test_tied_siblings_have_one_mask_under_compile(a, brood):
    layers = brood([GLoRAConfig(a, "lora", "none", "none", "none", rank=3, dropout=0.5)] * 2, tied=True)
    with torch.no_grad():
        for name, parameter in layers["layer1"].named_parameters():
            if name != "B_down":  # the layers differ in their number of outputs alone
                other = layers["layer0"].get_parameter(name)
                parameter[tuple(slice(size) for size in other.shape)] = other
        layers["layer0"].bias.zero_()
    install(layers, fused=a == "none")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return [layer(x) for layer in self.layers.values()]

    function, graphs = compiled(Both())
    x = torch.randn(5, 12).double()
    first, second = function(x)
    assert torch.allclose(first, second[:, :7])
    assert not torch.allclose(function(x)[0], first), "dropout is on"
    assert [len(graph) for graph in graphs] == [1 if a == "none" else 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_graph_hands_no_output_out_in_another_mode(mode, brood):
    layers = brood([LORA] * 2, dtype=torch.float32)
    q, k = layers.values()
    x = torch.randn(4, 12)
    expected = k(x)
    install(layers)

    def both(x):
        with mode():
            first = q(x)
        return first, k(x)

    function, graphs = compiled(both)
    second = function(x)[1]
    assert second.requires_grad
    assert second.dtype == torch.float32
    torch.testing.assert_close(second, expected)
    assert [len(graph) for graph in graphs] == [2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_graph_leaves_is_not_used_by_another_and_no_error(brood):
    layers = brood([LORA] * 2)
    q, k = layers.values()
    x, other = torch.randn(2, 4, 12).double()
    install(layers)
    first, _ = compiled(lambda x: q(x))
    second = torch.compile(lambda x: k(x), fullgraph=True, backend="eager")
    first(x)
    with torch.no_grad():
        k.B_up.add_(1)
    torch.testing.assert_close(second(x), copy.deepcopy(k)(x))
    first(x)
    torch.testing.assert_close(second(other), copy.deepcopy(k)(other))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="'layer1' was called with another tensor than 'layer0'"):
        compiled(lambda x, y: (q(x), k(y)))[0](x, other)


REFUSED = {
    "one": ([LORA], {}, "2 to 64 members, got 1"),
    "A": ([LORA, GLoRAConfig()], {}, "'layer1' has A='vector'; A must be 'none'"),
    "B": ([LORA, GLoRAConfig("none", "constant")], {}, "'layer1' has B='constant'"),
    "dropout": ([LORA, DROPS], {}, "dropout differs: 0.0 of 'layer0', 0.5 of 'layer1'"),
    "adapter_dtype": (
        [LORA] * 2,
        {"adapter_dtype": torch.float32},
        "adapter_dtype differs: torch.float64 of 'layer0', torch.float32 of 'layer1'; give adapter_dtype in inject",
    ),
    "in_features": ([LORA] * 2, {"k": 5}, "in_features differs: 12 of 'layer0', 5 of 'layer1'"),
    "dtype": ([LORA] * 2, {"dtype": torch.float32}, "the dtype differs: torch.float64 of 'layer0', torch.float32"),
    "device": ([LORA] * 2, {"device": "meta"}, "the device differs: cpu of 'layer0', meta of 'layer1'"),
}


@pytest.mark.parametrize(("configs", "other", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_layers_that_are_no_group_are_refused_by_name(configs, other, reason, brood):
    layers = brood(configs)
    if other:
        sizes = {"k": 12, "dtype": torch.float64, "device": "cpu"} | other
        layers["layer1"] = GLoRALinear(sizes.pop("k"), 8, configs[1], bias=False, **sizes)
    with pytest.raises(ValueError, match=reason):
        install(layers)
    assert all(layer._siblings is None for layer in layers.values())


def test_a_layer_is_in_one_group(brood):
    layers = brood([LORA] * 3)
    q, k, v = layers.values()
    install({"q": q, "k": k})
    with pytest.raises(ValueError, match=r"\['k'\] are in a group"):
        install({"k": k, "v": v})
    with pytest.raises(ValueError, match="twice"):
        install({"v": v, "w": v})
    with pytest.raises(TypeError, match="'w' must be a GLoRALinear, got Linear"):
        install({"v": v, "w": nn.Linear(12, 4)})
    assert v._siblings is None
    assert "siblings=2" in repr(q)
