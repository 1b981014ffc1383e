"""Every contestant from its entry and its problem: ours, eager PyTorch, torch.compile, and the peers.

On a 4-bit base everybody decodes one weight to the same numbers: bitsandbytes, PEFT and Unsloth get a `Linear4bit` on
the memory of ours. There "bnb" is bitsandbytes' own choice of a product (its `gemm_4bit` for few tokens, dequantize +
cuBLAS for many) with LoRA as two thin products beside it, "eager" is dequantize + cuBLAS at any size, and in "compile"
decoding too is left to torch.compile. A peer that is not installed, or has no layer for a case, raises `Unavailable`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import HIRA, LORA
from benchmarks.problems import Contestant, Problem, base_layer, copy_values
from glora_kernels import GLoRAConfig, GLoRALinear, QuantizedLinear, reference
from glora_kernels.grouped import op as grouped
from glora_kernels.quant import QuantizedWeight
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.quant.codes import codebook
from glora_kernels.reference.cases import case_of
from glora_kernels.spec import SUPPORTS

PACKAGES = {"peft": "peft", "bnb": "bitsandbytes", "unsloth": "unsloth", "lorafusion": "lorafusion"}


class Unavailable(Exception):
    """A contestant that cannot be built here; the message is the reason."""


def unavailable() -> dict[str, str]:
    """The peers that are not installed, with the reason. Nothing is imported: some patch others on import."""
    return {i: f"{name} is not installed" for i, name in PACKAGES.items() if not importlib.util.find_spec(name)}


def build(problem: Problem) -> Contestant:
    """The contestant of a problem's entry, with its values.

    Raises:
        Unavailable: it cannot be built here.
    """
    entry = problem.entry
    if entry.impl in PACKAGES and not importlib.util.find_spec(PACKAGES[entry.impl]):
        raise Unavailable(f"{PACKAGES[entry.impl]} is not installed")
    try:
        return (SETS if entry.widths else LAYERS)[entry.impl](problem)
    except (ImportError, AttributeError, NotImplementedError) as reason:
        raise Unavailable(f"{type(reason).__name__}: {reason}") from reason


def lora(base: Callable[[Tensor], Tensor], config: GLoRAConfig, x: Tensor, params: dict[str, Tensor]) -> Tensor:
    """LoRA as everybody writes it: any base, and the two thin products beside it."""
    dropped = F.dropout(x, config.dropout) if config.dropout else x
    return base(x) + config.scale * F.linear(F.linear(dropped, params["B_down"]), params["B_up"])


def formula(config: GLoRAConfig, x: Tensor, weight: Tensor, bias: Tensor | None, params: dict[str, Tensor]) -> Tensor:
    """The layer in eager PyTorch: LoRA beside the base, all else by the literal formula."""
    if case_of(config) == LORA:
        return lora(lambda x: F.linear(x, weight, bias), config, x, params)
    return reference.glora_linear(x, weight, bias, params, config)


def trainable(problem: Problem, function: Callable[[Tensor, dict[str, Tensor]], Any]) -> Contestant:
    """A function of x and of trainable copies of the problem's supports."""
    params = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    return Contestant(lambda x: function(x, params), params)


def ours(problem: Problem) -> Contestant:
    """`GLoRALinear` over the base, with the problem's adapter values."""
    layer = GLoRALinear.from_linear(base_layer(problem), problem.config)
    params = {name: getattr(layer, name) for name in problem.params}
    copy_values(params, problem.params)
    return Contestant(layer, params)


def eager(problem: Problem) -> Contestant:
    """The literal formula: W_eff and the bias built by eager PyTorch, gradients by autograd."""
    given = (problem.weight, problem.bias)
    return trainable(problem, lambda x, params: reference.glora_linear(x, *given, params, problem.config))


def _eager(problem: Problem) -> Contestant:
    if problem.entry.frozen:
        return Contestant(base_layer(problem))
    if problem.config.dropout and problem.entry.adapter != LORA:
        raise Unavailable("the literal formula is timed without dropout")
    if problem.base is None:
        return trainable(problem, lambda x, ps: formula(problem.config, x, problem.weight, problem.bias, ps))
    layer = linear4bit(problem)
    dequantize = importlib.import_module("bitsandbytes").functional.dequantize_4bit

    def forward(x: Tensor, params: dict[str, Tensor]) -> Tensor:
        weight = dequantize(layer.weight.data, layer.weight.quant_state).to(problem.weight.dtype)
        return formula(problem.config, x, weight, problem.bias, params)

    return trainable(problem, forward)


def _compiled(problem: Problem) -> Contestant:
    function = compiled(problem.config, problem.base is not None)
    given: Any = problem.weight
    if problem.base is not None:
        assert isinstance(problem.base, QuantizedLinear)
        weight = problem.base.base_weight()
        assert isinstance(weight, QuantizedWeight)
        given = codec_tensors(weight, problem.weight.dtype)
    return trainable(problem, lambda x, params: function(x, given, problem.bias, params))


@functools.lru_cache(maxsize=64)
def compiled(config: GLoRAConfig, quantized: bool) -> Callable[..., Tensor]:
    """One compiled function a configuration: layers of one shape share its code."""

    def step(x: Tensor, given: Any, bias: Tensor | None, params: dict[str, Tensor]) -> Tensor:
        return formula(config, x, decoded(*given) if quantized else given, bias, params)

    return torch.compile(step, fullgraph=True, dynamic=False)


def decoded(packed: Tensor, absmax: Tensor, code: Tensor, nested: tuple[Tensor, ...], form: tuple[Any, ...]) -> Tensor:
    """The weight as one expression, for torch.compile to fuse: `codec_tensors` has the arguments."""
    shape, blocksize, nested_blocksize, dtype = form
    if nested:
        inner, inner_code, offset = nested
        scales = inner.repeat_interleave(nested_blocksize)[: len(absmax)]
        absmax = inner_code[absmax.int()] * scales + offset
    nibbles = torch.stack((packed >> 4, packed & 15), -1).view(-1, blocksize)
    return (code[nibbles.int()] * absmax[:, None]).to(dtype).view(shape)


def codec_tensors(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of `decoded`."""
    state, nested = weight.state, weight.state.nested
    code = codebook(state.quant_type, weight.device)
    inner = () if nested is None else (nested.absmax, nested.code, nested.offset)
    form = (tuple(state.shape), state.blocksize, 0 if nested is None else nested.blocksize, dtype)
    return weight.packed.detach().view(-1), state.absmax, code, inner, form


def linear4bit(problem: Problem) -> Any:
    """The base as bitsandbytes' layer, on the same memory.

    Raises:
        Unavailable: bitsandbytes is not installed or cannot run here.
    """
    assert isinstance(problem.base, QuantizedLinear)
    try:
        return problem.base.to_linear4bit()
    except (ImportError, RuntimeError) as reason:
        raise Unavailable(f"bitsandbytes: {reason}") from reason


def _bitsandbytes(problem: Problem) -> Contestant:
    if problem.base is None:
        raise Unavailable("bitsandbytes has layers on a 4-bit base only")
    layer = linear4bit(problem)
    if problem.entry.frozen:
        return Contestant(layer)
    if problem.entry.adapter != LORA:
        raise Unavailable("bitsandbytes has the 4-bit base; GLoRA beside it needs the weight itself: see eager")
    return trainable(problem, functools.partial(lora, layer, problem.config))


def peft(problem: Problem) -> Contestant:
    """PEFT's own layer for the configuration, taken out of a model that `get_peft_model` wrapped.

    Raises:
        Unavailable: a configuration PEFT has no layer for (it ties the forms of A and B, and of D and E), or a base.
        ImportError: peft, or its GLoRA, is not installed.
    """
    library, config = importlib.import_module("peft"), problem.config
    adapter = peft_config(library, config, ["linear"])
    linear = base_layer(problem) if problem.base is None else linear4bit(problem)
    try:
        model = library.get_peft_model(_Wrapper(linear), adapter, autocast_adapter_dtype=False)
    except ValueError as reason:
        raise Unavailable(f"PEFT: {reason}") from reason
    layer = model.base_model.model.linear
    params = peft_parameters(layer, config)
    for parameter in params.values():  # over a 4-bit base PEFT leaves them in fp32
        parameter.data = parameter.data.to(problem.weight.dtype)
    copy_values(params, problem.params)
    return Contestant(layer, params)


def lycoris(problem: Problem, bypass: bool = False, backend: str = "torch") -> Contestant:
    """LyCORIS's GLoRA module over the base, which is our product variant with alpha = alpha_A = R.

    bypass: its other forward, W(x + A(x)) + B(x), in place of the default, which builds ΔW and takes a second product.
    backend: what builds ΔW, by LyCORIS's names; "triton" is its default on a card, "torch" on a CPU.

    Raises:
        Unavailable: the backend cannot run here.
        ImportError: lycoris is not installed.
    """
    kind = importlib.import_module("lycoris.modules.glora").GLoRAModule
    usable = importlib.import_module("lycoris.kernels.dispatch").available_backends(problem.x.device)
    if backend not in usable or (backend == "triton" and not problem.x.is_cuda):
        raise Unavailable(f"LyCORIS has no backend {backend!r} on {problem.x.device}")
    linear = base_layer(problem)
    rank = problem.config.rank
    layer = kind("layer", linear, lora_dim=rank, alpha=rank, bypass_mode=bypass).to(problem.x)
    names = {"A_up": "a1", "A_down": "a2", "B_up": "b1", "B_down": "b2"}
    params = {ours: layer.get_submodule(theirs).get_parameter("weight") for ours, theirs in names.items()}
    copy_values(params, problem.params)

    def forward(x: Tensor) -> Tensor:
        os.environ["LYCORIS_KERNEL_BACKEND"] = backend  # LyCORIS looks it up in every call
        y: Tensor = layer(x)
        return y

    return Contestant(forward, params)


def peft_config(library: Any, config: GLoRAConfig, modules: Sequence[str], biased: bool = True) -> Any:
    """PEFT's configuration for these modules; raises as `peft` does.

    biased: whether the layers have a bias; without one PEFT makes no C, D and E, and takes no word about them.
    """
    given: dict[str, Any] = {"r": config.rank, "target_modules": list(modules)}
    if case_of(config) == LORA:
        return library.LoraConfig(lora_alpha=config.scale * config.rank, lora_dropout=config.dropout, **given)
    if case_of(config) == HIRA and not biased:
        return library.HiraConfig(hira_dropout=0.0, **given)
    if config.A != config.B or config.D != config.E or config.variant != "hadamard":
        raise Unavailable(f"PEFT ties A to B and D to E, and has no product variant: no {case_of(config)}")
    rest = {"config_C": config.C, "config_D_E": config.D} if biased else {}
    return library.GloraConfig(config_A_B=config.A, **given, **rest)


def peft_parameters(layer: Any, config: GLoRAConfig) -> dict[str, Tensor]:
    """PEFT's parameters by our names."""
    if case_of(config) == HIRA:
        return {"A_down": layer.hira_A["default"], "A_up": layer.hira_B["default"]}
    if case_of(config) == LORA:
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


class _Wrapper(nn.Module):
    """The smallest model with a module for PEFT to find."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.is_loaded_in_4bit = is_linear4bit(linear)  # what transformers sets, and PEFT looks at

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _plain_lora(problem: Problem, name: str) -> None:
    if problem.entry.adapter != LORA or problem.bias is not None or problem.config.dropout:
        raise Unavailable(f"{name} is timed as LoRA without bias and dropout")


def _unsloth(problem: Problem) -> Contestant:
    """`LoRA_W`, its single-projection LoRA, which takes 3-D input; over 4 bits and for few tokens
    `fast_linear_forward`, which takes a PEFT layer."""
    _plain_lora(problem, "Unsloth's LoRA_W")
    if problem.entry.decode and problem.base is not None:
        function = importlib.import_module("unsloth.kernels.utils").fast_linear_forward
        inner = peft(problem)
        return Contestant(lambda x: function(inner.forward, x[:, None])[:, 0], inner.params)
    apply = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W.apply
    weight: Any = problem.weight if problem.base is None else linear4bit(problem).weight
    scale = problem.config.scale

    def forward(x: Tensor, params: dict[str, Tensor]) -> Tensor:
        state = getattr(weight, "quant_state", None)
        return apply(x[None], weight.data, state, params["B_down"], params["B_up"], scale)[0]

    return trainable(problem, forward)


def _lorafusion(problem: Problem) -> Contestant:
    """lorafusion.ops.lora_v1.FusedLinearLoRA, which takes 3-D input and the scale as alpha."""
    if problem.base is not None:
        raise Unavailable("lorafusion has no layer on a 4-bit base")
    _plain_lora(problem, "LoRAFusion's FusedLinearLoRA")
    apply = importlib.import_module("lorafusion.ops.lora_v1").FusedLinearLoRA.apply
    scale = problem.config.scale

    def forward(x: Tensor, params: dict[str, Tensor]) -> Tensor:
        return apply(x[None], problem.weight, params["B_down"], params["B_up"], scale, 0.0, None, None)[0]

    return trainable(problem, forward)


def _each(layers: Sequence[Contestant]) -> Contestant:
    params = {f"{name}.{i}": value for i, layer in enumerate(layers) for name, value in layer.params.items()}
    return Contestant(lambda x: [layer.forward(x) for layer in layers], params)


def _set_ours(problem: Problem) -> Contestant:
    weights, scale, count = [one.weight for one in problem.members()], problem.config.scale, len(problem.entry.widths)

    def forward(x: Tensor, params: dict[str, Tensor]) -> list[Tensor]:
        downs, ups = ([params[f"B_{end}.{i}"] for i in range(count)] for end in ("down", "up"))
        return grouped.grouped_lora_linear(x, weights, downs, ups, scales=scale)

    return trainable(problem, forward)


def _set_loop(problem: Problem) -> Contestant:
    """Single operations, layer by layer: base, A, B, scale, add."""
    if problem.entry.frozen:
        weights = [one.weight for one in problem.members()]
        return Contestant(lambda x: [F.linear(x, weight) for weight in weights])
    return _each([_eager(one) for one in problem.members()])


def _set_concat(problem: Problem) -> Contestant:
    """The base and the A of all members as one product each, then B of each member added to its columns; frozen, one
    product over the concatenated weights, the least that a set can take."""
    if problem.entry.frozen:
        return Contestant(lambda x: F.linear(x, problem.weight), joined=True)
    widths, rank, scale = list(problem.entry.widths), problem.config.rank, problem.config.scale
    down = torch.cat([one.params["B_down"] for one in problem.members()]).requires_grad_()
    ups = {name: v.clone().requires_grad_() for name, v in problem.params.items() if name.startswith("B_up")}

    def forward(x: Tensor) -> list[Tensor]:
        base, low = F.linear(x, problem.weight).split(widths, dim=1), F.linear(x, down).split(rank, dim=1)
        return [torch.addmm(b, h, up.t(), alpha=scale) for b, h, up in zip(base, low, ups.values(), strict=True)]

    return Contestant(forward, {"B_down": down, **ups})


def _set_grouped_mm(problem: Problem) -> Contestant:
    """Three grouped products, base, A and B: x of every member times its own columns of one right operand."""
    if not hasattr(F, "grouped_mm"):
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    members, rank, scale, device = problem.members(), problem.config.rank, problem.config.scale, problem.weight.device
    down, up = (torch.cat([one.params[name] for one in members]).requires_grad_() for name in ("B_down", "B_up"))
    ends = torch.tensor(problem.entry.widths, device=device).cumsum(0).to(torch.int32)
    rank_ends = torch.arange(rank, (len(members) + 1) * rank, rank, device=device, dtype=torch.int32)

    def forward(x: Tensor) -> Tensor:
        repeated = x.expand(len(members), *x.shape)
        low = F.grouped_mm(repeated, down.t(), offs=rank_ends).view(len(x), len(members), rank).transpose(0, 1)
        return F.grouped_mm(repeated, problem.weight.t(), offs=ends) + scale * F.grouped_mm(low, up.t(), offs=ends)

    return Contestant(forward, {"B_down": down, "B_up": up}, joined=True)


Builder = Callable[[Problem], Contestant]
LAYERS: dict[str, Builder] = {
    "ours": lambda problem: Contestant(base_layer(problem)) if problem.entry.frozen else ours(problem), "peft": peft,
    "eager": _eager, "compile": _compiled, "bnb": _bitsandbytes, "unsloth": _unsloth, "lorafusion": _lorafusion,
}  # fmt: skip
SETS: dict[str, Builder] = {
    "ours": _set_ours, "eager": _set_loop, "concat": _set_concat, "grouped_mm": _set_grouped_mm,
    "single": lambda problem: _each([ours(one) for one in problem.members()]),
    "peft": lambda problem: _each([peft(one) for one in problem.members()]),
}  # fmt: skip
