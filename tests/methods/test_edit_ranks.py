"""Ranks of live layers: what an index says, with the optimizer's moments, against rows and columns by the letter."""

import copy
import io

import numpy as np
import pytest
import torch
from method_nets import (
    ALL_LOW_RANK,
    LORA,
    PATHS,
    X,
    adam,
    at_every_line,
    layers,
    loss_of,
    net,
    plain,
    random_,
    state,
    step,
    trained,
    unchanged,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels import GLoRAConfig, ShareLoRAConfig

INDEX = [3, 0, 0, None, 2, 2]
FACTORS = ("A_up", "A_down", "B_up", "B_down", "C_up", "C_down")


def by_letter(values, index, dim, copied=None, fresh=None):
    """The entries of a factor by an index; None where there is a fresh one in D. A copy is made of `copied`."""
    copied = values if copied is None else copied
    stays = {j: (j if j < len(index) and index[j] == j else index.index(j)) for j in index if j is not None}
    found = []
    for i, j in enumerate(index):
        if j is None:
            found.append(fresh)
        else:
            found.append((values if stays[j] == i else copied).select(dim, j))
    return found


@pytest.mark.parametrize("config", [LORA, ALL_LOW_RANK])
@pytest.mark.parametrize("index", [INDEX, [1], [0, 1, 2, 3], [None, None], [0, 1, 2, 3, None]])
def test_factors_and_moments_by_the_index(config, index):
    model = net(config)
    optimizer = adam(model, amsgrad=True)
    loss_of(model).backward()
    ids = {name: id(p) for name, p in model.named_parameters()}
    before = {path: copy.deepcopy(dict(layer.named_parameters())) for path, layer in layers(model).items()}
    moments = {id(p): copy.deepcopy(s) for p, s in optimizer.state.items()}
    scales = {path: layer.config.scale for path, layer in layers(model).items()}
    gk.edit_ranks(model, {"*": index}, optimizer)
    assert ids == {name: id(p) for name, p in model.named_parameters()}
    for path, layer in layers(model).items():
        assert layer.config.rank == len(index)
        assert layer.config.scale == pytest.approx(scales[path], rel=1e-15)
        for name, parameter in layer.named_parameters():
            own, old = optimizer.state.get(parameter), moments.get(id(parameter))
            if name not in FACTORS:
                assert torch.equal(parameter, before[path][name])
                assert old is None or torch.equal(own["exp_avg"], old["exp_avg"])
                continue
            dim = int(name.endswith("_up"))
            assert parameter.grad is None
            assert parameter.requires_grad
            assert own["step"] == old["step"]
            for i, expected in enumerate(by_letter(before[path][name].detach(), index, dim)):
                got = parameter.detach().select(dim, i)
                if expected is not None:
                    assert torch.equal(got, expected)
                elif dim:
                    assert not got.any()
                else:
                    r, k = parameter.shape
                    assert got.abs().max() <= {"kaiming": k**-0.5, "xavier": (6 / (r + k)) ** 0.5}[layer.config.init]
                    assert got.abs().min() > 0
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                zeros = torch.zeros(parameter.select(dim, 0).shape, dtype=torch.float64)
                expected = by_letter(old[key], index, dim, fresh=zeros)
                assert torch.equal(own[key], torch.stack(expected, dim)), key


def test_a_step_after_an_edit_is_that_of_an_optimizer_with_the_edited_moments():
    model = net()
    optimizer = adam(model)
    gk.edit_ranks(model, {"*": INDEX}, optimizer, generator=torch.Generator().manual_seed(0))
    layer = layers(model)["layers.0.q"]
    up, own = layer.B_up.detach().clone(), copy.deepcopy(optimizer.state[layer.B_up])
    step(model, optimizer)
    t, g = float(own["step"]) + 1, layer.B_up.grad
    m, v = 0.9 * own["exp_avg"] + 0.1 * g, 0.999 * own["exp_avg_sq"] + 0.001 * g**2
    up = up * (1 - 0.01 * 0.01) - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert torch.allclose(layer.B_up, up, rtol=1e-12, atol=1e-14)


def test_copies_are_made_of_the_snapshot_and_what_stays_is_live():
    model = net()
    optimizer = adam(model)
    taken = gk.snapshot(model, optimizer)
    old = {path: copy.deepcopy(dict(layer.named_parameters())) for path, layer in layers(model).items()}
    old_moments = {id(p): copy.deepcopy(s) for p, s in optimizer.state.items()}
    for _ in range(3):
        step(model, optimizer)
    live = {path: copy.deepcopy(dict(layer.named_parameters())) for path, layer in layers(model).items()}
    live_moments = {id(p): copy.deepcopy(s) for p, s in optimizer.state.items()}
    index = [2, 1, 2, 1, 1]  # 2 and 1 stay at their own places, 0 and 3 go
    gk.edit_ranks(model, {"*": index}, optimizer, source=taken)
    for path, layer in layers(model).items():
        for name, dim in (("B_up", 1), ("B_down", 0)):
            parameter = layer.get_parameter(name)
            expected = by_letter(live[path][name].detach(), index, dim, old[path][name].detach())
            assert torch.equal(parameter, torch.stack(expected, dim))
            for key in ("exp_avg", "exp_avg_sq"):
                expected = by_letter(live_moments[id(parameter)][key], index, dim, old_moments[id(parameter)][key])
                assert torch.equal(optimizer.state[parameter][key], torch.stack(expected, dim))


@pytest.mark.parametrize("config", [LORA, ALL_LOW_RANK, GLoRAConfig("lora", "lora", rank=4, variant="matmul")])
def test_growing_changes_no_output(config):
    model = net(config)
    before = model(X)
    gk.edit_ranks(model, {"*.q": [0, 1, 2, 3, None, None], "*.v": [None, 2, 3, 0, 1]})
    assert torch.allclose(model(X), before, rtol=1e-13, atol=1e-13)


def test_a_dropped_rank_takes_its_own_change_along():
    model = net()
    layer = layers(model)["layers.0.v"]
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = layer(x) - 2.0 * (x @ layer.B_down[2:3].t()) @ layer.B_up[:, 2:3].t()
    gk.edit_ranks(model, {"layers.0.v": [0, 1, 3]})
    assert torch.allclose(layer(x), expected, rtol=1e-13)
    assert [one.config.rank for one in layers(model).values()] == [4, 3, 4, 4]


def test_set_rank_keeps_the_first_ranks():
    model = net()
    old = {path: layer.B_down.detach().clone() for path, layer in layers(model).items()}
    gk.set_rank(model, {"layers.0.q": 6, "layers.0.*": 2})  # a path wins
    assert [layer.config.rank for layer in layers(model).values()] == [6, 2, 4, 4]
    assert torch.equal(layers(model)["layers.0.q"].B_down[:4], old["layers.0.q"])
    assert torch.equal(layers(model)["layers.0.v"].B_down, old["layers.0.v"][:2])


def test_the_old_loss_may_live():
    model = net()
    optimizer = adam(model)
    held = []
    for index in ([0, 1, 3], [0, 1, 2, None, None], [4, 0]):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        held.append(loss)
        gk.edit_ranks(model, {"*": index}, optimizer)
        optimizer.zero_grad()
    loss_of(model).backward()
    assert all(p.grad.shape == p.shape for p in trained(model))
    optimizer.step()


def test_hooks_of_a_parameter_stay():
    model, seen = net(), []
    parameter = layers(model)["layers.0.q"].B_up
    parameter.register_hook(lambda grad: seen.append(grad.shape))
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    held = loss_of(model)
    gk.edit_ranks(model, {"*": [1]})
    loss_of(model).backward()
    assert seen == [(8, 1), (8, 1)]
    del held


@pytest.mark.parametrize("share", ["A", "B", "AB"])
def test_shared_factors_are_edited_for_all_their_layers(share):
    model = random_(gk.inject(plain(), ShareLoRAConfig(rank=4, alpha=8, share=share)))
    optimizer = adam(model)
    before = model(X)
    gk.edit_ranks(model, {"layers.0.q": [3, 2, 1, 0, None]}, optimizer)
    assert [layer.config.rank for layer in layers(model).values()] == [5, 4, 5, 4]
    first, second = layers(model)["layers.0.q"], layers(model)["layers.1.q"]
    assert (first.B_down is second.B_down) == ("A" in share)
    assert (first.B_up is second.B_up) == ("B" in share)
    assert torch.allclose(model(X), before, rtol=1e-13)
    step(model, optimizer)
    before = state(model, optimizer)
    with pytest.raises(
        ValueError, match=r"'layers\.[01]\.q' and 'layers\.[01]\.q' share B_(up|down), and need the same"
    ):
        gk.edit_ranks(model, {"layers.0.q": [0], "layers.1.q": [1]}, optimizer)
    assert unchanged(before, state(model, optimizer))


def test_a_gain_is_edited_along():
    model = net()
    mids = gk.set_mid(model, "gain")
    optimizer = adam(random_(model))
    z = {path: mid.z.detach().clone() for path, mid in mids.items()}
    moment = {path: optimizer.state[mid.z]["exp_avg"].clone() for path, mid in mids.items()}
    gk.edit_ranks(model, {"*": [3, 1, 1, None]}, optimizer)
    for path, mid in mids.items():
        assert torch.equal(mid.z, torch.stack([z[path][3], z[path][1], z[path][1], torch.zeros_like(z[path][0])]))
        expected = moment[path][[3, 1, 1, 0]] * torch.tensor([1, 1, 1, 0])
        assert torch.equal(optimizer.state[mid.z]["exp_avg"], expected)
    step(model, optimizer)


@pytest.mark.parametrize("gain", [False, True])
def test_parameters_of_one_entry(gain):
    """Where a moment has as many entries as the step counter."""
    model = gk.inject(nn.Sequential(nn.Linear(1, 3)).double(), GLoRAConfig.lora(1, 1), target_modules=["0"])
    if gain:
        gk.set_mid(model, "gain")
    optimizer = torch.optim.AdamW(trained(model))
    model(X[:, :1]).sum().backward()
    optimizer.step()
    gk.edit_ranks(model, {"0": [0, None]}, optimizer)
    for parameter in trained(model):
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert optimizer.state[parameter]["step"] == 1


@pytest.mark.parametrize("index", [np.array([0, 2]), torch.tensor([0, 2]), (0, np.int64(2))])
def test_an_index_of_numbers_of_other_libraries(index):
    model = net()
    old = layers(model)["layers.0.q"].B_down.detach().clone()
    gk.edit_ranks(model, {"*": index})
    assert torch.equal(layers(model)["layers.0.q"].B_down, old[[0, 2]])


def test_wrapped_optimizers_are_found():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = net()
    optimizer = adam(model)
    gk.edit_ranks(model, {"*": [0]}, Wrapper(Wrapper(optimizer)))
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in trained(model))


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "NAdam"])
def test_other_optimizers(name):
    model = net()
    kind = getattr(torch.optim, name)
    optimizer = kind(trained(model), lr=1e-3, **({"momentum": 0.9} if name == "SGD" else {}))
    step(model, optimizer)
    gk.edit_ranks(model, {"*": [0, None]}, optimizer)
    loss = step(model, optimizer)
    assert loss.isfinite()


def test_compiled_models_compile_again():
    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = adam(compiled)
    for index in ([0, 2, 2, None, None, None], [5, 1]):
        gk.edit_ranks(compiled, {"*": index}, optimizer)
        random_(model, len(index))
        assert torch.equal(compiled(X), model(X))
        step(compiled, optimizer)


def test_copies_averages_checkpoints_and_functional_calls():
    model = net()
    average, optimizer = AveragedModel(model), adam(model)
    twin = copy.deepcopy(model)
    for one in (model, average):
        gk.edit_ranks(
            one, {"*": [0, 3, None]}, optimizer if one is model else None, generator=torch.Generator().manual_seed(0)
        )
    assert layers(twin)["layers.0.q"].config.rank == 4
    assert layers(twin)["layers.0.q"].B_up.shape == (8, 4)
    old = layers(average.module)["layers.0.q"].B_up.detach().clone()
    average.update_parameters(model)
    now = layers(model)["layers.0.q"].B_up
    assert torch.allclose(layers(average.module)["layers.0.q"].B_up, now, atol=1e-15)  # the first update is a copy
    assert not torch.equal(old, now)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model.layers

        def forward(self, x):
            for block in self.layers:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    expected = torch.autograd.grad(loss_of(model), trained(model))
    got = torch.autograd.grad(loss_of(Checkpointed()), trained(model))
    assert all(map(torch.equal, got, expected))
    values = {name: p.detach() for name, p in model.named_parameters()}
    got = torch.func.grad(lambda v: (torch.func.functional_call(model, v, (X,)) - 1).square().sum())(values)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(torch.allclose(got[name], grad, atol=1e-13) for name, grad in zip(names, expected, strict=True))
    assert torch.allclose(torch.vmap(model)(X), model(X), atol=1e-13)


def test_saved_and_loaded_after_an_edit(tmp_path):
    model = net(ALL_LOW_RANK)
    gk.edit_ranks(model, {"*.q": [0, 3], "layers.1.v": [None, 1, 2, 3, 3, 0]})
    gk.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.allclose(gk.load_adapter(plain(), tmp_path / "a.safetensors")(X), model(X), atol=1e-14)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), model(X))
    expected = model(X)
    assert torch.allclose(gk.merge_and_unload(model.eval())(X), expected, atol=1e-13)


def test_rows_of_a_batch_see_the_edit():
    """What `rows` keeps of a layer's adapters from call to call is dropped."""
    model = net()
    gk.add_adapter(model, "b", GLoRAConfig.lora(2, 4))
    random_(model)
    names = ["default", "b", None, "b", "default"]
    with gk.rows(model, names):
        model(X)
        gk.edit_ranks(model, {"*": [3, 0]})
        mixed = model(X)
    for name in ("default", "b"):
        gk.set_adapter(model, name)
        mine = [i for i, other in enumerate(names) if other == name]
        assert torch.allclose(mixed[mine], model(X)[mine], atol=1e-13)


def test_inside_inference_mode():
    model = net()
    optimizer = adam(model)
    with torch.inference_mode():
        gk.edit_ranks(model, {"*": [0, None]}, optimizer)
    step(model, optimizer)


def test_an_interrupt_leaves_the_old_ranks_or_the_new_ones():
    old, new, moments = {}, {}, {}

    def make():
        model = net(ALL_LOW_RANK, blocks=1)
        vars(model)["made"] = adam(model)
        return model

    def act(model):
        gk.edit_ranks(model, {"*": [2, 0]}, vars(model)["made"])

    for found, model in ((old, make()), (new, make())):
        if found is new:
            act(model)
        found |= {name: p.detach().clone() for name, p in model.named_parameters()}
        state = vars(model)["made"].state
        moments[id(found)] = {name: state[p]["exp_avg"].clone() for name, p in model.named_parameters() if p in state}

    def check(model):
        parameters = dict(model.named_parameters())
        is_new = parameters["layers.0.q.B_up"].shape[1] == 2
        expected = new if is_new else old
        assert {model.layers[0].q.config.rank, model.layers[0].v.config.rank} == {2 if is_new else 4}
        assert all(torch.equal(parameters[name], value) for name, value in expected.items())
        for name, value in moments[id(expected)].items():
            assert torch.equal(vars(model)["made"].state[parameters[name]]["exp_avg"], value)

    at_every_line(make, act, check, most=15)


def adafactor(model):
    optimizer = torch.optim.Adafactor(trained(model))
    step(model, optimizer)
    return optimizer


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ({"*": []}, ValueError, r"the index of 'layers\.\d\.\w' is empty: a layer keeps at least one rank"),
        ({"*": [0], "layers.0.q": []}, ValueError, r"the index of 'layers\.0\.q' is empty"),
        ({"layers.0.q": [4]}, ValueError, r"'layers\.0\.q' has ranks 0 to 3; got 4"),
        ({"layers.0.q": [-1]}, ValueError, r"'layers\.0\.q' has ranks 0 to 3; got -1"),
        ({"layers.0.q": [0.5]}, TypeError, r"the index of 'layers\.0\.q' must hold integers and None, got \[0\.5\]"),
        ({"layers.0.q": [True]}, TypeError, r"'layers\.0\.q' must hold integers"),
        ({"layers.0.q": 3}, TypeError, r"'layers\.0\.q' must hold integers and None, got 3"),
        ({"layers.0.q": "12"}, TypeError, r"'layers\.0\.q' must hold integers and None, got '12'"),
        ({"layers.7.q": [0]}, ValueError, r"'layers\.7\.q' matches no low-rank layer.*'q'"),
        ([0, 1], TypeError, "give a mapping of paths or patterns, got list"),
    ],
)
def test_bad_edits_are_refused_and_change_nothing(edits, error, message):
    model = net()
    optimizer = adam(model)
    before = state(model, optimizer)
    with pytest.raises(error, match=message):
        gk.edit_ranks(model, edits, optimizer)
    assert unchanged(before, state(model, optimizer))


def test_other_refusals_change_nothing():
    model = net()
    optimizer = adam(model)
    taken = gk.snapshot(model, optimizer)
    smaller = copy.deepcopy(taken)
    smaller[PATHS[0]] = smaller["layers.0.v"]
    before = state(model, optimizer)
    cases = [
        (lambda: gk.set_rank(model, {"*": 0}), ValueError, "the rank of 'layers.* must be an integer >= 1, got 0"),
        (lambda: gk.set_rank(model, {"*": True}), ValueError, "integer >= 1, got True"),
        (
            lambda: gk.edit_ranks(model, {"*": [0]}, "adam"),
            TypeError,
            "must be a torch.optim.Optimizer or None, got str",
        ),
        (lambda: gk.edit_ranks(model, {"*": [0]}, optimizer, {}), ValueError, "source has no 'B_up.*' of 'layers"),
        (lambda: gk.edit_ranks(model, {"*": [0]}, None, taken), ValueError, "of 'layers.*: ranks or moments differ"),
        (lambda: gk.edit_ranks(model, {"*": [0]}, optimizer, smaller), ValueError, r"of 'layers\.0\.q': ranks or"),
        (lambda: gk.edit_ranks(plain(), {"*": [0]}), ValueError, "edit_ranks: the model has no low-rank adapter"),
    ]
    for act, error, message in cases:
        with pytest.raises(error, match=message):
            act()
        assert unchanged(before, state(model, optimizer))


@pytest.mark.parametrize("make", [adafactor, lambda model: one_step(gk.optimizer(model, "lora-fa", 1e-3), model),
                                  lambda model: one_step(gk.optimizer(model, "rite", 1e-3), model)])  # fmt: skip
def test_optimizers_whose_state_has_no_ranks(make):
    model = net()
    optimizer = make(model)
    before = state(model)
    with pytest.raises(ValueError, match=r"and make(\n| )a new one"):
        gk.edit_ranks(model, {"*": [0]}, optimizer)
    assert unchanged(before, state(model))


def one_step(optimizer, model):
    step(model, optimizer)
    return optimizer


@pytest.mark.parametrize(
    ("act", "what"),
    [(lambda m: gk.set_mid(m, "tasks", tasks=2), "TaskMid"), (lambda m: gk.restart(m, into="chain"), "Chain")],
)
def test_a_map_without_ranks_is_refused(act, what):
    model = net()
    act(model)
    before = state(model)
    with pytest.raises(ValueError, match=rf"'layers.*has a map on B_\w+ that has no ranks of its own \({what}\)"):
        gk.set_rank(model, {"*": 1})
    assert unchanged(before, state(model))
