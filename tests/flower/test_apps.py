"""Flower apps as their authors wrote them, against numbers worked out by hand and by Flower."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr")

from atoll.cli import main
from atoll.errors import ConfigurationError
from atoll.flower import App, read_app, run_app, simulations_of
from atoll.tracking import RunFolder
from atoll.tracking.reading import read_run

APPS = Path(__file__).parent / "apps"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Apps write where they are run; modules of one app must not be another's."""
    monkeypatch.chdir(tmp_path)
    before, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("numpyapp", "torchapp", "legacyapp"):
            del sys.modules[name]


def saved():
    with np.load("final_model.npz") as arrays:
        return [arrays[name] for name in arrays]


def test_a_numpy_app_gives_the_weights_of_the_loop_people_would_write():
    run = run_app(read_app(APPS / "numpyapp").told({}, 4))
    true = np.array([1.0, -2.0, 0.5])
    data = []
    for partition in range(4):
        rng = np.random.default_rng(partition)
        x = rng.normal(size=(20 + 5 * partition, 3))
        data.append((x, x @ true + 0.1 * rng.normal(size=len(x))))
    weights = np.zeros(3)
    for _ in range(3):
        trained = []
        for x, y in data:
            own = weights.copy()
            for _ in range(10):
                own -= 0.2 * 2 * x.T @ (x @ own - y) / len(x)
            trained.append(own)
        sizes = np.array([len(x) for x, _ in data])
        weights = sizes @ np.array(trained) / sizes.sum()
    np.testing.assert_allclose(saved()[0], weights, rtol=1e-12)
    losses = [np.mean((x @ weights - y) ** 2) for x, y in data]
    assert run.metrics["eval_loss"] == pytest.approx(np.average(losses, weights=sizes))
    assert run.per_client["eval_loss"] == pytest.approx(dict(zip("0123", losses, strict=True)))
    assert [record.accepted for record in run.history] == [4, 4, 4]
    # What a client keeps in its context is there in the next round.
    assert [record.measurements["asked"] for record in run.history] == [1, 2, 3]
    np.testing.assert_allclose(run.model["params"], weights, rtol=1e-6)
    assert run.rounds == 3


def test_one_seed_gives_the_same_draws_and_another_gives_others():
    app = read_app(APPS / "numpyapp").told({}, 3)
    noise = [
        [
            record.measurements["noise"]
            for record in run_app(app, seed=seed, workers=workers).history
        ]
        for seed, workers in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert noise[0] == noise[1] == noise[3] != noise[2]
    # Clients and rounds do not share a stream.
    assert len(set(noise[0])) == 3


def test_an_app_of_the_old_kind_gives_what_hands_compute():
    run = run_app(read_app(APPS / "legacyapp").told({}, 4))
    # Clients 0 to 3 go half way to their number and weigh 1 to 4: 1, then 1.5, then 1.75.
    np.testing.assert_array_equal(saved()[0], [1.75, 1.75])
    assert [record.metrics["first"] for record in run.history] == [1.0, 1.5, 1.75]
    assert [record.metrics["loss"] for record in run.history] == [2.0, 3.0, 3.5]
    # (1 x 1.75 + 2 x 0.75 + 3 x 0.25 + 4 x 1.25) / 10
    assert run.metrics["client_loss"] == pytest.approx(0.9)
    np.testing.assert_array_equal(run.model["params"], np.float32([1.75, 1.75]))


def test_a_script_runs_with_its_simulations_and_what_follows():
    runs = []
    count = simulations_of(APPS / "script.py", lambda app: runs.append(run_app(app)), ["--twice"])
    assert count == 2 and [run.data["name"] for run in runs] == ["script", "script-2"]
    # The mean of 0, 1, 2 and 3 is added twice, to zeros.
    assert [run.metrics["loss"] for run in runs] == [pytest.approx(3.0)] * 2
    # It read the history that Flower would have given it.
    assert Path("losses.json").read_text() == "[1.5, 3.0]"


def test_a_script_cannot_be_spread():
    with pytest.raises(ConfigurationError, match="cannot be imported elsewhere"):
        simulations_of(APPS / "script.py", lambda app: run_app(app, workers=2))


def test_a_torch_app_learns_and_repeats():
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    app = read_app(APPS / "torchapp").told({"num-server-rounds": "2"}, 3)
    first = run_app(app)
    model = [array.copy() for array in saved()]
    again = run_app(app)
    for one, other in zip(model, saved(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert first.history[1].metrics == again.history[1].metrics
    # The app seeds itself: of our seed only the order depends in which its server adds up.
    run_app(app, seed=5)
    for one, other in zip(model, saved(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert first.metrics["accuracy"] > 0.6
    assert first.model["params"].size == sum(array.size for array in model)


def test_clients_that_fail_are_left_out_and_said():
    app = read_app(APPS / "numpyapp").told({"failing-client": "1"}, 3)
    run = run_app(app)
    assert [record.accepted for record in run.history] == [2, 2, 2]
    assert run.refusals[0] == (
        "round 1, client 1: RuntimeError: the disk is full (in train, client_app.py line 16)"
    )


def test_the_callers_random_streams_are_untouched():
    import random

    random.seed(3)
    np.random.seed(3)
    expected = random.Random(3).random(), np.random.RandomState(3).rand()
    run_app(read_app(APPS / "numpyapp").told({"num-server-rounds": "1"}, 2))
    assert (random.random(), np.random.rand()) == expected


def test_the_command_keeps_a_run_that_others_read(tmp_path, capsys):
    arguments = ["flower", str(APPS / "numpyapp"), "--clients", "3", "--runs", str(tmp_path / "r")]
    assert main([*arguments, "--set", "num-server-rounds=2", "--name", "one"]) == 0
    run = read_run(tmp_path / "r" / "one")
    assert (len(run.history), run.rounds, run.data["name"]) == (2, 2, "numpyapp")
    ledger = [
        json.loads(line) for line in (tmp_path / "r/one/ledger.jsonl").read_text().splitlines()
    ]
    assert [client for client, *_ in ledger[0]["participants"]] == ["0", "1", "2"]
    assert main(["show", str(tmp_path / "r" / "one")]) == 0
    assert main([*arguments, "--set", "num-server-rounds=3", "--name", "two"]) == 0
    assert main(["compare", *(str(tmp_path / "r" / name) for name in ("one", "two")),
                 "--metric", "eval_loss", "--plot", str(tmp_path / "c.png")]) == 0  # fmt: skip
    assert "run_config.num-server-rounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "is not a Flower app"),
        ([str(APPS / "numpyapp"), "--set", "rounds=1"], "has no setting 'rounds'; it has num-"),
        ([str(APPS / "numpyapp"), "--set", "learning-rate=fast"], "does not fit"),
        ([str(APPS / "numpyapp"), "--set", "learning-rate"], "takes NAME=VALUE"),
        (["empty.py"], "ended without a call of flwr.simulation"),
        (["half"], "does not say"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_sentence(arguments, message, tmp_path, capsys):
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "pyproject.toml").write_text("[project]\nname = 'half'\n")
    assert main(["flower", *arguments, "--runs", str(tmp_path / "r")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists() or not list((tmp_path / "r").iterdir())


def test_an_app_that_breaks_shows_where(tmp_path, capsys):
    app = tmp_path / "broken"
    app.mkdir()
    (app / "pyproject.toml").write_text(
        "[tool.flwr.app.components]\nserverapp = 'broken_app:server'\n"
        "clientapp = 'broken_app:client'\n"
    )
    (app / "broken_app.py").write_text(
        "from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n"
        "client, server = ClientApp(), ServerApp()\n"
        "@server.main()\ndef main(grid, context):\n    raise ValueError('no such model')\n"
    )
    assert main(["flower", str(app), "--runs", str(tmp_path / "r")]) == 1
    err = capsys.readouterr().err
    assert "broken_app.py" in err and "raised ValueError: no such model" in err


def test_a_late_answer_is_left_out():
    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp

    from atoll.core.random import Key
    from atoll.flower.apps import App
    from atoll.flower.clients import Here
    from atoll.flower.grid import LocalGrid

    client = ClientApp()

    @client.query()
    def slow(message, context):
        import time

        time.sleep(0.05 * context.node_id)
        return Message(RecordDict(), reply_to=message)

    app = App("late", None, client, clients=3)
    grid = LocalGrid(Here(app), 3, Key(0), lambda *_: None)
    messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    # One after the other: each one's own time counts, 0.05, 0.1 and 0.15 seconds.
    answered = list(grid.send_and_receive(messages, timeout=0.125))
    assert [reply.metadata.src_node_id for reply in answered] == [1, 2]
    assert all(not reply.has_error() for reply in grid.send_and_receive(messages))
    (lost,) = grid.send_and_receive([Message(RecordDict(), 9, "query")])
    assert "there is no client 9" in lost.error.reason


def one_value(value, **more):
    """An app of three clients whose training gives `value(message, context)`."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message, context):
        metrics = {"num-examples": 1 + context.node_id, "loss": value(message, context)}
        content = {"arrays": ArrayRecord([np.zeros(2)]), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    @server.main()
    def main(grid, context):
        arrays = ArrayRecord([np.zeros(2)])
        # Everything by its place, as people may.
        strategy = FedAvg(fraction_evaluate=0.0, **more)
        strategy.start(grid, arrays, 2, 3600, None, None, lambda number, _: None)

    return App("one", server, client, {}, 3)


def test_a_client_that_fails_keeps_nothing_and_one_that_exits_ends_nothing():
    from flwr.app import MetricRecord

    def count(message, context):
        before = context.state.get("n", MetricRecord({"n": 0}))["n"]
        context.state["n"] = MetricRecord({"n": before + 1})
        if context.node_id == 1 and message.content["config"]["server-round"] == 1:
            raise ValueError("not now")
        if context.node_id == 2:
            raise SystemExit(3)
        return float(before + 1)

    run = run_app(one_value(count))
    assert [record.accepted for record in run.history] == [1, 2]
    # Client 1 failed in its first round, and counts from one in the second; weights 2 and 4.
    assert run.history[1].measurements["loss"] == pytest.approx((2 * 1 + 4 * 2) / 6)
    assert "SystemExit: 3" in " ".join(run.refusals)


def test_metrics_are_those_that_the_strategy_makes():
    from flwr.app import MetricRecord

    app = one_value(
        lambda message, context: float(context.node_id),
        train_metrics_aggr_fn=lambda contents, key: MetricRecord({"worst": 3.0}),
    )
    assert run_app(app).history[0].measurements == {"worst": 3.0}


def test_clients_do_not_share_what_they_are_given():
    def grow(message, context):
        config = message.content["config"]
        config["seen"] = [*config.get("seen", []), 1]
        message.content["arrays"].clear()
        return float(len(config["seen"]))

    run = run_app(one_value(grow))
    assert [record.measurements["loss"] for record in run.history] == pytest.approx([1.0, 1.0])


def test_apps_with_modules_of_the_same_name_are_two(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").write_text(
            "[tool.flwr.app.components]\nserverapp = 'same_app:server'\n"
            "clientapp = 'same_app:client'\n"
        )
        (tmp_path / name / "same_app.py").write_text(
            "from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n"
            f"client, server = ClientApp(), ServerApp()\nclient.name = '{name}'\n"
        )
    assert read_app(tmp_path / "first").client.name == "first"
    assert read_app(tmp_path / "second").client.name == "second"


def test_loops_of_their_own_have_rounds_and_can_match_replies():
    from flwr.app import Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    client, server = ClientApp(), ServerApp()
    matched = []

    @client.query()
    def query(message, context):
        # An empty list, as protocols of secure aggregation send them.
        content = RecordDict({"m": MetricRecord({"nobody": []})})
        return Message(content, reply_to=message)

    @server.main()
    def main(grid, context):
        for _ in range(3):
            sent = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
            names = grid.push_messages(sent)
            known = {message.metadata.message_id for message in sent}
            for reply in grid.pull_messages(names):
                matched.append(reply.metadata.reply_to_message_id in known)

    run = run_app(App("own", server, client, {}, 4))
    assert matched == [True] * 12
    assert [record.invited for record in run.history] == [4, 4, 4]


def test_secure_aggregation_runs_and_gives_the_mean():
    from flwr.client import NumPyClient
    from flwr.client.mod import secaggplus_mod
    from flwr.clientapp import ClientApp
    from flwr.common import ndarrays_to_parameters
    from flwr.server import LegacyContext, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
    from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
    from flwr.serverapp import ServerApp

    class Client(NumPyClient):
        def __init__(self, partition):
            self.partition = partition

        def fit(self, parameters, config):
            return [parameters[0] + self.partition], 1 + self.partition, {}

        def evaluate(self, parameters, config):
            return 0.0, 1, {}

    client = ClientApp(
        client_fn=lambda context: Client(context.node_config["partition-id"]).to_client(),
        mods=[secaggplus_mod],
    )
    server, found = ServerApp(), []

    @server.main()
    def main(grid, context):
        start = ndarrays_to_parameters([np.zeros(4)])
        legacy = LegacyContext(
            context=context, config=ServerConfig(num_rounds=1),
            strategy=FedAvg(initial_parameters=start),
        )  # fmt: skip
        DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(3, 2))(grid, legacy)
        found.extend(legacy.state[MAIN_PARAMS_RECORD].to_numpy_ndarrays())

    run = run_app(App("secure", server, client, {}, 5))
    # Weights 1 to 5 of the numbers 0 to 4, to the precision of the protocol's quantisation.
    np.testing.assert_allclose(found[0], np.full(4, 40 / 15), atol=1e-3)
    assert (run.history[0].invited, run.history[0].accepted) == (5, 5)


REAL = """
import importlib, sys
import flwr.simulation
from flwr.app import Context, RecordDict
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
place, name, clients = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.insert(0, place)
inner = importlib.import_module("flwr.simulation.run_simulation")
run = Run.create_empty(7)
run.primary_task_id, run.federation_id = 7, inner.NOOP_FEDERATION_ID
TaskIdentity.task_id = TaskIdentity.run_id = 7
TaskIdentity.node_id = inner.SUPERLINK_NODE_ID
import tomllib
config = tomllib.load(open(place + "/pyproject.toml", "rb"))["tool"]["flwr"]["app"]["config"]
inner._run_simulation(
    clients, inner.EventType.PYTHON_API_RUN_SIMULATION_ENTER, is_app=True, app_dir=place,
    client_app_attr=name + ".client_app:app", server_app_attr=name + ".server_app:app", run=run,
    server_app_context=Context(7, 0, {}, RecordDict(), config),
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["numpyapp", "torchapp", "legacyapp"])
def test_flowers_own_simulation_gives_the_same_numbers(name, tmp_path):
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(APPS / name), name, "4"],
        env={
            **os.environ, "PYTHONPATH": str(APPS / name), "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "OMP_NUM_THREADS": "1",
        },
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = saved()
    Path("final_model.npz").unlink()
    run_app(read_app(APPS / name).told({}, 4), observers=[RunFolder(tmp_path / "run", every=None)])
    ours = saved()
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        # Flower adds replies up in the order in which they come, which changes the last digit.
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
