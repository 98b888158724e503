"""Whatever a command is given, it ends in a sentence and a code: no traceback, no hang.

The command table is walked, so that a new command or option is tried as well. What would start a
server, an agent or a training is only given files that cannot be used.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll import Federation, algorithms, data, schedules
from atoll.cli import main, parser
from atoll.learners import NumpyLearner

FILES = {
    "empty.py": b"",
    "broken.py": b"def f(:\n",
    "raises.py": b"raise ValueError('not today')\n",
    "exits.py": b"import sys\nsys.exit(3)\n",
    "other.py": b"federation = 3\nclients = 'x'\ndata = None\n",
    "missing.py": b"import a_module_that_nobody_has\n",
    "binary.py": bytes(range(256)),
    "latin.py": b"# \xe9\xe8\n",
    "null.py": b"x = '\0'\n",
    "empty.json": b"{}",
    "list.json": b"[1, 2]",
    "text.csv": b"a,b\n1,2\n",
    "archive.tar": b"not an archive",
    "truncated.safetensors": b"\xff" * 8,
}
#: Files where one is wanted, and everything else.
ODD = ["", "-", ".", "..", "/", "nowhere", "nowhere/else.py", "a\0b", "~", "*", "x" * 5000, "ä ß",
       "\ud800", "%s%n", "--", "/dev/null", "https://a", "sub", "run", "loop"]  # fmt: skip
NUMBERS = ["0", "-1", "1", "nan", "inf", "1e400", "1.5", "x", "", "99999999999999999999", "0x10",
           "\u0663", " 7 "]  # fmt: skip
#: These begin to work when all they are given is good, for as long as it takes.
NEVER = {"demo"}
WEB = {"--web"}


@pytest.fixture
def place(tmp_path):
    """A folder with files that cannot be used, and a run that can."""
    root = tmp_path / "odd"
    root.mkdir()
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    (root / "sub").mkdir()
    (root / "loop").symlink_to(root / "loop")
    state = root / "half"
    state.mkdir()
    (state / "federation.json").write_text("{")
    identity = root / "identity"
    identity.mkdir()
    (identity / "site.json").write_text("[]")
    x = np.random.default_rng(0).normal(size=(40, 3)).astype("f")
    clients = data.from_arrays(x, np.arange(40) % 2).iid(clients=4)
    Federation(
        learner=NumpyLearner(layers=(3, 2)), algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1),
    ).simulate(clients, folder=root / "run")  # fmt: skip
    damaged = root / "damaged"
    damaged.mkdir()
    for path in (root / "run").glob("*.json*"):
        (damaged / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return root


def commands():
    """The parser of each command, by name."""
    table = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {name: each for name, each in table.choices.items() if name not in NEVER}


def words_of(command):
    """Command lines of a command: its positional arguments, and some of its options."""
    places = [*FILES, *ODD, "half", "identity", "damaged"]
    anything = st.one_of(st.sampled_from(places), st.sampled_from(NUMBERS), st.text(max_size=8))

    def value(action):
        if action.choices:
            return st.one_of(st.sampled_from([*map(str, action.choices)]), anything)
        return st.one_of(st.sampled_from(NUMBERS), anything) if action.type else anything

    parts = []
    for action in command._actions:
        if action.dest == "help" or WEB & {*action.option_strings}:
            continue
        if not action.option_strings:
            one = value(action).map(lambda text: (text,))
            parts.append(st.one_of(one, one, one, st.lists(value(action), max_size=2).map(tuple)))
        elif action.nargs == 0:
            parts.append(st.sampled_from([(), (action.option_strings[-1],)]))
        else:
            name = action.option_strings[-1]
            given = value(action).map(lambda text, name=name: (f"{name}={text}",))
            parts.append(st.one_of(st.just(()), given) if not action.required else given)
    return st.tuples(*parts).map(lambda found: [word for part in found for word in part])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(commands()))
def test_a_command_ends_in_a_sentence(name, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.delenv("ATOLL_TOKEN", raising=False)
    from atoll.cli import access

    monkeypatch.setattr(access, "PATIENCE", 0.1)
    kept, root = sorted(os.listdir(place)), os.stat("/").st_mode

    @given(words_of(commands()[name]))
    @settings(
        max_examples=60, deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip
    def tried(words):
        capsys.readouterr()
        try:
            code = main([name, *words])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        assert code in (0, 1, 2, 3, 4, 5, 130), (words, code)
        assert "Traceback" not in said.err + said.out, words
        assert code == 0 or said.err.strip(), f"{words} ended with {code} and no word"

    tried()
    assert set(kept) <= set(os.listdir(place))
    assert os.stat("/").st_mode == root


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "x.py", "--state", "s", "--port", "70000"],
        ["serve", "x.py", "--state", "s", "--lease", "nan"],
        ["serve", "x.py", "--state", "s", "--lease", "0"],
        ["serve", "x.py", "--state", "s", "--linger", "inf"],
        ["serve", "x.py", "--state", "s", "--seed", "-1"],
        ["invite", "s", "a", "--hours", "nan"],
        ["invite", "s", "a", "--hours", "-1"],
        ["show", "r", "--port", "70000"],
        ["simulate", "x.py", "--seed", "1.5"],
        ["flower", "x", "--clients", "0"],
    ],
)
def test_numbers_that_cannot_be_are_refused_by_the_grammar(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert words[-2] in capsys.readouterr().err
