"""A loss says what outputs are: figures follow it, and what cannot be meant is refused."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import nn
from torch.nn import functional as F

from atoll import data
from atoll.core.random import Key
from atoll.data.examples import Examples
from atoll.data.tasks import CLASSIFICATION, MULTILABEL
from atoll.errors import DataError
from atoll.learners import TorchLearner
from atoll.learners.torch import OfBatch


def two_classes(seed=0, size=80):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 4)).astype("f")
    return x, (x[:, 0] + 0.3 * rng.normal(size=size) > 0).astype(int)


def clients(**settings):
    x, y = two_classes()
    return data.from_arrays(x, y, **settings).iid(clients=4, test=0.5)


class Clamped(nn.Module):
    def forward(self, outputs, targets):
        p = outputs.flatten().clamp(1e-6, 1 - 1e-6)
        y = targets.float()
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


class Focal(nn.Module):
    """Lin et al., ICCV 2017, with its weight of positives: uneven at a half and at zero."""

    def forward(self, outputs, targets):
        p, y = outputs.flatten().sigmoid(), targets.float()
        share, weight = torch.where(y > 0, p, 1 - p), torch.where(y > 0, 0.25, 0.75)
        return -(weight * (1 - share) ** 2 * share.log()).mean()


def bce(outputs, targets):
    return F.binary_cross_entropy(outputs.flatten(), targets.float())


def on_logits(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs.flatten(), targets.float())


def hinge(outputs, targets):
    return F.relu(1 - outputs.flatten() * (2 * targets - 1)).mean()


def brier(outputs, targets):
    return (outputs.flatten() - targets).square().mean()


PROBABILITIES = {"bce": bce, "clamped": Clamped(), "brier": brier}
LOGITS = {"bce": on_logits, "focal": Focal(), "hinge": hinge}


def scores(learner, x, y):
    sums = learner.evaluate(learner.init(Key(0)), Examples(x, y), CLASSIFICATION, 2)
    return learner.figures(sums, CLASSIFICATION)


@pytest.mark.parametrize("loss", PROBABILITIES.values(), ids=PROBABILITIES)
def test_probabilities_are_told_apart_at_a_half(loss):
    x, y = two_classes()
    module = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[8.0, 0, 0, 0]]))
        wanted = module(torch.from_numpy(x)).flatten().numpy()
    learner = TorchLearner(module, loss=loss, weights="given")
    learner.check(clients())
    found = scores(learner, x, y)
    assert found["accuracy"] == pytest.approx(accuracy_score(y, wanted > 0.5))
    assert found["auc"] == pytest.approx(roc_auc_score(y, wanted), abs=2e-3)
    assert found["accuracy"] > 0.8


@pytest.mark.parametrize("loss", LOGITS.values(), ids=LOGITS)
def test_logits_are_told_apart_at_zero(loss):
    x, y = two_classes()
    module = nn.Linear(4, 1)
    with torch.no_grad():
        module.bias.fill_(0.2)
        wanted = module(torch.from_numpy(x)).flatten().numpy()
    learner = TorchLearner(module, loss=loss, weights="given")
    learner.check(clients())
    found = scores(learner, x, y)
    assert found["accuracy"] == pytest.approx(accuracy_score(y, wanted > 0))
    assert found["auc"] == pytest.approx(roc_auc_score(y, wanted), abs=5e-3)


def test_probabilities_of_several_labels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype("f")
    y = (x[:, :3] > 0).astype("f")
    module = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())
    with torch.no_grad():
        module[0].weight.copy_(5 * torch.eye(3, 4))
        module[0].bias.zero_()
    held = data.from_arrays(x, y, task="multilabel").iid(clients=1)
    learner = TorchLearner(module, loss=nn.BCELoss(), weights="given")
    learner.check(held)
    sums = learner.evaluate(learner.init(Key(0)), held.train(0), MULTILABEL, 3)
    assert learner.figures(sums, MULTILABEL)["exact"] == 1.0


def ends(*last, outputs=2):
    return nn.Sequential(nn.Linear(4, outputs), *last)


class Function(nn.Module):
    """A sigmoid that is no layer, and a squeeze behind it."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 1)

    def forward(self, x):
        return torch.sigmoid(self.out(x)).squeeze(-1)


TWICE = {
    "softmax": (ends(nn.Softmax(1)), "cross_entropy", "ends in a softmax"),
    "softmax, torch's loss": (ends(nn.Softmax(1)), nn.CrossEntropyLoss(), "ends in a softmax"),
    "sigmoids": (ends(nn.Sigmoid()), nn.CrossEntropyLoss(), "ends in a sigmoid"),
    "sigmoid": (ends(nn.Sigmoid(), outputs=1), "binary_cross_entropy", "ends in a sigmoid"),
    "sigmoid, own loss": (ends(nn.Sigmoid(), outputs=1), on_logits, "ends in a sigmoid"),
    "a function": (Function(), "binary_cross_entropy", "ends in a sigmoid"),
    "no logarithms": (ends(), nn.NLLLoss(), "logarithms of probabilities"),
}


@pytest.mark.parametrize(("module", "loss", "told"), TWICE.values(), ids=TWICE)
def test_an_activation_too_much_or_too_few_is_refused(module, loss, told):
    with pytest.raises(DataError, match=told):
        TorchLearner(module, loss=loss).check(clients())


def test_what_belongs_together_is_not_refused():
    for module, loss in [
        (ends(nn.LogSoftmax(1)), nn.NLLLoss()),
        (ends(nn.LogSoftmax(1)), "cross_entropy"),
        (ends(), nn.CrossEntropyLoss(label_smoothing=0.1)),
        (ends(nn.Sigmoid(), outputs=1), bce),
        (Function(), bce),
    ]:
        TorchLearner(module, loss=loss).check(clients())


WEIGHTS = torch.tensor([0.1, 0.9])
NO_MEANS = {
    "sum": (nn.CrossEntropyLoss(reduction="sum"), "is the sum over its examples"),
    "weights of classes": (nn.CrossEntropyLoss(weight=WEIGHTS), "Weigh classes with"),
    "none": (nn.CrossEntropyLoss(reduction="none"), "must be one number"),
    "a term between rows": (
        lambda o, t: F.cross_entropy(o, t) + o.mean(0).square().sum(), "OfBatch",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "told"), NO_MEANS.values(), ids=NO_MEANS)
def test_a_loss_that_is_no_mean_is_refused(loss, told):
    with pytest.raises(DataError, match=told):
        TorchLearner(nn.Linear(4, 2), loss=loss).check(clients())


def test_a_loss_that_sets_all_against_all_is_refused():
    x, _ = two_classes()
    amounts = data.from_arrays(x, x[:, 0]).iid(clients=4)
    zero = nn.Linear(4, 1)
    with torch.no_grad():
        zero.weight.zero_()
        zero.bias.zero_()
    for module in (nn.Linear(4, 1), zero):
        for loss in (nn.MSELoss(), nn.L1Loss(), nn.HuberLoss()):
            with (
                pytest.warns(UserWarning, match="size"),
                pytest.raises(DataError, match="each of one with each"),
            ):
                TorchLearner(module, loss=loss, weights="given").check(amounts)
    TorchLearner(nn.Linear(4, 1), loss="mse").check(amounts)
    TorchLearner(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), loss=nn.MSELoss()).check(amounts)


def test_means_are_let_through():
    def weighed(outputs, targets):
        return F.cross_entropy(outputs, targets, weight=WEIGHTS, reduction="none").mean()

    def between_rows(outputs, targets):
        return F.cross_entropy(outputs, targets) + outputs.mean(0).square().sum()

    for loss in (weighed, nn.CrossEntropyLoss(), nn.MultiMarginLoss(), OfBatch(between_rows)):
        TorchLearner(nn.Linear(4, 2), loss=loss).check(clients())


def test_jax_tells_them_apart_too():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    from atoll.learners.jax import JaxLearner, pure

    x, y = two_classes()

    def init(key):
        return {"w": jnp.array([[8.0], [0], [0], [0]])}

    def sigmoid(params, x):
        return jax.nn.sigmoid(x @ params["w"])

    def of_probabilities(outputs, targets):
        p = jnp.clip(outputs[:, 0], 1e-6, 1 - 1e-6)
        return -(targets * jnp.log(p) + (1 - targets) * jnp.log(1 - p))

    learner = JaxLearner(pure(init, sigmoid), loss=of_probabilities)
    learner.check(clients())
    assert scores(learner, x, y)["accuracy"] == pytest.approx(accuracy_score(y, x[:, 0] > 0))
    with pytest.raises(DataError, match="ends in a sigmoid"):
        JaxLearner(pure(init, sigmoid), loss="binary_cross_entropy").check(clients())

    def softmax(params, x):
        return jax.nn.softmax(jnp.concatenate([x @ params["w"], 0 * x[:, :1]], 1))

    with pytest.raises(DataError, match="ends in a softmax"):
        JaxLearner(pure(init, softmax)).check(clients())


class BalancedFocal(nn.Module):
    """On probabilities, cut off at 0 and 1, and uneven at a half."""

    def forward(self, outputs, targets):
        p, y = outputs.flatten().clamp(1e-6, 1 - 1e-6), targets.float()
        share, weight = torch.where(y > 0, p, 1 - p), torch.where(y > 0, 0.25, 0.75)
        return -(weight * (1 - share) ** 2 * share.log()).mean()


@pytest.mark.parametrize("cut", [False, True])
def test_an_uneven_loss_of_probabilities_is_scored_at_a_half(cut):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(4, 1, bias=False)

        def forward(self, x):
            p = self.own(x).sigmoid()
            return p.clamp(1e-6, 1 - 1e-6) if cut else p

    learner = TorchLearner(Model(), loss=BalancedFocal(), lr=0.5, batch_size=8)
    held = clients()
    learner.check(held)
    model = learner.init(Key(0))
    model["params"] = np.array([4.0, 0, 0, 0], np.float32)
    sums = learner.evaluate(model, held.test_part, held.task, held.classes)
    x, y = held.test_part.all()
    expected = accuracy_score(y, x[:, 0] > 0)
    assert learner.figures(sums, held.task)["accuracy"] == pytest.approx(expected)
    assert 0.5 < expected < 1


def ten(seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(200) % 10
    return data.from_arrays(rng.normal(size=(200, 6)).astype("f"), y).iid(clients=2)


@pytest.mark.parametrize("heavy", [0, 5, 9])
def test_a_weight_on_any_class_is_found(heavy):
    weight = torch.ones(10)
    weight[heavy] = 50
    learner = TorchLearner(nn.Linear(6, 10), loss=nn.CrossEntropyLoss(weight=weight))
    with pytest.raises(DataError, match="no mean over its examples"):
        learner.check(ten())
    TorchLearner(nn.Linear(6, 10), loss=nn.CrossEntropyLoss(weight=torch.full((10,), 3.0))).check(
        ten()
    )


@pytest.mark.parametrize("left", [0, 1, 9])
def test_a_class_that_a_loss_leaves_out_without_a_word_is_found(left):
    def quiet(outputs, targets):
        return F.cross_entropy(outputs, targets, ignore_index=left)

    learner = TorchLearner(nn.Linear(6, 10), loss=quiet)
    with pytest.raises(DataError, match=f"targets of class {left} out.*ignore_index={left}"):
        learner.check(ten())
    said = nn.CrossEntropyLoss(ignore_index=left)
    TorchLearner(nn.Linear(6, 10), loss=said).check(ten())


def test_buffers_that_cannot_travel_as_they_are_are_refused():
    from atoll.errors import ConfigurationError

    def module(**settings):
        made = nn.Linear(6, 10)
        made.register_buffer("since", torch.tensor(1700000000.25, dtype=torch.float64), **settings)
        return made

    with pytest.raises(ConfigurationError, match="buffer 'since' is torch.float64"):
        TorchLearner(module()).layout  # noqa: B018
    TorchLearner(module(persistent=False)).check(ten())
    TorchLearner(module().float()).check(ten())
