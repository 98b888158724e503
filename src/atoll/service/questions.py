"""Questions: what an open question tells those who are asked, as blobs that only they may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from atoll.aggregation.conversation import Ask
from atoll.service.storage.models import ModelStore


@dataclass(frozen=True)
class Question:
    """A question as sites hear of it.

    `told` is the blob that goes to all of them, `mail` those that go to one site alone; empty
    where there is nothing to tell.
    """

    name: str
    owner: str
    works: bool
    step: int
    told: str = ""
    mail: Mapping[str, str] = field(default_factory=dict)

    def may_read(self, site: str, digest: str) -> bool:
        """Whether a blob of this question is for a site's eyes."""
        return digest != "" and (digest == self.told or self.mail.get(site) == digest)


def put_question(ask: Ask, models: ModelStore, step: int) -> Question:
    """Hand out what a question tells."""
    question = {"told": ask.told, "given": ask.given}
    told = {name: part for name, part in question.items() if part}
    return Question(
        ask.name,
        ask.owner,
        ask.works,
        step,
        models.hand_out({"question": told}) if told else "",
        {client: models.hand_out(mail) for (client, _), mail in ask.mail.items() if mail},
    )
