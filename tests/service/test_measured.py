"""What sites say of how good models are on rows of their own."""

from __future__ import annotations

import json

import pytest
from test_federation import simulated

from atoll.cli.files import read_data
from atoll.protocol import messages
from atoll.service.measuring import Measuring, by_metric, latest
from atoll.service.storage.database import Store
from atoll.tracking.reading import read_run

pytest.importorskip("sklearn")


def privately(place, private):
    path = place.root / "federation.py"
    text = path.read_text().replace(
        "federation = Federation(", f"federation = Federation(\n    private={private},"
    )
    path.write_text(text)


@pytest.mark.parametrize("private", ["()", "('1.*',)"], ids=["shared", "private"])
def test_served_it_is_measured_as_in_the_simulation(place, private):
    place.clients = 3
    tokens = {str(n): place.invite(str(n)) for n in range(3)}
    place.write(schedule="Synchronous(rounds=12)")
    privately(place, private)
    place.serve("--linger", "60", "--sites", "3")
    for name, token in tokens.items():
        place.join(name, token)
    for name in tokens:
        assert place.wait(name) == 0, place.log(name)
    assert place.wait("server", 30) == 0, place.log("server")
    run, served = simulated(place), read_run(place.root / "state")
    for metric in ("accuracy", "loss"):
        assert served.per_client[metric].keys() == {"0", "1", "2"}
        if metric in run.per_client:
            for name, value in run.per_client[metric].items():
                assert served.per_client[metric][name] == pytest.approx(value, rel=1e-6), name
    assert "accuracy" in run.per_client
    rows = {row["name"]: row for row in map(
        json.loads, place.cli("sites", "state", "--json").splitlines())}  # fmt: skip
    for name in tokens:
        log = place.log("server")
        assert f"{name} measured round 10 on" in log
        assert f"{name} measured round 12 on" in log
        said = rows[name]["measured"]
        assert said["round"] == 12
        assert said["figures"]["accuracy"] == served.per_client["accuracy"][name]
        assert "rows that are held out: " in place.log(name)
    assert "round 12" in place.cli("sites", "state")
    assert "on rows of its own" in place.cli("show", "state")


def test_who_tells_nothing_of_its_data_is_not_asked(place):
    place.write(schedule="Synchronous(rounds=2)")
    token = place.invite("0")
    place.serve("--linger", "30")
    place.join("0", token, "--undeclared")
    assert place.wait("0") == 0, place.log("0")
    assert "measured" not in place.log("server")
    assert read_run(place.root / "state").per_client == {}


@pytest.fixture
def measuring(tmp_path, plan):
    store = Store(f"sqlite:///{tmp_path / 'state.db'}")
    assert store.lead()
    yield Measuring(plan, store, tmp_path), store, tmp_path
    store.close()


@pytest.fixture
def plan():
    from atoll import Evaluation, Federation, algorithms, schedules
    from atoll.learners import NumpyLearner

    return Federation(
        learner=NumpyLearner([2, 2], lr=0.1, batch_size=2), algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=9), evaluation=Evaluation(clients_every=4),
    )  # fmt: skip


def said(round, **figures):
    return messages.Measured(round, 7, figures)


def test_who_is_asked_and_when(measuring, plan):
    measure, store, folder = measuring
    assert not measure.wanted("a", 0, done=False)
    assert not measure.wanted("a", 3, done=False)
    assert measure.wanted("a", 4, done=False)
    assert measure.wanted("a", 3, done=True), "the last model is measured, whatever its round"
    assert "nobody asks a" in measure.told("a", said(4, accuracy=0.5)), "it was not asked"
    measure.ask("a", 4, 7)
    assert "nobody asks a" in measure.told("a", said(3, accuracy=0.5))
    for wrong in ({"<b>": 0.5}, {"": 0.5}, {"accuracy": 1e308}):
        assert "no figures" in measure.told("a", said(4, **wrong))
    assert measure.told("a", said(4, accuracy=0.5, auc=float("nan"))) == ""
    assert "nobody asks a" in measure.told("a", said(4, accuracy=0.6)), "once"
    assert not measure.wanted("a", 4, done=False)
    assert measure.wanted("b", 4, done=False)
    # Another process takes over.
    again = Measuring(plan, store, folder)
    assert not again.wanted("a", 4, done=False)
    again.ask("b", 4, 9)
    # Rounds go on meanwhile, and its answer is kept.
    assert not again.wanted("b", 5, done=False)
    assert again.told("b", said(4, accuracy=0.75)) == ""
    assert json.loads((folder / "spread.json").read_text()) == {"accuracy": {"a": 0.5, "b": 0.75}}
    again.ask("b", 8, 9)
    assert again.told("b", said(8, accuracy=0.9)) == ""
    assert by_metric(latest(store)) == {"accuracy": {"b": 0.9}}
    assert [row["examples"] for row in latest(store)] == [7, 9], "as was said before"
    assert [row["round"] for row in latest(store)] == [4, 8]


def test_a_table_holds_a_fifth_out(tmp_path):
    (tmp_path / "site.py").write_text(
        "import numpy, atoll\n"
        "data = atoll.data.from_arrays(numpy.zeros((50, 2)), numpy.arange(50) % 2)\n"
    )
    found = read_data(str(tmp_path / "site.py"), None, 0.2)
    assert (found.size(0), len(found.test(0))) == (40, 10)
    assert read_data(str(tmp_path / "site.py")).size(0) == 50


def test_the_schema_is_closed():
    for body in (b'{"round": 1, "examples": 1}', b'{"round": -1, "examples": 1, "figures": {}}',
                 b'{"round": 1, "examples": 1, "figures": {"a": "b"}}',
                 b'{"round": 1, "examples": 1, "figures": {"a": 1}, "more": 1}'):  # fmt: skip
        with pytest.raises(messages.MessageError):
            messages.read(messages.Measured, body)
