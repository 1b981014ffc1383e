"""One of two processes that train together under Hugging Face's `accelerate`; `test_processes.py` starts them.

The oracle is the same PEFT model, not accelerated, in one process on whole batches and in float64: what the ranks add
up in another order, and the operators compute in another one, differs by rounding only. PEFT's own forward raises
while an accelerated model trains: no case passes by falling back to it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from only_ours import only_ours
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig, ShareLoRAPeftConfig
from glora_kernels.nn.model import clean

EXACT = 1e-12
RANKS, BATCH, LENGTH, STEPS = 2, 4, 12, 6
HALF = STEPS // 2
TARGETS = ["q_proj", "v_proj", "down_proj"]
LICENSE = Path(__file__).parents[2] / "LICENSE"

ADAPTERS = {
    "LoRA": partial(
        peft.LoraConfig, r=3, lora_alpha=6, lora_bias=True, target_modules=TARGETS, modules_to_save=["lm_head"]
    ),
    "LoRA with dropout": partial(peft.LoraConfig, r=3, lora_alpha=6, lora_dropout=0.2, target_modules=TARGETS),
    "GLoRA vector": partial(
        peft.GloraConfig, config_A_B="vector", config_C="vector", config_D_E="constant", target_modules=TARGETS
    ),
    "GLoRA lora": partial(
        peft.GloraConfig, r=3, config_A_B="lora", config_C="lora", config_D_E="vector", target_modules=TARGETS
    ),
    "our GLoRA": partial(GLoRAPeftConfig, r=3, A="lora", C="vector", D="constant", target_modules=TARGETS),
    "our ShareLoRA": partial(ShareLoRAPeftConfig, r=3, alpha=6, share="A", target_modules=TARGETS),
}
MOMENTS = ("before the optimizer", "after the optimizer", "after prepare")
"""When a script calls `gk.accelerate`."""


def texts():
    """Real text, one byte a token: sequences of LENGTH from the licence beside this project."""
    data = torch.tensor(list(LICENSE.read_bytes()[: STEPS * BATCH * LENGTH]))
    return list(data.view(-1, LENGTH))


def plain(adapter, dtype=torch.float64, seed=1):
    """A LLaMA of two layers, its PEFT adapter away from zero. transformers' own RMSNorm computes in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        attention_bias=True,
        mlp_bias=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.model.norm = nn.RMSNorm(24, 1e-6)
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(24, 1e-6), nn.RMSNorm(24, 1e-6)
    model = peft.get_peft_model(model, ADAPTERS[adapter]()).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)


def loss_of(model, tokens):
    logits = model(input_ids=tokens[:, :-1]).logits
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@functools.cache
def alone(adapter, accumulation=1):
    """Losses of plain PEFT in one process on the whole batches, and the model."""
    model, losses = plain(adapter), []
    optimizer = adam(model)
    for step, tokens in enumerate(DataLoader(texts(), BATCH), start=1):
        loss = loss_of(model, tokens)
        (loss / accumulation).backward()
        losses.append(loss.item())
        if step % accumulation == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return losses, model


@contextlib.contextmanager
def accelerator_of(sharded, checkpointing=False, **options):
    """accelerate's object. It gives FSDP to GPUs only: on a CPU it is told by hand, and then runs all the same."""
    plugin = None
    if sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", activation_checkpointing=checkpointing
        )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, **options)
    if sharded:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
    assert accelerator.num_processes == RANKS
    assert accelerator.is_fsdp2 == sharded
    try:
        yield accelerator
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)


def prepared(accelerator, adapter, moment, dtype=torch.float64, seed=1, before=lambda model: None):
    """Model, optimizer and data of a script as accelerate wants it, `gk.accelerate` called at some moment of it."""
    model = plain(adapter, dtype, seed)
    before(model)
    if moment == "before the optimizer":
        gk.accelerate(model)
    optimizer = adam(model)
    if moment == "after the optimizer":
        gk.accelerate(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(texts(), BATCH // RANKS))
    if moment == "after prepare":
        assert gk.accelerate(model) is model
    return model, optimizer, loader


def train(accelerator, model, optimizer, batches, forbid=True):
    """Losses, averaged over the ranks; PEFT's forward is not to run where it is forbidden."""
    losses = []
    with only_ours() if forbid else contextlib.nullcontext():
        for tokens in batches:
            with accelerator.accumulate(model):
                loss = loss_of(model, tokens)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def trained(accelerator, model):
    """What the optimizer changed, whole, on the first rank; elsewhere possibly nothing."""
    parameters = accelerator.unwrap_model(model).named_parameters()
    names = {clean(name) for name, parameter in parameters if parameter.requires_grad}
    return {name: value for name, value in accelerator.get_state_dict(model).items() if name in names}


def save(accelerator, model, folder):
    """As a script saves the adapter: every rank gathers, the first writes."""
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:  # the others have no values, which PEFT looks for in spite of is_main_process
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state)
    accelerator.wait_for_everyone()
    return load_file(folder / "adapter_model.safetensors")


def assert_alike(ours, theirs):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}")


def equals_plain_peft(folder, sharded, adapter, moment, accumulation=1, wrapped=False, reentrant=None, forbid=True):
    """Losses step by step and what is trained; the checkpoints are accelerate's (`wrapped`) or transformers'."""

    def before(model):
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    with accelerator_of(sharded, wrapped, gradient_accumulation_steps=accumulation) as accelerator:
        model, optimizer, loader = prepared(accelerator, adapter, moment, before=before)
        assert isinstance(model, nn.parallel.DistributedDataParallel) != sharded
        ours = train(accelerator, model, optimizer, loader, forbid)
        values = trained(accelerator, model)
        file = None if wrapped else save(accelerator, model, folder)  # PEFT 0.21 finds no adapter in such a wrapper
        first = accelerator.is_main_process
    theirs, oracle = alone(adapter, accumulation=accumulation)
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=0)
    if first:
        assert_alike(values, {name: p.detach() for name, p in oracle.named_parameters() if p.requires_grad})
    if file is not None:
        assert_alike(file, peft.get_peft_model_state_dict(oracle))


def resumes(folder, sharded, adapter):
    """A run in one piece, and one that is stopped half-way and goes on in new objects, dropout included."""
    with accelerator_of(sharded) as accelerator:
        model, optimizer, loader = prepared(accelerator, adapter, "before the optimizer")
        torch.manual_seed(accelerator.process_index)
        batches = list(loader)
        train(accelerator, model, optimizer, batches[:HALF])
        accelerator.save_state(folder)
        straight = train(accelerator, model, optimizer, batches[HALF:])
        values = trained(accelerator, model)
    with accelerator_of(sharded) as accelerator:
        model, optimizer, loader = prepared(accelerator, adapter, "after prepare", seed=9)
        rest = list(accelerator.skip_first_batches(loader, HALF))  # draws a number; the run in one piece drew none here
        accelerator.load_state(folder)
        assert train(accelerator, model, optimizer, rest) == straight
        again = trained(accelerator, model)
    assert values.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in values.items())


def in_bf16(folder, sharded, adapter):
    """Against float64: what is trained, as one vector, is off by no more than twice what plain PEFT's is."""
    runs = []
    for moment in (None, "after prepare"):
        with accelerator_of(sharded, mixed_precision="bf16") as accelerator:
            model, optimizer, loader = prepared(accelerator, adapter, moment, torch.float32)
            losses = train(accelerator, model, optimizer, loader, forbid=moment is not None)
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            runs.append((losses, trained(accelerator, model)))
            first = accelerator.is_main_process
    (plain_losses, plain_values), (losses, values) = runs
    assert losses != plain_losses, "rounded alike at every place: not in bf16, or not ours"
    if first:
        oracle = dict(alone(adapter)[1].named_parameters())
        truth = as_vector(oracle[name] for name in values)
        ours, theirs = (torch.dist(as_vector(one.values()), truth) for one in (values, plain_values))
        assert ours <= 2 * theirs, (ours, theirs)


def as_vector(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def refuses_shared_factors(folder):
    """FSDP2 takes a shared factor from one group only: an error, never a wrong number."""
    with accelerator_of(True) as accelerator:
        model, optimizer, loader = prepared(accelerator, "our ShareLoRA", None)
        with pytest.raises(RuntimeError, match="DTensor"):
            train(accelerator, model, optimizer, loader, forbid=False)


def main(rank, folder):
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "ACCELERATE_USE_CPU": "true"}
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=RANKS)
    for number, (name, case) in enumerate(cases().items()):
        start = time.perf_counter()
        print(f"{name}: ", end="", flush=True)
        case(folder / str(number))
        gc.collect()  # models are in cycles: let none of them end in the middle of another's collectives
        dist.barrier()
        print(f"passed in {time.perf_counter() - start:.1f} s", flush=True)
    dist.destroy_process_group()


def cases():
    first, second, third = MOMENTS
    ddp, fsdp = partial(equals_plain_peft, sharded=False), partial(equals_plain_peft, sharded=True)
    return {
        "DDP, LoRA": partial(ddp, adapter="LoRA", moment=first),
        "DDP, LoRA, accumulation, checkpointed": partial(
            ddp, adapter="LoRA", moment=second, accumulation=2, reentrant=False
        ),
        "DDP, GLoRA lora, reentrant": partial(ddp, adapter="GLoRA lora", moment=third, reentrant=True),
        "DDP, GLoRA vector, accumulation": partial(ddp, adapter="GLoRA vector", moment=first, accumulation=2),
        "DDP, LoRA, resumed": partial(resumes, sharded=False, adapter="LoRA with dropout"),
        "DDP, LoRA, bf16": partial(in_bf16, sharded=False, adapter="LoRA"),
        "DDP, GLoRA, bf16": partial(in_bf16, sharded=False, adapter="GLoRA lora"),
        "FSDP, LoRA": partial(fsdp, adapter="LoRA", moment=third),
        "FSDP, LoRA, accumulation, checkpointed": partial(
            fsdp, adapter="LoRA", moment=second, accumulation=2, reentrant=False
        ),
        "FSDP, GLoRA lora, reentrant": partial(fsdp, adapter="GLoRA lora", moment=first, reentrant=True),
        "FSDP, GLoRA vector, accumulation, wrapped": partial(
            fsdp, adapter="GLoRA vector", moment=third, accumulation=2, wrapped=True
        ),
        "FSDP, LoRA, resumed": partial(resumes, sharded=True, adapter="LoRA with dropout"),
        "FSDP, LoRA, bf16": partial(in_bf16, sharded=True, adapter="LoRA"),
        "FSDP, GLoRA, bf16": partial(in_bf16, sharded=True, adapter="GLoRA lora"),
        "DDP, our GLoRA": partial(ddp, adapter="our GLoRA", moment=None, accumulation=2, reentrant=True, forbid=False),
        "DDP, our ShareLoRA": partial(ddp, adapter="our ShareLoRA", moment=None, forbid=False),
        "FSDP, our GLoRA": partial(fsdp, adapter="our GLoRA", moment=None, forbid=False),
        "FSDP, our ShareLoRA": refuses_shared_factors,
    }


if __name__ == "__main__":
    with contextlib.redirect_stderr(sys.stdout):
        main(int(sys.argv[1]), Path(sys.argv[2]))
