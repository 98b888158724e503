"""The live page over run folders, in a real browser."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("sklearn")

from browser import tab, until

from atoll import Federation, algorithms, data, schedules
from atoll.errors import ConfigurationError
from atoll.learners import NumpyLearner
from atoll.tracking import Observer, RunFolder
from atoll.tracking.reading import read_run
from atoll.view.page.folders import FolderRun, status_of
from atoll.view.page.local import LocalPage


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def get(url, **headers):
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


def test_a_run_is_shown_as_its_folder_has_it(browser, runs, page_of):
    run = read_run(runs / "quick")
    with tab(browser, page_of(runs, "quick").url) as page:
        page.wait_for_selector("#learning-chart canvas")
        page.wait_for_selector("#clients tbody tr")
        assert page.text_content("h1") == "quick"
        assert page.text_content("#status") == "finished"
        assert page.text_content("#where") == "round 12 of 12"
        shown = page.evaluate("rows.map((row) => [row.round, row.metrics.accuracy])")
        assert shown == [[r.round, r.metrics["accuracy"]] for r in run.history]
        # What the chart was given, spread included.
        chart = page.evaluate("charts.get('learning-chart').plot.data")
        assert chart[1] == [r.metrics["accuracy"] for r in run.history]
        mean = run.history[3].metrics["accuracy_client_mean"]
        deviation = run.history[3].metrics["accuracy_client_std"]
        assert chart[2][3] == pytest.approx(mean + deviation)
        assert chart[3][3] == pytest.approx(mean - deviation)
        parts = page.evaluate("charts.get('part-chart').plot.data.slice(1)")
        assert parts == [[r.invited for r in run.history], [r.accepted for r in run.history]]
        assert any(r.accepted < r.invited for r in run.history)
        tiles = page.inner_text("#tiles")
        assert f"{run.metrics['accuracy']:.4g}" in tiles and "were missed" in tiles
        # Everything came from the page's own server.
        assert all(url.startswith(page.url.partition("?")[0]) for url in page.asked)


def test_clients_are_counted_as_the_ledger_has_them(browser, runs, page_of):
    wanted = {}
    for line in lines(runs / "quick" / "ledger.jsonl"):
        for client, outcome, down, up in line["participants"]:
            total = wanted.setdefault(client, [0, 0, 0, 0])
            total[outcome != "accepted"] += 1
            total[2] += up
            total[3] += down
    with tab(browser, page_of(runs, "quick").url) as page:
        page.wait_for_selector("#clients tbody tr")
        shown = page.evaluate(
            "Object.fromEntries(clients.map((c) => [c.name, [c.accepted, c.missed, c.up, c.down]]))"
        )
        assert shown == wanted
        # By keyboard: sort by what was missed, most first.
        page.focus("#clients th:nth-child(3) button")
        page.keyboard.press("Enter")
        assert page.get_attribute("#clients th:nth-child(3)", "aria-sort") == "descending"
        missed = [int(t) for t in page.locator("#clients td:nth-child(3)").all_inner_texts()]
        assert missed == sorted(missed, reverse=True)
        # Focus stays on the column that was chosen.
        assert page.evaluate("document.activeElement.textContent") == "missed"
        page.fill("#find", "11")
        assert page.locator("#clients tbody tr").count() == 1


def test_a_round_can_be_looked_at_by_keyboard(browser, runs, page_of):
    (line,) = (x for x in lines(runs / "quick" / "ledger.jsonl") if x["round"] == 11)
    with tab(browser, page_of(runs, "quick").url) as page:
        page.wait_for_selector("#round-parts li")
        page.focus("#slider")
        page.keyboard.press("ArrowLeft")
        until(page, "document.querySelector('#round').value === '11'")
        for outcome in {outcome for _, outcome, _, _ in line["participants"]}:
            count = sum(o == outcome for _, o, _, _ in line["participants"])
            until(page, f"$('round-parts').innerText.includes('{outcome} ({count})')")
        # The first stop of the tab key leads past the header.
        page.reload()
        page.wait_for_selector("#clients tbody tr")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "learning"


def test_runs_are_compared(browser, runs, page_of):
    with tab(browser, page_of(runs, "quick").url) as page:
        page.wait_for_selector("#others input")
        page.check("#others input")
        page.wait_for_selector("#differences tbody tr")
        text = page.inner_text("#differences")
        assert "algorithm.server.lr" in text and "0.3" in text
        assert "learner.lr" not in text
        data = page.evaluate("charts.get('learning-chart').plot.data.at(-1)")
        assert data == [r.metrics["accuracy"] for r in read_run(runs / "slow").history]
        page.select_option("#against", "bytes")
        x = page.evaluate("charts.get('learning-chart').plot.data[0].at(-1)")
        both = [read_run(runs / name) for name in ("quick", "slow")]
        assert x == pytest.approx(max(run.bytes_up + run.bytes_down for run in both) / 1e6)
        page.select_option("#run", "slow")
        until(page, "$('name').textContent === 'slow'")
        assert "run=slow" in page.url


def test_dark_and_narrow(browser, runs, page_of):
    url = page_of(runs, "quick").url
    grounds = []
    for scheme in ("light", "dark"):
        with tab(browser, url, color_scheme=scheme) as page:
            page.wait_for_selector("#learning-chart canvas")
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            ink = page.evaluate("charts.get('learning-chart').plot.axes[0].stroke()")
            grounds.append(ink)
    assert len(set(grounds)) == 4
    with tab(browser, url, viewport={"width": 360, "height": 740}, is_mobile=True) as page:
        page.wait_for_selector("#clients tbody tr")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("$('learning-chart').querySelector('canvas').clientWidth") <= 360


class Slowly(Observer):
    """Takes a while over every round."""

    def __init__(self, seconds):
        self.seconds = seconds

    def round(self, run, end):
        time.sleep(self.seconds)


def test_rounds_come_by_themselves_and_a_restart_leaves_no_gap(browser, tmp_path):
    clients = data.load("digits").dirichlet(clients=6, alpha=0.5, seed=0)
    federation = Federation(
        learner=NumpyLearner(layers=(64, 10), lr=0.1, batch_size=16),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=40, cohort=3),
    )
    thread = threading.Thread(
        target=federation.simulate, args=(clients,),
        kwargs={"folder": tmp_path / "live", "observers": [Slowly(0.1)]},
    )  # fmt: skip
    first = LocalPage(tmp_path, "live")
    first.__enter__()
    port = int(first.url.rstrip("/").rpartition(":")[2])
    thread.start()
    with tab(browser, first.url) as page:
        # It may have been opened before there was a run.
        until(page, "typeof rows !== 'undefined' && rows.length > 3", 20)
        assert page.text_content("#status") == "running"
        first.__exit__()
        until(page, "$('status').textContent === 'reconnecting'", 10)
        time.sleep(1.0)
        seen = page.evaluate("rows.length")
        with LocalPage(tmp_path, "live", port):
            until(page, "$('status').textContent === 'finished'", 30)
            assert page.evaluate("rows.map((row) => row.round)") == list(range(1, 41))
            history = read_run(tmp_path / "live").history
            assert page.evaluate("rows.map((row) => row.metrics.accuracy)") == [
                record.metrics["accuracy"] for record in history
            ]
            # It went on from what it had: no round was loaded twice.
            assert seen > 3 and not [u for u in page.asked if u.endswith(".0")][1:]
            assert page.evaluate("charts.get('learning-chart').plot.data[0].length") == 40
    thread.join()


def big_run(folder, rounds=1000, clients=1000):
    """A run folder of that size, written as runs are."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    part = {"kind": "x.X"}
    plan = {"algorithm": part, "learner": part, "schedule": part, "pipeline": []}
    config = {"plan": plan, "data": {"name": "big"}, "seed": 0, "rounds": rounds}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "status.json").write_text('{"status": "finished"}')
    names = [f"client-{number:04d}" for number in range(clients)]
    with (folder / "rounds.jsonl").open("w") as records, (folder / "ledger.jsonl").open("w") as led:
        for number in range(1, rounds + 1):
            accuracy = 1 - 1 / (number + 1)
            record = {
                "round": number,
                "metrics": {
                    "accuracy": accuracy, "loss": 1 / number, "accuracy_client_mean": accuracy,
                    "accuracy_client_std": 0.1,
                },
                "measurements": {"train_loss": 1 / number}, "invited": clients,
                "accepted": clients - 10, "attempts": 1, "bytes_up": 10**9, "bytes_down": 10**9,
                "clock": 0.0,
            }  # fmt: skip
            records.write(json.dumps(record, separators=(",", ":")) + "\n")
            lost = set(rng.choice(clients, min(10, clients - 1), replace=False).tolist())
            parts = [
                [name, "lost" if place in lost else "accepted", 10**6, 10**6]
                for place, name in enumerate(names)
            ]
            line = {"round": number, "participants": parts}
            led.write(json.dumps(line, separators=(",", ":")) + "\n")
    spread = {"accuracy": dict(zip(names, rng.random(clients).tolist(), strict=True))}
    (folder / "spread.json").write_text(json.dumps(spread))


def test_a_thousand_rounds_of_a_thousand_clients(browser, tmp_path, page_of):
    big_run(tmp_path / "runs" / "big")
    url = page_of(tmp_path / "runs").url
    with tab(browser, url) as page:
        until(page, "charts.get('learning-chart')?.plot.data[0].length === 1000")
        # From the navigation on, by the browser's own clock; benchmarks/page.py measures it.
        assert page.evaluate("performance.now()") < 3000
        until(page, "clients.length === 1000", 20)
        assert page.locator("#clients tbody tr").count() == 50
        page.click("#more")
        assert page.locator("#clients tbody tr").count() == 1000
        assert page.evaluate("clients.reduce((sum, c) => sum + c.missed, 0)") == 10_000


def test_the_page_is_small():
    from importlib.resources import files

    static = files("atoll.view.page").joinpath("static")
    own = sum(len((static / n).read_bytes()) for n in ("index.html", "page.css", "page.js"))
    assert own < 100_000
    text = "".join((static / name).read_text() for name in ("index.html", "page.css", "page.js"))
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text and "innerHTML" not in text


HOSTILE = "<img src=x onerror='window.hacked=1'>"


def test_names_from_outside_are_text(browser, tmp_path, page_of):
    big_run(tmp_path / "bad", rounds=2, clients=1)
    for name in ("ledger.jsonl", "spread.json"):
        path = tmp_path / "bad" / name
        path.write_text(path.read_text().replace("client-0000", HOSTILE))
    (tmp_path / "bad" / "refusals.jsonl").write_text(
        json.dumps({"round": 1, "reason": HOSTILE}) + "\n"
    )
    with tab(browser, page_of(tmp_path).url) as page:
        page.wait_for_selector("#clients tbody tr")
        page.wait_for_selector("#round-parts li")
        assert HOSTILE in page.inner_text("#clients") and HOSTILE in page.inner_text("#failures")
        assert page.evaluate("window.hacked") is None


def test_strangers_and_wrong_names_are_refused(runs, page_of):
    url = page_of(runs, "quick").url
    for path, status in (
        ("api/runs/nothing", 404), ("api/runs/..", 404), ("api/runs/%2e%2e%2fquick", 404),
        ("api/runs/quick/rounds/99", 404), ("page.py", 404), ("..%2f__init__.py", 404),
    ):  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(url + path)
        assert refused.value.code == status
        refused.value.close()
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(url + "api/runs", Host="evil.example")
    assert refused.value.code == 400
    refused.value.close()


def test_events_go_on_from_the_id_that_is_said(runs, page_of):
    url = page_of(runs, "quick").url + "api/runs/quick/events"
    state = json.loads(get(url.replace("events", "rows")))["state"]
    epoch = state["epoch"]
    request = urllib.request.Request(
        f"{url}?after={epoch}.3", headers={"Last-Event-ID": f"{epoch}.9"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        ids = []
        while len(ids) < 3:
            text = answer.readline().decode()
            if text.startswith("id: "):
                ids.append(text[4:].strip())
    assert ids == [f"{epoch}.10", f"{epoch}.11", f"{epoch}.12"]
    # Whoever was told of another run by this name begins anew.
    request = urllib.request.Request(url, headers={"Last-Event-ID": "another.9"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        lines = [answer.readline().decode() for _ in range(8)]
    assert "event: reset\n" in lines and f"id: {epoch}.1\n" in lines


def test_another_run_by_the_same_name_takes_its_place(browser, tmp_path, page_of):
    clients = data.load("digits").dirichlet(clients=4, alpha=0.5, seed=0)
    federation = Federation(
        learner=NumpyLearner(layers=(64, 10), lr=0.1, batch_size=16),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=20, cohort=2),
    )
    first = threading.Thread(
        target=federation.simulate, args=(clients,),
        kwargs={"folder": tmp_path / "x", "observers": [Slowly(0.05)]},
    )  # fmt: skip
    first.start()
    with tab(browser, page_of(tmp_path, "x").url) as page:
        until(page, "typeof rows !== 'undefined' && rows.length >= 3", 20)
        first.join()
        shutil.rmtree(tmp_path / "x")
        federation.simulate(clients, seed=9, folder=tmp_path / "x", observers=[Slowly(0.1)])
        wanted = [r.metrics["accuracy"] for r in read_run(tmp_path / "x").history]
        shown = "JSON.stringify(rows.map((row) => row.metrics.accuracy))"
        until(page, f"{shown} === {json.dumps(json.dumps(wanted, separators=(',', ':')))}", 15)


def test_every_round_is_told_with_its_seconds(tmp_path):
    """Read as fast as it can be while it is written: no timing may be lost."""
    clients = data.load("digits").dirichlet(clients=4, alpha=0.5, seed=0)
    federation = Federation(
        learner=NumpyLearner(layers=(64, 10), lr=0.1, steps=1),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=300, cohort=2),
    )
    thread = threading.Thread(
        target=federation.simulate, args=(clients,), kwargs={"folder": tmp_path / "run"}
    )
    thread.start()
    while not (tmp_path / "run" / "environment.json").exists():
        time.sleep(0.001)
    followed, told, last = FolderRun(tmp_path / "run"), [], 0
    while last < 300:
        for row in followed.since(last)[0]:
            told.append(row)
            last = row["round"]
    thread.join()
    assert [row["round"] for row in told] == list(range(1, 301))
    assert all(row["seconds"] > 0 and row["phases"] for row in told)


def test_a_damaged_run_is_said_in_words(browser, runs, tmp_path, page_of):
    shutil.copytree(runs / "quick", tmp_path / "runs" / "good")
    shutil.copytree(runs / "quick", tmp_path / "runs" / "bad")
    path = tmp_path / "runs" / "bad" / "rounds.jsonl"
    path.write_text(path.read_text().replace('{"round":5', '{"round"5'))
    url = page_of(tmp_path / "runs", "good").url
    with tab(browser, url) as page:
        page.wait_for_selector("#clients tbody tr")
        page.select_option("#run", "bad")
        until(page, "$('notice').textContent.includes('is damaged at line')")
        page.select_option("#run", "good")
        until(page, "rows.length === 12 && $('notice').hidden")
        page.click("#others input")
        until(page, "$('notice').textContent.includes('cannot be compared')")
        assert not page.is_checked("#others input")


def test_a_diverged_run_does_not_look_healthy(browser, tmp_path, page_of):
    big_run(tmp_path / "nan", rounds=12, clients=2)
    path = tmp_path / "nan" / "rounds.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    for line in kept[4:]:
        line["metrics"]["loss"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    with tab(browser, page_of(tmp_path).url) as page:
        until(page, "typeof rows !== 'undefined' && rows.length === 12")
        until(page, "$('failures').innerText.includes('round 5: the loss is not a finite number')")
        assert "not finite" in page.inner_text("#tiles")
        page.select_option("#metric", "loss")
        assert page.evaluate("charts.get('learning-chart').plot.data[0].at(-1)") == 12


def test_a_run_that_has_ended_holds_no_connection(browser, runs, page_of):
    with tab(browser, page_of(runs, "quick").url) as page:
        page.wait_for_selector("#clients tbody tr")
        assert page.evaluate("stream") is None
        assert not [url for url in page.asked if "events" in url]


def test_a_resumed_run_is_read_anew(tmp_path):
    clients = data.load("digits").dirichlet(clients=4, alpha=0.5, seed=0)

    def federation(rounds):
        return Federation(
            learner=NumpyLearner(layers=(64, 10), lr=0.1, batch_size=16),
            algorithm=algorithms.FedAvg(),
            schedule=schedules.Synchronous(rounds=rounds, cohort=2),
        )

    federation(4).simulate(clients, folder=RunFolder(tmp_path / "run", every=2))
    followed = FolderRun(tmp_path / "run")
    assert [row["round"] for row in followed.since(0)[0]] == [1, 2, 3, 4]
    # As if it had been killed after round 3 was written, with a checkpoint at 2.
    kept = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines(keepends=True)[:3]
    (tmp_path / "run" / "rounds.jsonl").write_text("".join(kept))
    (tmp_path / "run" / "checkpoints" / "00000004.safetensors").unlink()
    (tmp_path / "run" / "status.json").write_text('{"status": "running"}')
    assert status_of(tmp_path / "run") == "stopped"
    assert [row["round"] for row in followed.since(0)[0]] == [1, 2, 3]
    federation(6).simulate(clients, folder=tmp_path / "run", resume=True)
    rows, state = followed.since(0)
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert (state["status"], state["total"]) == ("finished", 6)
    assert set(rows[0]["phases"]) == {"clients", "step", "evaluation"}
    assert followed.participants(5)[0]["outcome"] == "accepted"


def started(arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "atoll", *arguments], cwd=cwd, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def test_show_serves_a_page_until_ctrl_c(runs, tmp_path):
    process = started(["show", str(runs / "quick"), "--web"], tmp_path)
    try:
        line = process.stdout.readline()
        url = line.split(" is at ")[1].split(" until")[0]
        assert json.loads(get(url + "api/runs"))[-1]["id"] == "quick"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()


FEDERATION = """
from atoll import Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner

clients = data.load("digits").dirichlet(clients=6, alpha=0.5, seed=0)
federation = Federation(
    learner=NumpyLearner(layers=(64, 10), lr=0.1, batch_size=16),
    algorithm=algorithms.FedAvg(),
    schedule=schedules.Synchronous(rounds=5, cohort=3),
)
"""


def test_simulate_is_watched_from_its_start_to_after_its_end(tmp_path):
    (tmp_path / "fed.py").write_text(FEDERATION)
    process = started(["simulate", "fed.py", "--web"], tmp_path)
    try:
        url = process.stdout.readline().split("watch it at ")[1].strip()
        for line in process.stdout:
            if "the page stays" in line:
                break
        rows = json.loads(get(url + "api/runs/fed-1/rows"))
        assert [row["round"] for row in rows["rows"]] == [1, 2, 3, 4, 5]
        assert rows["state"]["status"] == "finished"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_a_port_that_is_taken_is_said(runs, page_of):
    port = int(page_of(runs).url.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigurationError, match="cannot be listened on"):
        LocalPage(runs, None, port)
