"""Short texts as hashed bags of words: banking77 and medquad.

* banking77: Casanueva et al. 2020, PolyAI (CC BY 4.0), 10,003 + 3,080 questions of customers of a
  bank, each with one of 77 intents.
* medquad: Ben Abacha & Demner-Fushman 2019 (CC BY 4.0), 16,407 questions with answers from nine
  sites of the National Institutes of Health. The task here is to tell from the answer which of 16
  types of question it answers. The question itself would give the type away ("What are the
  symptoms of ..."), so it is not an input. One type, support groups, has a single example.

Preprocessing: a text is lowered and cut into runs of letters a to z, digits and apostrophes; a
word goes to column crc32(word) modulo 1,024 (a hash that is the same everywhere, unlike
Python's own), and the counts of a text are scaled to length 1.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np

from atoll.data.dataset import Dataset
from atoll.data.examples import Examples
from atoll.data.sets.columns import hashed_words, positions
from atoll.data.sets.files import folder_file, lines_of, read_columns
from atoll.data.tasks import CLASSIFICATION

#: Columns that words are hashed to.
WIDTH = 1024


def banking77() -> Dataset:
    """Intents of questions to a bank."""
    train, test = (
        read_columns(folder_file("banking77", f"banking77/{part}.csv.gz"))
        for part in ("train", "test")
    )
    intents = sorted(set(train["category"]))
    return Dataset(
        name="banking77",
        x=hashed_words(train["text"], WIDTH),
        y=positions(train["category"], intents, "banking77, category"),
        task=CLASSIFICATION,
        classes=len(intents),
        test=Examples(
            hashed_words(test["text"], WIDTH),
            positions(test["category"], intents, "banking77, category"),
        ),
        class_names=tuple(intents),
        describe="10,003 questions of bank customers with 77 intents, as hashed words",
    )


def medquad() -> Dataset:
    """Which type of medical question an answer answers."""
    lines = lines_of(folder_file("medquad", "medquad/medquad.jsonl.gz"))
    entries = [json.loads(line) for line in lines]
    kinds = [str(entry["qtype"]) for entry in entries]
    # The commonest type first: the one-example type then comes last.
    counts = Counter(kinds)
    known = sorted(counts, key=lambda kind: (-counts[kind], kind))
    return Dataset(
        name="medquad",
        x=hashed_words([str(entry["answer"]) for entry in entries], WIDTH),
        y=positions(kinds, known, "medquad, qtype"),
        task=CLASSIFICATION,
        classes=len(known),
        keys={"source": np.array([str(entry["source"]) for entry in entries])},
        class_names=tuple(known),
        describe="16,407 medical answers from nine sources and the type of question, hashed words",
    )
