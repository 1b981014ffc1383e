"""What the tests of recipes share: a small model under every kind of adapter, each recipe at a fast pace, a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glora_kernels as gk
from glora_kernels.methods.factors import low_rank
from glora_kernels.methods.mids import TaskMid
from glora_kernels.recipes import BeamLoRA, ChainOfLoRA, DiffoRA, DynamicLoRA, MTLLoRA, PRILoRA, Recipe, XGBLoRA

TARGETS = ["q_proj", "v_proj"]
K = 16
"""Features of every layer."""


class Block(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size  # of what it adds: the layers of different blocks matter differently
        self.q_proj, self.v_proj = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * torch.tanh(self.q_proj(x)) * self.v_proj(x)


class Model(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(0.5 + i) for i in range(depth))
        self.head = nn.Linear(K, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def plain(depth: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    """The model without adapters; the same one for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(depth).to(dtype)


def ours(
    rank: int = 4, depth: int = 3, dtype: torch.dtype = torch.float32, train: Iterable[str] = (), seed: int = 0
) -> Model:
    """With fresh LoRA of this library on q and v, s = 2."""
    model = plain(depth, seed, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        return gk.inject(model, gk.GLoRAConfig.lora(rank, 2 * rank), TARGETS, train=list(train), adapter_dtype=dtype)


def peft(accelerated: bool) -> nn.Module:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(plain(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    return gk.accelerate(model, verbose=False) if accelerated else model


def share_lora() -> nn.Module:
    torch.manual_seed(1)
    return gk.inject(plain(), gk.ShareLoRAConfig(rank=4, alpha=8, share="A"), TARGETS)


def four_bit() -> nn.Module:
    torch.manual_seed(1)
    return gk.inject(gk.quantize(plain(), target_modules=TARGETS), gk.GLoRAConfig.lora(4, 8), TARGETS)


def with_vectors() -> nn.Module:
    """Every support, some of them low-rank, so that a merge for good also writes biases."""
    torch.manual_seed(1)
    config = gk.GLoRAConfig(A="lora", B="lora", C="lora", D="vector", E="vector", rank=4, alpha=8)
    return gk.inject(plain(), config, TARGETS)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: ours(train=["head"]),
    "bf16": lambda: ours(dtype=torch.bfloat16),
    "all supports": with_vectors,
    "peft": lambda: peft(False),
    "accelerated": lambda: peft(True),
    "ShareLoRA": share_lora,
    "4 bits": four_bit,
}

RECIPES: dict[str, Callable[[nn.Module], Recipe]] = {
    "beam": lambda model: BeamLoRA(model, steps=STEPS, period=4, pruned=0.6, horizon=100),
    "diffora": lambda model: DiffoRA(model, held_out=lambda: loss_of(model, 1000)),
    "dynamic": lambda model: DynamicLoRA(model, period=3),
    "mtl": lambda model: MTLLoRA(model, tasks=3),
    "prilora": lambda model: PRILoRA(model, period=3),
    "xgb": lambda model: XGBLoRA(model, layers=2, steps=3),
    "xgb, chain": lambda model: XGBLoRA(model, layers=2, steps=3, into="chain"),
    "chain": lambda model: ChainOfLoRA(model, [3, 6, 9], ranks=[4, 3, 3, 2], into="chain"),
    "chain, base": lambda model: ChainOfLoRA(model, [3, 6, 9], into="base"),
}
"""At a pace at which each acts twice before step 7 and once more before the end."""

STEPS = 12


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, K, generator=generator)
    return x.to(dtype), (x[:, :5] + x[:, 5:10] * x[:, 10:15]).argmax(1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step, next(model.parameters()).dtype)
    has_tasks = any(isinstance(mid, TaskMid) for mid in gk.mids(model).values())
    with gk.tasks(model, torch.arange(len(x)) % 3) if has_tasks else nullcontext():
        return F.cross_entropy(model(x).float(), y)


def optimizer_of(model: nn.Module, recipe: Recipe | None = None, **options: float) -> torch.optim.Optimizer:
    of_recipe = recipe.parameters() if isinstance(recipe, XGBLoRA) else None
    parameters = of_recipe or [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, **({"lr": 2e-2, "weight_decay": 0.1} | options))


def train(model: nn.Module, recipe: Recipe | None, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list:
    """Steps of a plain loop; the losses."""
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if recipe is not None:
            recipe.after_step()
    return losses


def started(model: nn.Module, name: str) -> tuple[Recipe, torch.optim.Optimizer]:
    """A recipe, and the optimizer that it is told."""
    torch.manual_seed(2)
    recipe = RECIPES[name](model)
    optimizer = optimizer_of(model, recipe)
    recipe.bind(optimizer)
    return recipe, optimizer


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def adapted_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + s·U·D of each layer in float64, by its parameters as the layer computes with them."""
    found = {}
    for path, own in low_rank(model, "the test").items():
        base = getattr(own.layer, "base_layer", own.layer).weight
        change = own.scale * own.up.value.double() @ own.down.value.double()
        found[path] = (base.double() + change).detach()
    return found


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, so that losses can be compared bit for bit; and the same random numbers for every test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(before)
