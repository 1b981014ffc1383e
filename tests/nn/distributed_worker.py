"""One of two processes that train together; `test_distributed.py` starts them. Every case compares with one process."""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import ddp_cases
import fsdp_cases
import fsdp_files
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from two_ranks import RANKS


def cases(folder, hybrid):
    ddp, fsdp = ddp_cases.ddp_equals_one_process, fsdp_cases.fsdp_equals_one_process
    return {
        "DDP A": partial(ddp, share="A", reentrant=None),
        "DDP A, checkpointed": partial(ddp, share="A", reentrant=False),
        "DDP A, reentrant": partial(ddp, share="A", reentrant=True),
        "DDP AB": partial(ddp, share="AB", reentrant=None),
        "DDP AB, checkpointed": partial(ddp, share="AB", reentrant=False),
        "DDP AB, reentrant": partial(ddp, share="AB", reentrant=True),
        "DDP buckets": ddp_cases.ddp_has_a_shared_factor_in_one_bucket_once,
        "FSDP A": fsdp,
        "FSDP A, reentrant": partial(fsdp, reentrant=True),
        "FSDP AB, checkpointed": partial(fsdp, share="AB", reentrant=False, reshard_after_forward=False),
        "FSDP A, offloaded": partial(fsdp, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "FSDP B, hybrid mesh": lambda rank, _: fsdp(rank, hybrid, share="B"),
        "FSDP one rank": lambda rank, _: fsdp_cases.fsdp_of_one_rank(hybrid["shard"]),
        "FSDP lists": fsdp_cases.fsdp_steps_and_clips_over_lists,
        "FSDP tied inside a block": fsdp_cases.fsdp_of_factors_tied_inside_a_block,
        "FSDP accumulation": fsdp_cases.fsdp_accumulates_gradients,
        "FSDP accumulation in bf16": fsdp_cases.fsdp_adds_what_is_new_to_a_gradient,
        "FSDP trained later": fsdp_cases.fsdp_averages_what_is_trained_later,
        "deferred gradients": fsdp_cases.deferred_gradients,
        "FSDP save": partial(fsdp_files.fsdp_saves_one_file_from_one_rank, folder=folder),
        "FSDP resume": partial(fsdp_files.fsdp_resumes_from_a_distributed_checkpoint, folder=folder),
        "FSDP mixed precision": fsdp_cases.fsdp_in_mixed_precision,
        "FSDP 16-bit base": fsdp_cases.fsdp_of_a_16_bit_base,
        "FSDP 4 bits": partial(fsdp_files.fsdp_of_4_bits, folder=folder),
        "FSDP blocks by name": fsdp_cases.fsdp_blocks_by_name,
        "FSDP refuses": fsdp_cases.fsdp_refuses,
    }


def main(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=RANKS)
    hybrid = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard"))
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, case in cases(folder, hybrid).items():
        start = time.perf_counter()
        print(f"{name}: ", end="", flush=True)
        case(rank, mesh)
        dist.barrier()
        print(f"passed in {time.perf_counter() - start:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with contextlib.redirect_stderr(sys.stdout):
        main(int(sys.argv[1]), Path(sys.argv[2]))
