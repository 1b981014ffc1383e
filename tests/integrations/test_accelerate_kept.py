"""What our operators cannot take runs on PEFT's path, with the reason in the summary; bad input is an error."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import GloraConfig, HiraConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from twins import Net, assert_same, randomized, reasons, step

import glora_kernels as gk
from glora_kernels.integrations import bases

UP = "up"
LORA, HIRA, GLORA = (partial(kind, r=3, target_modules=[UP]) for kind in (LoraConfig, HiraConfig, GloraConfig))
METHODS = {"lora": LORA, "hira": HIRA, "glora": GLORA}


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Tagged(torch.Tensor):
    pass


def kept(pair, x, reason):
    """Both give the same, no call reached our operators, and the summary says why."""
    pair.check(x, 0)
    assert reasons(pair.fast) == {reason}
    assert reason in str(gk.acceleration(pair.fast))


def test_variants_of_lora(twins, x):
    pair = twins(LORA(alora_invocation_tokens=[1]))
    kept(pair, x, "a variant of LoRA (ALoraLinear)")
    pair.both(lambda m: m.add_adapter("plain", LORA()))
    pair.both(lambda m: m.base_model.set_adapter(["default", "plain"]))
    kept(pair, x, "a variant of LoRA (ALoraLinear)")
    pair.both(lambda m: m.set_adapter("plain"))
    pair.check(x, 1)


def test_layers_of_other_kinds(adapted):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.up, self.conv = nn.Embedding(9, 6), nn.Linear(6, 4), nn.Conv1d(4, 4, 1, groups=2)

        def forward(self, tokens):
            return self.conv(self.up(self.emb(tokens)).transpose(-1, -2))

    plain = adapted(LoraConfig(r=2, target_modules=["emb", "up", "conv"]), net=Mixed())
    fast = gk.accelerate(copy.deepcopy(plain), verbose=False)
    report = gk.acceleration(fast)
    assert report.accelerated == {"lora.Linear": 1}
    assert {kind for kind, _ in report.kept} == {"lora.Embedding", "lora.Conv1d"}
    tokens = torch.randint(9, (3, 5))
    torch.testing.assert_close(fast(tokens), plain(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_base_weight(twins, x, method):
    pair = twins(METHODS[method]())
    for model in pair:
        model.base_model.model.up.base_layer.weight.requires_grad_()
    kept(pair, x, bases.TRAINED_BASE)
    assert "base_model.model.up.base_layer.weight" in step(pair.fast, x)
    with torch.no_grad():  # as reentrant checkpointing runs it first, before it recomputes with gradients
        assert torch.equal(pair.fast(x), pair.plain(x))
    assert not pair.calls


def test_a_bias_that_is_a_buffer(twins, x):
    pair = twins(LORA())
    for model in pair:
        base = model.base_model.model.up.base_layer
        bias = base.bias.detach().clone()
        del base.bias
        base.register_buffer("bias", bias)
    pair.check(x, 1)


def test_one_of_two_adapters_without_values(adapted, x):
    """PEFT's path runs for the hook, and would read memory that nobody wrote."""
    model = gk.accelerate(adapted(LORA()), verbose=False)
    model.add_adapter("empty", LORA(), low_cpu_mem_usage=True)
    model.base_model.set_adapter(["default", "empty"])
    model.base_model.model.up.lora_A["default"].register_forward_hook(lambda *_: None)
    assert reasons(model) == {bases.HOOKED}
    with pytest.raises(RuntimeError, match="x is on cpu"):
        model(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_parametrized_base(twins, x, method):
    pair = twins(METHODS[method]())
    for model in pair:
        parametrize.register_parametrization(model.base_model.model.up.base_layer, "weight", Doubled())
    kept(pair, x, bases.PARAMETRIZED)
    for model in pair:
        parametrize.remove_parametrizations(model.base_model.model.up.base_layer, "weight")
    pair.check(x, 1)


def test_parametrized_adapters(twins, x):
    pair = twins(LORA())
    glora = twins(GLORA())
    hira = twins(HIRA())
    for model in pair:
        parametrize.register_parametrization(model.base_model.model.up.lora_A.default, "weight", Doubled())
    for model in glora:
        parametrize.register_parametrization(model.base_model.model.up.glora_A.default, "Xd", Doubled())
    for model in hira:
        parametrize.register_parametrization(model.base_model.model.up.hira_A, "default", Doubled())
    glora.check(x, 0)
    for each in (pair, hira):
        each.check(x, 1)


HOOKED = {
    "base": (LORA, "base_layer"),
    "lora_A": (LORA, "lora_A.default"),
    "lora_B": (LORA, "lora_B.default"),
    "dropout": (LORA, "lora_dropout.default"),
    "base of glora": (GLORA, "base_layer"),
    "path of glora": (GLORA, "glora_B.default"),
    "base of hira": (HIRA, "base_layer"),
    "dropout of hira": (HIRA, "hira_dropout.default"),
}


@pytest.mark.parametrize("case", HOOKED)
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_inside_a_layer_fire(twins, x, case, register):
    config, path = HOOKED[case]
    pair = twins(config())
    fired, handles = [], []
    for model in pair:
        module = model.base_model.model.up.get_submodule(path)
        if "backward" in register and case == "path of glora":
            continue  # it has no input that could have a gradient
        handles.append(getattr(module, register)(lambda module, *_: fired.append(module)))
    if handles:
        kept(pair, x, bases.HOOKED)
        assert len(set(fired)) == 2
        for handle in handles:
            handle.remove()
    pair.check(x, 1)


def test_a_forward_of_its_own(twins, x):
    pair = twins(LORA())
    for model in pair:
        base = model.base_model.model.up.base_layer
        base.forward = lambda x, base=base: 2 * nn.functional.linear(x, base.weight)
    kept(pair, x, bases.HOOKED)
    net = Net()
    net.up = OwnLinear(20, 12)
    kept(twins(LORA(), net=net), x, "its base is a OwnLinear")


def test_an_adapter_on_an_adapter(x):
    torch.manual_seed(0)
    model = PeftMixedModel(Net().double(), LoraConfig(r=2, target_modules=[UP]), "one")
    plain = randomized(get_peft_model(model.base_model.model, LoraConfig(r=3, target_modules=["down"])))
    fast = gk.accelerate(copy.deepcopy(plain), verbose=False)
    assert_same(step(fast, x), step(plain, x))


def test_offloaded_weights(twins, x):
    """accelerate's offloading replaces the forward of every module that owns a weight."""
    pair = twins(LORA())
    for model in pair:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert reasons(pair.fast) == {bases.HOOKED}
    with torch.no_grad():
        assert torch.equal(pair.fast(x), pair.plain(x))
    assert not pair.calls
    for model in pair:
        remove_hook_from_module(model, recurse=True)
    pair.check(x, 1)


def test_a_layer_whose_forward_is_replaced(twins, x):
    """Before accelerate it keeps it; afterwards the new one calls the accelerated one, which then must stay."""
    pair = twins(LORA())
    layers = [model.base_model.model.up for model in pair]
    for layer in layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    pair.check(x, 1)
    with pytest.raises(ValueError, match="forward of 1 layers was replaced since"):
        gk.decelerate(pair.fast)
    pair.check(x, 1)
    with pytest.raises(ValueError, match=r"no layer of this model can be accelerated(.|\n)*offloading hooks"):
        gk.accelerate(pair.plain)
    for layer in layers:
        remove_hook_from_module(layer)
    gk.decelerate(pair.fast)
    pair.check(x, 0)
    gk.accelerate(pair.fast, verbose=False)
    pair.check(x, 1)


def test_meta_adapters_and_layers(adapted, x):
    model = adapted(LORA())
    model.add_adapter("empty", LORA(), low_cpu_mem_usage=True)
    gk.accelerate(model, verbose=False)
    model.set_adapter("empty")
    assert reasons(model) == {bases.ON_META}
    with pytest.raises(RuntimeError, match="cannot run: its weights are on the meta device, x is on cpu"):
        model(x)
    model.set_adapter("default")
    assert reasons(model) == set()
    model.to("meta")
    assert reasons(model) == {bases.ON_META}
    assert model(x.to("meta")).shape == (3, 5, 7)
    with pytest.raises(RuntimeError, match="x is on cpu"):
        model(x)


def test_a_tensor_parallel_base(adapted, x):
    plain = adapted(LORA())
    parallel = gk.accelerate(copy.deepcopy(plain), verbose=False)
    parallel.base_model.model.up.base_layer._hf_tp_plan = "colwise"
    assert reasons(parallel) == {bases.TENSOR_PARALLEL}
    assert_same(step(parallel, x), step(plain, x))


@pytest.mark.parametrize("method", METHODS)
def test_an_x_that_does_not_fit_is_pefts_error(twins, x, method):
    pair = twins(METHODS[method]())
    wrong = [x.long(), x > 0, x.to(torch.complex128), x.float(), x[..., :7], x[0, 0, 0], x.to("meta"), [1.0], None]
    for given in wrong:
        errors = []
        for model in pair:
            with pytest.raises((RuntimeError, TypeError, AttributeError, ValueError)) as caught:
                model(given)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    assert not pair.calls


@pytest.mark.parametrize("method", METHODS)
def test_a_subclass_of_tensor(twins, x, method):
    pair = twins(METHODS[method]())
    ys = [model(x.as_subclass(Tagged)) for model in pair]
    assert type(ys[1]) is type(ys[0]) is Tagged
    assert not pair.calls
    assert_same({"y": ys[1].as_subclass(torch.Tensor)}, {"y": ys[0].as_subclass(torch.Tensor)}, 0.0)


def test_nested_and_sparse_tensors(twins, x):
    pair = twins(LORA())
    layers = [model.base_model.model.up for model in pair]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype stage")
        nested = torch.nested.nested_tensor([x[0], x[1, :2]])
    plain, fast = (layer(nested) for layer in layers)
    for expected, got in zip(plain.unbind(), fast.unbind(), strict=True):
        assert torch.equal(got, expected)
    plain, fast = (layer(x[0].to_sparse()) for layer in layers)
    assert torch.equal(fast, plain)
    assert not pair.calls


@pytest.mark.parametrize("method", METHODS)
def test_torch_func_forward_mode_and_tracing(twins, x, method):
    """They see through PEFT's forward, not through our operators' autograd.Function."""
    pair = twins(METHODS[method]())
    rows = x[0]

    def loss(parameters, model, row):
        return functional_call(model, parameters, (row,)).square().sum()

    found = []
    for model in pair:
        parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        gradients = vmap(grad(loss), in_dims=(None, None, 0))(parameters, model, rows)
        with forward_ad.dual_level():
            dual = model(forward_ad.make_dual(rows, torch.ones_like(rows)))
            gradients["tangent"] = forward_ad.unpack_dual(dual).tangent.detach()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gradients["traced"] = torch.jit.trace(model.base_model.model, rows, check_trace=False)(2 * rows).detach()
        found.append(gradients)
    assert not pair.calls
    assert_same(found[1], found[0])
    pair.check(rows, 1)


def test_a_second_derivative_is_an_error(twins, x):
    pair = twins(LORA())
    x.requires_grad_()
    (dx,) = torch.autograd.grad(pair.fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dx.sum().backward()


@pytest.mark.parametrize(("config", "works"), [
    (LORA(), True), (HIRA(), True), (GLORA(), True), (GLORA(config_A_B="constant"), False),
    (GLORA(config_A_B="vector"), False),
])  # fmt: skip
def test_overwriting_the_output(twins, x, config, works):
    """Of PEFT's layers anybody may; a trained vector or constant A of ours reads it in backward, and says so."""
    pair = twins(config)
    found = []
    for model in pair:
        rows = x.clone().requires_grad_()
        y = model.base_model.model.up(rows)
        if model is pair.fast and not works:
            with pytest.raises(RuntimeError, match="overwritten in place"):
                y.relu_().sum().backward()
        else:
            y.relu_().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"x": rows.grad})
    if works:
        assert len(pair.calls) == 1
        assert_same(found[1], found[0])


@pytest.mark.parametrize("method", ["lora", "glora"])
def test_a_batch_of_several_adapters(twins, x, method):
    pair = twins(METHODS[method]())
    pair.both(lambda m: m.add_adapter("other", METHODS[method]()))
    names = ["default", "other", "__base__"]
    for model in pair:
        model.eval()
    pair.check(x, int(method == "lora"), adapter_names=names)
    pair.check(x, 1)


def test_an_adapter_of_foreign_modules(twins, x):
    pair = twins(LORA())
    for model in pair:
        torch.manual_seed(4)
        model.base_model.model.up.lora_A["default"] = nn.Linear(20, 3).double()  # with a bias of its own
    pair.check(x, 0)


def test_layers_added_later(twins, x):
    """They run on PEFT's path until accelerate is called again, which takes those alone."""
    pair = twins(LORA())
    pair.both(lambda m: m.add_adapter("wide", LoraConfig(r=2, target_modules=["up", "down"])))
    pair.both(lambda m: m.set_adapter("wide"))
    pair.check(x, 1)
    assert gk.acceleration(pair.fast).kept == {
        ("lora.Linear", "accelerate() was not called since it was added, or decelerate() was"): 1
    }
    gk.accelerate(pair.fast, verbose=False)
    pair.check(x, 2)


@pytest.mark.gpu
def test_a_rank_above_the_kernels(adapted, calls):
    from glora_kernels.runtime.configs import MAX_RANK

    net = nn.ModuleDict({UP: nn.Linear(64, 32)})
    config = LoraConfig(r=MAX_RANK + 1, target_modules=[UP])
    plain = adapted(config, net=net, dtype=torch.float32).cuda().base_model.model[UP]
    fast = gk.accelerate(copy.deepcopy(plain), verbose=False)
    x = torch.randn(4, 64, device="cuda")
    assert_same(step(fast, x), step(plain, x), 0.0)
    assert not calls


def test_the_table(adapted, capsys):
    model = adapted(LoraConfig(r=3, target_modules=["up", "mix", "down"]))
    model.base_model.model.mix.base_layer.register_forward_hook(lambda *_: None)
    gk.accelerate(model)
    assert capsys.readouterr().out.splitlines() == [
        "layers  kind         runs on        because",
        "     2  lora.Linear  glora_kernels",
        f"     1  lora.Linear  PEFT           {bases.HOOKED}",
    ]
    with model.disable_adapter():
        assert gk.acceleration(model).accelerated == {"lora.Linear": 2}


def test_bad_models(adapted):
    for wrong in (None, "model", [nn.Linear(2, 2)]):
        for function in (gk.accelerate, gk.decelerate, gk.acceleration):
            with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
                function(wrong)
    with pytest.raises(ValueError, match=r"no PEFT layers; use it on the result of peft\.get_peft_model"):
        gk.accelerate(Net())
    with pytest.raises(ValueError, match="decelerate: the model has no PEFT layers"):
        gk.decelerate(Net())
    embedding = adapted(LoraConfig(r=2, target_modules=["e"]), net=nn.ModuleDict({"e": nn.Embedding(4, 4)}))
    with pytest.raises(ValueError, match=r"no layer of this model can be accelerated\n.*\n.*lora\.Embedding"):
        gk.accelerate(embedding)


def test_called_twice_as_in_a_notebook(twins, x, capsys):
    """The second call changes nothing but layers that are new, and says so."""
    pair = twins(LORA())
    assert gk.decelerate(gk.decelerate(pair.fast)) is pair.fast
    assert capsys.readouterr().out == "decelerate: no layer of this model is accelerated, and nothing was changed\n"
    for _ in range(2):
        assert gk.accelerate(pair.fast) is pair.fast
        pair.check(x, 1)
    first, second = capsys.readouterr().out.split("layers  kind")[1:]
    assert "already" not in first
    assert second.endswith("accelerate: the model was accelerated already, and nothing was changed\n")
    pair.both(lambda m: m.add_adapter("wide", LoraConfig(r=2, target_modules=["up", "down"])))
    pair.both(lambda m: m.set_adapter("wide"))
    gk.accelerate(pair.fast)
    pair.check(x, 2)
    assert "already" not in capsys.readouterr().out


def test_calls_on_pefts_path_are_counted(adapted, x):
    model = gk.accelerate(adapted(LoraConfig(r=3, target_modules=["up", "down"])), verbose=False)
    model(x)
    assert gk.acceleration(model).fallbacks == {}
    up, down = "base_model.model.up", "base_model.model.down"
    with model.disable_adapter():
        model(x)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            model(x.float())
    report = gk.acceleration(model)
    assert report.fallbacks == {(up, bases.IDLE): 1, (down, bases.IDLE): 1, (up, bases.MIXED_DTYPES): 2}
    assert report.accelerated == {"lora.Linear": 2}
    assert str(report).splitlines()[2:] == [
        "single calls of layers on glora_kernels:",
        "calls  of layers  ran on  because",
        f"    2  2          PEFT    {bases.IDLE}",
        f"    2  1          PEFT    {bases.MIXED_DTYPES}",
    ]
    assert gk.acceleration(copy.deepcopy(model)).fallbacks == {}
    assert gk.acceleration(model, reset=True).fallbacks == report.fallbacks
    assert gk.acceleration(model).fallbacks == {}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with model.disable_adapter():
        compiled(x)
    assert gk.acceleration(model).fallbacks == {}


def test_releases_of_peft(adapted, monkeypatch):
    """Too old or missing: an error that says what is needed, and a model as it was. Newer than tested: a warning."""
    model = adapted(LORA())

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    asked = "glora_kernels.integrations.release.version"
    for found, words in (
        (lambda _: "0.19.1", r"PEFT 0\.20 or later; installed is 0\.19\.1"),
        (missing, "pip install"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(asked, found)
            with pytest.raises(ImportError, match=words):
                gk.accelerate(model)
        assert type(model.base_model.model.up) is LoraLinear
    for release, newer in (
        ("0.20.0", False),
        ("0.21.2.dev0", False),
        ("0.21.0rc1", False),
        ("0.22.0", True),
        ("1.0", True),
    ):
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(asked, lambda _, release=release: release)
            gk.accelerate(model, verbose=False)
            told = {str(one.message) for one in caught if one.filename == __file__}
            gk.decelerate(model)
        assert any(f"0.20 to 0.21; installed is {release}" in text for text in told) == newer
    assert isinstance(model, PeftModel)
