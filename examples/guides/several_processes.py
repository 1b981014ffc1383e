"""Adapters on several processes: PEFT under DistributedDataParallel and under FSDP2, and factors that layers share.

    accelerate launch --num_processes 2 --multi_gpu examples/guides/several_processes.py
    torchrun --nproc-per-node 2 examples/guides/several_processes.py --methods fsdp2 shared
    torchrun --nproc-per-node 2 examples/guides/several_processes.py --device cpu        (no GPU: gloo)

Every process trains on batches of its own. Beside each run the first process trains the same model alone on all of
the batches, with plain PEFT where PEFT made the adapter, and the script prints how far the losses are apart.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from guide_parts import (
    build_decoder,
    draw_losses,
    largest_difference,
    load_windows,
    logits_of,
    missing,
    parse_arguments,
    print_table,
)

if message := missing("transformers", "accelerate"):
    sys.exit(message)

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from tqdm import tqdm

import glora_kernels as gk

BATCH, RATE = 4, 5e-3
METHODS = ["ddp", "fsdp2", "shared"]
Losses = list[float]


def add_lora() -> Any:
    """PEFT's LoRA on every linear layer but the head."""
    if message := missing("peft"):
        sys.exit(message)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(build_decoder(), config)


def add_sharelora() -> nn.Module:
    """ShareLoRA: the layers of one projection type have one A."""
    torch.manual_seed(1)
    return gk.inject(build_decoder(), gk.ShareLoRAConfig(rank=8, alpha=16, share="A"))


def train_ddp(accelerator: Accelerator, loader: DataLoader, args: argparse.Namespace) -> tuple[Losses, Any]:
    """PEFT, accelerated, under DistributedDataParallel, as a script for `accelerate` is usually written."""
    model = add_lora()
    gk.accelerate(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = loop(accelerator, model, optimizer, loader, "DDP")
    model = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        model.save_pretrained(args.out / "several-ddp")
    return losses, args.out / "several-ddp"


def train_fsdp2(accelerator: Accelerator, loader: DataLoader, args: argparse.Namespace) -> tuple[Losses, Any]:
    """PEFT, accelerated, sharded by torch's fully_shard: accelerate, shard, and the optimizer last."""
    model = add_lora().to(accelerator.device)
    gk.accelerate(model)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    losses = loop(accelerator, model, optimizer, accelerator.prepare(loader), "FSDP2")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if accelerator.is_main_process:
        model.save_pretrained(args.out / "several-fsdp2", state_dict=state)
    return losses, args.out / "several-fsdp2"


def train_shared(accelerator: Accelerator, loader: DataLoader, args: argparse.Namespace) -> tuple[Losses, Any]:
    """Factors that layers share, sharded: FSDP2 alone refuses them, gk.fully_shard keeps them whole."""
    path = args.out / "several-shared.safetensors"
    model = add_sharelora().to(accelerator.device)
    gk.fully_shard(model)
    optimizer = torch.optim.AdamW(gk.parameter_groups(model), lr=RATE)
    losses = loop(accelerator, model, optimizer, accelerator.prepare(loader), "shared factors")
    gk.save_adapter(model, path)  # on every process; the first one writes
    return losses, path


def loop(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, name: str) -> Losses:
    """The loss of every step, averaged over the processes."""
    torch.manual_seed(accelerator.process_index)  # dropout masks of its own
    losses = []
    for batch in tqdm(loader, desc=name, disable=not accelerator.is_main_process):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def train_alone(model: Any, loader: DataLoader, device: torch.device) -> Losses:
    """The loss of every step of one process on the batches of all."""
    model = model.to(device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    losses = []
    for batch in loader:
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def load_back(method: str, saved: Any) -> nn.Module:
    """What was saved, on a base model of its own, without accelerate and without shards."""
    if method == "shared":
        return gk.load_adapter(build_decoder(), saved)
    from peft import PeftModel

    return PeftModel.from_pretrained(build_decoder(), saved)


def main() -> None:
    args = parse_arguments(__doc__, steps=30, smoke=3, methods=METHODS)
    accelerator = Accelerator(cpu=args.device == "cpu")
    processes = accelerator.num_processes
    samples: Any = load_windows()
    windows, held_out = samples[: args.steps * BATCH * processes], samples[-8:]
    rows, curves = [("method", "processes", "last loss", "loss by step: beside one process", "saved, loaded")], {}
    for method in args.methods:
        train = {"ddp": train_ddp, "fsdp2": train_fsdp2, "shared": train_shared}[method]
        curves[method], saved = train(accelerator, DataLoader(windows, batch_size=BATCH), args)
        if accelerator.is_main_process:
            alone = add_sharelora() if method == "shared" else add_lora()
            one = train_alone(alone, DataLoader(windows, batch_size=BATCH * processes), accelerator.device)
            difference = largest_difference(curves[method], one)
            loaded = largest_difference(logits_of(alone, held_out), logits_of(load_back(method, saved), held_out))
            rows.append((method, str(processes), f"{one[-1]:.4f}", f"{difference:.1e}", f"{loaded:.1e}"))
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print_table(rows)
        draw_losses(curves, f"{processes} processes", args.out / "several_processes.png")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
