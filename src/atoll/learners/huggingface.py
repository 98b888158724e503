"""Models of Hugging Face `transformers`, whole or with PEFT adapters, as learners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.errors import ConfigurationError, require
from atoll.learners.torch import TorchLearner


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
            [B, T, K] for the tokens that follow.
        pad: the token that fills texts up to T; None takes the model's own.
        weights: pretrained models start from their own.
        settings: of `TorchLearner`, e.g. lr, optimizer, batch_size.
    """
    require("transformers", "atoll[huggingface]", "HuggingFaceLearner")
    config = getattr(model, "config", None)
    token = getattr(config, "pad_token_id", None) if pad is None else pad
    if not isinstance(model, nn.Module) or config is None:
        raise ConfigurationError(
            f"model must be a transformers or peft model, not {type(model).__name__}"
        )
    if token is None:
        raise ConfigurationError("the model does not say which token pads; give pad=...")
    return TorchLearner(Tokens(model, int(token)), weights=weights, **settings)


class Tokens(nn.Module):
    """The model as a function of token ids [B, T] alone; padding is left out of attention."""

    def __init__(self, model: nn.Module, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, ids: Tensor) -> Tensor:
        # Inputs of labelled examples come as float32, in which token ids are exact.
        ids = ids.long()
        found: Tensor = self.model(input_ids=ids, attention_mask=(ids != self.pad).long()).logits
        return found

    def __repr__(self) -> str:
        # The whole of it is long, and of no use to whoever compares runs.
        inner = getattr(self.model, "peft_config", None)
        adapter = f", {next(iter(inner.values()))}" if inner else ""
        kind = getattr(self.model.config, "model_type", "")
        return f"{type(self.model).__name__}({kind}{adapter})"


def tokens(tokenizer: Any, texts: Sequence[str], length: int) -> NDArray[np.int64]:
    """Token ids [N, length] of texts, cut or padded to `length`: inputs for `data.from_arrays`."""
    if not texts:
        raise ConfigurationError("there are no texts")
    encoded = tokenizer(
        list(texts), truncation=True, padding="max_length", max_length=length,
        return_tensors="np", return_attention_mask=False,
    )  # fmt: skip
    return np.asarray(encoded["input_ids"], np.int64)
