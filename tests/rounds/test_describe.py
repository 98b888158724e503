"""Descriptions: plain, the same in every process, and different where meanings differ."""

import gc
import importlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from atoll import algorithms, schedules
from atoll.aggregation import Clip, Mean
from atoll.algorithms import Algorithm
from atoll.data.examples import Examples
from atoll.learners import rates
from atoll.rounds.describe import describe, differences, plan_digest, said


def test_descriptions_are_plain_and_stable(federation):
    plain = describe(
        {
            "rate": rates.Cosine(0.1, 10),
            "function": np.mean,
            "partial": partial(sorted, key=len),
            "array": np.arange(3),
            "set": {"b", "a"},
            "object": object(),
            "float": np.float64(2.5),
        }
    )
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rate"] == {
        "kind": "atoll.learners.rates.Cosine", "initial": 0.1, "rounds": 10, "final": 0.0,
    }  # fmt: skip
    assert plain["set"] == ["a", "b"]
    assert "0x" not in str(plain)
    assert federation.describe()["learner"]["layout"]["params"] == 9


def test_functions_of_one_name_are_told_apart():
    assert describe(lambda a: 5 * a) != describe(lambda a: 6 * a)

    def scaled(by):
        return lambda a: by * a

    assert describe(scaled(2)) == describe(scaled(2)) != describe(scaled(3))


@pytest.mark.parametrize(
    "other",
    [
        {"private": ("0.bias",)},
        {"download": Clip(1.0)},
        {"public": Examples(np.zeros((3, 2), np.float32), np.zeros(3, np.int64))},
        {"pipeline": Clip(1.0) >> Mean()},
        {"algorithm": algorithms.FedAvg(weighting="uniform")},
    ],
)
def test_the_plans_digest_is_of_all_that_clients_must_agree_on(federation, other):
    assert plan_digest(federation) != plan_digest(replace(federation, **other))


def test_the_plans_digest_leaves_the_servers_own_affairs_out(federation):
    longer = replace(federation, schedule=schedules.Synchronous(rounds=60))
    assert plan_digest(longer) == plan_digest(federation)


def test_parts_of_a_plan_that_are_no_dataclasses_have_their_kind():
    class Bare(Algorithm):
        def init(self, start):
            return {}

        def work(self, client, got, mine):
            return None

        def step(self, state, mean, server):
            return state

    assert describe(Bare())["kind"].endswith("Bare")


OWN = """
import numpy as np
SCALE = {scale}

class Rule:
    {comment}
    def __init__(self, gamma):
        self.gamma = gamma

    def __call__(self, outputs, targets):
        "{text}"
        return (outputs - targets) * {factor} * self.gamma

def loss(outputs, targets):
    return outputs * SCALE
"""


def written(folder, name, **changed):
    """A module of people's own, from a file."""
    import importlib.util
    import sys

    words = {"scale": 1, "comment": "# a", "text": "b", "factor": 2, **changed}
    path = folder / f"{name}.py"
    path.write_text(OWN.format(**words))
    spec = importlib.util.spec_from_file_location("own_code", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_code"] = module
    spec.loader.exec_module(module)
    return module


def test_what_peoples_own_code_says_is_told_apart_and_how_it_is_written_is_not(tmp_path):
    from atoll.rounds import code

    def told(name, gamma=1.0, **changed):
        code._class_source.cache_clear()
        module = written(tmp_path, name, **changed)
        return describe(module.Rule(gamma)), describe(module.loss)

    first = told("a")
    assert told("b", comment="# other words", text="and others") == first
    assert told("c", gamma=2.0)[0] != first[0]
    assert told("d", factor=3)[0] != first[0]
    assert told("e", scale=5)[1] != first[1]
    assert first[0]["gamma"] == 1.0


def test_settings_set_beside_a_dataclasss_fields_count():
    class Rule(algorithms.LocalRule):
        def __init__(self, gamma):
            super().__init__()
            object.__setattr__(self, "gamma", gamma)

    one, other = (algorithms.FedAvg(local=Rule(gamma)) for gamma in (1.0, 2.0))
    assert describe(one) != describe(other)
    assert list(differences(describe(one), describe(other))) == ["local.gamma"]


def test_modules_are_told_apart_by_what_they_do_not_print():
    torch = pytest.importorskip("torch")
    from torch import nn

    weigh = [nn.CrossEntropyLoss(weight=torch.tensor([1.0, w])) for w in (1.0, 2.0)]
    smooth = [nn.CrossEntropyLoss(label_smoothing=s) for s in (0.0, 0.1)]

    class Net(nn.Module):
        def __init__(self, skip, table=0.0):
            super().__init__()
            self.skip, self.out = skip, nn.Linear(2, 2)
            self.register_buffer("table", torch.full((2,), table))

        def forward(self, x):
            return self.out(x) + self.skip * x

    class Other(nn.Module):
        def __init__(self, skip):
            super().__init__()
            self.skip, self.out = skip, nn.Linear(2, 2)
            self.register_buffer("table", torch.zeros(2))

        def forward(self, x):
            return self.out(x) - self.skip * x

    for one, other in (
        weigh, smooth, (Net(1.0), Net(2.0)), (Net(1.0), Net(1.0, 1.0)),
        (nn.Dropout(0.1), nn.Dropout(0.2)), (Net(1.0), Other(1.0)),
    ):  # fmt: skip
        assert describe(one) != describe(other)
    assert describe(Net(1.0)) == describe(Net(1.0))  # weights are a model's own affair


def test_a_reference_to_itself_ends():
    class Loop:
        def __init__(self):
            self.me, self.size = self, 3

    assert describe(Loop())["size"] == 3


def test_code_that_was_typed_in_is_told_apart_by_what_it_does():
    around = {}
    exec("def f(x):\n    return x + 1\ndef g(x):\n    return x + 2\n", around)
    assert describe(around["f"]).split()[1] != describe(around["g"]).split()[1]


def test_lambdas_on_one_line_are_told_apart():
    one, other = [lambda x: x + 1, lambda x: x + 2]
    assert describe(one) != describe(other)


def test_installed_packages_are_named_and_not_looked_into():
    from atoll.rounds.code import is_own

    assert not is_own(np.ndarray) and not is_own(dict) and not is_own(algorithms.FedAvg)
    assert not is_own(pytest.MonkeyPatch) and not is_own(json.JSONDecoder)
    assert is_own(type("Mine", (), {}))


def test_differences_are_said_by_field():
    found = differences(
        {"learner": {"lr": 0.1, "code": "a"}, "stages": [1, 2]},
        {"learner": {"lr": 0.2, "code": "b"}, "stages": [1, 3]},
    )
    assert said(found, "here", "there") == (
        "learner.lr is 0.1 here and 0.2 there, learner.code is another, "
        "stages[1] is 2 here and 3 there"
    )


def test_a_resume_says_which_setting_differs(tmp_path, federation):
    from atoll import data
    from atoll.errors import CheckpointError

    x = np.random.default_rng(0).normal(size=(40, 2)).astype("f")
    clients = data.from_arrays(x, np.arange(40) % 3).iid(clients=4)
    learner = replace(federation.learner, lr=0.05)
    other = replace(federation, learner=learner, schedule=schedules.Synchronous(rounds=2))
    mine = replace(federation, schedule=schedules.Synchronous(rounds=1))
    mine.simulate(clients, folder=tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"learner.lr is 0.05 now and .* there"):
        other.simulate(clients, folder=tmp_path / "run", resume=True)


def test_code_is_read_in_threads_too(tmp_path):
    """CPython 3.11 raises SystemError where two threads make syntax trees at once."""
    deep = "lambda x: " + "(" * 60 + "x" + " + 1)" * 60
    names = [f"read_in_threads_{n}" for n in range(8)]
    for name in names:
        lines = [f"def f{n}(x):\n    return {deep}" for n in range(60)]
        (tmp_path / f"{name}.py").write_text("\n".join(lines))
    sys.path.insert(0, str(tmp_path))
    try:
        modules = [importlib.import_module(name) for name in names]
    finally:
        sys.path.pop(0)

    def let_others(phase, about):
        time.sleep(0.0001)  # as whatever is finalised while a tree is made may

    before = gc.get_threshold()
    gc.set_threshold(50)
    gc.callbacks.append(let_others)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda module: describe(module.f59), modules))
    finally:
        gc.callbacks.remove(let_others)
        gc.set_threshold(*before)
    assert found == [describe(module.f59) for module in modules]
