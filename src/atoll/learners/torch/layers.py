"""Layers for a cohort: how each kind runs forward, and what it leaves on the tape for later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atoll.learners.torch.tape import Tape, Value, keep, local

aten = torch.ops.aten


def linear(tape: Tape, x: Value, weight: str, bias: str | None) -> Value:
    """[C * B, ..., I] -> [C * B, ..., O]: one product for each client, batched."""
    w = tape.weights[weight]
    clients, width = w.shape[:2]
    b = None if bias is None else tape.weights[bias]
    inputs = x.data.reshape(clients, -1, w.shape[2])
    if x.data.ndim == 2 and inputs.shape[1] == tape.rows:
        tape.matrices.add(weight)
    if tape.half:
        return _linear_in_half(tape, x, inputs, weight, bias)
    factors = tape.factors.get(weight)
    if factors is not None:
        out = _times(inputs[0], factors.base, None if b is None else b[0])
        factors.correct_forward(out, inputs[0])
    elif clients == 1:
        out = _times(inputs[0], w[0], None if b is None else b[0])
    elif b is None:
        out = torch.bmm(inputs, w.transpose(1, 2))
    else:
        out = torch.baddbmm(b.unsqueeze(1), inputs, w.transpose(1, 2))
    y = Value(out.view(*x.data.shape[:-1], width))

    def backward() -> None:
        if y.grad is None:
            return
        gradient = y.grad.reshape(clients, -1, width)
        assert tape.rule is not None
        if bias is not None:
            tape.rule.add(bias, gradient.sum(1))
        if factors is not None:
            if x.wanted:
                given = _times(gradient[0], factors.base.t(), None)
                factors.correct_back(given, gradient[0])
                x.give(given.view(x.data.shape))
            factors.add(gradient[0], inputs[0])
            return
        if x.wanted:
            if clients == 1:
                x.give(_times(gradient[0], w[0].t(), None).view(x.data.shape))
            else:
                x.give(torch.bmm(gradient, w).view(x.data.shape))
        tape.rule.product(weight, gradient.transpose(1, 2), inputs)

    tape.then(backward, y)
    return y


def _linear_in_half(tape: Tape, x: Value, inputs: Tensor, weight: str, bias: str | None) -> Value:
    """The same with factors in bfloat16; weights, sums of products and the rest are float32."""
    w, rows = tape.weights[weight].bfloat16(), inputs.bfloat16()
    out = torch.bmm(rows, w.transpose(1, 2)).float()
    if bias is not None:
        out += tape.weights[bias].unsqueeze(1)
    y = Value(out.view(*x.data.shape[:-1], w.shape[1]))

    def backward() -> None:
        if y.grad is None:
            return
        gradient = y.grad.reshape(len(w), -1, w.shape[1])
        narrow = gradient.bfloat16()
        assert tape.rule is not None
        if x.wanted:
            x.give(torch.bmm(narrow, w).float().view(x.data.shape))
        tape.rule.add(weight, torch.bmm(narrow.transpose(1, 2), rows).float())
        if bias is not None:
            tape.rule.add(bias, gradient.sum(1))

    tape.then(backward, y)
    return y


#: Products with so many weights or more are left to oneDNN, whose kernels are faster on them.
WIDE = 1 << 19
_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    else None
)


def _times(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows [R, I] @ weight [O, I]^T + bias, by the faster of torch's two libraries."""
    if _onednn is not None and weight.numel() >= WIDE and not rows.is_cuda:
        return _onednn(rows, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(rows, weight, bias)


def convolution(
    tape: Tape,
    x: Value,
    weight: str,
    bias: str | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Value:
    """[C * B, I, ...] -> [C * B, O, ...]: client by client on a CPU, as groups on a GPU."""
    w = tape.weights[weight]
    b = None if bias is None else tape.weights[bias]
    clients = len(w)
    data = _channels_last(x.data)
    if tape.half:
        data, w = data.bfloat16(), w.bfloat16()
        b = None if b is None else b.bfloat16()
    settings: tuple[Any, ...] = (stride, padding, dilation, False, (0,) * len(stride))
    if clients > 1 and data.is_cuda:
        return _grouped(tape, x, data, (weight, w), (bias, b), settings, groups)
    pieces = data.chunk(clients)
    outs = [
        aten.convolution(piece, w[c], None if b is None else b[c], *settings, groups)
        for c, piece in enumerate(pieces)
    ]
    y = Value((outs[0] if clients == 1 else torch.cat(outs)).float())

    def backward() -> None:
        if y.grad is None:
            return
        assert tape.rule is not None
        given, channels = [], [w.shape[1]]
        mask = [x.wanted, True, bias is not None]
        for c, gradient in enumerate(_channels_last(y.grad).to(data.dtype).chunk(clients)):
            gx, gw, gb = aten.convolution_backward(
                gradient, pieces[c], w[c], channels, *settings, groups, mask
            )
            given.append(gx)
            tape.rule.add_one(weight, c, gw)
            if bias is not None:
                tape.rule.add_one(bias, c, gb)
        if x.wanted:
            x.give((given[0] if clients == 1 else torch.cat(given)).float())

    tape.then(backward, y)
    return y


def _grouped(
    tape: Tape,
    x: Value,
    data: Tensor,
    weight: tuple[str, Tensor],
    bias: tuple[str | None, Tensor | None],
    settings: tuple[Any, ...],
    groups: int,
) -> Value:
    """A cohort's convolutions as one of C * groups groups: clients side by side as channels."""
    (name, w), (bias_name, b) = weight, bias
    clients = len(w)

    def beside(rows: Tensor) -> Tensor:
        parts = rows.reshape(clients, -1, *rows.shape[1:])
        return parts.transpose(0, 1).flatten(1, 2).contiguous()

    def below(channels: Tensor) -> Tensor:
        parts = channels.reshape(len(channels), clients, -1, *channels.shape[2:])
        return parts.transpose(0, 1).flatten(0, 1)

    rows, kernel = beside(data), w.flatten(0, 1)
    flat_bias = None if b is None else b.flatten()
    total = clients * groups
    y = Value(below(aten.convolution(rows, kernel, flat_bias, *settings, total)).float())

    def backward() -> None:
        if y.grad is None:
            return
        assert tape.rule is not None
        gx, gw, gb = aten.convolution_backward(
            beside(y.grad).to(rows.dtype), rows, kernel, [len(kernel)], *settings, total,
            [x.wanted, True, b is not None],
        )  # fmt: skip
        tape.rule.add(name, gw.view(w.shape))
        if b is not None and bias_name is not None:
            tape.rule.add(bias_name, gb.view(b.shape))
        if x.wanted:
            x.give(below(gx).float())

    tape.then(backward, y)
    return y


def embedding(tape: Tape, x: Value | Tensor, weight: str, padding: int | None) -> Value:
    """Rows of each client's own table; plain indices, the same for all, give one thing a client."""
    w = tape.weights[weight]
    clients, words = w.shape[:2]
    shared = not isinstance(x, Value)
    index = x.data.reshape(clients, -1) if isinstance(x, Value) else x.expand(clients, *x.shape)
    shift = torch.arange(clients, device=w.device).view(-1, *[1] * (index.ndim - 1)) * words
    places = index if clients == 1 else index + shift
    out = F.embedding(places, w.view(clients * words, -1))
    if isinstance(x, Value):
        out = out.view(*x.data.shape, -1)
    y = Value(out, per_client=shared)

    def backward() -> None:
        if y.grad is None:
            return
        flat = aten.embedding_dense_backward(
            y.grad.reshape(*places.shape, -1).contiguous(), places, clients * words, -1, False
        )
        gradient = flat.view(w.shape)
        if padding is not None:
            gradient[:, padding] = 0
        assert tape.rule is not None
        tape.rule.add(weight, gradient)

    tape.then(backward, y)
    return y


def parameter(tape: Tape, name: str) -> Value:
    """A parameter that the model uses by itself, [C, *shape]."""
    y = Value(_fixed(tape.weights[name]), per_client=True)

    def backward() -> None:
        if y.grad is not None:
            assert tape.rule is not None
            tape.rule.add(name, y.grad)

    tape.then(backward, y)
    return y


def arithmetic(tape: Tape, function: Any, left: Any, right: Any) -> Any:
    """An elementwise function of two operands, one of which may be per client."""
    pair = [left, right]
    rows = [v for v in pair if isinstance(v, Value) and not v.per_client]
    own = [v for v in pair if isinstance(v, Value) and v.per_client]
    if not (rows and own):
        result = local(tape, function, pair, {})
        result.per_client = bool(own)
        return result

    def spread(a: Tensor, b: Tensor) -> Tensor:
        shape = rows[0].data.shape

        def widen(value: Any, tensor: Tensor) -> Tensor:
            if not value.per_client:
                return _by_client(tensor, tape.clients)
            missing = len(shape) - tensor.ndim
            return tensor.view(tape.clients, *[1] * (missing + 1), *tensor.shape[1:])

        result: Tensor = function(widen(left, a), widen(right, b)).flatten(0, 1)
        return result

    return local(tape, spread, pair, {})


def relu(tape: Tape, x: Value, in_place: bool) -> Value:
    """`in_place` where nobody else reads the input, not even its own backward rule."""
    out = x.data.relu_() if in_place else x.data.relu()
    y = Value(out, x.wanted)

    def backward() -> None:
        if y.grad is not None and x.wanted:
            x.give(aten.threshold_backward(y.grad, out, 0))

    tape.then(backward, y)
    return y


def activation(tape: Tape, x: Value, kind: str, approximate: str = "none") -> Value:
    """tanh, sigmoid and gelu, by torch's own derivative kernels."""
    if kind == "gelu":
        out = F.gelu(x.data, approximate=approximate)
    else:
        out = getattr(torch, kind)(x.data)
    y = Value(out, x.wanted)

    def backward() -> None:
        if y.grad is None or not x.wanted:
            return
        if kind == "gelu":
            x.give(aten.gelu_backward(y.grad, x.data, approximate=approximate))
        else:
            x.give(getattr(aten, f"{kind}_backward")(y.grad, out))

    tape.then(backward, y)
    return y


def reshape(tape: Tape, x: Value, out: Tensor) -> Value:
    """`out` is a reshaped `x.data`."""
    y = Value(out, x.wanted, x.per_client)

    def backward() -> None:
        if y.grad is not None and x.wanted:
            x.give(y.grad.reshape(x.data.shape))

    tape.then(backward, y)
    return y


def max_pool(tape: Tape, x: Value, *settings: Any) -> Value:
    """Two-dimensional max pooling; `settings` are kernel, stride, padding, dilation, ceil_mode."""
    data = _channels_last(x.data)
    out, index = aten.max_pool2d_with_indices(data, *settings)
    y = Value(out, x.wanted)

    def backward() -> None:
        if y.grad is not None and x.wanted:
            gradient = _channels_last(y.grad)
            x.give(aten.max_pool2d_with_indices_backward(gradient, data, *settings, index))

    tape.then(backward, y)
    return y


def dropout(
    tape: Tape, x: Value, p: float, *, channels: bool = False, time_first: bool = False
) -> Value:
    """Each client's noise comes from its own stream, in the order in which torch would draw it.

    `channels` drops whole channels, as Dropout1d to 3d do; with `time_first` the noise is drawn
    for [T, B, ...], as torch does behind its attention, which works in that order.
    """
    if not tape.training or p == 0:
        return x
    data = x.data
    noise: Tensor
    if p == 1:
        noise = torch.zeros_like(data, memory_format=torch.contiguous_format)
    else:
        shape = data.shape[:2] + (1,) * (data.ndim - 2) if channels else data.shape
        noise = torch.zeros(shape, device=data.device)
        for span, stream in zip(tape.spans(len(data)), tape.streams, strict=True):
            if time_first:
                drawn = noise[span].transpose(0, 1).contiguous().bernoulli_(1 - p, generator=stream)
                noise[span] = drawn.transpose(0, 1)
            else:
                noise[span].bernoulli_(1 - p, generator=stream)
        noise.div_(1 - p)
    y = Value(data * noise, x.wanted)

    def backward() -> None:
        if y.grad is not None and x.wanted:
            x.give(y.grad * noise)

    tape.then(backward, y)
    return y


def normalize(
    tape: Tape,
    x: Value,
    kind: Literal["layer", "group"],
    shape: tuple[int, ...],
    groups: int,
    eps: float,
    weight: str | None,
    bias: str | None,
) -> Value:
    """LayerNorm over the last dimensions `shape`, or GroupNorm; each row has its own statistics."""

    def plain(data: Tensor) -> Tensor:
        if kind == "layer":
            return F.layer_norm(data, shape, eps=eps)
        return F.group_norm(data, groups, eps=eps)

    normal = local(tape, plain, [x], {})
    if weight is None:
        return normal  # type: ignore[no-any-return]
    w = tape.weights[weight]
    b = None if bias is None else tape.weights[bias]
    clients = len(w)
    data = _by_client(normal.data, clients)
    # The dimensions of one client's rows over which weights repeat.
    if kind == "layer":
        repeated = tuple(range(1, data.ndim - len(shape)))
        form = (clients, *[1] * len(repeated), *shape)
    else:
        repeated = (1, *range(3, data.ndim))
        form = (clients, 1, -1, *[1] * (data.ndim - 3))
    out = data * w.view(form)
    if b is not None:
        out += b.view(form)
    y = Value(out.flatten(0, 1))

    def backward() -> None:
        if y.grad is None:
            return
        gradient = _by_client(y.grad, clients)
        if normal.wanted:
            normal.give((gradient * w.view(form)).flatten(0, 1))
        assert tape.rule is not None
        tape.rule.add(weight, (gradient * data).sum(repeated).view(w.shape))
        if b is not None:
            assert bias is not None
            tape.rule.add(bias, gradient.sum(repeated).view(b.shape))

    tape.then(backward, y)
    return y


def batch_norm(
    tape: Tape, x: Value, module: nn.modules.batchnorm._BatchNorm, names: Mapping[str, str]
) -> Value:
    """Each client by its own batch statistics, which also move its own running ones."""
    weight = tape.weights[names["weight"]] if "weight" in names else None
    bias = tape.weights[names["bias"]] if "bias" in names else None
    mean = tape.buffers[names["running_mean"]] if "running_mean" in names else None
    var = tape.buffers[names["running_var"]] if "running_var" in names else None
    by_batch = tape.training or mean is None
    momentum = module.momentum
    if tape.training and mean is not None:
        count = tape.buffers[names["num_batches_tracked"]]
        count += 1
        if momentum is None:
            momentum = 1.0 / float(count.reshape(-1)[0])
    data = _channels_last(x.data)
    out = torch.zeros_like(data)
    saved = []
    for c, span in enumerate(tape.spans(len(data))):
        piece = data[span]
        own = [None if t is None else t[c] for t in (weight, bias, mean, var)]
        normal, *statistics = aten.native_batch_norm(
            piece, *own, by_batch, momentum or 0.0, module.eps
        )
        out[span] = normal
        saved.append((span, piece, own, statistics))
    y = Value(out)

    def backward() -> None:
        if y.grad is None:
            return
        assert tape.rule is not None
        given = torch.zeros_like(data) if x.wanted else None
        for c, (span, piece, own, statistics) in enumerate(saved):
            gx, gw, gb = aten.native_batch_norm_backward(
                _channels_last(y.grad[span]), piece, own[0], own[2], own[3], *statistics, by_batch,
                module.eps, [x.wanted, weight is not None, bias is not None],
            )  # fmt: skip
            if given is not None:
                given[span] = gx
            if weight is not None:
                tape.rule.add_one(names["weight"], c, gw)
            if bias is not None:
                tape.rule.add_one(names["bias"], c, gb)
        if given is not None:
            x.give(given)

    tape.then(backward, y)
    return y


def attention(
    tape: Tape, inputs: list[Value], module: nn.MultiheadAttention, names: Mapping[str, str],
    mask: Tensor | None, causal: bool,
) -> Value:  # fmt: skip
    """Multi-head attention over [C * B, T, D]; without dropout by torch's fused kernel."""
    width, heads = module.embed_dim, module.num_heads

    if all(value is inputs[0] for value in inputs) and "in_proj_weight" in names:
        joined = linear(tape, inputs[0], names["in_proj_weight"], names.get("in_proj_bias"))
        query, key, value = local(tape, torch.chunk, [joined, 3], {"dim": -1})
    else:
        raise NotImplementedError("attention between different sequences")

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


def module_for_each(
    tape: Tape, module: nn.Module, names: Mapping[str, str], arguments: list[Any],
    options: dict[str, Any], *, vectorized: bool, draws: bool,
) -> Any:  # fmt: skip
    """Any module: by `vmap` over clients, or client by client, with autograd inside."""
    weights = {inner: tape.weights[outer] for inner, outer in names.items()}
    values = [a for a in arguments if isinstance(a, Value)]
    follow = tape.training
    if module.training != follow:
        module.train(follow)
    held = {
        inner: _fixed(w).requires_grad_() if follow else w.detach() for inner, w in weights.items()
    }
    leaves = [
        (v, v.data.detach().requires_grad_())
        for v in values
        if v.wanted and follow and v.data.is_floating_point()
    ]
    entered = {id(v): leaf for v, leaf in leaves}

    def swap(results: Any) -> Any:
        """Hidden states as rows and back: recurrent layers keep them as [layers, B, H]."""
        if not isinstance(module, nn.RNNBase):
            return results
        return results[0], _map(lambda t: t.transpose(0, 1), results[1])

    def call(own: dict[str, Tensor], *mine: Any) -> Any:
        return swap(torch.func.functional_call(module, own, mine, options))

    with torch.set_grad_enabled(follow):
        inputs = [
            _by_client(entered.get(id(a), a.data), tape.clients) if isinstance(a, Value) else a
            for a in arguments
        ]
        if vectorized and tape.clients > 1:
            where = tuple(0 if isinstance(a, Value) else None for a in arguments)
            results = torch.func.vmap(call, in_dims=(0, *where), randomness="error")(held, *inputs)
            results = _map(lambda t: t.flatten(0, 1), results)
        else:
            each = []
            for c in range(tape.clients):
                own = {inner: w[c] for inner, w in held.items()}
                mine = [x[c] if isinstance(a, Value) else x
                        for a, x in zip(arguments, inputs, strict=True)]  # fmt: skip
                if draws and follow:
                    # Noise must not be drawn for padding.
                    real = tape.rows if tape.counts is None else tape.counts[c]
                    mine = [x[:real] if isinstance(a, Value) else x
                            for a, x in zip(arguments, mine, strict=True)]  # fmt: skip
                    with tape.drawing(c):
                        result = call(own, *mine)
                    missing = tape.rows - real
                    each.append(_map(lambda t, m=missing: _padded(t, m), result))
                else:
                    each.append(call(own, *mine))
            results = each[0] if tape.clients == 1 else _join(each)
        results = swap(results)
    outs = [Value(w) for w in held.values()] if follow else []

    def into_weights() -> None:
        assert tape.rule is not None
        for outer, value in zip(names.values(), outs, strict=True):
            if value.grad is not None:
                tape.rule.add(outer, value.grad)

    tape.then(into_weights)
    pairs = [*leaves, *zip(outs, held.values(), strict=bool(outs))] if follow else []
    return keep(tape, results, pairs)


def _by_client(rows: Tensor, clients: int) -> Tensor:
    """[C * B, ...] as [C, B, ...]."""
    return rows.reshape(clients, -1, *rows.shape[1:])


def _fixed(weight: Tensor) -> Tensor:
    """The weights for autograd, which must not mind that others in the same flat vector change.

    A fused step changes these too, but only after their own gradient is known.
    """
    alias: Tensor = weight.data
    return alias


def _map(function: Any, results: Any) -> Any:
    if isinstance(results, Tensor):
        return function(results)
    if isinstance(results, list | tuple):
        return tuple(_map(function, each) for each in results)
    raise TypeError(f"a layer gives {type(results).__name__}, which cannot be split by client")


def _padded(rows: Tensor, missing: int) -> Tensor:
    """The rows and as many of zeros as are missing."""
    if not missing:
        return rows
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


def _join(each: list[Any]) -> Any:
    if isinstance(each[0], Tensor):
        return torch.cat(each)
    if isinstance(each[0], list | tuple):
        return tuple(_join([one[i] for one in each]) for i in range(len(each[0])))
    raise TypeError(f"a layer gives {type(each[0]).__name__}, which cannot be joined over clients")


def _channels_last(data: Tensor) -> Tensor:
    """Images as [N, H, W, C] in memory, which is what convolutions and pooling are fastest on."""
    if data.ndim != 4:
        return data
    if data.shape[1] == 1 and data.is_contiguous():
        # One channel lies the same both ways; only strides tell torch which it is.
        height, width = data.shape[2:]
        return data.as_strided(data.shape, (height * width, 1, width, 1))
    return data.contiguous(memory_format=torch.channels_last)
