"""Keras 3 models as learners, on the backend that Keras runs on here."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from atoll.errors import ConfigurationError, require
from atoll.learners.base import GradientLearner


def _choose_backend() -> None:
    """Let Keras run on what is installed, where nobody has said on what; its default may not be."""
    if "keras" in sys.modules or os.environ.get("KERAS_BACKEND") or find_spec("tensorflow"):
        return
    try:
        written = json.loads((Path.home() / ".keras" / "keras.json").read_text())["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        written = ""
    installed = [name for name in ("jax", "torch") if find_spec(name)]
    if installed and written not in installed:
        os.environ["KERAS_BACKEND"] = installed[0]


_choose_backend()
require("keras", "keras>=3", "atoll.learners.KerasLearner")

from atoll.learners.keras.model import OfEach, not_fresh, outputs_checked  # noqa: E402

__all__ = ["KerasLearner"]


def KerasLearner(  # noqa: N802
    model: Any, *, loss: Any = "cross_entropy", **settings: Any
) -> GradientLearner:
    """A Keras model as a learner: a `JaxLearner` or a `TorchLearner`, by Keras's backend.

    Trainable weights travel; frozen ones stay as they are; other weights (running means) are
    averaged; dropout draws belong to the client and the round.

    Args:
        model: a built model that gives logits or values, copied and never changed.
        loss: "cross_entropy", "binary_cross_entropy", "mse", "l1", or a `keras.losses.Loss`.
        settings: of the learner: lr, batch_size, epochs, steps, max_gradient_norm, and optimizer,
            which is optax's on JAX and torch.optim's on torch; and weights: "seeded" draws the
            initial ones from the run's seed by the model's initialisers, "given" starts from the
            model's own. It must be said for weights that those initialisers would not draw: loaded
            or trained ones.
    """
    import keras  # type: ignore[import-untyped]

    if not isinstance(model, keras.Model):
        raise ConfigurationError(f"model must be a keras.Model, not {type(model).__name__}")
    if not model.built:
        raise ConfigurationError(
            "the Keras model is not built, so its shapes are not known; begin it with "
            "keras.Input(shape=...) or call model.build(...)"
        )
    outputs_checked(model, loss)
    weights = settings.pop("weights", "auto")
    if weights not in ("seeded", "given", "auto"):
        raise ConfigurationError(f"weights must be seeded or given, not {weights!r}")
    if weights == "auto":
        if reason := not_fresh(model):
            raise ConfigurationError(
                f"the model has weights that its initialisers do not draw: {reason}; say "
                "weights='given' to start from its own, or weights='seeded' to draw them from the "
                "run's seed"
            )
        weights = "seeded"
    backend = keras.backend.backend()
    if backend == "jax":
        from atoll.learners.jax import JaxLearner
        from atoll.learners.keras.on_jax import OnJax

        chosen = loss if isinstance(loss, str) else OfEach(loss)
        return JaxLearner(OnJax(model, weights), loss=chosen, **settings)
    if backend == "torch":
        from atoll.learners.keras.on_torch import learner_of

        return learner_of(model, loss, weights, settings)
    raise ConfigurationError(
        f"Keras runs on {backend} here; atoll trains Keras models on jax and torch: set "
        "KERAS_BACKEND=jax or KERAS_BACKEND=torch before keras is imported"
    )
