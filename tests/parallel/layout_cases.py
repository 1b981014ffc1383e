"""Tensor parallelism in other layouts and under torch.compile, and what trainers do without a GPU."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import PrepareModuleInput, SequenceParallel, parallelize_module
from torch.nn import functional as F
from two_meshes import LORA, alike, filled, gradients, llama, planned, raises

import glora_kernels as gk
from glora_kernels.nn.ranks import whole

FULL = gk.GLoRAConfig("vector", "lora", "vector", "vector", "vector", rank=3)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _mlp(config):
    torch.manual_seed(0)
    return filled(gk.inject(Mlp().double(), config, train=["norm"]))


def _x():
    return torch.randn(2, 8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _step(model, x):
    torch.manual_seed(3)
    y = whole(model(x))
    y.square().sum().backward()
    return {"y": y.detach()} | gradients(model)


def sequence_parallel(mesh):
    """Tokens are cut between the layers, and gathered or summed around each pair of them."""
    column, row = gk.parallel.GLoRAColwise, gk.parallel.GLoRARowwise
    for config in (FULL, LORA):
        ours = _mlp(config)
        plan = {"norm": SequenceParallel(), "up": column(input_layouts=Shard(1))}
        parallelize_module(ours, mesh, {**plan, "down": row(output_layouts=Shard(1), use_local_output=False)})
        parallelize_module(ours, mesh, PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1)))
        part = _x().chunk(mesh.size(), 1)[mesh.get_local_rank()].contiguous()
        alike(_step(ours, part), _step(_mlp(config), _x()))


def compiled(mesh):
    """In one graph, forward and backward."""
    ours = _mlp(FULL)
    for parameter in ours.norm.parameters():
        parameter.requires_grad_(False)
    parallelize_module(ours, mesh, {"up": gk.parallel.GLoRAColwise(), "down": gk.parallel.GLoRARowwise()})
    wanted = _step(ours, _x())
    ours.zero_grad()
    graph = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = {name.replace("_orig_mod.", ""): value for name, value in _step(graph, _x()).items()}
    alike(found, wanted)


def trainers_refuse(mesh, folder):
    """accelerate's ParallelismConfig, and with it transformers' Trainer, take tensor parallelism on GPUs alone."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    text = "ParallelismConfig is only compatible"
    sizes = ParallelismConfig(tp_size=mesh.size())
    raises(ValueError, text, lambda: Accelerator(parallelism_config=sizes, cpu=True))
    AcceleratorState._reset_state(True)
    model = planned(gk.inject(llama(), LORA), mesh)
    arguments = TrainingArguments(str(folder / "out"), use_cpu=True, report_to=[], parallelism_config=sizes)
    raises(ValueError, text, lambda: Trainer(model=model, args=arguments))
    AcceleratorState._reset_state(True)
