"""One of two or four processes with a model in parts; `test_tensor_parallel.py` starts them."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import layout_cases
import mesh_cases
import peft_cases
import torch
import torch.distributed as dist
import tp_cases
from torch.distributed.device_mesh import init_device_mesh


def cases(ranks, folder):
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        return {
            "FSDP2 x TP": partial(mesh_cases.fsdp_over_tensor_parallel, mesh),
            "resume on another mesh": partial(mesh_cases.resumes, mesh, folder),
            "FSDP2 x TP, 4 bits": partial(mesh_cases.of_4_bits, mesh),
        }
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    return {
        "layers": partial(tp_cases.layers_equal_their_whole, mesh),
        "labels": partial(tp_cases.gradients_are_labelled, mesh),
        "models": partial(tp_cases.models_equal_one_process, mesh, folder, False),
        "models, injected after": partial(tp_cases.models_equal_one_process, mesh, folder, True),
        "a file into a plain model": partial(tp_cases.a_plain_model_takes_a_file, mesh, folder),
        "transformers": partial(tp_cases.of_transformers, mesh, folder),
        "PEFT": partial(peft_cases.accelerates, mesh, folder),
        "PEFT, columns": partial(peft_cases.columns_equal_pefts, mesh, folder),
        "4 bits": partial(tp_cases.of_4_bits, mesh),
        "collectives": partial(tp_cases.collectives, mesh),
        "one sum of dx": partial(tp_cases.one_sum_of_dx, mesh),
        "sequence parallel": partial(layout_cases.sequence_parallel, mesh),
        "compiled": partial(layout_cases.compiled, mesh),
        "trainers": partial(layout_cases.trainers_refuse, mesh, folder),
        "accumulation": partial(tp_cases.accumulates, mesh),
        "16 bits": partial(tp_cases.small_terms_survive_16_bits, mesh),
        "refusals": partial(tp_cases.refuses, mesh),
        "seeds": partial(tp_cases.seeds_must_agree, mesh),
        "checkpoint": partial(mesh_cases.saves, mesh, folder),
    }


def main(rank, folder, ranks):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "For backward hooks to be called")
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    # Through a server: transformers' loading and accelerate look for the variables that torchrun sets.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
    store = f"file://{folder / f'store{ranks}'}"
    dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=ranks)
    for name, case in cases(ranks, folder).items():
        start = time.perf_counter()
        print(f"{name}: ", end="", flush=True)
        case()
        dist.barrier()
        print(f" passed in {time.perf_counter() - start:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with contextlib.redirect_stderr(sys.stdout):
        main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
