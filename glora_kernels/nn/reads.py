"""Which modules have their weights read by the code of a module around them, which an adapter in their place misses.

A module that is replaced takes part in what its parents compute where they call it. A parent that reads `weight`
(`F.linear(x, self.q_proj.weight)`, a fused path) gets the base alone. What a parent does is read from its source: its
`forward` and whatever that reaches through methods, properties, `super()`, local names and functions that are given the
module, evaluated over the modules it really has. Asking a weight for its dtype, device or shape is no read.

Where a function has no source (a class typed into an interpreter), its byte code is read instead: attribute chains,
names and constant indices, without what goes through calls.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from glora_kernels.nn.read_code import parsed
from glora_kernels.nn.read_settings import decided
from glora_kernels.nn.read_values import (
    ANY,
    FOLLOWED,
    HARMLESS,
    LIKE,
    MODULE_METHODS,
    NOTHING,
    SEQUENCES,
    Ref,
    Values,
    children_of,
    class_attribute,
    elements,
    holds,
    is_torchs,
    matters,
    method_of,
    modules_of,
    of_member,
    of_method,
    of_object,
    owner_of,
    picked_by,
)

_DEPTH = 16
"""How far calls are followed."""


class Read(NamedTuple):
    """Where a weight is read: the function that does, and its file."""

    reader: str
    place: str

    def __str__(self) -> str:
        return f"{self.reader} ({self.place}) reads its weight without calling it"


def reads(root: nn.Module, passed: Collection[nn.Module] = ()) -> dict[nn.Module, Read]:
    """The modules inside `root` whose parameters the code of a module around them reads, and where it does.

    The code of the modules in `passed` is not read.
    """
    found: dict[nn.Module, Read] = {}
    for module in root.modules():
        if module not in passed and module._modules and "_orig_mod" not in module._modules:
            reader = _Reader()
            reader.run(module)
            own = set(module.modules()) - {module}
            found |= {inner: read for inner, read in reader.found.items() if inner in own and inner not in found}
    return found


def _branches(node: Any, true: bool | None) -> list[Any]:
    """The branches of an `if` that may be taken."""
    return [node.body, node.orelse] if true is None else [node.body if true else node.orelse]


class _Scope:
    """The names of one function as it is read: what they may be, its class (for super()), where it stands."""

    def __init__(self, function: Any, owner: type | None, outer: _Scope | None = None) -> None:
        self.function, self.owner, self.outer = function, owner, outer
        self.names: dict[str, Values[Any]] = {}
        self.returned: Values[Any] = NOTHING

    def look_up(self, name: str) -> Values[Any]:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        cells = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=False))
        if name in cells:
            try:
                return of_object(cells[name].cell_contents)
            except ValueError:  # a cell that was never filled
                return NOTHING
        if name in (spaces := self.function.__globals__):
            return of_object(spaces[name])
        return of_object(getattr(builtins, name, None))


class _Reader:
    """Reads the code of one module; `found` has the modules whose tensors it takes."""

    def __init__(self) -> None:
        self.found: dict[nn.Module, Read] = {}
        self._done: dict[Any, Values[Any]] = {}
        self._stack: list[tuple[str, str]] = []

    def run(self, module: nn.Module) -> None:
        own = vars(module).get("forward")
        entries = [of_object(own) if own is not None else method_of(class_attribute(type(module), "forward"), module)]
        if type(module).__call__ is not nn.Module.__call__:
            entries.append(method_of(type(module).__call__, module))
        for entry in entries:
            self._use(self._apply(entry, [], {}))
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            self._use(self._apply(of_object(hook), [Values({("module", Ref(module))})], {}))

    # Functions.

    def _call(
        self, function: Any, given: list[Values[Any]], named: Mapping[str, Values[Any]], kind: type | None
    ) -> Values[Any]:
        """What a function returns for arguments that may be these; what it reads on the way is noted."""
        return self._body(parsed(function.__code__), _Scope(function, owner_of(kind, function)), given, named)

    def _body(
        self, node: Any, scope: _Scope, given: list[Values[Any]], named: Mapping[str, Values[Any]]
    ) -> Values[Any]:
        key = (node, tuple(given), tuple(sorted(named.items(), key=lambda item: item[0])))
        if key not in self._done and len(self._stack) < _DEPTH:
            self._done[key] = NOTHING
            self._stack.append((scope.function.__qualname__, scope.function.__code__.co_filename))
            self._done[key] = self._evaluate(node, scope, given, named)
            self._stack.pop()
        return self._done.get(key, NOTHING)

    def _evaluate(
        self, node: Any, scope: _Scope, given: list[Values[Any]], named: Mapping[str, Values[Any]]
    ) -> Values[Any]:
        parameters = [*node.args.posonlyargs, *node.args.args]
        for parameter, values in zip(parameters, given, strict=False):
            scope.names[parameter.arg] = values
        spread = named.get(ANY, NOTHING)
        rest = spread.union(*given[len(parameters) :])
        for parameter in parameters[len(given) :] + node.args.kwonlyargs:
            scope.names[parameter.arg] = named.get(parameter.arg, spread)
        if node.args.vararg:
            scope.names[node.args.vararg.arg] = Values({("sequence", rest)})
        if node.args.kwarg:
            own = {parameter.arg for parameter in parameters}
            extra = frozenset().union(*(v for name, v in named.items() if name not in own))
            scope.names[node.args.kwarg.arg] = Values({("sequence", extra)})
        if isinstance(node, ast.Lambda):
            return self._value(node.body, scope)
        for statement in node.body:
            self._statement(statement, scope)
        return scope.returned

    def _statement(self, node: ast.stmt, scope: _Scope) -> bool:
        """Whether the function surely ends here."""
        if isinstance(node, ast.If):
            self._value(node.test, scope)
            ends = []
            for branch in _branches(node, decided(node.test, lambda part: self._value(part, scope))):
                before = dict(scope.names)
                ends.append(self._statements(branch, scope))
                scope.names = {**before, **{n: before.get(n, NOTHING) | v for n, v in scope.names.items()}}
            return all(ends)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._bind(ast.Name(node.name), self._local(node, scope), scope)
        elif isinstance(node, ast.Return):
            scope.returned |= self._value(node.value, scope)
            return True
        elif isinstance(node, ast.Raise):
            return True
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                self._assign(target, node.value, scope)
        elif isinstance(node, ast.AugAssign):
            self._use(self._value(node.target, scope) | self._value(node.value, scope))
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            self._bind(node.target, elements(self._value(node.iter, scope)), scope)
            self._statements(node.body + node.orelse, scope)
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                value = self._value(item.context_expr, scope)
                if item.optional_vars is not None:
                    self._bind(item.optional_vars, value, scope)
            return self._statements(node.body, scope)
        elif not isinstance(node, ast.ClassDef):
            for _, field in ast.iter_fields(node):
                for part in field if isinstance(field, list) else [field]:
                    if isinstance(part, ast.stmt):
                        self._statement(part, scope)
                    elif isinstance(part, (ast.ExceptHandler, ast.match_case)):
                        self._statements(part.body, scope)
                    elif isinstance(part, ast.expr):
                        self._value(part, scope)
        return False

    def _statements(self, nodes: Iterable[ast.stmt], scope: _Scope) -> bool:
        return any(self._statement(node, scope) for node in nodes)

    def _assign(self, target: ast.expr, value: ast.expr | None, scope: _Scope) -> None:
        if (
            isinstance(target, (ast.Tuple, ast.List))
            and isinstance(value, (ast.Tuple, ast.List))
            and len(target.elts) == len(value.elts)
        ):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._assign(one, its, scope)
        else:
            self._bind(target, self._value(value, scope), scope)

    def _bind(self, target: ast.expr, values: Values[Any], scope: _Scope) -> None:
        if isinstance(target, ast.Name):
            scope.names[target.id] = scope.names.get(target.id, NOTHING) | values
        elif isinstance(target, (ast.Tuple, ast.List)):
            inside = elements(values) if any(kind == "sequence" for kind, *_ in values) else values
            for one in target.elts:
                self._bind(one, inside, scope)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, Values({("sequence", values)}), scope)
        else:
            self._use(values)

    # Expressions.

    def _value(self, node: Any, scope: _Scope) -> Values[Any]:
        """What an expression may be. Who takes a tensor's values calls `_use`."""
        kind = type(node).__name__
        method = getattr(self, f"_{kind}", None)
        if method is not None:
            return method(node, scope)
        if isinstance(node, ast.AST):
            for child in ast.iter_child_nodes(node):
                self._use(self._value(child, scope))
        return NOTHING

    def _Name(self, node: ast.Name, scope: _Scope) -> Values[Any]:
        return scope.look_up(node.id)

    def _Constant(self, node: ast.Constant, scope: _Scope) -> Values[Any]:
        return Values({("text", node.value)}) if isinstance(node.value, str) else NOTHING

    def _JoinedStr(self, node: ast.JoinedStr, scope: _Scope) -> Values[Any]:
        parts = (part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
        return Values({("text", "".join(map(str, parts)))})

    def _Tuple(self, node: Any, scope: _Scope) -> Values[Any]:
        return Values({("sequence", frozenset().union(*(self._value(one, scope) for one in node.elts)))})

    _List = _Set = _Tuple

    def _Starred(self, node: ast.Starred, scope: _Scope) -> Values[Any]:
        return elements(self._value(node.value, scope))

    def _Dict(self, node: ast.Dict, scope: _Scope) -> Values[Any]:
        return Values({("sequence", frozenset().union(*(self._value(one, scope) for one in node.values)))})

    def _BoolOp(self, node: ast.BoolOp, scope: _Scope) -> Values[Any]:
        return frozenset().union(*(self._value(one, scope) for one in node.values))

    def _UnaryOp(self, node: ast.UnaryOp, scope: _Scope) -> Values[Any]:
        values = self._value(node.operand, scope)
        if not isinstance(node.op, ast.Not):
            self._use(values)
        return NOTHING

    def _Compare(self, node: ast.Compare, scope: _Scope) -> Values[Any]:
        values = frozenset().union(*(self._value(one, scope) for one in (node.left, *node.comparators)))
        if not all(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in node.ops):
            self._use(values)
        return NOTHING

    def _IfExp(self, node: ast.IfExp, scope: _Scope) -> Values[Any]:
        self._value(node.test, scope)
        branches = _branches(node, decided(node.test, lambda part: self._value(part, scope)))
        return frozenset().union(*(self._value(branch, scope) for branch in branches))

    def _NamedExpr(self, node: ast.NamedExpr, scope: _Scope) -> Values[Any]:
        values = self._value(node.value, scope)
        self._bind(node.target, values, scope)
        return values

    def _Lambda(self, node: Any, scope: _Scope) -> Values[Any]:
        return self._local(node, scope)

    _FunctionDef = _Lambda  # of byte code

    def _local(self, node: Any, scope: _Scope) -> Values[Any]:
        self._use(self._body(node, _Scope(scope.function, scope.owner, scope), [], {}))
        return Values({("local", Ref(node), Ref(scope))})

    def _ListComp(self, node: Any, scope: _Scope) -> Values[Any]:
        inner = _Scope(scope.function, scope.owner, scope)
        for part in node.generators:
            self._bind(part.target, elements(self._value(part.iter, inner)), inner)
            for test in part.ifs:
                self._value(test, inner)
        made = self._value(node.value if isinstance(node, ast.DictComp) else node.elt, inner)
        return Values({("sequence", made)})

    _SetComp = _GeneratorExp = _DictComp = _ListComp

    def _Yield(self, node: Any, scope: _Scope) -> Values[Any]:
        scope.returned |= Values({("sequence", self._value(node.value, scope))})
        return NOTHING

    _YieldFrom = _Yield

    def _Await(self, node: ast.Await, scope: _Scope) -> Values[Any]:
        return self._value(node.value, scope)

    def _Subscript(self, node: ast.Subscript, scope: _Scope) -> Values[Any]:
        values, index = self._value(node.value, scope), self._value(node.slice, scope)
        if isinstance(node.slice, ast.Slice):
            return values
        picked = picked_by(node.slice)
        found: Values[Any] = NOTHING
        for value in values:
            if value[0] == "tensor":
                self._use(Values({value}))
            elif value[0] == "module":
                module = value[1].item
                names = [text for kind, text in index if kind == "text"]
                children = list(module._modules.values())
                if picked is not None and -len(children) <= picked < len(children):
                    found |= modules_of([children[picked]])
                else:
                    found |= modules_of(children_of(module, names))
            else:
                found |= elements(Values({value}))
        return found

    def _Attribute(self, node: ast.Attribute, scope: _Scope) -> Values[Any]:
        return self._attribute(self._value(node.value, scope), node.attr)

    def _attribute(self, values: Values[Any], name: str) -> Values[Any]:
        found: Values[Any] = NOTHING
        for value in values:
            kind, item = value[0], value[1]
            if kind == "tensor":
                if name == "data":
                    found |= {value}
                elif name not in HARMLESS:
                    self._use(Values({value}))
            elif kind == "sequence":
                if name == "items":
                    found |= {("paired", item)}
                elif name in ("values", "get", "pop", "copy"):
                    found |= {("again", item)}
            elif kind == "module":
                found |= self._of_module(item.item, name)
            elif kind == "super":
                kinds = item.item.__class__.__mro__
                after = kinds[kinds.index(value[2]) + 1 :] if value[2] in kinds else ()
                function = next((vars(kind)[name] for kind in after if name in vars(kind)), None)
                found |= method_of(function, item.item)
            elif kind == "object":
                found |= of_member(item.item, name)
        return found

    def _of_module(self, module: nn.Module, name: str) -> Values[Any]:
        if name == "_modules":
            return Values({("module", Ref(module))})
        if name == "_parameters" or name == "_buffers":
            return Values({("sequence", Values({("tensor", Ref(module))}))})
        if name in module._modules:
            return modules_of([module._modules[name]])
        if name in module._parameters or name in module._buffers:
            return Values({("tensor", Ref(module))})
        if name in vars(module):
            return of_object(vars(module)[name])
        found = class_attribute(type(module), name)
        if isinstance(found, (property, functools.cached_property)):
            function = found.fget if isinstance(found, property) else found.func
            function = inspect.unwrap(function) if function is not None else None
            if isinstance(function, types.FunctionType) and not is_torchs(function):
                return self._call(function, [Values({("module", Ref(module))})], {}, type(module))
            return NOTHING
        if (name in MODULE_METHODS and getattr(nn.Module, name, None) is found) or name in ("values", "items", "keys"):
            return Values({("bound", name, Ref(module))})
        return method_of(found, module)

    def _Call(self, node: ast.Call, scope: _Scope) -> Values[Any]:
        given = [self._value(one, scope) for one in node.args if not isinstance(one, ast.Starred)]
        named = {word.arg: self._value(word.value, scope) for word in node.keywords if word.arg}
        spread = [elements(self._value(word.value, scope)) for word in node.keywords if not word.arg]
        spread += [self._value(one, scope) for one in node.args if isinstance(one, ast.Starred)]
        if spread:
            named[ANY] = frozenset().union(*spread)
        every = frozenset().union(*given, *named.values())
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "super" and isinstance(node.func, ast.Name):
            return self._super(given, scope)
        if name == "getattr" and len(given) >= 2:
            return self._getattr(given[0], given[1]) | (given[2] if len(given) > 2 else NOTHING)
        if isinstance(node.func, ast.Name) and name not in scope.names:
            if name in SEQUENCES:
                return Values({("sequence", elements(every))})
            if name == "dict" and named:
                return Values({("sequence", frozenset().union(*named.values(), *map(elements, given)))})
            if name in ("enumerate", "zip", "dict"):
                return Values({("sequence", Values({("sequence", elements(every))}))})
            if name in ("next", "cast"):
                return elements(every) if name == "next" else every
        called = self._value(node.func, scope)
        if name in LIKE and not any(kind in ("function", "local") for kind, *_ in called):
            return NOTHING
        if not called or any(kind != "local" for kind, *_ in called):
            self._use(every)  # whoever is given a weight takes it; a module is followed
        if not any(kind in FOLLOWED for kind, *_ in called):  # what is given functions calls them with the rest
            inside = every | elements(every)
            handed = Values(value for value in every if value[0] in FOLLOWED)
            if handed:
                return Values({("sequence", self._apply(handed, [], {ANY: inside - handed}))})
        return self._apply(called, given, named, name)

    def _apply(
        self, called: Values[Any], given: list[Values[Any]], named: Mapping[str, Values[Any]], name: str = ""
    ) -> Values[Any]:
        """What a call of any of these values returns."""
        every = frozenset().union(*given, *named.values())
        result: Values[Any] = NOTHING
        for value in called:
            kind = value[0]
            if kind == "function":
                function, owner = value[1], value[2]
                if is_torchs(function) and owner is None and function.__name__ != "forward":
                    continue
                arguments = given if owner is None else [Values({("module", owner)}), *given]
                if owner is not None or any(map(matters, every)) or holds(function):
                    result |= self._call(function, arguments, named, None if owner is None else type(owner.item))
            elif kind == "partial":
                result |= self._apply(value[1], [*value[2], *given], {**dict(value[3]), **named})
            elif kind == "local":
                outer = value[2].item
                inner = _Scope(outer.function, outer.owner, outer)
                result |= self._body(value[1].item, inner, given, named)
            elif kind == "bound":
                result |= of_method(value[1], value[2].item, given)
            elif kind == "paired":
                result |= {("sequence", Values({("sequence", value[1])}))}
            elif kind == "again":
                result |= value[1] if name in ("get", "pop") else {("sequence", value[1])}
        return result

    def _super(self, given: list[Values[Any]], scope: _Scope) -> Values[Any]:
        owner, receiver = scope.owner, given[1] if len(given) > 1 else NOTHING
        for value in given[0] if given else ():
            if value[0] == "object" and isinstance(value[1].item, type):
                owner = value[1].item
        if not receiver and scope.function.__code__.co_argcount:
            receiver = scope.look_up(scope.function.__code__.co_varnames[0])
        return Values({("super", value[1], owner) for value in receiver if value[0] == "module"})

    def _getattr(self, values: Values[Any], names: Values[Any]) -> Values[Any]:
        texts = [text for kind, text in names if kind == "text"]
        if texts and not any("*" in text for text in texts):
            return frozenset().union(*(self._attribute(values, text) for text in texts))
        modules = [value[1].item for value in values if value[0] == "module"]
        return frozenset().union(*(modules_of(children_of(module, texts)) for module in modules))

    def _use(self, values: Values[Any]) -> None:
        """The values are taken by something that is not followed: tensors are read, methods may be called."""
        for value in values:
            kind = value[0]
            if kind == "tensor":
                qualified, file = self._stack[-1] if self._stack else ("", "")
                short = file.rpartition("/")[2]
                self.found.setdefault(value[1].item, Read(qualified, short))
            elif kind in ("sequence", "again", "paired"):
                self._use(value[1])
            elif kind == "function" and value[2] is not None:
                self._call(value[1], [Values({("module", value[2])})], {}, type(value[2].item))
