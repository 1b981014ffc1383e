"""Weights that the code around a linear layer reads without calling it: found in every form, and nothing else."""

from __future__ import annotations

import ast
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import glora_kernels as gk
from glora_kernels.nn import read_code
from glora_kernels.nn.model import named_layers
from glora_kernels.nn.reads import reads

CFG = gk.GLoRAConfig.lora(rank=2)


class Net(nn.Module):
    """Layers to read; the forwards below become its own, one at a time."""

    settings = 3

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.listed = [self.k, self.v]
        self.pairs = [("q", self.q), ("k", self.k)]
        self.made, self.part = lambda: self.v.weight, partial(helper, self.k)
        self.fast, self.parts = False, 1

    @property
    def matrix(self) -> Tensor:
        return self.q.weight.t()

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)

    @classmethod
    def of_class(cls, layer: nn.Linear, x: Tensor) -> Tensor:
        return helper(layer, x)

    def get(self) -> nn.Linear:
        return self.v

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


def helper(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.t()


def direct(self, x):
    return F.linear(x, self.q.weight)


def bias_alone(self, x):
    return x + self.q.bias


def alias(self, x):
    layer = self.q
    w, b = layer.weight, layer.bias
    return x @ w.t() + b


def by_getattr(self, x):
    return x @ getattr(self.k, "weight")  # noqa: B009


def names_in_a_loop(self, x):
    for name in ("q", "k"):
        x = x @ getattr(self, name).weight
    return x


def a_loop_over_children(self, x):
    for block in self.layers:
        x = x @ block[0].weight
    return x


def an_index(self, x):
    return x @ self.layers[1][-1].weight


def grandchild_key(self, x):
    return x @ self.named["a"].weight


def items(self, x):
    for _, layer in self.named.items():
        x = layer.weight @ x
    return x


def comprehension(self, x):
    return x @ torch.cat([layer.weight for layer in (self.q, self.k)]).t()


def helper_function(self, x):
    return helper(self.v, x)


def own_method(self, x):
    return self.project(self.k, x)


def a_property(self, x):
    return x @ self.matrix


def a_getter(self, x):
    return x @ self.get().weight


def nested_function(self, x):
    def inner(y):
        return y @ self.q.weight

    return torch.utils.checkpoint.checkpoint(inner, x)


def a_lambda(self, x):
    return (lambda layer: x @ layer.weight)(self.k)


def functional_call(self, x):
    return torch.func.functional_call(self.q, dict(self.q.named_parameters()), x)


def parameters(self, x):
    return x * sum(p.sum() for p in self.q.parameters())


def state(self, x):
    return x @ self.q.state_dict()["weight"]


def unbound_forward(self, x):
    return nn.Linear.forward(self.q, x)


def internals(self, x):
    return x @ self._modules["k"]._parameters["weight"]


def plain_list(self, x):
    return x @ self.listed[0].weight + x @ self.listed[1].weight


def submodule(self, x):
    return x @ self.get_submodule("layers.0.1").weight


def changed_in_place(self, x):
    self.q.weight.data.mul_(2)
    return self.q(x)


def beside_a_call(self, x):
    return self.q(x) if x.requires_grad else x @ self.q.weight.t()


def keywords(self, x):
    return self.project(x=x, **{"layer": self.k})


def several_arguments(self, x):
    return torch.stack([x @ layer.weight for layer in [*(self.q, self.v)]])


def a_mapped_function(self, x):
    return sum(map(lambda layer: x @ layer.weight, (self.q, self.k)))  # noqa: C417


def a_dictionary(self, x):
    layers = {"a": self.q, "b": self.k} if x.ndim else dict(a=self.q, b=self.k)  # noqa: C408
    return x @ layers["a"].weight


def a_closure(self, x):
    return x @ self.made()


def a_partial(self, x):
    return self.part(x)


def a_class_method(self, x):
    return self.of_class(self.v, x)


def plain_pairs(self, x):
    for _, layer in self.pairs:
        x = x @ layer.weight
    return x


def branches(self, x):
    layer = self.q if x.ndim > 1 else self.k
    return x @ layer.weight


READ = {
    keywords: {"k"}, several_arguments: {"q", "v"}, a_mapped_function: {"q", "k"}, a_dictionary: {"q", "k"},
    a_closure: {"v"}, a_partial: {"k"}, a_class_method: {"v"}, plain_pairs: {"q", "k"}, branches: {"q", "k"},
    direct: {"q"}, bias_alone: {"q"}, alias: {"q"}, by_getattr: {"k"}, names_in_a_loop: {"q", "k"},
    a_loop_over_children: {"layers.0.0", "layers.1.0"}, an_index: {"layers.1.1"}, grandchild_key: {"named.a"},
    items: {"named.a", "named.b"}, comprehension: {"q", "k"}, helper_function: {"v"}, own_method: {"k"},
    a_property: {"q"}, a_getter: {"v"}, nested_function: {"q"}, a_lambda: {"k"}, functional_call: {"q"},
    parameters: {"q"}, state: {"q"}, unbound_forward: {"q"}, internals: {"k"}, plain_list: {"k", "v"},
    submodule: {"layers.0.1"}, changed_in_place: {"q"}, beside_a_call: {"q"},
}  # fmt: skip


def called(self, x):
    return self.q.forward(self.k(x)) + self.named["a"](x)


def asked(self, x):
    w = self.q.weight
    if isinstance(self.q.weight, Tensor) and w.dtype != x.dtype and self.q.bias is not None:
        x = x.to(self.q.weight.dtype)
    x = x.to(next(self.parameters()).device).type_as(self.k.weight)
    assert self.q.weight.shape[0] == x.shape[-1] == self.q.weight.size(0)
    assert len(list(self.layers.parameters())) == 8
    return self.q(x)


def asked_once(self, x):
    if isinstance(self.q.weight, Tensor) and self.q.weight.dtype != x.dtype and self.q.bias is not None:
        x = x.to(self.k.weight.dtype)
    return self.q(x)


def a_setting_that_is_off(self, x):
    if self.fast or self.parts > 1:
        return x @ self.q.weight
    return self.q(x)


def chained(self, x):
    if 0 < self.q.weight.shape[0] == self.q.weight.size(0) < 99:
        x = x + self.q.weight.new_zeros(1)
    for layer, _ in zip((self.q, self.k), range(2), strict=True):
        x = layer(x)
    return sum(layer(x) for layer in (self.q, self.k) if layer.weight.dtype == x.dtype)


def walked(self, x):
    def walk(module):
        for child in module.children():
            walk(child)

    walk(self)
    return torch.utils.checkpoint.checkpoint(self.q, x)


def built(forward) -> Net:
    return type("Net", (Net,), {"forward": forward})()


def read_by(model: nn.Module) -> set[str]:
    found = reads(model)
    return {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module in found}


@pytest.mark.parametrize("forward", READ, ids=lambda forward: forward.__name__)
def test_a_read_is_found_in_every_form(forward):
    model = built(forward)
    assert read_by(model) == READ[forward]
    assert read_by(nn.Sequential(nn.ReLU(), model)) == {f"1.{path}" for path in READ[forward]}
    with pytest.raises(ValueError, match=r"reads its weight without calling it.*exclude_modules"):
        gk.inject(model, CFG, target_modules=sorted(READ[forward])[:1])


@pytest.mark.parametrize(
    "forward", [called, asked, asked_once, a_setting_that_is_off, chained, walked], ids=lambda f: f.__name__
)
def test_a_call_or_a_question_is_no_read(forward):
    assert read_by(built(forward)) == set()


def test_methods_that_forward_does_not_reach_may_read():
    class Initialized(Net):
        def reset_parameters(self):
            nn.init.zeros_(self.q.weight)

        def _init_weights(self, module):
            module.weight.data.normal_()

    assert read_by(Initialized()) == set()


def test_the_forward_of_a_parent_class_and_a_replaced_one_are_read():
    class Base(Net):
        def forward(self, x):
            return x @ self.k.weight

    class Derived(Base):
        def forward(self, x):
            return super().forward(self.q(x))

    assert read_by(Derived()) == {"k"}
    model = Net()
    model.forward = lambda x: x @ model.v.weight
    assert read_by(model) == {"v"}


@pytest.mark.parametrize("forward", [*READ, called, asked_once, chained], ids=lambda forward: forward.__name__)
def test_a_class_without_a_source_is_read_from_its_bytecode(forward, monkeypatch):
    def missing(code):
        raise OSError("could not get source code")

    monkeypatch.setattr(read_code.inspect, "getsourcelines", missing)
    read_code.parsed.cache_clear()
    try:
        assert isinstance(read_code.parsed(forward.__code__), ast.FunctionDef)
        assert read_by(built(forward)) == READ.get(forward, set())
    finally:
        read_code.parsed.cache_clear()


def test_hooks_and_a_forward_that_a_tool_has_wrapped_are_read():
    model = built(called)
    model.register_forward_hook(lambda module, x, y: y @ module.v.weight)
    assert read_by(model) == {"v"}
    accelerate = pytest.importorskip("accelerate.hooks")
    model = built(direct)
    accelerate.add_hook_to_module(model, accelerate.ModelHook())
    assert read_by(model) == {"q"}


def test_torchs_own_fused_paths_are_found_by_the_same_reading():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    inner = {"self_attn.out_proj", "linear1", "linear2"}
    assert read_by(layer) == inner
    assert read_by(nn.TransformerEncoder(layer, 2)) == {f"layers.{i}.{path}" for i in range(2) for path in inner}
    assert read_by(nn.TransformerDecoderLayer(8, 2, 16)) == {"self_attn.out_proj", "multihead_attn.out_proj"}


# Families of transformers: what is injected by default has its effect, what has none is refused.

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LM = {**SIZES, "vocab_size": 32, "pad_token_id": 0}
SPEECH = {
    **LM, "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
}  # fmt: skip
STATE = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32, "state_size": 4, "time_step_rank": 4}
T5 = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32,
    "decoder_start_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "LlamaForCausalLM": (LM, set()),
    "MixtralForCausalLM": ({**LM, "num_local_experts": 2, "num_key_value_heads": 2}, set()),
    "BloomForCausalLM": ({"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}, set()),
    "BertModel": (LM, set()),
    "T5ForConditionalGeneration": (T5, set()),
    "WavLMModel": (SPEECH, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "MambaForCausalLM": (STATE, {"x_proj", "dt_proj", "out_proj"}),
    "FalconMambaForCausalLM": (STATE, {"x_proj", "dt_proj", "out_proj"}),
}  # fmt: skip


def family(name: str):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**FAMILIES[name][0])).eval()
    ids = torch.arange(1, 7)[None]
    inputs = {"input_values": torch.randn(1, 800)} if "WavLM" in name else {"input_ids": ids}
    return model, inputs | ({"decoder_input_ids": ids} if "T5" in name else {})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:inject")
def test_a_default_injection_has_its_effect_or_is_refused(name, randomize):
    model, inputs = family(name)
    refused = FAMILIES[name][1]
    config = gk.GLoRAConfig(A="vector", B="lora", E="none", rank=2)
    if refused:
        with pytest.raises(ValueError) as raised:
            gk.inject(model, config)
        assert str(sorted(refused)) in str(raised.value)
        assert not named_layers(model)
    gk.inject(model, config, exclude_modules=sorted(refused))
    randomize(model, std=0.1)
    with torch.no_grad():
        unmerged = model(**inputs)[0]
        gk.merge(model)
        merged = model(**inputs)[0]
        with gk.disabled(model):
            base = model(**inputs)[0]
    assert float((base - merged).abs().max()) > 1e-3
    assert float((unmerged - merged).abs().max()) < 1e-4 * float(merged.abs().max())
