"""Self-attention over sequences."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atoll.learners.torch.stacking.layers.dense import linear
from atoll.learners.torch.stacking.layers.pointwise import dropout
from atoll.learners.torch.stacking.tape import Tape, Value, local


def attention(
    tape: Tape, x: Value, module: nn.MultiheadAttention, names: Mapping[str, str],
    mask: Tensor | None, causal: bool,
) -> Value:  # fmt: skip
    """Multi-head self-attention over [C * B, T, D]; without dropout by torch's fused kernel."""
    width, heads = module.embed_dim, module.num_heads
    if mask is not None and mask.is_floating_point():
        mask = mask.to(x.data.dtype)  # the fused kernel reads another type as if it were this one
    joined = linear(tape, x, names["in_proj_weight"], names.get("in_proj_bias"))
    query, key, value = local(tape, torch.chunk, [joined, 3], {"dim": -1})

    def split(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:2], heads, width // heads).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            split(q), split(k), split(v), attn_mask=mask, is_causal=causal and mask is None
        )
        return out.transpose(1, 2).flatten(2)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        products = split(q) @ split(k).transpose(-2, -1) / (width // heads) ** 0.5
        if mask is not None:
            products = (
                products.masked_fill(~mask, -torch.inf)
                if mask.dtype == torch.bool
                else products + mask
            )
        elif causal:
            later = torch.ones(products.shape[-2:], dtype=torch.bool).triu(1)
            products = products.masked_fill(later.to(products.device), -torch.inf)
        shares: Tensor = products.softmax(-1)
        return shares

    def mix(share: Tensor, v: Tensor) -> Tensor:
        mixed: Tensor = (share @ split(v)).transpose(1, 2).flatten(2)
        return mixed

    if module.dropout and tape.training:
        shares = dropout(tape, local(tape, scores, [query, key], {}), module.dropout)
        mixed = local(tape, mix, [shares, value], {})
    else:
        mixed = local(tape, attend, [query, key, value], {})
    return linear(tape, mixed, names["out_proj.weight"], names.get("out_proj.bias"))
