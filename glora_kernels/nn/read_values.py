"""The values that an expression in a module's code may have, as `nn.reads` evaluates it: a set.

Modules and strings stand for themselves (`*` in a string is an unknown part); a list, iterator or dictionary is
represented by its elements; every other value by a class of this module.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from glora_kernels.nn.base import is_linear

Values = frozenset
NOTHING: Values[Any] = frozenset()


@dataclass(frozen=True)
class Tensors:
    """Any parameter or buffer that belongs to the module directly."""

    module: nn.Module


@dataclass(frozen=True)
class Function:
    """A function with bound arguments: `given` (the module of a method, those of a partial) and `named`.

    A function defined inside the code that is read also has its syntax tree (`node`) and the scope around it (`outer`).
    """

    function: types.FunctionType
    given: tuple[Values[Any], ...] = ()
    named: tuple[tuple[str, Values[Any]], ...] = ()
    node: Any = None
    outer: Any = None


@dataclass(frozen=True, eq=False)
class Held:
    """A class, Python module, `super()` or object that holds modules; compared by identity, not by its own `==`."""

    item: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self.item is other.item

    def __hash__(self) -> int:
        return id(self.item)


def union(several: Iterable[Values[Any]]) -> Values[Any]:
    return NOTHING.union(*several)


def texts(values: Values[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def elements(values: Values[Any], index: Any = None, names: Iterable[str] = ()) -> Values[Any]:
    """The values from iterating over these, or from an index: an int (None: unknown), or one of `names`.

    These are the modules in containers; and the values themselves, since they may stand for the elements of a list.
    """
    return values | union(_inside(value, index, names) for value in values if isinstance(value, _CONTAINERS))


def _inside(module: nn.Module, index: Any, names: Iterable[str]) -> Values[Any]:
    children = list(module._modules.values())
    if isinstance(index, int) and -len(children) <= index < len(children):
        return Values({children[index]} - {None})
    return children_named(module, names)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def children_named(module: nn.Module, patterns: Iterable[str] = ()) -> Values[Any]:
    """The child modules whose names match one of the patterns; all children where there are no patterns."""
    held = module._modules.items()
    named = {m for name, m in held if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)}
    return Values(named - {None})


def handed_out(module: nn.Module, method: str) -> Values[Any]:
    """The values from a standard method of `nn.Module` or `nn.ModuleDict`; nothing for an overridden or other one."""
    found = getattr(type(module), method, None)
    if found is None or found not in (getattr(nn.Module, method, None), getattr(nn.ModuleDict, method, None)):
        return NOTHING
    match method.removeprefix("named_"):
        case "children" | "values" | "items":
            return children_named(module)
        case "modules":
            return Values(module.modules())
        case "keys":
            return Values(module._modules)
        case "parameters" | "buffers" | "state_dict":
            return Values(Tensors(inner) for inner in module.modules() if inner._parameters)
    return NOTHING


def of_object(found: Any, depth: int = 0) -> Values[Any]:
    """The values that represent a Python object to which code refers."""
    if isinstance(found, (types.FunctionType, functools.partial)):
        found = inspect.unwrap(found)
    match found:
        case nn.Module():
            return Values({found})
        case list() | tuple() | set() | dict():
            held = found.values() if isinstance(found, dict) else found
            kinds = (nn.Module, list, tuple, set, dict)
            deep = depth > 2 or len(held) >= 10_000
            return NOTHING if deep else union(of_object(one, depth + 1) for one in held if isinstance(one, kinds))
        case types.MethodType():
            return bound(found.__func__, found.__self__)
        case functools.partial():
            return bound(found.func, *found.args, **found.keywords)
        case staticmethod():
            return of_object(found.__func__)
        case types.FunctionType():
            return Values({Function(found)})
    holds = any(isinstance(value, nn.Module) for value in getattr(found, "__dict__", {}).values())
    return Values({Held(found)}) if holds or isinstance(found, (type, types.ModuleType)) else NOTHING


def bound(function: Any, *given: Any, **named: Any) -> Values[Any]:
    """A function with its first arguments bound.

    Nothing for methods that every nn.Module has, and for the forward of a linear layer, which is as good as calling it.
    """
    if given and isinstance(given[0], nn.Module):
        is_call = is_linear(given[0]) and function is type(given[0]).forward
        if is_call or function in vars(nn.Module).values():
            return NOTHING
    first = tuple(map(of_object, given))
    words = tuple((name, of_object(value)) for name, value in sorted(named.items()))
    functions = [value for value in of_object(function) if isinstance(value, Function)]
    return Values(Function(f.function, (*first, *f.given), (*f.named, *words)) for f in functions)


def member(found: Any, holder: Any) -> Values[Any]:
    """The value of a class attribute looked up on an instance: a method is bound to it."""
    if isinstance(found, classmethod):
        found = found.__func__
    return of_object(found) if isinstance(found, staticmethod) or not callable(found) else bound(found, holder)
