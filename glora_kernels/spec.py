"""The mathematics of GLoRA and ShareLoRA as data: supports, configurations, parameter shapes and counts.

    y = x (W + W∘A + B)ᵀ + [ b + b∘D + E + W·C ]

A configuration says which of the five supports exist and in which form. This module knows only their shapes, nothing
of tensors, devices or kernels; it imports neither torch nor triton.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

SUPPORTS: tuple[str, ...] = ("A", "B", "C", "D", "E")
"""The five support tensors, in the order of the equation."""

Matrix = Literal["lora", "vector", "constant", "none"]
"""The forms of A and B."""
Shift = Literal["lora", "vector", "none"]
"""The forms of C."""
Row = Literal["vector", "constant", "none"]
"""The forms of D and E."""

CHOICES: Mapping[str, tuple[str, ...]] = dict(
    zip(SUPPORTS, map(get_args, (Matrix, Matrix, Shift, Row, Row)), strict=True)
)
"""The forms each support can take: 4·4·3·3·3 = 432 configurations a layer."""

Variant = Literal["hadamard", "matmul"]
Init = Literal["xavier", "kaiming"]
Share = Literal["none", "A", "B", "AB"]

SCALED: dict[str, str] = {"alpha": "B", "alpha_A": "A"}
"""The fields that scale a support, and which: its low-rank form only."""

VARIANTS: tuple[str, ...] = get_args(Variant)
INITS: tuple[str, ...] = get_args(Init)

SHARED_FACTORS: Mapping[str, tuple[str, ...]] = {"none": (), "A": ("B_down",), "B": ("B_up",), "AB": ("B_down", "B_up")}
"""What `ShareLoRAConfig.share` ties over depth. The letters are the ShareLoRA paper's: its A is our `B_down`."""


LATER: tuple[str, ...] = ("alpha_A",)
"""Fields that earlier versions do not know: a saved configuration has them only where they are set."""

C = TypeVar("C", bound="_Config")


OURS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
"""Our names of what PEFT's configurations call otherwise."""


@dataclass(frozen=True)
class _Config:
    """Conversion of a configuration to plain JSON values and back."""

    def __new__(cls, *args: Any, **values: Any) -> Any:
        if theirs := sorted(values.keys() & OURS.keys()):
            hints = ", ".join(f"{name} is {OURS[name]} here" for name in theirs)
            raise TypeError(f"{cls.__name__} has no {' and no '.join(theirs)}: {hints}")
        return super().__new__(cls)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; `from_dict` takes it back."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if value is not None or name not in LATER}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """The inverse of `to_dict`; an unknown or missing key is an error that names it."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown {cls.__name__} fields {unknown}; accepted: {sorted(known)}")
        if missing := sorted(known - set(values) - set(LATER)):
            raise ValueError(f"missing {cls.__name__} fields {missing}")
        return cls(**values)


@dataclass(frozen=True)
class GLoRAConfig(_Config):
    """One GLoRA configuration: the form of each support, the rank, and the scales of the A and B paths.

    The layer computes ``y = x (W + s_A·W∘A + s·B)ᵀ + b + b∘D + E + W·C``, where s = alpha/rank multiplies
    the low-rank form of B only, s_A = alpha_A/rank that of A, and dropout acts on x in the B path only.

    Args:
        A: "lora" (N,R)·(R,K), "vector" (N,) per output row, "constant" (1,) or "none".
        B: "lora" (N,R)·(R,K), "vector" (N,) added to every weight of a row, "constant" (1,) or "none".
        C: "lora" (K,R)·(R,1), "vector" (K,) or "none".
        D: "vector" (N,), "constant" (1,) or "none"; not registered on a layer without a bias.
        E: "vector" (N,), "constant" (1,) or "none".
        rank: R of every low-rank support; an integer ≥ 1.
        alpha: with B="lora", s = alpha/rank, which is not 0; None means s = 1.
        dropout: probability p in [0, 1) of dropping an element of x in the low-rank B path; the other
            supports see x itself, so it has no effect where B is not "lora" (a warning).
        variant: "hadamard" (W∘A, elementwise, A is (N,K)) or "matmul" (W·A, A is (K,K): "lora" or "none").
        init: initialization of the ``_down`` factors: "xavier" (GLoRA's own) or "kaiming" (as PEFT's LoRA, a=√5).
        alpha_A: with A="lora", s_A = alpha_A/rank, which is not 0; None means s_A = 1, as in the paper. LyCORIS scales
            both products by one alpha: there alpha_A = alpha. Folded into the factors, the scale would make the same
            layer, but an optimizer such as Adam would take other steps.

    Raises:
        ValueError: a value outside the accepted ones; the message names the argument, what was given
            and what is accepted.

    Source: Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023.

    Examples:
        >>> gk.GLoRAConfig.lora(rank=8, alpha=16).scale
        2.0
        >>> gk.GLoRAConfig("vector", "vector", "none", "vector", "vector").parameter_shapes(16, 32, True)
        {'A': (32,), 'B': (32,), 'D': (32,), 'E': (32,)}
    """

    A: Matrix = "vector"
    B: Matrix = "lora"
    C: Shift = "none"
    D: Row = "none"
    E: Row = "none"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    variant: Variant = "hadamard"
    init: Init = "xavier"
    alpha_A: float | None = None

    def __post_init__(self) -> None:
        for name in SUPPORTS:
            check_choice(name, getattr(self, name), CHOICES[name])
        check_choice("variant", self.variant, VARIANTS)
        check_choice("init", self.init, INITS)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be an integer >= 1, got {self.rank!r}")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        for name, support in SCALED.items():
            if (alpha := getattr(self, name)) is None:
                continue
            if not _is_number(alpha) or not abs(alpha) < float("inf"):
                raise ValueError(f"{name} must be a finite number or None, got {alpha!r}")
            if (form := getattr(self, support)) != "lora":
                raise ValueError(f"{name} scales {support}='lora' only; got {name}={alpha!r} with {support}={form!r}")
            if alpha == 0:
                raise ValueError(f"{name} must not be 0: {support}='lora' would have no effect and never be trained")
        if self.dropout and self.B != "lora":
            warnings.warn(
                f"dropout={self.dropout!r} has no effect with B={self.B!r}: it acts in the low-rank B path only",
                UserWarning,
                stacklevel=3,
            )
        if self.variant == "matmul" and self.A not in ("lora", "none"):
            raise ValueError(f"variant='matmul' accepts A='lora' or 'none', got A={self.A!r}")

    @classmethod
    def lora(cls, rank: int = 8, alpha: float | None = None, dropout: float = 0.0) -> GLoRAConfig:
        """Plain LoRA, ``y = x Wᵀ + b + s·(x·B_downᵀ)·B_upᵀ`` with s = alpha/rank, initialised as PEFT does."""
        return cls("none", "lora", "none", "none", "none", rank, alpha, dropout, init="kaiming")

    @classmethod
    def of(cls, forms: Iterable[str], **others: Any) -> GLoRAConfig:
        """The configuration with these forms of A, B, C, D and E, given as text, and the other arguments.

        alpha and dropout are ignored where B is not "lora", alpha_A where A is not.
        """
        supports: dict[str, Any] = dict(zip(SUPPORTS, forms, strict=True))
        ignored = {name for name, support in (SCALED | {"dropout": "B"}).items() if supports[support] != "lora"}
        return cls(**supports, **{name: value for name, value in others.items() if name not in ignored})

    def with_rank(self, rank: int) -> GLoRAConfig:
        """This configuration with another rank and the same scales s and s_A."""
        scales = {"alpha": self.scale, "alpha_A": self.scale_A}
        kept: dict[str, Any] = {name: scales[name] * rank for name in SCALED if getattr(self, name) is not None}
        return replace(self, rank=rank, **kept)

    @property
    def scale(self) -> float:
        """s = alpha/rank, the factor on the low-rank B path; 1 where alpha is None."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def scale_A(self) -> float:
        """s_A = alpha_A/rank, the factor on the low-rank A; 1 where alpha_A is None."""
        return 1.0 if self.alpha_A is None else self.alpha_A / self.rank

    @property
    def is_empty(self) -> bool:
        """Whether every support is "none": such a layer is its base."""
        return all(getattr(self, name) == "none" for name in SUPPORTS)

    def parameter_shapes(
        self, in_features: int, out_features: int, bias: bool = True, experts: int = 0, common: Collection[str] = (),
        kernel: Sequence[int] = (),
    ) -> dict[str, tuple[int, ...]]:  # fmt: skip
        """The adapter's parameters for a (N=out_features, K=in_features) layer: name → shape.

        D is left out where the layer has no bias to scale. Over a number of `experts` their number E is in front of
        every shape, and 1 in front of the parameters that are `common` to them. A convolution has a `kernel`, and
        K = in_features times its size: the weight is flattened. But the product variant's A is of the channels alone.
        """
        n, c, r = out_features, in_features, self.rank
        k = c * math.prod(kernel)
        factors = {
            "A": ((c, r), (r, c)) if self.variant == "matmul" else ((n, r), (r, k)),
            "B": ((n, r), (r, k)),
            "C": ((k, r), (r, 1)),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name in SUPPORTS:
            form = getattr(self, name)
            if form == "lora":
                shapes[f"{name}_up"], shapes[f"{name}_down"] = factors[name]
            elif form != "none" and (name != "D" or bias):
                shapes[name] = (1,) if form == "constant" else (k,) if name == "C" else (n,)
        if experts:
            shapes = {name: (1 if name in common else experts, *shape) for name, shape in shapes.items()}
        return shapes

    def num_parameters(self, in_features: int, out_features: int, bias: bool = True, kernel: Sequence[int] = ()) -> int:
        """The number of trainable parameters of one layer's adapter (the base is not counted)."""
        return sum(map(math.prod, self.parameter_shapes(in_features, out_features, bias, kernel=kernel).values()))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> GLoRAConfig:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a GLoRAConfig must be a JSON object: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"a GLoRAConfig must be a JSON object, got {text[:80]!r}")
        return cls.from_dict(values)


@dataclass(frozen=True)
class ShareLoRAConfig(_Config):
    """LoRA whose factors are shared over the depth of a model: one factor per projection type (`projection_type`).

    Layer l of a type computes ``y = x Wᵀ + b + s·(x·B_downᵀ)·B_upᵀ`` with s = alpha/rank, and `share` says which
    factor all layers of the type have in common. Its gradient is the sum over them,
    ``dB_down = s·Σ_l B_up,lᵀ·dY_lᵀ·X_l``. A layer may also have other supports of GLoRA, which are its own.

    Args:
        rank: R of every low-rank support; an integer ≥ 1.
        alpha: s = alpha/rank; None means s = 1.
        dropout: probability p in [0, 1) of dropping an element of x in the low-rank path. Each layer has a mask
            of its own, except tied siblings.
        share: "A" (one `B_down` per type), "B" (one `B_up`), "AB" (both) or "none" (plain LoRA).
        projections: patterns of the layers that share, as in `target_modules`; the others are plain LoRA. None: all.
        tie_siblings: the projections of one block that read the same input (q, k and v; gate and up) get one
            `B_down` and one dropout mask; where `share` has "A", one `B_down` for the whole depth.
        A, C, D, E: the forms of the other supports, as in `GLoRAConfig`.

    Raises:
        ValueError: a value outside the accepted ones; the message names the argument, what was given
            and what is accepted.
        TypeError: `projections` is not None, a pattern or a sequence of patterns.

    Source: Song et al., "ShareLoRA: Parameter Efficient and Robust Large Language Model Fine-tuning via Shared
    Low-Rank Adaptation", 2024.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        >>> model = gk.inject(model, gk.ShareLoRAConfig(rank=4, share="A"), target_modules=["0", "1"])
        >>> gk.trainable_parameters(model)
        192
    """

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    share: Share = "A"
    projections: Sequence[str] | None = None
    tie_siblings: bool = False
    A: Matrix = "none"
    C: Shift = "none"
    D: Row = "none"
    E: Row = "none"

    def __post_init__(self) -> None:
        check_choice("share", self.share, tuple(SHARED_FACTORS))
        if not isinstance(self.tie_siblings, bool):
            raise ValueError(f"tie_siblings must be True or False, got {self.tie_siblings!r}")
        if self.projections is not None:
            object.__setattr__(self, "projections", _checked_projections(self.projections))
        self.layer_config()

    def layer_config(self) -> GLoRAConfig:
        """The configuration of one layer, initialised as PEFT's LoRA is (Kaiming, a=√5)."""
        return GLoRAConfig(
            self.A, "lora", self.C, self.D, self.E, self.rank, self.alpha, self.dropout, init="kaiming"
        )  # fmt: skip

    @property
    def shared_factors(self) -> tuple[str, ...]:
        """The names of the parameters that are shared over depth: "B_down", "B_up", both or none."""
        return SHARED_FACTORS[self.share]


def projection_type(path: str, out_features: int, in_features: int, numbered: Collection[str] = ()) -> str:
    """The key that layers which share have in common: the path with `#` for the numbers of its depth, and (N, K).

    "model.layers.7.self_attn.k_proj" of 1024 x 4096 → "model.layers.#.self_attn.k_proj (1024, 4096)". The names that
    stay keep a model's encoder, decoder and cross-attention apart.

    Args:
        path: the layer's module path. Names in it that are numbers count as depths.
        out_features: N.
        in_features: K.
        numbered: paths of modules whose last name contains its depth: with "layers.encoder_layer_3" among them,
            "layers.encoder_layer_3.mlp.0" → "layers.encoder_layer_#.mlp.#".
    """
    return f"{depthless(path, numbered)} ({out_features}, {in_features})".lstrip()


def depthless(path: str, numbered: Collection[str] = ()) -> str:
    """A path with `#` for its depths: names that are all digits, and digits in the last names of `numbered` paths."""
    names = path.split(".")
    around = [".".join(names[: i + 1]) in numbered for i in range(len(names) - 1)]
    parts = zip(names, [*around, False], strict=True)
    return ".".join(re.sub(r"\d+", "#", name) if inside or name.isdecimal() else name for name, inside in parts)


def all_configs(**common: Any) -> Iterator[GLoRAConfig]:
    """All 432 combinations of supports of the elementwise variant, each with the arguments `common` (rank, ...).

    alpha and dropout apply only to those with B="lora". The last has no support at all: its layer is its base.
    """
    for forms in itertools.product(*(CHOICES[name] for name in SUPPORTS)):
        yield GLoRAConfig.of(forms, **common)


def select(pattern: str, paths: Collection[str]) -> set[str]:
    """The module paths that a pattern selects, by the first of these rules that selects any.

    1. The path itself: "blocks.0.attn.q_proj".
    2. The end of a path, in whole names: "q_proj", "attn.q_proj".
    3. A glob on the path or its last name: "blocks.0.*", "*.attn.?_proj", "?_proj".
    4. A regular expression for the whole path, as PEFT reads a string: r".*\\.(q|v)_proj". A pattern is one if it has a
       character that paths and globs have not (backslash, parentheses, |, ^, $, +, braces) or begins with a dot.
    """
    if pattern in paths:
        return {pattern}
    return (
        {path for path in paths if path.endswith(f".{pattern}")}
        or {path for path in paths if _globs(path, pattern)}
        or _by_expression(pattern, paths)
    )


def assign(patterns: Iterable[str], paths: Collection[str]) -> dict[str, str]:
    """The pattern of each path: the path itself where it is among the patterns, else the first that selects it.

    Raises:
        ValueError: a pattern other than "*" selects paths, but all of them have another pattern. A pattern that selects
            nothing is no error here.
    """
    patterns = list(patterns)
    found = {path: path for path in patterns if path in paths}
    for pattern in patterns:
        selected = select(pattern, paths)
        free = selected - found.keys()
        if selected and not free and pattern not in (*paths, "*"):
            others = ", ".join(sorted({repr(found[path]) for path in selected}))
            raise ValueError(
                f"the pattern {pattern!r} has no effect: all that it matches is taken by {others}; put what is special "
                "first"
            )
        found |= dict.fromkeys(free, pattern)
    return found


def is_exact(pattern: str) -> bool:
    """Whether a pattern has no wildcard, so that it selects one module, or modules of one name."""
    return not any(character in pattern for character in "*?[")


def _globs(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path.rpartition(".")[2], pattern)


def _by_expression(pattern: str, paths: Collection[str]) -> set[str]:
    if not pattern.startswith(".") and set(pattern).isdisjoint("\\()|^$+{}"):
        return set()
    try:
        expression = re.compile(pattern)
    except re.error:
        return set()
    return {path for path in paths if expression.fullmatch(path)}


def _checked_projections(given: object) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, (tuple, list)) or not all(isinstance(pattern, str) for pattern in given):
        raise TypeError(f"projections must be None or patterns (a tuple or list of str), got {given!r}")
    if not given:
        raise ValueError("projections is empty; give at least one pattern, None for all, or share='none'")
    return tuple(given)


def check_choice(argument: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise a ValueError if the value of an argument is not an accepted one."""
    if value not in accepted:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, accepted))}; got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
