"""torch.compile over accelerated layers: one graph, what eager mode gives, and nothing compiled twice without need.

A decoder layer of transformers in float64 with adapters in two of its linear layers is compiled with
`fullgraph=True`. Without dropout it is compared with PEFT's own model in eager mode, with dropout with the accelerated
one from the same seed. Compilations are counted, and the operators in their graphs.
"""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from functools import partial
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the ShareLoRAConfig shares nothing"),  # of one block there is nothing to share
]

from functorch.compile import make_boxed_func, min_cut_rematerialization_partition  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding  # noqa: E402
from twins import EXACT, assert_same, randomized  # noqa: E402

import glora_kernels as gk  # noqa: E402
from glora_kernels.integrations.peft import GLoRAPeftConfig, ShareLoRAPeftConfig  # noqa: E402
from glora_kernels.reference.tolerance import FLOOR  # noqa: E402

WIDTH, TARGETS = 16, ["q_proj", "down_proj"]
FORWARD, BACKWARD = "glora_kernels.glora_linear.default", "glora_kernels.glora_linear_backward.default"
LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 1, "vocab_size": 32, "attention_bias": True, "mlp_bias": True, "use_cache": False,
    "attn_implementation": "sdpa",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A decoder layer with its positions, float64 throughout: the norm of transformers computes in float32.

    Args:
        reentrant: the kind of activation checkpointing around it; None is without.
    """

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        config = transformers.LlamaConfig(**LLAMA)
        self.layer, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)
        self.layer.input_layernorm, self.layer.post_attention_layernorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.decode(x)
        return checkpoint(self.decode, x, use_reentrant=self.reentrant)

    def decode(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        return self.layer(x, position_embeddings=self.rotary(x, positions), position_ids=positions)


class Gated(Block):
    """The second half of the block alone."""

    def decode(self, x: Tensor) -> Tensor:
        return x + self.layer.mlp(x)


class Compiler:
    """A backend that runs the graphs it gets. `forward` and `backward`: for each graph, how often it calls what."""

    def __init__(self) -> None:
        self.forward: list[Counter[str]] = []
        self.backward: list[Counter[str]] = []
        self.run = aot_autograd(
            fw_compiler=partial(self._record, self.forward),
            bw_compiler=partial(self._record, self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    def __call__(self, module: Any, inputs: Any) -> Any:
        return self.run(module, inputs)

    @staticmethod
    def _record(graphs: list[Counter[str]], module: Any, inputs: Any) -> Any:
        graphs.append(Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function"))
        return make_boxed_func(module.forward)


def lora(**more: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **more)


def four_bit(block: nn.Module) -> nn.Module:
    """The targets as bitsandbytes' Linear4bit."""
    bnb = pytest.importorskip("bitsandbytes")
    for parent, name in ((block.layer.self_attn, "q_proj"), (block.layer.mlp, "down_proj")):
        linear = getattr(parent, name)
        packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32)
        packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        packed.bias = linear.bias
        setattr(parent, name, packed.to("cpu"))
    return block


def adapted(config: Any, block: nn.Module | None = None, dtype: torch.dtype = torch.float64, bits: int = 0) -> Any:
    block = (block or Block()).to(dtype)
    return randomized(peft.get_peft_model(four_bit(block) if bits == 4 else block, config))


def compiled(model: nn.Module, **options: Any) -> Compiler:
    """Compiles the model in place."""
    compiler = Compiler()
    model.compile(backend=compiler, **{"fullgraph": True, **options})
    return compiler


def numbers(*lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*lead, WIDTH, generator=torch.Generator().manual_seed(math.prod(lead)), dtype=dtype)


PEFTS = {
    "glora-vector": peft.GloraConfig(r=3, target_modules=TARGETS, config_A_B="vector"),
    "glora-lora": peft.GloraConfig(r=3, target_modules=TARGETS, config_A_B="lora"),
    "hira": peft.HiraConfig(r=3, target_modules=TARGETS),
}
METHODS = {
    "gkglora": GLoRAPeftConfig(r=3, target_modules=TARGETS, A="vector", B="lora", C="lora", D="vector", E="vector"),
    "gksharelora": ShareLoRAPeftConfig(r=3, target_modules=TARGETS),
}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, x: Tensor, seed: int = 0, dynamic: bool = False) -> dict[str, Tensor]:
    """y, dx and the gradients of the adapters, where they have one. `dynamic`: marks batch and sequence as such."""
    x = x.clone().requires_grad_()
    if dynamic:
        torch._dynamo.mark_dynamic(x, [0, 1])
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype))
    return {"y": y.detach(), "x": x.grad, **gradients(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("kind", [*PEFTS, *METHODS])
def test_one_graph_for_any_rows_and_weights(kind):
    """Batch and sequence are marked as dynamic, an error where something fixes them; an optimizer steps in between."""
    plain = adapted((PEFTS | METHODS)[kind])
    fast = copy.deepcopy(plain)
    if kind in PEFTS:
        gk.accelerate(fast, verbose=False)
    compiler = compiled(fast)
    optimizers = [torch.optim.SGD(trained(model).values(), lr=0.01) for model in (plain, fast)]
    for lead in ((2, 5), (3, 7), (4, 6)):
        assert_same(step(fast, numbers(*lead), dynamic=True), step(plain, numbers(*lead)))
        for optimizer in optimizers:
            optimizer.step()
    assert len(compiler.forward) == len(compiler.backward) == 1
    assert compiler.forward[0][FORWARD] == compiler.backward[0][BACKWARD] == len(TARGETS)


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
def test_alpha_is_no_constant_of_the_graph(dynamic, graphs):
    """As PEFT changes it in each of its ways. Left alone, torch.compile takes the first other size to see it varies."""
    plain = adapted(lora())
    fast = gk.accelerate(copy.deepcopy(plain), verbose=False)
    compiler = compiled(fast, dynamic=dynamic)
    for lead in ((2, 5), (3, 7)):
        assert_same(step(fast, numbers(*lead)), step(plain, numbers(*lead)))
    assert len(compiler.forward) == graphs
    changes = [
        lambda layer: layer.scaling.__setitem__("default", 0.37),
        lambda layer: layer.set_scale("default", 0.5),
        lambda layer: layer.scale_layer(0.7),
        lambda layer: layer.unscale_layer(),
    ]
    for lead, change in zip(((3, 7), (5, 4), (2, 9), (4, 4)), changes, strict=True):
        for layer in (*lora_layers(plain), *lora_layers(fast)):
            change(layer)
        with torch.no_grad():
            for parameter in (*trained(plain).values(), *trained(fast).values()):
                parameter.mul_(1.25)
        assert_same(step(fast, numbers(*lead)), step(plain, numbers(*lead)))
    assert len(compiler.forward) == len(compiler.backward) == graphs


def test_a_4bit_base():
    """In float32, in which bitsandbytes computes here; against eager mode, which differs in the product with alpha."""
    plain = adapted(lora(), dtype=torch.float32, bits=4)
    eager, fast = (gk.accelerate(copy.deepcopy(plain), verbose=False) for _ in range(2))
    compiler = compiled(fast)
    for lead in ((2, 5), (3, 7), (4, 6)):
        for layer in (*lora_layers(eager), *lora_layers(fast)):
            layer.set_scale("default", 1.0 / sum(lead))
        x = numbers(*lead, dtype=torch.float32)
        assert_same(step(fast, x, dynamic=True), step(eager, x), FLOOR * torch.finfo(torch.float32).eps)
    assert len(compiler.forward) == len(compiler.backward) == 1
    assert compiler.forward[0][FORWARD] == compiler.backward[0][BACKWARD] == len(TARGETS)


class Recomputed(nn.Module):
    """Checkpointing around a compiled module: what is run again is compiled code."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False)


def assert_one_mask(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Forward and backward drop the same elements, other seeds drop others; the results of a step.

    y is linear in lora_B of the last layer, down_proj, so that ⟨dy, y(B+V) - y(B)⟩ = ⟨∂B, V⟩ to rounding, with the
    mask of the forward on the left and that of the backward on the right.
    """
    found = step(model, x, seed=3)
    assert not torch.equal(found["y"], step(model, x, seed=4)["y"])
    name, up = next((n, p) for n, p in trained(model).items() if "down_proj" in n and "lora_B" in n)
    change = torch.randn(up.shape, generator=torch.Generator().manual_seed(6), dtype=up.dtype)
    with torch.no_grad():
        up.add_(change)
    moved = step(model, x, seed=3)["y"]
    with torch.no_grad():
        up.sub_(change)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    difference, gradient = ((moved - found["y"]) * dy).sum(), (found[name] * change).sum()
    assert abs(difference) > 0.1
    assert abs(difference - gradient) <= EXACT * (moved * dy).abs().sum()
    return found


@pytest.mark.parametrize("place", ["inside", "inside-reentrant", "outside"])
def test_dropout_and_checkpointing(place):
    """Checkpointing inside of what is compiled, which computes the layers anew in the graph of backward, or around."""
    block = Block({"inside": False, "inside-reentrant": True}.get(place))
    eager = adapted(lora(lora_dropout=0.25), block).train()
    gk.accelerate(eager, verbose=False)
    fast = copy.deepcopy(eager)
    compiler = compiled(fast)
    found = assert_one_mask(Recomputed(fast) if place == "outside" else fast, numbers(2, 5))
    assert_same({name.removeprefix("module."): value for name, value in found.items()}, step(eager, numbers(2, 5), 3))
    assert len(compiler.forward) == len(compiler.backward) == 1
    assert compiler.forward[0][FORWARD] == compiler.backward[0][BACKWARD] == len(TARGETS)
    assert (compiler.backward[0][FORWARD] > 0) == place.startswith("inside")


def test_dropout_and_checkpointing_by_inductor():
    """It draws from a stream of its own, so that only the mask's two sides can be compared."""
    fast = gk.accelerate(adapted(lora(lora_dropout=0.25), block=Gated(False)).train(), verbose=False)
    fast.compile(backend="inductor", fullgraph=True)
    try:
        assert_one_mask(fast, numbers(2, 5))
    except Exception as error:
        if "compiler" in str(error).lower() and "glora" not in str(error).lower():
            pytest.skip(f"inductor has no C++ compiler here: {type(error).__name__}")
        raise


def test_adapters_are_switched():
    """One graph for each set of active adapters, and one without any, compiled when it is first met."""
    plain = adapted(lora())
    plain.add_adapter("other", lora())
    randomized(plain)
    fast = gk.accelerate(copy.deepcopy(plain), verbose=False)
    compiler = compiled(fast)
    for name, graphs in (("default", 1), ("other", 2), ("default", 2), ("other", 2)):
        for model in (plain, fast):
            model.set_adapter(name)
        assert_same(step(fast, numbers(2, 5)), step(plain, numbers(2, 5)))
        assert len(compiler.forward) == graphs
    with torch.no_grad(), plain.disable_adapter(), fast.disable_adapter():
        assert_same({"y": fast(numbers(2, 5))}, {"y": plain(numbers(2, 5))})
    assert len(compiler.forward) == 3
    assert [graph[FORWARD] for graph in compiler.forward] == [len(TARGETS), len(TARGETS), 0]


def language_model(dropout: float) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).double()
    config = lora(lora_dropout=dropout, task_type="CAUSAL_LM")
    return randomized(peft.get_peft_model(model, config, autocast_adapter_dtype=False)).train()


def losses(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def test_a_language_model_compiled_before_it_is_accelerated():
    """The change of class is seen, and its undoing finds what was compiled before."""
    plain, fast = language_model(0.0), language_model(0.0)
    compiler = compiled(fast)
    ids = torch.arange(10).view(2, 5)
    for change, graphs, ours in ((None, 1, 0), (partial(gk.accelerate, verbose=False), 2, 2), (gk.decelerate, 2, 2)):
        if change is not None:
            change(fast)
        assert_same(losses(fast, ids), losses(plain, ids))
        assert len(compiler.forward) == graphs
        assert compiler.forward[-1][FORWARD] == ours


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_checkpointing_of_transformers(reentrant):
    """One graph without the hook that makes embeddings require a gradient, where torch.compile breaks the graph.

    The reentrant kind needs that hook in eager mode only.
    """
    eager, fast = language_model(0.25), language_model(0.25)
    for model in (eager, fast):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if not hasattr(model, "_require_grads_hook"):  # newer releases of transformers do so themselves
            model.enable_input_require_grads()
        gk.accelerate(model, verbose=False)
    fast.disable_input_require_grads()
    compiler = compiled(fast)
    ids = torch.arange(10).view(2, 5)
    assert_same(losses(fast, ids), losses(eager, ids))
    assert len(compiler.forward) == len(compiler.backward) == 1
    assert compiler.forward[0][FORWARD] == compiler.backward[0][BACKWARD] == len(TARGETS)
    assert compiler.backward[0][FORWARD] > 0
