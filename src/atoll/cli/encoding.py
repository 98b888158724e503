"""`atoll summarize TABLE` and `atoll agree SUMMARY...`: what the columns of tables mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from atoll.data.encoding import Summary, agree, summarize
from atoll.data.encoding.kinds import NoValue
from atoll.errors import ConfigurationError, DataError

#: How this command writes what the sentences of `agree` advise.
LEGEND = """
On the command line columns={'A': 'a'} is --column A=a, values={'sex': {'F': 'female'}} is
--value sex:F=female, units={'chol': {'mmol/l': 38.67}} is --unit chol:mmol/l=38.67,
alike=['a'] is --alike a, and leave_out=['a'] is --leave-out a."""


def run(options: argparse.Namespace) -> int:
    """Tell what a table's columns are, or agree on what several tables' are."""
    return _agree(options) if hasattr(options, "summary") else _summarize(options)


def _summarize(options: argparse.Namespace) -> int:
    found = summarize(
        Path(options.table),
        label=options.label,
        features=options.features,
        leave_out=options.leave_out,
        units=dict(pair(text, "--unit") for text in options.unit),
        no_value=_no_value(options.no_value),
        least=options.least,
        site=options.site,
    )
    path = found.save(options.output or f"{found.site}.summary.json")
    print(found)
    print(f"\n{path}: look at it before you send it; no row is in it, but counts and means are")
    return 0


def _agree(options: argparse.Namespace) -> int:
    summaries = [Summary.load(path) for path in options.summary]
    values: dict[str, dict[str, str]] = {}
    for text in options.value:
        column, spelling, value = _triple(text, "--value", "sex:F=female")
        values.setdefault(column, {})[spelling] = value
    units: dict[str, dict[str, float]] = {}
    for text in options.unit:
        column, unit, factor = _triple(text, "--unit", "chol:mmol/l=38.67")
        try:
            units.setdefault(column, {})[unit] = float(factor)
        except ValueError:
            raise ConfigurationError(f"--unit: {factor!r} is no number to multiply by") from None
    try:
        found = agree(
            summaries,
            columns=dict(pair(text, "--column") for text in options.column),
            values=values,
            units=units,
            alike=options.alike,
            leave_out=options.leave_out,
            missing=options.missing,
            unknown=options.unknown,
            scale=options.scale,
            task=options.task,
        )
    except DataError as error:
        raise DataError(f"{error}{LEGEND}" if "\n" in str(error) else str(error)) from None
    path = found.save(options.output)
    print(found)
    print(f"\n{path}: keep it beside the federation's file, encoding=Encoding.load({str(path)!r})")
    return 0


def _no_value(given: Sequence[str]) -> NoValue:
    """Texts for all columns, or by column; `COLUMN=` says that all that is there is a value."""
    found: dict[str, list[str]] = {}
    for text in given:
        column, equals, value = text.partition("=")
        own = found.setdefault(column if equals else "*", [])
        own += [value] if equals and value else [] if equals else [text]
    return found


def pair(text: str, option: str) -> tuple[str, str]:
    """`NAME=VALUE` as the two."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigurationError(f"{option} needs NAME=VALUE, not {text!r}")
    return name, value


def _triple(text: str, option: str, example: str) -> tuple[str, str, str]:
    column, colon, rest = text.partition(":")
    other, equals, value = rest.rpartition("=")
    if not (column and colon and other and equals and value):
        raise ConfigurationError(f"{option} is written as in {example}, not {text!r}")
    return column, other, value
