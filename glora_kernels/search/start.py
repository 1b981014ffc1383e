"""The hand-picked candidates that a search begins with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from glora_kernels.nn.named import NONE
from glora_kernels.search.evolution import Key
from glora_kernels.search.space import LayerShape, SearchSpace, assigned, parameters
from glora_kernels.spec import GLoRAConfig

HandPicked = GLoRAConfig | Mapping[str, GLoRAConfig | None]
"""One configuration for all layers, or a mapping as `inject` takes; a candidate is one."""


def hand_picked(
    start: Iterable[HandPicked] | Mapping[str, HandPicked],
    spaces: Mapping[str, SearchSpace],
    shapes: Mapping[str, LayerShape],
    limit: int | None,
) -> dict[str, Key]:
    """The candidates of `start` by name, in canonical form.

    Raises:
        ValueError: one is not in the space (the message names the layer and what is accepted), is above the limit, or
            equals another.
        TypeError: `start` is a candidate itself, or something in it is none.
    """
    if isinstance(start, GLoRAConfig) or (isinstance(start, Mapping) and not spaces.keys().isdisjoint(start)):
        raise TypeError("start takes a list of candidates, or a mapping of names to them; got one candidate")
    named = start if isinstance(start, Mapping) else {f"start[{i}]": given for i, given in enumerate(start)}
    found: dict[str, Key] = {}
    for name, given in named.items():
        key = _key(name, given, spaces, shapes)
        size = sum(parameters(config, shape) for config, shape in zip(key, shapes.values(), strict=True))
        if limit is not None and size > limit:
            raise ValueError(f"start: {name!r} has {size} parameters; max_parameters={limit} are accepted")
        if twin := next((other for other, its in found.items() if its == key), None):
            raise ValueError(f"start: {twin!r} and {name!r} are the same candidate")
        found[name] = key
    return found


def _key(name: str, given: HandPicked, spaces: Mapping[str, SearchSpace], shapes: Mapping[str, LayerShape]) -> Key:
    if isinstance(given, GLoRAConfig):
        given = {"*": given}
    if not isinstance(given, Mapping):
        raise TypeError(f"start: {name!r} must be a GLoRAConfig or a candidate, got {type(given).__name__}")
    patterns = assigned(f"start: {name!r}", given, spaces)
    configs = []
    for path, space in spaces.items():
        chosen = given[patterns[path]] if path in patterns else None
        try:
            configs.append(space.canonical(NONE if chosen is None else chosen, shapes[path]))
        except (ValueError, TypeError) as error:
            raise type(error)(f"start: {name!r}, layer {path!r}: {error}") from error
    return tuple(configs)
