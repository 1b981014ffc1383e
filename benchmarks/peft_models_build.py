"""The models that `benchmarks.peft_models` measures: a LLaMA, PEFT's adapters on it, the same accelerated, the check.

Losses of single tokens and gradients of adapters, after `accelerate`, are compared with PEFT's model in float64. They
may be off by twice what PEFT's own are in the same dtype, plus the project's small floor.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import glora_kernels as gk
from benchmarks import cases
from benchmarks.battery import LORA_LORA, VECTORS
from benchmarks.model import LINEARS
from benchmarks.peers import Unavailable
from benchmarks.peft_models_text import DROPOUT, DROPPED, HIRA, MODEL
from glora_kernels.reference.tolerance import allowed_error, largest_error

BEFORE, AFTER = "peft", "ours"
LEARNING_RATE = 1e-4
GLORA = {VECTORS: "vector", LORA_LORA: "lora"}
"""By case: PEFT's config_A_B."""


@dataclass(frozen=True)
class Sizes:
    """A LLaMA and its batch. `checked`: the sequences, and tokens of each, that are compared with float64."""

    hidden: int
    layers: int
    batch: int
    length: int
    rank: int
    dtype: str
    checked: tuple[int, int]
    vocab: int = 2048

    @property
    def intermediate(self) -> int:
        return 11 * self.hidden // 4

    @property
    def heads(self) -> int:
        return max(1, self.hidden // 64)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def name(self) -> str:
        """The model as the rows name it."""
        return f"{MODEL} {self.hidden} x{self.layers}"


SIZES = {
    "cuda": Sizes(4096, 4, 4, 2048, 16, "bf16", (1, 512)),
    "cpu": Sizes(1024, 4, 4, 128, 8, "fp32", (4, 128)),
    "tiny": Sizes(32, 2, 2, 8, 2, "fp32", (2, 8), vocab=64),
}


@dataclass
class Trained:
    """One model that is measured: its tokens, and the optimizer of its adapters, where it has any."""

    case: str
    impl: str
    model: nn.Module
    ids: Tensor
    error: float = 0.0
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        if self.params:
            self.optimizer = torch.optim.AdamW(list(self.params.values()), lr=LEARNING_RATE)

    @property
    def key(self) -> str:
        return f"{self.case}|{self.impl}"

    @property
    def params(self) -> dict[str, Tensor]:
        """The adapters' parameters by PEFT's names."""
        return adapters(self.model)

    def losses(self, ids: Tensor) -> Tensor:
        """The negative log-likelihood of each next token; in fp32, of a model in float64 in float64."""
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        if logits.dtype != torch.float64:
            logits = logits.float()
        return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")

    def step(self) -> None:
        """One step of training. Gradients are gone after it."""
        self.losses(self.ids).mean().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def results(self, ids: Tensor) -> dict[str, Tensor]:
        """The loss of every token, and the gradient that their mean has for every adapter parameter; no dropout."""
        self.model.eval()
        params, losses = self.params, self.losses(ids)
        self.model.train()
        gradients = torch.autograd.grad(losses.mean(), list(params.values()))
        return {"the loss of a token": losses.detach(), **dict(zip(params, gradients, strict=True))}


def make_base(sizes: Sizes, device: torch.device) -> nn.Module:
    """The frozen LLaMA with random weights; the output of its embeddings requires a gradient.

    Raises:
        Unavailable: transformers is not installed.
        ValueError: a saved input could not be told from a saved weight by its shape.
    """
    if sizes.tokens in (sizes.hidden, sizes.intermediate):
        raise ValueError(
            f"batch·length is {sizes.tokens}, which must differ from hidden ({sizes.hidden}) and from the intermediate "
            f"size ({sizes.intermediate}): what backward keeps is told apart by shape"
        )
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise Unavailable(str(error)) from error
    config = library.LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.length,
        attention_bias=False,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model = library.LlamaForCausalLM(config).to(cases.DTYPES[sizes.dtype])
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model.train()


def peft_model(base: nn.Module, case: str, sizes: Sizes) -> nn.Module:
    """PEFT's model over the base's own weights, adapter values N(0, 0.02²).

    Raises:
        Unavailable: PEFT is not installed, or has no such method.
    """
    try:
        library = importlib.import_module("peft")
        config = _peft_config(library, case, sizes.rank)
    except (ImportError, AttributeError) as reason:
        raise Unavailable(str(reason)) from reason
    model = library.get_peft_model(same_weights(base), config, autocast_adapter_dtype=False)
    generator = torch.Generator(next(base.parameters()).device).manual_seed(2)
    with torch.no_grad():
        for _, value in sorted(adapters(model).items()):
            value.copy_(torch.randn(value.shape, generator=generator, device=value.device).mul_(cases.STD))
    return model.train()


def _peft_config(library: Any, case: str, rank: int) -> Any:
    """PEFT's configuration. C, D and E of GLoRA are left at its defaults: without a bias in the base it makes none."""
    if case in GLORA:
        return library.GloraConfig(r=rank, config_A_B=GLORA[case], target_modules=list(LINEARS))
    if case == HIRA:
        return library.HiraConfig(r=rank, hira_dropout=0.0, target_modules=list(LINEARS))
    p = DROPOUT if case == DROPPED else 0.0
    return library.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=p, target_modules=list(LINEARS))


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def accelerated(model: nn.Module, sizes: Sizes) -> nn.Module:
    """A copy of PEFT's model with every layer on our operators.

    Raises:
        AssertionError: a layer of it is not.
    """
    found = gk.accelerate(same_weights(model), verbose=False)
    report = gk.acceleration(found)
    expected = len(LINEARS) * sizes.layers
    if sum(report.accelerated.values()) != expected or report.kept:
        raise AssertionError(f"{expected} layers should run on our operators:\n{report}")
    return found


def same_weights(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its frozen parameters."""
    return copy.deepcopy(model, {id(value): value for value in model.parameters() if not value.requires_grad})


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of PEFT's model in float64, norms included: transformers' own compute in fp32."""
    found = copy.deepcopy(model)
    for path, module in list(found.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            norm.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
            found.set_submodule(path, norm)
    return found.double()


def check(plain: Trained, fast: Trained, ids: Tensor) -> None:
    """Compare losses and gradients with float64, and note the largest error over the largest value of each.

    Raises:
        AssertionError: after `accelerate` something is off by more than the tolerance.
    """
    exact = Trained(plain.case, BEFORE, in_float64(plain.model), ids).results(ids)
    dtype = next(plain.model.parameters()).dtype
    before, after = plain.results(ids), fast.results(ids)
    for name, truth in exact.items():
        size = max(float(truth.abs().max()), torch.finfo(torch.float64).tiny)
        limit = allowed_error(truth, before[name], dtype)
        error = largest_error(after[name], truth)
        if not error <= limit:
            raise AssertionError(
                f"{plain.case}: {name} is off by {error / size:.3g} of its largest value, more than "
                f"{limit / size:.3g} (twice PEFT's own and a floor)"
            )
        plain.error = max(plain.error, largest_error(before[name], truth) / size)
        fast.error = max(fast.error, error / size)
