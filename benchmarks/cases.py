"""The layers that are compared, over the same weights and with the same adapter values.

A `Problem` holds one shape, one configuration and the values: x, dy, W, b and the supports. From it come the
contestants, each a `Contestant` with one call signature: the frozen linear layer (the floor), ours, the
literal formula in eager PyTorch, and PEFT's layer. `check` compares one with float64 before it is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from glora_kernels import GLoRAConfig, GLoRALinear, reference
from glora_kernels.spec import SUPPORTS

STD = 0.02
"""The spread of every adapter value: nothing is zero, as it would be in a fresh adapter."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Shape:
    """One layer and its input: x (M, K), W (N, K), rank R, in one dtype on one device."""

    m: int = 1024
    k: int = 2048
    n: int = 2048
    r: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"M={self.m} K={self.k} N={self.n} R={self.r} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Problem:
    """The values of one case. `params` holds the supports by the names of the configuration."""

    shape: Shape
    config: GLoRAConfig
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    params: dict[str, Tensor]


@dataclass
class Contestant:
    """One thing that is measured: a name, what it computes, and the trainable tensors by our names."""

    case: str
    impl: str
    forward: Callable[[Tensor], Tensor]
    params: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.case if self.impl == "ours" or self.case == "frozen" else f"{self.case} ({self.impl})"


def case_config(case: str, rank: int) -> GLoRAConfig:
    """The configuration a case's name stands for: "lora" (alpha = 2R) or "glora:<A>,<B>,<C>,<D>,<E>"."""
    if case == "lora":
        return GLoRAConfig.lora(rank=rank, alpha=2 * rank)
    a, b, c, d, e = case.removeprefix("glora:").split(",")
    return GLoRAConfig(a, b, c, d, e, rank)


def config_case(config: GLoRAConfig) -> str:
    """The name of a configuration, as `case_config` takes it; "glora-matmul:…" for the product variant."""
    forms = [getattr(config, name) for name in SUPPORTS]
    if forms == ["none", "lora", "none", "none", "none"]:
        return "lora"
    return ("glora:" if config.variant == "hadamard" else "glora-matmul:") + ",".join(forms)


def dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, value in DTYPES.items() if value == dtype), str(dtype).removeprefix("torch."))


def make_problem(shape: Shape, config: GLoRAConfig, bias: bool = True, seed: int = 0) -> Problem:
    """Random values: x and dy ~ N(0,1), W ~ N(0,1/K), b and every support ~ N(0, 0.02²)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator).mul_(std).to(shape.device, shape.dtype)

    x, dy = normal(shape.m, shape.k), normal(shape.m, shape.n)
    weight = normal(shape.n, shape.k, std=shape.k**-0.5)
    b = normal(shape.n, std=STD) if bias else None
    shapes = config.parameter_shapes(shape.k, shape.n, bias)
    params = {name: normal(*size, std=STD) for name, size in shapes.items()}
    return Problem(shape, config, x.requires_grad_(), dy, weight, b, params)


def frozen(problem: Problem) -> Contestant:
    """The base alone: nn.Linear with weight and bias frozen. x requires a gradient, so 2 GEMMs."""
    return Contestant("frozen", "eager", _base(problem))


def ours(problem: Problem) -> Contestant:
    """`GLoRALinear` over the base, with the problem's adapter values."""
    layer = GLoRALinear.from_linear(_base(problem), problem.config)
    params = {name: getattr(layer, name) for name in problem.params}
    _copy(params, problem.params)
    return Contestant(config_case(problem.config), "ours", layer, params)


def eager(problem: Problem) -> Contestant:
    """The literal formula: W_eff and the bias built by eager PyTorch, gradients by autograd."""
    params = {name: value.clone().requires_grad_() for name, value in problem.params.items()}

    def forward(x: Tensor) -> Tensor:
        return reference.glora_linear(x, problem.weight, problem.bias, params, problem.config)

    return Contestant(config_case(problem.config), "eager", forward, params)


def peft(problem: Problem) -> Contestant:
    """PEFT's own layer for the configuration, taken out of a model that `get_peft_model` wrapped.

    Raises:
        ValueError: a configuration PEFT has no layer for (it ties the forms of A and B, and of D and E).
        ImportError: peft, or its GLoRA, is not installed.
    """
    library = importlib.import_module("peft")
    config, case = problem.config, config_case(problem.config)
    if case == "lora":
        adapter = library.LoraConfig(
            r=config.rank, lora_alpha=config.scale * config.rank, lora_dropout=0.0, target_modules=["linear"]
        )
    elif config.A != config.B or config.D != config.E or config.variant != "hadamard":
        raise ValueError(f"PEFT ties A to B and D to E, and has no product variant: no layer for {case}")
    else:
        if not hasattr(library, "GloraConfig"):
            raise ImportError(f"peft {library.__version__} has no GLoRA")
        adapter = library.GloraConfig(
            r=config.rank,
            config_A_B=config.A,
            config_C=config.C,
            config_D_E=config.D,
            target_modules=["linear"],
        )
    model = library.get_peft_model(_Wrapper(_base(problem)), adapter, autocast_adapter_dtype=False)
    layer = model.base_model.model.linear
    params = _peft_parameters(layer, config)
    _copy(params, problem.params)
    return Contestant(case, "peft", layer, params)


def unavailable() -> dict[str, str]:
    """The peers that cannot be measured here, with the reason; empty where all can."""
    try:
        library = importlib.import_module("peft")
    except ImportError as error:
        return {"peft": str(error)}
    if not hasattr(library, "GloraConfig"):
        return {"peft": f"peft {library.__version__} has no GLoRA"}
    return {}


def step(contestant: Contestant, x: Tensor, dy: Tensor) -> Tensor:
    """One forward and backward, with gradients that start from None; the output."""
    x.grad = None
    for parameter in contestant.params.values():
        parameter.grad = None
    y = contestant.forward(x)
    y.backward(dy)
    return y


def check(contestant: Contestant, problem: Problem) -> float:
    """Compare y, dx and every adapter gradient with float64; the largest relative error.

    An error is max|value - truth| / max|truth|. It may be twice that of the literal formula at the same
    dtype, plus one unit in the last place.

    Raises:
        AssertionError: something is worse than that; the message says what and by how much.
    """
    truth = _results(eager(_double(problem)), _double(problem))
    allowed = _results(eager(problem), problem)
    worst = 0.0
    for name, value in _results(contestant, problem).items():
        error, literal = _error(value, truth[name]), _error(allowed[name], truth[name])
        limit = 2.0 * literal + torch.finfo(problem.shape.dtype).eps
        if not error <= limit:
            raise AssertionError(
                f"{contestant.name}, {problem.shape}: error of {name} is {error:.3g}, more than {limit:.3g} "
                f"(the literal formula in the same dtype has {literal:.3g})"
            )
        worst = max(worst, error)
    return worst


class _Wrapper(nn.Module):
    """The smallest model with a module for PEFT to find."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _base(problem: Problem) -> nn.Linear:
    """A frozen nn.Linear that shares the problem's weight and bias."""
    n, k = problem.weight.shape
    linear = nn.Linear(k, n, bias=problem.bias is not None, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        linear.bias = nn.Parameter(problem.bias, requires_grad=False)
    return linear


def _peft_parameters(layer: nn.Module, config: GLoRAConfig) -> dict[str, Tensor]:
    """PEFT's parameters by our names."""
    if config_case(config) == "lora":
        down, up = layer.get_submodule("lora_A.default"), layer.get_submodule("lora_B.default")
        return {"B_down": down.get_parameter("weight"), "B_up": up.get_parameter("weight")}
    params: dict[str, Tensor] = {}
    for name in SUPPORTS:
        path, form = layer.get_submodule(f"glora_{name}.default"), getattr(config, name)
        if form == "lora":
            params |= {f"{name}_up": path.get_parameter("Xd"), f"{name}_down": path.get_parameter("Xu")}
        elif form != "none":
            params[name] = path.get_parameter("X")
    return params


@torch.no_grad()
def _copy(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    if set(params) != set(values):
        raise AssertionError(f"parameters {sorted(params)} cannot take the values of {sorted(values)}")
    for name, parameter in params.items():
        parameter.copy_(values[name].reshape(parameter.shape))


def _double(problem: Problem) -> Problem:
    wide = {name: value.double() for name, value in problem.params.items()}
    bias = None if problem.bias is None else problem.bias.double()
    x = problem.x.detach().double().requires_grad_()
    return Problem(problem.shape, problem.config, x, problem.dy.double(), problem.weight.double(), bias, wide)


def _results(contestant: Contestant, problem: Problem) -> dict[str, Tensor]:
    y = step(contestant, problem.x, problem.dy)
    results = {"y": y.detach(), "dx": problem.x.grad}
    results |= {f"d{name}": parameter.grad for name, parameter in contestant.params.items()}
    missing = [name for name, value in results.items() if value is None]
    if missing:
        raise AssertionError(f"{contestant.name}: no {', '.join(missing)}")
    return {name: value for name, value in results.items() if value is not None}


def _error(value: Tensor, truth: Tensor) -> float:
    difference = value.detach().double().reshape(truth.shape) - truth
    return float(difference.abs().max() / truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
