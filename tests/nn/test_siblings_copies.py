"""The group of a copy is of the copies."""

import copy

import pytest
import torch
from broods import LORA, group_of, outputs, waiting
from copies import COPIES

from glora_kernels.nn.siblings import install, tied_sets


@pytest.mark.parametrize("how", COPIES)
def test_the_group_of_a_copy_is_of_the_copies(how, brood, calls):
    layers = brood([LORA] * 3)
    group = install(layers)
    x = torch.randn(4, 12).double()
    layers["layer0"](x)  # what waits is not copied
    other = COPIES[how](layers)
    assert group_of(other).members == list(other.values())
    assert group_of(other).names == group.names
    assert not group_of(other).tied
    assert tied_sets(other) == []
    assert not waiting(other)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_()
    assert all(y.ne(0).all() for y in outputs(other, x))
    assert calls == [3, 3]


def test_a_copy_of_one_layer_computes_alone_and_copies_nothing_else(brood, calls):
    layers = brood([LORA] * 3)
    x = torch.randn(4, 12).double()
    expected = outputs(layers, x)
    group = install(layers)
    deep, shallow = copy.deepcopy(layers["layer1"]), copy.copy(layers["layer1"])
    assert deep._siblings.members == [None, deep, None]
    assert group.members == list(layers.values())
    assert torch.equal(deep(x), expected[1])
    assert torch.equal(shallow(x), expected[1])
    assert not calls
