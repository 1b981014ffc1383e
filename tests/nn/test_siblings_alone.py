"""Members compute alone where one cannot take part, and no output is handed out after something changed."""

import contextlib
import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from broods import DROPS, LORA, masks, outputs, step, waiting

from glora_kernels import GLoRAConfig
from glora_kernels.nn.siblings import install


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
