"""Tables: what a federation's server keeps, on SQLite or PostgreSQL, and how old ones are brought
up to date. Model bytes are never here; they are blobs, known by their SHA-256."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sqlalchemy as sa

from atoll.errors import ConfigurationError

metadata = sa.MetaData()

#: Single values: the coordinator's state, the project, the format.
settings = sa.Table(
    "settings",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
sites = sa.Table(
    "sites",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, nullable=False, unique=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("joined", sa.Float, nullable=False),
    sa.Column("seen", sa.Float, nullable=False),
    sa.Column("examples", sa.BigInteger, nullable=False, default=0),
    sa.Column("about", sa.Text, nullable=False, default="{}"),
)
tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("used", sa.Float),
)
#: One row for each attempt at a round; `state` is open, stepping, closed or abandoned.
rounds = sa.Table(
    "rounds",
    metadata,
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("opened", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
    sa.Column("population", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("record", sa.Text, nullable=False, default="{}"),
)
#: `state` is open, accepted, refused, lost or spared; `version` is the model it began from and
#: `staleness` how many versions came between, once it has delivered; `counted` is the round whose
#: mean it is in. Where rounds have several questions, the first `asked` of them told `told` bytes.
assignments = sa.Table(
    "assignments",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("site", sa.Text, nullable=False, index=True),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("turn", sa.Integer, nullable=False),
    sa.Column("fraction", sa.Float, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("opened", sa.Float, nullable=False),
    sa.Column("delivered", sa.Float),
    sa.Column("digest", sa.Text),
    sa.Column("size", sa.BigInteger, nullable=False, default=0),
    sa.Column("staleness", sa.Integer, nullable=False, default=0),
    sa.Column("counted", sa.Integer),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("asked", sa.Integer, nullable=False, default=0, server_default="0"),
    sa.Column("told", sa.BigInteger, nullable=False, default=0, server_default="0"),
)
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("assignment", sa.Text, nullable=False, unique=True),
    sa.Column("site", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("opened", sa.Float, nullable=False),
    sa.Column("step", sa.Integer, nullable=False, default=0, server_default="0"),
)
#: Every accepted answer: to the question `step` of its assignment's round, from 0. What a round
#: asks next is made again from these after a crash, to the same bytes.
answers = sa.Table(
    "answers",
    metadata,
    sa.Column("assignment", sa.Text, primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
)
#: Who may see the live page: a ticket is good once, a visit is a browser's cookie.
visits = sa.Table(
    "visits",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
)
#: `state` is the digest of the server's vectors, `broadcast` of what sites receive, `model` of the
#: model by itself. Version v is the model after v rounds.
versions = sa.Table(
    "versions",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("broadcast", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("made", sa.Float, nullable=False),
)
#: Each line's digest covers the line before.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
)
#: What sites say of a model, on rows of their own that it was not trained on.
measured = sa.Table(
    "measured",
    metadata,
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("site", sa.Text, primary_key=True),
    sa.Column("examples", sa.BigInteger, nullable=False),
    sa.Column("figures", sa.Text, nullable=False),
)
#: Which server process leads, until when.
lease = sa.Table(
    "lease",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("until", sa.Float, nullable=False),
)

FORMAT = "format"


def _first(connection: sa.Connection) -> None:
    metadata.create_all(connection)


def _second(connection: sa.Connection) -> None:
    """Visits of the live page, and what it looks assignments up by."""
    visits.create(connection, checkfirst=True)
    for name in ("round", "counted"):
        connection.execute(
            sa.text(f"CREATE INDEX IF NOT EXISTS assignments_{name} ON assignments ({name})")
        )


def _third(connection: sa.Connection) -> None:
    """Answers to the several questions of a round."""
    answers.create(connection, checkfirst=True)
    columns = {column["name"] for column in sa.inspect(connection).get_columns("uploads")}
    if "step" not in columns:
        connection.execute(
            sa.text("ALTER TABLE uploads ADD COLUMN step INTEGER NOT NULL DEFAULT 0")
        )


def _fourth(connection: sa.Connection) -> None:
    """What each site was told with the questions of a round."""
    columns = {column["name"] for column in sa.inspect(connection).get_columns("assignments")}
    for name, kind in (("asked", "INTEGER"), ("told", "BIGINT")):
        if name not in columns:
            connection.execute(
                sa.text(f"ALTER TABLE assignments ADD COLUMN {name} {kind} NOT NULL DEFAULT 0")
            )


def _fifth(connection: sa.Connection) -> None:
    """What sites say of models."""
    measured.create(connection, checkfirst=True)


#: What turns format n into format n + 1; a change of tables adds one and never edits another.
MIGRATIONS: Sequence[Callable[[sa.Connection], None]] = (_first, _second, _third, _fourth, _fifth)


def migrate(connection: sa.Connection) -> None:
    """Bring the tables to the newest format, in the transaction of the connection."""
    have = 0
    if sa.inspect(connection).has_table(settings.name):
        row = connection.execute(sa.select(settings.c.value).where(settings.c.name == FORMAT))
        have = int(row.scalar() or 0)
    if have > len(MIGRATIONS):
        raise ConfigurationError(
            f"the database is of format {have}, made by a newer atoll; this one knows formats up "
            f"to {len(MIGRATIONS)}: upgrade it"
        )
    for step in MIGRATIONS[have:]:
        step(connection)
    if have < len(MIGRATIONS):
        connection.execute(settings.delete().where(settings.c.name == FORMAT))
        connection.execute(settings.insert().values(name=FORMAT, value=str(len(MIGRATIONS))))
