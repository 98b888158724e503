"""Masks: a reducer of four questions with mail between clients, whose masks must cancel exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from atoll.aggregation import Ask, Gathered, Reducer, Schema, Spec
from atoll.core.updates import Aggregate, Update

UNIT = 2.0**20


@dataclass(frozen=True)
class Masked(Reducer):
    """Every pair of clients agrees on a number, through the server, sealed with the other's key.

    After Bonawitz et al., CCS 2017, without shares of secrets: of whoever falls silent between
    "shares" and "update" the others must give away the numbers, all of them, or nothing comes of
    the round. Sums are of whole numbers modulo 2^64, so the masks cancel exactly or not at all.
    """

    few: int = 2

    secret = True

    def fewest(self):
        return self.few

    def sends(self, schema):
        size = schema.vectors["delta"].size
        return replace(schema, vectors={"masked": Spec((size,), "int64")})

    takes = sends

    def open(self, schema):
        return Gathered()

    def talk(self, schema, talk):
        members, count = talk.members, len(talk.members)
        mail = {member: {"me": np.array([n, count])} for n, member in enumerate(members)}
        heard = yield Ask("keys", Gathered(), numbers(key=1), mail=mail, fewest=self.few)
        keys = [heard.into[m]["key"][0] if m in heard.senders else 0 for m in members]
        told = {"keys": np.array(keys, np.int64), "there": flags(members, heard.senders)}
        heard = yield Ask("shares", Gathered(), numbers(sealed=count), told, fewest=self.few)
        shared = heard.senders
        mail = {
            to: {
                "from": np.array(
                    [heard.into[m]["sealed"][n] if m in shared else 0 for m in members], np.int64
                )
            }
            for n, to in enumerate(members)
            if to in shared
        }
        told = {"there": flags(members, shared)}
        heard = yield Ask(
            "update", self.open(schema), schema, told, mail, works=True, fewest=self.few
        )
        worked, total = heard.senders, sum(heard.into[m]["masked"] for m in heard.senders)
        gone = [member for member in shared if member not in worked]
        told = {"gone": flags(members, gone)}
        heard = yield Ask("unmask", Gathered(), numbers(given=count, got=count), told, fewest=0)
        if gone and heard.senders != worked:
            raise ValueError("the masks of those who are gone are not all known")
        for member in heard.senders:
            total = total - masks(heard.into[member], told["gone"], total.size)
        mean = (total / UNIT / len(worked)).astype(np.float32)
        figures = {"unmasked": float(len(heard.senders))}
        return Aggregate({"delta": mean}, {}, len(worked), len(worked), talk.population, figures)

    def seal(self, update, told, mail, kept, key):
        got = mail["from"] ^ kept["key"]
        others = told["there"].copy()
        others[kept["me"][0]] = 0
        kept = {"me": kept["me"], "given": kept["given"], "got": got}  # the key is forgotten
        whole = whole_numbers(update.vectors["delta"])
        return replace(update, vectors={"masked": whole + masks(kept, others, whole.size)}), kept

    def answer(self, name, told, mail, kept, key):
        rng = key.fold(name).generator()
        if name == "keys":
            kept = {"me": mail["me"], "key": rng.integers(1, 2**62, 1)}
            return Update({"key": kept["key"]}), kept
        if name == "shares":
            given = rng.integers(1, 2**62, int(kept["me"][1])) * told["there"]
            sealed = (given ^ told["keys"]) * told["there"]
            return Update({"sealed": sealed}), {**kept, "given": given}
        shown = {part: kept[part] * told["gone"] for part in ("given", "got")}
        return Update(shown), {}  # there is nothing more to keep


def numbers(**sizes):
    """The schema of whole numbers."""
    return Schema.of({name: Spec((size,), "int64") for name, size in sizes.items()})


def flags(members, some):
    return np.array([member in some for member in members], np.int64)


def masks(numbers, others, size):
    """What hides a vector: each number given is added, each got is taken away."""
    total = np.zeros(size, np.int64)
    for n in np.flatnonzero(others):
        total += stream(numbers["given"][n], size) - stream(numbers["got"][n], size)
    return total


def stream(number, size):
    return np.random.Generator(np.random.Philox(key=int(number))).integers(-(2**62), 2**62, size)


def whole_numbers(vector):
    return np.rint(vector.astype(np.float64) * UNIT).astype(np.int64)


@dataclass(frozen=True)
class Asking(Reducer):
    """The mean of the updates, after a few more questions to those who sent them."""

    questions: int = 2
    few: int = 1

    def fewest(self):
        return self.few

    def open(self, schema):
        return Gathered()

    def talk(self, schema, talk):
        heard = yield Ask("update", self.open(schema), schema, works=True, fewest=self.few)
        worked, rows = heard.senders, heard.into
        for number in range(self.questions):
            told = {"number": np.array([number])}
            mail = {member: {"yours": np.array([n])} for n, member in enumerate(heard.senders)}
            heard = yield Ask("more", Gathered(), numbers(echo=2), told, mail, fewest=self.few)
        mean = sum(rows[member]["delta"] for member in worked) / np.float32(len(worked))
        return Aggregate({"delta": mean}, {}, len(worked), len(worked), talk.population)

    def answer(self, name, told, mail, kept, key):
        return Update({"echo": np.array([told["number"][0], mail["yours"][0]])}), kept


class Spoiled(Gathered):
    """Takes nothing of which the first value is above 100."""

    def add(self, update, sender):
        if update.vectors["delta"][0] > 100:
            raise IndexError("a place that is not there")
        super().add(update, sender)


@dataclass(frozen=True)
class Fragile(Asking):
    """What it gathers in fails at some updates that are of its schema."""

    def open(self, schema):
        return Spoiled()


@dataclass(frozen=True)
class Early(Asking):
    """Cannot even begin with so few."""

    def talk(self, schema, talk):
        if len(talk.members) < 3:
            raise ValueError("two are not enough to hide among")
        return (yield from super().talk(schema, talk))
