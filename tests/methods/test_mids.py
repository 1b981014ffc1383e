"""Maps on h between the factors, against their formulas by the letter, with gradients."""

import copy

import pytest
import torch
from method_nets import (
    ALL_LOW_RANK,
    LORA,
    PATHS,
    X,
    adam,
    at_every_line,
    forward,
    layers,
    net,
    plain,
    random_,
    state,
    step,
    trained,
    unchanged,
)
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, ShareLoRAConfig

TASKS, UPS, TAU = 3, 2, 0.5


def with_mids(kind, config=LORA, **options):
    """A model with maps of random parameters."""
    model = net(config)
    gk.set_mid(model, kind, **options)
    return random_(model, 3)


def with_tasks(config=LORA):
    return with_mids("tasks", config, tasks=TASKS, ups=UPS, temperature=TAU)


def gain(layer, mid, task=None):
    g = 4 * torch.exp(mid.z / 0.1) / torch.exp(mid.z / 0.1).sum()
    return 2 * layer.B_up @ torch.diag(g) @ layer.parametrizations.B_down.original


def gate(layer, mid, task=None):
    return 2 / (1 + torch.exp(-mid.a)) * layer.B_up @ layer.parametrizations.B_down.original


def of_task(layer, mid, task):
    w = torch.exp(mid.theta[task] / TAU) / torch.exp(mid.theta[task] / TAU).sum()
    up = sum(w[i] * layer.B_up[:, 4 * i : 4 * i + 4] for i in range(UPS))
    return 2 * up @ mid.lambdas[task] @ layer.parametrizations.B_down.original


def literal(model, change, task=None, x=X):
    found = gk.mids(model)
    weights = {
        path: (layer.weight + change(layer, found[path], task), layer.bias) for path, layer in layers(model).items()
    }
    return forward(weights, x)


def same_with_gradients(model, got, expected):
    """Two outputs are equal, and so are the gradients of all that is trained."""
    dy = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(y, trained(model), dy, allow_unused=True) for y in (got, expected)]
    for name, a, b in zip([n for n, p in model.named_parameters() if p.requires_grad], *grads, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.allclose(a, b, rtol=1e-11, atol=1e-12), name
        assert a is None or a.any(), name


@pytest.mark.parametrize(("kind", "change", "options"), [("gain", gain, {"temperature": 0.1}), ("gate", gate, {})])
def test_one_map_for_all_rows(kind, change, options):
    model = with_mids(kind, **options)
    same_with_gradients(model, model(X), literal(model, change))
    saved = literal(model, change).detach()
    merged, twin = copy.deepcopy(model).eval(), copy.deepcopy(model)
    gk.merge(merged)
    assert torch.allclose(merged(X), saved, rtol=1e-12)
    gk.unmerge(merged)
    assert torch.equal(merged(X), model(X))
    gk.fold_mids(model)
    assert gk.mids(model) == {}
    assert [type(layer).__name__ for layer in layers(model).values()] == ["GLoRALinear"] * 4
    assert torch.allclose(model(X), saved, rtol=1e-12)
    assert torch.equal(twin(X), merged(X))  # a copy keeps its maps
    with gk.disabled(model):
        assert torch.equal(model(X), plain()(X))


def test_maps_of_layers_with_other_low_rank_supports_change_b_alone():
    model = with_mids("gain", ALL_LOW_RANK)
    layer = layers(model)["layers.0.q"]
    mid, down = gk.mids(model)["layers.0.q"], layer.parametrizations.B_down.original
    w = layer.weight + layer.weight * (layer.A_up @ layer.A_down)
    w = w + 1.5 * layer.B_up @ torch.diag(4 * torch.softmax(mid.z / 0.05, 0)) @ down
    b = layer.bias + layer.bias * layer.D + layer.E + layer.weight @ (layer.C_up @ layer.C_down).flatten()
    assert torch.allclose(layer(X), X @ w.t() + b, rtol=1e-12)


@pytest.mark.parametrize("task", range(TASKS))
def test_one_task(task, tmp_path):
    model = with_tasks()
    expected = literal(model, of_task, task).detach()
    with gk.tasks(model, task):
        same_with_gradients(model, model(X), literal(model, of_task, task))
        gk.save_adapter(model, tmp_path / "a.safetensors")
    merged = copy.deepcopy(model).eval()
    with gk.tasks(merged, task):
        gk.merge(merged)
    assert torch.allclose(merged(X), expected, rtol=1e-12)  # needs no context any more
    loaded = gk.load_adapter(plain(), tmp_path / "a.safetensors")
    assert torch.allclose(loaded(X), expected, rtol=1e-12)
    assert all(layer.config.rank == 4 * UPS for layer in layers(loaded).values())
    with gk.tasks(model, task):
        gk.fold_mids(model)
    assert torch.allclose(model(X), expected, rtol=1e-12)
    step(model, adam(model, 0))


@pytest.mark.parametrize("ids", [[2, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 2, 0, 2, 0]])
def test_a_mixed_batch_is_each_row_under_its_task(ids):
    model = with_tasks()
    with gk.tasks(model, torch.tensor(ids)):
        got = model(X)
    expected = torch.stack([literal(model, of_task, task, row) for task, row in zip(ids, X, strict=True)])
    dy = torch.randn(got.shape, dtype=torch.float64)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    for name, p in model.named_parameters():
        if p.requires_grad:
            (a,), (b,) = (torch.autograd.grad(y, p, dy, retain_graph=True) for y in (got, expected))
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12), name
            assert a.any(), name


def test_ids_of_examples_and_of_rows():
    model = with_tasks(GLoRAConfig("vector", "lora", "vector", "vector", "vector", rank=4, alpha=8))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    of_rows = torch.tensor([[0, 2, 1], [1, 1, 0]])
    alone = []
    for task in range(TASKS):
        with gk.tasks(model, task):
            alone.append(model(x))
    for ids in (torch.tensor([2, 1]), torch.tensor([2, 1], dtype=torch.int32), of_rows):
        with gk.tasks(model, ids):
            got = model(x)
        each = ids.long() if ids.ndim == 2 else ids.long()[:, None].expand(2, 3)
        expected = sum((each == task)[..., None] * alone[task] for task in range(TASKS))
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    with gk.tasks(model, torch.tensor([], dtype=torch.int64)):
        assert model(x[:0]).shape == (0, 3, 6)


def test_what_begins_as_lora():
    model = net()
    expected = model(X)
    gk.set_mid(model, "gain")
    assert torch.allclose(model(X), expected, rtol=1e-14)
    gk.fold_mids(model)
    mids = gk.set_mid(model, "tasks", tasks=2, ups=1)
    assert all(torch.equal(mid.lambdas[0], torch.eye(4)) for mid in mids.values())
    for ids in (0, 1, torch.tensor([0, 1, 1, 0, 0])):
        with gk.tasks(model, ids):
            assert torch.allclose(model(X), expected, rtol=1e-14)
    with gk.tasks(model, 0):
        gk.fold_mids(model)
    gk.set_mid(model, "tasks", tasks=2, ups=3)  # three copies of each U, whose weights add up to 1
    with gk.tasks(model, 1):
        assert torch.allclose(model(X), expected, rtol=1e-13)
        gk.fold_mids(model)
    assert all(layer.config.scale == 2 for layer in layers(model).values())
    gk.set_mid(model, "gate")
    layer = layers(model)["layers.0.q"]
    half = X @ (layer.weight + layer.B_up @ layer.parametrizations.B_down.original).t() + layer.bias
    assert torch.allclose(layer(X), half, rtol=1e-12)


def test_training_compiled_copied_saved_and_functional():
    torch._dynamo.reset()
    model = with_tasks()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    for ids in (0, torch.tensor([0, 1, 2, 1, 0])):
        with gk.tasks(model, ids):
            assert torch.allclose(compiled(X), model(X), atol=1e-14)
            step(model, optimizer)
            inside = copy.deepcopy(model)
    twin = with_tasks()
    twin.load_state_dict(model.state_dict())
    values = {name: p.detach() for name, p in model.named_parameters()}
    for one in (copy.deepcopy(model), twin, inside):
        ids = torch.tensor([2, 2, 1, 0, 0])
        with gk.tasks(one, ids), gk.tasks(model, ids):
            assert torch.equal(one(X), model(X))
            assert torch.equal(torch.func.functional_call(one, values, (X,)), model(X))
    with gk.tasks(model, 1):
        assert torch.allclose(torch.vmap(model)(X), model(X), atol=1e-13)


def test_dropout_is_on_x_and_gone_in_eval_mode():
    model = net(GLoRAConfig.lora(4, 8, dropout=0.5))
    gk.set_mid(model, "tasks", tasks=2, ups=2)
    ids = torch.tensor([0, 1, 1, 0, 0])
    with gk.tasks(model, ids):
        torch.manual_seed(0)
        first = model(X)
        torch.manual_seed(0)
        assert torch.equal(model(X), first)
        assert not torch.equal(model(X), first)
        model.eval()
        assert torch.equal(model(X), model(X))


def test_a_copy_is_outside_of_the_context():
    model = with_tasks()
    with gk.tasks(model, torch.tensor([0, 1, 2, 0, 1])):
        twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="was not told which"):
        twin(X)


def test_outside_of_the_context_and_in_wrong_ones():
    model = with_tasks()
    for act in (lambda: model(X), lambda: gk.merge(model.eval()), lambda: gk.fold_mids(model)):
        before = state(model)
        with pytest.raises(RuntimeError, match=r"3 tasks, and was not told which.*with gk\.tasks"):
            act()
        assert unchanged(before, state(model))
    with gk.disabled(model):
        assert torch.equal(model(X), plain()(X))
    ids = torch.zeros(5, dtype=torch.int64)
    for outer in (0, ids):
        with gk.tasks(model, outer):
            for inner in (1, ids), (1, 1):
                with pytest.raises(RuntimeError, match=r"tasks\(\) was called inside tasks|inside rows"):
                    gk.tasks(model, inner[1]).__enter__()
            model(X)
    with gk.tasks(model, ids), pytest.raises(RuntimeError, match="was not told which"):
        gk.merge(model)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (3, ValueError, "ids must be from 0 to 2, for the model has 3 tasks; got 3 to 3"),
        (-1, ValueError, "ids must be from 0 to 2"),
        (torch.tensor([0, 1, 7]), ValueError, "got 0 to 7"),
        (torch.tensor([-1, 1]), ValueError, "got -1 to 1"),
        (True, TypeError, "got bool"),
        (torch.tensor([0.0]), TypeError, "ids must be integers, got torch.float32"),
        (torch.tensor([True]), TypeError, "ids must be integers, got torch.bool"),
        ([0, 1], TypeError, "got list"),
        ("a", TypeError, "got str"),
    ],
)
def test_ids_that_are_none(ids, error, message):
    model = with_tasks()
    with pytest.raises(error, match=message):
        gk.tasks(model, ids).__enter__()
    with gk.tasks(model, 1):
        model(X)


def test_ids_for_another_batch_name_the_layer():
    model = with_tasks()
    with gk.tasks(model, torch.tensor([0, 1])), pytest.raises(ValueError, match=r"tasks: ids .*\(2,\).*'layers\.0\.q'"):
        model(X)
    with pytest.raises(ValueError, match=r"tasks: no layer has a map.*set_mid\(model, 'tasks'"):
        gk.tasks(net(), 0).__enter__()


def tied(share):
    return random_(gk.inject(plain(), ShareLoRAConfig(rank=4, alpha=8, share=share)))


@pytest.mark.parametrize(
    ("make", "kind", "options", "error", "message"),
    [
        (net, "scale", {}, ValueError, "kind must be one of 'gain', 'gate', 'tasks'; got 'scale'"),
        (net, "gain", {"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        (net, "tasks", {"tasks": 0}, ValueError, "tasks must be an integer >= 1, got 0"),
        (net, "tasks", {"tasks": 2, "ups": 1.5}, ValueError, "ups must be an integer >= 1, got 1.5"),
        (net, "tasks", {}, TypeError, "tasks"),
        (net, "gain", {"tau": 1.0}, TypeError, "tau"),
        (plain, "gain", {}, ValueError, "set_mid: the model has no low-rank adapter"),
        (lambda: with_mids("gate"), "gain", {}, ValueError, r"'layers\.0\.q' has a map already; call fold_mids"),
        (with_tasks, "gain", {}, ValueError, r"'layers\.0\.q' has a map already; call fold_mids"),
        (lambda: tied("A"), "gain", {}, ValueError, r"'layers\.0\.q' and 'layers\.1\.q' share a factor.*share='none'"),
        (lambda: tied("B"), "tasks", {"tasks": 2}, ValueError, r"'layers\.0\.q' and 'layers\.1\.q' share"),
    ],
)
def test_refused_maps_change_nothing(make, kind, options, error, message):
    model = make()
    before = state(model)
    with pytest.raises(error, match=message):
        gk.set_mid(model, kind, **options)
    assert unchanged(before, state(model))


@pytest.mark.parametrize("kind", ["gain", "tasks"])
def test_an_interrupt_leaves_the_maps_or_none(kind):
    options = {"tasks": 2, "ups": 2} if kind == "tasks" else {}
    expected = net()(X)

    def check(model):
        found = gk.mids(model)
        assert len(found) in (0, 4)
        if kind == "tasks" and found:
            with gk.tasks(model, 1):
                assert torch.allclose(model(X), expected, rtol=1e-13)
        else:
            assert torch.allclose(model(X), expected, rtol=1e-13)
        assert {layer.config.rank for layer in layers(model).values()} == {8 if kind == "tasks" and found else 4}
        assert all(layer.B_up.requires_grad for layer in layers(model).values())
        with gk.tasks(model, 0) if kind == "tasks" and found else gk.disabled(model):
            gk.fold_mids(model)
        assert [name for name, _ in model.named_parameters() if "B_" in name] == [
            f"{path}.{name}" for path in PATHS for name in ("B_up", "B_down")
        ]

    at_every_line(net, lambda model: gk.set_mid(model, kind, **options), check, most=15)


def test_an_interrupt_of_fold_mids_changes_no_output():
    expected = with_mids("gain")(X)

    def check(model):
        assert torch.allclose(model(X), expected, rtol=1e-13)
        gk.fold_mids(model)
        assert torch.allclose(model(X), expected, rtol=1e-13)

    at_every_line(lambda: with_mids("gain"), gk.fold_mids, check, most=15)


def test_inside_inference_mode():
    model = net()
    with torch.inference_mode():
        gk.set_mid(model, "gain")
    step(model, adam(model))
    with torch.inference_mode():
        gk.fold_mids(model)
    step(model, adam(model))


def test_maps_are_in_the_dtype_of_the_factor():
    model = gk.inject(nn.Sequential(nn.Linear(4, 3)).bfloat16(), LORA, target_modules=["0"])
    mid = gk.set_mid(model, "tasks", tasks=2)["0"]
    assert {p.dtype for p in mid.parameters()} == {torch.float32}
    with gk.tasks(model, torch.tensor([0, 1])):
        assert model(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
