"""Adapters on a model in parts: tensor parallelism by torch's plans and by transformers, and FSDP2 over it.

    torchrun --nproc-per-node 2 examples/guides/tensor_parallel.py --device cpu          (no GPU: gloo)
    torchrun --nproc-per-node 4 examples/guides/tensor_parallel.py --methods fsdp2
    torchrun --nproc-per-node 2 examples/guides/tensor_parallel.py --methods plan loaded

All processes of a tensor-parallel group see one batch. Beside each run every process trains the same model alone on all
of the batches, and the script prints how far the losses are apart, and which collectives adapters add to a step.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
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

if message := missing("transformers"):
    sys.exit(message)

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from tqdm import tqdm

import glora_kernels as gk

BATCH, RATE = 8, 5e-3
METHODS = ["plan", "loaded", "shared", "fsdp2"]
CONFIG = gk.GLoRAConfig("vector", "lora", rank=8)
SHARED = gk.ShareLoRAConfig(rank=8, alpha=16, share="A")


def add(model: nn.Module, config: Any) -> Any:
    torch.manual_seed(1)  # the same adapter on every process, and in the model that trains alone
    return gk.inject(model, config)


def by_plan(mesh: DeviceMesh, config: Any, folder: Any) -> Any:
    """Adapters first, then torch's parallelize_module with the plan that the model brings."""
    model = add(build_decoder(), config).to(mesh.device_type)
    return parallelize_module(model, mesh["tp"], gk.parallel.plan(model, mesh["tp"]))


def loaded(mesh: DeviceMesh, config: Any, folder: Any) -> Any:
    """A model of which transformers loads each process its part; adapters after that."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        build_decoder().save_pretrained(folder / "base")
    dist.barrier()
    parts = DistributedConfig(tp_plan="auto", tp_size=mesh["tp"].size())
    return add(AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=parts), config)


def over_fsdp(mesh: DeviceMesh, config: Any, folder: Any) -> Any:
    """FSDP2 over the other dimension of the mesh."""
    return gk.fully_shard(by_plan(mesh, config, folder), mesh=mesh["dp"])


def train(model: Any, batches: list[torch.Tensor], mesh: DeviceMesh | None, name: str) -> tuple[list[float], Counter]:
    """The losses, averaged over data-parallel ranks, and the collectives of the last optimizer step."""
    optimizer = torch.optim.AdamW(gk.parameter_groups(model), lr=RATE)
    losses, counted = [], CommDebugMode()
    for batch in tqdm(batches, desc=name, disable=mesh is None or dist.get_rank() > 0):
        if mesh is not None:
            batch = batch.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        with counted:
            optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if mesh is not None:
            dist.all_reduce(loss, group=mesh["dp"].get_group())
            loss = loss / mesh["dp"].size()
        losses.append(loss.item())
    return losses, Counter({str(op).rpartition(".")[2]: count for op, count in counted.get_comm_counts().items()})


def main() -> None:
    args = parse_arguments(__doc__, steps=30, smoke=3, methods=METHODS)
    if "RANK" not in os.environ:
        sys.exit("start it by torchrun: torchrun --nproc-per-node 2 examples/guides/tensor_parallel.py --device cpu")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    samples: Any = load_windows()
    windows, held_out = samples[: args.steps * BATCH], samples[-8:]
    batches = [torch.stack([each["input_ids"] for each in windows[i : i + BATCH]]).to(args.device)
               for i in range(0, len(windows), BATCH)]  # fmt: skip
    make: dict[str, Callable[..., Any]] = {"plan": by_plan, "loaded": loaded, "shared": by_plan, "fsdp2": over_fsdp}
    rows = [("method", "dp", "tp", "last loss", "loss by step: beside one process", "saved, loaded", "sums a step")]
    curves = {}
    for method in args.methods:
        data = 2 if method == "fsdp2" and dist.get_world_size() > 2 else 1
        mesh = init_device_mesh(args.device, (data, dist.get_world_size() // data), mesh_dim_names=("dp", "tp"))
        config, path = SHARED if method == "shared" else CONFIG, args.out / f"{method}.safetensors"
        model = make[method](mesh, config, args.out)
        curves[method], counted = train(model, batches, mesh, method)
        gk.save_adapter(model, path)  # on every process; the first one writes
        alone = add(build_decoder(), config).to(args.device)
        one, _ = train(alone, batches, None, method)
        apart = largest_difference(curves[method], one)
        back = gk.load_adapter(build_decoder(), path)
        again = largest_difference(logits_of(alone, held_out), logits_of(back, held_out))
        sums = str(counted.total())
        rows.append((method, str(data), str(mesh["tp"].size()), f"{one[-1]:.4f}", f"{apart:.1e}", f"{again:.1e}", sums))
        dist.barrier()
    if dist.get_rank() == 0:
        print_table(rows)
        draw_losses(curves, f"{dist.get_world_size()} processes", args.out / "tensor_parallel.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
