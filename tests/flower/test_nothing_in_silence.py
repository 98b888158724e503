"""Flower apps that nobody here wrote: what they say is heard, and what cannot be ends."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("flwr")

from atoll.cli import main
from atoll.errors import ConfigurationError
from atoll.flower import read_app, run_app

PROJECT = """
[project]
name = "silent"
version = "1.0.0"
[tool.flwr.app]
publisher = "x"
[tool.flwr.app.components]
serverapp = "{module}:server"
clientapp = "{module}:client"
[tool.flwr.app.config]
num-server-rounds = 1
"""
APP = """
import logging
import warnings

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

INITIAL = np.random.rand(2)  # at import, as a net at the top of many tutorials
client, server = ClientApp(), ServerApp()


@client.train()
def train(message, context):
    {train}
    arrays = message.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({{"num-examples": 1}})
    content = RecordDict({{"arrays": ArrayRecord([arrays[0] + INITIAL]), "metrics": metrics}})
    return Message(content, reply_to=message)


@server.main()
def main(grid, context):
    {main}
    strategy = FedAvg(fraction_evaluate=0.0, {settings})
    strategy.start(grid=grid, initial_arrays=ArrayRecord([INITIAL]), num_rounds=1)
"""
COUNT = [0]


def app(folder, train="pass", main="pass", settings=""):
    COUNT[0] += 1
    module = f"silent_{COUNT[0]}"
    place = folder / module
    place.mkdir()
    (place / "pyproject.toml").write_text(PROJECT.format(module=module))
    text = APP.format(train=train, main=main, settings=settings)
    (place / f"{module}.py").write_text(text)
    return place


@pytest.fixture(autouse=True)
def no_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    return tmp_path / "flwr"


@pytest.mark.parametrize("workers", [1, 2])
def test_draws_at_import_are_of_the_seed_in_every_process(tmp_path, workers):
    place = app(tmp_path)
    found = []
    for seed in (3, 3, 4):
        sys.modules.pop(place.name, None)
        read = read_app(place, seed)
        found.append(run_app(read.told({}, 4), seed=seed, workers=workers).model["params"])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    # What clients add is what the server began with: they drew the same.
    initial = sys.modules[place.name].INITIAL
    np.testing.assert_allclose(found[2], 2 * initial, rtol=1e-6)


def test_waiting_for_more_clients_than_there_are_ends_in_a_sentence(tmp_path, capsys):
    place = app(tmp_path, settings="min_available_nodes=20")
    started = time.monotonic()
    assert main(["flower", str(place), "--clients", "3", "--runs", str(tmp_path / "runs")]) == 1
    assert time.monotonic() - started < 20
    assert "waits for more clients than the 3 that there are" in capsys.readouterr().err


def test_the_old_loop_does_not_wait_either():
    from flwr.client import NumPyClient
    from flwr.clientapp import ClientApp
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.serverapp import ServerApp

    from atoll.flower import App

    strategy = FedAvg(min_available_clients=20)
    server = ServerApp(
        server_fn=lambda context: ServerAppComponents(
            strategy=strategy, config=ServerConfig(num_rounds=1)
        )
    )
    client = ClientApp(client_fn=lambda context: NumPyClient().to_client())
    with pytest.raises(ConfigurationError, match="waits for 20 clients, and there are 3"):
        run_app(App("old", server, client, clients=3))


def test_what_the_app_says_is_heard_and_what_flower_says_is_not(tmp_path):
    place = app(
        tmp_path,
        main='log(logging.INFO, "said by the app"); log(logging.WARNING, "warned by the app"); '
        'print("printed by the app"); warnings.warn("python warned")',
    )
    done = subprocess.run(
        [sys.executable, "-m", "atoll", "flower", str(place), "--runs", str(tmp_path / "runs")],
        capture_output=True, text=True, env=dict(os.environ), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    for text in ("said by the app", "warned by the app", "printed by the app", "python warned"):
        assert text in said
    assert "[ROUND 1" not in said


def test_a_client_that_fails_says_where(tmp_path, capsys):
    place = app(tmp_path, train='raise ValueError("no such file")')
    assert main(["flower", str(place), "--runs", str(tmp_path / "runs")]) == 1
    assert f"ValueError: no such file (in train, {place.name}.py line" in capsys.readouterr().err


def test_a_clients_own_time_counts_and_not_that_of_others(tmp_path):
    """Six clients of 0.2 seconds each, one after the other, within a second each."""
    place = app(tmp_path, train="import time; time.sleep(0.2)", settings="")
    text = (place / f"{place.name}.py").read_text()
    (place / f"{place.name}.py").write_text(text.replace("num_rounds=1", "num_rounds=1, timeout=1"))
    run = run_app(read_app(place).told({}, 6))
    assert run.history[0].accepted == 6


def test_there_are_as_many_clients_as_flower_would_start(tmp_path, no_configuration):
    place = app(tmp_path)
    assert read_app(place).clients == 2
    no_configuration.mkdir()
    path = no_configuration / "config.toml"
    path.write_text(
        '[superlink]\ndefault = "local"\n[superlink.local]\noptions.num-supernodes = 7\n'
    )
    assert read_app(place).clients == 7
    path.write_text("nonsense [")
    assert read_app(place).clients == 2
    project = place / "pyproject.toml"
    project.write_text(
        project.read_text() + '[tool.flwr.federations]\ndefault = "l"\n'
        "[tool.flwr.federations.l]\noptions.num-supernodes = 5\n"
    )
    assert read_app(place).clients == 5


OWN_LOOP = """
    class Own(FedAvg):
        def start(self, grid, initial_arrays, num_rounds):
            arrays = initial_arrays
            for number in range(1, 3):
                from flwr.app import ConfigRecord
                messages = self.configure_train(number, arrays, ConfigRecord(), grid)
                replies = grid.send_and_receive(messages)
                arrays, metrics = self.aggregate_train(number, replies)
            return None
"""


def test_a_strategy_with_a_loop_of_its_own_keeps_its_model_and_metrics(tmp_path):
    place = app(tmp_path, train="pass")
    path = place / f"{place.name}.py"
    import textwrap

    text = path.read_text().replace("strategy = FedAvg(", "strategy = Own(")
    text = text.replace("\nclient, server =", textwrap.dedent(OWN_LOOP) + "\nclient, server =", 1)
    text = text.replace('{"num-examples": 1}', '{"num-examples": 1, "found": 2.5}')
    path.write_text(text)
    run = run_app(read_app(place, 1).told({}, 3), seed=1)
    assert len(run.history) == 2
    assert run.history[-1].measurements["found"] == 2.5
    initial = sys.modules[place.name].INITIAL
    np.testing.assert_allclose(run.model["params"], 3 * initial, rtol=1e-6)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("import flwr.of_the_future", "which flwr .* does not have: it is written for another"),
        ("import nobody_has_this", "which is not installed"),
        ("from flwr.app import OfTheFuture", "needs another version of what it imports"),
    ],
)
def test_what_an_app_lacks_is_told_apart(tmp_path, line, told):
    place = app(tmp_path)
    path = place / f"{place.name}.py"
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(ConfigurationError, match=told):
        read_app(place)


def test_lists_of_figures_are_told_one_by_one(tmp_path):
    """As Flower's strategies average them: place by place, by examples."""
    train = "number = context.node_config['partition-id']"
    place = app(tmp_path, train)
    source = next(place.glob("*.py"))
    text = source.read_text().replace(
        'MetricRecord({"num-examples": 1})',
        'MetricRecord({"num-examples": 1 + 2 * number, "recall": [0.5, float(number)],\n'
        '                            "curve": [0.0] * 100})',
    )
    source.write_text(text)
    run = run_app(read_app(place).told({}, 2))
    measured = run.history[0].measurements
    assert measured["recall[0]"] == 0.5
    assert measured["recall[1]"] == pytest.approx(0.75)
    assert not [name for name in measured if name.startswith("curve")]


def test_what_a_node_is_told_is_in_its_context(tmp_path, capsys):
    train = (
        "print('told', context.node_config['file'], context.node_config['rate'] * 2, "
        "context.node_config['partition-id'])"
    )
    place = app(tmp_path, train)
    words = ["flower", str(place), "--clients", "2", "--runs", str(tmp_path / "runs")]
    told = ["--node-config", "file='/data/{partition-id}.csv'", "--node-config", "rate=0.25"]
    assert main([*words, *told]) == 0
    out = capsys.readouterr().out
    assert "told /data/0.csv 0.5 0" in out and "told /data/1.csv 0.5 1" in out
    assert main([*words, "--node-config", "file"]) == 1


SCRIPT = """
import sys
from flwr.simulation import run_simulation
from {module} import client, server
print("began as", __name__, sys.argv[1:])
run_simulation(server_app=server, client_app=client, num_supernodes=2)
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_script_that_ends_by_sys_exit_ends_as_it_says(tmp_path, monkeypatch, code):
    place = app(tmp_path)
    script = place / "begin.py"
    script.write_text(f"{SCRIPT.format(module=place.name)}\nsys.exit({code})\n")
    monkeypatch.chdir(place)
    assert main(["flower", "begin.py", "--runs", str(tmp_path / "runs")]) == code
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_script_is_run_by_its_modules_name(tmp_path, capsys, monkeypatch):
    place = app(tmp_path)
    package = place / f"package_{place.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "begin.py").write_text(SCRIPT.format(module=place.name))
    monkeypatch.chdir(place)
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["flower", *runs, "-m", f"{package.name}.begin", "--", "a", "b"]) == 0
    assert "began as __main__ ['a', 'b']" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").iterdir())) == 1
    for missing in ("nowhere", f"{package.name}.nowhere", "nowhere.deep"):
        assert main(["flower", *runs, "-m", missing]) == 1
        assert "there is no module" in capsys.readouterr().err
    assert main(["flower", *runs]) == 1
    assert "say which app" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_who_sends_does_not_wait_and_all_is_answered_in_order(tmp_path, workers):
    """Messages are answered when replies are asked for; also those nobody asks about."""
    main_ = """
    from flwr.app import MessageType
    def say(node):
        content = RecordDict({"arrays": ArrayRecord([np.full(2, node, float)])})
        return grid.create_message(content, MessageType.TRAIN, node, "1")
    import time
    begun = time.monotonic()
    first = list(grid.push_messages([say(1), say(2)]))
    assert time.monotonic() - begun < 0.4
    replies = list(grid.pull_messages(first[1:]))
    assert len(replies) == 1 and replies[0].metadata.src_node_id == 2
    assert len(list(grid.pull_messages(first))) == 1
    assert not list(grid.pull_messages(first))
    grid.push_messages([say(1)])
    """
    said = tmp_path / "said"
    train = (
        "import time; time.sleep(0.5)\n"
        f"    with open({str(said)!r}, 'a') as file:\n        file.write('x')"
    )
    run = run_app(read_app(app(tmp_path, train, main_.strip())).told({}, 2), workers=workers)
    assert run.history[0].accepted == 2
    assert said.read_text() == "x" * 5  # three by hand, of which one is never asked for


def test_an_old_strategys_own_aggregates_are_the_figures(tmp_path):
    """As Flower's History has them: what fit_metrics_aggregation_fn makes, not our means."""
    import flwr
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.serverapp import ServerApp

    from atoll.flower import App

    class Numbered(flwr.client.NumPyClient):
        def __init__(self, number):
            self.number = number

        def get_parameters(self, config):
            return [np.zeros(2)]

        def fit(self, parameters, config):
            return parameters, 1, {"m": float(self.number)}

        def evaluate(self, parameters, config):
            return 0.5, 1, {"acc": float(self.number)}

    def best(name):
        return lambda told: {f"best_{name}": max(metrics[name] for _, metrics in told)}

    def made(own):
        strategy = flwr.server.strategy.FedAvg(
            fit_metrics_aggregation_fn=best("m") if own else None,
            evaluate_metrics_aggregation_fn=best("acc") if own else None,
        )
        config = ServerConfig(num_rounds=2)
        server = ServerApp(
            server_fn=lambda _: ServerAppComponents(strategy=strategy, config=config)
        )
        client = flwr.client.ClientApp(
            client_fn=lambda context: Numbered(context.node_config["partition-id"]).to_client()
        )
        return run_app(App("old", server, client, {"num-server-rounds": 5}, 3))

    run = made(own=True)
    assert [record.measurements for record in run.history] == [{"best_m": 2.0}] * 2
    assert [record.metrics for record in run.history] == [{"loss": 0.5, "best_acc": 2.0}] * 2
    assert run.rounds == 2  # and not what a setting says that the app does not read
    means = made(own=False)
    assert means.history[0].measurements["m"] == 1.0 and means.history[0].metrics["acc"] == 1.0
