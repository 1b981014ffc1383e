"""What the tests of other tools' files share: a model with awkward names, and a reader by the formulas.

The reader is written from the equations, with no line of the library: ΔW = s·(W·a1·a2 + b1·b2) or s·up·down, with
s = alpha/rank, and 1 where there is no alpha.
"""

import copy

import torch
from safetensors.torch import load_file
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig

GLORA = GLoRAConfig("lora", "lora", rank=3, alpha=2, variant="matmul", alpha_A=2)
LORA = GLoRAConfig.lora(rank=3, alpha=2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(12, 9, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(9, 12)])

    def forward(self, x):
        return x + self.to_out[0](torch.tanh(self.to_q(x)))


class Net(nn.Module):
    """Paths with dots and underscores, a bias and none."""

    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Linear(12, 7)

    def forward(self, x):
        for block in self.down_blocks:
            x = block(x)
        return self.proj_out(x)


def net():
    torch.manual_seed(0)
    return Net().double()


PATHS = [f"down_blocks.{i}.{name}" for i in range(2) for name in ("to_q", "to_out.0")] + ["proj_out"]
X = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def adapted(config):
    """The model with adapters away from their start, of numbers that fp32 has too."""
    model = gk.inject(net(), config, target_modules=PATHS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def steps(model, optimizer, count=5):
    for _ in range(count):
        optimizer.zero_grad()
        (model(X) - TARGET).square().mean().backward()
        optimizer.step()


def changed(path, base, prefix, separator="_"):
    """The base with the weights that a reader of the file would give it, and the number of layers that it changed."""
    stored = load_file(path)
    model, count = copy.deepcopy(base), 0
    for full, layer in model.named_modules():
        name = prefix + full.replace(".", separator)
        own = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        if not isinstance(layer, nn.Linear) or not own:
            continue
        weight = layer.weight.data
        if "a1.weight" in own:
            rank = own["b2.weight"].shape[0]
            change = weight @ own["a1.weight"] @ own["a2.weight"] + own["b1.weight"] @ own["b2.weight"]
        else:
            up, down = ("lora_up", "lora_down") if "lora_up.weight" in own else ("lora_B", "lora_A")
            rank = own[f"{down}.weight"].shape[0]
            change = own[f"{up}.weight"] @ own[f"{down}.weight"]
        layer.weight.data = weight + change * (own["alpha"].item() / rank if "alpha" in own else 1.0)
        count += 1
    return model, count


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
