"""What layers see and do, against NumPy."""

import numpy as np
import pytest
import torch
from method_nets import ALL_LOW_RANK, PATHS, X, adam, layers, loss_of, net, plain, random_, step, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels import ShareLoRAConfig

BATCHES = [torch.randn(n, 3, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (2, 5, 1)]


def test_input_norm_is_the_mean_over_rows():
    model = net()
    with gk.observe(model, "input_norm") as seen:
        for x in BATCHES:
            model(x)
    assert set(seen) == set(PATHS)
    assert len(seen) == 4
    rows = np.concatenate([x.numpy().reshape(-1, 6) for x in BATCHES])
    w, b = (t.detach().numpy() for t in effective(layers(model)["layers.0.q"]))
    for path, inputs in (("layers.0.q", rows), ("layers.0.v", np.tanh(rows @ w.T + b))):
        assert seen[path].shape == (inputs.shape[1],)
        np.testing.assert_allclose(seen[path].numpy(), np.abs(inputs).mean(0), rtol=1e-6)
    before = {path: value.clone() for path, value in seen.items()}
    model(X)  # outside
    assert all(torch.equal(seen[path], value) for path, value in before.items())


def effective(layer):
    return layer.weight + 2 * layer.B_up @ layer.B_down, layer.bias


@pytest.mark.parametrize("config", [ALL_LOW_RANK, ShareLoRAConfig(rank=4, share="A")])
def test_sensitivity_is_the_mean_over_backwards(config):
    model = random_(gk.inject(plain(), config))
    optimizer, sums = torch.optim.SGD(trained(model), lr=0.01), dict.fromkeys(PATHS, 0.0)
    with gk.observe(model, "sensitivity") as seen:
        for _ in range(3):
            values = {p: p.detach().numpy().copy() for p in trained(model)}
            step(model, optimizer)
            for path, layer in layers(model).items():
                factors = [p for name, p in layer.named_parameters() if name.endswith(("_up", "_down"))]
                sums[path] += sum(np.abs(values[p] * p.grad.numpy()).sum() for p in factors)
    for path, value in sums.items():
        assert float(seen[path]) == pytest.approx(value / 3, rel=1e-5)


@pytest.mark.parametrize("frozen", ["B_up", "B_down"])
def test_sensitivity_with_one_factor_frozen(frozen):
    model = net()
    for layer in layers(model).values():
        layer.get_parameter(frozen).requires_grad_(False)
    with gk.observe(model, "sensitivity") as seen:
        for _ in range(2):
            model.zero_grad()
            loss_of(model).backward()
    for path, layer in layers(model).items():
        (p,) = (p for p in layer.parameters() if p.requires_grad)
        assert float(seen[path]) == pytest.approx(float((p * p.grad).abs().sum()), rel=1e-5)


def test_accumulated_backwards_each_count():
    model = net()
    with gk.observe(model, "sensitivity") as seen:
        loss_of(model).backward()
        first = {path: float(value) for path, value in seen.items()}
        loss_of(model).backward()
    assert all(float(seen[path]) == pytest.approx(value, rel=1e-6) for path, value in first.items())


def test_checkpointing_and_edits_inside():
    model = net()
    expected, got = {}, {}
    for found, run in (
        (expected, lambda block, x: block(x)),
        (got, lambda b, x: checkpoint(b, x, use_reentrant=False)),
    ):
        with gk.observe(model, "sensitivity") as seen:
            x = X
            for block in model.layers:
                x = run(block, x)
            (x - 1).square().sum().backward()
        found |= {path: float(value) for path, value in seen.items()}
    assert got == pytest.approx(expected, rel=1e-6)
    with gk.observe(model, "sensitivity") as seen:
        gk.set_rank(model, {"*": 2})
        loss_of(model).backward()
    layer = layers(model)["layers.0.q"]
    value = sum(float((p * p.grad).abs().sum()) for p in (layer.B_up, layer.B_down))
    assert float(seen["layers.0.q"]) == pytest.approx(value, rel=1e-5)


def test_the_parameter_of_a_gain_counts():
    model = net()
    mid = gk.set_mid(model, "gain")["layers.0.q"]
    random_(model)
    with gk.observe(model, "sensitivity") as seen:
        loss_of(model).backward()
    layer = layers(model)["layers.0.q"]
    own = (layer.B_up, layer.parametrizations.B_down.original, mid.z)
    assert float(seen["layers.0.q"]) == pytest.approx(sum(float((p * p.grad).abs().sum()) for p in own), rel=1e-5)


@pytest.mark.parametrize("make", [plain, net])
def test_hidden_states(make):
    model = make()
    with gk.observe(model, "hidden") as seen:
        for x in BATCHES:
            model(x)
    assert list(seen) == ["layers.0", "layers.1", "end"]
    rows = torch.cat([x.reshape(-1, 6) for x in BATCHES])
    middle = model.layers[0](rows)
    for path, value in (("layers.0", rows), ("layers.1", middle), ("end", model.layers[1](middle))):
        assert seen[path].dtype == torch.float32
        assert torch.allclose(seen[path], value.float(), rtol=1e-6)


def test_blocks_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Inner(), Inner()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(hidden_states=x)
            return x

    class Inner(nn.Linear):
        def __init__(self):
            super().__init__(6, 6, dtype=torch.float64)

        def forward(self, hidden_states):
            return super().forward(hidden_states)

    model = Named()
    with gk.observe(model, "hidden") as seen:
        model(X)
    assert torch.equal(seen["layers.0"], X.float())


def test_state_dict_goes_on_where_it_was():
    model = net()
    with gk.observe(model, "input_norm") as whole:
        for x in BATCHES:
            model(x)
    with gk.observe(model, "input_norm") as first:
        model(BATCHES[0])
    with gk.observe(model, "input_norm") as rest:
        rest.load_state_dict(first.state_dict())
        for x in BATCHES[1:]:
            model(x)
    assert all(torch.allclose(rest[path], value, rtol=1e-6) for path, value in whole.items())
    rest.clear()
    assert len(rest) == 0


@pytest.mark.parametrize("kind", ["sensitivity", "input_norm", "hidden"])
def test_nothing_stays_behind_after_an_error(kind):
    model = net()
    with pytest.raises(ZeroDivisionError), gk.observe(model, kind) as seen:
        raise ZeroDivisionError
    loss_of(model).backward()
    assert len(seen) == 0
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
    step(model, adam(model))


def test_refusals():
    for model, kind, message in (
        (net(), "grad", "kind must be one of 'sensitivity', 'input_norm', 'hidden'; got 'grad'"),
        (plain(), "sensitivity", "observe: the model has no low-rank adapter"),
        (nn.Linear(3, 3), "hidden", "the model has no blocks: no nn.ModuleList or nn.Sequential"),
    ):
        with pytest.raises(ValueError, match=message), gk.observe(model, kind):
            pass
