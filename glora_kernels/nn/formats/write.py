"""Writing adapters as files of other tools: the same numbers under their names, and what they cannot hold refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glora_kernels.nn.formats.layouts import ALPHA, FORMATS, LYCORIS, Format, Layout, stored_shape
from glora_kernels.nn.formats.places import Prefix, check_prefix, name_of
from glora_kernels.nn.model import join
from glora_kernels.spec import GLoRAConfig, check_choice


@dataclass(frozen=True)
class Plan:
    """What will be written for which layers; made and checked before any value is read.

    names: of the layers in the file, by path. layouts, configs: by path. kernels: of those that are convolutions.
    """

    format: Format
    names: Mapping[str, str]
    layouts: Mapping[str, Layout]
    configs: Mapping[str, GLoRAConfig]
    kernels: Mapping[str, Sequence[int]]

    def tensors(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the file. values: the parameters in host memory, by path and name."""
        found: dict[str, Tensor] = {}
        for path, layout in self.layouts.items():
            name, config, kernel = self.names[path], self.configs[path], self.kernels.get(path, ())
            scale = config.scale if self.format.has_alpha else 1.0  # as the file will say it
            factors = {"A_up": config.scale_A / scale, "B_up": config.scale / scale}
            for own, ending in layout.endings.items():
                full = join(path, own)
                scaled = _times(full, values[full], factors.get(own, 1.0))
                found[f"{name}.{ending}"] = scaled.view(stored_shape(own, scaled.shape, kernel))
            if self.format.has_alpha:
                found[f"{name}.{ALPHA}"] = _number(config.rank if config.alpha is None else config.alpha)
        return found

    @property
    def header(self) -> dict[str, str]:
        """The metadata of the file."""
        about = {"format": "pt"}
        if self.format.module is not None:
            algo = "glora" if LYCORIS in self.layouts.values() else "lora"
            arguments = {"algo": algo, "rs_lora": "False"} if self.format.module.startswith("lycoris") else {}
            about |= {"ss_network_module": self.format.module, "ss_network_args": json.dumps(arguments)}
        return about


def plan(
    configs: Mapping[str, GLoRAConfig],
    others: Iterable[str],
    format: str,
    prefix: Prefix,
    kernels: Mapping[str, Sequence[int]],
) -> Plan:
    """How the layers of an adapter, by path, are written in a format.

    Args:
        configs: of the layers, by path.
        others: tensors that the adapter has beside those of the layers (modules trained whole, biases), by name.
        format: a key of `FORMATS`.
        prefix: of the names; None: that of the format.
        kernels: of the layers that are convolutions, by path.

    Raises:
        ValueError: the format cannot hold a layer or another tensor; the message names it and what is accepted.
    """
    check_choice("format", format, tuple(FORMATS))
    check_prefix(prefix)
    chosen = FORMATS[format]
    if rest := sorted(others):
        raise ValueError(
            f"format={format!r} holds adapters of layers only, and this adapter has {rest[0]!r} as well, which is "
            "trained whole; without format= the file has all"
        )
    layouts: dict[str, Layout] = {}
    for path, config in configs.items():
        found = next((layout for layout in chosen.layouts if layout.holds(config)), None)
        if found is None:
            accepted = " or ".join(f"{layout.accepted} ({layout.title})" for layout in chosen.layouts)
            raise ValueError(f"format={format!r} cannot hold {path!r} with {config}; it holds {accepted}")
        layouts[path] = found
    names = {path: name_of(path, chosen.prefix if prefix is None else prefix, chosen.separator) for path in configs}
    places: dict[str, str] = {}
    for path, name in names.items():
        if (first := places.setdefault(name, path)) != path:
            raise ValueError(
                f"format={format!r} calls both {first!r} and {path!r} {name!r}, and could not tell them apart"
            )
    return Plan(chosen, names, layouts, dict(configs), kernels)


def _times(name: str, tensor: Tensor, factor: float) -> Tensor:
    """A contiguous copy, multiplied and rounded once; a ValueError where that overflows."""
    scaled = tensor if factor == 1.0 else (tensor.double() * factor).to(tensor.dtype)
    if bool((scaled.isinf() & ~tensor.isinf()).any()):
        raise ValueError(f"save_adapter: {name!r} times its scale {factor:g} is beyond {tensor.dtype}")
    return scaled.clone(memory_format=torch.contiguous_format)


def _number(value: float) -> Tensor:
    """In fp32, as other tools write alpha, where that is the same number."""
    narrow = torch.tensor(float(value), dtype=torch.float32)
    return narrow if float(narrow) == value else torch.tensor(float(value), dtype=torch.float64)
