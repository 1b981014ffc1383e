"""The configurations of the two methods, in the form that PEFT saves and loads as adapter_config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from peft.config import PeftConfig

from glora_kernels.integrations.peft.registry import peft_type
from glora_kernels.spec import (
    LATER,
    OURS,
    GLoRAConfig,
    Init,
    Matrix,
    Row,
    Share,
    ShareLoRAConfig,
    Shift,
    Variant,
    assign,
    select,
)

FORMAT = 1
"""The version of the saved configuration's format; a file with a higher one is refused."""
SETTINGS = tuple("r" if field.name == "rank" else field.name for field in fields(GLoRAConfig))
"""The fields of `GLoRAPeftConfig` that `patterns` can set for some of the layers."""

_LATER = ("layers_to_transform", "layers_pattern", *LATER)
_INSTEAD = OURS | {
    "rank_pattern": "patterns, {'*.q_proj': {'r': 4}}",
    "alpha_pattern": "patterns, {'*.q_proj': {'alpha': 8}}", "init_lora_weights": "init", "rank": "r",
    "use_rslora": "alpha=a*sqrt(r) for its scale of a/sqrt(r)", "lora_bias": "E='vector'",
    "config_A_B": "A and B", "config_C": "C", "config_D_E": "D and E",
}  # fmt: skip
"""Field of PEFT's `LoraConfig` or `GloraConfig` → what to use here instead."""


@dataclass
class AdapterConfig(PeftConfig):
    """The fields that both methods have: which modules are adapted, trained and saved.

    Args:
        target_modules: names of the modules to adapt (a path, or the end of one), a regular expression of whole
            paths, or "all-linear".
        exclude_modules: modules among these to leave out: names, or a regular expression.
        layers_to_transform: the number of the layer to adapt, or several; None: all. Not with target_modules as a str.
        layers_pattern: the name of the list in which layers are numbered ("layers", "h"), or several; None: any.
        modules_to_save: other modules that are trained whole and saved with the adapter.
        bias: which biases of the base are trained: "none", "all", or those of the adapted layers
            ("gkglora_only", "gksharelora_only").
        format: of the file; not to be set.

    Raises:
        TypeError: an unknown field, as a file of a newer version may have.
        ValueError: a value outside the accepted ones, or a file of a newer format.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    format: int = FORMAT

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # PEFT only warns and drops unknown fields of a file, and the model would compute something else.
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(kwargs) - known):
            hints = "".join(f"; for {name} use {_INSTEAD[name]}" for name in unknown if name in _INSTEAD)
            raise TypeError(
                f"{cls.__name__} has no {', '.join(map(repr, unknown))}{hints}; it has {', '.join(sorted(known))}. A "
                "file with other fields comes from a newer version of glora_kernels or PEFT"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.format, int) or self.format > FORMAT:
            raise ValueError(
                f"this configuration has format {self.format!r}, and this version of glora_kernels knows formats up "
                f"to {FORMAT}: load it with a newer version"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(given := getattr(self, name), (list, tuple)):
                setattr(self, name, set(given))
        self._check_layers()

    def _check_layers(self) -> None:
        chosen, pattern = self.layers_to_transform, self.layers_pattern
        numbers = list(chosen) if isinstance(chosen, (list, tuple, range, set)) else [] if chosen is None else [chosen]
        names = pattern if isinstance(pattern, (list, tuple)) else [] if pattern is None else [pattern]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"layers_to_transform must be None, an integer >= 0 or a list of them; got {chosen!r}")
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"layers_pattern must be None, a str or a list of them; got {pattern!r}")
        if names and not numbers:
            raise ValueError(f"layers_pattern={pattern!r} says where layers_to_transform is numbered; give both")
        if numbers and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={chosen!r} with target_modules={self.target_modules!r}: PEFT numbers the layers "
                "of a list of names alone; name the modules, or write the numbers into the regular expression"
            )
        if numbers and not isinstance(chosen, int):
            self.layers_to_transform = numbers

    def to_dict(self) -> dict[str, Any]:
        """The configuration as PEFT saves it; fields that earlier versions do not know are left out unless set."""
        values: dict[str, Any] = super().to_dict()
        return {name: value for name, value in values.items() if value is not None or name not in _LATER}

    def _named(self, method: str) -> None:
        """Set `peft_type`, and check `bias`, whose values depend on the method."""
        self.peft_type = peft_type(method)
        accepted = ("none", "all", f"{method.lower()}_only")
        if self.bias not in accepted:
            raise ValueError(f"bias must be one of {', '.join(map(repr, accepted))}; got {self.bias!r}")


@dataclass
class GLoRAPeftConfig(AdapterConfig):
    """GLoRA as a method of PEFT: y = x (W + W∘A + s·B)ᵀ + b + b∘D + E + W·C in all its forms.

    Args:
        r: the rank R of every low-rank support; an integer ≥ 1.
        A, B, C, D, E: the form of each support, as in `GLoRAConfig`. A layer without a bias keeps C and E, and has
            no D.
        alpha: s = alpha/r with B="lora"; None means s = 1.
        dropout: probability of dropping an element of x in the low-rank B path.
        variant: "hadamard" (W∘A) or "matmul" (W·A).
        init: of the `_down` factors, "xavier" or "kaiming".
        patterns: other settings for some layers: a pattern (as in `inject`) → the fields that differ,
            {"*.q_proj": {"A": "none", "r": 4}}. A path wins, then the first pattern that matches. Pairs are accepted
            too.
        alpha_A: s_A = alpha_A/r with A="lora"; None means s_A = 1.

    The other arguments are those of `AdapterConfig` and `peft.PeftConfig`.

    Raises:
        ValueError: what `AdapterConfig` and `GLoRAConfig` refuse.
        TypeError: patterns that are no mapping.

    Examples:
        >>> from peft import get_peft_model
        >>> from glora_kernels.integrations.peft import GLoRAPeftConfig
        >>> config = GLoRAPeftConfig(target_modules=["0"], A="vector", B="lora", r=4)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 4)), config)
    """

    r: int = 8
    A: Matrix = "vector"
    B: Matrix = "lora"
    C: Shift = "none"
    D: Row = "none"
    E: Row = "none"
    alpha: float | None = None
    dropout: float = 0.0
    variant: Variant = "hadamard"
    init: Init = "xavier"
    patterns: dict[str, dict[str, Any]] | None = None
    alpha_A: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._named("GKGLORA")
        self.patterns = _checked_patterns(self.patterns)
        if self.layer_config().is_empty and not self.patterns:
            raise ValueError("A, B, C, D and E are all 'none', so nothing would be adapted; choose at least one")
        for pattern, settings in (self.patterns or {}).items():
            try:
                self.layer_config(settings)
            except ValueError as error:
                raise ValueError(f"patterns[{pattern!r}]: {error}") from error

    def layer_configs(self, paths: Collection[str]) -> dict[str, GLoRAConfig]:
        """The configuration of each of these paths, which must be those of all adapted layers.

        Raises:
            ValueError: a pattern that matches none of them, or only paths that earlier patterns match.
        """
        patterns = self.patterns or {}
        try:
            chosen = assign(patterns, paths)
        except ValueError as error:
            raise ValueError(f"patterns: {error}") from error
        for pattern in patterns if paths else ():
            if not select(pattern, paths):
                raise ValueError(f"patterns: {pattern!r} matches none of the {len(paths)} layers that are adapted")
        return {path: self.layer_config(patterns[chosen[path]] if path in chosen else {}) for path in paths}

    def layer_config(self, settings: Mapping[str, Any] = MappingProxyType({})) -> GLoRAConfig:
        """The configuration of one layer, with the settings of the pattern that it matches."""
        values = {name: settings.get(name, getattr(self, name)) for name in SETTINGS}
        for name, support, default in (("alpha", "B", None), ("dropout", "B", 0.0), ("alpha_A", "A", None)):
            if values[support] != "lora" and support in settings:  # the general one is for the low-rank form only
                values[name] = settings.get(name, default)
        return GLoRAConfig(rank=values.pop("r"), **values)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as PEFT saves it. Patterns become pairs: PEFT sorts a mapping's keys, but order matters."""
        values = super().to_dict()
        if self.patterns is not None:
            values["patterns"] = [[pattern, dict(settings)] for pattern, settings in self.patterns.items()]
        return values


@dataclass
class ShareLoRAPeftConfig(AdapterConfig):
    """ShareLoRA as a method of PEFT: LoRA with factors shared over depth, one for each type of projection.

    Args:
        r: the rank R; an integer ≥ 1.
        alpha: s = alpha/r; None means s = 1.
        dropout: probability of dropping an element of x in the low-rank path.
        share: "A" (one `B_down` for each type), "B" (one `B_up`), "AB" (both) or "none".
        projections: patterns of the layers that share; the others are plain LoRA. None: all.
        tie_siblings: one `B_down` for the projections that read the same input (q, k and v; gate and up). Not with
            dropout, because under PEFT each layer draws its own mask; `inject` gives siblings one mask.
        A, C, D, E: the forms of the other supports, each layer's own.

    The other arguments are those of `AdapterConfig` and `peft.PeftConfig`.

    Raises:
        ValueError: what `AdapterConfig` and `ShareLoRAConfig` refuse; tie_siblings with dropout.

    Examples:
        >>> from peft import get_peft_model
        >>> from glora_kernels.integrations.peft import ShareLoRAPeftConfig
        >>> config = ShareLoRAPeftConfig(target_modules=["0", "1"], r=4, share="A")
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), config)
    """

    r: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    share: Share = "A"
    projections: list[str] | None = None
    tie_siblings: bool = False
    A: Matrix = "none"
    C: Shift = "none"
    D: Row = "none"
    E: Row = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._named("GKSHARELORA")
        config = self.share_config()
        self.projections = None if config.projections is None else list(config.projections)
        if self.tie_siblings and self.dropout:
            raise ValueError(
                f"tie_siblings=True with dropout={self.dropout!r}: siblings have one dropout mask, which layers under "
                "PEFT cannot share; set dropout=0, or use glora_kernels.inject"
            )

    def share_config(self) -> ShareLoRAConfig:
        """The configuration without PEFT's own fields."""
        names = [field.name for field in fields(ShareLoRAConfig) if field.name != "rank"]
        return ShareLoRAConfig(rank=self.r, **{name: getattr(self, name) for name in names})

    def layer_configs(self, paths: Collection[str]) -> dict[str, GLoRAConfig]:
        """The configuration of each of these paths; the same for all."""
        return dict.fromkeys(paths, self.share_config().layer_config())


def _checked_patterns(given: object) -> dict[str, dict[str, Any]] | None:
    if given is None:
        return None
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, (list, tuple)) or not all(map(_is_pattern, pairs)):
        raise TypeError(f"patterns must be None or a mapping of globs to settings (a dict each), got {given!r}")
    patterns = {pattern: dict(settings) for pattern, settings in pairs}
    for pattern, settings in patterns.items():
        if unknown := sorted(map(str, set(settings) - set(SETTINGS))):
            raise ValueError(
                f"patterns[{pattern!r}] sets {', '.join(map(repr, unknown))}; accepted: {', '.join(SETTINGS)}"
            )
    return patterns


def _is_pattern(pair: Any) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    return isinstance(pair[0], str) and isinstance(pair[1], Mapping)
