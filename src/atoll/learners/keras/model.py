"""What is common to all backends: which weights of a Keras model are what, and fresh copies."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import keras  # type: ignore[import-untyped]
import numpy as np

from atoll.errors import ConfigurationError
from atoll.learners.weights import sampled, unlike

#: So many draws of a weight tell what its initialiser gives.
DRAWS = 4


@dataclass(frozen=True, eq=False)
class Weights:
    """The variables of a model by what becomes of them, under names that do not depend on what
    else was made in this process: the number of the layer, and what it calls the weight."""

    trained: dict[str, Any]
    averaged: dict[str, Any]
    frozen: dict[str, Any]
    #: States of random streams, which are begun from the client's key.
    streams: list[Any]

    @staticmethod
    def of(model: Any) -> Weights:
        """The weights of a built model."""
        found = Weights({}, {}, {}, [])
        layers: dict[str, int] = {}
        trainable = {id(v) for v in model.trainable_variables}
        freezable = {id(v) for layer in model._flatten_layers() for v in layer._trainable_variables}
        for variable in model.variables:
            owner, _, name = variable.path.rpartition("/")
            if name == "seed_generator_state":
                found.streams.append(variable)
                continue
            # Names that Keras numbers by itself differ from copy to copy.
            name = re.sub(r"^variable(_\d+)?$", "variable", name)
            full = f"{layers.setdefault(owner, len(layers))}/{name}"
            known = {*found.trained, *found.averaged, *found.frozen}
            number = 2
            while full in known:
                full = f"{full.partition('#')[0]}#{number}"
                number += 1
            if id(variable) in trainable:
                found.trained[full] = variable
            elif id(variable) in freezable:
                found.frozen[full] = variable
            else:
                found.averaged[full] = variable
        return found

    def fixed(self, *, everything: bool) -> str:
        """Digest of what does not travel, or of everything; statistics begin as they are given."""
        shaping = {**self.frozen, **self.averaged, **(self.trained if everything else {})}
        digest = sha256()
        for name, variable in shaping.items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).data)
        return digest.hexdigest() if shaping else ""


def outputs_checked(model: Any, loss: Any) -> None:
    """Refuse models whose training would silently be another than Keras's own."""
    if isinstance(loss, str) and loss in ("cross_entropy", "binary_cross_entropy"):
        last = model.layers[-1] if model.layers else None
        activation = getattr(getattr(last, "activation", None), "__name__", "linear")
        if type(last).__name__ == "Softmax":
            activation = "softmax"
        if activation in ("softmax", "sigmoid"):
            raise ConfigurationError(
                f"the model ends in {activation}, but loss {loss!r} takes logits: leave the last "
                "activation out, or give a keras.losses.Loss"
            )
    for layer in model._flatten_layers():
        regularised = getattr(layer, "activity_regularizer", None) is not None or any(
            getattr(variable, "regularizer", None) is not None
            for variable in layer._trainable_variables
        )
        if regularised:
            raise ConfigurationError(
                f"layer {layer.name!r} has a regulariser, which is not part of the local loss "
                "here; use the weight decay of an optimizer instead"
            )
        if any(getattr(v, "constraint", None) is not None for v in layer._trainable_variables):
            raise ConfigurationError(
                f"layer {layer.name!r} constrains its weights, which the local loop does not do"
            )
    if model.losses:
        raise ConfigurationError(
            "the model adds losses of its own (add_loss), which are not part of the local loss here"
        )


class OfEach:
    """A Keras loss as the loss of each example [B]."""

    def __init__(self, loss: Any) -> None:
        if not isinstance(loss, keras.losses.Loss):
            raise ConfigurationError(f"loss must be a name or a keras.losses.Loss, not {loss!r}")
        if getattr(loss, "reduction", "sum_over_batch_size") not in (
            "sum_over_batch_size", "mean", "mean_with_sample_weight",
        ):  # fmt: skip
            raise ConfigurationError(
                "the loss must be a mean over examples, as the local loop takes it; use "
                "reduction='sum_over_batch_size'"
            )
        self.loss = loss

    @property
    def ignore_index(self) -> int | None:
        """The class that counts nowhere, as Keras calls it."""
        found = getattr(self.loss, "ignore_class", None)
        return None if found is None else int(found)

    def __call__(self, outputs: Any, targets: Any) -> Any:
        values = keras.ops.reshape(self.loss.call(targets, outputs), (len(outputs), -1))
        if self.ignore_index is None:
            return keras.ops.mean(values, axis=1)
        counts = keras.ops.reshape(targets != self.ignore_index, (len(outputs), -1))
        real = keras.ops.cast(counts, values.dtype)
        total = keras.ops.sum(keras.ops.where(counts, values, 0.0), axis=1)
        return total / keras.ops.maximum(keras.ops.sum(real, axis=1), 1.0)

    def __repr__(self) -> str:
        return f"{type(self.loss).__name__} {self.loss.get_config()}"


def copied(model: Any) -> Any:
    """A copy of the model with its weights."""
    fresh = _made_again(model)
    for mine, theirs in zip(fresh.variables, model.variables, strict=True):
        mine.assign(theirs.value)
    return fresh


def redrawn(model: Any, seed: int) -> Any:
    """A copy of the model whose initialisers have drawn from `seed`."""
    with _seeded(seed):
        return _made_again(model)


def not_fresh(model: Any) -> str:
    """Why a model's weights cannot be ones that its initialisers have just drawn."""
    trained = Weights.of(model).trained
    draws = []
    for seed in range(DRAWS):
        fresh = Weights.of(redrawn(model, seed)).trained
        draws.append({name: _sampled(variable) for name, variable in fresh.items()})
    for name, variable in trained.items():
        reason = unlike(_sampled(variable), [each[name] for each in draws])
        if reason:
            return f"{variable.path} {reason}"
    return ""


def _sampled(variable: Any) -> Any:
    """Some of a variable's numbers in NumPy, on any backend."""
    value = variable.value
    return sampled(np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value))


def _made_again(model: Any) -> Any:
    """The model from its configuration, with weights of its own."""
    try:
        fresh = type(model).from_config(model.get_config())
        if not fresh.built:
            fresh.build_from_config(model.get_build_config())
        if not fresh.built:
            raise ValueError("it is not built by its configuration")
    except Exception as error:
        raise ConfigurationError(
            "the Keras model cannot be made again from its configuration, as every client needs "
            "it: use Sequential or the functional API, register own layers with "
            "@keras.saving.register_keras_serializable() and give subclassed models a "
            f"get_config; Keras says: {str(error).splitlines()[0]}"
        ) from error
    return fresh


def architecture(model: Any) -> str:
    """A digest of the configuration, without the names that Keras numbers within a process."""

    # Layers are called by their place wherever they are named: inputs, outputs, connections.
    known = {layer.name: f"layer {n}" for n, layer in enumerate(model._flatten_layers())}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "name"}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, str):
            return known.get(value, value)
        return value if isinstance(value, int | float | bool) or value is None else str(value)

    text = json.dumps(plain(model.get_config()), sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let Keras draw from `seed`; the caller's own streams are untouched."""
    before = random.getstate(), np.random.get_state()
    keras.utils.set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
