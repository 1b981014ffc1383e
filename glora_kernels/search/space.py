"""What a structure search chooses from: the forms of each support and the ranks, for every layer."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from glora_kernels.nn.patterns import unmatched
from glora_kernels.spec import (
    CHOICES,
    INITS,
    SUPPORTS,
    GLoRAConfig,
    Init,
    Matrix,
    Row,
    Shift,
    assign,
    check_choice,
    select,
)

_SIZES = ("lora", "vector", "constant", "none")
"""The forms of a support, those with the most parameters first."""

GENES: tuple[str, ...] = (*SUPPORTS, "rank")
"""What a search chooses in a layer: the form of each support, and one rank for all that are low-rank."""

Genes = Mapping[str, Any]
"""The value of every gene of one layer."""

Candidate = Mapping[str, GLoRAConfig]
"""A configuration in canonical form for every searched layer, by path; an empty one leaves its layer alone."""


class LayerShape(NamedTuple):
    """A linear layer: K, N, and whether it has a bias. `GLoRAConfig.num_parameters` takes them in this order."""

    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class SearchSpace:
    """The configurations that a search may give to a layer: every combination of these forms and ranks.

    Configurations that mean the same have one canonical form: D is "none" on a layer without a bias, and the rank is
    the smallest of `ranks` where no support is low-rank. With every form allowed, a layer with a bias has
    270·|ranks| + 162 of them, one without 90·|ranks| + 54.

    Args:
        A, B, C, D, E: the forms of each support to choose from, as tuples; `GLoRAConfig` says what they are.
        ranks: the ranks to choose from; a layer has one.
        scale: s of the low-rank B, the same for all ranks: the configurations have alpha = s·rank.
        init: the initialization of the ``_down`` factors, as in `GLoRAConfig`.

    Raises:
        ValueError: a value outside the accepted ones, something named twice, or a space that allows nothing: no form
            of a support, no rank, or "none" alone for every support.
        TypeError: forms or ranks that are no tuple or list.

    Examples:
        >>> space = gk.SearchSpace(A=("none", "vector"), B=("lora",), C=("none",), D=("none",), E=("none",), ranks=(4,))
        >>> space.largest.A, space.largest.rank
        ('vector', 4)
    """

    A: tuple[Matrix, ...] = ("none", "vector", "lora")
    B: tuple[Matrix, ...] = ("none", "vector", "lora")
    C: tuple[Shift, ...] = ("none", "vector", "lora")
    D: tuple[Row, ...] = ("none", "vector")
    E: tuple[Row, ...] = ("none", "vector")
    ranks: tuple[int, ...] = (2, 4, 8)
    scale: float = 1.0
    init: Init = "xavier"

    def __post_init__(self) -> None:
        for name in (*SUPPORTS, "ranks"):
            object.__setattr__(self, name, _distinct(name, getattr(self, name)))
        for name in SUPPORTS:
            for form in getattr(self, name):
                check_choice(name, form, CHOICES[name])
        for rank in self.ranks:
            if type(rank) is not int or rank < 1:
                raise ValueError(f"ranks must be integers >= 1, got {rank!r}")
        object.__setattr__(self, "ranks", tuple(sorted(self.ranks)))
        if type(self.scale) not in (int, float) or not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale must be a finite number other than 0, got {self.scale!r}")
        check_choice("init", self.init, INITS)
        if all(getattr(self, name) == ("none",) for name in SUPPORTS):
            raise ValueError("the space allows nothing: 'none' is the one form of every support")

    @classmethod
    def paper(cls, rank: int = 4) -> SearchSpace:
        """The space of the GLoRA paper: all 432 combinations of forms, and one rank."""
        forms: dict[str, Any] = dict(CHOICES)
        return cls(**forms, ranks=(rank,))

    def genes(self, shape: LayerShape) -> dict[str, tuple[Any, ...]]:
        """The values that each gene of a layer can have; D has "none" alone where the layer has no bias."""
        forms = {name: getattr(self, name) for name in SUPPORTS}
        return forms | ({} if shape.bias else {"D": ("none",)}) | {"rank": self.ranks}

    def build(self, genes: Genes) -> GLoRAConfig:
        """The canonical configuration with these genes; D must be "none" already on a layer without a bias."""
        return _built(self, tuple([genes[gene] for gene in GENES]))

    def canonical(self, config: GLoRAConfig, shape: LayerShape) -> GLoRAConfig:
        """The canonical form of a configuration for a layer; `init`, which does not change what is computed, is ours.

        Raises:
            ValueError: the configuration is not in the space; the message names the argument and what is accepted.
            TypeError: it is no GLoRAConfig.
        """
        if not isinstance(config, GLoRAConfig):
            raise TypeError(f"a configuration must be a GLoRAConfig, got {type(config).__name__}")
        given = genes_of(config) | ({} if shape.bias else {"D": "none"})
        if "lora" not in given.values():
            given["rank"] = self.ranks[0]
        for gene, accepted in self.genes(shape).items():
            if given[gene] not in accepted:
                raise ValueError(f"{gene} must be one of {', '.join(map(repr, accepted))}; got {given[gene]!r}")
        if config.variant != "hadamard" and config.A != "none":
            raise ValueError(f"variant must be 'hadamard' in a search; got {config.variant!r}")
        if config.alpha_A is not None:
            raise ValueError(f"alpha_A must be None in a search; got {config.alpha_A!r}")
        if config.dropout:
            raise ValueError(
                f"dropout must be 0 in a search, got {config.dropout!r}; set it where the result is trained"
            )
        if config.B == "lora" and not math.isclose(config.scale, self.scale):
            raise ValueError(
                f"alpha must be scale·rank = {self.scale * config.rank!r}, for the space has scale={self.scale!r}; got "
                f"alpha={config.alpha!r}, which is a scale of {config.scale!r}"
            )
        return self.build(given)

    @property
    def largest(self) -> GLoRAConfig:
        """The configuration that all others are parts of: of each support the form with the most parameters."""
        forms = {name: min(getattr(self, name), key=_SIZES.index) for name in SUPPORTS}
        rank = self.ranks[-1]
        return GLoRAConfig.of(forms.values(), rank=rank, alpha=self.scale * rank, init=self.init)

    def configs(self, shape: LayerShape) -> tuple[GLoRAConfig, ...]:
        """All distinct configurations of a layer, in canonical form."""
        genes = self.genes(shape)
        every = (self.build(dict(zip(genes, values, strict=True))) for values in itertools.product(*genes.values()))
        return tuple(dict.fromkeys(every))

    def smallest(self, shape: LayerShape) -> GLoRAConfig:
        """The configuration with the fewest parameters: the empty one where every support may be "none"."""
        config = self.build({gene: values[0] for gene, values in self.genes(shape).items()})
        while below := smaller(self, shape, config):
            config = below[0]
        return config

    def to_dict(self) -> dict[str, Any]:
        """The space as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@functools.lru_cache(maxsize=1 << 16)
def _built(space: SearchSpace, values: tuple[Any, ...]) -> GLoRAConfig:
    """The canonical configuration with these values of the genes; a supernet draws one a layer and example."""
    *forms, rank = values
    rank = rank if "lora" in forms else space.ranks[0]
    return GLoRAConfig.of(forms, rank=rank, alpha=space.scale * rank, init=space.init)


def _distinct(name: str, given: object) -> tuple[Any, ...]:
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of what to choose from, got {given!r}")
    if not given:
        raise ValueError(f"{name} is empty: the space allows nothing; give at least one choice")
    if len(set(given)) < len(given):
        raise ValueError(f"{name} names something twice: {given!r}")
    return tuple(given)


def genes_of(config: GLoRAConfig) -> dict[str, Any]:
    """The genes of a configuration."""
    return {gene: getattr(config, gene) for gene in GENES}


@functools.lru_cache(maxsize=1 << 16)
def parameters(config: GLoRAConfig, shape: LayerShape) -> int:
    """The number of parameters of one layer's adapter."""
    return config.num_parameters(*shape)


@functools.lru_cache(maxsize=1 << 16)
def smaller(space: SearchSpace, shape: LayerShape, config: GLoRAConfig) -> tuple[GLoRAConfig, ...]:
    """The configurations with one gene changed that have fewer parameters.

    Empty only for the fewest of all: at every rank, a support has the more parameters the earlier its form comes in
    lora, vector, constant, none, so that no step down has to pass over a larger configuration.
    """
    size, now = parameters(config, shape), genes_of(config)
    near = (space.build(now | {gene: value}) for gene, values in space.genes(shape).items() for value in values)
    return tuple(dict.fromkeys(other for other in near if parameters(other, shape) < size))


def parameters_of(candidate: Candidate, shapes: Mapping[str, LayerShape]) -> int:
    """The number of parameters of a candidate's adapters."""
    return sum(parameters(candidate[path], shape) for path, shape in shapes.items())


def assigned(argument: str, patterns: Mapping[str, object], paths: Mapping[str, object]) -> dict[str, str]:
    """The pattern of each path that has one, in the order of `paths`; an error for one that matches nothing."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: a pattern must be a str, got {pattern!r}")
        if not select(pattern, paths.keys()):
            raise unmatched(argument, pattern, "matches no searched layer", "searched layer", paths)
    try:
        found = assign(patterns, paths.keys())
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    return {path: found[path] for path in paths if path in found}
