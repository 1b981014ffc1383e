"""Which kernels serve each layer of a model, and why: the report of `info --config`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.experts.groups import Groups
from glora_kernels.experts.products import of_expert
from glora_kernels.nn import QuantizedLinear, inject, mixture, trainable_parameters
from glora_kernels.nn.adapted import Frozen, Operands, adapted_linear
from glora_kernels.nn.convolutions.layer import GLoRAConv
from glora_kernels.nn.experts import ExpertLinear
from glora_kernels.nn.frozen import dtype_name
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import all_paths, named_layers
from glora_kernels.nn.names import numbered
from glora_kernels.nn.quantize import to_quantize
from glora_kernels.nn.targets import linears, put
from glora_kernels.quant.codes import QUANT_TYPES
from glora_kernels.runtime import environment, routes, tables
from glora_kernels.runtime.launch import Launch
from glora_kernels.spec import ShareLoRAConfig, depthless
from glora_kernels.tools import planned
from glora_kernels.tools.commands import models, text
from glora_kernels.tools.commands.layer import Plan, codes, plan, sharing
from glora_kernels.tools.commands.printing import Refused, Report, Table, wrapped
from glora_kernels.tools.elsewhere import Forms, on_card

WHY = {
    "left out": "linear: the head, or what --targets and --exclude leave out",
    "experts": "weights of experts; --experts adapts them",
    "other experts": "experts of a layout that has no adapters",
    "convolution": "a convolution; --targets may name it, if it is of one group",
    "not linear": "no linear layer: an embedding, a norm, a parameter of its own",
}
"""Why a module gets no adapter; all of them are frozen and computed by PyTorch."""


@dataclass(frozen=True)
class Group:
    """Adapted layers that are alike.

    Attributes:
        layers: their names, each once, with # for the numbers of their depth.
        number: how many there are.
        n, k: out_features and in_features; of a convolution, its channels.
        experts: E, 0 for other layers.
        kernel: the size of a convolution's, () for other layers.
        base, adapter: the dtypes of the two; "nf4" or "fp4" for a base in 4 bits.
        bias: whether the base has one.
        operator: the operator of `ops` that computes them; None where it is PyTorch's convolution.
        why: what serves them, and the reason.
        plans: of both passes, by their names; None where PyTorch serves them.
    """

    layers: tuple[str, ...]
    number: int
    n: int
    k: int
    experts: int
    kernel: tuple[int, ...]
    base: str
    adapter: str
    bias: bool
    operator: str | None
    why: str
    plans: dict[str, Plan] | None

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        plans = {name: None if self.plans is None else self.plans[name].facts() for name in ("forward", "backward")}
        return {name: value for name, value in vars(self).items() if name != "plans"} | plans

    def __str__(self) -> str:
        size = f"{self.experts} experts of " * (self.experts > 0) + f"N={self.n} "
        size += f"channels={self.k} kernel={_size(self.kernel)}" if self.kernel else f"K={self.k}"
        base = f"{self.base} base{' with a bias' * self.bias}, {self.adapter} adapter"
        served = f"ops.{self.operator}" if self.operator else "torch.convolution"
        lines = [f"{self.number} x {size}, {base}: {', '.join(self.layers)}", f"  {served}: {self.why}"]
        for name, of in (self.plans or {}).items():
            kernels = ", ".join(step.kernel for step in of.steps)
            lines.append(f"  {name + ':':9} {of.count()}, route {of.route} ({of.decided_by}): {kernels}")
        return "\n".join(wrapped(line, "      ") for line in lines) + "\n"


def report(args: argparse.Namespace) -> Report:
    """Make the model of --config, inject what the arguments ask for, and plan a call of each kind of layer.

    Raises:
        Refused: there is no such model, or it cannot be adapted so.
    """
    arch, config, dtype = args.arch or text.this_arch(), _config(args), tables.DTYPES[args.dtype]
    if arch != "cpu" and not environment.has_triton():
        raise Refused("--config plans Triton launches, and the triton package is not installed; --arch cpu needs none")
    model = models.build(args.config, dtype)
    names = Names(model)
    with text.noted() as notes, text.refusing("--config"):
        model = adapted(model, config, args, args.experts)
        groups, steps = _groups(model, names, arch, args)
    untouched, compilations, gpu = _untouched(model, names), _compilations(steps, arch), torch.cuda.is_available()
    reason = routes.explain("cuda" if gpu else "cpu", dtype)[1]
    here = f"Here, on a {'GPU' if gpu else 'machine where PyTorch sees no GPU'}: {reason}"
    facts = {
        "model": args.config, "config": config.to_dict(), "arch": arch, "tokens": args.tokens, "dtype": args.dtype,
        "four_bit": args.four_bit, "share": args.share, "trainable": trainable_parameters(model),
        "compilations": compilations, "groups": [group.facts() for group in groups], "untouched": untouched,
        "here": here, "notes": notes,
    }  # fmt: skip
    adapter = config.layer_config() if isinstance(config, ShareLoRAConfig) else config
    said: list[str | Table] = [
        f"{args.config} ({type(model).__name__}), {args.four_bit or args.dtype} base, {text.title(adapter)}"
        + f", share={args.share}" * (args.share is not None),
        f"{sum(group.number for group in groups)} adapted layers, {trainable_parameters(model):,} trained parameters, "
        f"in training on {arch} with {args.tokens} tokens\n",
        *map(str, groups),
    ]
    if compilations:
        said.append(f"A first step compiles {compilations} kernels, or gk.warmup before it.\n")
    if untouched:
        rows = [(u["number"], u["module"], u["shape"], u["why"], ", ".join(u["layers"])) for u in untouched]
        said += ["What stays as it is, in PyTorch:\n", Table(["", "module", "shape", "why", "names"], rows)]
        said += [f"{name}: {WHY[name]}" for name in dict.fromkeys(u["why"] for u in untouched)]
    return Report(facts, [*said, *notes, here])


class Names:
    """The names of a model's modules with # for the numbers of their depth."""

    def __init__(self, model: nn.Module) -> None:
        self._numbered = numbered(model)

    def __call__(self, paths: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(depthless(path, self._numbered) for path in paths))


def add_what(parser: argparse.ArgumentParser) -> None:
    """Add what says which layers of a model get an adapter, and whether the base is in 4 bits."""
    parser.add_argument(
        "--targets", nargs="+", metavar="PATTERN",
        help="of --config: adapt only these, as q_proj v_proj, convolutions too (default: linear layers but the head)",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="of --config: leave these layers as they are"
    )
    parser.add_argument("--dtype", choices=tables.DTYPES, default="bf16", help="of the layers and x (default: bf16)")
    parser.add_argument("--four-bit", choices=QUANT_TYPES, help="the base is held in 4 bits")


def adapted(model: nn.Module, config: Any, args: argparse.Namespace, experts: bool = False) -> nn.Module:
    """A model of `models.build` with the adapters that the arguments of `add_what` ask for, on the meta device.

    Raises:
        Refused: `experts` were asked for, and there are none.
        ValueError: the errors of `gk.inject`.
    """
    parameters = [linear.path for linear in linears(model) if linear.experts] if experts else []
    if experts and not parameters:
        raise Refused("--experts: the model has no experts that can be adapted")
    if args.four_bit:
        _quantize(model, args, parameters)
    return inject(model, config, args.targets, args.exclude, target_parameters=parameters)


def config_of(args: argparse.Namespace) -> Any:
    """The configuration of --case and --share."""
    if args.bias:
        raise Refused("--bias is of --layer: with --config the model says which layers have one")
    with text.refusing():
        config = text.case(args)
        return config if args.share is None else sharing(config, args.share)


def _config(args: argparse.Namespace) -> Any:
    if args.siblings:
        raise Refused("--siblings is of --layer; --config has the layers of a model")
    if args.backend != "auto" and args.four_bit is None:
        raise Refused(f"--backend {args.backend} chooses the kernels of a 4-bit weight: give --four-bit too")
    return config_of(args)


def _quantize(model: nn.Module, args: argparse.Namespace, parameters: Sequence[str]) -> None:
    """Put the layers that `gk.quantize` would take, and these experts, into 4 bits that have no values."""
    with ExitStack() as undo:
        for linear in to_quantize(model, None, args.exclude, parameters):
            n, k = linear.base.shape
            weight, bias = codes(max(linear.experts, 1) * n, k, linear.base.dtype, args.four_bit), linear.base.bias
            made = ExpertLinear(weight, bias, linear.experts) if linear.experts else QuantizedLinear(weight, bias)
            put(linear, made, undo)
        undo.pop_all()


def _groups(model: nn.Module, names: Names, arch: str, args: argparse.Namespace) -> tuple[list[Group], list[Any]]:
    """The groups of alike layers, and the steps of a call of each."""
    alike: dict[object, list[str]] = {}
    for path, layer in named_layers(model).items():
        alike.setdefault(key(path, layer), []).append(path)
    steps: list[Any] = []
    return [_group(names(paths), len(paths), paths[0], model, arch, args, steps) for paths in alike.values()], steps


def _compilations(steps: Sequence[Any], arch: str) -> int | None:
    """How many kernels the JIT compiles for these steps; None where it cannot tell, in Triton's interpreter."""
    launches = [step for step in steps if isinstance(step, Launch)]
    if not launches or environment.interpreting():
        return None if launches else 0
    with on_card(arch):
        forms = Forms()
        for launch in launches:
            forms.ask(launch)
    return len(forms.found)


def key(path: str, layer: GLoRALinear) -> object:
    """Equal for layers with the same kernels and launches."""
    up = layer.experts and not path.endswith(mixture.DOWN)
    return type(layer), layer.experts, up, layer.base_dtype, layer._transposed, _adapter_dtype(layer), str(layer)


def _adapter_dtype(layer: GLoRALinear) -> torch.dtype:
    return next((parameter.dtype for parameter in layer.adapter().values()), layer.base_dtype)


def _group(
    names: tuple[str, ...], number: int, path: str, model: nn.Module, arch: str, args: argparse.Namespace,
    steps: list[Any],
) -> Group:  # fmt: skip
    """The group of `number` layers like the one at a path; `steps` gets those of its call."""
    layer = model.get_submodule(path)
    assert isinstance(layer, GLoRALinear)
    dtype, each = tables.DTYPES[args.dtype], _each(model, path) if layer.experts else 1
    plans: dict[str, Plan] | None = None
    operator: str | None = "expert_glora_linear" if layer.experts else "glora_linear"
    if isinstance(layer, GLoRAConv) and not layer.geometry.is_pointwise:
        operator, why = None, "the vendor's, with thin ones of the adapter beside it, in PyTorch"
    elif arch == "cpu":
        why = routes.explain(arch, dtype)[1]
    else:
        traced = planned.of_module(*_call(layer, path, args.tokens, each, dtype), arch, args.backend)
        steps += traced.steps
        plans, why = plan(traced), f"Triton kernels on {arch}, {args.tokens} tokens"
        if isinstance(layer, GLoRAConv):
            why += ", where x has its channels last in memory; else the vendor's convolution and thin ones"
        elif layer.experts:
            why += f" with {each} experts each"
        if layer.experts and _is_apart(layer):
            why += "; A is lora, so each expert is a call of ops.glora_linear: the passes of one with its share of rows"
            why += ", without the dropped B, which PyTorch adds" * (layer.config.dropout > 0)
    base = args.four_bit if layer.quant_state is not None else dtype_name(layer.base_dtype)
    return Group(
        names, number, layer.out_features, layer.in_features, layer.experts,
        layer.kernel, base,
        dtype_name(_adapter_dtype(layer)), layer.base_bias is not None, operator, why, plans,
    )  # fmt: skip


def _call(layer: GLoRALinear, path: str, tokens: int, each: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """What to call for a plan, and its input: a linear layer, or a product of experts with the rows of their tokens."""

    def x(rows: int) -> Tensor:
        return torch.empty(rows, layer.in_features, dtype=dtype, device="meta").requires_grad_()

    if isinstance(layer, GLoRAConv):
        return layer, x(tokens).view(tokens, -1, *(1 for _ in layer.kernel))
    if not layer.experts:
        return layer, x(tokens)
    if _is_apart(layer):
        bias = None if layer.bias is None else layer.bias[0]
        base = Frozen(of_expert(layer.base_weight(), 0, layer.experts), bias, layer.compute_dtype)
        own = {name: parameter[0] for name, parameter in layer.adapter().items()}
        if layer.config.dropout:
            own = {name: tensor for name, tensor in own.items() if name not in ("B_up", "B_down")}
        adapter = Operands.of(layer.config, own, training=False)
        return (lambda x: adapted_linear(x, base, adapter)), x(max(1, tokens * each // layer.experts))
    starts = torch.empty(layer.experts + 2, dtype=torch.int32, device="meta")
    if path.endswith(mixture.DOWN):
        return (lambda x: layer(x, Groups(starts, None), False)), x(tokens * each)
    order = torch.empty(tokens * each, dtype=torch.int64, device="meta")
    return (lambda x: layer(x, Groups(starts, order, each), True)), x(tokens)


def _is_apart(layer: GLoRALinear) -> bool:
    """Whether `ops.expert_glora_linear` computes each expert by itself, with `ops.glora_linear`."""
    config = layer.config
    return config.A == "lora" and (config.variant == "hadamard" or config.dropout > 0)


def _each(model: nn.Module, path: str) -> int:
    """How many experts a token has, by the configuration of the experts module; 1 where it does not say."""
    owner = model.get_submodule(path.rpartition(".")[0])
    return int(getattr(getattr(owner, "config", None), "num_experts_per_tok", None) or 1)


def _untouched(model: nn.Module, names: Names) -> list[dict[str, Any]]:
    """The modules with parameters that got no adapter, alike ones together."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    owners: set[nn.Module] = set()
    for linear in linears(model):
        owners.add(linear.owner)
        size = f"{linear.experts} x " * (linear.experts > 0) + _size(linear.base.shape)
        why = "experts" if linear.experts else "left out"
        if linear.is_convolution:
            why, size = "convolution", _size(linear.base.weight.shape)
        alike.setdefault((type(linear.owner).__name__, size, why), []).append(linear.path)
    for path, module in all_paths(model):
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if own and module not in owners and not isinstance(module, GLoRALinear):
            alike.setdefault((type(module).__name__, _size(own[0].shape), _why(module, own)), []).append(path)
    return [
        {"layers": names(paths), "number": len(paths), "module": kind, "shape": shape, "why": why}
        for (kind, shape, why), paths in alike.items()
    ]


def _why(module: nn.Module, own: Sequence[Tensor]) -> str:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    several = any(parameter.ndim == 3 and len(parameter) > 1 for parameter in own)
    return "other experts" if several and "expert" in type(module).__name__.lower() else "not linear"


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
