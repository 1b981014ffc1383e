"""What the cases of tensor parallelism share: layers and models, their twins in one piece, and how two are compared.

The oracle is the same module in one piece on the whole batch, in float64, from which sums over ranks in another order
differ by rounding only: 1e-12 in tensors of the size of one.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F

import glora_kernels as gk
from glora_kernels.nn.ranks import whole

EXACT = 1e-12
STYLES = {"column": gk.parallel.GLoRAColwise, "row": gk.parallel.GLoRARowwise}
LORA = gk.GLoRAConfig.lora(rank=4, alpha=8, dropout=0.25)
MODELS = {
    "LoRA, dropout": LORA,
    "A vector": gk.GLoRAConfig("vector", "lora", rank=4),
    "A lora, C, D, E": gk.GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=4),
    "constants": gk.GLoRAConfig("constant", "vector", "vector", "constant", "constant", rank=4),
    "ShareLoRA": gk.ShareLoRAConfig(rank=4, share="A", dropout=0.25),
    "ShareLoRA AB": gk.ShareLoRAConfig(rank=4, share="AB"),
}


def filled(module, seed=1):
    """The module, its trained parameters random; equal on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
                parameter.copy_(drawn.to(parameter.dtype))
    return module


def layer(config, n=16, k=24, bias=True, dtype=torch.float64):
    """A layer whose base bias is trained too."""
    torch.manual_seed(1)
    made = gk.GLoRALinear(k, n, config, bias=bias, dtype=dtype)
    if bias:
        made.bias.requires_grad_(True)
    return filled(made)


def cut(module, mesh, direction):
    return parallelize_module(module, mesh, STYLES[direction]())


def piece(tensor, mesh):
    """This rank's part of x of a row layer, or of y of a column layer."""
    return tensor.chunk(mesh.size(), -1)[mesh.get_local_rank()]


def llama(hidden=32, dtype=torch.float64, **options):
    """Two blocks with biases in the attention and grouped queries; the same values at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, max_position_embeddings=16, tie_word_embeddings=False,
        attn_implementation="eager", attention_bias=True, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def loaded_in_parts(folder, mesh):
    """`llama()` as transformers loads it in parts (`DistributedConfig`); the first rank saves it."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    path = folder / "llama"
    if mesh.get_local_rank() == 0 and not path.exists():
        llama().save_pretrained(path)
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(
        path, distributed_config=DistributedConfig(tp_plan="auto", tp_size=mesh.size()), dtype=torch.float64,
        attn_implementation="eager",
    )  # fmt: skip


def injected(config, **options):
    return filled(gk.inject(llama(**options), config))


def quantized(double_quant=False):
    """A model over NF4 codes, its parameters in float64."""
    model = llama(hidden=128, dtype=torch.float32)
    gk.quantize(model, "nf4", double_quant=double_quant)
    config = gk.GLoRAConfig("vector", "lora", "vector", "none", "vector", rank=4)
    return filled(gk.inject(model, config, adapter_dtype=torch.float64)).double()


def planned(model, mesh):
    return parallelize_module(model, mesh, gk.parallel.plan(model, mesh))


def sharded(model, mesh):
    """FSDP2 over tensor parallelism, or the latter alone on a mesh without a data-parallel dimension."""
    planned(model, mesh["tp"])
    return gk.fully_shard(model, mesh=mesh["dp"]) if "dp" in mesh.mesh_dim_names else model


def backward(model, step, mesh=None):
    """The loss on the rank's part of a batch; transformers' own would be computed in fp32."""
    tokens = torch.randint(40, (4, 7), generator=torch.Generator().manual_seed(step))
    if mesh is not None and "dp" in mesh.mesh_dim_names:
        tokens = tokens.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]
    logits = model(input_ids=tokens).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def adamw(model):
    return torch.optim.AdamW(gk.parameter_groups(model), lr=1e-2, eps=1e-3)


def train(model, steps, mesh=None, optimizer=None, max_norm=0.5):
    """Losses, averaged over data-parallel ranks. Each step has its own seed, as both runs draw dropout from it."""
    optimizer = optimizer or adamw(model)
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        loss = backward(model, step, mesh)
        if max_norm is not None:
            gk.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        if mesh is not None and "dp" in mesh.mesh_dim_names:
            dist.all_reduce(loss, group=mesh["dp"].get_group())
            loss /= mesh["dp"].size()
        losses.append(loss.item())
    return losses


def gradients(module):
    return {name: whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}


def values(module):
    """Without codes, which FSDP2 makes parameters."""
    return {name: whole(p.detach()) for name, p in module.named_parameters() if p.is_floating_point()}


def alike(ours, theirs, tolerance=EXACT):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, mine in ours.items():
        torch.testing.assert_close(mine, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def raises(kind, text, act):
    with pytest.raises(kind, match=re.escape(text)):
        act()
