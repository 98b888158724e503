"""Terms: what a site's owner agrees to before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from atoll.core import files
from atoll.errors import ConfigurationError, NotAdmitted
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

    def offer(self, folder: Path, project: str) -> Iterator[None]:
        """Put these terms to the owner of a folder; comes by until they are agreed to.

        They are those of one `project`, under the authority that the folder trusts. Raises
        `RunError` once they are refused.
        """
        authority = folder / "ca.pem"
        trusted = sha256(authority.read_bytes()).hexdigest() if authority.exists() else "public"
        whose = {"project": project, "authority": trusted}
        plain = {**whose, "code": self.code, "plan": self.plan, **self.described}
        files.write_json(folder / "terms.json", plain)
        # An answer to other terms is none to these.
        while _answer(folder / "approved.json") != plain:
            if _answer(folder / "refused.json") == plain:
                raise NotAdmitted("the owner of this site has refused the federation's terms")
            yield


def _answer(path: Path) -> Any:
    """What the owner has said so far; a file that is cut short says nothing yet."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


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
