"""The syntax tree of a function: from its source, or, where there is none, as far as its byte code shows it."""

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
    """The syntax tree of a function: from its source, or, where there is none, as much as its byte code shows."""
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
    """A function as far as its byte code shows it: names, attributes, indices, calls, operators, one after another."""
    n, keywords = code.co_argcount, code.co_kwonlyargcount
    names = [ast.arg(name) for name in code.co_varnames]
    parameters = ast.arguments(
        posonlyargs=[], args=names[:n], kwonlyargs=names[n : n + keywords], kw_defaults=[], defaults=[]
    )
    rest = iter(names[n + keywords :])
    parameters.vararg = next(rest) if code.co_flags & inspect.CO_VARARGS else None
    parameters.kwarg = next(rest) if code.co_flags & inspect.CO_VARKEYWORDS else None
    return ast.FunctionDef(code.co_name, parameters, list(_Steps().statements(code)), [])


class _Steps:
    """Byte code as statements: what stands on the stack at each step, and where it goes.

    A loop is gone through once, and where branches meet, a value is that of the one or the other.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.constants: tuple[Any, ...] = ()
        self.words: tuple[str, ...] = ()
        """The names of the last arguments of the next call."""

    def statements(self, code: types.CodeType) -> Iterator[ast.stmt]:
        self.constants = code.co_consts
        meeting: dict[int, list[Any]] = {}
        ends: dict[int, int] = {}
        reached = True
        for step in dis.get_instructions(code):
            if step.offset in meeting:
                other = meeting.pop(step.offset)
                self.stack = _either(self.stack, other) if reached else other
                reached = True
            if not reached:
                self.stack = []  # a handler of exceptions
                reached = True
            name, given, stack = step.opname, step.argval, self.stack
            if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
                if name.startswith("POP_JUMP") and stack:
                    yield ast.Expr(stack.pop())
                loop = ends.get(given)  # of a loop, where this jumps back to its start
                if name == "FOR_ITER":
                    loop = ends[step.offset] = given
                target = given if loop is None else loop
                if target > step.offset:
                    popped = loop is not None and sys.version_info < (3, 13)  # later, POP_TOP follows the loop
                    ahead = stack[:-1] if popped else stack[:]
                    meeting[target] = _either(meeting[target], ahead) if target in meeting else ahead
                if name == "FOR_ITER" and stack:
                    stack.append(ast.Subscript(stack[-1], ast.Name("")))
                elif name.endswith("_OR_POP") and stack:
                    stack.pop()
                reached = not name.startswith(("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE"))
            elif name.startswith("RETURN_VALUE") and stack:
                yield ast.Return(stack.pop())
                reached = False
            elif name.startswith(("RAISE", "RERAISE")):
                reached = False
            elif name not in _SILENT:
                yield from self._step(name, given, step.arg or 0)

    def _step(self, name: str, given: Any, count: int) -> Iterator[ast.stmt]:
        stack = self.stack
        if name == "LOAD_CONST" or name == "RETURN_CONST":
            stack.append(_constant(given))
            if name == "RETURN_CONST":
                yield ast.Return(stack.pop())
        elif name.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_CLOSURE", "LOAD_CLASSDEREF")):
            stack.extend(ast.Name(one) for one in (given if isinstance(given, tuple) else (given,)))
        elif name == "LOAD_ASSERTION_ERROR":
            stack.append(ast.Constant(None))
        elif name in ("LOAD_ATTR", "LOAD_METHOD") and stack:
            stack.append(ast.Attribute(stack.pop(), given))
        elif name.startswith(("STORE_FAST", "STORE_DEREF")) and isinstance(given, str) and stack:
            yield ast.Assign([ast.Name(given)], stack.pop())
        elif name == "KW_NAMES":
            self.words = self.constants[count]
        elif name == "CALL_FUNCTION_EX" and len(stack) > 1 + (count & 1):
            words = [ast.keyword(None, stack.pop())] if count & 1 else []
            rest = ast.Starred(stack.pop())
            stack.append(ast.Call(stack.pop(), [rest], words))
        elif name.startswith("CALL") and "INTRINSIC" not in name and len(stack) > count + ("KW" in name):
            if "KW" in name:
                self.words = tuple(one.value for one in stack.pop().elts)
            if not count and len(stack) > 1 and _is_iterator(stack[-1]) and _is_comprehension(stack[-2]):
                count = 1  # what it is over stands where a method has its module
            called, plain = self._pop(count), count - len(self.words)
            words = [ast.keyword(*pair) for pair in zip(self.words, called[plain:], strict=True)]
            self.words = ()
            stack.append(ast.Call(stack.pop(), called[:plain], words))
        elif name == "MAKE_FUNCTION" and len(stack) > bin(count).count("1"):
            made = stack.pop() if isinstance(stack[-1], ast.FunctionDef) else stack.pop(-2)  # 3.10: its name is above
            if count:
                self._pop(bin(count).count("1"))
            stack.append(made)
        elif name == "SET_FUNCTION_ATTRIBUTE" and len(stack) > 1:
            stack.pop(-2)
        elif name == "BINARY_SUBSCR" and len(stack) > 1:
            index = stack.pop()
            stack.append(ast.Subscript(stack.pop(), index))
        elif name in ("IS_OP", "CONTAINS_OP", "COMPARE_OP") and len(stack) > 1:
            right = stack.pop()
            stack.append(ast.Compare(stack.pop(), [ast.Eq() if name == "COMPARE_OP" else ast.Is()], [right]))
        elif name.startswith(("BINARY_", "INPLACE_")) and len(stack) > 1:
            right = stack.pop()
            stack.append(ast.BinOp(stack.pop(), ast.Add(), right))
        elif name == "GET_ITER" and stack:
            stack.append(ast.Call(ast.Name("iter"), [stack.pop()], []))
        elif name == "UNARY_NOT" and stack:
            stack.append(ast.UnaryOp(ast.Not(), stack.pop()))
        elif name in ("BUILD_TUPLE", "BUILD_LIST", "BUILD_SET") and len(stack) >= count:
            stack.append(ast.Tuple(self._pop(count)))
        elif name == "BUILD_STRING" and len(stack) >= count:
            stack.append(ast.JoinedStr(self._pop(count)))
        elif name.startswith("FORMAT_") and stack:
            stack[-1] = ast.FormattedValue(stack[-1], -1)
        elif name == "BUILD_MAP" and len(stack) >= 2 * count:
            stack.append(ast.Tuple(self._pop(2 * count)[1::2]))
        elif name == "BUILD_CONST_KEY_MAP" and len(stack) > count:
            stack.pop()
            stack.append(ast.Tuple(self._pop(count)))
        elif name in ("LIST_APPEND", "SET_ADD", "MAP_ADD") and len(stack) > count + (name == "MAP_ADD"):
            added = stack.pop()
            if name == "MAP_ADD":
                stack.pop()
            stack[-count] = ast.Tuple([ast.Starred(stack[-count]), added])
        elif name in ("LIST_EXTEND", "SET_UPDATE", "DICT_UPDATE", "DICT_MERGE") and len(stack) > count:
            added = stack.pop()
            stack[-count] = ast.Tuple([ast.Starred(stack[-count]), ast.Starred(added)])
        elif name == "UNPACK_SEQUENCE" and stack:
            parts = stack.pop()
            known = isinstance(parts, ast.Tuple) and len(parts.elts) == count
            stack.extend(parts.elts[::-1] if known else [ast.Subscript(parts, ast.Name(""))] * count)
        elif name == "SWAP" and len(stack) >= count:
            stack[-1], stack[-count] = stack[-count], stack[-1]
        elif name == "COPY" and len(stack) >= count:
            stack.append(stack[-count])
        elif name == "YIELD_VALUE" and stack:
            yield ast.Expr(ast.Yield(stack.pop()))
            stack.append(ast.Constant(None))
        elif name.startswith("POP_"):
            if stack:
                yield ast.Expr(stack.pop())
        else:  # not followed: it takes whatever there is
            yield from (ast.Expr(ast.Call(ast.Constant(None), [chain], [])) for chain in stack)
            stack.clear()

    def _pop(self, count: int) -> list[Any]:
        parts = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return parts


def _either(one: list[Any], other: list[Any]) -> list[Any]:
    """What the stack holds where two ways meet."""
    return [a if a is b else ast.BoolOp(ast.Or(), [a, b]) for a, b in zip(one, other, strict=False)]


def _is_iterator(node: Any) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "iter"


def _is_comprehension(node: Any) -> bool:
    return isinstance(node, ast.FunctionDef) and [one.arg for one in node.args.args] == [".0"]


def _constant(given: Any) -> Any:
    if isinstance(given, types.CodeType):
        return _from_bytecode(given)
    if isinstance(given, (tuple, frozenset)):
        return ast.Tuple([_constant(one) for one in given])
    return ast.Constant(given if isinstance(given, (int, str)) else None)


_SILENT = frozenset({
    "CACHE", "CALL_INTRINSIC_1", "COPY_FREE_VARS", "END_FOR", "EXTENDED_ARG", "GEN_START", "LIST_TO_TUPLE",
    "MAKE_CELL", "NOP", "PRECALL", "PUSH_NULL", "RESUME", "RETURN_GENERATOR", "TO_BOOL",
})  # fmt: skip
"""Operations of byte code that change nothing here."""
