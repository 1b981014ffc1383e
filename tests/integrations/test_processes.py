"""Hugging Face's `accelerate` over two processes: DDP and FSDP2, over gloo on the CPU; and replicas of DataParallel.

The cases are in `processes_worker.py`: starting a process costs seconds, so two are started once for all of them.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from two_processes import needs_distributed, run_two

import glora_kernels as gk

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

WORKER = Path(__file__).with_name("processes_worker.py")
SECONDS = 400
"""For what takes about 40 on two free cores; a hang is a failure. A collective gives up after 60."""


@needs_distributed
def test_two_processes_equal_one(tmp_path):
    run_two(WORKER, tmp_path, SECONDS)


CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=3, lora_alpha=6, lora_bias=True, target_modules=["0", "2"]),
    "GLoRA": lambda: peft.GloraConfig(r=3, target_modules=["0", "2"]),
}


@pytest.mark.parametrize("adapter", CONFIGS)
def test_a_replica_of_data_parallel_is_right(adapter):
    """`nn.DataParallel` needs GPUs; what it makes of a module (`torch.nn.parallel.replicate`), by hand."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4)), CONFIGS[adapter]()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    x = torch.randn(7, 5, dtype=torch.float64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    y = model(x)
    dy = torch.randn_like(y)
    expected = [y, *torch.autograd.grad(y, trained, dy)]

    gk.accelerate(model, verbose=False)
    y = replica_of(model)(x)
    assert y.shape == (7, 4)
    for found, wanted in zip([y, *torch.autograd.grad(y, trained, dy)], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def replica_of(model):
    """As `torch.nn.parallel.replicate` makes one: no module in it has parameters, but copies of them as attributes."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
                replica._former_parameters[name] = getattr(replica, name)
    return replicas[model]
