"""A state dictionary, of a model or of a part of one, keeps what is shared shared."""

import copy
import pickle

import pytest
import torch
from sharing import untied
from torch import nn

import glora_kernels as gk
from glora_kernels import ShareLoRAConfig
from glora_kernels.nn.model import named_layers


def test_a_shared_factor_stays_one_to_and_from_the_meta_device(vit):
    model = gk.inject(vit(), gk.ShareLoRAConfig(rank=4, share="AB"))
    rows = len(gk.shared(model).rows)
    assert rows > 0
    moved = model.to("meta").to_empty(device="cpu")
    assert len(gk.shared(moved).rows) == rows
    assert all(parameter.device.type == "cpu" for parameter in moved.parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_keeps_sharing_and_refuses_an_untied_state(assign, vit, randomize):
    config = ShareLoRAConfig(rank=2, share="AB")
    source = randomize(gk.inject(vit(), config))
    model = gk.inject(vit(), config)
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    for bad in (untied(model), untied(source)):
        with pytest.raises(
            RuntimeError, match=r"'blocks\.0\.attn\.q_proj\.B_.*' and 'blocks\.1\.attn\.q_proj\.B_.*' are one"
        ):
            model.load_state_dict(bad, strict=False, assign=assign)
        assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    copies = {name: value.clone() for name, value in source.state_dict().items()}
    assert not any(model.load_state_dict(copies, assign=assign))
    assert gk.shared(model) == gk.shared(source)
    assert len(gk.shared(model).rows) == 12
    assert all(torch.equal(value, copies[name]) for name, value in model.state_dict().items())
    assert {p for p in model.parameters() if p.requires_grad} == {
        p for layer in named_layers(model).values() for p in layer.adapter().values()
    }


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_with_a_shared_value_under_one_name_keeps_sharing(assign, vit, randomize):
    source = randomize(gk.inject(vit(), ShareLoRAConfig(rank=2)))
    once = {name: value.clone() for name, value in source.state_dict().items()}
    absent = [row.paths[0] + ".B_down" for row in gk.shared(source).rows]
    for name in absent:
        del once[name]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*blocks\.0\.attn\.q_proj\.B_down"):
        gk.inject(vit(), ShareLoRAConfig(rank=2)).load_state_dict(once, assign=assign)
    model = gk.inject(vit(), ShareLoRAConfig(rank=2))
    report = model.load_state_dict(once, strict=False, assign=assign)
    assert (sorted(report.missing_keys), report.unexpected_keys) == (sorted(absent), [])
    assert gk.shared(model) == gk.shared(source)
    assert len(gk.shared(model).rows) == 6
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    trained = {name for name, p in source.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("assign", [False, True])
def test_a_part_of_a_model_is_loaded_as_the_whole_is(assign, llama, randomize):
    source = randomize(gk.inject(llama(), ShareLoRAConfig(rank=2)))
    model = gk.inject(llama(), ShareLoRAConfig(rank=2))
    rows = len(gk.shared(model).rows)
    for part, other in ((model.model, source.model), (model.model.layers, source.model.layers)):
        with pytest.raises(RuntimeError, match="one shared parameter of the model"):
            part.load_state_dict(untied(part), assign=assign)
        part.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=assign)
        assert len(gk.shared(model).rows) == rows == 7
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def taken_from(source, part):
    """The state of a part of a model, its values in memory of their own."""
    return {name: value.clone() for name, value in source.get_submodule(part).state_dict().items()}


PARTS = ["blocks.1", "blocks.1.attn", "blocks.0.attn.q_proj", "blocks.1.mlp.2"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("copies", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_part_with_one_name_of_a_factor_loads_it_for_all_layers(part, assign, copies, vit, randomize):
    config = ShareLoRAConfig(rank=2, share="AB")
    source, model = randomize(gk.inject(vit(), config)), copies(gk.inject(vit(), config))
    count, rows = gk.trainable_parameters(model), gk.shared(model)
    model.get_submodule(part).load_state_dict(taken_from(source, part), assign=assign)
    assert gk.trainable_parameters(model) == count
    assert gk.shared(model) == rows
    for path, layer in named_layers(model).items():
        alike = [other for other in named_layers(source) if other.startswith(part) and other[8:] == path[8:]]
        for name, parameter in layer.adapter().items():
            for other in alike:
                assert torch.equal(parameter, named_layers(source)[other].adapter()[name])


def test_a_part_is_moved_to_and_from_the_meta_device_without_untying(vit):
    model = gk.inject(vit(), ShareLoRAConfig(rank=2, share="AB"))
    rows, count = gk.shared(model), gk.trainable_parameters(model)
    model.blocks[1].to("meta")
    assert model.blocks[0].attn.q_proj.B_down.is_meta
    for module in model.modules():  # as they are given memory one by one
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert (gk.shared(model), gk.trainable_parameters(model)) == (rows, count)


def test_a_copy_of_a_part_is_its_own(vit, randomize):
    model = gk.inject(vit(), ShareLoRAConfig(rank=2))
    source, before = randomize(gk.inject(vit(), ShareLoRAConfig(rank=2))), model.blocks[0].attn.q_proj.B_down
    other = copy.deepcopy(model.blocks[1])
    other.load_state_dict(taken_from(source, "blocks.1"), assign=True)
    assert model.blocks[0].attn.q_proj.B_down is model.blocks[1].attn.q_proj.B_down is before
    model.blocks[1] = other
    model.blocks[1].load_state_dict(taken_from(source, "blocks.0"), assign=True)
    assert model.blocks[0].attn.q_proj.B_down is before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_states_of_a_wrapped_part_are_looked_at_too(vit):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = gk.inject(vit(), ShareLoRAConfig(rank=2))
    state = untied(model)
    outer = nn.ModuleDict({"net": model})
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    with pytest.raises(RuntimeError, match=r"'net\.blocks\.0\.attn.* are one shared parameter"):
        outer.load_state_dict({f"net.{name}": value for name, value in state.items()})
    outer.load_state_dict({name: value.clone() for name, value in outer.state_dict().items()})
