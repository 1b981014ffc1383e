"""The layouts of adapter files of other tools, as one table: reading, writing and converting are derived from it.

A file has, for each adapted layer, tensors under `<name>.<ending>`, where `<name>` is a prefix and the layer's path,
for LyCORIS and kohya with `_` for `.`:

    LyCORIS GLoRA    ΔW = s·(W·a1·a2 + b1·b2)     a1.weight (K,R)  a2.weight (R,K)  b1.weight (N,R)  b2.weight (R,K)
      earlier        the same, other names          a2.weight (K,R)  a1.weight (R,K)  b2.weight (N,R)  b1.weight (R,K)
    LoRA of kohya    ΔW = s·up·down                lora_up.weight (N,R)    lora_down.weight (R,K)
    LoRA of PEFT     ΔW = s·B·A                    lora_B.weight (N,R)     lora_A.weight (R,K)

and `<name>.alpha`, with s = alpha/R; without it s = 1. GLoRA there is our product variant with s on both products.

Of a convolution each is a convolution's weight: B_down (R, channels, *kernel), the others 1 x 1. Ours are flattened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from glora_kernels.spec import SCALED, SUPPORTS, GLoRAConfig

ALPHA = "alpha"
"""The ending of the scale's numerator."""


def stored_shape(name: str, shape: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    """The shape in a file of a parameter of this name and shape, of a layer with this kernel."""
    rows, columns = shape
    if name == "B_down":
        return rows, columns // math.prod(kernel), *kernel
    return rows, columns, *[1] * len(kernel)


@dataclass(frozen=True)
class Layout:
    """How the adapter of one layer is stored.

    title: what users call it. forms: a configuration with the forms that the layer has. endings: our name of a
    parameter → the ending of its key; shapes (`stored_shape`) and values are the same, nothing is transposed.
    """

    title: str
    forms: GLoRAConfig
    endings: Mapping[str, str]

    @property
    def scales(self) -> tuple[str, ...]:
        """The fields of a configuration whose value is the file's alpha."""
        return tuple(name for name, support in SCALED.items() if getattr(self.forms, support) == "lora")

    def config(self, rank: int, alpha: float | None) -> GLoRAConfig:
        """The configuration of a layer of this rank; alpha None: s = 1."""
        return replace(self.forms, rank=rank, **dict.fromkeys(self.scales, alpha))

    def shapes(
        self, rank: int, in_features: int, out_features: int, kernel: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of a layer's tensors, by ending."""
        shapes = self.config(rank, None).parameter_shapes(in_features, out_features, kernel=kernel)
        return {ending: stored_shape(name, shapes[name], kernel) for name, ending in self.endings.items()}

    def holds(self, config: GLoRAConfig) -> bool:
        """Whether a layer of this configuration has the forms of this layout."""
        names = (*SUPPORTS, *(["variant"] if self.forms.A == "lora" else []))
        return all(getattr(config, name) == getattr(self.forms, name) for name in names)

    @property
    def accepted(self) -> str:
        """The forms, for a message."""
        own = [f"{name}={getattr(self.forms, name)!r}" for name in SUPPORTS]
        return ", ".join([*own, *([f"variant={self.forms.variant!r}"] if self.forms.A == "lora" else [])])


_GLORA = GLoRAConfig("lora", "lora", variant="matmul", init="kaiming")
LYCORIS = Layout(
    "GLoRA of LyCORIS", _GLORA, {"A_up": "a1.weight", "A_down": "a2.weight", "B_up": "b1.weight", "B_down": "b2.weight"}
)
EARLIER = Layout(
    "GLoRA of earlier LyCORIS", _GLORA,
    {"A_up": "a2.weight", "A_down": "a1.weight", "B_up": "b2.weight", "B_down": "b1.weight"},
)  # fmt: skip
KOHYA = Layout("LoRA of kohya", GLoRAConfig.lora(), {"B_up": "lora_up.weight", "B_down": "lora_down.weight"})
PEFT = Layout("LoRA of PEFT", GLoRAConfig.lora(), {"B_up": "lora_B.weight", "B_down": "lora_A.weight"})

LAYOUTS: tuple[Layout, ...] = (LYCORIS, EARLIER, KOHYA, PEFT)
"""All that are read. Of two that fit a layer the first counts, unless other layers of the file have the second."""


@dataclass(frozen=True)
class Format:
    """What `save_adapter(..., format=...)` writes.

    layouts: a layer has the first of these that holds its configuration. prefix: of names, where none is given.
    separator: of the parts of a path in names. has_alpha: whether all readers know `<name>.alpha`; else s is multiplied
    into the factors. module: what the metadata says that the file is for (`ss_network_module`), or None.
    """

    layouts: tuple[Layout, ...]
    prefix: str
    separator: str = "_"
    has_alpha: bool = True
    module: str | None = None


FORMATS: Mapping[str, Format] = {
    "lycoris": Format((LYCORIS, KOHYA), "lycoris_", module="lycoris.kohya"),
    "kohya": Format((KOHYA,), "lora_unet_", module="networks.lora"),
    "peft": Format((PEFT,), "transformer.", ".", has_alpha=False),
}

PREFIXES = (
    r"lycoris_|lora_unet_|lora_te\d*_|lora_transformer_|unet\.|transformer\.|text_encoder(?:_\d+)?\.|diffusion_model\."
)
"""The prefixes of names that are known, as a regular expression: each is one part of a pipeline."""

REFUSED: Mapping[str, str] = {
    "dora_scale": "DoRA's magnitudes (dora_wd)",
    "lora_magnitude_vector": "DoRA's magnitudes (use_dora)",
    "lora_magnitude_vector.weight": "DoRA's magnitudes (use_dora)",
    "bm.weight": "a Tucker core (use_tucker)",
    "lora_mid.weight": "a Tucker core (use_tucker)",
    "scalar": "a scalar that multiplies the factors (use_scalar) apart from them",
    "lora_up.bias": "a bias of a factor",
    "lora_B.bias": "a bias of a factor (lora_bias)",
    "diff": "a change of the whole weight",
    "diff_b": "a change of the bias",
    "w_norm": "a change of a norm's weight (train_norm)",
    "b_norm": "a change of a norm's bias (train_norm)",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "rescale": "OFT's rescaling",
    "on_input": "(IA)³",
    "weight": "a whole weight",
} | dict.fromkeys(
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), "LoHa"
) | dict.fromkeys(
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2"), "LoKr"
)  # fmt: skip
"""Endings of keys that no adapter of this library can represent, and what they are."""

ENDINGS: tuple[str, ...] = tuple(
    sorted({ending for layout in LAYOUTS for ending in layout.endings.values()} | {ALPHA, *REFUSED}, key=len)[::-1]
)
"""Every known ending, longer ones first."""
