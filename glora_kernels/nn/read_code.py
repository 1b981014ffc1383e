"""The syntax tree of a function: parsed from its source, or where there is none, rebuilt roughly from byte code."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any


@functools.lru_cache(maxsize=4096)
def parsed(code: types.CodeType) -> Any:
    """The syntax tree of a function or a lambda."""
    try:
        lines, _ = inspect.getsourcelines(code)
        tree = ast.parse("if True:\n " + " ".join(lines)) if lines[0][:1].isspace() else ast.parse("".join(lines))
    except (OSError, SyntaxError, TypeError, IndexError):
        return _from_bytecode(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == code.co_name:
            return node
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    return lambdas[0] if len(lambdas) == 1 else _from_bytecode(code)


def _from_bytecode(code: types.CodeType) -> ast.FunctionDef:
    n, keywords = code.co_argcount, code.co_kwonlyargcount
    names = [ast.arg(name) for name in code.co_varnames]
    parameters = ast.arguments(
        posonlyargs=[], args=names[:n], kwonlyargs=names[n : n + keywords], kw_defaults=[], defaults=[]
    )
    rest = iter(names[n + keywords :])
    parameters.vararg = next(rest) if code.co_flags & inspect.CO_VARARGS else None
    parameters.kwarg = next(rest) if code.co_flags & inspect.CO_VARKEYWORDS else None
    return ast.FunctionDef(code.co_name, parameters, list(_Steps().statements(code)), [])


_SILENT = frozenset({
    "CACHE", "CALL_INTRINSIC_1", "COPY_FREE_VARS", "END_FOR", "EXTENDED_ARG", "GEN_START", "LIST_TO_TUPLE",
    "MAKE_CELL", "NOP", "PRECALL", "PUSH_NULL", "RESUME", "RETURN_GENERATOR", "TO_BOOL",
})  # fmt: skip
"""Operations that do not matter here."""
_LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_CLOSURE", "LOAD_CLASSDEREF")
_LEAVING = ("RETURN_VALUE", "RETURN_CONST", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
_ADDED = ("LIST_APPEND", "SET_ADD", "MAP_ADD", "LIST_EXTEND", "SET_UPDATE", "DICT_UPDATE", "DICT_MERGE")


class _Steps:
    """Turns byte code into statements by following the expressions on the stack.

    A loop is passed through once; where branches meet, a value is `a or b` of the two.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.words: tuple[str, ...] = ()  # the names of the last arguments of the next call

    def statements(self, code: types.CodeType) -> Iterator[ast.stmt]:
        meeting: dict[int, list[Any]] = {}  # the target of a jump → the stack there
        ends: dict[int, int] = {}  # the start of a loop → its end
        reached = True
        for step in dis.get_instructions(code):
            if step.offset in meeting:
                other = meeting.pop(step.offset)
                self.stack = _either(self.stack, other) if reached else other
            elif not reached:
                self.stack = []  # the start of an exception handler
            name, given, stack = step.opname, step.argval, self.stack
            reached = not name.startswith(_LEAVING)
            if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
                if name.startswith("POP_JUMP") and stack:
                    yield ast.Expr(stack.pop())
                if name == "FOR_ITER":
                    ends[step.offset] = given
                loop = given if name == "FOR_ITER" else ends.get(given)  # for a jump back: the end of the loop
                if (target := given if loop is None else loop) > step.offset:
                    popped = loop is not None and sys.version_info < (3, 13)  # later, POP_TOP follows the loop
                    ahead = stack[:-1] if popped else stack[:]
                    meeting[target] = _either(meeting[target], ahead) if target in meeting else ahead
                if name == "FOR_ITER" and stack:
                    stack.append(stack[-1])
                elif name.endswith("_OR_POP") and stack:
                    stack.pop()
            elif name == "KW_NAMES":
                self.words = code.co_consts[step.arg or 0]
            elif name in ("RETURN_VALUE", "RETURN_CONST"):
                end = [_constant(given)] if name == "RETURN_CONST" else self._pop(min(1, len(stack)))
                # A yield, not a return: the statements that follow may still be reached.
                yield from (ast.Expr(ast.YieldFrom(one)) for one in end)
            elif name not in _SILENT:
                before = list(stack)
                try:
                    yield from self._step(step)
                except LookupError:  # an unknown operation: it may use anything on the stack
                    self.stack, self.words = [], ()
                    yield from (ast.Expr(_taken(one)) for one in before)

    def _step(self, step: dis.Instruction) -> list[ast.stmt]:
        """Apply an operation to the stack and return its statements; a LookupError for an unknown one."""
        stack, name, given, count = self.stack, step.opname, step.argval, step.arg or 0
        if name.startswith(_LOADS):
            stack.extend(ast.Name(one) for one in (given if isinstance(given, tuple) else (given,)))
        elif name in ("LOAD_CONST", "LOAD_ASSERTION_ERROR"):
            stack.append(_constant(given))
        elif name.startswith(("STORE_FAST", "STORE_DEREF")) and isinstance(given, str):
            return [ast.Assign([ast.Name(given)], stack.pop())]
        elif name.startswith("POP_"):
            return [ast.Expr(one) for one in self._pop(min(1, len(stack)))]
        elif name == "YIELD_VALUE":
            yielded, stack[-1] = stack[-1], ast.Constant(None)
            return [ast.Expr(ast.Yield(yielded))]
        elif name == "CALL_FUNCTION_EX":
            words = [ast.keyword(None, one) for one in self._pop(count & 1)]
            rest: list[Any] = [ast.Starred(stack.pop())]
            stack.append(ast.Call(stack.pop(), rest, words))
        elif name.startswith("CALL") and "INTRINSIC" not in name:
            self._call(name, count)
        elif name == "MAKE_FUNCTION":  # Python 3.10 has its name above it
            made = stack.pop() if isinstance(stack[-1], ast.FunctionDef) else stack.pop(-2)
            self._pop(count.bit_count())
            stack.append(made)
        elif name == "SET_FUNCTION_ATTRIBUTE":
            del stack[-2]
        elif name in _ADDED:
            added = self._pop(2 if name == "MAP_ADD" else 1)[-1]
            stack[-count] = ast.Tuple([stack[-count], added])  # a tuple stands for any of its elements
        elif name == "UNPACK_SEQUENCE":
            parts = stack.pop()
            known = isinstance(parts, ast.Tuple) and len(parts.elts) == count
            stack.extend(parts.elts[::-1] if known else [ast.Starred(parts)] * count)
        elif name == "SWAP":
            stack[-1], stack[-count] = stack[-count], stack[-1]
        elif name == "COPY":
            stack.append(stack[-count])
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            stack.append(ast.Attribute(stack.pop(), given))
        elif name.startswith(_MADE):
            stack.append(_made(name, self._pop(1 - dis.stack_effect(step.opcode, step.arg))))
        else:
            raise LookupError
        return []

    def _call(self, name: str, count: int) -> None:
        stack = self.stack
        if "KW" in name:
            self.words = tuple(one.value for one in stack.pop().elts)
        if not count and stack and isinstance(stack[-1], ast.Starred):
            count = 1  # a comprehension's iterable is where a method has its object
        given, plain = self._pop(count), count - len(self.words)
        words = [ast.keyword(*pair) for pair in zip(self.words, given[plain:], strict=True)]
        self.words = ()
        stack.append(ast.Call(stack.pop(), given[:plain], words))

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError
        first = len(self.stack) - count
        parts = self.stack[first:]
        del self.stack[first:]
        return parts


def _made(name: str, parts: list[Any]) -> ast.expr:
    """The result of an operation on these values."""
    match name:
        case "BINARY_SUBSCR":
            return ast.Subscript(*parts)
        case "IS_OP" | "CONTAINS_OP" | "UNARY_NOT":
            return ast.Compare(parts[0], [ast.Is()], parts[1:])
        case "GET_ITER":
            return ast.Starred(parts[0])
        case "BUILD_STRING":
            return ast.JoinedStr(parts)
    return ast.Tuple(parts) if name.startswith("BUILD_") else _taken(*parts)


_MADE = ("BINARY_", "BUILD_", "COMPARE_OP", "CONTAINS_OP", "FORMAT_", "GET_ITER", "INPLACE_", "IS_OP", "UNARY_")
"""Prefixes of operations that take values from the stack and push one result."""


def _taken(*values: Any) -> ast.expr:
    """A call of an unknown function with these values."""
    return ast.Call(ast.Constant(None), list(values), [])


def _either(one: list[Any], other: list[Any]) -> list[Any]:
    """The stack where two branches meet."""
    return [a if a is b else ast.BoolOp(ast.Or(), [a, b]) for a, b in zip(one, other, strict=False)]


def _constant(given: Any) -> Any:
    if isinstance(given, types.CodeType):
        return _from_bytecode(given)
    if isinstance(given, (tuple, frozenset)):
        return ast.Tuple([_constant(one) for one in given])
    return ast.Constant(given if isinstance(given, (int, str)) else None)
