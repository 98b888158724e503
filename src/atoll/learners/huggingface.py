"""Models of Hugging Face `transformers`, whole or with PEFT adapters, as learners."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.errors import ConfigurationError, require
from atoll.learners.torch import NextTokens, TorchLearner
from atoll.learners.torch.weights import by_name, named


def HuggingFaceLearner(  # noqa: N802
    model: Any,
    *,
    pad: int | None = None,
    weights: Literal["given", "seeded"] = "given",
    **settings: Any,
) -> TorchLearner:
    """A `transformers` model or a `peft` one as a learner.

    What requires gradients is trained and travels: of a PEFT model, the adapter (and what is in
    `modules_to_save`, such as a new head) and nothing else. The frozen weights stay where they are;
    their digest is part of a run's identity.

    Args:
        model: gives `logits` for `input_ids` [B, T] and `attention_mask`: [B, K] for labels, or
            [B, T, K] for the tokens that follow. Data are ids alone, or its inputs by name.
        pad: the token that fills texts up to T; None takes the model's own.
        weights: pretrained models start from their own.
        settings: of `TorchLearner`, e.g. lr, optimizer, batch_size.
    """
    require("transformers", "atoll[huggingface]", "HuggingFaceLearner")
    config: Any = getattr(model, "config", None)
    token = getattr(config, "pad_token_id", None) if pad is None else pad
    if not isinstance(model, nn.Module) or config is None:
        raise ConfigurationError(
            f"model must be a transformers or peft model, not {type(model).__name__}"
        )
    if token is None:
        raise ConfigurationError("the model does not say which token pads; give pad=...")
    if config.pad_token_id is None:
        config.pad_token_id = int(token)  # classification heads look for it there
    if _writes(model):
        settings.setdefault("loss", NextTokens(int(token)))
    return TorchLearner(Tokens(model, int(token)), weights=weights, **settings)


def _writes(model: nn.Module) -> bool:
    """Whether a model says which token follows, as its class or that of its base does."""
    from transformers.models.auto import modeling_auto

    named = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    base_of: Any = getattr(model, "get_base_model", None)
    base = model if base_of is None else base_of()
    return any(kind.__name__ in named or "Causal" in kind.__name__ for kind in type(base).__mro__)


#: What the names of a model's tensors begin with inside `Tokens`.
INSIDE = "model."


class Tokens(nn.Module):
    """The model as a function of token ids [B, T] alone; padding is left out of attention.

    Inputs by name (`input_ids`, `attention_mask`, `token_type_ids`, ...) are passed on as they are.
    """

    def __init__(self, model: nn.Module, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, *single: Tensor, **named: Tensor) -> Tensor:
        found: Tensor
        if not single:
            found = self.model(**self._masked(named)).logits
            return found
        # Inputs of labelled examples come as float32, in which token ids are exact.
        found = self.model(**self._masked({"input_ids": single[0].long()})).logits
        return found

    def _masked(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs with a mask of padding, where there is none."""
        if "input_ids" not in inputs or "attention_mask" in inputs:
            return dict(inputs)
        return {**inputs, "attention_mask": (inputs["input_ids"] != self.pad).long()}

    def tensors_of(self, source: Any) -> dict[str, Tensor] | None:
        """The tensors of a model like the one inside, or of its state dict."""
        if isinstance(source, nn.Module) and not isinstance(source, Tokens):
            return {INSIDE + name: tensor for name, tensor in named(source).items()}
        if isinstance(source, Mapping) and not any(n.startswith(INSIDE) for n in source):
            return {INSIDE + name: tensor for name, tensor in by_name(source).items()}
        return None

    def __repr__(self) -> str:
        # The whole of it is long; a digest tells models apart, the same in every process.
        adapters = getattr(self.model, "peft_config", None) or {}
        told = [_digest(self.model.config), *(f"{n} {_digest(a)}" for n, a in adapters.items())]
        adapter = f", {', '.join(told)}"
        kind = getattr(self.model.config, "model_type", "")
        return f"{type(self.model).__name__}({kind}{adapter})"


def _digest(config: Any) -> str:
    """A digest of a configuration, whatever the order in which sets are read."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(each) for name, each in value.items()}
        if isinstance(value, set | frozenset):
            return sorted(map(str, value))
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return value if isinstance(value, int | float | str | bool) or value is None else str(value)

    found = plain(config.to_dict())
    found.pop("_name_or_path", None)
    found.pop("base_model_name_or_path", None)  # where it lay, which differs from site to site
    return sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def tokens(tokenizer: Any, texts: Sequence[str], length: int) -> NDArray[np.int64]:
    """Token ids [N, length] of texts, cut or padded to `length`: inputs for `data.from_arrays`."""
    if not texts:
        raise ConfigurationError("there are no texts")
    encoded = tokenizer(
        list(texts), truncation=True, padding="max_length", max_length=length,
        return_tensors="np", return_attention_mask=False,
    )  # fmt: skip
    return np.asarray(encoded["input_ids"], np.int64)
