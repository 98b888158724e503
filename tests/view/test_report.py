"""The report: what it says is what the run folder has, and it stands alone."""

import json
import re
from hashlib import sha256
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from atoll.cli import main
from atoll.simulation import RandomDevices
from atoll.view.report import write_report


class Text(HTMLParser):
    """The words of a page, and everything that it would load."""

    def __init__(self):
        super().__init__()
        self.words, self.loads, self.tags, self._quiet = [], [], [], False

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._quiet = tag in ("style", "script")
        self.loads += [v for k, v in attributes if k in ("src", "href") and v[:1] != "#"]
        self.loads += [v for k, v in attributes if k == "xlink:href" and v[:1] != "#"]

    def handle_endtag(self, tag):
        self._quiet = False

    def handle_data(self, data):
        if not self._quiet:
            self.words.append(data)


def read(path):
    text = Text()
    text.feed(path.read_text(encoding="utf-8"))
    return text, " ".join(" ".join(text.words).split())


@pytest.fixture
def folder(blobs, federation, tmp_path):
    run = federation.simulate(blobs, folder=tmp_path / "run", devices=RandomDevices(dropout=0.3))
    federation.baselines(blobs, folder=tmp_path / "run")
    return run, tmp_path / "run"


def test_the_report_says_what_the_run_folder_has(folder):
    run, path = folder
    page, words = read(write_report(path, path / "report.html"))
    assert "8 clients trained together for 6 rounds with FedAvg" in words
    assert f"accuracy at the end: {run.metrics['accuracy']:.4g}" in words
    found = json.loads((path / "baselines.json").read_text())
    for kind in ("local", "central"):
        assert f"{found[kind]['pooled']['accuracy']:.4g}" in words
    worst = min(run.per_client["accuracy"].values())
    assert f"worst {worst:.4g}" in words
    config = json.loads((path / "config.json").read_text())
    for digest in (
        config["identity"], config["data"]["digest"],
        sha256((path / "model.safetensors").read_bytes()).hexdigest(),
    ):  # fmt: skip
        assert digest in words
    assert "no privacy budget" in words and "learner.layers" in words
    lost = sum(
        outcome == "lost"
        for line in (path / "ledger.jsonl").read_text().splitlines()
        for _, outcome, _, _ in json.loads(line)["participants"]
    )
    assert lost and f"lost {lost}" in words
    assert page.tags.count("svg") >= 4


def test_it_stands_alone(folder):
    _, path = folder
    page, _ = read(write_report(path, path / "report.html"))
    assert page.loads == [] and "script" not in page.tags
    text = (path / "report.html").read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    # Names of XML languages, which nothing is loaded from.
    assert all("w3.org" in a or "purl.org" in a or "creativecommons.org" in a
               or "matplotlib.org" in a for a in addresses), addresses  # fmt: skip


def test_what_clients_say_is_text(folder):
    _, path = folder
    (path / "refusals.jsonl").write_text('{"round": 1, "reason": "<b onclick=x>bad</b>"}\n')
    page, words = read(write_report(path, path / "report.html"))
    assert "<b onclick=x>bad</b>" in words and "b" not in page.tags


def test_the_command(folder, tmp_path, capsys):
    _, path = folder
    assert main(["report", str(path), "--output", str(tmp_path / "out.html")]) == 0
    assert (tmp_path / "out.html").stat().st_size > 10_000
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((path / "config.json").read_text())
    assert main(["report", str(empty)]) == 1
    assert "no closed round to report on" in capsys.readouterr().err
