"""A federation of real processes gives what its simulation gave, byte for byte."""

from __future__ import annotations

import json

import numpy as np
import pytest

from atoll.cli.files import read_federation
from atoll.core.model_file import load_model

pytest.importorskip("sklearn")


def model_of(path):
    return load_model(path).vectors["params"]


def simulated(place, seed=0):
    federation, clients, _ = read_federation(str(place.root / "federation.py"))
    return federation.simulate(clients, seed=seed, engine="sequential(workers=1)")


@pytest.mark.parametrize(
    ("algorithm", "pipeline"),
    [
        ("FedAvg()", "Mean()"),
        pytest.param(
            "Scaffold(option='I')",
            "Clip(1.0, only=('delta',)) >> atoll.aggregation.Mean()",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fedavg", "scaffold"],
)
@pytest.mark.slow
def test_eight_sites_and_twenty_rounds_over_tls(place, algorithm, pipeline):
    place.write(algorithm, "Synchronous(rounds=20)", pipeline)
    tokens = {str(n): place.invite(str(n)) for n in range(8)}
    place.serve("--seed", "3", "--linger", "60")
    for name, token in tokens.items():
        place.join(name, token)
    for name in tokens:
        assert place.wait(name) == 0, place.log(name)
    assert place.wait("server", 30) == 0, place.log("server")
    run = simulated(place, seed=3)
    for name in tokens:
        assert model_of(place.root / name / "model.safetensors").tobytes() == (
            run.model["params"].tobytes()
        )
    status = [line.split() for line in place.cli("status", "state").splitlines()]
    for line in (["round", "20"], ["rounds", "20"], ["phase", "done"], ["sites", "8"]):
        assert line in status
    rows = [json.loads(line) for line in place.cli("rounds", "state", "--json").splitlines()]
    assert [row["state"] for row in rows] == ["closed"] * 20
    for row, record in zip(rows, run.history, strict=True):
        assert row["record"]["measurements"]["train_loss"] == pytest.approx(
            record.measurements["train_loss"], rel=1e-12
        )
    assert "holds" in place.cli("audit", "verify", "state")
    assert np.isfinite(run.model["params"]).all()
