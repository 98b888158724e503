"""Plots: a file of the kind that was asked for, or a sentence and no file."""

from dataclasses import replace

import pytest

from atoll import Evaluation
from atoll.errors import ConfigurationError
from atoll.simulation import RandomDevices


def test_plots(blobs, federation, tmp_path):
    pytest.importorskip("matplotlib")
    run = replace(federation, evaluation=Evaluation(clients_every=2)).simulate(
        blobs, devices=RandomDevices()
    )
    for against in ("round", "bytes", "seconds"):
        path = run.plot(tmp_path / f"{against}.png", against=against)
        assert path.read_bytes().startswith(b"\x89PNG")
    run.plot(tmp_path / "loss.svg", "train_loss")
    run.plot_spread(tmp_path / "spread.png")
    assert set(run.per_client["accuracy"]) <= set(blobs.names)
    with pytest.raises(
        ConfigurationError, match="'auc' was not evaluated per client; accuracy was"
    ):
        run.plot_spread(tmp_path / "x.png", "auc")
    with pytest.raises(ConfigurationError, match="no metric 'f7'; it has accuracy"):
        run.plot(tmp_path / "x.png", "f7")
    with pytest.raises(ConfigurationError, match="not 'time'"):
        run.plot(tmp_path / "x.png", against="time")
    assert not (tmp_path / "x.png").exists()
