"""What the tests of convolutions share: the equation written out, geometries and forms."""

import itertools

import torch
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GEOMETRIES = {
    "3": {"kernel_size": 3},
    "1": {"kernel_size": 1},
    "1, stride": {"kernel_size": 1, "stride": 2},
    "1, padding": {"kernel_size": 1, "padding": 1},
    "2, stride, dilation": {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2},
    "3, reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "2, same, circular": {"kernel_size": 2, "padding": "same", "padding_mode": "circular"},
    "2, same": {"kernel_size": 2, "padding": "same"},
    "3, valid": {"kernel_size": 3, "padding": "valid", "bias": False},
}
MATRICES = ("none", "constant", "vector", "lora")
FORMS = [
    *((a, b, "hadamard") for a, b in itertools.product(MATRICES, MATRICES)),
    *(("lora", b, "matmul") for b in MATRICES),
]
SHIFTS = (("none", "none", "none"), ("vector", "vector", "vector"), ("lora", "constant", "constant"))


def config(a, b, variant="hadamard", shift=("none", "none", "none"), **others):
    """With scales of their own on A and B where they are lora."""
    others = {"rank": 2, "alpha": 3.0, "alpha_A": 5.0} | others
    return GLoRAConfig.of((a, b, *shift), variant=variant, **others)


def conv(dims=2, channels=3, out=4, **geometry):
    torch.manual_seed(0)
    return KINDS[dims](channels, out, **geometry).double()


def images(dims=2, channels=3, size=5, batch=2, last=False, **options):
    x = torch.randn(batch, channels, *[size] * dims, **({"dtype": torch.float64} | options))
    return (channels_last(x) if last else x).requires_grad_()


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def away(layer, size=0.3):
    """The layer, or the model, with adapters that are not zero."""
    layers = [layer] if isinstance(layer, gk.GLoRALinear) else [m for m in layer.modules() if hasattr(m, "adapter")]
    with torch.no_grad():
        for parameter in (p for one in layers for p in one.adapter().values()):
            parameter.copy_(size * torch.randn_like(parameter))
    return layer


def literal(base, layer, x):
    """y = x∗W_eff + β, with a dense W_eff, from the equation."""
    own, p, weight = layer.config, layer.adapter(), base.weight
    flat = weight.flatten(1)
    change = torch.zeros_like(flat)
    if own.A == "lora" and own.variant == "matmul":
        change = change + own.scale_A * torch.einsum("nc...,cd->nd...", weight, p["A_up"] @ p["A_down"]).flatten(1)
    elif own.A == "lora":
        change = change + own.scale_A * flat * (p["A_up"] @ p["A_down"])
    elif own.A != "none":
        change = change + flat * p["A"].view(-1, 1)
    if own.B == "lora":
        change = change + own.scale * p["B_up"] @ p["B_down"]
    elif own.B != "none":
        change = change + p["B"].view(-1, 1)
    bias = weight.new_zeros(len(flat)) if base.bias is None else base.bias
    full = bias
    if "D" in p:
        full = full + bias * p["D"]
    if "E" in p:
        full = full + p["E"]
    if own.C != "none":
        full = full + flat @ (p["C"] if own.C == "vector" else (p["C_up"] @ p["C_down"]).squeeze(1))
    return base._conv_forward(x, (flat + change).view(weight.shape), full)


def near(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
