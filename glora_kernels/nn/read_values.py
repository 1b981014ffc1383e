"""What an expression in a module's code may be: modules, their tensors, sequences of those, functions (for `nn.reads`).

A value is a tuple: ("module", ref), ("tensor", ref of its module), ("sequence", values), ("text", pattern),
("bound", name of a method of every module, ref), ("super", ref, class), ("function", function, ref or None),
("local", ref of the node, ref of the scope), ("partial", values, given, named), ("object", ref); of a mapping's methods
("paired" and "again", values).
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from glora_kernels.nn.base import is_linear

HARMLESS = frozenset({
    "CB", "SCB", "__class__", "data_ptr", "device", "dim", "dtype", "element_size", "get_device", "grad",
    "grad_fn", "is_complex", "is_contiguous", "is_cuda", "is_floating_point", "is_leaf", "is_meta", "itemsize",
    "layout", "names", "nbytes", "ndim", "ndimension", "nelement", "new_empty", "new_full", "new_ones", "new_tensor",
    "new_zeros", "numel", "quant_state", "requires_grad",
    "shape", "size", "stride", "type",
})  # fmt: skip
"""What a tensor is asked for that has nothing of its values."""

LIKE = frozenset({
    "bool", "callable", "empty_like", "finfo", "full_like", "has_torch_function", "has_torch_function_unary",
    "has_torch_function_variadic", "hasattr", "id", "is_floating_point", "is_parameter", "is_tensor",
    "isinstance", "issubclass", "len", "numel", "ones_like", "print", "rand_like", "randn_like",
    "register_hook", "repr", "size", "str", "to", "type", "type_as", "zeros_like",
})  # fmt: skip
"""Functions that ask what a tensor is and take no value of it."""

SEQUENCES = frozenset({"list", "tuple", "set", "frozenset", "sorted", "reversed", "iter", "filter"})
"""Functions that give the elements of what they are given."""

PAIRED = frozenset({"named_children", "named_modules", "named_parameters", "named_buffers", "items"})
"""Those whose elements are pairs of a name and what it names."""


FOLLOWED = ("function", "local", "partial")
"""Kinds of values whose code is read where they are called."""

ANY = "*"
"""The name under which a call has what any of its arguments may be (*args, **kwargs)."""


class Ref:
    """An object by identity, whatever its class says of equality."""

    __slots__ = ("item",)

    def __init__(self, item: Any) -> None:
        self.item = item

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and self.item is other.item

    def __hash__(self) -> int:
        return id(self.item)


Values = frozenset
NOTHING: Values[Any] = frozenset()


MODULE_METHODS = frozenset({
    "buffers", "children", "get_parameter", "get_submodule", "modules", "named_buffers", "named_children",
    "named_modules", "named_parameters", "parameters", "state_dict",
})  # fmt: skip
"""Methods of every module that hand out modules or tensors."""


def of_method(name: str, module: nn.Module, given: list[Values[Any]]) -> Values[Any]:
    """What the methods of `nn.Module` that hand out modules and tensors return."""
    if name in ("get_submodule", "get_parameter"):
        paths = [text for kind, text in (given[0] if given else ()) if kind == "text"]
        wanted = [path if name == "get_submodule" else path.rpartition(".")[0] for path in paths]
        found = [inner for path, inner in module.named_modules() if path in wanted]
        return modules_of(found) if name == "get_submodule" else Values({("tensor", Ref(inner)) for inner in found})
    if name in ("children", "named_children", "values", "items"):
        inside = modules_of(module._modules.values())
    elif name in ("modules", "named_modules"):
        inside = modules_of(module.modules())
    elif name == "keys":
        inside = Values({("text", key) for key in module._modules})
    else:
        inside = Values({("tensor", Ref(inner)) for inner in module.modules() if inner._parameters})
    return Values({("sequence", Values({("sequence", inside)}) if name in PAIRED else inside)})


def elements(values: Values[Any]) -> Values[Any]:
    """What iterating over the values gives."""
    found: Values[Any] = NOTHING
    for value in values:
        if value[0] in ("sequence", "again"):
            found |= value[1]
        elif value[0] == "module":
            module = value[1].item
            names = isinstance(module, nn.ModuleDict)
            found |= (
                Values({("text", key) for key in module._modules}) if names else modules_of(module._modules.values())
            )
        elif value[0] == "tensor":
            found |= {value}
    return found


def modules_of(found: Iterable[nn.Module | None]) -> Values[Any]:
    return Values({("module", Ref(module)) for module in found if module is not None})


def children_of(module: nn.Module, names: list[str]) -> Iterator[nn.Module | None]:
    """The modules directly inside by name or pattern; all where no name is known."""
    for name, child in module._modules.items():
        if not names or any(fnmatchcase(name, text) for text in names):
            yield child


def matters(value: Any) -> bool:
    return value[0] in ("module", "tensor") or (value[0] in ("sequence", "again") and any(map(matters, value[1])))


def of_object(found: Any, depth: int = 0) -> Values[Any]:
    """What a Python object that code names is: a module, several in plain containers, a function, a namespace."""
    if isinstance(found, nn.Module):
        return modules_of([found])
    if isinstance(found, (list, tuple, set, dict)):
        held = found.values() if isinstance(found, dict) else found
        if len(found) >= 10_000 or depth > 2:
            return NOTHING
        inside = frozenset().union(*(of_object(one, depth + 1) for one in held if isinstance(one, _HELD)))
        inside = Values(value for value in inside if matters(value))
        return Values({("sequence", inside)}) if inside else NOTHING
    if isinstance(found, types.MethodType):
        if isinstance(found.__self__, nn.Module):
            return method_of(found.__func__, found.__self__)
        return _bound(of_object(found.__func__), found.__self__)
    if isinstance(found, functools.partial):
        if wrapped := getattr(found, "__wrapped__", None):
            return of_object(wrapped)
        named = tuple(sorted((name, of_object(value)) for name, value in found.keywords.items()))
        return Values({("partial", of_object(found.func), tuple(map(of_object, found.args)), named)})
    if isinstance(found, staticmethod):
        found = found.__func__
    if isinstance(found, types.FunctionType):
        inner = inspect.unwrap(found)
        if isinstance(inner, types.MethodType):
            return of_object(inner)
        return Values({("function", inner, None)}) if isinstance(inner, types.FunctionType) else NOTHING
    holder = any(isinstance(value, nn.Module) for value in getattr(found, "__dict__", {}).values())
    return Values({("object", Ref(found))}) if holder or isinstance(found, (type, types.ModuleType)) else NOTHING


_HELD = (nn.Module, list, tuple, set, dict)


def _bound(functions: Values[Any], receiver: Any) -> Values[Any]:
    """Functions with their first argument, which is no module."""
    return Values({("partial", functions, (of_object(receiver),), ())}) if functions else NOTHING


def of_member(holder: Any, name: str) -> Values[Any]:
    """What an attribute of a class, a Python module or an object that holds modules is."""
    found = inspect.getattr_static(holder, name, None)
    plain = isinstance(found, types.FunctionType) and not isinstance(holder, (type, types.ModuleType))
    if plain or isinstance(found, classmethod):
        return _bound(of_object(found.__func__ if isinstance(found, classmethod) else found), holder)
    return of_object(found)


def holds(function: types.FunctionType) -> bool:
    """Whether a function has modules, or other functions, in the cells of its closure."""
    for cell in function.__closure__ or ():
        try:
            if any(matters(value) or value[0] in FOLLOWED for value in of_object(cell.cell_contents)):
                return True
        except ValueError:  # a cell that was never filled
            continue
    return False


def method_of(found: Any, module: nn.Module) -> Values[Any]:
    """A function of a class, bound to a module; none of those that every module has."""
    if isinstance(found, staticmethod):
        return of_object(found)
    if isinstance(found, classmethod):  # of what a class has
        found = found.__func__
    function = inspect.unwrap(found) if callable(found) else None
    if isinstance(function, types.MethodType):
        return of_object(function)
    if not isinstance(function, types.FunctionType) or found in vars(nn.Module).values():
        return NOTHING
    if is_linear(module) and found is type(module).forward:  # as good as a call
        return NOTHING
    return Values({("function", function, Ref(module))})


def class_attribute(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def owner_of(kind: type | None, function: Any) -> type | None:
    """The class of the ancestry that has the function, for `super()`."""
    for base in kind.__mro__ if kind is not None else ():
        held = vars(base).get(function.__name__)
        held = getattr(held, "__func__", held.fget if isinstance(held, property) else held)
        if held is function or (callable(held) and inspect.unwrap(held) is function):
            return base
    return None


def is_torchs(function: Any) -> bool:
    return function.__module__ is None or function.__module__.split(".")[0] in ("torch", "builtins")


def picked_by(node: ast.expr) -> int | None:
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    return sign * node.value if isinstance(node, ast.Constant) and type(node.value) is int else None
