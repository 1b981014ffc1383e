"""The supernet: a model whose layers hold every configuration of a space at once, and are trained by samples of it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glora_kernels.nn.adapted import Frozen, base_linear
from glora_kernels.nn.file import host_copy, memory_of
from glora_kernels.nn.inject import inject
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.merging.models import unload
from glora_kernels.nn.merging.values import Kept, ToMerge, merged
from glora_kernels.nn.model import named_layers, trained_of, unwrap
from glora_kernels.nn.targets import linears
from glora_kernels.search import entangled
from glora_kernels.search.evolution import Drawing, check_probability
from glora_kernels.search.space import Candidate, LayerShape, SearchSpace
from glora_kernels.spec import GLoRAConfig, assign

Per = Literal["row", "batch"]


class Supernet(nn.Module):
    """Every configuration of a search space in one model: each layer holds the largest, the others are parts of it.

    A configuration of rank r is the first r columns of `_up` and rows of `_down`, a vector the first column of `_up`, a
    constant its first element. So training one trains parts of all others. Calls are made inside `sample`:

        net = gk.Supernet(model, gk.SearchSpace(), target_modules="all-linear", train=["head"])
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        for x, target in batches:
            with net.sample(rows=len(x)):            # a configuration of every layer for each example
                criterion(net(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        search = gk.Search(net, evaluate, max_parameters=50_000)
        search.run()
        model = net.extract(search.best)

    A batch costs the products of one configuration, however many it holds. The drawing is exact across a restart: its
    state is part of the state dict.

    Args:
        model: as in `inject`, which takes it; changed in place.
        space: of every layer, or a mapping pattern → space as for `inject`; a layer whose space is None is left alone.
        target_modules, train, adapter_dtype, exclude_modules: as in `inject`.
        seed: of the drawing.
        unsampled: what a step does to parameters that no example of the batch has. "skip": they get no gradient, and an
            optimizer leaves them alone; "decay": zeros, so that momentum and weight decay move them, as in the paper's
            code.

    Attributes:
        spaces: the space of each layer, by path.
        shapes: of the layers, by path.

    Raises:
        ValueError: a space that allows a layer nothing but one configuration without parameters, `unsampled` of another
            kind, and the errors of `inject`.

    Source: Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023.
    """

    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace | Mapping[str, SearchSpace | None],
        target_modules: str | Iterable[str] | None = None,
        train: str | Iterable[str] = (),
        adapter_dtype: torch.dtype | None = None,
        *,
        exclude_modules: str | Iterable[str] = (),
        seed: int = 0,
        unsampled: Literal["skip", "decay"] = "skip",
    ) -> None:
        super().__init__()
        if unsampled not in ("skip", "decay"):
            raise ValueError(f"unsampled must be 'skip' or 'decay', got {unsampled!r}")
        spaces: Any = {"*": space} if isinstance(space, SearchSpace) else space
        if not isinstance(spaces, Mapping):
            raise TypeError(f"space must be a SearchSpace or a mapping of patterns to them, got {type(space).__name__}")
        for pattern, own in spaces.items():
            if own is not None and not isinstance(own, SearchSpace):
                raise TypeError(f"space[{pattern!r}] must be a SearchSpace or None, got {type(own).__name__}")
        paths = {path for linear in linears(unwrap(model)) for path in linear.paths}
        largest = {pattern: None if own is None else own.largest for pattern, own in spaces.items()}
        self.model: nn.Module = inject(
            model, largest, target_modules, train, adapter_dtype, exclude_modules=exclude_modules
        )
        self._layers = named_layers(unwrap(self.model))
        if others := [path for path, layer in self._layers.items() if not layer.is_linear]:
            kind = "a parameter of experts" if self._layers[others[0]].experts else "a convolution"
            unload(self.model)
            raise ValueError(
                f"Supernet: {others[0]!r} is {kind}, whose rows cannot have a configuration each; name linear layers "
                "in target_modules"
            )
        patterns = assign(spaces, paths)
        self.spaces: dict[str, SearchSpace] = {path: spaces[patterns[path]] for path in self._layers}
        self.shapes = {
            path: LayerShape(layer.in_features, layer.out_features, layer.base_bias is not None)
            for path, layer in self._layers.items()
        }
        self._decays = unsampled == "decay"
        self._adapter_dtype = adapter_dtype
        self._random = random.Random(seed)
        for layer in self._layers.values():
            layer._rows = _OUTSIDE

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's; the errors of the model, and a RuntimeError outside `sample` and `use`."""
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def sample(
        self,
        rows: int = 1,
        per: Per = "row",
        candidates: Sequence[Candidate] | None = None,
        *,
        switch_off: float = 0.0,
        max_parameters: int | None = None,
    ) -> Iterator[list[dict[str, GLoRAConfig]]]:
        """Inside, the model computes random configurations, each form and rank of each layer with equal probability.

        Call backward inside where activations are checkpointed.

        Args:
            rows: B, how many examples a batch has.
            per: "row": every example has a configuration of its own; "batch": all have one, as in the paper.
            candidates: B configurations of the model to compute in the place of random ones.
            switch_off, max_parameters: as in `Search`: how often a layer is left alone, and the most parameters of a
                candidate. With the search's values, the supernet is trained on what its generation 0 draws from: where
                the limit is far below what every layer could have, candidates that keep it have few layers, and those
                are trained well only if they are drawn.

        Returns:
            The candidates: B of them, or one.

        Raises:
            ValueError: an argument or a candidate that cannot be, or a limit that the smallest candidate does not keep;
                a layer called with another number of examples.
            RuntimeError: inside another `sample` or `use`.
        """
        if per not in ("row", "batch"):
            raise ValueError(f"per must be 'row' or 'batch', got {per!r}")
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows must be an integer >= 1, the number of examples of a batch; got {rows!r}")
        if candidates is not None and (switch_off or max_parameters is not None):
            raise ValueError("switch_off and max_parameters only say what is drawn, and candidates are given")
        if candidates is None:
            drawing = Drawing(self.spaces, self.shapes, check_probability("switch_off", switch_off), max_parameters)
            keys = [drawing.draw(self._random) for _ in range(rows if per == "row" else 1)]
            drawn = [dict(zip(self.spaces, key, strict=True)) for key in keys]
        else:
            drawn = [self._checked(candidate) for candidate in candidates]
            if not drawn:
                raise ValueError("candidates is empty; give one for each example")
        told = {path: _Sampled(path, [candidate[path] for candidate in drawn], self._decays) for path in self._layers}
        with self._told(told):
            yield drawn

    @contextlib.contextmanager
    def use(self, candidate: Candidate) -> Iterator[nn.Module]:
        """Inside, the model computes one candidate, for evaluation: W_eff is built once, calls cost the frozen layer's.

        For the time it holds the merged weights beside the others. No gradients reach the supernet.

        Returns:
            The model.

        Raises:
            ValueError: a candidate that is not in the space; the message names the layer.
            RuntimeError: inside another `sample` or `use`.
        """
        own = self._checked(candidate)
        with self._told({path: _Merged(own[path]) for path in self._layers}):
            yield self.model

    def extract(self, candidate: Candidate) -> nn.Module:
        """A model with the layers of one candidate as `inject` makes them, and the supernet's values; a copy.

        Train it on, save it by `save_adapter`, `merge` it; layers whose configuration is empty are plain. The modules
        of `train` have the supernet's values. It takes the memory of a second model.

        Raises:
            ValueError: a candidate that is not in the space, or that adapts no layer.
        """
        own = self._checked(candidate)
        chosen = {path: config for path, config in own.items() if not config.is_empty}
        if not chosen:
            raise ValueError("extract: the candidate adapts no layer: that is the model before it was made a supernet")
        layers = named_layers(unwrap(copied := copy.deepcopy(self.model)))
        values = {
            path: {name: t.detach().clone() for name, t in entangled.part_of(layers[path].adapter(), config).items()}
            for path, config in chosen.items()
        }
        whole = {path: copy.deepcopy(module.state_dict()) for path, module in trained_of(unwrap(copied)).items()}
        model = inject(unload(copied), dict(chosen), list(chosen), list(whole), self._adapter_dtype)
        with torch.no_grad():
            for path, layer in named_layers(unwrap(model)).items():
                for name, parameter in layer.adapter().items():
                    parameter.copy_(values[path][name])
        for path, state in whole.items():  # in fp32, where unloading has rounded them
            unwrap(model).get_submodule(path).load_state_dict(state)
        return model

    def fingerprint(self) -> str:
        """SHA-256 of the trained values: of the adapters, and of modules trained whole."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.named_parameters()):
            if parameter.requires_grad:
                digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
                values = host_copy(parameter)  # held while its memory is read
                digest.update(memory_of(values))
        return digest.hexdigest()

    def get_extra_state(self) -> Tensor:
        """The state of the drawing."""
        return torch.tensor(self._random.getstate()[1])

    def set_extra_state(self, state: Tensor) -> None:
        self._random.setstate((random.Random.VERSION, tuple(state.tolist()), None))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for layer in self._layers.values():
            layer._rows = _OUTSIDE

    def _checked(self, candidate: Candidate) -> dict[str, GLoRAConfig]:
        """A candidate in canonical form."""
        if not isinstance(candidate, Mapping):
            raise TypeError(f"a candidate must be a mapping path → GLoRAConfig, got {type(candidate).__name__}")
        if wrong := sorted(candidate.keys() ^ self.spaces.keys()):
            has = "lacks" if wrong[0] in self.spaces else "has"
            raise ValueError(f"a candidate must have a configuration of each of the {len(self.spaces)} layers of the "
                             f"supernet; it {has} {wrong[0]!r}")  # fmt: skip
        found = {}
        for path, space in self.spaces.items():
            try:
                found[path] = space.canonical(candidate[path], self.shapes[path])
            except (TypeError, ValueError) as error:
                raise type(error)(f"the candidate's {path!r}: {error}") from None
        return found

    @contextlib.contextmanager
    def _told(self, told: Mapping[str, Any]) -> Iterator[None]:
        if any(layer._rows is not _OUTSIDE for layer in self._layers.values()):
            raise RuntimeError("sample or use was entered inside another one of the same supernet")
        try:
            for path, layer in self._layers.items():
                layer._rows = told[path]
            yield
        finally:
            for layer in self._layers.values():
                layer._rows = _OUTSIDE


class _Told:
    """What a layer of a supernet is told: what to compute."""

    inside = "a Supernet; leave its context, or take extract(candidate)"


class _Outside(_Told):
    """Outside `sample` and `use`."""

    def linear(self, layer: GLoRALinear, x: Tensor, base: Frozen) -> Tensor:
        raise RuntimeError(
            "a Supernet computes configurations that it is told: call it inside `with net.sample(rows=len(x)):`, or "
            "`with net.use(candidate):`"
        )

    def __reduce__(self) -> str:
        return "_OUTSIDE"


_OUTSIDE = _Outside()


class _Sampled(_Told):
    """By `sample`: the configuration of each example, or of all."""

    def __init__(self, path: str, configs: list[GLoRAConfig], decays: bool) -> None:
        self.path, self.configs, self.decays = path, configs, decays
        self.is_one = all(config == configs[0] for config in configs)

    def linear(self, layer: GLoRALinear, x: Tensor, base: Frozen) -> Tensor:
        if len(self.configs) > 1 and (x.ndim < 2 or len(x) != len(self.configs)):
            raise ValueError(
                f"sample: rows={len(self.configs)}, but {self.path!r} was called with an x of shape {tuple(x.shape)}: "
                "rows is the number of examples, and a layer must have them in front"
            )
        adapter = layer.adapter()
        if self.is_one:
            y = entangled.alone(x, base, adapter, self.configs[0], layer.training)
        else:
            y = entangled.mixed(x, base, adapter, self.configs)
        if self.decays and torch.is_grad_enabled():
            y = y + sum((0.0 * parameter.sum()).to(y.dtype) for parameter in adapter.values())
        return y


class _Merged(_Told):
    """By `use`: a configuration, whose merged weight is built at its first call."""

    def __init__(self, config: GLoRAConfig) -> None:
        self.config = config
        self._merged: tuple[Tensor, Tensor | None] | None = None

    @torch.no_grad()
    def linear(self, layer: GLoRALinear, x: Tensor, base: Frozen) -> Tensor:
        if self.config.is_empty:
            return base_linear(x, base)
        if self._merged is None:
            own = ToMerge(
                layer, Kept(layer.weight, layer.bias, layer.quant_state),
                [(entangled.part_of(layer.adapter(), self.config), self.config)],
            )  # fmt: skip
            (weight, bias, _), _ = merged(own, dense=True)
            self._merged = (weight.t() if layer._transposed else weight), bias
        weight, bias = self._merged
        return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
