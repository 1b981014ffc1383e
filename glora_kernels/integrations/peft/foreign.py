"""Checkpoints of ours under PEFT ("GKGLORA") from and to adapter files of other tools (`nn.formats`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from glora_kernels.integrations.peft.config import GLoRAPeftConfig
from glora_kernels.nn.file import Adapter, read, save_tensors
from glora_kernels.nn.formats.places import Prefix
from glora_kernels.nn.formats.read import adapter_of, is_foreign
from glora_kernels.nn.formats.write import plan
from glora_kernels.nn.model import join, unwrap
from glora_kernels.spec import GLoRAConfig


def read_file(path: Path, model: nn.Module | None, prefix: Prefix, rs_lora: bool | None) -> Adapter:
    """The adapter of a file of ours, or of another tool with the names resolved against the base model.

    Raises:
        ValueError: the errors of `load_adapter`; or the names cannot be resolved, as there is no model.
    """
    found = read(path, is_foreign, "convert_checkpoint")
    if isinstance(found, Adapter):
        return found
    if model is None:
        raise ValueError(
            "a file of another tool has names in which a '.' and a '_' look the same; give model=, the base model (on "
            "the meta device, if you like), in which they are looked up"
        )
    return adapter_of(found, unwrap(model), prefix, rs_lora)


def parts_of(
    adapter: Adapter,
) -> tuple[dict[str, GLoRAConfig], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The configurations of the layers by path, their parameters by path and name, and all other tensors."""
    configs = {path: entry.config for path, entry in adapter.layers.items()}
    others = adapter.values()
    layers = {path: {own: others.pop(join(path, own)) for own in e.names} for path, e in adapter.layers.items()}
    return configs, layers, others


def checkpoint_of(adapter: Adapter) -> tuple[GLoRAPeftConfig, dict[str, dict[str, Tensor]]]:
    """The configuration and the parameters by path and name of an adapter of linear layers, for PEFT.

    Raises:
        ValueError: it has modules trained whole, trained biases or shared factors, or convolutions.
    """
    if convolutions := [path for path, entry in adapter.layers.items() if entry.kernel]:
        raise ValueError(
            f"{convolutions[0]!r} is a convolution, which our methods of PEFT do not adapt; load it by load_adapter"
        )
    configs, layers, others = parts_of(adapter)
    if others or adapter.tied:
        raise ValueError("it has modules trained whole, trained biases or shared factors; load it by load_adapter")
    common = Counter(configs.values()).most_common(1)[0][0]
    patterns = {path: _settings(config, common) for path, config in configs.items() if config != common}
    fields = {("r" if name == "rank" else name): value for name, value in vars(common).items()}
    return GLoRAPeftConfig(target_modules=sorted(configs), patterns=patterns or None, **fields), layers


def write_file(
    target: Path,
    configs: Mapping[str, GLoRAConfig],
    layers: Mapping[str, Mapping[str, Tensor]],
    others: Mapping[str, Tensor],
    format: str,
    prefix: Prefix,
    kernels: Mapping[str, Sequence[int]],
) -> None:
    """Write layers, by path and then by name, to a file in a format of `nn.formats`; the errors of `plan`."""
    planned = plan(configs, others, format, prefix, kernels)
    values = {join(path, own): tensor for path, stored in layers.items() for own, tensor in stored.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(target, planned.tensors(values), planned.header)


def _settings(config: GLoRAConfig, common: GLoRAConfig) -> dict[str, Any]:
    """The fields in which a configuration differs, by PEFT's names."""
    theirs = vars(common)
    return {("r" if name == "rank" else name): v for name, v in vars(config).items() if v != theirs[name]}
