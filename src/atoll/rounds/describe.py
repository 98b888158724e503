"""Describe: any configuration object as plain JSON, the same in every process."""

from __future__ import annotations

import functools
import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from hashlib import sha256
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.stage import Pipeline
from atoll.algorithms.algorithm import Algorithm
from atoll.data.examples import of_each
from atoll.data.federated import FederatedData
from atoll.learners.base import Learner
from atoll.rounds.code import class_digest, function_digest, is_own
from atoll.rounds.plan import Plan
from atoll.rounds.schedules import Schedule


def describe(value: Any) -> Any:
    """A JSON value that says what `value` is: dataclasses by their kind and every field."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Pipeline):
        return [describe(stage) for stage in value.stages]
    part = isinstance(value, Learner | Algorithm | Schedule)
    if (part or is_dataclass(value)) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, np.generic):
        return value.item()
    array = _array(value)
    if array is not None:
        return f"array {array.dtype}{list(array.shape)} {sha256(array.tobytes()).hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [describe(item) for item in items]
    if isinstance(value, functools.partial):
        return {
            "kind": "partial",
            "function": describe(value.func),
            "arguments": describe(value.args),
            "keywords": describe(value.keywords),
        }
    if isinstance(value, FunctionType):
        return f"{_name(value)} {_function(value)}"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        own = isinstance(value, type) and is_own(value)
        return f"{_name(value)} {class_digest(value)}" if own else _name(value)
    if hasattr(value, "named_modules") and hasattr(value, "named_buffers"):
        return _module(value)
    if _prints_itself(type(value)) and not is_own(type(value)):
        text = repr(value)
        # The default repr holds an address, which differs from process to process.
        return _name(type(value)) if " at 0x" in text else text
    return _object(value)


def _fields(value: Any) -> dict[str, Any]:
    """A part's kind, code, fields and what it was given beside them, and a learner's layout."""
    plain: dict[str, Any] = {"kind": _name(type(value))}
    if is_own(type(value)):
        plain["code"] = class_digest(type(value))
    with _within(value) as fresh:
        if not fresh:
            return plain
        if is_dataclass(value):
            plain |= {f.name: describe(getattr(value, f.name)) for f in fields(value) if f.init}
        plain |= {name: describe(each) for name, each in _others(value).items()}
    if isinstance(value, Learner):
        plain["layout"] = {"digest": value.layout.digest, **value.layout.sizes}
        if value.fixed():
            plain["fixed"] = value.fixed()
    return plain


def _others(value: Any) -> dict[str, Any]:
    """What an object was given beside a dataclass's fields: no secrets, nothing found out later."""
    known = {f.name for f in fields(value)} if is_dataclass(value) else set()
    return {
        name: each
        for name, each in sorted(getattr(value, "__dict__", {}).items())
        if not name.startswith("_") and name not in known and not hasattr(type(value), name)
    }


@contextmanager
def _within(value: Any) -> Iterator[bool]:
    """Whether an object is not being described already, further out."""
    within: set[int] = _INSIDE.__dict__.setdefault("ids", set())
    fresh = id(value) not in within
    within.add(id(value))
    try:
        yield fresh
    finally:
        if fresh:
            within.discard(id(value))


_INSIDE = threading.local()


def _object(value: Any) -> Any:
    """A plain object: its kind, the code of people's own kinds, and what it was given."""
    kind = _name(type(value))
    with _within(value) as fresh:
        if not fresh:
            return kind
        plain = {name: describe(each) for name, each in _others(value).items()}
    code = {"code": class_digest(type(value))} if is_own(type(value)) else {}
    return {"kind": kind, **code, **plain} if code or plain else kind


def _module(module: Any) -> dict[str, Any]:
    """A torch module, as it prints itself, and what that leaves out.

    That is the code of people's own modules, settings of theirs and of modules without weights
    (losses among them), and buffers; not parameters, which are a model's own affair.
    """
    plain: dict[str, Any] = {"kind": _name(type(module)), "text": repr(module)}
    for name, part in module.named_modules():
        told: dict[str, Any] = {}
        own = is_own(type(part))
        if own:
            told["code"] = class_digest(type(part))
        if own or not (list(part.children()) or list(part.parameters())):
            told |= {
                n: describe(each)
                for n, each in sorted(vars(part).items())
                if not n.startswith("_") and n != "training" and _is_simple(each)
            }
        buffers = {n: describe(each) for n, each in part.named_buffers(recurse=False)}
        told |= {n: each for n, each in buffers.items() if each is not None}
        if told:
            plain[f"part {name}" if name else "whole"] = told
    return plain


def _is_simple(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_simple, value))
    simple = value is None or isinstance(value, bool | int | float | str)
    return simple or _array(value) is not None or isinstance(value, FunctionType)


def _prints_itself(kind: type) -> bool:
    return any("__repr__" in vars(each) for each in kind.__mro__ if each is not object)


def short(value: Any) -> str:
    """A described configuration as it could have been written."""
    if isinstance(value, dict) and "kind" in value:
        inner = ", ".join(
            f"{name}={short(item)}"
            for name, item in value.items()
            if name not in ("kind", "layout") and item is not None
        )
        return f"{str(value['kind']).rpartition('.')[2]}({inner})"
    if isinstance(value, list):
        stages = any(isinstance(item, dict) for item in value)
        shown = [short(item) for item in value]
        return " >> ".join(shown) if stages else f"({', '.join(shown)})"
    text = " ".join(str(value).split())
    return text if len(text) < 120 else f"{text[:117]}..."


def digest(plain: Any) -> str:
    """SHA-256 (hex) of a described value."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()


def differences(mine: Any, theirs: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two described values differ: by field, what is here and what is there."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        names = [*mine, *(name for name in theirs if name not in mine)]
        inner = f"{path}." if path else ""
        return {
            field: pair
            for name in names
            for field, pair in differences(
                mine.get(name), theirs.get(name), f"{inner}{name}"
            ).items()
        }
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        return {
            field: pair
            for place, (a, b) in enumerate(zip(mine, theirs, strict=True))
            for field, pair in differences(a, b, f"{path}[{place}]").items()
        }
    return {} if mine == theirs else {path: (mine, theirs)}


def said(found: Mapping[str, tuple[Any, Any]], here: str, there: str, most: int = 5) -> str:
    """Differences in words."""
    parts = []
    for field, (mine, theirs) in list(found.items())[:most]:
        if field.endswith("code") or ".layout" in field or field.endswith("fixed"):
            parts.append(f"{field} is another")
        else:
            parts.append(f"{field} is {short(mine)} {here} and {short(theirs)} {there}")
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(parts) + more


def agreed(plan: Plan) -> dict[str, Any]:
    """What clients must agree on, described; the schedule is the server's own affair."""
    names = ("learner", "algorithm", "pipeline", "private", "download", "public", "encoding")
    return {name: describe(getattr(plan, name)) for name in names}


def plan_digest(plan: Plan) -> str:
    """SHA-256 (hex) of what clients must agree on; the schedule is the server's own affair."""
    return digest(agreed(plan))


def about_model(plan: Plan, data: FederatedData | None = None) -> dict[str, Any]:
    """What a model of this plan tells of itself, for whoever uses it elsewhere."""
    about: dict[str, Any] = {"plan": plan_digest(plan), "frozen": plan.learner.frozen()}
    encoding = plan.encoding or (data.encoding if data is not None else None)
    if encoding is not None:
        about["encoding"] = encoding.json()
        about["input_shape"] = [len(encoding.names)]
    if data is not None:
        about |= {"task": data.task.name, "classes": data.classes}
        about["class_names"] = list(data.class_names)
        about["input_shape"] = of_each(data.x, lambda column: list(column.shape[1:]))
    elif encoding is not None and encoding.classes:
        names = list(encoding.classes)
        about |= {"task": "classification", "classes": len(names), "class_names": names}
    return about


def _function(function: FunctionType) -> str:
    """Tells functions of one name apart, as lambdas are: by their code and what they close over."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    cells += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    # Numbers and texts of its module that it reads shape what it does as much.
    read = {
        n: function.__globals__[n] for n in function.__code__.co_names if n in function.__globals__
    }
    plain = {
        n: each for n, each in read.items() if isinstance(each, bool | int | float | str | tuple)
    }
    told = [_told(cell) for cell in cells], {n: _told(each) for n, each in sorted(plain.items())}
    return sha256(f"{function_digest(function)} {told!r}".encode()).hexdigest()[:16]


def _told(value: Any) -> Any:
    """What a function closes over: numbers, texts and arrays by their values, others by kind."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, FunctionType):
        return _function(value)
    if isinstance(value, list | tuple):
        return [_told(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _told(each) for name, each in value.items()}
    return describe(value)


def _array(value: Any) -> NDArray[Any] | None:
    """Any framework's array as NumPy's; None for what is none."""
    if isinstance(value, type) or not hasattr(value, "__array__") or not hasattr(value, "shape"):
        return None
    try:
        with warnings.catch_warnings():
            # Some frameworks' arrays do not know NumPy 2's way of asking yet.
            warnings.simplefilter("ignore", DeprecationWarning)
            return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
