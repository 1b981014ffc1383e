"""The tensor-parallel plan of a transformers model as a plan for `parallelize_module`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from glora_kernels.parallel.styles import GLoRAColwise, GLoRARowwise


def plan(model: nn.Module, mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    """A transformers model's own `tp_plan`, with styles that take GLoRA layers too.

        mesh = init_device_mesh("cuda", (dp, tp), mesh_dim_names=("dp", "tp"))
        model = gk.inject(LlamaForCausalLM(config), gk.GLoRAConfig(...))
        parallelize_module(model, mesh["tp"], gk.parallel.plan(model, mesh["tp"]))

    Where input embedding and head are tied, both are left whole: cutting would untie them.

    Args:
        model: the model, with or without GLoRA layers, not cut yet.
        mesh: the ranks to cut it over.

    Raises:
        ValueError: the model has no plan, or one with a style that has no counterpart here, or its heads cannot be
            divided over the mesh.
    """
    found: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not found:
        raise ValueError(
            f"plan: {type(model).__name__} has no tp_plan; write a plan with GLoRAColwise and GLoRARowwise"
        )
    config: Any = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % mesh.size():
            raise ValueError(
                f"plan: the model's {heads} {name} cannot be divided over the {mesh.size()} ranks of the mesh; choose "
                "a number of tensor-parallel ranks that divides the heads"
            )
    tied = bool(getattr(config, "tie_word_embeddings", False))
    plan: dict[str, ParallelStyle] = {}
    for path, name in found.items():
        if tied and ("lm_head" in path or name.startswith("embedding")):
            continue
        if name not in _STYLES:
            raise ValueError(
                f"plan: the model's plan has {name!r} for {path!r}, and plans here know {', '.join(sorted(_STYLES))}. "
                "Load the model with transformers' tensor parallelism (DistributedConfig) and inject after it"
            )
        plan[path] = _STYLES[name]()
    return plan


_STYLES: Mapping[str, Any] = {
    "colwise": GLoRAColwise,
    "colwise_rep": lambda: GLoRAColwise(output_layouts=Replicate()),
    "colwise_gather_output": lambda: GLoRAColwise(output_layouts=Replicate()),
    "rowwise": GLoRARowwise,
    "rowwise_rep": lambda: GLoRARowwise(input_layouts=Replicate()),
    "rowwise_split_input": lambda: GLoRARowwise(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}
