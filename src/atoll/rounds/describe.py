"""Describe: any configuration object as plain JSON, the same in every process."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.stage import Pipeline
from atoll.algorithms.algorithm import Algorithm
from atoll.learners.base import Learner
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
        return f"{_name(value)} {_code_digest(value)}"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return _name(value)
    text = repr(value)
    # The default repr holds an address, which differs from process to process.
    return _name(type(value)) if " at 0x" in text else text


def _fields(value: Any) -> dict[str, Any]:
    """A part's kind, its fields if it is a dataclass, and a learner's layout."""
    plain: dict[str, Any] = {"kind": _name(type(value))}
    if is_dataclass(value):
        plain |= {f.name: describe(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Learner):
        plain["layout"] = {"digest": value.layout.digest, **value.layout.sizes}
        if value.fixed():
            plain["fixed"] = value.fixed()
    return plain


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


def plan_digest(plan: Plan) -> str:
    """SHA-256 (hex) of what clients must agree on; the schedule is the server's own affair."""
    parts = (plan.learner, plan.algorithm, plan.pipeline, plan.private, plan.download, plan.public)
    return digest([describe(part) for part in parts])


def _code_digest(function: FunctionType) -> str:
    """Tells functions of one name apart, as lambdas are: by their code and what they close over."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    cells += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    simple = [_told(cell) for cell in cells]
    return sha256(repr((_code(function.__code__), simple)).encode()).hexdigest()[:16]


def _told(value: Any) -> Any:
    """What a function closes over: numbers, texts and arrays by their values, others by kind."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, FunctionType):
        return _code_digest(value)
    if isinstance(value, list | tuple):
        return [_told(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _told(each) for name, each in value.items()}
    array = _array(value)
    return type(value).__name__ if array is None else describe(array)


def _array(value: Any) -> NDArray[Any] | None:
    """Any framework's array as NumPy's; None for what is none."""
    if isinstance(value, type) or not hasattr(value, "__array__") or not hasattr(value, "shape"):
        return None
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _code(code: CodeType) -> tuple[Any, ...]:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return (code.co_code.hex(), code.co_names, constants)


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
