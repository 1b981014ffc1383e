"""Sharing factors over depth: what shares with what, what is refused, and what is saved and loaded."""

import copy
import math
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, ShareLoRAConfig
from glora_kernels.nn.file import Adapter
from glora_kernels.nn.model import named_layers

NAMES = {"none": set(), "A": {"B_down"}, "B": {"B_up"}, "AB": {"B_down", "B_up"}}


def groups(model):
    """Type key → number of uses, for the rows of B_down."""
    return {row.key: row.uses for row in gk.shared(model).rows if row.factor == "B_down"}


def refused(model, *args, match, **kwargs):
    """Injection fails with a message that matches, and nothing has changed."""

    def fingerprint():
        modules = [(path, id(m), len(m._load_state_dict_pre_hooks)) for path, m in model.named_modules()]
        return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]

    before = fingerprint()
    with pytest.raises(ValueError, match=match):
        gk.inject(model, *args, **kwargs)
    assert fingerprint() == before


# What shares with what.

SIZES = {
    "LLaMA-7B": {"intermediate_size": 11008},
    "LLaMA-3-8B": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("LLaMA-7B", {"none": 159_907_840, "A": 89_309_184, "B": 75_595_776, "AB": 4_997_120}),
        ("LLaMA-3-8B", {"none": 167_772_160, "A": 90_570_752, "B": 82_444_288, "AB": 5_242_880}),
    ],
)
def test_parameter_counts_of_published_models(name, counts):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **SIZES[name])
    for share, count in counts.items():
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        gk.inject(model, ShareLoRAConfig(share=share))
        assert gk.trainable_parameters(model) == count
        assert gk.shared(model).unshared == counts["none"]
        assert all(parameter.is_meta for parameter in model.parameters())
        assert [row.uses for row in gk.shared(model).rows] == [32] * 7 * len(NAMES[share])


def transformer(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "ViT":
        return transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))
    if name == "BERT":
        return transformers.BertModel(transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def test_types_of_llama(llama):
    model = gk.inject(llama(), ShareLoRAConfig(rank=2))
    attention = {"q": "(16, 16)", "k": "(8, 16)", "v": "(8, 16)", "o": "(16, 16)"}
    mlp = {"gate": "(24, 16)", "up": "(24, 16)", "down": "(16, 24)"}
    assert groups(model) == {f"model.layers.#.self_attn.{n}_proj {shape}": 2 for n, shape in attention.items()} | {
        f"model.layers.#.mlp.{n}_proj {shape}": 2 for n, shape in mlp.items()
    }


def test_types_of_gpt2(gpt2):
    model = gk.inject(gpt2(), ShareLoRAConfig(rank=2, share="AB"))
    assert groups(model) == {
        "transformer.h.#.attn.c_attn (48, 16)": 2,
        "transformer.h.#.attn.c_proj (16, 16)": 2,
        "transformer.h.#.mlp.c_fc (64, 16)": 2,
        "transformer.h.#.mlp.c_proj (16, 64)": 2,
    }
    first, second = (model.transformer.h[i].mlp.c_fc for i in range(2))
    assert first.B_down is second.B_down
    assert first.B_down.shape == (2, 16)
    assert first.B_up is second.B_up
    assert first.B_up.shape == (64, 2)


def test_types_of_bert():
    expected = {f"encoder.layer.#.attention.self.{name} (16, 16)": 2 for name in ("query", "key", "value")} | {
        "encoder.layer.#.attention.output.dense (16, 16)": 2,
        "encoder.layer.#.intermediate.dense (24, 16)": 2,
        "encoder.layer.#.output.dense (16, 24)": 2,
    }
    model = gk.inject(transformer("BERT"), ShareLoRAConfig(rank=2))
    assert groups(model) == expected, "which the one pooler is not among"
    assert model.pooler.dense.B_down is not None


def test_types_of_vit():
    model = gk.inject(transformer("ViT"), ShareLoRAConfig(rank=2))
    assert sorted(groups(model).values()) == [2] * 6, "q, k, v, the output and the two of the MLP"
    assert all(".#." in key for key in groups(model))


def test_types_of_t5_keep_encoder_decoder_and_cross_attention_apart():
    model = gk.inject(transformer("T5"), ShareLoRAConfig(rank=2))
    blocks = {"encoder": (2, ["SelfAttention"]), "decoder": (3, ["SelfAttention", "EncDecAttention"])}
    expected = {}
    for stack, (depth, attentions) in blocks.items():
        expected |= {f"{stack}.block.#.layer.#.{a}.{n} (16, 16)": depth for a in attentions for n in "qkvo"}
        expected |= {f"{stack}.block.#.layer.#.DenseReluDense.wi (24, 16)": depth}
        expected |= {f"{stack}.block.#.layer.#.DenseReluDense.wo (16, 24)": depth}
    assert groups(model) == expected


@pytest.mark.parametrize("share", NAMES)
def test_the_shared_factors_are_one_parameter_each(share, vit):
    model = gk.inject(vit(depth=3), ShareLoRAConfig(rank=2, share=share, A="vector", C="vector", E="vector"))
    for name in ("attn.q_proj", "mlp.0", "mlp.2"):
        layers = [named_layers(model)[f"blocks.{i}.{name}"] for i in range(3)]
        for factor in layers[0].adapter():
            distinct = {id(layer.adapter()[factor]) for layer in layers}
            assert len(distinct) == (1 if factor in NAMES[share] else 3), (name, factor)
    types = {id(model.blocks[0].attn.q_proj.B_down), id(model.blocks[0].attn.k_proj.B_down)}
    assert len(types) == 2
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) - len(list(model.parameters())) == 2 * 6 * len(NAMES[share])


def test_projections_share_and_the_others_are_plain_lora(vit):
    for projections in (["q_proj", "k_proj", "v_proj"], ("*.[qkv]_proj",), "[qkv]_proj"):
        model = gk.inject(vit(), ShareLoRAConfig(rank=2, share="AB", projections=projections))
        rows = gk.shared(model).rows
        assert {(row.key.split(".")[-1].split()[0], row.uses) for row in rows} == {(f"{n}_proj", 2) for n in "qkv"}
        assert len(rows) == 6
        assert {layer.config for layer in named_layers(model).values()} == {ShareLoRAConfig(rank=2).layer_config()}


def test_equal_configurations_of_a_mapping_share_and_others_do_not(vit):
    two, four = ShareLoRAConfig(rank=2), ShareLoRAConfig(rank=4)
    model = gk.inject(
        vit(depth=5),
        {"blocks.[01].*": two, "blocks.2.*": four, "blocks.3.*": GLoRAConfig.lora(2), "*": ShareLoRAConfig(rank=2)},
        ["q_proj"],
    )
    rows = gk.shared(model).rows
    assert [row.paths for row in rows] == [tuple(f"blocks.{i}.attn.q_proj" for i in (0, 1, 4))]
    assert model.blocks[2].attn.q_proj.B_down.shape == (4, 16)


def test_a_fresh_model_equals_its_base_and_starts_as_peft_does(vit, gpt2):
    x = torch.randn(3, 4, 12)
    for share in ("A", "B", "AB"):
        model = vit().eval()
        expected = model(x)
        gk.inject(model, ShareLoRAConfig(rank=8, share=share, alpha=16))
        assert torch.equal(model(x), expected)
        for layer in named_layers(model).values():
            assert not layer.B_up.any()
            bound = 1 / math.sqrt(layer.in_features)  # of the uniform distribution: Kaiming's with a = √5
            assert 0.8 * bound < layer.B_down.abs().max() <= bound
    model = gpt2()
    ids = torch.arange(5)[None]
    expected = model(ids).logits
    assert torch.equal(gk.inject(model, ShareLoRAConfig(rank=2))(ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_shared_factors_are_fp32_over_16_bits(dtype, vit):
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    config = ShareLoRAConfig(rank=2, E="vector", projections=["q_proj", "embed"])
    model = gk.inject(vit().to(dtype), {"k_proj": GLoRAConfig.lora(2), "o_proj": ShareLoRAConfig(), "*": config})
    # q shares; embed is the only one of its type, and v is no projection that shares: B_down is that of q's siblings.
    for layer in (model.blocks[0].attn.q_proj, model.embed, model.blocks[0].attn.v_proj):
        assert (layer.B_down.dtype, layer.B_up.dtype, layer.E.dtype) == (wide, wide, wide)
        assert 0 < layer.B_down.abs().max() <= 1 / math.sqrt(layer.in_features)
    assert model.blocks[0].attn.v_proj.B_down is not model.blocks[1].attn.v_proj.B_down
    assert {p.dtype for p in model.blocks[0].attn.k_proj.adapter().values()} == {wide}, "of another configuration"
    alone = gk.inject(vit().to(dtype), ShareLoRAConfig(rank=2), ["embed"])
    assert alone.embed.B_down.dtype == wide, "nothing is shared"
    model = gk.inject(vit().to(dtype), ShareLoRAConfig(rank=2, share="AB"), adapter_dtype=torch.bfloat16)
    assert {p.dtype for layer in named_layers(model).values() for p in layer.adapter().values()} == {torch.bfloat16}


# Siblings.


def test_tied_siblings_have_one_down_factor(llama):
    model = gk.inject(llama(), ShareLoRAConfig(rank=2, tie_siblings=True))
    attention = "model.layers.#.self_attn.{q_proj (16, 16), k_proj (8, 16), v_proj (8, 16)}"
    mlp = "model.layers.#.mlp.{gate_proj (24, 16), up_proj (24, 16)}"
    alone = {"model.layers.#.self_attn.o_proj (16, 16)": 2, "model.layers.#.mlp.down_proj (16, 24)": 2}
    assert groups(model) == {attention: 6, mlp: 4} | alone
    model = gk.inject(llama(), ShareLoRAConfig(rank=2, share="B", tie_siblings=True))
    downs = [(row.key, row.uses) for row in gk.shared(model).rows if row.factor == "B_down"]
    assert downs == [(attention, 3), (mlp, 2)] * 2, "a block each"
    assert [row.uses for row in gk.shared(model).rows if row.factor == "B_up"] == [2] * 7
    config = ShareLoRAConfig(rank=2, share="none", tie_siblings=True, projections=["k_proj", "v_proj"])
    rows = gk.shared(gk.inject(llama(), config)).rows
    assert [row.paths for row in rows] == [
        tuple(f"model.layers.{i}.self_attn.{name}_proj" for name in "kv") for i in range(2)
    ]


def test_tied_siblings_of_t5_leave_the_queries_of_cross_attention_out():
    model = gk.inject(transformer("T5"), ShareLoRAConfig(rank=2, tie_siblings=True))
    several = {key: layers for key, layers in groups(model).items() if "{" in key}
    assert several == {
        "encoder.block.#.layer.#.SelfAttention.{q (16, 16), k (16, 16), v (16, 16)}": 6,
        "decoder.block.#.layer.#.SelfAttention.{q (16, 16), k (16, 16), v (16, 16)}": 9,
        "decoder.block.#.layer.#.EncDecAttention.{k (16, 16), v (16, 16)}": 6,
    }


def test_siblings_come_back_from_a_file_with_one_dropout_mask(vit, randomize, tmp_path):
    config = ShareLoRAConfig(rank=2, tie_siblings=True, dropout=0.5)
    model = randomize(gk.inject(vit(), config))
    gk.save_adapter(model, tmp_path / "a.safetensors")
    x = torch.randn(3, 4, 12)
    for other in (vit(), gk.inject(vit(), config)):
        gk.load_adapter(other, tmp_path / "a.safetensors")
        assert gk.shared(other) == gk.shared(model)
        outputs = []
        for module in (model, other):
            torch.manual_seed(5)
            outputs.append(module.train()(x))
        assert torch.equal(*outputs), "masks in the same order, the same for siblings"
        gk.save_adapter(other, tmp_path / "b.safetensors")
        assert tensors_and_metadata(tmp_path / "b.safetensors") == tensors_and_metadata(tmp_path / "a.safetensors")
    metadata = tensors_and_metadata(tmp_path / "a.safetensors")[1]
    assert metadata["format_version"] == "2", "what knows version 1 only would give each a mask of its own"
    gk.save_adapter(gk.inject(vit(), ShareLoRAConfig(rank=2)), tmp_path / "c.safetensors")
    assert tensors_and_metadata(tmp_path / "c.safetensors")[1]["format_version"] == "1"

    untied = gk.inject(vit(), ShareLoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"the file shares 'blocks\.0\.attn\.q_proj\.B_down' with.*k_proj.*does not"):
        gk.load_adapter(untied, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"the model shares 'blocks\.0\.attn\.q_proj\.B_down' with.*k_proj.*does not"):
        gk.load_adapter(model, tmp_path / "c.safetensors")
    split_siblings(model)
    with pytest.raises(ValueError, match=r"the file ties \['blocks\.0\.attn\.k_proj', .* as siblings.*does not"):
        gk.load_adapter(model, tmp_path / "a.safetensors")


def test_a_file_with_siblings_that_share_nothing_is_refused():
    tensors = {"a.B_down": torch.zeros(1), "b.B_down": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"\['a', 'b'\] cannot be tied as siblings"):
        Adapter(dict.fromkeys("ab"), [], {}, tensors, [["a", "b"]]).check()
    Adapter(dict.fromkeys("ab"), [], {"b.B_down": "a.B_down"}, {"a.B_down": torch.zeros(1)}, [["a", "b"]]).check()


def split_siblings(model):
    """Layers with one B_down, but masks of their own."""
    for layer in named_layers(model).values():
        layer._siblings = None


def tensors_and_metadata(path):
    with safe_open(path, "pt") as file:
        return {name: tensor.tolist() for name, tensor in load_file(path).items()}, file.metadata()


def test_siblings_that_are_none_or_read_other_inputs_are_refused(vit):
    config = ShareLoRAConfig(rank=2, tie_siblings=True)
    refused(vit(), config, ["o_proj", "q_proj"], match=r"tie_siblings: no two.*'blocks\.0\.attn\.q_proj'")
    only = ShareLoRAConfig(rank=2, tie_siblings=True, projections=["q_proj"])
    refused(vit(), only, match="tie_siblings: no two")
    model = vit()
    model.blocks[1].attn.k_proj = nn.Linear(8, 16)
    match = r"in_features differ: 'blocks\.1\.attn\.q_proj' has 16, 'blocks\.1\.attn\.k_proj' has 8"
    refused(model, config, ["*_proj"], match=match)
    gk.inject(model, {"blocks.1.attn.k_proj": ShareLoRAConfig(rank=2), "*": config}, ["*_proj"])
    assert groups(model)["blocks.#.attn.{q_proj (16, 16), k_proj (16, 16), v_proj (16, 16)}"] == 5


# What is refused.


def test_patterns_that_match_nothing_are_named(vit):
    refused(vit(), ShareLoRAConfig(projections=["q_proj", "query"]), match="projections: the pattern 'query'.*'q_proj'")
    match = "'v_proj' matches no linear layer to adapt; it matches only layers that this configuration does not adapt"
    refused(vit(), ShareLoRAConfig(projections=["v_proj"]), ["q_proj"], match=match)
    refused(vit(), {"k_proj": None, "*": ShareLoRAConfig(projections=["k_proj"])}, match="'k_proj'.*does not adapt")


def test_layers_on_two_devices_cannot_share(vit):
    model = vit()
    model.blocks[1].to("meta")
    match = r"'blocks\.0\.attn\.q_proj' on cpu and 'blocks\.1\.attn\.q_proj' on meta cannot share one B_down"
    refused(model, ShareLoRAConfig(rank=2), ["q_proj"], match=match)
    refused(model, ShareLoRAConfig(rank=2, share="B"), ["*.mlp.*"], match=r"'blocks\.1\.mlp\.0' on meta.*B_up")
    gk.inject(model, {"blocks.0.*": ShareLoRAConfig(rank=2), "blocks.1.*": ShareLoRAConfig(rank=3)})


def test_layers_of_two_dtypes_need_an_adapter_dtype(vit):
    model = vit(depth=3)
    model.blocks[2].bfloat16()
    match = (
        r"'blocks\.0\.attn\.v_proj' with torch\.float32.*'blocks\.2\.attn\.v_proj' with torch\.bfloat16.*adapter_dtype"
    )
    refused(model, ShareLoRAConfig(rank=2), ["v_proj"], match=match)
    gk.inject(model, ShareLoRAConfig(rank=2), ["v_proj"], adapter_dtype=torch.float32)
    assert model.blocks[2].attn.v_proj.B_down is model.blocks[0].attn.v_proj.B_down


def test_bad_configurations_in_a_mapping(vit):
    with pytest.raises(TypeError, match=r"config\['\*'\] must be a GLoRAConfig, a ShareLoRAConfig or None, got str"):
        gk.inject(vit(), {"*": "share"})
    with pytest.raises(ValueError, match="shared: the model has no GLoRA layer"):
        gk.shared(vit())


# The report.


def test_the_report_is_a_table(vit):
    model = gk.inject(vit(), ShareLoRAConfig(rank=2, share="AB"), ["q_proj", "*.mlp.0"], train=["classifier"])
    assert str(gk.shared(model)).splitlines() == [
        "factor  shape    count  uses  parameters  projection type",
        "B_up    (16, 2)      1     2          32  blocks.#.attn.q_proj (16, 16)",
        "B_down  (2, 16)      1     2          32  blocks.#.attn.q_proj (16, 16)",
        "B_up    (32, 2)      1     2          64  blocks.#.mlp.# (32, 16)",
        "B_down  (2, 16)      1     2          32  blocks.#.mlp.# (32, 16)",
        "trainable parameters: 277 (437 if nothing were shared)",
    ]
    assert gk.shared(torch.compile(model, backend="eager")) == gk.shared(model)
    plain = gk.shared(gk.inject(vit(), GLoRAConfig.lora(2), ["q_proj"]))
    assert str(plain) == "no factor is shared\ntrainable parameters: 128 (128 if nothing were shared)"
    apart = gk.inject(vit(depth=3), ShareLoRAConfig(rank=2, share="none", tie_siblings=True), ["[qkv]_proj"])
    assert len(gk.shared(apart).rows) == 3
    assert repr(gk.shared(apart)).splitlines() == [
        "factor  shape    count  uses  parameters  projection type",
        "B_down  (2, 16)      3     3          96  blocks.#.attn.{q_proj (16, 16), k_proj (16, 16), v_proj (16, 16)}",
        "trainable parameters: 384 (576 if nothing were shared)",
    ]


# Files.


@pytest.mark.parametrize("share", ["A", "B", "AB"])
def test_a_file_holds_a_shared_factor_once_and_ties_it_again(share, vit, randomize, tmp_path):
    config = ShareLoRAConfig(rank=2, alpha=4, share=share, projections=["*_proj", "*.mlp.*"], D="vector")
    model = randomize(gk.inject(vit(), config)).eval()
    gk.save_adapter(model, tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == gk.trainable_parameters(model)
    x = torch.randn(3, 4, 12)
    for other in (vit(), gk.inject(vit(), config)):
        gk.load_adapter(other, tmp_path / "a.safetensors")
        assert gk.shared(other) == gk.shared(model)
        assert gk.trainable_parameters(other) == gk.trainable_parameters(model)
        assert torch.equal(other.eval()(x), model(x))
        with pytest.raises(RuntimeError, match="one shared parameter"):
            other.load_state_dict(untied(model))


def test_files_keep_the_dtypes_over_a_16_bit_base(vit, randomize, tmp_path):
    config = ShareLoRAConfig(rank=2, projections=["q_proj"], A="lora", D="vector")
    for dtype, down in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        model = randomize(gk.inject(vit().bfloat16(), config, ["q_proj", "v_proj"], adapter_dtype=dtype))
        gk.save_adapter(model, tmp_path / "a.safetensors")
        other = named_layers(gk.load_adapter(vit().bfloat16(), tmp_path / "a.safetensors"))
        for path, layer in named_layers(model).items():
            assert (layer.B_down.dtype, layer.B_up.dtype) == (down, down)
            for name, parameter in layer.adapter().items():
                assert other[path].adapter()[name].dtype == parameter.dtype, (path, name)
                assert torch.equal(other[path].adapter()[name], parameter)


def test_a_file_that_shares_otherwise_is_refused(vit, tmp_path):
    files = {}
    for share in NAMES:
        files[share] = tmp_path / f"{share}.safetensors"
        gk.save_adapter(gk.inject(vit(), ShareLoRAConfig(rank=2, share=share), ["q_proj"]), files[share])
    names = {"none": "nothing", "A": "B_down", "B": "B_up", "AB": "B_down and B_up"}
    for share in NAMES:
        model = gk.inject(vit(), ShareLoRAConfig(rank=2, share=share), ["q_proj"])
        for other in set(NAMES) - {share}:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            match = (
                rf"shares 'blocks\.1\.attn\.q_proj\.B_.*' with 'blocks\.0\.attn.*the file shares {names[other]} of its "
                f"layers, the model {names[share]}, and one value cannot stand for several"
            )
            with pytest.raises(ValueError, match=match):
                gk.load_adapter(model, files[other])
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    both = gk.inject(vit(), ShareLoRAConfig(rank=2, projections=["blocks.0.*"]), ["q_proj"])
    with pytest.raises(ValueError, match=r"the file shares 'blocks\.1.*the model does not"):
        gk.load_adapter(both, files["A"])


def test_a_file_ties_layers_of_two_dtypes(vit, tmp_path):
    gk.save_adapter(gk.inject(vit(), ShareLoRAConfig(rank=2), ["blocks.*.q_proj"]), tmp_path / "a.safetensors")
    model = vit()
    model.blocks[1].attn.q_proj = nn.Linear(16, 16, dtype=torch.float16)
    gk.load_adapter(model, tmp_path / "a.safetensors")
    assert model.blocks[1].attn.q_proj.B_down is model.blocks[0].attn.q_proj.B_down
    assert model.blocks[1].attn.q_proj.B_down.dtype == torch.float32


# State dictionaries.


def untied(model):
    """The state of a model that shares nothing: under each name a value of its own."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator) if "B_" in name else torch.zeros_like(value)
        state[name] = value + noise.to(value.dtype)
    return state


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


def test_safetensors_loads_what_it_saved_of_a_shared_model(vit, randomize, tmp_path):
    source = randomize(gk.inject(vit(), ShareLoRAConfig(rank=2, share="AB")))
    save_model(source, str(tmp_path / "a.safetensors"))
    assert len(load_file(tmp_path / "a.safetensors")) == len(dict(source.named_parameters())) + 3  # of the batch norm
    model = gk.inject(vit(), ShareLoRAConfig(rank=2, share="AB"))
    assert load_model(model, tmp_path / "a.safetensors") == (set(), [])
    assert gk.shared(model) == gk.shared(source)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


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
