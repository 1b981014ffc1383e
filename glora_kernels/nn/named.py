"""The parameters of one adapter on one layer, under their own names: A, A_up, A_down, B, ... E."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.nn.adapted import Operands, initialize
from glora_kernels.spec import GLoRAConfig

FIRST = "default"
"""The name of the adapter that a model gets by `inject`."""

NONE = GLoRAConfig("none", "none")
"""The configuration of a layer without an adapter."""


def update_computed(module: nn.Module) -> None:
    """Update the parameters that PyTorch's pruning and legacy weight_norm compute, as a call of the module would."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(module, ())


def check_registered(caller: str, module: nn.Module, names: Iterable[str]) -> None:
    """Raise a RuntimeError where one of these is no parameter of the module, but computed from others."""
    if computed := [name for name in names if name not in module._parameters]:
        raise RuntimeError(
            f"{caller}: {computed[0]} of this layer is computed from other parameters (pruned, normalised or "
            "parametrized), and a new value would be lost; make it permanent first (prune.remove, "
            "remove_weight_norm, remove_parametrizations)"
        )


class NamedAdapter(nn.Module):
    """The supports of one adapter on a layer (N, K). A shared one may belong to another layer's adapter, its owner.

    A shared factor is a parameter of its owner alone, and looked up there at every call. So when PyTorch replaces the
    parameter (a cast, a move from the meta device, loading with assign=True), all layers see the new one, and it is
    counted, saved and loaded once.

    Attributes:
        scaling: a factor on the adapter's whole change, 1 as it was trained; not saved.
        place: the adapters of a model are counted in this order.

    Args:
        shapes: of the parameters, by name (`GLoRAConfig.parameter_shapes`).
        dtype: of the parameters that are not in `dtypes`.
        owners: the owner of each factor that belongs to another layer's adapter, by name.
    """

    def __init__(
        self,
        config: GLoRAConfig,
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        dtype: torch.dtype,
        dtypes: Mapping[str, torch.dtype] | None = None,
        owners: Mapping[str, NamedAdapter] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.scaling = 1.0
        self.place = 0
        self._owners = dict(owners or {})  # in a dict, so that they are not submodules
        self._names = tuple(shapes)
        for name, shape in shapes.items():
            if name not in self._owners:
                made = torch.empty(shape, device=device, dtype=(dtypes or {}).get(name, dtype))
                self.register_parameter(name, nn.Parameter(made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the adapter change nothing; factors of other owners stay as they are."""
        initialize(dict(self.named_parameters()), self.config.init)

    def values(self) -> dict[str, Tensor]:
        """Every support by name, also those of other owners, as it is saved: without `scaling`."""
        for holder in (self, *self._owners.values()):
            update_computed(holder)
        return {name: getattr(self._owners.get(name, self), name) for name in self._names}

    def tensors(self) -> dict[str, Tensor]:
        """Every support by name, also those of other owners, with `scaling` applied.

        Raises:
            RuntimeError: a support is on the meta device.
        """
        found = self.values()
        if any(tensor.is_meta for tensor in found.values()):
            raise RuntimeError(
                "this adapter is on the meta device, without values: load them (PeftModel.load_adapter, or "
                "load_state_dict with assign=True)"
            )
        if self.scaling != 1.0:  # in a product of two factors on one only
            return {name: t if name.endswith("_down") else t * self.scaling for name, t in found.items()}
        return found

    def check_intact(self, caller: str) -> None:
        """Raise a RuntimeError where a support is computed from other parameters: writing to it would be lost."""
        for name in self._names:
            check_registered(caller, self._owners.get(name, self), (name,))

    @property
    def shares(self) -> bool:
        """Whether a factor belongs to another layer's adapter."""
        return bool(self._owners)

    def operands(self) -> Operands:
        """The adapter in the form that `peft_linear` takes; the errors of `tensors`."""
        return Operands.of(self.config, self.tensors(), self.training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *found: Any) -> None:
        # PEFT loads with strict=False, so an adapter of another configuration would be loaded in part.
        given = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        own = set(self.state_dict(keep_vars=True))  # of a pruned parameter the mask too
        if given and given != own:
            found[-1].append(
                f"{prefix.removesuffix('.')}: the state has {_listed(given)}, and this adapter {_listed(own)}: it "
                "comes from another configuration"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *found)

    def extra_repr(self) -> str:
        shared = f", shared: {_listed(self._owners)}" if self._owners else ""
        return f"{_listed(self._names)}, rank={self.config.rank}, scale={self.config.scale:g}{shared}"


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
