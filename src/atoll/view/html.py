"""Display: HTML that notebooks show, in colours that suit light and dark ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from atoll.view.figure import COLOURS


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; without a head if its names are all empty. Everything in it is text."""
    columns = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    top = f"<thead><tr>{columns}</tr></thead>" if any(head) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>{top}<tbody>{body}</tbody></table>"


def bars(stacks: Sequence[Sequence[float]], title: str, width: int = 560, height: int = 90) -> str:
    """One bar for each stack, its parts on top of each other, as SVG."""
    most = max((sum(stack) for stack in stacks), default=0) or 1
    step = width / max(len(stacks), 1)
    parts = []
    for place, stack in enumerate(stacks):
        top = float(height)
        for number, value in enumerate(stack):
            size = height * value / most
            top -= size
            if value:
                parts.append(
                    f'<rect x="{place * step:.1f}" y="{top:.1f}" width="{max(step - 1, 0.5):.1f}" '
                    f'height="{size:.1f}" fill="{COLOURS[number % len(COLOURS)]}" '
                    f'fill-opacity="{1 if number < len(COLOURS) else 0.55}"/>'
                )
    return _svg("".join(parts), title, width, height)


def curve(x: Sequence[float], y: Sequence[float], title: str) -> str:
    """A line from the lowest value to the highest, both of which are said, as SVG."""
    width, height, margin = 560, 120, 18
    low, high = min(y), max(y)
    across, up = (x[-1] - x[0]) or 1, (high - low) or 1
    points = " ".join(
        f"{(a - x[0]) / across * width:.1f},"
        f"{margin + (1 - (b - low) / up) * (height - 2 * margin):.1f}"
        for a, b in zip(x, y, strict=True)
    )
    label = 'font-size="11" fill="currentColor" fill-opacity="0.7"'
    inner = (
        f'<polyline points="{points}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>'
        f'<text x="0" y="12" {label}>{high:.4g}</text>'
        f'<text x="0" y="{height - 3}" {label}>{low:.4g}</text>'
    )
    return _svg(inner, title, width, height)


def block(title: str, *parts: str) -> str:
    """A titled piece of a notebook."""
    return f"<div><strong>{escape(title)}</strong>{''.join(parts)}</div>"


def line(text: str) -> str:
    """A line of text."""
    return f"<div>{escape(text)}</div>"


def _svg(inner: str, title: str, width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" style="max-width:100%;display:block" role="img" '
        f'aria-label="{escape(title, quote=True)}">{inner}</svg>'
    )
