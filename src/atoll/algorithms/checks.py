"""What a rule's class says of itself, and for whom it still holds."""

from __future__ import annotations

from typing import Any


def elementwise(rule: object, *methods: str) -> bool:
    """Whether a rule's class says that it works entry by entry, and none below it has another rule.

    What a class says holds for those derived from it unless they define one of these `methods`, or
    any at all where none are named: they must say it again.
    """
    for kind in type(rule).__mro__:
        if "elementwise" in vars(kind):
            return bool(vars(kind)["elementwise"])
        own: dict[str, Any] = dict(vars(kind))
        if any(callable(value) for name, value in own.items() if _counts(name, methods)):
            return False
    return False


def _counts(name: str, methods: tuple[str, ...]) -> bool:
    return name in methods if methods else not name.startswith("__")
