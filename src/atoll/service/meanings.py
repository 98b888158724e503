"""What sites' data mean, agreed on as they check in: a second site that differs is told how."""

from __future__ import annotations

from atoll.data.meaning import Meaning
from atoll.protocol.messages import CheckIn
from atoll.service.storage.database import Change, Store

#: The store's setting: the first meaning that was told, its digest and whose it is.
SETTING = "meaning"


def settle(change: Change, meaning: Meaning, whose: str) -> None:
    """Let this be what the federation's data mean, unless that is known."""
    if meaning and change.setting(SETTING) is None:
        _settle(change, whose, meaning.digest, meaning)


def forget(change: Change, site: str) -> None:
    """The next site says anew what the data mean, if this one did."""
    known = change.setting(SETTING)
    if known is not None and known["site"] == site:
        change.set(SETTING, None)


def disagreement(store: Store, site: str, message: CheckIn) -> str:
    """How the meaning of a site's data differs from the federation's; empty if it does not.

    It is that of the server's test data or of the first site that says one.
    """
    if message.meaning is None:
        return ""
    known = store.setting(SETTING)
    told = Meaning(tuple(message.inputs), tuple(message.classes), message.target)
    if known is None:
        with store.change() as change:
            _settle(change, site, message.meaning, told)
            change.audit(site, "meaning", digest=message.meaning)
        return ""
    if known["digest"] == message.meaning:
        return ""
    agreed = Meaning(tuple(known["inputs"]), tuple(known["classes"]), known["target"])
    how = told.difference(agreed, site, known["site"]) if told and agreed else ""
    return (
        f"{site}'s data mean something else than those of {known['site']}: "
        f"{how or 'the names of their inputs or classes differ'}. Bring columns, categories and "
        "labels into one form at both"
    )


def _settle(change: Change, whose: str, digest: str, meaning: Meaning) -> None:
    told = {
        "digest": digest, "site": whose, "inputs": [*meaning.inputs],
        "classes": [*meaning.classes], "target": meaning.target,
    }  # fmt: skip
    change.set(SETTING, told)
