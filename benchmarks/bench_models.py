"""Training steps of a whole model: how they grow with its layers, and PEFT's models before and after `accelerate`.

A LLaMA in plain PyTorch, random weights: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Every linear of
its layers is adapted: by `gk.inject`, by PEFT (LoRA, GLoRA, HiRA, LoRA with dropout), and PEFT's model accelerated. A
step is forward, loss, backward and AdamW over the adapters, in eager mode; every model carries the gradient through to
the output of the embeddings. All contestants of a size are timed in the same rounds, over the same frozen weights.

Nothing is timed unchecked: losses of single tokens and gradients of adapters are compared with the same model in
float64 with the literal formula in its linears, on one layer: further layers repeat the code that was checked. They may
be off by twice what the literal formula is at the dtype of the model, plus the project's small floor.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import glora_kernels as gk
from benchmarks import measure, peers, problems, schema
from benchmarks.cases import FROZEN, HIRA, LORA, LORA_LORA, PEFT_STEP, VECTOR_LORA, VECTORS
from benchmarks.devices import Device, Spread, Step, progress
from benchmarks.measure import Bench
from benchmarks.peers import Unavailable
from glora_kernels import GLoRAConfig, GLoRALinear, reference
from glora_kernels.reference.tolerance import allowed_error
from glora_kernels.runtime import workspace

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DROPOUT = 0.1
LEARNING_RATE = 1e-4
GROWTH = (1, 2, 4, 8)
PEFT_LAYERS = 4


@dataclass(frozen=True)
class Which:
    """A contestant: a case, who adapts ("eager" none, "ours", "peft", "accelerated"), dropout."""

    case: str
    how: str
    dropout: float = 0.0

    @property
    def impl(self) -> str:
        return "ours" if self.how == "accelerated" else self.how

    def __str__(self) -> str:
        return f"{self.case} ({self.how})" + (f" p={self.dropout:g}" if self.dropout else "")


GROWING = (
    Which(FROZEN, "eager"),
    *(Which(case, "ours") for case in (LORA, VECTOR_LORA, LORA_LORA)),
    *(Which(case, "peft") for case in (LORA, LORA_LORA)),
)
PAIRS = tuple(
    Which(case, how, p)
    for case, p in ((LORA, 0.0), (LORA, DROPOUT), (VECTORS, 0.0), (LORA_LORA, 0.0), (HIRA, 0.0))
    for how in ("peft", "accelerated")
)


@dataclass(frozen=True)
class Dims:
    """The sizes of a model and its batch."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    dtype: str
    batch: int
    length: int
    rank: int
    vocab: int = 2048

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def torch_dtype(self) -> torch.dtype:
        return problems.DTYPES[self.dtype]


DIMS = {
    "cuda": Dims("llama-3-8b", 4096, 32, 8, 14336, "bf16", 4, 2048, 16),
    "cpu": Dims("small llama", 1024, 16, 4, 2816, "fp32", 4, 128, 8),
    "tiny": Dims("tiny llama", 16, 2, 1, 40, "fp32", 3, 8, 2, vocab=64),
}


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on (batch, length, hidden)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = dims.heads, dims.kv_heads, dims.hidden // dims.heads
        hidden, kv, wide = dims.hidden, self.kv_heads * self.size, dims.intermediate
        self.q_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(hidden, kv, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(hidden, wide, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(wide, hidden, bias=False)
        self.norm_in, self.norm_mlp = (nn.RMSNorm(hidden, eps=1e-5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm_in(x)
        q, k, v = (proj(seen).unflatten(-1, (-1, self.size)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        q, k = _rotate(q), _rotate(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(-2))
        seen = self.norm_mlp(x)
        return x + self.down_proj(F.silu(self.gate_proj(seen)) * self.up_proj(seen))


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions: (batch, heads, length, size)."""
    length, size = x.shape[-2:]
    rates = 500000.0 ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float64) / size)
    angles = torch.arange(length, device=x.device, dtype=torch.float64)[:, None] * rates.repeat(2)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos().to(x.dtype) + torch.cat([-second, first], dim=-1) * angles.sin().to(x.dtype)


class Llama(nn.Module):
    """Token ids (batch, length) to the loss of each next token. Frozen; the embeddings' output requires a gradient."""

    def __init__(self, dims: Dims, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(dims.vocab, dims.hidden)
        self.layers = nn.ModuleList(DecoderLayer(dims) for _ in range(layers))
        self.norm = nn.RMSNorm(dims.hidden, eps=1e-5)
        self.lm_head = nn.Linear(dims.hidden, dims.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids).detach().requires_grad_()
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x))[:, :-1].flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")


def make_base(dims: Dims, layers: int, device: torch.device) -> Llama:
    """The frozen model with random weights.

    Raises:
        ValueError: a saved activation could not be told from a saved weight by its shape.
    """
    widths = {dims.hidden, dims.kv_heads * dims.hidden // dims.heads, dims.intermediate}
    if dims.tokens in widths:
        raise ValueError(
            f"batch·length is {dims.tokens}, which must be none of the widths of the weights {sorted(widths)}: what "
            "backward keeps is told apart by shape"
        )
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model = Llama(dims, layers)
    return model.to(dims.torch_dtype).requires_grad_(False)


def same_weights(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its frozen parameters."""
    return copy.deepcopy(model, {id(value): value for value in model.parameters() if not value.requires_grad})


@dataclass
class Trained:
    """One model that is measured. `params`: by path, the trainable tensors by our names."""

    which: Which
    model: nn.Module
    params: dict[str, dict[str, Tensor]]
    optimizer: torch.optim.Optimizer | None = None
    error: float = 0.0

    def __post_init__(self) -> None:
        if self.trained():
            self.optimizer = torch.optim.AdamW(self.trained(), lr=LEARNING_RATE)

    def trained(self) -> list[Tensor]:
        return [value for path in sorted(self.params) for value in self.params[path].values()]

    def step(self, ids: Tensor) -> None:
        """One step of training. Gradients are gone after it."""
        self.model(ids).mean().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def results(self, ids: Tensor) -> dict[str, Tensor]:
        """The loss of every token, and the gradient that their mean has for every adapter parameter; no dropout."""
        self.model.eval()
        losses = self.model(ids)
        self.model.train()
        names = [f"{path}.{name}" for path in sorted(self.params) for name in self.params[path]]
        gradients = torch.autograd.grad(losses.mean(), self.trained()) if names else ()
        return {"the loss of a token": losses.detach(), **dict(zip(names, gradients, strict=True))}


def adapt(base: Llama, which: Which, dims: Dims) -> Trained:
    """The base with every linear of its layers adapted, on the same weights, adapter values by `problems.std_of`.

    Raises:
        Unavailable: the implementation is not installed or has no such layer.
        AssertionError: a linear is not adapted, or not accelerated.
    """
    model: nn.Module = same_weights(base)
    config = problems.case_config(which.case, dims.rank, which.dropout)
    if which.case == FROZEN:
        return Trained(which, model.train(), {})
    if which.how == "ours":
        model = gk.inject(model, config, target_modules=list(LINEARS), adapter_dtype=dims.torch_dtype)
        layers: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, GLoRALinear)}
    else:
        model, layers = _peft(model, which, config, len(LINEARS) * len(base.layers))
    layers = {name.partition("layers.")[2]: layer for name, layer in layers.items()}
    params = {path: parameters(layer, config) for path, layer in layers.items()}
    expected = len(LINEARS) * len(base.layers)
    if len(params) != expected:
        raise AssertionError(f"{len(params)} linears adapted, not {expected}")
    for i, path in enumerate(sorted(params)):
        for name in sorted(params[path]):
            value = params[path][name]
            generator = torch.Generator(value.device).manual_seed(i)
            drawn = torch.randn(value.numel(), generator=generator, device=value.device)
            drawn *= problems.std_of(name, int(layers[path].in_features))  # type: ignore[arg-type]
            value.data.copy_(drawn.view(value.shape))
    return Trained(which, model.train(), params)


def parameters(layer: nn.Module, config: GLoRAConfig) -> dict[str, Tensor]:
    """The trainable tensors of a layer of ours, or of PEFT's, by our names."""
    if isinstance(layer, GLoRALinear):
        return {name: layer.get_parameter(name) for name in config.parameter_shapes(1, 1, False)}
    return peers.peft_parameters(layer, config)


def _peft(model: nn.Module, which: Which, config: GLoRAConfig, expected: int) -> tuple[nn.Module, dict[str, nn.Module]]:
    try:
        library = importlib.import_module("peft")
        adapter = peers.peft_config(library, config, LINEARS, biased=False)
    except (ImportError, AttributeError) as reason:
        raise Unavailable(str(reason)) from reason
    wrapped = library.get_peft_model(model, adapter, autocast_adapter_dtype=False)
    if which.how == "accelerated":
        wrapped = gk.accelerate(wrapped, verbose=False)
        report = gk.acceleration(wrapped)
        if report.kept or sum(report.accelerated.values()) != expected:
            raise AssertionError(f"every layer should run on our operators:\n{report}")
    inner = wrapped.base_model.model
    return wrapped, {name: m for name, m in inner.named_modules() if name.rpartition(".")[2] in LINEARS}


def literal(base: Llama, one: Trained, ids: Tensor, dims: Dims, dtype: torch.dtype) -> dict[str, Tensor]:
    """`Trained.results` at `dtype` by the literal formula: the base on W_eff of every linear, gradients by autograd."""
    config, model = problems.case_config(one.which.case, dims.rank), copy.deepcopy(base).to(dtype)
    leaves: dict[str, Tensor] = {}
    weights = {}
    for path, own in one.params.items():
        weight: Any = model.layers.get_submodule(path).weight
        shapes = config.parameter_shapes(weight.shape[1], weight.shape[0], False)
        params = {n: v.detach().to(dtype).reshape(shapes[n]).requires_grad_() for n, v in own.items()}
        leaves |= {f"{path}.{name}": value for name, value in params.items()}
        weights[f"layers.{path}.weight"] = reference.effective_weight(weight, params, config)
    losses = torch.func.functional_call(model, weights, (ids,))
    gradients = torch.autograd.grad(losses.mean(), list(leaves.values())) if leaves else ()
    return {"the loss of a token": losses.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(one: Trained, base: Llama, ids: Tensor, dims: Dims) -> float:
    """Compare losses and gradients with float64; the largest error over the largest value of each.

    Raises:
        AssertionError: something is off by more than the tolerance.
    """
    dtype = dims.torch_dtype
    exact, plain = (literal(base, one, ids, dims, at) for at in (torch.float64, dtype))
    expected = {name: (value, allowed_error(value, plain[name], dtype)) for name, value in exact.items()}
    return problems.compare(str(one.which), one.results(ids), expected)


def measure_models(bench: Bench, dims: Dims, layers: int, contestants: tuple[Which, ...], prefix: str) -> None:
    """Check and time the contestants of one size, the frozen model first; a line of each goes to the store.

    prefix: what the model's name in the rows begins with. Of rows that are missing also those are timed again that
    they are compared with: the frozen model, and PEFT's before `accelerate`.
    """
    names = {which: prefix + f"{dims.name} x{layers}" + (", dropout" * bool(which.dropout)) for which in contestants}
    keys = {which: f"{names[which]}|{which.impl}|{which.case}|{which.how}" for which in contestants}
    missing = {key for key in keys.values() if key not in bench.store.settled()}
    piece = f"{prefix}{dims.name} x{layers}"
    if not missing or bench.left_out(piece, missing):
        return
    device, where = bench.device, bench.device.torch_device
    with bench.piece(piece):
        base, one = make_base(dims, layers, where), make_base(dims, 1, where)
        ids = torch.randint(dims.vocab, (dims.batch, dims.length), device=where)
        few = ids[:1, : min(512, dims.length)]
        found: dict[str, Trained] = {}
        facts: dict[str, dict[str, int | None]] = {}
        asked = {which for which in contestants if keys[which] in missing or which.case == FROZEN}
        asked |= {replace(which, how="peft") for which in asked if which.how == "accelerated"}
        for which in progress([which for which in contestants if which in asked], "checking"):
            with bench.attempt(f"{names[which]}, {which}", which.impl, [keys[which]] if keys[which] in missing else []):
                error = check(adapt(one, which, dims), one, few, dims)
                trained = adapt(base, which, dims)
                trained.error = error
                facts[keys[which]] = memory(trained, ids, device)
                found[keys[which]] = trained
        steps: dict[str, list[Step]] = {key: [partial(trained.step, ids)] for key, trained in found.items()}
        times = device.times(steps, "eager", bench.given_rounds or max(3, bench.rounds // 2))
        for which in (which for which in contestants if keys[which] in missing & set(times)):
            took = Spread.of(times[keys[which]])
            row = {"model": names[which], "case": which.case, "impl": which.impl, "tokens": dims.tokens}
            row |= {"median_ms": 1e3 * took.median, "tokens_per_s": dims.tokens / took.median}
            row["peak_bytes"] = facts[keys[which]].pop("peak_bytes")
            schema.check_model(row)
            detail = {**took.row(), **facts[keys[which]], "layers": layers, "rank": dims.rank, "how": which.how}
            detail |= {"max_rel_err": found[keys[which]].error, "rounds": len(times[keys[which]])}
            frozen, before = times.get(keys[contestants[0]]), times.get(keys.get(replace(which, how="peft"), ""))
            detail |= Spread.ratio(times[keys[which]], frozen).named("over_frozen") if frozen else {}
            if which.how == "accelerated" and before:
                detail |= Spread.ratio(before, times[keys[which]]).named("faster")
            stage = "peft" if prefix else "growth"
            bench.store.add("model", key=keys[which], stage=stage, row=row, detail=detail)


def memory(one: Trained, ids: Tensor, device: Device) -> dict[str, int | None]:
    """Bytes: held between steps (weights, adapters, moments), the peak of a step with them, what autograd saves beyond
    weights, adapters and tokens, and which of that is of the shape of a weight."""
    workspace.release()
    one.step(ids)  # whatever is made once is there
    held = [*one.model.parameters(), *one.model.buffers()]
    states = [] if one.optimizer is None else one.optimizer.state.values()
    held += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    _, packed = measure.saved_tensors(lambda: one.model(ids))
    known = {tensor.untyped_storage().data_ptr() for tensor in (*held, ids)}
    kept = [tensor for tensor in packed if tensor.untyped_storage().data_ptr() not in known]
    shapes = {tuple(value.shape) for name, value in one.model.named_parameters() if "proj" in name and value.ndim == 2
              and not value.requires_grad}  # fmt: skip
    dense = [tensor for tensor in kept if tuple(tensor.shape) in shapes]
    held_bytes, peak = problems.tensor_bytes(held), device.peak_bytes(lambda: one.step(ids))
    return {
        "held_bytes": held_bytes, "peak_bytes": None if peak is None else held_bytes + peak,
        "saved_bytes": problems.tensor_bytes(kept), "dense_bytes": problems.tensor_bytes(dense),
    }  # fmt: skip


def test_peft(bench: Bench) -> None:
    """K and V are as wide as Q here: what backward keeps is told from a weight by its shape."""
    dims, layers = DIMS[bench.scale], 2 if bench.scale == "tiny" else PEFT_LAYERS
    dims = replace(dims, kv_heads=dims.heads)
    measure_models(bench, dims, layers, (Which(FROZEN, "eager"), *PAIRS), PEFT_STEP)
    bench.note("peft", lambda: {**asdict(dims), "layers": layers})


def test_growth(bench: Bench) -> None:
    listed = GROWTH[:2] if bench.scale == "tiny" else GROWTH
    for layers in listed:
        measure_models(bench, DIMS[bench.scale], layers, GROWING, "")
    bench.note("growth", lambda: {**asdict(DIMS[bench.scale]), "layers": list(listed)})
