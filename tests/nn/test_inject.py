"""Injection: what becomes a GLoRA layer, what is trained; every mistake is named and changes nothing."""

import copy

import pytest
import torch
from injected import CFG, OTHER, paths, refused
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRALinear, ShareLoRAConfig
from glora_kernels.nn.model import named_layers

LINEARS = {
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.0", "mlp.2")
} | {"embed", "classifier.1"}
BODY = LINEARS - {"classifier.1"}


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_every_linear_layer_but_the_head_by_default(vit, targets):
    model = vit()
    assert gk.inject(model, CFG, targets) is model
    assert paths(model) == BODY


def test_everything_but_the_adapters_is_frozen(vit):
    model = gk.inject(vit(), CFG, target_modules=["q_proj"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.{i}.attn.q_proj.{name}" for i in range(2) for name in ("A", "B_up", "B_down")}
    assert gk.trainable_parameters(model) == 2 * CFG.num_parameters(16, 16)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {f"blocks.{i}.attn.q_proj" for i in range(2)}),
        (["q_proj", "v_proj"], {f"blocks.{i}.attn.{n}_proj" for i in range(2) for n in "qv"}),
        (["blocks.1.*"], {path for path in LINEARS if path.startswith("blocks.1.")}),
        (["?_proj"], {path for path in LINEARS if path.endswith("_proj")}),
        (["embed", "blocks.0.mlp.2"], {"embed", "blocks.0.mlp.2"}),
        (["*"], LINEARS),
        (("*.mlp.[02]",), {f"blocks.{i}.mlp.{j}" for i in range(2) for j in (0, 2)}),
        (iter(["embed"]), {"embed"}),
    ],
)
def test_target_patterns(vit, targets, expected):
    assert paths(gk.inject(vit(), CFG, target_modules=targets)) == expected


def test_a_mapping_gives_each_layer_its_first_match(vit):
    model = gk.inject(vit(), {"embed": None, "blocks.0.*": OTHER, "q_proj": None, "*": CFG})
    layers = named_layers(model)
    assert "embed" not in layers
    assert type(model.embed) is nn.Linear
    assert layers["blocks.0.attn.q_proj"].config is OTHER
    assert "blocks.1.attn.q_proj" not in layers
    assert layers["blocks.1.attn.k_proj"].config is CFG


def test_a_mapping_alone_restricts_the_targets(vit):
    assert paths(gk.inject(vit(), {"blocks.0.mlp.*": CFG})) == {"blocks.0.mlp.0", "blocks.0.mlp.2"}


def test_a_mapping_and_targets_must_both_match(vit):
    model = gk.inject(vit(), {"blocks.0.*": CFG}, target_modules=["q_proj", "k_proj"])
    assert paths(model) == {"blocks.0.attn.q_proj", "blocks.0.attn.k_proj"}


def test_a_catch_all_that_earlier_patterns_shadow_is_fine(vit):
    model = gk.inject(vit(), {"q_proj": OTHER, "*": CFG}, target_modules=["q_proj"])
    assert {layer.config for layer in named_layers(model).values()} == {OTHER}


# The head.


def test_llama_leaves_its_head_alone_and_trains_all_seven(llama):
    model = gk.inject(llama(), OTHER)
    assert type(model.lm_head) is nn.Linear
    assert {path.rpartition(".")[2] for path in paths(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert len(paths(model)) == 14


def test_a_tied_head_is_the_head_too(llama):
    model = gk.inject(llama(tied=True), OTHER)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(paths(model)) == 14
    gk.merge(model)


def test_gpt2_conv1d_layers_are_replaced(gpt2):
    model = gpt2()
    ids = torch.arange(5)[None]
    expected = model(ids).logits
    gk.inject(model, CFG)
    assert {path.rpartition(".")[2] for path in paths(model)} == {"c_attn", "c_proj", "c_fc"}
    torch.testing.assert_close(model(ids).logits, expected)


class Headed(nn.Module):
    def __init__(self, name, get=None):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.add_module(name, nn.Linear(4, 4))
        self.get = get

    def forward(self, x):
        return x


class Embeds(Headed):
    def get_output_embeddings(self):
        if self.get == "raises":
            raise NotImplementedError
        return getattr(self, self.get) if self.get else None


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score", "embed_out"])
def test_a_head_may_be_inside_a_module_of_its_name(name):
    model = nn.ModuleDict({"body": nn.Linear(4, 4), name: nn.Sequential(nn.Dropout(), nn.Linear(4, 4))})
    assert paths(gk.inject(model, CFG)) == {"body"}
    inner = nn.ModuleDict({"fc": nn.Linear(4, 4), "attention": nn.ModuleDict({"out": nn.Linear(4, 4)})})
    assert paths(gk.inject(nn.ModuleDict({"body": nn.Linear(4, 4), name: inner}), CFG)) == {
        "body",
        f"{name}.attention.out",
    }


def test_fc_is_a_head_of_the_model_itself_and_no_layer_of_its_blocks():
    block = nn.ModuleDict({"fc": nn.Linear(4, 4), "fc1": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layer": nn.ModuleList([block]), "fc": nn.Linear(4, 4), "fc1": nn.Linear(4, 4)})
    assert paths(gk.inject(model, CFG)) == {"layer.0.fc", "layer.0.fc1", "fc1"}


class Classifies(Headed):
    def get_classifier(self):
        return (self.body, nn.Identity()) if self.get == "pair" else self.final if self.get else nn.Identity()


def test_timms_get_classifier_names_the_head():
    assert paths(gk.inject(Classifies("final", get="final"), CFG)) == {"body"}
    assert paths(gk.inject(Classifies("final", get="pair"), CFG)) == {"final"}
    assert paths(gk.inject(Classifies("head"), CFG)) == {"body"}, "without a classifier the names decide"


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score", "embed_out"])
def test_a_head_is_known_by_its_last_name(name):
    assert paths(gk.inject(Headed(name), CFG)) == {"body"}
    assert paths(gk.inject(nn.Sequential(Headed(name)), CFG)) == {"0.body"}
    assert paths(gk.inject(Headed(name), CFG, target_modules=["body", name])) == {"body", name}


def test_a_last_layer_of_another_name_is_no_head():
    assert paths(gk.inject(Headed("final"), CFG)) == {"body", "final"}


def test_get_output_embeddings_decides_where_it_names_a_module():
    assert paths(gk.inject(Embeds("head", get="body"), CFG)) == {"head"}
    assert paths(gk.inject(Embeds("head", get=None), CFG)) == {"body"}
    assert paths(gk.inject(Embeds("head", get="raises"), CFG)) == {"body"}


def test_a_configuration_for_the_head_alone_says_why_it_matches_nothing():
    refused(
        Headed("head"),
        {"head": CFG},
        match=r"'head' matches no linear layer to adapt; it matches only the head",
    )
    assert paths(gk.inject(Headed("head"), {"head": None, "*": CFG})) == {"body"}


# train=


def test_trained_modules_require_gradients_and_are_no_targets(vit):
    model = gk.inject(vit(), CFG, train=["classifier"])
    assert paths(model) == LINEARS - {"classifier.1"}
    assert all(p.requires_grad for p in model.classifier.parameters())
    assert not model.blocks[0].ln.weight.requires_grad
    model = gk.inject(vit(), CFG, target_modules=["*_proj"], train=["ln", "blocks.1.mlp"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.count("_proj.")}
    assert trained == {f"blocks.{i}.ln.{n}" for i in range(2) for n in ("weight", "bias")} | {
        f"blocks.1.mlp.{j}.{n}" for j in (0, 2) for n in ("weight", "bias")
    }


def test_a_wildcard_target_leaves_trained_modules_alone(vit):
    model = gk.inject(vit(), CFG, target_modules=["*"], train="classifier")
    assert paths(model) == LINEARS - {"classifier.1"}


def test_targets_inside_trained_modules_are_refused(vit):
    match = r"'classifier\.1' names 'classifier\.1'.*'classifier'"
    refused(vit(), CFG, ["classifier.1", "q_proj"], ["classifier"], match=match)
    refused(
        vit(),
        CFG,
        ["q_proj", "classifier.*"],
        ["classifier"],
        match=r"'classifier\.\*' names 'classifier\.1'",
    )


def test_train_that_leaves_nothing_to_adapt_is_refused(vit):
    refused(vit(), CFG, train=["*"], match="no linear layer is left to adapt")


def test_a_trained_module_tied_to_a_target_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["embed"].weight
    refused(model, CFG, train=["embed"], match=r"weight of 'out' is shared with 'embed'")


# Names that match nothing.


def test_patterns_that_match_nothing_are_named_with_what_there_is(vit):
    available = "'embed'.*'q_proj'"
    refused(vit(), CFG, ["q_proj", "query"], match=rf"target_modules: the pattern 'query'.*{available}")
    refused(vit(), {"query": CFG, "*": CFG}, match=rf"config: the pattern 'query'.*{available}")
    refused(vit(), {"query": None, "*": CFG}, match="config: the pattern 'query'")
    refused(vit(), CFG, train=["head"], match=r"train: the pattern 'head'.*'classifier'")
    refused(vit(), {"v_proj": CFG, "q_proj": CFG}, ["q_proj"], match=r"'v_proj'.*not in target_modules")


def test_targets_that_are_no_linear_layers_are_named_with_their_type(vit):
    refused(vit(), CFG, ["ln"], match=r"'ln' matches no linear layer \('blocks\.0\.ln' is a LayerNorm\)")
    refused(vit(), CFG, ["blocks.0.attn"], match="is a Attention")
    assert paths(gk.inject(vit(), CFG, ["blocks.0.*"])), "a glob may match other modules as well"


def test_train_patterns_that_match_nothing_to_train_are_refused(vit):
    refused(vit(), CFG, train=["blocks.0.mlp.1"], match="without parameters")


def test_a_model_without_linear_layers_is_refused():
    refused(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), CFG, match="no linear layer")
    refused(nn.Sequential(nn.Linear(3, 3)), {"*": None}, match="no linear layer is left")


# Arguments of the wrong kind.


def test_bad_arguments(vit):
    refused(vit(), "lora", error=TypeError, match="GLoRAConfig, got str")
    refused(vit(), {"*": "lora"}, error=TypeError, match=r"config\['\*'\].*got str")
    refused(vit(), {3: CFG}, error=TypeError, match="3")
    refused(vit(), {}, match="empty")
    refused(vit(), CFG, [], match="target_modules is empty")
    refused(vit(), CFG, [3], error=TypeError, match=r"target_modules.*3")
    refused(vit(), CFG, train=[None], error=TypeError, match=r"train.*None")
    refused(vit(), CFG, adapter_dtype=torch.int64, match=r"adapter_dtype.*int64")
    with pytest.raises(TypeError, match=r"nn\.Module, got dict"):
        gk.inject({}, CFG)


def test_injecting_twice_is_refused(vit):
    model = gk.inject(vit(), CFG, ["q_proj"])
    refused(model, CFG, ["v_proj"], match=r"already.*q_proj")


# Layers that cannot be replaced.


class MyAttention(nn.MultiheadAttention):
    pass


class MyEncoderLayer(nn.TransformerEncoderLayer):
    pass


@pytest.mark.filterwarnings("ignore:inject")
@pytest.mark.parametrize("kind", [nn.MultiheadAttention, MyAttention])
def test_multihead_attention_is_refused_and_can_be_excluded(kind):
    def build():
        return nn.ModuleDict({"attn": kind(8, 2), "mlp": nn.Linear(8, 8)})

    match = r"'attn\.out_proj' .* cannot be replaced: MultiheadAttention\.forward .*exclude_modules=\['out_proj'\]"
    refused(build(), CFG, match=match)
    refused(build(), CFG, ["out_proj"], match=match)
    assert paths(gk.inject(build(), CFG, ["mlp"])) == {"mlp"}
    assert paths(gk.inject(build(), {"out_proj": None, "*": CFG})) == {"mlp"}
    assert paths(gk.inject(build(), CFG, exclude_modules=["out_proj"])) == {"mlp"}


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, MyEncoderLayer])
def test_transformer_encoder_layers_are_refused(kind):
    model = nn.Sequential(kind(8, 2, 16), nn.Linear(8, 8))
    refused(model, CFG, ["linear1", "1"], match=r"'0\.linear1'.*TransformerEncoderLayer\.forward")
    refused(
        model, CFG, match=r"3 of 4 layers cannot be replaced(.|\n)*exclude_modules=\['linear1', 'linear2', 'out_proj'\]"
    )
    assert paths(gk.inject(model, CFG, ["1"])) == {"1"}


def test_a_transformer_decoder_layer_calls_its_linear_layers(randomize):
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0).eval()
    x, memory = torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    expected = layer(x, memory)
    gk.inject(layer, CFG, ["linear1", "linear2"])
    torch.testing.assert_close(layer(x, memory), expected)
    randomize(layer)
    assert not torch.allclose(layer(x, memory), expected, atol=1e-2)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_unsupported_linear_layers_are_refused_by_path():
    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4))
    refused(
        model, CFG, match=r"'1' \(Doubled\) cannot be replaced: its forward.*exclude_modules=\['1'\].*target_modules"
    )
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *args: None)
    refused(hooked, CFG, match="hooks")
    refused(nn.Sequential(nn.LazyLinear(4)), CFG, match="sizes")
    refused(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), CFG, match="parametrized")
    assert paths(gk.inject(model, {"1": None, "*": CFG})) == {"0"}


def test_bitsandbytes_layers_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(8, 8))
    refused(model, CFG, match="Linear4bit")


def test_a_failure_while_building_changes_nothing(vit, monkeypatch):
    model = vit()
    model.embed.weight.requires_grad_(False)
    original, calls = GLoRALinear.from_linear.__func__, []

    def fail_at_the_third(cls, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no room for a third")
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(GLoRALinear, "from_linear", classmethod(fail_at_the_third))
    refused(model, CFG, error=MemoryError, match="third")
    assert len(calls) == 3


# Shared modules, wrappers, modes.


def test_a_linear_layer_used_at_several_paths_becomes_one(randomize):
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared), "c": shared})
    gk.inject(model, CFG, target_modules=["b.0"])
    assert isinstance(model["c"], GLoRALinear)
    assert model["a"][0] is model["c"]
    assert model["b"][0] is model["c"]
    assert gk.trainable_parameters(model) == CFG.num_parameters(4, 4)


def test_a_shared_layer_with_two_configurations_is_refused():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    refused(model, {"a": CFG, "b": OTHER}, match=r"\['a', 'b'\] are one module")
    refused(model, {"a": CFG, "b": None}, match=r"\['a', 'b'\] are one module")


def test_a_model_that_is_a_linear_layer_becomes_a_glora_layer():
    linear = nn.Linear(4, 4)
    layer = gk.inject(linear, CFG)
    assert isinstance(layer, GLoRALinear)
    assert layer.weight is linear.weight


def test_modes_and_dtypes_are_kept(vit):
    model = vit().bfloat16()
    model.blocks[0].eval()
    gk.inject(model, CFG, train=["classifier"])
    for path, layer in named_layers(model).items():
        assert layer.training is not path.startswith("blocks.0")
    assert model.embed.weight.dtype == torch.bfloat16


def dtypes(model):
    return {p.dtype for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [CFG, ShareLoRAConfig(rank=2)])
def test_what_is_trained_in_a_16_bit_model_is_fp32(vit, dtype, config):
    x = torch.randn(3, 4, 12).to(dtype)
    expected = vit().to(dtype)(x)
    model = gk.inject(vit().to(dtype), config, ["*_proj"], train=["classifier", "ln"])
    assert dtypes(model) == {torch.float32}
    assert model.embed.weight.dtype == dtype
    y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert copy.deepcopy(model).float()(x.float()).dtype == torch.float32
    assert dtypes(gk.inject(vit().to(dtype), config, ["*_proj"], "ln", adapter_dtype=dtype)) == {dtype}
    assert dtypes(gk.inject(vit().double(), config, ["*_proj"], "ln")) == {torch.float64}
    assert dtypes(gk.inject(vit(), config, ["*_proj"], "ln")) == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train", [["lm_head"], ["embed_tokens", "norm"], ["embed_tokens", "lm_head"], ["mlp"]])
def test_a_16_bit_llama_trains_fp32_modules_without_autocast(llama, train, tied, tmp_path):
    ids = torch.arange(8)[None]
    model = gk.inject(llama(tied).bfloat16(), OTHER, ["q_proj"], train)
    logits = model(ids).logits
    assert torch.equal(logits, llama(tied).bfloat16()(ids).logits) or train != ["lm_head"]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # What is tied to a module that is not trained stays as that is.
    alone = tied and len({"embed_tokens", "lm_head"} & set(train)) == 1
    assert dtypes(model) == {torch.float32} | ({torch.bfloat16} if alone else set())
    gk.save_adapter(model, tmp_path / "a.safetensors")
    loaded = gk.load_adapter(llama(tied).bfloat16(), tmp_path / "a.safetensors")
    assert dtypes(loaded) == dtypes(model)
    assert torch.equal(loaded(ids).logits, logits)


def test_a_trained_module_with_no_place_for_a_cast_keeps_its_dtype():
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16)).bfloat16()
    gk.inject(model, CFG, ["0"], train=["1"])
    assert {p.dtype for p in model[1].parameters()} == {torch.bfloat16}
    assert model(torch.randn(3, 1, 8).bfloat16()).dtype == torch.bfloat16


def test_a_meta_model_is_injected_on_meta(vit):
    with torch.device("meta"):
        model = vit()
    gk.inject(model, CFG)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_injected_through_its_wrapper(vit, randomize):
    torch._dynamo.reset()
    model = vit().eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 4, 12)
    expected = compiled(x)
    assert gk.inject(compiled, CFG) is compiled
    assert paths(model) == BODY
    torch.testing.assert_close(compiled(x), expected)
    randomize(model)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), expected, atol=1e-2)


def test_compiled_submodules_have_clean_paths(vit):
    model = vit()
    model.blocks[0].attn = torch.compile(model.blocks[0].attn, backend="eager")
    gk.inject(model, CFG, ["blocks.0.attn.q_proj"])
    assert paths(model) == {"blocks.0.attn.q_proj"}
    model = vit()
    model.embed = torch.compile(model.embed, backend="eager")
    refused(model, CFG, ["embed"], match="torch.compile")
    refused(torch.compile(nn.Linear(3, 3)), CFG, match="inject first")


def test_distributed_data_parallel_must_come_after(vit, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(vit())
        refused(wrapped, CFG, match="DistributedDataParallel")
        wrapped = nn.parallel.DistributedDataParallel(gk.inject(vit(), CFG))
        gk.merge(wrapped)
        gk.unmerge(wrapped)
        gk.save_adapter(wrapped, tmp_path / "a.safetensors")
        del wrapped  # before the group, which its last owner could wait for with Python's lock
    finally:
        torch.distributed.destroy_process_group()
    model = gk.load_adapter(vit(), tmp_path / "a.safetensors")
    assert paths(model) == BODY


# Counting.


def test_trainable_parameters_counts_shared_ones_once(vit):
    model = gk.inject(vit(), OTHER, ["q_proj", "v_proj"], train=["classifier"])
    expected = 4 * OTHER.num_parameters(16, 16) + sum(p.numel() for p in model.classifier.parameters())
    assert gk.trainable_parameters(model) == expected
    first, second = (model.blocks[i].attn.q_proj for i in range(2))
    second.B_down = first.B_down
    assert gk.trainable_parameters(model) == expected - 3 * 16
    assert gk.trainable_parameters(nn.Linear(3, 2)) == 8
    with pytest.raises(TypeError, match=r"nn\.Module"):
        gk.trainable_parameters([])


def test_a_peft_model_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"PEFT layers.*merge_and_unload"):
        gk.inject(model, gk.GLoRAConfig(rank=2))
