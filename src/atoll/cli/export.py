"""`atoll export RUN --output FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path

from atoll.cli.files import find_run, read_plan
from atoll.core.model_file import ModelFile, load_model
from atoll.errors import ConfigurationError
from atoll.learners.saved import SavedModel
from atoll.learners.saving import write_model
from atoll.tracking.reading import read_run


def run(options: argparse.Namespace) -> int:
    """Write a run's model in the format that the file's name says."""
    kept, learner = _model(options), None
    if options.federation:
        learner = read_plan(options.federation).learner
        SavedModel.of(learner, kept)  # or it says what does not fit
    path = write_model(Path(options.output), kept, learner)
    about = f"round {kept.about['round']}" if "round" in kept.about else "a model"
    print(f"written: {path} ({about}, {len(kept.arrays)} arrays)")
    return 0


def _model(options: argparse.Namespace) -> ModelFile:
    path = Path(options.model)
    if not path.is_file():
        return read_run(find_run(options.model, options.runs)).saved(best=options.best)
    if options.best:
        raise ConfigurationError("--best is of a run; this is a file of one model")
    return load_model(path)
