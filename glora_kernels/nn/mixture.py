"""An experts module of transformers: what makes one, and its computation by groups of rows.

    y[t] = Σ over the experts e of token t:  w[t,e] · down_e( gate( up_e(x[t]) ) )

`transformers.integrations.moe.use_experts_implementation` gives such a module its interface: one parameter (E, N, K)
for each of its two products (E, K, N where it `is_transposed`), its biases beside them, and what is between the
products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from glora_kernels.dispatch.common import given
from glora_kernels.experts.groups import Groups
from glora_kernels.nn.ranks import is_part

INTERFACE = ("is_transposed", "has_gate", "has_bias", "_apply_gate", "_is_expert_parallel")
"""What transformers' `use_experts_implementation` gives a module."""
DOWN = "down_proj"
LAYOUT = "experts of another layout than that of transformers' experts interface"
PARALLEL = "experts spread over processes"

Product = Callable[[str, Tensor, Groups, bool], Tensor]
"""(name of the parameter, x, groups, whether x is that of the tokens) → the sorted rows of y."""


def up_of(experts: Any) -> str:
    """The name of the first product's parameter."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def bias_of(name: str) -> str:
    """The name of a product's bias."""
    return f"{name}_bias"


def has_interface(module: Any) -> bool:
    """Whether a module is an experts module of transformers."""
    return all(hasattr(module, name) for name in INTERFACE)


def products(module: nn.Module) -> tuple[str, ...]:
    """The products of an experts module whose weights are parameters of its own; of any other module none."""
    if not has_interface(module):
        return ()
    own = ((name, module._parameters.get(name)) for name in (up_of(module), DOWN))
    return tuple(name for name, weight in own if weight is not None and weight.ndim == 3)


def refusal(experts: Any) -> str | None:
    """The reason why the products of an experts module cannot be replaced by layers, or None."""
    kind = type(experts)
    if experts._is_expert_parallel or any(map(is_part, experts.parameters())):
        return f"{PARALLEL}; accepted are modules whose process has all experts"
    if "forward" in vars(experts) or not hasattr(kind.forward, "__wrapped__"):
        return "its forward is not that of transformers' experts interface, and would be lost"
    if is_parametrized(experts):
        return "it is parametrized; use torch.nn.utils.parametrize.remove_parametrizations first"
    counts = {len(weight) for name in products(experts) if (weight := experts._parameters[name]) is not None}
    if 1 in counts:
        return "it has one expert; accepted are two or more"
    return None


def compute(
    experts: Any, count: int, x: Tensor, index: Tensor, weights: Tensor, product: Product
) -> Tensor:  # fmt: skip
    """The output (T, K) of an experts module.

    Args:
        experts: the module, for what is between its products.
        count: E. A number outside of 0 … E-1 in `index` is no expert's.
        x: the tokens (T, K).
        index, weights: the experts of each token and their weights, (T, k).
        product: computes its two products.
    """
    groups = Groups.of(index, count)
    y = product(up_of(experts), x, groups, True)
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = product(DOWN, y, groups, False)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    y = y * weights.reshape(-1)[given(groups.order), None]
    return groups.sum_back(y).to(x.dtype)
