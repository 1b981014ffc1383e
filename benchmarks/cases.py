"""The layers that are compared, over the same weights and with the same adapter values.

A `Problem` holds one shape, one configuration and the values: x, dy, W, b and the supports. From it come the
contestants, each a `Contestant` with one call signature: the frozen linear layer (the floor), ours, the
literal formula in eager PyTorch, and PEFT's layer; `benchmarks.peers` has the rest. `check` compares one with
float64 before it is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels import GLoRAConfig, GLoRALinear, reference
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.reference.tolerance import allowed_error, largest_error, literal_step
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
    """The values of one case. `params` holds the supports by the names of the configuration.

    base: the frozen layer itself where it is no nn.Linear on `weight` (a 4-bit one; `weight` is then decoded).
    """

    shape: Shape
    config: GLoRAConfig
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    params: dict[str, Tensor]
    base: nn.Module | None = None


@dataclass
class Contestant:
    """One thing that is measured: a name, what it computes, and the trainable tensors by our names.

    forward: x → y, or x → one y for each layer of a set.
    """

    case: str
    impl: str
    forward: Callable[[Tensor], Any]
    params: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.case if self.impl == "ours" or self.case == "frozen" else f"{self.case} ({self.impl})"


def case_config(case: str, rank: int, dropout: float = 0.0) -> GLoRAConfig:
    """The configuration a case's name stands for: "frozen", "lora" (alpha = 2R) or "glora:<A>,<B>,<C>,<D>,<E>"."""
    if case == "lora":
        return GLoRAConfig.lora(rank=rank, alpha=2 * rank, dropout=dropout)
    forms = ["none"] * 5 if case == "frozen" else case.removeprefix("glora:").split(",")
    return GLoRAConfig.of(forms, rank=rank, dropout=dropout)


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
    generator = torch.Generator(shape.device).manual_seed(seed)
    x, dy = random_inputs(shape, generator)
    weight = _normal(shape, generator, shape.n, shape.k, std=shape.k**-0.5)
    b = _normal(shape, generator, shape.n, std=STD) if bias else None
    sizes = config.parameter_shapes(shape.k, shape.n, bias)
    params = {name: _normal(shape, generator, *size, std=STD) for name, size in sizes.items()}
    return Problem(shape, config, x, dy, weight, b, params)


def random_inputs(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One x, which requires a gradient, and one dy, both N(0,1)."""
    x = _normal(shape, generator, shape.m, shape.k)
    return x.requires_grad_(), _normal(shape, generator, shape.m, shape.n)


def adapter_values(shape: Shape, config: GLoRAConfig, bias: bool, seed: int = 2) -> dict[str, Tensor]:
    """The supports of a configuration, N(0, 0.02²): the same values for the same shapes."""
    generator = torch.Generator(shape.device).manual_seed(seed)
    sizes = config.parameter_shapes(shape.k, shape.n, bias)
    return {name: _normal(shape, generator, *size, std=STD) for name, size in sizes.items()}


def _normal(shape: Shape, generator: torch.Generator, *size: int, std: float = 1.0) -> Tensor:
    return torch.randn(*size, generator=generator, device=shape.device).mul_(std).to(shape.dtype)


def frozen(problem: Problem) -> Contestant:
    """The base alone: nn.Linear with weight and bias frozen. x requires a gradient, so 2 GEMMs."""
    return Contestant("frozen", "eager", base_layer(problem))


def ours(problem: Problem) -> Contestant:
    """`GLoRALinear` over the base, with the problem's adapter values."""
    layer = GLoRALinear.from_linear(base_layer(problem), problem.config)
    params = {name: getattr(layer, name) for name in problem.params}
    copy_values(params, problem.params)
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
    adapter = peft_config(library, config, case, ["linear"])
    model = library.get_peft_model(_Wrapper(base_layer(problem)), adapter, autocast_adapter_dtype=False)
    layer = model.base_model.model.linear
    params = peft_parameters(layer, config)
    for parameter in params.values():  # over a 4-bit base PEFT leaves them in fp32
        parameter.data = parameter.data.to(problem.shape.dtype)
    copy_values(params, problem.params)
    return Contestant(case, "peft", layer, params)


def peft_config(library: Any, config: GLoRAConfig, case: str, modules: Sequence[str]) -> Any:
    """PEFT's configuration for these modules; raises as `peft` does."""
    if case == "lora":
        alpha = config.scale * config.rank
        return library.LoraConfig(
            r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=list(modules)
        )
    if config.A != config.B or config.D != config.E or config.variant != "hadamard":
        raise ValueError(f"PEFT ties A to B and D to E, and has no product variant: no layer for {case}")
    if not hasattr(library, "GloraConfig"):
        raise ImportError(f"peft {library.__version__} has no GLoRA")
    return library.GloraConfig(
        r=config.rank,
        config_A_B=config.A,
        config_C=config.C,
        config_D_E=config.D,
        target_modules=list(modules),
    )


def unavailable() -> dict[str, str]:
    """The peers that cannot be measured here, with the reason; empty where all can."""
    try:
        library = importlib.import_module("peft")
    except ImportError as error:
        return {"peft": str(error)}
    if not hasattr(library, "GloraConfig"):
        return {"peft": f"peft {library.__version__} has no GLoRA"}
    return {}


def step(contestant: Contestant, x: Tensor, dy: Tensor) -> Any:
    """One forward and backward, with gradients that start from None; the output."""
    x.grad = None
    for parameter in contestant.params.values():
        parameter.grad = None
    y = contestant.forward(x)
    y.backward(dy)
    return y


def gradients(contestant: Contestant, x: Tensor, dy: Any) -> tuple[Any, dict[str, Tensor]]:
    """y, and the gradients of x and of every trainable tensor ("x" and the names of `params`).

    `torch.autograd.grad` hands them over as they are: nothing is accumulated into `.grad`.
    """
    inputs = {"x": x, **contestant.params}
    y = contestant.forward(x)
    return y, dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))


Expected = dict[str, tuple[Tensor, float]]
"""By result ("y", "dx", "d<support>"): its float64 value, and the largest absolute error that is accepted."""


def expectations(problem: Problem, keep: Tensor | None = None) -> Expected:
    """The literal formula in float64, and by the project's one tolerance what may differ from it.

    Everything is compared, on the device it lives on: float64 products of the largest layer take a data-centre card a
    fraction of a second, and a sample of rows and columns would leave tiles unseen.

    Args:
        problem: the case.
        keep: the dropout mask, where the configuration has dropout.
    """
    values = (problem.x, problem.weight, problem.bias, problem.params, problem.config, problem.dy)
    exact = literal_step(*values, torch.float64, keep)
    plain = literal_step(*values, problem.shape.dtype, keep)
    dtype = problem.shape.dtype
    return {name: (value, allowed_error(value, plain[name], dtype)) for name, value in exact.items()}


def check(contestant: Contestant, problem: Problem, expected: Expected | None = None) -> float:
    """Compare y, dx and every adapter gradient with float64; the largest error over the largest value.

    What is accepted is the project's tolerance: twice the error of the literal formula at the same dtype, plus a
    small floor (`glora_kernels.reference.tolerance`).

    Args:
        contestant: what is about to be timed.
        problem: the case it was made from.
        expected: of `expectations`, where they are known already.

    Raises:
        AssertionError: something is worse than that; the message says what and by how much.
    """
    if expected is None:
        expected = expectations(problem)
    y, found = gradients(contestant, problem.x, problem.dy)
    results = {"y": y.detach()} | {f"d{name}": value for name, value in found.items()}
    return compare(f"{contestant.name}, {problem.shape}", results, expected)


def compare(what: str, results: Mapping[str, Tensor], expected: Expected) -> float:
    """The largest error of the results over the largest value of each; raises as `check`."""
    worst = 0.0
    for name, value in results.items():
        exact, limit = expected[name]
        error = largest_error(value.reshape(exact.shape), exact)
        size = max(float(exact.abs().max()), torch.finfo(torch.float64).tiny)
        if not error <= limit:
            raise AssertionError(
                f"{what}: {name} is off by {error / size:.3g} of its largest value, "
                f"more than {limit / size:.3g} (twice the literal formula in the same dtype and a floor)"
            )
        worst = max(worst, error / size)
    return worst


class _Wrapper(nn.Module):
    """The smallest model with a module for PEFT to find."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.is_loaded_in_4bit = is_linear4bit(linear)  # what transformers sets, and PEFT looks at

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def base_layer(problem: Problem) -> nn.Module:
    """The frozen layer: the problem's own, or an nn.Linear that shares its weight and bias."""
    if problem.base is not None:
        return problem.base
    n, k = problem.weight.shape
    linear = nn.Linear(k, n, bias=problem.bias is not None, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        linear.bias = nn.Parameter(problem.bias, requires_grad=False)
    return linear


def peft_parameters(layer: nn.Module, config: GLoRAConfig) -> dict[str, Tensor]:
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
def copy_values(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write the values into parameters of the same names."""
    if set(params) != set(values):
        raise AssertionError(f"parameters {sorted(params)} cannot take the values of {sorted(values)}")
    for name, parameter in params.items():
        parameter.copy_(values[name].reshape(parameter.shape))
