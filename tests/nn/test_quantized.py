"""4-bit layers as modules: quantizing models, every way of adapting them, saving, copying, training."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear, QuantizedLinear, ShareLoRAConfig, reference
from glora_kernels.nn.model import named_layers
from glora_kernels.quant import QuantizedWeight, dequantize

FULL = GLoRAConfig("vector", "lora", "lora", "vector", "vector", rank=3, alpha=6)
CONFIGS = {
    "lora": GLoRAConfig.lora(rank=3, alpha=6),
    "full": FULL,
    "a-lora": GLoRAConfig("lora", "vector", "vector", "constant", "constant", rank=2),
    "matmul": GLoRAConfig("lora", "lora", "vector", "none", "vector", rank=3, variant="matmul"),
    "nothing": GLoRAConfig("none", "none", "none", "none", "none"),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
QUANTIZED = {"embed", *(f"blocks.{i}.{n}" for i in range(2) for n in
             ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.0", "mlp.2"))}  # fmt: skip


TARGETS = ["embed", "blocks.*"]
"""Of the classifier, all but its head, whose last name does not give it away."""


def quantized(k=40, n=9, bias=True, dtype=torch.float32, seed=0, **more):
    torch.manual_seed(seed)
    return gk.quantize(nn.Linear(k, n, bias, dtype=dtype), double_quant=True, **more)


def four_bit(model, **more):
    return gk.quantize(model, double_quant=True, target_modules=TARGETS, **more)


def packed_layers(model):
    return {path: m for path, m in model.named_modules() if getattr(m, "quant_state", None) is not None}


# quantize.


def test_a_model_is_quantized_in_place_but_its_head(vit):
    model = vit()
    weights = {path: m.weight.clone() for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = model.classifier[1]
    assert gk.quantize(model, "nf4", double_quant=True, target_modules=TARGETS) is model
    assert set(packed_layers(model)) == QUANTIZED
    assert model.classifier[1] is head
    for path, layer in packed_layers(model).items():
        dense = dequantize(layer.base_weight(), torch.float32)
        assert (dense - weights[path]).norm() < 0.15 * weights[path].norm()
        assert not any(p.requires_grad for p in layer.parameters())
    assert model(torch.randn(2, 4, 12)).isfinite().all()


def test_default_targets_skip_the_head(llama):
    for tied in (False, True):
        model = llama(tied)
        gk.quantize(model)
        assert type(model.lm_head) is nn.Linear
        assert len(packed_layers(model)) == 14
        assert not model.training
        assert not any(layer.training for layer in packed_layers(model).values())


def test_conv1d_is_quantized_as_the_matrix_it_computes_with(gpt2):
    model = gpt2()
    conv = model.transformer.h[0].attn.c_attn
    weight, bias = conv.weight.t().clone(), conv.bias
    gk.quantize(model)
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.out_features, layer.in_features) == tuple(weight.shape)
    assert layer.bias is not None
    assert torch.equal(layer.bias, bias)
    expected = gk.quantize(linear_of(weight, bias), "nf4")
    assert torch.equal(layer.weight, expected.weight)


def linear_of(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias.detach().clone())
    return linear


def test_a_shared_layer_is_quantized_once():
    linear = nn.Linear(8, 8)
    model = gk.quantize(nn.Sequential(linear, nn.ReLU(), linear))
    assert model[0] is model[2]


def test_the_layer_computes_with_what_the_codes_stand_for():
    for dtype in (torch.float32, torch.bfloat16):
        layer = quantized(dtype=dtype)
        x = torch.randn(2, 3, 40, dtype=dtype, requires_grad=True)
        y = layer(x)
        dense = layer.to_linear()
        assert (dense.weight.dtype, dense.bias.dtype) == (dtype, dtype)
        assert torch.equal(y, dense(x))
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert layer.to_linear(torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize(("change", "words"), [
    ({"quant_type": "int4"}, "quant_type"), ({"blocksize": 63}, "blocksize"),
    ({"compute_dtype": torch.int8}, "compute_dtype"),
    ({"target_modules": ["nothing"]}, "matches no module"), ({"target_modules": ["norm"]}, "no linear layer"),
])  # fmt: skip
def test_bad_arguments_leave_the_model(change, words):
    model = nn.Sequential()
    model.add_module("a", nn.Linear(8, 8))
    model.add_module("norm", nn.LayerNorm(8))
    with pytest.raises(ValueError, match=words):
        gk.quantize(model, **change)
    assert type(model.a) is nn.Linear


@pytest.mark.parametrize(("spoil", "error", "words"), [
    (lambda m: m[1].weight.data.fill_(float("nan")), ValueError, r"'1'.*NaN"),
    (lambda m: m[1].weight.data[0].fill_(float("inf")), ValueError, r"'1'.*NaN or inf"),
    (lambda m: m[1].double(), TypeError, r"'1'.*float64"),
    (lambda m: m[1].to("meta"), ValueError, r"'1'.*meta"),
    (lambda m: m[1].register_forward_hook(print), ValueError, r"'1'.*hooks"),
    (lambda m: m.__setitem__(1, gk.quantize(m[1])), ValueError, r"'1'.*4 bits already"),
    (lambda m: gk.inject(m[1:], FULL), ValueError, "GLoRA layers"),
])  # fmt: skip
def test_a_layer_that_cannot_be_quantized_leaves_the_whole_model(spoil, error, words):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    spoil(model)
    if "GLoRA" in words:
        model[1] = gk.inject(nn.Linear(8, 8), FULL)
    first, weight = model[0], model[0].weight.clone()
    with pytest.raises(error, match=words):
        gk.quantize(model)
    assert model[0] is first
    assert torch.equal(model[0].weight, weight)


def test_what_is_no_linear_layer_is_refused():
    with pytest.raises(ValueError, match="no linear layer"):
        gk.quantize(nn.LayerNorm(8))
    with pytest.raises(TypeError, match="QuantizedWeight"):
        QuantizedLinear(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="compute_dtype"):
        QuantizedLinear(quantized().base_weight(), compute_dtype=torch.int8)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        gk.quantize(nn.MultiheadAttention(8, 2))


# A GLoRA layer over it.


@each_config
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_reference(config, bias, randomize):
    layer = randomize(GLoRALinear.from_linear(quantized(bias=bias), config)).double()
    assert layer.quant_state.absmax.dtype == torch.uint8
    assert layer.weight.dtype == torch.uint8
    x, dy = torch.randn(2, 5, 40).double().requires_grad_(), torch.randn(2, 5, 9).double()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.adapter().items()}
    x_ref = x.detach().clone().requires_grad_()
    expected = reference.glora_linear(
        x_ref, dequantize(layer.base_weight(), torch.float64), layer.bias, leaves, config
    )  # fmt: skip
    y = layer(x)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    y.backward(dy)
    expected.backward(dy)
    assert torch.allclose(x.grad, x_ref.grad, rtol=1e-12, atol=1e-12)
    for name, leaf in leaves.items():
        assert torch.allclose(layer.get_parameter(name).grad, leaf.grad, rtol=1e-11, atol=1e-11), name
    assert layer.weight.grad is None


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float32])
def test_a_fresh_layer_equals_its_base_bit_for_bit(config, dtype, compute):
    base = quantized(k=128, n=48, dtype=dtype, compute_dtype=compute)
    x = torch.randn(33, 128, dtype=dtype)
    expected = base(x)
    layer = GLoRALinear.from_linear(base, config)
    assert expected.dtype == dtype
    assert torch.equal(layer(x), expected)
    assert {p.dtype for p in layer.adapter().values()} <= {compute or dtype}
    assert layer.weight.data_ptr() == base.weight.data_ptr()


@each_config
@pytest.mark.parametrize("bias", [True, False])
def test_x_in_more_bits_than_the_bias(config, bias, randomize):
    """Without a compute_dtype x decides: fp32 x over a layer quantized from bfloat16, whose bias is in bfloat16."""
    layer = GLoRALinear.from_linear(quantized(bias=bias, dtype=torch.bfloat16), config, adapter_dtype=torch.float32)
    layer = randomize(layer)
    x = torch.randn(5, 40, requires_grad=True)
    adapter = {name: p.detach().double() for name, p in layer.adapter().items()}
    b = None if layer.bias is None else layer.bias.double()
    expected = reference.glora_linear(x.double(), dequantize(layer.base_weight(), torch.float64), b, adapter, config)
    y = layer(x)
    torch.testing.assert_close(y, expected.float())
    y.sum().backward()
    assert x.grad.isfinite().all()


@each_config
def test_the_base_cannot_be_overwritten_by_chance(config):
    layer = GLoRALinear.from_linear(quantized(), config)
    with pytest.raises(RuntimeError, match="4 bits"):
        layer.reset_parameters()
    layer.reset_adapter()
    weight = layer.base_weight()
    assert isinstance(weight, QuantizedWeight)
    with pytest.raises(RuntimeError):
        layer.weight.requires_grad_(True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", ["frozen", "glora"])
def test_copies_compute_the_same_and_share_nothing(how, kind, randomize):
    layer = quantized()
    if kind == "glora":
        layer = randomize(GLoRALinear.from_linear(layer, FULL))
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 40)
    expected = layer(x)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.weight.zero_()
        for tensor in other.quant_state.tensors():
            tensor.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cast", ["to", "method", "kwargs"])
def test_a_change_of_dtype_touches_bias_and_adapter_only(dtype, cast, randomize):
    """absmax and the offset are no parameters and no buffers: rounding them would be another weight."""
    model = nn.Sequential(randomize(GLoRALinear.from_linear(quantized(), FULL)), quantized(k=9, n=9))
    before = [[t.clone() for t in (m.weight, *m.quant_state.tensors())] for m in model]
    name = {torch.bfloat16: "bfloat16", torch.float16: "half", torch.float64: "double"}[dtype]
    model = {"to": lambda: model.to(dtype), "method": lambda: getattr(model, name)(),
             "kwargs": lambda: model.to(device="cpu", dtype=dtype)}[cast]()  # fmt: skip
    for module, tensors in zip(model, before, strict=True):
        now = (module.weight, *module.quant_state.tensors())
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(now, tensors, strict=True))
        assert module.bias.dtype == dtype
    assert {p.dtype for p in model[0].adapter().values()} == {dtype}
    assert model(torch.randn(2, 40, dtype=dtype)).dtype == dtype


def test_to_meta_and_back_from_a_state(randomize):
    layer = randomize(GLoRALinear.from_linear(quantized(), FULL))
    state, x = layer.state_dict(), torch.randn(2, 40)
    expected = layer(x)
    state = {name: t.clone() for name, t in state.items()}
    layer.to("meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.quant_state.tensors()))
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_an_x_on_another_device_is_refused():
    layer = quantized()
    with pytest.raises(ValueError, match="one device"):
        layer(torch.randn(2, 40, device="meta"))
    assert layer.to("meta")(torch.randn(2, 40, device="meta")).shape == (2, 9)


def test_repr_says_what_the_base_is():
    assert repr(quantized()) == (
        "QuantizedLinear(in_features=40, out_features=9, bias=True, nf4, blocksize=64, double_quant)"
    )
    assert "nf4, blocksize=64, double_quant" in repr(GLoRALinear.from_linear(quantized(), FULL))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("config", [CONFIGS["full"], CONFIGS["a-lora"]], ids=["full", "a-lora"])
def test_compiles_as_one_graph(config, randomize):
    torch._dynamo.reset()
    layer = randomize(GLoRALinear.from_linear(quantized(compute_dtype=torch.float32), config))
    frozen = quantized(k=9, n=9)
    model = nn.Sequential(layer, frozen)
    x = torch.randn(5, 40, requires_grad=True)
    trained = [x, *layer.adapter().values()]
    expected = torch.autograd.grad(model(x).sum(), trained, allow_unused=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    got = torch.autograd.grad(compiled(x).sum(), trained, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_with_dropout(reentrant, randomize):
    config = GLoRAConfig("vector", "lora", "vector", rank=3, dropout=0.5)
    layer = randomize(GLoRALinear.from_linear(quantized(), config))
    x = torch.randn(5, 40, requires_grad=True)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        layer.zero_grad()
        x.grad = None
        call(x).square().sum().backward()
        grads.append([x.grad.clone(), *(p.grad.clone() for p in layer.adapter().values())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_autocast_trains_fp32_adapters(compute, randomize):
    layer = randomize(GLoRALinear.from_linear(quantized(k=64, n=32), FULL), std=0.1)
    layer.compute_dtype = compute
    x = torch.randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    got = {name: p.grad.clone() for name, p in layer.adapter().items()}
    layer.compute_dtype = None
    layer.zero_grad()
    layer(x).sum().backward()
    for name, parameter in layer.adapter().items():
        assert got[name].dtype == torch.float32
        assert (got[name] - parameter.grad).norm() < 0.05 * parameter.grad.norm(), name


def test_a_data_parallel_replica_reads_its_own_parameters(randomize):
    layer = randomize(GLoRALinear.from_linear(quantized(), FULL))
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        setattr(replica, name, parameter)
    x = torch.randn(2, 40)
    assert torch.equal(replica(x), layer(x))


# Models.


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
    assert len(kinds) == 14
    with pytest.raises(ValueError, match="already"):
        gk.inject(model, FULL)


def test_a_4_bit_module_cannot_be_trained_whole(vit):
    """Its weight would stay as it is, and nobody would know."""
    model = gk.quantize(vit())
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


def test_sharding_is_refused_with_the_reason(vit):
    model = gk.inject(gk.quantize(vit()), FULL)
    with pytest.raises(ValueError, match=r"fully_shard.*4 bits.*DistributedDataParallel"):
        gk.fully_shard(model)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_distributed_data_parallel_of_one_process(vit, randomize, tmp_path):
    """DDP takes the uint8 codes as any frozen parameter, and the gradients are those of the model alone."""
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
    assert len(packed_layers(other)) == 14
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
