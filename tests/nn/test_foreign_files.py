"""Files of other tools without their packages: written, read by the formulas, read back, and what is refused."""

import copy
import json

import pytest
import torch
from foreign import GLORA, LORA, PATHS, TARGET, X, adapted, changed, near, net, steps
from safetensors.torch import load_file, save_file
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig

CASES = {"lycoris": (GLORA, "lycoris_", "_"), "kohya": (LORA, "lora_unet_", "_"), "peft": (LORA, "transformer.", ".")}


@pytest.fixture
def file(tmp_path):
    """Where the model with LyCORIS's GLoRA was saved; its values by key."""
    path = tmp_path / "a.safetensors"
    gk.save_adapter(adapted(GLORA), path, format="lycoris")
    return path


def edited(path, **edits):
    """The file with other entries, without those that are None; in the keys `__` is a dot."""
    stored = load_file(path)
    for key, value in edits.items():
        name = key.replace("__", ".")
        stored.pop(name, None)
        if value is not None:
            stored[name] = value
    save_file(stored, path)
    return path


def swap_roles(path):
    """Give the tensors the names that earlier versions of LyCORIS gave them."""
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1", "alpha": "alpha"}
    parts = {key: key.split(".") for key in load_file(path)}
    save_file({".".join([p[0], swapped[p[1]], *p[2:]]): load_file(path)[key] for key, p in parts.items()}, path)


def refused(model, path, match, **arguments):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as caught:
        gk.load_adapter(model, path, **{"rs_lora": False} | arguments)
    assert str(path) in str(caught.value)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("format", CASES)
def test_a_reader_of_the_formulas_computes_the_same(tmp_path, format):
    config, prefix, separator = CASES[format]
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    model = adapted(config)
    gk.save_adapter(model, path, format=format)
    read, count = changed(path, net(), prefix, separator)
    assert count == len(PATHS)
    near(read(X), model(X))
    back = gk.load_adapter(net(), path)
    near(back(X), model(X))
    gk.save_adapter(back, again, format=format)
    assert load_file(path).keys() == load_file(again).keys()
    assert all(torch.equal(value, load_file(again)[key]) for key, value in load_file(path).items())


@pytest.mark.parametrize("format", ["lycoris", "kohya"])
def test_training_resumes_bit_for_bit(tmp_path, format):
    path = tmp_path / "a.safetensors"
    model = adapted(CASES[format][0])
    steps(model, torch.optim.AdamW(gk.parameter_groups(model), lr=1e-2))
    gk.save_adapter(model, path, format=format)
    back = gk.load_adapter(net(), path)
    for one in (model, back):
        steps(one, torch.optim.AdamW(gk.parameter_groups(one), lr=1e-2))
    assert torch.equal(model(X), back(X))
    assert not torch.equal(back(X), gk.load_adapter(net(), path)(X))


def test_a_scale_of_one_and_none(tmp_path):
    """alpha=None is the file's alpha = rank, and a file without alpha has s = 1: each fits a model with the other."""
    path = tmp_path / "a.safetensors"
    plain = GLoRAConfig("lora", "lora", rank=3, variant="matmul", dropout=0.1)
    model = adapted(plain).eval()
    gk.save_adapter(model, path, format="lycoris")
    assert load_file(path)["lycoris_proj_out.alpha"].item() == 3.0
    into = gk.load_adapter(gk.inject(net(), plain, target_modules=PATHS).eval(), path)
    near(into(X), model(X))
    assert into.proj_out.config == plain
    for name in PATHS:
        edited(path, **{f"lycoris_{name.replace('.', '_')}__alpha": None})
    near(gk.load_adapter(net(), path)(X), model(X))
    refused(adapted(GLORA), path, r"alpha=None \(the model: 2\)")


def test_the_layout_of_earlier_versions(file):
    model = adapted(GLORA)
    swap_roles(file)
    near(gk.load_adapter(net(), file, rs_lora=False)(X), model(X))


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.square, self.out = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.out(torch.tanh(self.square(x)))


def test_square_factors_are_told_apart_by_the_other_layers(tmp_path):
    """Of rank 4, the factors of the 4 x 4 layer fit both layouts, those of the other one do not."""
    path, x = tmp_path / "a.safetensors", torch.randn(5, 4, dtype=torch.float64)
    model = gk.inject(Square(), GLoRAConfig("lora", "lora", rank=4, alpha=2, variant="matmul", alpha_A=2))
    with torch.no_grad():
        for parameter in gk.parameter_groups(model)[0]["params"]:
            parameter.normal_()
    gk.save_adapter(model, path, format="lycoris")
    near(gk.load_adapter(Square(), path)(x), model(x))
    swap_roles(path)
    near(gk.load_adapter(Square(), path, rs_lora=False)(x), model(x))


def test_whether_it_was_rs_lora_is_asked_for(file):
    model = adapted(GLORA)
    edited(file)  # without our metadata, as LyCORIS writes it
    with pytest.raises(ValueError, match="does not say whether LyCORIS trained it with rs_lora"):
        gk.load_adapter(net(), file)
    near(gk.load_adapter(net(), file, rs_lora=False)(X), model(X))
    root = gk.load_adapter(net(), file, rs_lora=True)
    assert root.proj_out.config.scale == root.proj_out.config.scale_A == pytest.approx(2 / 3**0.5)
    for said in (True, False):
        about = {"ss_network_args": json.dumps({"algo": "glora", "rs_lora": str(said)})}
        save_file(load_file(file), file, about)
        read = gk.load_adapter(net(), file).proj_out.config.scale
        assert read == pytest.approx(2 / 3**0.5 if said else 2 / 3)
        refused(net(), file, rf"says rs_lora={said}, and rs_lora={not said} was given", rs_lora=not said)


class Pipeline(nn.Module):
    def __init__(self):
        super().__init__()
        self.unet, self.text = net(), net()


def test_parts_of_a_pipeline_by_their_prefixes(tmp_path):
    """One file for a UNet and a text encoder, as kohya's scripts write it."""
    path = tmp_path / "a.safetensors"
    prefixes = {"unet": "lora_unet_", "text": "lora_te1_"}
    both = gk.inject(Pipeline(), LORA, target_modules=["to_q"])
    with torch.no_grad():
        for place, parameter in enumerate(gk.parameter_groups(both)[0]["params"]):
            parameter.normal_(generator=torch.Generator().manual_seed(place))
    gk.save_adapter(both, path, format="kohya", prefix=prefixes)
    assert {key.partition("_down_")[0] for key in load_file(path)} == {"lora_unet", "lora_te1"}
    for loaded, unet, text in [
        (one := gk.load_adapter(Pipeline(), path, prefix=prefixes), one.unet, one.text),
        (None, gk.load_adapter(net(), path, prefix="lora_unet_"), gk.load_adapter(net(), path, prefix="lora_te1_")),
    ]:
        near(unet(X), both.unet(X))
        near(text(X), both.text(X))
        assert (unet(X) - text(X)).abs().max() > 1e-3
        assert loaded is None or loaded is one
    refused(net(), path, "2 layers of 'lora_te1_', 2 layers of 'lora_unet_', which are several models")
    refused(net(), path, "nothing for this model: no name begins with prefix='lora_te2_'", prefix="lora_te2_")
    refused(Pipeline(), path, "prefix names 'vae', which the model does not have", prefix={"vae": "lora_unet_"})


def test_names_are_resolved_only_where_they_are_clear(tmp_path):
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4)})
            self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})

    path = tmp_path / "a.safetensors"
    model = gk.inject(Twins(), LORA, target_modules=["a.b_c"])
    gk.save_adapter(model, path, format="kohya")
    refused(Twins(), path, r"'lora_unet_a_b_c' may mean \['a.b_c', 'a_b.c'\] of this model")
    with pytest.raises(ValueError, match=r"calls both 'a.b_c' and 'a_b.c' 'lora_unet_a_b_c'"):
        gk.save_adapter(gk.inject(Twins(), LORA), path, format="kohya")
    named = gk.inject(Twins(), LORA)
    gk.save_adapter(named, path, format="peft")  # its names have dots
    assert len(load_file(path)) == 4


Q = "lycoris_down_blocks_0_to_q"
BAD = {
    "another model": (
        {"lycoris_mid_to_q__lora_up__weight": torch.ones(9, 3)},
        "'lycoris_mid_to_q' is no layer of this model: its layers are called 'lycoris_down_blocks_0_to_q'",
    ),
    "a part": ({f"{Q}__a2__weight": None}, f"{Q}' has a1.weight, b1.weight, b2.weight but not a2.weight; the file is"),
    "alpha alone": ({f"{Q}_x__alpha": torch.ones(())}, "is no layer of this model"),
    "mixed": ({f"{Q}__lora_up__weight": torch.zeros(9, 3)}, f"{Q}' mixes layouts"),
    "shape": (
        {f"{Q}__a1__weight": torch.zeros(11, 3)},
        rf"{Q}' has 'a1.weight' of shape \(11, 3\), where 'down_blocks.0.to_q' .* is \(9, 12\), takes \(12, 3\)",
    ),
    "rank": ({f"{Q}__b1__weight": torch.zeros(9, 4)}, r"has 'b1.weight' of shape \(9, 4\), .* takes \(9, 3\)"),
    "no dimension": ({f"{Q}__b1__weight": torch.zeros(())}, r"has 'b1.weight' of shape \(\), .* takes \(9, 3\)"),
    "dtype": ({f"{Q}__b1__weight": torch.zeros(9, 3, dtype=torch.int8)}, "has 'b1.weight' in torch.int8; accepted are"),
    "NaN": ({f"{Q}__b1__weight": torch.full((9, 3), float("nan"))}, f"{Q}' has NaN or inf in 'b1.weight'"),
    "alpha 0": ({f"{Q}__alpha": torch.zeros(())}, f"{Q}' has alpha = 0"),
    "alphas": ({f"{Q}__alpha": torch.ones(2)}, r"has 'alpha' of shape \(2,\), and it is one number"),
    "DoRA": ({f"{Q}__dora_scale": torch.ones(9, 1)}, f"{Q}' has 'dora_scale', DoRA's magnitudes"),
    "Tucker": ({f"{Q}__bm__weight": torch.ones(3, 3)}, f"{Q}' has 'bm.weight', a Tucker core"),
    "LoHa": ({"lycoris_proj_out__hada_w1_a": torch.ones(7, 3)}, "lycoris_proj_out' has 'hada_w1_a', LoHa"),
    "another key": ({f"{Q}__gate__lora_up": torch.ones(3)}, f"the key '{Q}.gate.lora_up' is none of an adapter"),
    "no prefix": ({"down_blocks_0_to_q__alpha": torch.ones(())}, "'down_blocks_0_to_q' has no prefix that is known"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name(file, case):
    edits, match = BAD[case]
    refused(net(), edited(file, **edits), match)


@pytest.mark.parametrize(
    ("convolution", "match"),
    [
        (nn.Conv2d(12, 9, 1), r"'lycoris_conv' has 'b2.weight' of shape \(3, 12, 3, 3\), where .* \(9, 12, 1, 1\)"),
        (nn.Conv2d(12, 9, 3, groups=3), r"'conv' of this model, .*: it is a grouped convolution \(groups=3\)"),
        (nn.ConvTranspose2d(12, 9, 2), "is a ConvTranspose2d; accepted are linear layers and convolutions"),
        (nn.LayerNorm(12), "is a LayerNorm; accepted are linear layers and convolutions"),
    ],
)
def test_other_modules_are_refused_by_name(file, convolution, match):
    model = net()
    model.conv = convolution
    stored = load_file(file)
    shapes = {"a1": (12, 3, 1, 1), "a2": (3, 12, 1, 1), "b1": (9, 3, 1, 1), "b2": (3, 12, 3, 3)}
    save_file(stored | {f"lycoris_conv.{key}.weight": torch.zeros(shape) for key, shape in shapes.items()}, file)
    refused(model, file, match)


@pytest.mark.parametrize(
    ("config", "format", "match"),
    [
        (GLoRAConfig(), "lycoris", r"cannot hold 'down_blocks.0.to_q' with GLoRAConfig\(A='vector'"),
        (GLoRAConfig("lora", "lora", rank=2), "lycoris", "holds A='lora', B='lora', .*variant='matmul' .* or A='none'"),
        (GLORA, "kohya", r"it holds A='none', B='lora', C='none', D='none', E='none' \(LoRA of kohya\)"),
        (GLORA, "peft", "LoRA of PEFT"),
        (LORA, "comfy", "format must be one of 'lycoris', 'kohya', 'peft'; got 'comfy'"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_and_the_file_stays(file, config, format, match):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=match):
        gk.save_adapter(adapted(config), file, format=format)
    assert file.read_bytes() == before


def test_modules_trained_whole_and_trained_biases_are_refused(file):
    model = gk.inject(net(), LORA, target_modules=["to_q"], train=["proj_out"])
    with pytest.raises(ValueError, match=r"has 'proj_out.bias' as well, which is trained whole"):
        gk.save_adapter(model, file, format="kohya")
    model = adapted(LORA)
    model.proj_out.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"has 'proj_out.bias' as well"):
        gk.save_adapter(model, file, format="kohya")
    alone = gk.inject(nn.Linear(3, 3), LORA)
    with pytest.raises(ValueError, match="the adapted layer is the model itself, which has no name"):
        gk.save_adapter(alone, file, format="kohya")


def test_arguments_that_would_have_no_effect(file, tmp_path):
    own = tmp_path / "own.safetensors"
    model = adapted(LORA)
    gk.save_adapter(model, own)
    for arguments in ({"prefix": "lora_unet_"}, {"rs_lora": False}):
        with pytest.raises(ValueError, match="is a file of this library, which"):
            gk.load_adapter(net(), own, **arguments)
    with pytest.raises(ValueError, match="prefix='lora_unet_' is for the names in files of another format"):
        gk.save_adapter(model, own, prefix="lora_unet_")
    with pytest.raises(TypeError, match="prefix must be None, a str, or a mapping"):
        gk.save_adapter(model, own, format="kohya", prefix=3)
    with pytest.raises(ValueError, match="the same prefix"):
        gk.load_adapter(net(), file, prefix={"a": "x", "b": "x"})


def test_beside_another_adapter_and_into_a_fitting_model(file):
    model = adapted(GLORA)
    host = gk.load_adapter(adapted(LORA), file, "style")
    gk.set_adapter(host, "style")
    near(host(X), model(X))
    into = gk.load_adapter(gk.inject(net(), GLORA, target_modules=PATHS), file)
    near(into(X), model(X))
    refused(adapted(LORA), file, "does not fit the layer 'down_blocks.0.to_q': it has A='lora'", rs_lora=None)
    assert TARGET.shape == into(X).shape


def test_of_loras_as_diffusers_saves_them(tmp_path):
    """The scale is in the metadata, as a LoraConfig, and not in the tensors."""
    path = tmp_path / "a.safetensors"
    model = adapted(LORA)
    gk.save_adapter(adapted(GLoRAConfig.lora(3)), path, format="peft")
    about = {"transformer.r": 3, "transformer.lora_alpha": 2, "transformer.use_rslora": False}
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(about)})
    near(gk.load_adapter(net(), path)(X), model(X))
    about["transformer.alpha_pattern"] = {"to_q": 4}
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(about)})
    refused(net(), path, "its metadata has alpha_pattern", rs_lora=None)


@pytest.mark.parametrize("prefix", [None, "base_model.model."])
def test_a_checkpoint_of_peft_is_refused_since_its_scale_is_elsewhere(tmp_path, prefix):
    peft = pytest.importorskip("peft")
    from glora_kernels.integrations.peft import convert_checkpoint

    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=PATHS)
    peft.get_peft_model(net(), config).save_pretrained(tmp_path)
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"whose scale alpha/r is in adapter_config.json .*PeftModel.from_pretrained"):
        gk.load_adapter(model, tmp_path / "adapter_model.safetensors", prefix=prefix)
    with pytest.raises(ValueError, match=r"whose scale alpha/r is in adapter_config.json .*PeftModel.from_pretrained"):
        convert_checkpoint(
            tmp_path / "adapter_model.safetensors", tmp_path / "out", model=model, prefix=prefix, rs_lora=False
        )
    assert model.state_dict().keys() == before.keys()


def test_names_of_peft_without_its_configuration_take_a_prefix(tmp_path):
    """`format="peft"` multiplies s into the factors, so that such a file has no other scale."""
    ours = adapted(GLoRAConfig.lora(4, 8))
    gk.save_adapter(ours, tmp_path / "a.safetensors", format="peft", prefix="base_model.model.")
    near(gk.load_adapter(net(), tmp_path / "a.safetensors", prefix="base_model.model.")(X), ours(X))
