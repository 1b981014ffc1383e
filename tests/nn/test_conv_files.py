"""Convolutions in files of other tools: LyCORIS itself in float64, kohya's LoCon, PEFT; a UNet's names."""

import copy

import pytest
import torch
from convs import away, config, near
from lycoris_runs import ENDINGS, continued, loaded_there, under
from safetensors.torch import load_file, save_file
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRAConv, GLoRALinear

GLORA = GLoRAConfig("lora", "lora", rank=4, alpha=2, variant="matmul", alpha_A=2)
LORA = GLoRAConfig.lora(4, 2)


class ResnetBlock2D(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.conv_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x, t):
        h = self.conv1(torch.tanh(x)) + self.time_emb_proj(t)[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(torch.tanh(h))


class Transformer2DModel(nn.Module):
    """As in SD1.5: proj_in and proj_out are 1 x 1 convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(8, 8)})})])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.proj_in(x).flatten(2).mT
        h = torch.tanh(self.transformer_blocks[0]["attn1"]["to_q"](h))
        return x + self.proj_out(h.mT.reshape(x.shape))


class UNet(nn.Module):
    """The names of SD1.5's UNet, a convolution with a stride, and those of video models in one and three dimensions."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        block = {"resnets": nn.ModuleList([ResnetBlock2D(8, 8)]), "attentions": nn.ModuleList([Transformer2DModel(8)])}
        self.down_blocks = nn.ModuleList([nn.ModuleDict(block)])
        self.downsamplers = nn.ModuleList([nn.Conv2d(8, 8, 3, stride=2, padding=1)])
        self.temporal = nn.Conv1d(8, 8, 3, padding=1)
        self.patch = nn.Conv3d(8, 6, (1, 2, 2), stride=(1, 2, 2))

    def forward(self, x):
        x, t = self.conv_in(x), x.mean((2, 3)).repeat(1, 2)[:, :4]
        block = self.down_blocks[0]
        x = self.downsamplers[0](block["attentions"][0](block["resnets"][0](x, t)))
        x = self.temporal(x.flatten(2)).view(x.shape)
        return self.patch(x.unsqueeze(2)).flatten(1)


def net():
    torch.manual_seed(0)
    return UNet().double()


PATHS = [path for path, m in net().named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def adapted(own):
    return away(gk.inject(net(), own, target_modules=PATHS)).float().double()


def steps(model, optimizer, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


def changed(path, prefix):
    """The base with the weights that a reader of the file gives it, by the formulas, and how many it changed."""
    stored, model, count = load_file(path), net(), 0
    for full, layer in model.named_modules():
        name = prefix + full.replace(".", "_" if prefix[-1] == "_" else ".")
        own = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        if full not in PATHS or not own:
            continue
        weight = layer.weight.data
        pairs = ("b1", "b2") if "b1.weight" in own else ("lora_up", "lora_down")
        up, down = (own[f"{one}.weight"] for one in (pairs if f"{pairs[0]}.weight" in own else ("lora_B", "lora_A")))
        assert down.shape[2:] == weight.shape[2:]
        change = torch.einsum("nr...,rc...->nc...", up, down)
        if "a1.weight" in own:
            a1, a2 = (own[f"{one}.weight"].flatten(1) for one in ("a1", "a2"))
            change = change + torch.einsum("nc...,cd->nd...", weight, a1 @ a2)
        layer.weight.data = weight + change * (own["alpha"].item() / len(down) if "alpha" in own else 1.0)
        count += 1
    return model, count


WRITTEN = [
    (GLORA, "lycoris", "lycoris_"), (LORA, "lycoris", "lycoris_"), (LORA, "kohya", "lora_unet_"),
    (LORA, "peft", "unet."),
]  # fmt: skip


@pytest.mark.parametrize(("own", "format", "prefix"), WRITTEN)
def test_a_reader_of_the_formulas_computes_the_same(tmp_path, own, format, prefix):
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    model = adapted(own)
    gk.save_adapter(model, path, format=format, prefix=prefix)
    read, count = changed(path, prefix)
    assert count == len(PATHS)
    near(model(X), read(X))
    loaded = gk.load_adapter(net(), path, rs_lora=False)
    near(loaded(X), model(X))
    kinds = {path: type(m) for path, m in loaded.named_modules() if isinstance(m, GLoRALinear)}
    assert list(kinds) == PATHS
    assert sum(kind is GLoRAConv for kind in kinds.values()) == len(PATHS) - 2
    gk.save_adapter(loaded, again, format=format, prefix=prefix)
    assert all(torch.equal(value, load_file(path)[key]) for key, value in load_file(again).items())


def theirs(lycoris, algo, **options):
    """The model under LyCORIS, convolutions too."""
    return under(lycoris, net(), algo, conv_dim=4, conv_alpha=2.0, **options)


@pytest.mark.parametrize("algo", ENDINGS)
@pytest.mark.parametrize("bypass_mode", [False, True])
def test_a_run_continues_with_the_same_steps(lycoris, tmp_path, algo, bypass_mode):
    there = theirs(lycoris, algo, bypass_mode=bypass_mode)
    ours, _ = continued(*there, algo, net(), steps, X, near, tmp_path)
    assert len([m for m in ours.modules() if isinstance(m, GLoRALinear)]) == len(PATHS)


@pytest.mark.parametrize("algo", ENDINGS)
def test_their_package_reads_what_is_saved_here(lycoris, tmp_path, algo):
    path = tmp_path / "a.safetensors"
    ours = adapted(GLORA if algo == "glora" else LORA)
    gk.save_adapter(ours, path, format="lycoris")
    near(loaded_there(lycoris, path, net())(X), ours(X))


def test_tucker_cores_of_theirs_are_refused_by_name(lycoris, tmp_path):
    path = tmp_path / "theirs.safetensors"
    _, network = theirs(lycoris, "locon", use_tucker=True)
    network.save_weights(path, None, {})
    with pytest.raises(ValueError, match=r"'lycoris_\w+' has 'lora_mid.weight', a Tucker core"):
        gk.load_adapter(net(), path, rs_lora=False)


def test_matrices_of_1_x_1_convolutions_and_the_earlier_roles(tmp_path):
    """Some tools write what is 1 x 1 as matrices; earlier versions of LyCORIS gave other names to the factors."""
    path = tmp_path / "a.safetensors"
    model = adapted(GLORA)
    gk.save_adapter(model, path, format="lycoris")
    stored = load_file(path)
    pointwise = [key for key in stored if "_proj_in." in key and not key.endswith("alpha")]
    save_file(stored | {key: stored[key].flatten(1) for key in pointwise}, path)
    assert torch.equal(gk.load_adapter(net(), path, rs_lora=False)(X), model(X))
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    roles = {key: ".".join(swapped.get(part, part) for part in key.split(".")) for key in stored}
    save_file({roles[key]: value for key, value in stored.items()}, path)
    assert torch.equal(gk.load_adapter(net(), path, rs_lora=False)(X), model(X))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            {"lora_unet_conv_in.lora_down.weight": (4, 3, 1, 1)},
            r"\(4, 3, 1, 1\), where 'conv_in' of this model",
        ),
        ({"lora_unet_conv_in.lora_down.weight": (4, 27)}, r"\(8, 3, 3, 3\), takes \(4, 3, 3, 3\)"),
        ({"lora_unet_conv_in.lora_up.weight": (8, 4)}, r"takes \(8, 4, 1, 1\)"),
        ({"lora_unet_conv_in.lora_up.weight": None}, "but not lora_up.weight; the file is only a part"),
        ({"lora_unet_conv_out.lora_up.weight": (8, 4, 1, 1)}, "'lora_unet_conv_out' .* only a part|is no layer"),
        ({"lora_unet_temporal.lora_down.weight": (4, 8, 3, 3)}, r"takes \(4, 8, 3\)"),
    ],
)
def test_bad_files(tmp_path, edit, match):
    path, model = tmp_path / "a.safetensors", net()
    gk.save_adapter(adapted(LORA), path, format="kohya")
    stored = load_file(path)
    for key, shape in edit.items():
        stored.pop(key, None)
        stored |= {} if shape is None else {key: torch.zeros(shape)}
    save_file(stored, path)
    with pytest.raises(ValueError, match=match):
        gk.load_adapter(model, path)
    assert not any(isinstance(m, GLoRALinear) for m in model.modules())


def test_what_formats_and_methods_of_peft_cannot_hold(tmp_path):
    from glora_kernels.integrations.peft import convert_checkpoint

    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="cannot hold 'conv_in' with"):
        gk.save_adapter(adapted(config("vector", "lora")), path, format="lycoris")
    model = adapted(GLORA)
    gk.save_adapter(model, path)
    with pytest.raises(ValueError, match="'conv_in' is a convolution, which our methods of PEFT do not adapt"):
        convert_checkpoint(path, tmp_path / "folder")
    convert_checkpoint(path, tmp_path / "b.safetensors", format="lycoris")
    near(gk.load_adapter(copy.deepcopy(net()), tmp_path / "b.safetensors", rs_lora=False)(X), model(X))


def test_kohyas_names_of_a_pipeline(tmp_path):
    """A file with two models: the UNet's part, convolutions included, by its prefix."""
    path = tmp_path / "a.safetensors"
    both = nn.ModuleDict({"unet": net(), "text": nn.Sequential(nn.Linear(8, 8).double())})
    gk.inject(both, LORA, target_modules=[*(f"unet.{path}" for path in PATHS), "text.0"])
    away(both).float().double()
    gk.save_adapter(both, path, format="kohya", prefix={"unet": "lora_unet_", "text": "lora_te_"})
    near(gk.load_adapter(net(), path, prefix="lora_unet_")(X), both["unet"](X))
