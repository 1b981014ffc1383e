"""The supernet: every example under its own configuration equals a layer of its own, merged or extracted."""

import copy
import pickle

import pytest
import torch
from torch import nn

import glora_kernels as gk
from glora_kernels.search.space import parameters_of
from glora_kernels.spec import all_configs

PAPER = gk.SearchSpace.paper(rank=3)
MIXED = gk.SearchSpace(*(PAPER.A, PAPER.B, PAPER.C, PAPER.D, PAPER.E), ranks=(1, 3, 4), scale=2.0)


def filled(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * values)
    return net


def supernet(space=MIXED, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 7, bias=False), nn.GELU(), nn.Linear(7, 5))
    return filled(gk.Supernet(model.to(dtype), space, ["0", "2"], train=["4"], **options))


def inputs(rows, dtype=torch.float64):
    return torch.randn(rows, 3, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def near(left, right, bound=1e-12):
    assert (left - right).abs().max() <= bound * max(1.0, right.abs().max())


def gradients(net, y):
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return torch.autograd.grad(y.square().sum(), trained, allow_unused=True)


def alone(net, candidate, x):
    """The examples of x under one candidate, by the extracted model."""
    return net.extract(candidate)(x)


def test_every_one_of_the_432_in_one_batch():
    net = supernet(PAPER)
    forms = [{"0": own, "2": own} for own in all_configs(rank=3, alpha=3.0)]
    x = inputs(len(forms))
    with net.sample(rows=len(forms), candidates=forms) as candidates:
        y = net(x)
    assert len({str(candidate) for candidate in candidates}) == 432
    for place in range(0, 432, 7):
        near(y[place : place + 1], alone(net, candidates[place], x[place : place + 1]))


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_equals_its_examples_one_by_one(seed):
    net, x = supernet(seed=seed), inputs(24)
    with net.sample(rows=24) as candidates:
        y = net(x)
    apart = []
    for place, candidate in enumerate(candidates):
        with net.sample(candidates=[candidate]):
            apart.append(net(x[place : place + 1]))
        with net.use(candidate) as model:
            near(model(x[place : place + 1]), apart[-1])
        near(alone(net, candidate, x[place : place + 1]), apart[-1])
    near(y, torch.cat(apart))
    for own, others in zip(gradients(net, y), gradients(net, torch.cat(apart)), strict=True):
        assert (own is None) == (others is None)
        if own is not None:
            near(own, others)


def test_gradients_are_those_of_finite_differences():
    net, x = supernet(), inputs(6)
    with net.sample(rows=6) as candidates:
        loss = net(x).square().sum()
        loss.backward()
    step = 1e-6
    for parameter in net.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            place = int(parameter.grad.abs().argmax())
            values = []
            for sign in (1, -1):
                with torch.no_grad(), net.sample(rows=6, candidates=candidates):
                    parameter.view(-1)[place] += sign * step
                    values.append(net(x).square().sum())
                    parameter.view(-1)[place] -= sign * step
            wanted = (values[0] - values[1]) / (2 * step)
            assert abs(parameter.grad.view(-1)[place] - wanted) <= 1e-6 * max(1.0, abs(wanted))


@pytest.mark.parametrize("per", ["row", "batch"])
def test_drawing_is_exact_across_a_restart(per):
    net, again = supernet(seed=3), supernet(seed=4)
    with net.sample(rows=4, per=per):
        pass
    again.load_state_dict(net.state_dict())
    for _ in range(3):
        with net.sample(rows=4, per=per) as left, again.sample(rows=4, per=per) as right:
            assert left == right
            assert len(left) == (4 if per == "row" else 1)
    with supernet(seed=3).sample(rows=4, per=per) as other:
        assert other != left
    assert net.fingerprint() == again.fingerprint()
    filled(again, seed=1)
    assert net.fingerprint() != again.fingerprint()


def test_forms_and_ranks_are_drawn_evenly():
    net, counts = supernet(PAPER), {}
    with net.sample(rows=4000) as candidates:
        for candidate in candidates:
            counts[candidate["0"].A] = counts.get(candidate["0"].A, 0) + 1
    assert set(counts) == set(PAPER.A)
    assert max(abs(count - 1000) for count in counts.values()) < 150  # five standard deviations


def test_drawing_within_a_limit():
    net = supernet()
    count = dict(zip(net.spaces, net.shapes.values(), strict=True))
    with net.sample(rows=200, switch_off=0.5, max_parameters=40) as candidates:
        pass
    sizes = [parameters_of(candidate, count) for candidate in candidates]
    assert max(sizes) <= 40
    assert len(set(sizes)) > 5
    with net.sample(rows=4000, switch_off=0.25) as candidates:
        pass
    off = sum(candidate["0"].is_empty for candidate in candidates) / 4000
    assert abs(off - (0.25 + 0.75 / 432)) < 0.03
    with pytest.raises(ValueError, match="switch_off must be a probability"), net.sample(rows=4, switch_off=1.5):
        pass
    with pytest.raises(ValueError, match="only say what is drawn"), net.sample(candidates=candidates, switch_off=0.5):
        pass
    all_on = supernet(gk.SearchSpace(A=("vector",), ranks=(1,)))
    with pytest.raises(ValueError, match="smallest candidate has 15 "), all_on.sample(max_parameters=3):
        pass


@pytest.mark.parametrize("unsampled", ["skip", "decay"])
def test_what_no_example_has(unsampled):
    net = supernet(gk.SearchSpace(ranks=(2,)), unsampled=unsampled)
    empty = {path: gk.GLoRAConfig("none", "none") for path in net.spaces}
    with net.sample(rows=5, candidates=[empty]):
        net(inputs(5).requires_grad_()).sum().backward()
    grads = [layer.grad for name, layer in net.named_parameters() if layer.requires_grad and "model.4" not in name]
    if unsampled == "skip":
        assert all(grad is None for grad in grads)
    else:
        assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 4])
def test_narrow_and_4_bit_bases(dtype, bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).to(dtype)
    net = filled(gk.Supernet(model if bits == 16 else gk.quantize(model), MIXED, ["0", "2"]))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with net.sample(rows=9) as candidates:
        y = net(x)
    assert y.dtype == dtype
    bound = 64 * torch.finfo(dtype).eps
    for place in range(9):
        with net.use(candidates[place]):
            near(net(x[place : place + 1]), y[place : place + 1], bound)
        near(alone(net, candidates[place], x[place : place + 1]), y[place : place + 1], bound)


def test_copies_pickles_and_autocast():
    net, x = supernet(dtype=torch.float32), inputs(4, torch.float32)
    with net.sample(rows=4) as candidates:
        copied = copy.deepcopy(net)
        y = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.bfloat16
    for other in (copied, pickle.loads(pickle.dumps(net))):
        with pytest.raises(RuntimeError, match="told"):
            other(x)
        with other.sample(rows=4, candidates=candidates):
            assert torch.equal(other(x), y)


def test_extracted_models_are_injected_ones(tmp_path):
    net, x = supernet(), inputs(2)
    candidate = {"0": gk.GLoRAConfig("lora", "lora", rank=3, alpha=6.0), "2": gk.GLoRAConfig("none", "none")}
    model = net.extract(candidate)
    y = model(x)
    assert isinstance(model[0], gk.GLoRALinear)
    assert type(model[2]) is nn.Linear
    assert model[2].bias is None
    assert model[4].weight.requires_grad
    gk.save_adapter(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 7, bias=False), nn.GELU(), nn.Linear(7, 5)).double()
    near(gk.load_adapter(plain, tmp_path / "a.safetensors")(x), y)
    with torch.no_grad():
        near(gk.merge_and_unload(model)(x), y)
    with net.use(candidate):  # the supernet is as it was
        near(net(x), y)


def test_wrong_calls_say_what_is_right():
    net, x = supernet(), inputs(4)
    with pytest.raises(RuntimeError, match=r"inside `with net.sample\(rows=len\(x\)\):`"):
        net(x)
    with pytest.raises(RuntimeError, match=r"merge\(\) was called inside a Supernet"):
        gk.merge(net)
    with net.sample(rows=4), pytest.raises(RuntimeError, match="inside another one"), net.sample(rows=4):
        pass
    with net.sample(rows=3), pytest.raises(ValueError, match=r"rows=3, but '0' was called with an x of shape"):
        net(x)
    with pytest.raises(ValueError, match="per must be 'row' or 'batch'"), net.sample(rows=4, per="layer"):
        pass
    with pytest.raises(ValueError, match="rows must be an integer >= 1"), net.sample(rows=0):
        pass
    with pytest.raises(ValueError, match=r"lacks '2'"), net.use({"0": gk.GLoRAConfig("none", "none")}):
        pass
    wrong = {"0": gk.GLoRAConfig.lora(rank=2, alpha=4.0), "2": gk.GLoRAConfig("none", "none")}
    with pytest.raises(ValueError, match=r"'0': rank must be one of 1, 3, 4; got 2"):
        net.extract(wrong)
    with pytest.raises(ValueError, match="adapts no layer"):
        net.extract({path: gk.GLoRAConfig("none", "none") for path in net.spaces})
    with pytest.raises(ValueError, match="unsampled must be"):
        supernet(unsampled="zero")
    with pytest.raises(TypeError, match=r"space\['0'\] must be a SearchSpace or None"):
        gk.Supernet(nn.Sequential(nn.Linear(4, 4)), {"0": gk.GLoRAConfig()})


def test_layers_have_spaces_of_their_own_or_none():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    spaces = {"0": gk.SearchSpace(A=("vector",), B=("none",), ranks=(2,)), "1": None, "*": gk.SearchSpace(ranks=(2, 5))}
    net = gk.Supernet(model, spaces, ["0", "1", "2"])
    assert list(net.spaces) == ["0", "2"]
    assert net.shapes["2"] == (8, 5, True)
    assert model[0].A_up is None
    assert model[0].A.shape == (8,)
    assert model[2].B_up.shape == (5, 5)


def test_a_search_over_it():
    net, x = supernet(gk.SearchSpace(ranks=(1, 3))), inputs(16)
    with torch.no_grad(), net.sample(candidates=[{path: gk.GLoRAConfig("vector", "none") for path in net.spaces}]):
        target = net(x)

    def evaluate(model):
        with torch.no_grad():
            return float((model(x) - target).square().mean())

    search = gk.Search(net, evaluate, max_parameters=60, minimize=True, population=12, generations=4)
    search.run(progress=False)
    best = min(search.finished, key=lambda done: done.score)
    assert search.best == best.candidate
    assert abs(evaluate(net.extract(search.best)) - best.score) < 1e-12
    assert all(done.parameters <= 60 for done in search.finished)
