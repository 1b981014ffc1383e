"""What users write, as a type checker sees it; a line that is wrong ends in the code of its error."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import glora_kernels as gk


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def predict(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


class Pipeline:
    """As diffusers' pipelines have it."""

    @property
    def components(self) -> dict[str, Any]:
        return {"net": Net(), "scheduler": None}


# The user's own class comes back.
net = gk.inject(Net(), gk.GLoRAConfig(rank=2))
assert_type(net, Net)
y: Tensor = net.predict(torch.ones(1, 8))
assert_type(gk.inject(net, {"*": gk.GLoRAConfig(), "head": None}, train=["head"]), Net)
assert_type(gk.inject(net, gk.ShareLoRAConfig(share="AB")), Net)
assert_type(gk.inject(net, gk.GLoRAConfig(), "all-linear", exclude_modules=["q"], adapter_dtype=torch.float32), Net)
assert_type(gk.quantize(net, "nf4", double_quant=True), Net)
assert_type(gk.load_adapter(net, "adapter.safetensors"), Net)
assert_type(gk.accelerate(net), Net)
assert_type(gk.decelerate(net), Net)
assert_type(gk.accelerate(Pipeline()), Pipeline)
assert_type(gk.fully_shard(net), Net)
assert_type(gk.merge_and_unload(net), Net)

# A linear layer becomes ours.
assert_type(gk.inject(nn.Linear(8, 8), gk.GLoRAConfig()), gk.GLoRALinear)
assert_type(gk.load_adapter(nn.Linear(8, 8), "adapter.safetensors"), gk.GLoRALinear)
packed = gk.quantize(nn.Linear(8, 8), "fp4")
assert_type(packed, gk.QuantizedLinear)
assert_type(gk.inject(packed, gk.GLoRAConfig()), gk.GLoRALinear)
assert_type(gk.merge_and_unload(gk.GLoRALinear(8, 8, gk.GLoRAConfig())), nn.Module)

# Configurations made of what programs compute.
form: Literal["lora", "vector"] = "vector"
gk.GLoRAConfig(A=form, B="lora", C="none", D="constant", E="vector", variant="hadamard", init="kaiming")
gk.ShareLoRAConfig(A="constant", C="lora", share="none", projections=("q_proj",))
gk.GLoRAConfig.from_dict({"A": "vector"})
for config in [gk.GLoRAConfig(), gk.GLoRAConfig.lora(rank=4)]:
    gk.inject(Net(), config)
with gk.backend("triton"), gk.backend("auto"):
    pass
gk.SearchSpace(A=("none", "lora"), C=("vector",), D=("constant", "none"), ranks=(4,), init="kaiming")
assert_type(gk.SearchSpace.paper(rank=8), gk.SearchSpace)

# Mistakes are found.
gk.GLoRAConfig(A="vec")  # E: arg-type
gk.GLoRAConfig(B="LORA")  # E: arg-type
gk.GLoRAConfig(C="constant")  # E: arg-type
gk.GLoRAConfig(D="lora")  # E: arg-type
gk.GLoRAConfig(E="lora")  # E: arg-type
gk.GLoRAConfig(variant="product")  # E: arg-type
gk.GLoRAConfig(init="zeros")  # E: arg-type
gk.GLoRAConfig(rank="8")  # E: arg-type
gk.ShareLoRAConfig(share="C")  # E: arg-type
gk.ShareLoRAConfig(C="constant")  # E: arg-type
gk.backend("tritn")  # E: arg-type
gk.SearchSpace(A="lora")  # E: arg-type
gk.SearchSpace(C=("constant",))  # E: arg-type
gk.SearchSpace(ranks=4)  # E: arg-type
gk.quantize(Net(), "int4")  # E: call-overload
gk.inject(Net(), "lora")  # E: call-overload
gk.inject(Net(), {"*": "lora"})  # E: dict-item
gk.inject(Net(), gk.GLoRAConfig(), [3])  # E: list-item
gk.inject("model", gk.GLoRAConfig())  # E: call-overload
net.forecast(torch.ones(1, 8))  # E: operator
gk.accelerate(3)  # E: type-var
