"""What is in deploy/ says commands that exist, and restarts what another start may help."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.cli import parser
from atoll.cli.join import ENDS
from atoll.errors import AtollError, GivenUp, NotAdmitted

DEPLOY = Path(__file__).parent.parent / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
#: What another start changes nothing about, besides a command line that is none.
FINAL = {"2", str(GivenUp.code), str(NotAdmitted.code), "130"}


def understood(words):
    """Whether these are words of the command line."""
    parser().parse_args([word.replace("$DATABASE", "x") for word in words])


def commands_in(text):
    """Commands of atoll in a shell's line."""
    return re.findall(r"\batoll ((?:init|serve|join) [^;|&]*)", text)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_units_and_restart_what_may_be_helped(unit, tmp_path):
    text = unit.read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    program, *words = shlex.split(line)
    assert program.endswith("/atoll")
    understood(words)
    (final,) = re.findall(r"^RestartPreventExitStatus=(.*)$", text, re.MULTILINE)
    assert set(final.split()) == FINAL
    assert "Restart=on-failure" in text
    if shutil.which("systemd-analyze"):
        there = tmp_path / unit.name
        there.write_text(text.replace(program, "/bin/true"))
        done = subprocess.run(
            ["systemd-analyze", "verify", str(there)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert unit.name not in done.stderr, done.stderr


def test_ends_have_codes_of_their_own():
    assert AtollError.code == 1
    assert len({0, AtollError.code, 2, GivenUp.code, NotAdmitted.code, 130}) == 6
    assert ENDS["given up"] == GivenUp.code
    for page in ("promises.md", "operating.md"):
        text = (DEPLOY.parent / "docs" / page).read_text()
        codes = set(re.findall(r"^\| (\d+) \|", text, re.MULTILINE))
        assert codes == {"0", "1", "2", "3", "4", "5", "130"}, page


def test_composed_services_run_commands_that_exist():
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert {"database", "init", "server", "site"} == set(services)
    plain = re.compile(r"\$\{(\w+)(?::[-?][^}]*)?\}")
    for name in ("server", "site"):
        understood([plain.sub("x", word) for word in services[name]["command"]])
    (line,) = services["init"]["command"]
    (found,) = commands_in(plain.sub("x", line))
    understood(shlex.split(found))
    for about in services.values():
        for volume in about.get("volumes", ()):
            assert volume.count(":") >= 1


def test_the_cluster_runs_commands_that_exist():
    yaml = pytest.importorskip("yaml")
    parts = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    assert [part["kind"] for part in parts] == ["PersistentVolumeClaim", "StatefulSet", "Service"]
    pod = parts[1]["spec"]["template"]["spec"]
    understood(pod["containers"][0]["args"])
    (found,) = commands_in(pod["initContainers"][0]["args"][0])
    understood(shlex.split(found))
    mounted = {mount["name"] for each in (*pod["containers"], *pod["initContainers"])
               for mount in each["volumeMounts"]}  # fmt: skip
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_image_copies_what_the_wheel_is_made_of():
    text = (DEPLOY / "Dockerfile").read_text()
    for name in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for each in name.split():
            assert (DEPLOY.parent / each).exists(), each
    extras = re.search(r"^ARG EXTRAS=(.+)$", text, re.MULTILINE)[1].split(",")
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


@pytest.mark.slow
def test_a_wheel_of_what_the_image_copies_can_be_made_and_read(tmp_path):
    """As in the image's first stage, without the network that its second one needs."""
    pytest.importorskip("hatchling")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(DEPLOY.parent / name, tmp_path / name)
    shutil.copytree(DEPLOY.parent / "src", tmp_path / "src")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(tmp_path / "wheels"), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "wheels").glob("atoll-*.whl")
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    for name in ("atoll/py.typed", "atoll/cli/__init__.py", "atoll/view/page"):
        assert name in listed
