"""Siblings under torch.compile: one graph with one grouped call."""

import copy

import pytest
import torch
from broods import LORA, RICH, outputs, waiting
from torch import nn

from glora_kernels import GLoRAConfig
from glora_kernels.nn.siblings import install


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
