"""Sharing factors over depth: what shares with what, and what is refused."""

import math

import pytest
import torch
from sharing import NAMES, groups, refused, transformer

import glora_kernels as gk
from glora_kernels import GLoRAConfig, ShareLoRAConfig
from glora_kernels.nn.model import named_layers

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
