"""Who leaves says so: nobody waits for it, and it leaves soon."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from contextlib import closing

import pytest

pytest.importorskip("sklearn")
from attacker import Inner
from test_on_the_way import slowly

from atoll.cli import main
from atoll.cli.files import read_plan


@pytest.fixture
def inner(tmp_path, place):
    made = []

    def make(**settings):
        place.write(**settings)
        plan = read_plan(str(place.root / "federation.py"))
        made.append(Inner(tmp_path / str(len(made)), plan))
        return made[-1]

    yield make
    for each in made:
        each.close()


def leading(place):
    place.until(lambda: "leading" in place.log("server"), what="the server's start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_site_leaves_at_once_and_says_so(place, number):
    place.write(schedule="Synchronous(rounds=2, cohort=2)")
    tokens = [place.invite(name) for name in "01"]
    place.serve("--linger", "1")
    place.join("0", tokens[0])
    place.until(lambda: "joined" in place.log("0"), what="joining")
    time.sleep(1.0)  # now it waits for an answer that is long in coming
    started = time.monotonic()
    place.processes["0"].send_signal(number)
    assert place.wait("0") == 130
    assert time.monotonic() - started < 5
    assert "Traceback" not in place.log("0")
    place.until(lambda: "0 has left: it said that it leaves" in place.log("server"), 5, "a word")


def test_ctrl_c_in_a_training_says_what_is_waited_for_and_a_second_ends_it(place):
    slowly(place, 20, schedule="Synchronous(rounds=1, cohort=1, minimum=1, pause=0.1)")
    token = place.invite("0")
    place.serve("--linger", "1", "--lease", "60")
    place.join("0", token)
    place.until(lambda: '"0"' in place.cli("status", "state", "--json"), 30, "work")
    time.sleep(0.5)
    place.processes["0"].send_signal(signal.SIGINT)
    place.until(lambda: "leaving when this training is done" in place.log("0"), 5, "a word")
    assert place.processes["0"].poll() is None
    started = time.monotonic()
    place.processes["0"].send_signal(signal.SIGINT)
    assert place.wait("0") == 130
    assert time.monotonic() - started < 5
    assert "Traceback" not in place.log("0")
    place.until(lambda: "0 has left" in place.log("server"), 5, "the farewell")
    assert "0 does not deliver for round 1: has left" in place.log("server")


@pytest.mark.slow
def test_what_is_trained_after_the_first_ctrl_c_is_taken(place):
    slowly(place, 5, schedule="Synchronous(rounds=2, minimum=1, pause=0.1)")
    token = place.invite("0")
    place.serve("--linger", "1", "--lease", "2")  # so that heartbeats matter
    place.join("0", token)
    place.until(lambda: '"0"' in place.cli("status", "state", "--json"), 30, "work")
    place.processes["0"].send_signal(signal.SIGINT)
    assert place.wait("0") == 130
    assert "update 1.0.0" in place.log("0") and "accepted" in place.log("0")


def test_another_copy_of_the_file_holds_nobody_up(place):
    place.write(schedule="Synchronous(rounds=2)")
    tokens = {name: place.invite(name) for name in "01"}
    place.serve("--linger", "5")
    leading(place)
    text = (place.root / "federation.py").read_text()
    (place.root / "federation.py").write_text(text.replace("lr=0.1", "lr=0.2"))
    place.join("1", tokens["1"])
    assert place.wait("1") == 4
    assert "another than the server's: learner.lr is 0.2 here and 0.1 at the server" in place.log(
        "1"
    )
    (place.root / "federation.py").write_text(text)
    started = time.monotonic()
    place.join("0", tokens["0"])
    assert place.wait("0") == 0, place.log("0")
    assert time.monotonic() - started < 30
    assert "1 has left: its copy of the federation has another plan" in place.log("server")


SYNC = "Synchronous(rounds=3, cohort=2, minimum=1, pause=0.0)"


def test_a_farewell_gives_up_what_is_owed_and_is_no_presence(inner):
    served = inner(schedule="Synchronous(rounds=3, cohort=2, minimum=1, pause=0.0)")
    alice, bob = served.insider("alice").open(), served.insider("bob").open()
    bob.order()  # both are there
    first = alice.assignment()
    bob.assignment()
    assert alice.order(farewell=True)["kind"] == "drop"
    owed = {row["site"]: row for row in served.rows("assignments")}
    assert owed["alice"]["state"] == "lost" and owed["bob"]["state"] == "open"
    assert "alice" in served.loop.members.absent
    # Whoever comes again is there again.
    assert bob.order(farewell=True)["kind"] == "drop"
    again = alice.assignment(first["assignment"])
    assert again["round"] == 1 and not served.loop.members.absent - {"bob"}


def test_a_question_on_its_way_does_not_bring_back_who_has_left(inner):
    served = inner(schedule="Synchronous(rounds=3, cohort=3, minimum=3)")
    alice = served.insider("alice").open()
    waiting = served.insider("alice2").open()
    import threading

    found = []
    asking = threading.Thread(target=lambda: found.append(alice.order(20)))
    asking.start()
    time.sleep(0.5)
    other = type(alice)(served, "alice", alice.key).open()
    assert other.order(farewell=True)["kind"] == "drop"
    asking.join(5)
    assert found and found[0]["kind"] == "drop"
    assert "alice" in served.loop.members.absent
    assert waiting.order()["kind"] == "wait"


MEANING = {"meaning": "ab" * 32, "inputs": ["age", "chol"], "classes": ["healthy", "ill"]}


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"inputs": ["chol", "age"]}, "order: 'chol', 'age' at bob, 'age', 'chol' at alice"),
        ({"classes": ["Ill", "healthy"]}, "only bob has 'Ill' and only alice has 'ill'"),
        ({"inputs": ["age"]}, "only alice has 'chol'"),
        ({"inputs": [], "classes": []}, "the names of their inputs or classes differ"),
    ],
)  # fmt: skip
def test_sites_whose_data_mean_something_else_are_never_averaged(inner, theirs, told):
    served = inner(schedule=SYNC)
    alice, bob = served.insider("alice").open(), served.insider("bob").open()
    assert alice.order(**MEANING)["kind"] in ("wait", "train")
    changed = {**MEANING, "meaning": "cd" * 32, **theirs}
    answer = bob.ask("POST", "/v1/checkin?wait=0", bob.greeting(**changed))
    assert answer.status == 409
    assert told in json.loads(answer.data)["error"]
    assert "bob" in served.loop.members.absent
    assert bob.order(**MEANING)["kind"] in ("wait", "train")
    assert bob.order()["kind"] in ("wait", "train")  # arrays have no names to compare


def test_who_is_revoked_no_longer_says_what_the_data_mean(inner):
    served = inner(schedule=SYNC)
    alice, bob = served.insider("alice").open(), served.insider("bob").open()
    alice.order(**MEANING)
    root = served.insider("root", "admin").open()
    assert root.ask("POST", "/v1/sites/alice/revoke").status == 204
    bob.order(**{**MEANING, "meaning": "cd" * 32})
    with closing(served.folder.store()) as store:
        assert store.setting("meaning")["site"] == "bob"


def test_two_agents_with_one_identity_are_told_of(inner, caplog):
    served = inner(schedule=SYNC)
    alice = served.insider("alice").open()
    one, other, third = (f"{n}" * 32 for n in "abc")
    for agent in (one, one, other, other, third):
        alice.order(agent=agent)
    assert "two agents" not in caplog.text  # it was started again, twice
    alice.order(agent=other)
    assert "two agents are at work as alice" in caplog.text


def test_who_is_waited_for_is_named(inner):
    served = inner(schedule="Synchronous(rounds=3, cohort=2, minimum=2, attempts=99, pause=0.0)")
    alice = served.insider("alice").open()
    bob = served.insider("bob").open()
    bob.order(farewell=True)
    end = time.monotonic() + 10
    # It may have been asked before it left.
    said = r"1 of 2 sites are there; missing: bob|bob to be heard of: 1 of the 2"
    while not re.search(said, served.loop.waiting):
        alice.order()
        assert time.monotonic() < end, served.loop.waiting
        time.sleep(0.05)


def test_status_says_who_owes_an_answer_since_when_and_until_when(inner, capsys):
    served = inner(schedule="Synchronous(rounds=3, cohort=2, minimum=2, deadline=500.0)")
    state, began = str(served.folder.path), time.time()

    def told():
        assert main(["status", state, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def soon(text):
        end = time.monotonic() + 10
        while text not in ((found := told())["waiting_for"] or ""):
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found

    alice = served.insider("alice").open()
    served.invite("bob")
    found = soon("1 of 2 sites are there; bob can still join")
    assert began + 3500 < found["until"] < time.time() + 3601
    assert found["silence"] == served.loop.service.lease
    assert main(["revoke", state, "bob"]) == 0
    capsys.readouterr()
    found = soon("1 of 2 sites are there; nobody else is invited")
    assert found["until"] is None
    assert main(["status", state]) == 0
    assert "they answer, are revoked, or the federation is stopped" in capsys.readouterr().out
    served.insider("carol")
    alice.assignment()
    found = soon("alice (asked 0.")
    assert "carol (asked" in found["waiting_for"] and "heard of" in found["waiting_for"]
    assert began + 500 < found["until"] < time.time() + 500
    assert main(["status", state]) == 0
    shown = capsys.readouterr().out
    assert "in 8 min " in shown and "of silence" in shown


def test_an_invitation_is_waited_for_until_it_ends(inner, capsys):
    served = inner(schedule="Synchronous(rounds=3)")
    served.invite("bob")
    served.insider("alice")
    end, found = time.monotonic() + 10, {}
    while "bob can still join" not in (found.get("waiting_for") or ""):
        assert main(["status", str(served.folder.path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert time.monotonic() < end, found
    assert time.time() + 3500 < found["until"] < time.time() + 3601


def test_a_site_that_was_revoked_comes_back_with_its_old_folder(place):
    place.write(schedule="Synchronous(rounds=4000, minimum=1, pause=0.1)")
    tokens = {name: place.invite(name) for name in "01"}
    place.serve("--linger", "5")
    for name, token in tokens.items():
        place.join(name, token)
    place.until(lambda: "round 2 of" in place.log("1"), what="some rounds")
    place.cli("revoke", "state", "1")
    assert place.wait("1") == 4
    # Made for the membership that ended: nothing of it may stand in the way.
    old = place.root / "1" / "outbox" / f"1.0.1-0-{'ab' * 16}.safetensors"
    old.write_bytes(b"x" * 100)
    trained = place.log("1").count("trained")
    place.join("1", place.invite("1"))
    place.until(lambda: place.log("1").count("trained") > trained + 2, what="its return")
    assert not old.exists()


def test_a_reader_that_goes_away_ends_no_agent(place):
    import subprocess
    import sys

    place.write(schedule="Synchronous(rounds=3)")
    token = place.invite("0")
    place.serve("--linger", "5")
    site = 'import atoll\ndata = atoll.data.load("digits").iid(clients=4)\nclient = "0"\n'
    (place.root / "0.py").write_text(site)
    words = ["join", place.url, "federation.py", "--data", "0.py", "--folder", "0"]
    agent = subprocess.Popen(
        [sys.executable, "-m", "atoll", *words, "--token", token], cwd=place.root,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    agent.stdout.close()
    assert agent.wait(60) == 0
    assert (place.root / "0" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_question_mark_in_the_folders_name_moves_no_database(place):
    for name in ("trial?1", "trial?2", "trial#3%41"):
        place.cli("init", name, "--project", "P", "--host", "127.0.0.1")
        assert (place.root / name / "atoll.db").exists() or place.cli("sites", name)
    place.cli("invite", "trial?1", "secret")
    assert (place.root / "trial?1" / "atoll.db").exists()
    assert "secret" not in place.cli("sites", "trial?2")
    place.cli("backup", "trial?1", "b.tar")


def test_the_folders_status_says_what_is_waited_for(place):
    place.write(schedule="Synchronous(rounds=2, cohort=2, minimum=2)")
    token = place.invite("0")
    place.invite("1")
    place.serve("--linger", "1")
    place.join("0", token)
    place.until(lambda: "0 has joined" in place.log("server"), what="joining")

    def waited():
        return json.loads(place.cli("status", "state", "--json"))["waiting_for"] or ""

    place.until(lambda: "1 of 2 sites are there" in waited(), 20, "a word")


def test_an_update_of_a_time_that_a_restore_has_undone_is_not_taken(inner):
    served = inner(schedule="Synchronous(rounds=3, cohort=1, minimum=1)")
    alice = served.insider("alice").open()
    order = alice.assignment()
    about = {"assignment": order["assignment"], "size": 10, "sha256": "ab" * 32}
    refused = alice.ask("POST", "/v1/uploads", {**about, "model": "cd" * 16})
    assert refused.status == 410
    assert "made from another model" in json.loads(refused.data)["reason"]
    for model in (order["model"][:32], None):
        assert alice.ask("POST", "/v1/uploads", {**about, "model": model}).status == 201
