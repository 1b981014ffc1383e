"""What tests in a module's code come to, where they ask for settings that the module has (for `nn.reads`)."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from glora_kernels.nn.read_values import Values

ValueOf = Callable[[ast.expr], Values[Any]]


class _Unknown:
    """A setting that is not known."""


_COMPARED: Mapping[type, Any] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.Lt: operator.lt, ast.Gt: operator.gt, ast.LtE: operator.le, ast.GtE: operator.ge,
}  # fmt: skip


def decided(node: ast.expr, value_of: ValueOf) -> bool | None:
    """What a test comes to, where it asks for plain settings of modules (not `training`); else None."""
    if isinstance(node, ast.BoolOp):
        parts = [decided(part, value_of) for part in node.values]
        stops = isinstance(node.op, ast.Or)
        return stops if stops in parts else None if None in parts else not stops
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = decided(node.operand, value_of)
        return None if inner is None else not inner
    sides = [node]
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
    settings = [_setting(side, value_of) for side in sides]
    if any(isinstance(setting, _Unknown) for setting in settings):
        return None
    if not isinstance(node, ast.Compare):
        return bool(settings[0])
    compare = _COMPARED.get(type(node.ops[0]))
    numbers = all(isinstance(setting, (int, float)) for setting in settings)
    if (
        len(settings) != 2
        or compare is None
        or (not numbers and isinstance(node.ops[0], (ast.Lt, ast.Gt, ast.LtE, ast.GtE)))
    ):
        return None
    return bool(compare(*settings))


def _setting(node: ast.expr, value_of: ValueOf) -> Any:
    """A number, text or None that an expression is, from the attributes of modules and their `config`."""
    if isinstance(node, ast.Constant):
        return node.value
    if not isinstance(node, ast.Attribute) or node.attr == "training":
        return _Unknown()
    inner = node.value
    found: Any = _Unknown()
    through = isinstance(inner, ast.Attribute) and inner.attr == "config"
    owners = value_of(inner.value if through else inner)  # type: ignore[attr-defined]
    for kind, item, *_ in owners:
        if kind != "module" or len(owners) > 1:
            return _Unknown()
        held = vars(item.item).get("config") if through else item.item
        if through:
            found = getattr(held, node.attr, found)
        elif node.attr in vars(held):
            found = vars(held)[node.attr]
        elif node.attr in held._modules and held._modules[node.attr] is None:
            found = None
    return found if isinstance(found, (bool, int, float, str, type(None))) else _Unknown()
