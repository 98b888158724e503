"""Terms: what a site's owner agrees to before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from atoll.core import files
from atoll.errors import ConfigurationError, RunError
from atoll.rounds.describe import describe, plan_digest
from atoll.rounds.plan import Plan


@dataclass(frozen=True)
class Terms:
    """The code, the plan, and what leaves the site."""

    code: str
    plan: str
    described: dict[str, Any]

    @staticmethod
    def of(plan: Plan, file: Path) -> Terms:
        """The terms of a federation as this site's own copy of the file says them."""
        parts = {
            name: describe(getattr(plan, name))
            for name in ("learner", "algorithm", "pipeline", "schedule")
        }
        more = {name: describe(getattr(plan, name)) for name in ("private", "download", "public")}
        parts |= {name: value for name, value in more.items() if value}
        return Terms(sha256(file.read_bytes()).hexdigest(), plan_digest(plan), parts)

    def offer(self, folder: Path) -> Iterator[None]:
        """Put these terms to the owner of a folder; comes by until they are agreed to.

        Raises `RunError` once they are refused.
        """
        plain = {"code": self.code, "plan": self.plan, **self.described}
        files.write_json(folder / "terms.json", plain)
        agreed = folder / "approved.json"
        while not (agreed.exists() and json.loads(agreed.read_text("utf-8")) == plain):
            if (folder / "refused.json").exists():
                raise RunError("the owner of this site has refused the federation's terms")
            yield


def approve(folder: Path, *, refuse: bool = False) -> dict[str, Any]:
    """Agree (or not) to the terms that a waiting agent has been offered; returns them."""
    asked = folder / "terms.json"
    if not asked.exists():
        raise ConfigurationError(
            f"nothing waits for approval in {folder}; an agent that was started with --ask does"
        )
    terms: dict[str, Any] = json.loads(asked.read_text(encoding="utf-8"))
    name, other = ("refused", "approved") if refuse else ("approved", "refused")
    (folder / f"{other}.json").unlink(missing_ok=True)
    files.write_json(folder / f"{name}.json", terms)
    return terms
