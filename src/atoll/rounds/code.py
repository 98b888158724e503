"""Digests of people's own code: what it says, not how one Python version compiles it.

The source is read as a syntax tree, without positions, comments and docstrings, so that the same
file gives the same digest under every Python. Code that has no source (typed into a console) is
told apart by its bytecode. Installed packages and Python's own are named and not looked into.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import sys
import sysconfig
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

#: Parts of a syntax tree that Python versions have or have not, or that say nothing.
BESIDE = frozenset({"type_params", "type_ignores", "type_comment", "kind", "ctx"})
#: Where installed packages and Python's own modules are.
INSTALLED = tuple(
    sorted({str(Path(sysconfig.get_path(n)).resolve()) for n in ("stdlib", "purelib", "platlib")})
)
#: CPython 3.11 counts the depth of all trees in the making together: two threads are a SystemError.
PARSING = threading.Lock()
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def is_own(thing: Any) -> bool:
    """Whether a class or function is people's own: of no installed package, and not atoll's."""
    module = getattr(thing, "__module__", None) or ""
    root = module.partition(".")[0]
    if root == "atoll" or root in sys.builtin_module_names:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return root not in sys.stdlib_module_names
    return not str(Path(file).resolve()).startswith(INSTALLED)


def function_digest(function: FunctionType) -> str:
    """What a function's source says; two of one text have the same, wherever they stand."""
    found = _function_source(function)
    return _short(found if found is not None else repr(_bytecode(function.__code__)))


def class_digest(kind: type) -> str:
    """What the sources of a class, and of people's own that it is derived from, say."""
    return _short("\n".join(_class_source(each) for each in kind.__mro__ if is_own(each)))


@functools.cache
def _class_source(kind: type) -> str:
    try:
        with PARSING:
            text = inspect.getsource(kind)
            tree = ast.parse(inspect.cleandoc(f"\n{text}"))
        return _told(tree.body[0])
    except (OSError, TypeError, SyntaxError, IndexError):
        own = {name: each for name, each in vars(kind).items() if isinstance(each, FunctionType)}
        return repr([(name, _bytecode(own[name].__code__)) for name in sorted(own)])


def _function_source(function: FunctionType) -> str | None:
    """The syntax tree of a function in words; None where its source is not known for sure."""
    code = function.__code__
    try:
        file = inspect.getsourcefile(function)
        tree = _module("".join(linecache.getlines(file))) if file else None
    except (TypeError, SyntaxError, OSError):
        return None
    if tree is None:
        return None
    wanted = ast.Lambda if code.co_name == "<lambda>" else SCOPES[:2]
    here = [node for node in ast.walk(tree) if isinstance(node, wanted) and _at(node, code)]
    told = {_told(node) for node in here}
    return told.pop() if len(told) == 1 else None


@functools.lru_cache(16)
def _module(text: str) -> ast.Module:
    with PARSING:
        return ast.parse(text)


def _at(node: ast.AST, code: CodeType) -> bool:
    """Whether this is where a code object comes from: its first line, or that of a decorator."""
    first = min(
        [node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]  # type: ignore[attr-defined]
    )
    names = [each.arg for each in _arguments(node)]
    given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return first == code.co_firstlineno and names == list(given)


def _arguments(node: ast.AST) -> Iterator[ast.arg]:
    about: ast.arguments = node.args  # type: ignore[attr-defined]
    yield from about.posonlyargs
    yield from about.args
    yield from about.kwonlyargs


def _told(node: Any) -> str:
    """A syntax tree in words, without what differs between versions and says nothing."""
    if isinstance(node, ast.AST):
        body = getattr(node, "body", None)
        parts = []
        for name, value in ast.iter_fields(node):
            if name in BESIDE or value is None or value == []:
                continue
            if name == "body" and isinstance(node, SCOPES) and body and _is_text(body[0]):
                value = body[1:]
            parts.append(f"{name}={_told(value)}")
        return f"{type(node).__name__}({', '.join(parts)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_told, node))}]"
    return repr(node)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _bytecode(code: CodeType) -> tuple[Any, ...]:
    constants = [_bytecode(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return (code.co_code.hex(), code.co_names, constants)


def _short(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
