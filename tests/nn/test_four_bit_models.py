"""Models over 4 bits: adapted, trained, saved, and those that bitsandbytes and transformers made."""

import copy

import pytest
import torch
from packed import FULL, TARGETS, packed_layers
from torch import nn
from torch.nn import functional as F

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear, QuantizedLinear, ShareLoRAConfig
from glora_kernels.nn.model import named_layers


def four_bit(model, **more):
    return gk.quantize(model, double_quant=True, target_modules=TARGETS, **more)


@pytest.mark.parametrize("config", [
    FULL, ShareLoRAConfig(rank=3, share="A"), ShareLoRAConfig(rank=3, share="B"), ShareLoRAConfig(rank=3, share="AB"),
    ShareLoRAConfig(rank=3, share="A", tie_siblings=True, dropout=0.5),
    ShareLoRAConfig(rank=3, share="A", A="vector", C="vector", E="vector"),
], ids=str)  # fmt: skip
def test_a_quantized_model_trains_as_its_dense_twin(config, vit, randomize):
    """Loss and every gradient of the adapters, shared or not, equal those over the dense matrices."""
    model = randomize(gk.inject(four_bit(vit()), config, train=["classifier"])).double()
    assert {layer.quant_state is not None for layer in named_layers(model).values()} == {True}
    twin = gk.inject(dense_of_quantized(vit()), config, train=["classifier"]).double()
    assert gk.trainable_parameters(model) == gk.trainable_parameters(twin)
    with torch.no_grad():
        mine, other = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, twin))
        assert mine.keys() == other.keys()
        for name, parameter in other.items():
            parameter.copy_(mine[name])
    x, losses = torch.randn(6, 4, 12).double(), []
    for each in (model, twin):
        torch.manual_seed(11)
        losses.append(F.cross_entropy(each(x), torch.arange(6) % 5))
        losses[-1].backward()
    assert torch.allclose(losses[0], losses[1], rtol=1e-12)
    for name, parameter in other.items():
        assert torch.allclose(mine[name].grad, parameter.grad, rtol=1e-9, atol=1e-12), name


def dense_of_quantized(model):
    """Every linear layer but the head with the matrix that its codes stand for."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not model.classifier[1]:
                frozen = gk.quantize(copy.deepcopy(child), double_quant=True)
                setattr(module, name, frozen.to_linear())
    return model


def test_shared_factors_are_one_parameter_in_fp32_over_16_bits(vit):
    model = gk.inject(gk.quantize(vit().bfloat16()), ShareLoRAConfig(rank=3, share="A"))
    first, second = (model.blocks[i].attn.q_proj for i in range(2))
    assert first.B_down is second.B_down
    assert first.B_up is not second.B_up
    assert first.B_down.dtype == torch.float32
    assert first.base_dtype == torch.bfloat16


def test_patterns_choose_layers_of_a_quantized_model(vit):
    model = gk.inject(gk.quantize(vit()), {"blocks.0.*": FULL, "*": None}, target_modules=["q_proj", "v_proj"])
    assert set(named_layers(model)) == {"blocks.0.attn.q_proj", "blocks.0.attn.v_proj"}
    assert isinstance(model.blocks[1].attn.q_proj, QuantizedLinear)
    model = gk.inject(gk.quantize(vit(), target_modules=["q_proj"]), FULL)
    kinds = {path: layer.quant_state is not None for path, layer in named_layers(model).items()}
    assert {path for path, packed in kinds.items() if packed} == {f"blocks.{i}.attn.q_proj" for i in range(2)}
    assert len(kinds) == 13
    with pytest.raises(ValueError, match="already"):
        gk.inject(model, FULL)


def test_a_4_bit_module_cannot_be_trained_whole(vit):
    """Its weight would stay as it is, and nobody would know."""
    model = gk.quantize(vit(), target_modules=["*"])
    assert isinstance(model.classifier[1], QuantizedLinear)
    with pytest.raises(ValueError, match="4 bits"):
        gk.inject(model, FULL, target_modules=["embed"], train=["classifier"])
    assert not named_layers(model)


def test_disabled_gives_the_frozen_model(vit, randomize):
    base = gk.quantize(vit()).eval()
    x = torch.randn(3, 4, 12)
    expected = base(x)
    model = randomize(gk.inject(base, FULL)).eval()
    assert not torch.equal(model(x), expected)
    with gk.disabled(model):
        assert torch.equal(model(x), expected)
    with gk.disabled(model), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_shift_once_gives_the_same(vit, randomize):
    model = randomize(gk.inject(four_bit(vit()), FULL), std=0.1).eval()
    x = torch.randn(3, 4, 12)
    expected = model(x)
    with gk.shift_once(model):
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("share", ["A", "AB"])
def test_deferred_shared_gradients_are_the_same(share, vit, randomize):
    model = randomize(gk.inject(gk.quantize(vit()), ShareLoRAConfig(rank=3, share=share))).double()
    x = torch.randn(3, 4, 12).double()
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with gk.deferred_shared_grads(model):
        model(x).square().sum().backward()
    for name, grad in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, grad, rtol=1e-10, atol=1e-12), name


def test_siblings_are_not_fused_and_the_reason_is_given(vit):
    model = gk.inject(gk.quantize(vit()), GLoRAConfig.lora(3))
    with pytest.raises(ValueError, match="4-bit base"):
        gk.fuse_siblings(model, [["blocks.0.attn.q_proj", "blocks.0.attn.k_proj"]])
    assert "siblings" not in repr(model)


def test_warmup_leaves_no_trace(vit, randomize):
    model = randomize(gk.inject(gk.quantize(vit()), FULL))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert gk.warmup(model, 16, progress=False) is not None
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_distributed_data_parallel_of_one_process(vit, randomize, tmp_path):
    """DDP sees no codes, and the gradients are those of the model alone."""
    model = randomize(gk.inject(gk.quantize(vit()), FULL)).double()
    x = torch.randn(3, 4, 12).double()
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(x).square().sum().backward()
        del wrapped  # before the group, which its last owner could wait for with Python's lock
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.allclose(model.get_parameter(n).grad, g, rtol=1e-12) for n, g in expected.items())


# Files.


@pytest.mark.parametrize("config", [FULL, ShareLoRAConfig(rank=3, share="A")], ids=["glora", "share"])
def test_an_adapter_goes_into_a_freshly_quantized_model(config, vit, randomize, tmp_path):
    model = randomize(gk.inject(gk.quantize(vit(), double_quant=True), config)).eval()
    gk.save_adapter(model, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 120_000
    x = torch.randn(3, 4, 12)
    plain = gk.quantize(vit(), double_quant=True).eval()
    other = gk.load_adapter(plain, tmp_path / "a.safetensors")
    assert torch.equal(other(x), model(x))
    assert gk.trainable_parameters(other) == gk.trainable_parameters(model)
    again = gk.load_adapter(gk.inject(gk.quantize(vit(), double_quant=True), config).eval(), tmp_path / "a.safetensors")
    assert torch.equal(again(x), model(x))
    dense = gk.load_adapter(vit().eval(), tmp_path / "a.safetensors")
    assert dense(x).isfinite().all()


def test_an_adapter_of_a_dense_model_goes_over_4_bits(vit, randomize, tmp_path):
    gk.save_adapter(randomize(gk.inject(vit(), FULL)), tmp_path / "a.safetensors")
    other = gk.load_adapter(gk.quantize(vit()), tmp_path / "a.safetensors")
    assert len(packed_layers(other)) == 13
    assert {type(m) for m in packed_layers(other).values()} == {GLoRALinear}


def test_a_whole_model_in_a_state_dict(vit, randomize):
    model = randomize(gk.inject(gk.quantize(vit(), double_quant=True), FULL)).eval()
    other = gk.inject(gk.quantize(vit(), "fp4", blocksize=128), FULL).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 4, 12)
    assert torch.equal(other(x), model(x))


# bitsandbytes and transformers.


def of_bitsandbytes(model, skip=("lm_head",)):
    """Its linear layers as quantized `Linear4bit`s, as transformers replaces them."""
    bnb = pytest.importorskip("bitsandbytes")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name not in skip:
                packed = bnb.nn.Linear4bit(child.in_features, child.out_features, child.bias is not None,
                                           quant_type="nf4")  # fmt: skip
                packed.load_state_dict(child.state_dict())
                setattr(module, name, packed.to("cpu").train(child.training))
    return model


def test_a_model_of_linear4bit_is_injected_as_it_is(llama, randomize):
    """The same as ours of the same weights, layer for layer and bit for bit; the head stays."""
    ids = torch.arange(12).view(2, 6)
    for config in (FULL, ShareLoRAConfig(rank=3, share="A")):
        theirs = of_bitsandbytes(llama())
        pointers = {m.weight.data_ptr() for p, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
        theirs = randomize(gk.inject(theirs, config))
        assert {layer.weight.data_ptr() for layer in named_layers(theirs).values()} == pointers
        mine = randomize(gk.inject(gk.quantize(llama(), double_quant=True), config))
        assert theirs.lm_head.weight.dtype == torch.float32
        assert torch.equal(theirs(ids).logits, mine(ids).logits)
        a, b = theirs.state_dict(), mine.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a if "bitsandbytes__" not in name)


@pytest.mark.parametrize("config", [GLoRAConfig.lora(4), FULL, ShareLoRAConfig(rank=4, share="A")], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_llama_learns_over_4_bits(config, checkpointing, llama):
    model = gk.inject(gk.quantize(llama(), double_quant=True), config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    packed = {path: layer.weight.clone() for path, layer in packed_layers(model).items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.03)
    ids, losses = torch.arange(16).view(2, 8), []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(layer.weight, packed[path]) for path, layer in packed_layers(model).items())


def test_from_pretrained_with_a_quantization_config(llama, randomize, tmp_path):
    """The path that users take: BitsAndBytesConfig, here on a CPU and from a folder."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    llama().save_pretrained(tmp_path)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    assert sum(type(m).__name__ == "Linear4bit" for m in model.modules()) == 14
    model = randomize(gk.inject(model, FULL)).eval()
    assert len(packed_layers(model)) == 14
    mine = randomize(gk.inject(gk.quantize(llama(), double_quant=True), FULL)).eval()
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids).logits, mine(ids).logits)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for layer in named_layers(model).values() for p in layer.adapter().values())
