"""What operators and owners do: approve, look, revoke, stop and go on, back up, take over."""

from __future__ import annotations

import json
import signal
import sqlite3
import time

import numpy as np
import pytest
from test_federation import model_of, simulated

from atoll.core.model_file import load_model
from atoll.protocol.identity import IdentityError, Token
from atoll.service.storage.blobs import BlobMissing, Bucket, Folder

pytest.importorskip("sklearn")


def rounds_of(place):
    lines = place.cli("rounds", "state", "--json").splitlines()
    return [json.loads(line) for line in lines]


def counted(row):
    """The sites whose updates are in a round; empty while it is open."""
    record = row["record"]
    names = [name for name, outcome, *_ in record.get("participants", ()) if outcome == "accepted"]
    assert len(names) == record.get("accepted", 0)
    return names


def table(place, *words):
    """The rows below the headings that a command prints."""
    return [tuple(line.split()) for line in place.cli(*words).splitlines()[1:]]


def joined(place, *names):
    tokens = {name: place.invite(name) for name in names}
    for name, token in tokens.items():
        place.join(name, token)


def finished(place, *names, code=0):
    for name in names:
        assert place.wait(name) == code, place.log(name)
    assert place.wait("server", 30) == code, place.log("server")


def test_the_owner_decides_before_the_first_training(place):
    place.write(schedule="Synchronous(rounds=2)", pipeline="Clip(0.5) >> atoll.aggregation.Mean()")
    place.serve("--linger", "30")
    place.join("0", place.invite("0"), "--ask")
    place.until(lambda: "waiting for approval" in place.log("0"), what="the question")
    terms = json.loads((place.root / "0" / "terms.json").read_text())
    assert terms["pipeline"][0]["norm"] == 0.5
    assert len(terms["code"]) == 64
    time.sleep(0.5)
    assert not rounds_of(place) or rounds_of(place)[0]["state"] == "open"
    assert '"norm": 0.5' in place.cli("approve", "0")
    finished(place, "0")
    assert len(rounds_of(place)) == 2


def test_the_owner_may_refuse(place):
    place.serve("--linger", "1")
    place.join("0", place.invite("0"), "--ask")
    place.until(lambda: "waiting for approval" in place.log("0"), what="the question")
    place.cli("approve", "0", "--refuse")
    assert place.wait("0") == 4
    assert "refused the federation's terms" in place.log("0")


def test_another_plan_is_refused_and_what_differs_is_said(place):
    place.serve("--linger", "1")
    place.until(lambda: "leading" in place.log("server"), what="the server's start")
    place.write(algorithm="FedProx(mu=0.5)")
    place.join("0", place.invite("0"))
    assert place.wait("0") == 4
    text = place.log("0")
    assert "copy of the federation is another than the server's: algorithm.local.kind is" in text
    assert "algorithm.local.mu is 0.5 here" in text


@pytest.mark.slow
def test_stop_and_go_on(place):
    place.write(schedule="Synchronous(rounds=5000)")
    place.serve("--linger", "20", "--seed", "2", "--sites", "2")
    joined(place, "0", "1")
    place.until(lambda: len(rounds_of(place)) > 3, what="the third round")
    assert "stopping" in place.cli("stop", "state")
    finished(place, "0", "1", code=130)
    # Everybody says one round, and has one model.
    status = json.loads(place.cli("status", "state", "--json"))
    for name in "01":
        assert f"stopped: {status['round']} of 5000 rounds" in place.log(name)
        model = load_model(place.root / name / "model.safetensors")
        assert (model.about["round"], model.about["model"]) == (status["round"], status["model"])
    done = sum(row["state"] == "closed" for row in rounds_of(place))
    assert 3 <= done < 5000
    assert "the federation was stopped" in place.log("0")
    place.serve("--linger", "20", "--seed", "2", "--set", f"schedule.rounds={done + 2}")
    for name in "01":
        place.join(name)
    finished(place, "0", "1")
    assert sum(row["state"] == "closed" for row in rounds_of(place)) == done + 2


def test_interrupted_server_leaves_at_once_and_is_taken_up(place):
    place.write(schedule="Synchronous(rounds=5000)")
    place.serve("--linger", "20", "--sites", "1")
    joined(place, "0")
    place.until(lambda: len(rounds_of(place)) > 2, what="the second round")
    server = place.processes["server"]
    server.send_signal(signal.SIGTERM)
    assert server.wait(15) == 130
    place.processes["0"].send_signal(signal.SIGTERM)
    assert place.wait("0", 15) == 130
    assert "stopped; start again to go on" in place.log("0")


@pytest.mark.slow
def test_a_revoked_site_is_out_at_its_next_request(place):
    place.write(schedule="Synchronous(rounds=5000, minimum=1)")
    place.serve("--linger", "20")
    joined(place, "0", "1")
    place.until(lambda: len(rounds_of(place)) > 2, what="the second round")
    assert "revoked" in place.cli("revoke", "state", "1")
    assert place.wait("1") == 4
    assert "1 was revoked" in place.log("1")
    before = len(rounds_of(place))
    place.until(lambda: len(rounds_of(place)) > before + 2, what="going on without it")
    rows = rounds_of(place)
    assert counted(rows[-2]) == ["0"], rows[-4:]
    assert {row[:3] for row in table(place, "sites", "state")} == {
        ("0", "site", "active"), ("1", "site", "revoked"),
    }  # fmt: skip


@pytest.mark.slow
def test_an_analyst_reads_and_an_admin_acts(place):
    place.write(schedule="Synchronous(rounds=5000, minimum=1)")
    place.serve("--linger", "20")
    joined(place, "0", "1")
    place.until(lambda: len(rounds_of(place)) > 1, what="the first round")
    for who, role in (("ann", "analyst"), ("bob", "admin")):
        token = place.invite(who, "--role", role)
        place.cli("enrol", place.url, "--token", token, "--folder", who)
    assert "5000" in place.cli("status", "ann")
    assert "closed" in place.cli("rounds", "ann")
    assert ("ann", "analyst", "active") in {row[:3] for row in table(place, "sites", "ann")}
    for command in (["stop", "ann"], ["revoke", "ann", "1"]):
        refused = place.cli(*command, check=False)
        assert "this is for the role admin, and ann is analyst" in refused
    assert ("1", "site", "active") in {row[:3] for row in table(place, "sites", "ann")}
    place.cli("revoke", "bob", "1")
    assert place.wait("1") == 4
    assert "1 was revoked" in place.log("1")
    for reader in ("ann", "state"):
        found = {row[:3] for row in table(place, "sites", reader)}
        assert found >= {("0", "site", "active"), ("1", "site", "revoked")}
    log = place.cli("audit", "show", "state").splitlines()
    audited = [line.split(maxsplit=3)[3] for line in log]
    assert audited.count('bob: revoked {"site":"1"}') == 1
    assert sum(line.startswith("ann: refused ") for line in audited) == 2
    assert "there is no site 'nobody'" in place.cli("revoke", "bob", "nobody", check=False)
    place.cli("stop", "bob")
    finished(place, "0", code=130)


@pytest.mark.slow
def test_backup_while_it_runs_and_restore(place):
    place.write(schedule="Synchronous(rounds=60)")
    place.serve("--linger", "20", "--seed", "4")
    joined(place, "0", "1")
    place.until(lambda: len(rounds_of(place)) > 5, what="the fifth round")
    place.cli("backup", "state", "copy.tar")
    finished(place, "0", "1")
    place.cli("restore", "copy.tar", "again")
    assert "holds" in place.cli("audit", "verify", "again")
    # Sites that have gone further than the restored server go on with it, to the same model.
    (place.root / "state").rename(place.root / "old")
    (place.root / "again").rename(place.root / "state")
    model = (place.root / "0" / "model.safetensors").read_bytes()
    place.serve("--linger", "20", "--seed", "4")
    for name in "01":
        place.join(name)
    finished(place, "0", "1")
    assert (place.root / "0" / "model.safetensors").read_bytes() == model


@pytest.mark.slow
def test_a_second_server_stands_by_and_takes_over(place):
    place.write(schedule="Synchronous(rounds=5000)")
    first = place.serve("--linger", "20")
    joined(place, "0")
    place.until(lambda: len(rounds_of(place)) > 2, what="the second round")
    other = type(place)(place.root, processes=place.processes)
    words = ["serve", "federation.py", "--state", "state", "--port", str(other.port)]
    place.start("second", *words, "--linger", "20")
    place.until(lambda: "standing by" in place.log("second"), what="standing by")
    place.kill("server")
    assert first.poll() is not None
    place.until(lambda: "leading" in place.log("second"), 30, "taking over")
    place.kill("0")
    before = len(rounds_of(place))
    place.join("0", url=other.url)
    place.until(lambda: len(rounds_of(place)) > before + 2, what="going on")


@pytest.mark.slow
def test_a_site_that_vanishes_is_given_up_and_may_come_back(place):
    place.write(schedule="Synchronous(rounds=30, minimum=1)")
    place.serve("--linger", "20", "--lease", "2")
    joined(place, "0", "1")
    place.until(lambda: len(rounds_of(place)) > 1, what="the first round")
    place.kill("1")
    place.until(
        lambda: any(counted(row) == ["0"] for row in rounds_of(place)),
        what="a round without it",
    )
    place.join("1")
    finished(place, "0", "1")


@pytest.mark.slow
def test_fedbuff_over_the_network(place):
    place.write(
        "FedAvg(weighting='uniform')", "Buffered(rounds=12, concurrency=3, buffer=2, limit=5)"
    )
    place.serve("--linger", "20")
    joined(place, "0", "1", "2", "3")
    finished(place, "0", "1", "2", "3")
    rows = rounds_of(place)
    assert [row["state"] for row in rows] == ["closed"] * 12
    assert all(len(counted(row)) == 2 for row in rows)
    assert all(0 <= row["record"]["measurements"]["staleness"] <= 5 for row in rows)
    models = {model_of(place.root / n / "model.safetensors").tobytes() for n in "0123"}
    assert len(models) == 1


@pytest.mark.slow
def test_over_selection_spares_whoever_comes_late(place):
    place.write(schedule="Synchronous(rounds=6, cohort=2, invite=3)")
    place.serve("--linger", "20")
    joined(place, "0", "1", "2")
    finished(place, "0", "1", "2")
    assert all(len(counted(row)) == 2 for row in rounds_of(place))
    with sqlite3.connect(place.state / "atoll.db") as database:
        states = database.execute("SELECT state, count(*) FROM assignments GROUP BY state")
        found = dict(states.fetchall())
    database.close()
    assert found == {"accepted": 12, "spared": 6}


@pytest.mark.slow
def test_a_cohort_of_fewer_is_the_simulations(place):
    """Members are numbered by name, so the draws of cohorts are the simulator's too."""
    place.write(schedule="Synchronous(rounds=10, cohort=5)")
    place.serve("--linger", "20", "--seed", "9", "--sites", "8")
    joined(place, *"01234567")
    finished(place, *"01234567")
    run = simulated(place, seed=9)
    found = model_of(place.root / "0" / "model.safetensors")
    assert found.tobytes() == run.model["params"].tobytes()


@pytest.mark.slow
def test_only_those_are_asked_who_declare_what_is_wanted(place):
    place.write(schedule="Synchronous(rounds=3, cohort=1, selection=schedules.ByResources())")
    place.serve("--linger", "20", "--sites", "2")
    place.join("0", place.invite("0"), "--resources", "charging,unmetered,speed=3")
    place.join("1", place.invite("1"), "--undeclared")
    finished(place, "0", "1")
    assert all(counted(row) == ["0"] for row in rounds_of(place))
    assert [line.split()[3] for line in place.cli("sites", "state").splitlines()[1:]][1] == "0"


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_blobs_are_what_was_put(tmp_path, kind):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "kept").mkdir()
    place = Folder(tmp_path / "kept") if kind == "folder" else Bucket(f"file://{tmp_path / 'kept'}")
    data = np.random.default_rng(0).bytes(3 << 20)
    digest = place.put([data[:100], data[100:]], tmp_path / "scratch")
    assert place.size(digest) == len(data)
    assert b"".join(place.read(digest)) == data
    assert b"".join(place.read(digest, 5, 2_000_000)) == data[5:2_000_000]
    assert place.local(digest, tmp_path / "scratch").read_bytes() == data
    assert set(place.all()) == {digest}
    place.remove(digest)
    place.remove(digest)
    assert place.all() == {}
    with pytest.raises(BlobMissing):
        place.size(digest)
    with pytest.raises(BlobMissing):
        list(place.read("../../etc/passwd"))


@pytest.mark.slow
def test_a_federation_over_a_bucket(place):
    place.write(schedule="Synchronous(rounds=3)")
    (place.root / "bucket").mkdir()
    place.serve("--linger", "20", "--blobs", f"file://{place.root / 'bucket'}")
    joined(place, "0", "1")
    finished(place, "0", "1")
    assert set(load_model(place.root / "0" / "model.safetensors").vectors) == {"params"}
    assert not list((place.state / "blobs").glob("??/*"))


def test_the_server_may_move_and_trust_stays(place):
    before = (place.state / "ca.pem").read_bytes()
    assert "localhost, 127.0.0.1" in place.cli("hosts", "state", "localhost", "127.0.0.1")
    place.write(schedule="Synchronous(rounds=2)")
    place.serve("--linger", "20")
    place.join("0", place.invite("0"), url=f"https://localhost:{place.port}")
    finished(place, "0")
    assert (place.state / "ca.pem").read_bytes() == before


def test_an_invitation_can_be_withdrawn(place):
    place.serve("--linger", "1")
    token = place.invite("0")
    assert "invited" in place.cli("sites", "state")
    place.cli("revoke", "state", "0")
    place.join("0", token)
    assert place.wait("0") == 4
    assert "there is no such token" in place.log("0")


@pytest.mark.slow
def test_a_long_training_is_not_silence(place):
    """A lease of three seconds, and a site that works for longer than that."""
    place.write(schedule="Synchronous(rounds=1)")
    text = (place.root / "federation.py").read_text()
    (place.root / "federation.py").write_text(
        text + "import time\n\n\nclass Slow(atoll.algorithms.FedAvg):\n"
        "    def work(self, client, got, mine):\n        time.sleep(7)\n"
        "        return super().work(client, got, mine)\n\n\n"
        "from dataclasses import replace\n\nfederation = replace(federation, algorithm=Slow())\n"
    )
    place.serve("--linger", "20", "--lease", "3")
    joined(place, "0")
    finished(place, "0")
    assert [row["state"] for row in rounds_of(place)] == ["closed"]


def test_tokens_that_are_none_are_said_so():
    for text in ("", "atoll-", "atoll-xyz", "atoll-" + "A" * 200):
        with pytest.raises(IdentityError, match="not an enrolment token"):
            Token.read(text)
    token = Token.fresh("ab" * 32)
    assert Token.read(str(token)) == token


def test_commands_without_a_state_folder(place):
    for line in ("status nowhere", "invite nowhere a", "audit verify nowhere"):
        assert "is not a state folder; make one with: atoll init nowhere" in place.cli(
            *line.split(), check=False
        )
    assert "cannot be a site's name" in place.cli("invite", "state", "../up", check=False)
    assert "is not empty" in place.cli("init", "state", check=False)


def test_a_backup_that_was_cut_off_is_not_restored(place):
    place.write(schedule="Synchronous(rounds=2, cohort=2)")
    tokens = [place.invite(name) for name in "01"]
    place.serve("--linger", "1")
    for name, token in zip("01", tokens, strict=True):
        place.join(name, token)
    for name in ("0", "1", "server"):
        assert place.wait(name) == 0
    place.cli("backup", "state", "whole.tar")
    whole = (place.root / "whole.tar").read_bytes()
    # At the borders of its members too, where tar itself sees no fault.
    import tarfile

    with tarfile.open(place.root / "whole.tar") as archive:
        borders = [member.offset for member in archive.getmembers()]
    for size in [*borders, *(border + 700 for border in borders)]:
        if size >= len(whole):
            continue
        (place.root / "cut.tar").write_bytes(whole[:size])
        from atoll.cli import main

        assert main(["restore", str(place.root / "cut.tar"), str(place.root / "again")]) == 1
        assert not any((place.root / "again").iterdir())
    place.cli("restore", "whole.tar", "once-more")


FAILING = """
from dataclasses import dataclass

@dataclass(frozen=True, eq=False)
class Failing(atoll.learners.NumpyLearner):
    def train(self, *given, **named):
        raise ArithmeticError("it cannot")
"""


def test_a_federation_that_was_given_up_is_no_success_anywhere(place):
    place.write(schedule="Synchronous(rounds=4, attempts=2, pause=0.0)")
    file = place.root / "federation.py"
    head, rest = file.read_text().replace("atoll.learners.Numpy", "Failing(").split("federation =")
    rest = rest.replace("Failing(Learner(", "Failing(")
    file.write_text(f"{head}{FAILING}\nfederation ={rest}")
    place.serve("--linger", "20", "--sites", "2")
    joined(place, "0", "1")
    finished(place, "0", "1", code=3)
    assert "the federation was given up" in place.log("0") + place.log("1")


@pytest.mark.parametrize("wide", [32, 64])
def test_what_cannot_be_measured_is_told_before_anyone_is_asked(place, wide):
    place.write(schedule="Synchronous(rounds=2)")
    (place.root / "held.py").write_text(
        "import atoll, numpy as np\n"
        f"x = np.random.default_rng(0).normal(size=(20, {wide})).astype('f')\n"
        "data = atoll.data.from_arrays(x, np.arange(20) % 12, classes=12).iid(clients=1)\n"
    )
    place.serve("--test", "held.py")
    assert place.wait("server", 60) == 1
    told = place.log("server")
    assert "Traceback" not in told and ("32" if wide == 32 else "12 classes") in told


def test_a_best_model_that_nobody_can_tell_is_a_sentence(place):
    place.write(schedule="Synchronous(rounds=2)")
    file = place.root / "federation.py"
    file.write_text(
        file.read_text().replace(
            "    schedule=", '    evaluation=atoll.Evaluation(best="accuracy"),\n    schedule='
        )
    )
    place.serve("--linger", "20")
    joined(place, "0")
    assert place.wait("server", 60) == 1
    assert "Evaluation(best='accuracy') is in no round" in place.log("server")
    assert "Traceback" not in place.log("server")
