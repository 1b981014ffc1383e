"""PEFT's LoRA over convolutions, accelerated: PEFT's numbers in float64, its state, and what stays on its path."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from twins import randomized, reasons

import glora_kernels as gk
from glora_kernels.integrations.accelerated import layers

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": "valid", "bias": False},
    {"kernel_size": 3, "padding": "same"},
]


class Net(nn.Module):
    def __init__(self, dims=2, **geometry):
        super().__init__()
        self.first = KINDS[dims](3, 6, **geometry)
        self.point = KINDS[dims](6, 4, 1)

    def forward(self, x):
        return self.point(torch.relu_(self.first(x)))


def pair(dims=2, own=None, base=None, **geometry):
    """The same model of PEFT twice, with adapters that are not zero; the second accelerated."""
    torch.manual_seed(0)
    own = own or LoraConfig(r=3, lora_alpha=5, target_modules=["first", "point"])
    plain = randomized(get_peft_model((base or Net(dims, **geometry)).double(), own))
    return plain, gk.accelerate(copy.deepcopy(plain), verbose=False)


def images(dims=2, last=False):
    x = torch.randn(2, 3, *[5] * dims, dtype=torch.float64)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def assert_same(got, right):
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def same(plain, fast, x):
    results = []
    for model in (plain, fast):
        model.zero_grad()
        own = x.clone().requires_grad_()
        y = model(own)
        y.square().sum().backward()
        results.append([y, own.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) >= 4
    for got, right in zip(*reversed(results), strict=True):
        assert_same(got, right)


@pytest.fixture
def calls(monkeypatch):
    seen = []
    real = layers.adapted_conv
    monkeypatch.setattr(layers, "adapted_conv", lambda *given: seen.append(given) or real(*given))
    return seen


@pytest.mark.parametrize(("dims", "geometry", "last"), [*itertools.product(KINDS, GEOMETRIES, (False, True))])
def test_numbers_of_peft(calls, dims, geometry, last):
    plain, fast = pair(dims, **geometry)
    same(plain, fast, images(dims, last))
    assert len(calls) == 2
    assert gk.acceleration(fast).accelerated == {f"lora.Conv{dims}d": 2}
    assert not reasons(fast)
    assert str(fast) == str(plain)


def test_rslora_and_a_bias_of_the_factors(calls):
    own = LoraConfig(r=3, lora_alpha=5, target_modules=["first", "point"], use_rslora=True, lora_bias=True)
    same(*pair(own=own, kernel_size=3), images())
    assert len(calls) == 2


def test_states_of_peft(calls, tmp_path):
    plain, fast = pair(kernel_size=3)
    x = images()
    for model in (plain, fast):
        model.add_adapter("b", LoraConfig(r=2, target_modules=["first"]))
        torch.manual_seed(5)
        randomized(model)
    for change in (
        lambda m: m.set_adapter("b"), lambda m: m.base_model.set_adapter(["default", "b"]),
        lambda m: m.base_model.disable_adapter_layers(), lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter(), lambda m: m.delete_adapter("b"),
    ):  # fmt: skip
        for model in (plain, fast):
            change(model)
        assert_same(fast(x), plain(x))
    same(plain, fast, x)
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert_same(PeftModel.from_pretrained(Net(kernel_size=3).double(), tmp_path)(x), plain(x))
    assert_same(copy.deepcopy(fast)(x), plain(x))
    before = len(calls)
    assert_same(gk.decelerate(fast)(x), plain(x))
    assert len(calls) == before
    assert_same(fast.merge_and_unload()(x), plain(x))


def test_dropout_keeps_no_copy_of_x():
    own = LoraConfig(r=3, target_modules=["first"], lora_dropout=0.5)
    plain, fast = pair(own=own, kernel_size=3)
    x = images()
    torch.manual_seed(1)
    y = fast(x)
    torch.manual_seed(1)
    assert torch.equal(fast(x), y)
    assert not torch.equal(fast(x), y)
    same(plain.eval(), fast.eval(), x)


@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, layers.GEOMETRY),
        ({"kernel_size": 3, "groups": 3}, layers.GROUPED),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_what_stays_with_peft(calls, geometry, reason):
    plain, fast = pair(**geometry)
    same(plain, fast, images())
    assert len(calls) == 1
    assert reasons(fast) == {reason}


def test_dora_stays_with_peft(calls):
    plain, fast = pair(own=LoraConfig(r=3, target_modules=["first", "point"], use_dora=True), kernel_size=3)
    same(plain, fast, images())
    assert not calls
    assert reasons(fast) == {"a variant of LoRA (DoraConv2d)"}


def test_a_subclass_of_the_base_and_a_trained_base_stay_with_peft(calls):
    class Tripled(nn.Conv2d):
        def forward(self, x):
            return 3 * super().forward(x)

    base = Net(kernel_size=3)
    base.point = Tripled(6, 4, 1)
    plain, fast = pair(base=base)
    same(plain, fast, images())
    assert reasons(fast) == {"Tripled has a forward of its own"}
    plain, fast = pair(kernel_size=3)
    for model in (plain, fast):
        model.base_model.model.first.base_layer.weight.requires_grad_(True)
    same(plain, fast, images())
    assert reasons(fast) == {"the weight of its base is trained"}


def test_a_batch_of_several_adapters_is_pefts():
    plain, fast = pair(kernel_size=3)
    plain.eval()
    fast.eval()
    x, names = images(), {"adapter_names": ["default", "__base__"]}
    assert_same(fast(x, **names), plain(x, **names))
    assert set(gk.acceleration(fast).fallbacks.values()) == {1}
    with (
        pytest.raises(RuntimeError, match="is a convolution, whose adapters cannot differ"),
        gk.rows(fast, ["default"]),
    ):
        pass


@pytest.mark.parametrize("last", [False, True])
def test_compiled(last):
    plain, fast = pair(kernel_size=3)
    torch._dynamo.reset()
    same(plain, torch.compile(fast, backend="aot_eager", fullgraph=True), images(last=last))
