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
    kept, shape = _model(options)
    learner = None
    if options.federation:
        learner = read_plan(options.federation).learner
        SavedModel.of(learner, kept)  # or it says what does not fit
    path = write_model(Path(options.output), kept, learner, shape)
    about = f"round {kept.about['round']}" if "round" in kept.about else "a model"
    print(f"written: {path} ({about}, {len(kept.arrays)} arrays)")
    return 0


def _model(options: argparse.Namespace) -> tuple[ModelFile, tuple[int, ...] | None]:
    path = Path(options.model)
    if path.is_file():
        if options.best:
            raise ConfigurationError("--best is of a run; this is a file of one model")
        kept = load_model(path)
        return kept, _shape(kept.about.get("input_shape"))
    run = read_run(find_run(options.model, options.runs))
    kept = run.saved(best=options.best)
    return kept, _shape(run.data.get("input_shape") or kept.about.get("input_shape"))


def _shape(told: object) -> tuple[int, ...] | None:
    sides = isinstance(told, list) and all(isinstance(side, int) and side > 0 for side in told)
    return tuple(told) if isinstance(told, list) and sides else None
