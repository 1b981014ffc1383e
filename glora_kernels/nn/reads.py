"""Finding modules whose weights are read by a parent's code without a call, so that an adapter would have no effect.

A parent that reads a weight itself (`F.linear(x, self.q_proj.weight)`, a fused path) bypasses the layer that replaced
the module, and gets the base alone. This is found by static analysis of the parents' code (`nn.read_code`): `forward`
and whatever it reaches through methods, properties, `super()`, local names and functions that are given the module,
evaluated with the modules that are really there. Asking a weight for its dtype, device or shape does not count.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import operator
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from glora_kernels.nn.read_code import parsed
from glora_kernels.nn.read_values import (
    NOTHING,
    Function,
    Held,
    Tensors,
    Values,
    bound,
    children_named,
    elements,
    handed_out,
    member,
    of_object,
    texts,
    union,
)

_HARMLESS = frozenset({
    "CB", "SCB", "__class__", "data_ptr", "device", "dim", "dtype", "element_size", "get_device", "grad", "grad_fn",
    "itemsize", "layout", "names", "nbytes", "ndim", "ndimension", "nelement", "numel", "quant_state", "requires_grad",
    "shape", "size", "stride", "type",
})  # fmt: skip
"""Tensor attributes that reveal no values, so that reading them is harmless. Names in `is_` or `new_` count as well."""

_ASKING = frozenset({
    "bool", "callable", "finfo", "id", "len", "numel", "print", "register_hook", "repr", "size", "str", "to", "type",
    "type_as",
})  # fmt: skip
"""Functions that use no values of a tensor argument; those named is..., has... and ..._like count as well."""

_HANDING = frozenset({
    "cast", "dict", "enumerate", "filter", "frozenset", "iter", "list", "next", "reversed", "set", "sorted", "tuple",
    "zip",
})  # fmt: skip
"""Functions that return their arguments, or elements of these."""

_OF_LISTS = frozenset({
    "append", "copy", "extend", "get", "index", "insert", "items", "keys", "pop", "setdefault", "update", "values",
})  # fmt: skip
"""Methods of lists and dictionaries; calling one does not read the tensors in it."""

_COMPARED: Mapping[type, Any] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.Lt: operator.lt, ast.Gt: operator.gt, ast.LtE: operator.le, ast.GtE: operator.ge,
}  # fmt: skip
_ANY = "*"
"""The key, among a call's keyword arguments, for values that any argument may have (from *args, **kwargs)."""
_DEPTH = 16
"""The depth to which calls are followed."""


class Read(NamedTuple):
    """Where a weight is read: the name of the function, and its file."""

    reader: str
    place: str

    def __str__(self) -> str:
        return f"{self.reader} ({self.place}) reads its weight without calling it"


def reads(root: nn.Module, passed: Collection[nn.Module] = ()) -> dict[nn.Module, Read]:
    """The modules inside `root` whose parameters are read by the code of a module around them, and where.

    passed: modules whose own code is not analysed.
    """
    found: dict[nn.Module, Read] = {}
    for module in root.modules():
        if module not in passed and module._modules and "_orig_mod" not in module._modules:
            own = set(module.modules()) - {module}
            found |= {inner: read for inner, read in _Reader().run(module).items() if inner in own - found.keys()}
    return found


def read_by(module: nn.Module, method: str) -> set[nn.Module]:
    """The modules inside `module` whose parameters a method of its class reads without calling them."""
    reader = _Reader()
    reader.follow(member(inspect.getattr_static(type(module), method), module))
    return reader.found.keys() & set(module.modules()) - {module}


class _Scope:
    """The names in a function and the values each may have; `outer` is the scope around a local function."""

    def __init__(self, function: types.FunctionType, outer: _Scope | None = None) -> None:
        self.function, self.outer = function, outer
        self.names: dict[str, Values[Any]] = {}
        self.returned: Values[Any] = NOTHING

    def look_up(self, name: str) -> Values[Any]:
        if name in self.names:
            return self.names[name]
        if self.outer is not None:
            return self.outer.look_up(name)
        cells = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=False))
        if name in cells:
            try:
                return of_object(cells[name].cell_contents)
            except ValueError:  # a cell that was never filled
                return NOTHING
        return of_object(self.function.__globals__.get(name, getattr(builtins, name, None)))


class _Ended(Exception):
    """Raised after a statement that certainly ends the function."""


class _Reader:
    """Analyses the code of one module; `found` collects the modules whose tensors it reads."""

    def __init__(self) -> None:
        self.found: dict[nn.Module, Read] = {}
        self._done: dict[Any, Values[Any]] = {}
        self._stack: list[types.FunctionType] = []

    def run(self, module: nn.Module) -> dict[nn.Module, Read]:
        for name in ("forward", "__call__"):
            self.follow(self._attribute(Values({module}), name))
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            self.follow(of_object(hook), Values({module}))
        return self.found

    def follow(self, functions: Values[Any], *given: Values[Any]) -> None:
        """Analyse calls of functions, and take what they return for read."""
        self._use(self._apply(functions, list(given), {}))

    # Functions.

    def _apply(self, called: Values[Any], given: list[Values[Any]], named: Mapping[str, Values[Any]]) -> Values[Any]:
        """The values that a call of any of these may return; reads on the way are noted.

        Always followed: local functions and those with bound arguments. Other functions: if an argument is a module or
        tensor, or they have a closure. Functions of torch are not followed, except `forward`.
        """
        known = any(isinstance(value, (nn.Module, Tensors)) for value in union((*given, *named.values())))
        result = NOTHING
        for one in called:
            if isinstance(one, Function):
                is_torchs = (one.function.__module__ or "torch").split(".")[0] in ("torch", "builtins")
                plain = not is_torchs or one.function.__name__ == "forward"
                if one.node or one.given or (plain and (known or one.function.__closure__)):
                    node = one.node or parsed(one.function.__code__)
                    scope, words = _Scope(one.function, one.outer), {**dict(one.named), **named}
                    result |= self._body(node, scope, [*one.given, *given], words)
        return result

    def _body(
        self, node: Any, scope: _Scope, given: list[Values[Any]], named: Mapping[str, Values[Any]]
    ) -> Values[Any]:
        """The values that the body of a function may return, in a new scope, for these arguments."""
        key = (node, tuple(given), frozenset(named.items()))
        if key not in self._done and len(self._stack) < _DEPTH:
            self._done[key] = NOTHING
            self._stack.append(scope.function)
            self._bind_arguments(node.args, scope, given, named)
            if isinstance(node, ast.Lambda):
                scope.returned = self._value(node.body, scope)
            else:
                self._ends(node.body, scope)
            self._done[key] = scope.returned
            self._stack.pop()
        return self._done.get(key, NOTHING)

    def _bind_arguments(
        self, args: ast.arguments, scope: _Scope, given: list[Values[Any]], named: Mapping[str, Values[Any]]
    ) -> None:
        parameters = [one.arg for one in (*args.posonlyargs, *args.args)]
        spread = named.get(_ANY, NOTHING)
        scope.names.update(zip(parameters, given, strict=False))
        for name in (*parameters[len(given) :], *(one.arg for one in args.kwonlyargs)):
            scope.names[name] = named.get(name, spread)
        if args.vararg:
            scope.names[args.vararg.arg] = spread.union(*given[len(parameters) :])
        if args.kwarg:
            scope.names[args.kwarg.arg] = union(v for name, v in named.items() if name not in parameters)

    # Statements.

    def _ends(self, nodes: Iterable[ast.stmt], scope: _Scope) -> bool:
        """Analyse statements; return whether they certainly end the function."""
        try:
            self._union(nodes, scope)
        except _Ended:
            return True
        return False

    def _assign(self, target: ast.expr, value: ast.expr | None, scope: _Scope) -> None:
        match target, value:
            case (ast.Tuple(names) | ast.List(names), ast.Tuple(parts) | ast.List(parts)) if len(names) == len(parts):
                for name, part in zip(names, parts, strict=True):
                    self._assign(name, part, scope)
            case _:
                self._bind(target, self._value(value, scope), scope)

    def _bind(self, target: ast.expr, values: Values[Any], scope: _Scope) -> None:
        match target:
            case ast.Name(name):  # keep the old values: a branch may not be taken
                scope.names[name] = scope.names.get(name, NOTHING) | values
            case ast.Tuple(names) | ast.List(names):
                for one in names:
                    self._bind(one, elements(values), scope)
            case ast.Starred(name):
                self._bind(name, values, scope)
            case _:
                self._use(values)

    def _branches(self, node: Any, scope: _Scope) -> list[Any]:
        """The branches of an `if` that may be taken."""
        self._value(node.test, scope)
        decided = self._decided(node.test, scope)
        return [node.body, node.orelse] if decided is None else [node.body if decided else node.orelse]

    def _decided(self, node: ast.expr, scope: _Scope) -> bool | None:
        """The result of a test that depends only on plain settings of modules (not `training`); else None."""
        match node:
            case ast.BoolOp(op, values):
                parts = [self._decided(value, scope) for value in values]
                stops = isinstance(op, ast.Or)
                return stops if stops in parts else None if None in parts else not stops
            case ast.UnaryOp(ast.Not(), operand):
                inner = self._decided(operand, scope)
                return None if inner is None else not inner
            case ast.Compare(left, [op], [right]) if type(op) in _COMPARED:
                sides, compare = [left, right], _COMPARED[type(op)]
            case _:
                sides, compare = [node], bool
        try:
            return bool(compare(*[self._setting(side, scope) for side in sides]))
        except (AttributeError, LookupError, TypeError, ValueError):  # no setting, or None < 1
            return None

    def _setting(self, node: ast.expr, scope: _Scope) -> Any:
        """The number, string or None that an attribute of a module or of its `config` has; else an error."""
        if isinstance(node, ast.Constant):
            return node.value
        if not isinstance(node, ast.Attribute) or node.attr == "training":
            raise LookupError
        config = isinstance(node.value, ast.Attribute) and node.value.attr == "config"
        [owner] = self._value(node.value.value if config else node.value, scope)  # type: ignore[attr-defined]
        found = getattr(vars(owner)["config"], node.attr) if config else {**owner._modules, **vars(owner)}[node.attr]
        if not isinstance(found, (bool, int, float, str, type(None))):
            raise LookupError
        return found

    # Expressions.

    def _value(self, node: Any, scope: _Scope) -> Values[Any]:
        """The values that an expression may have; none for a statement. Code that reads tensors leads to `_use`."""
        match node:
            case ast.Name(name):
                return scope.look_up(name)
            case ast.Constant(str() as text):
                return Values({text})
            case ast.JoinedStr(parts):
                return Values({"".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)})
            case ast.Attribute(inner, name):
                return self._attribute(self._value(inner, scope), name)
            case ast.Call():
                return self._call(node, scope)
            case ast.Subscript():
                return self._subscript(node, scope)
            case ast.Dict(_, parts):
                return self._union(parts, scope)
            case ast.Starred(inner):
                return elements(self._value(inner, scope))
            case ast.UnaryOp(ast.Not()) | ast.Compare(ops=[ast.Is() | ast.IsNot() | ast.In() | ast.NotIn(), *_]):
                self._union(ast.iter_child_nodes(node), scope)
            case ast.IfExp():
                return self._union(self._branches(node, scope), scope)
            case ast.NamedExpr(target, inner):
                self._assign(target, inner, scope)
                return self._value(inner, scope)
            case ast.Lambda() | ast.FunctionDef() | ast.AsyncFunctionDef():
                made = Values({Function(scope.function, node=node, outer=scope)})
                if not isinstance(node, ast.Lambda):
                    self._bind(ast.Name(node.name), made, scope)
                self._use(self._apply(made, [], {}))
                return made
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                inner_scope = _Scope(scope.function, scope)
                for part in node.generators:
                    self._bind(part.target, elements(self._value(part.iter, inner_scope)), inner_scope)
                    self._union(part.ifs, inner_scope)
                return self._value(node.value if isinstance(node, ast.DictComp) else node.elt, inner_scope)
            case ast.Yield(inner) | ast.YieldFrom(inner):
                scope.returned |= self._value(inner, scope)
            case ast.stmt() | ast.ExceptHandler() | ast.match_case():
                self._statement(node, scope)
            case ast.BinOp() | ast.UnaryOp() | ast.Compare():
                self._use(self._union(ast.iter_child_nodes(node), scope))
            case ast.AST():  # `or`, `await`, a tuple, ...: any of the parts
                return self._union(ast.iter_child_nodes(node), scope)
        return NOTHING

    def _statement(self, node: Any, scope: _Scope) -> None:
        match node:
            case ast.If():
                ended = [self._ends(branch, scope) for branch in self._branches(node, scope)]
                if all(ended):
                    raise _Ended
            case ast.Return(value):
                scope.returned |= self._value(value, scope)
                raise _Ended
            case ast.Raise():
                raise _Ended
            case ast.Assign(targets, value):
                for target in targets:
                    self._assign(target, value, scope)
            case ast.AnnAssign(target, _, value):
                self._assign(target, value, scope)
            case ast.AugAssign(target, _, value):
                self._use(self._value(target, scope) | self._value(value, scope))
            case ast.For() | ast.AsyncFor():
                self._bind(node.target, elements(self._value(node.iter, scope)), scope)
                self._ends(node.body, scope)
                self._ends(node.orelse, scope)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    self._assign(item.optional_vars or ast.Name(""), item.context_expr, scope)
                self._union(node.body, scope)
            case _:
                for part in ast.iter_child_nodes(node):
                    self._ends([part], scope)  # type: ignore[list-item]

    def _union(self, nodes: Iterable[Any], scope: _Scope) -> Values[Any]:
        return union([self._value(node, scope) for node in nodes])

    def _subscript(self, node: ast.Subscript, scope: _Scope) -> Values[Any]:
        values, names = self._value(node.value, scope), texts(self._value(node.slice, scope))
        if isinstance(node.slice, ast.Slice):
            return values
        if isinstance(node.value, ast.Attribute) and node.value.attr == "_modules":
            return union(
                children_named(m, names) for m in self._value(node.value.value, scope) if isinstance(m, nn.Module)
            )
        try:
            index = ast.literal_eval(node.slice)
        except ValueError:
            index = None
        return elements(values, index, names)

    def _attribute(self, values: Values[Any], name: str) -> Values[Any]:
        found = NOTHING
        for value in values:
            match value:
                case Tensors() if name == "data" or name in _OF_LISTS:
                    found |= {value}
                case Tensors() if name not in _HARMLESS and not name.startswith(("is_", "new_")):
                    self._use(Values({value}))
                case nn.Module():
                    found |= self._of_module(value, name)
                case Held(holder) if isinstance(holder, super):
                    parent: Any = holder
                    kinds = type(parent.__self__).__mro__
                    after = kinds[kinds.index(parent.__thisclass__) + 1 :]
                    found |= member(next((vars(k)[name] for k in after if name in vars(k)), None), parent.__self__)
                case Held(holder):
                    kept = inspect.getattr_static(holder, name, None)
                    plain = isinstance(holder, (type, types.ModuleType)) and not isinstance(kept, classmethod)
                    found |= of_object(kept) if plain or name in vars(holder) else member(kept, holder)
        return found

    def _of_module(self, module: nn.Module, name: str) -> Values[Any]:
        if name in ("_modules", "_parameters", "_buffers"):
            return children_named(module) if name == "_modules" else Values({Tensors(module)})
        if name in module._modules:
            return Values({module._modules[name]} - {None})
        if name in module._parameters or name in module._buffers:
            return Values({Tensors(module)})
        if name in vars(module):
            return of_object(vars(module)[name])
        found = inspect.getattr_static(type(module), name, None)
        if isinstance(found, (property, functools.cached_property)):
            get = found.fget if isinstance(found, property) else found.func
            return self._apply(bound(get, module), [], {})
        return member(found, module)

    def _call(self, node: ast.Call, scope: _Scope) -> Values[Any]:
        given = [self._value(one, scope) for one in node.args if not isinstance(one, ast.Starred)]
        named = {word.arg: self._value(word.value, scope) for word in node.keywords if word.arg}
        spread = [elements(self._value(word.value, scope)) for word in node.keywords if not word.arg]
        spread += [self._value(one, scope) for one in node.args if isinstance(one, ast.Starred)]
        if spread:
            named[_ANY] = union(spread)
        every = union((*given, *named.values()))
        name, result = getattr(node.func, "attr", getattr(node.func, "id", "")), NOTHING
        if isinstance(node.func, ast.Attribute):
            result = self._handed_out(self._value(node.func.value, scope), name, texts(every))
        elif name not in scope.names:
            if name == "super":
                return self._super(given, scope)
            if name == "getattr" and len(given) > 1:
                return self._getattr(given[0], texts(given[1])).union(*given[2:])
            if name in _HANDING:
                return every if name == "cast" else elements(every)
        called = self._value(node.func, scope)
        followed = any(isinstance(value, Function) for value in called)
        asking = name in _ASKING or name.startswith(("is", "has")) or name.endswith("_like")
        if asking and not followed:
            return NOTHING
        if not called or not all(isinstance(value, Function) and value.node for value in called):
            self._use(every)  # an unknown function may read a weight it is given
        functions = Values(value for value in every if isinstance(value, Function))
        if functions and not followed:  # an unknown function may call functions it is given, with the other arguments
            return self._apply(functions, [], {_ANY: elements(every) - functions})
        return result | self._apply(called, given, named)

    def _handed_out(self, values: Values[Any], method: str, names: list[str]) -> Values[Any]:
        """The values from methods of modules, lists and dictionaries that return their contents."""
        if method in ("get_submodule", "get_parameter"):
            return union(functools.reduce(self._attribute, name.split("."), values) for name in names)
        given = union(handed_out(value, method) for value in values if isinstance(value, nn.Module))
        return given | values if method in _OF_LISTS else given

    def _super(self, given: list[Values[Any]], scope: _Scope) -> Values[Any]:
        names = scope.function.__code__.co_varnames
        owners = given[0] if given else scope.look_up("__class__")
        receivers = given[1] if len(given) > 1 else scope.look_up(names[0] if names else "")
        pairs = ((owner.item, module) for owner in owners if isinstance(owner, Held) for module in receivers)
        return Values(Held(super(kind, m)) for kind, m in pairs if isinstance(m, nn.Module) and isinstance(m, kind))

    def _getattr(self, values: Values[Any], names: list[str]) -> Values[Any]:
        if names and not any("*" in name for name in names):
            return union(self._attribute(values, name) for name in names)
        return union(children_named(value, names) for value in values if isinstance(value, nn.Module))

    def _use(self, values: Values[Any]) -> None:
        """Values reach code that is not followed: note tensors as read, and follow functions with bound arguments."""
        for value in values:
            match value:
                case Tensors(module):
                    function = self._stack[-1] if self._stack else None
                    name, file = (function.__qualname__, function.__code__.co_filename) if function else ("", "")
                    self.found.setdefault(module, Read(name, file.rpartition("/")[2]))
                case Function(_, given) if given:
                    self._apply(Values({value}), [], {})
