"""What an expression in a module's code may be, as far as `nn.reads` follows it: a set of values.

A module and a text stand for themselves (in a text `*` is what is not known); a list, an iterator or a dictionary is
whatever is in it; every other value is of a class here.
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
    """Parameters or buffers that a module itself has."""

    module: nn.Module


@dataclass(frozen=True)
class Function:
    """A function, the first of its arguments (of a method the module, of a partial what it holds), and words.

    One inside of the code that is read has a syntax tree (`node`) and the scope `outer` around it.
    """

    function: types.FunctionType
    given: tuple[Values[Any], ...] = ()
    named: tuple[tuple[str, Values[Any]], ...] = ()
    node: Any = None
    outer: Any = None


@dataclass(frozen=True, eq=False)
class Held:
    """A class, a Python module, a `super()`, an object that holds modules; equal by identity, whatever it says."""

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
    """What iterating over the values gives, or an index: an int, or what its text may be; None where it is not known.

    Of a container of modules what is in it; and the values themselves, which may be those in a list.
    """
    return values | union(_inside(value, index, names) for value in values if isinstance(value, _CONTAINERS))


def _inside(module: nn.Module, index: Any, names: Iterable[str]) -> Values[Any]:
    children = list(module._modules.values())
    if isinstance(index, int) and -len(children) <= index < len(children):
        return Values({children[index]} - {None})
    return children_named(module, names)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def children_named(module: nn.Module, patterns: Iterable[str] = ()) -> Values[Any]:
    """The modules directly inside whose names fit one of the patterns; all where there are none."""
    held = module._modules.items()
    named = {m for name, m in held if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)}
    return Values(named - {None})


def handed_out(module: nn.Module, method: str) -> Values[Any]:
    """What a method of every module, or of a container of modules, hands out; nothing of any other."""
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
    """What a Python object that code names is."""
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
    """A function with its first arguments; nothing of what every module has, nor where it is as good as a call."""
    if given and isinstance(given[0], nn.Module):
        is_call = is_linear(given[0]) and function is type(given[0]).forward
        if is_call or function in vars(nn.Module).values():
            return NOTHING
    first = tuple(map(of_object, given))
    words = tuple((name, of_object(value)) for name, value in sorted(named.items()))
    functions = [value for value in of_object(function) if isinstance(value, Function)]
    return Values(Function(f.function, (*first, *f.given), (*f.named, *words)) for f in functions)


def member(found: Any, holder: Any) -> Values[Any]:
    """What an attribute of a class is to an instance: a method bound to it."""
    if isinstance(found, classmethod):
        found = found.__func__
    return of_object(found) if isinstance(found, staticmethod) or not callable(found) else bound(found, holder)
