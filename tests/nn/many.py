"""What the tests of several adapters share: a model with eight of them, and values for all parameters of one."""

import zlib

import torch
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, ShareLoRAConfig

F64 = torch.float64


class Conv(nn.Module):
    """A block of a dense layer, a `Conv1D` and a layer without a bias."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.up, self.mix, self.down = nn.Linear(12, 10), Conv1D(9, 10), nn.Linear(9, 12, bias=False)
        nn.init.normal_(self.mix.weight, std=0.3)
        nn.init.normal_(self.mix.bias)

    def forward(self, x):
        return x + self.down(torch.tanh(self.mix(torch.tanh(self.up(x)))))


class Net(nn.Module):
    """Blocks and a head, for x (B, T, 12)."""

    def __init__(self, depth=2):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Conv() for _ in range(depth)), nn.Linear(12, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


LORA = GLoRAConfig.lora(3, alpha=6)
WIDE = GLoRAConfig.lora(7, alpha=2)
EIGHT = {
    "default": (LORA, ["up", "mix"]),
    "wide": (WIDE, None),
    "rich": (GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=2, alpha=3), None),
    "vectors": (GLoRAConfig("vector", "vector", "vector", "vector", "constant"), ["up", "mix", "down"]),
    "constants": (GLoRAConfig("constant", "constant", "none", "constant", "vector"), ["mix"]),
    "matmul": (GLoRAConfig("lora", "lora", rank=4, variant="matmul"), ["up", "down"]),
    "shared": (ShareLoRAConfig(rank=4, alpha=4, share="A", E="vector"), ["up", "mix"]),
    "mapped": ({"*.up": WIDE, "blocks.1.*": LORA}, ["up", "down", "mix"]),
}
"""Name → configuration and target_modules: forms, ranks, scales and layers differ; some layers have no first one."""


def randomized(model, std=0.3):
    """The model, each trained parameter away from zero: the same one for the same name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=F64
                )
                parameter.copy_((drawn * std).to(parameter.dtype))
    return model


def many(names=EIGHT, train=(), dtype=F64, net=Net, seed=0):
    """A model with these of the eight adapters, "default" among them."""
    torch.manual_seed(seed)
    config, targets = EIGHT["default"]
    model = gk.inject(net().to(dtype), config, targets, train=train)
    for name in names:
        if name != "default":
            config, targets = EIGHT[name]
            targets = ["up", "mix", "down"] if targets is None else targets
            assert gk.add_adapter(model, name, config, targets) is model
    return randomized(model)


def two(dtype=F64, config=WIDE, **more):
    """The same with "default" and a second, "b", on layers that the first adapts."""
    model = many(["default"], dtype=dtype, **more)
    return randomized(gk.add_adapter(model, "b", config))


def x_of(examples=4, dtype=F64, seed=1):
    return torch.randn(examples, 3, 12, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def alone(model, x, names):
    """y of each example by its adapter for the whole model."""
    found = []
    for i, name in enumerate(names):
        if name is None:
            with gk.disabled(model):
                found.append(model(x[i : i + 1]))
        else:
            gk.set_adapter(model, name)
            found.append(model(x[i : i + 1]))
    gk.set_adapter(model, "default")
    return torch.cat(found)


def mixed(model, x, names):
    with gk.rows(model, names):
        return model(x)


def near(got, wanted, tolerance=1e-12):
    got, wanted = got.detach(), wanted.detach()
    assert float((got - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fingerprint(model):
    """Everything that a call which fails could have changed."""
    modules = [(path, id(m), m.training, getattr(m, "_active", None)) for path, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return modules, parameters, list(model.state_dict())


def unchanged(model, before):
    modules, parameters, keys = fingerprint(model)
    assert modules == before[0]
    assert keys == before[2]
    assert [own[:3] for own in parameters] == [own[:3] for own in before[1]]
    assert all(torch.equal(own[3], then[3]) for own, then in zip(parameters, before[1], strict=True))
