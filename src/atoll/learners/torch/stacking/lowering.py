"""Lowering: how each layer of a module is run for a cohort, decided here and nowhere else.

The module is traced into a graph of layers and functions. Common layers get rules of their own
(`layers`), functions without weights are run on all rows at once, and other layers go through
`torch.func.vmap` or client by client. A module that cannot be traced is taken whole. Every lowered
program is checked against autograd on the module itself before it is used.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from atoll.learners.torch.stacking import layers
from atoll.learners.torch.stacking.kinds import (
    ACTIVATIONS,
    BATCH_NORMS,
    CHANNEL_DROPOUTS,
    CONVOLUTIONS,
    ELEMENTWISE,
    FUNCTIONS,
    PLAIN,
    RECURRENT,
    RELUS,
    RESHAPING,
)
from atoll.learners.torch.stacking.program import Program, Refused, Row
from atoll.learners.torch.stacking.tape import Tape, Value, local
from atoll.learners.torch.stacking.tracing import traced

Names = Mapping[str, str]
Rule = Callable[..., Any]


def lower(module: nn.Module, trained: Iterable[str], *, whole: bool = False) -> Program:
    """The program of a module whose parameters named in `trained` are stacked.

    Raises `Refused`, saying why, where there is none. `whole` skips the layers.
    """
    trained = set(trained)
    _check(module, trained)
    if whole:
        return _whole(module, trained, "it cannot be taken apart")
    try:
        graph = traced(module)
    except Refused as refusal:
        return _whole(module, trained, str(refusal))
    except Exception as error:
        return _whole(module, trained, f"it cannot be traced: {_line(error)}")
    try:
        return _Lowering(module, graph, trained).program()
    except Refused as refusal:
        return _whole(module, trained, str(refusal))


def _check(module: nn.Module, trained: set[str]) -> None:
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            raise Refused(f"{name or 'the module'} has hooks")
        extra = set(dict(part.named_buffers(recurse=False)))
        known = type(part) in BATCH_NORMS
        if extra and not known:
            raise Refused(f"{name or 'the module'} has buffers of its own: {', '.join(extra)}")
        if known and extra and part.track_running_stats and "running_mean" not in extra:
            raise Refused(f"{name} has lost its running statistics")
    if not all(p.requires_grad for p in module.parameters()):
        raise Refused("some of its parameters are frozen")
    shared = [n for n, _ in module.named_parameters(remove_duplicate=False)]
    if len(shared) != len(trained):
        raise Refused("two of its layers share weights")


class _Lowering:
    """Turns one traced graph into rules, node by node."""

    def __init__(self, module: nn.Module, graph: fx.Graph, trained: set[str]) -> None:
        self.module, self.graph, self.trained = module, graph, trained
        self.modules = dict(module.named_modules())
        self.rows: list[Row] = []
        self.used: list[str] = []
        self.linears: list[str] = []
        self.draws = self.streams = self.mixes = self.opaque = False

    def program(self) -> Program:
        nodes = []
        for node in self.graph.nodes:
            nodes.append((node, self._rule(node)))
        last = [rule for node, rule in nodes if node.op == "output"]
        assert last, "a traced graph has an output"

        def run(tape: Tape, x: Value) -> Value:
            values: dict[fx.Node, Any] = {}
            for node, rule in nodes:
                if node.op == "placeholder":
                    values[node] = x
                    continue
                arguments = fx.map_arg(node.args, values.__getitem__)
                options = fx.map_arg(node.kwargs, values.__getitem__)
                if node.op == "output":
                    result = arguments[0]
                    if not isinstance(result, Value):
                        raise Refused("the module does not give one tensor")
                    return result
                values[node] = rule(tape, *arguments, **options)
            raise AssertionError("a traced graph has an output")

        used = sorted(self.used)
        return Program(
            run,
            tuple(self.rows),
            layered=True,
            draws=self.draws,
            streams=self.streams,
            mixes=self.mixes,
            complete=used == sorted(self.trained),
            dense=not self.opaque,
            linears=frozenset(self.linears),
        )

    def _rule(self, node: fx.Node) -> Rule:
        if node.op == "placeholder":
            if node.prev.op == "placeholder":
                raise Refused("its forward takes more than one argument")
            return lambda tape: None
        if node.op == "output":
            return lambda tape: None
        if node.op == "call_module":
            part = self.modules[str(node.target)]
            return self._layer(node, str(node.target), part)
        if node.op == "get_attr":
            name = str(node.target)
            if name not in self.trained:
                raise Refused(f"it uses {name!r}, which is not a parameter")
            self.used.append(name)
            return lambda tape: layers.parameter(tape, name)
        if node.op == "call_function":
            assert callable(node.target)
            return self._function(node, node.target)
        return self._method(str(node.target))

    def _names(self, layer: str, part: nn.Module) -> dict[str, str]:
        """Parameters and buffers of a layer: its own name of each -> the module's."""
        names = {
            inner: f"{layer}.{inner}" if layer else inner
            for inner in [*dict(part.named_parameters()), *dict(part.named_buffers())]
        }
        self.used += [names[inner] for inner, _ in part.named_parameters()]
        return names

    def _say(self, layer: str, part: nn.Module, how: str) -> None:
        self.rows.append(Row(layer, type(part).__name__, how))

    def _layer(self, node: fx.Node | None, layer: str, part: Any) -> Rule:  # noqa: PLR0912
        kind = type(part)
        names = self._names(layer, part)
        if isinstance(part, nn.Identity) or kind in (*CHANNEL_DROPOUTS, nn.Dropout):
            return self._dropout(layer, part)
        if kind is nn.Linear:
            self.linears.append(names["weight"])
            self._say(layer, part, "one batched product; gradient straight into the weights")
            return lambda tape, x: layers.linear(tape, x, names["weight"], names.get("bias"))
        if isinstance(part, CONVOLUTIONS) and kind in CONVOLUTIONS and part.padding_mode == "zeros":
            return self._convolution(layer, part, names)
        if kind is nn.Embedding and part.max_norm is None and not part.scale_grad_by_freq:
            assert isinstance(part, nn.Embedding)
            if part.sparse:
                raise Refused(f"{layer} asks for sparse gradients")
            self._say(layer, part, "one lookup in the clients' tables")
            padding = part.padding_idx
            return lambda tape, x: layers.embedding(tape, x, names["weight"], padding)
        if kind in (nn.LayerNorm, nn.GroupNorm):
            return self._norm(layer, part, names)
        if isinstance(part, BATCH_NORMS) and kind in BATCH_NORMS:
            self.mixes = self.opaque = True
            self._say(layer, part, "client by client, on their own statistics")
            return lambda tape, x: layers.batch_norm(tape, x, part, names)
        if kind is nn.ReLU:
            in_place = node is not None and self._exclusive(node)
            self._say(layer, part, "all rows at once" + (", in place" if in_place else ""))
            return lambda tape, x: layers.relu(tape, x, in_place)
        if kind in ACTIVATIONS:
            self._say(layer, part, "all rows at once")
            return lambda tape, x: layers.activation(tape, x, ACTIVATIONS[kind])
        if isinstance(part, nn.GELU):
            self._say(layer, part, "all rows at once")
            return lambda tape, x: layers.activation(tape, x, "gelu", part.approximate)
        if isinstance(part, nn.Flatten):
            self._say(layer, part, "all rows at once")
            return lambda tape, x: layers.reshape(tape, x, part(x.data))
        if kind is nn.MaxPool2d and not part.return_indices:
            self._say(layer, part, "all rows at once")
            settings = _pooling(part.kernel_size, part.stride, part.padding, part.dilation)
            return lambda tape, x: layers.max_pool(tape, x, *settings, part.ceil_mode)
        if kind in PLAIN and not getattr(part, "return_indices", False):
            self._say(layer, part, "all rows at once")
            if getattr(part, "inplace", False):
                part = copy.copy(part)
                part.inplace = False
            return lambda tape, x: local(tape, part, [x], {})
        if kind is nn.MultiheadAttention and self._simple(part):
            return self._attention(layer, part, names)
        if kind is nn.TransformerEncoderLayer and self._simple(part.self_attn):
            return self._encoder_layer(layer, part)
        if kind is nn.TransformerEncoder and all(self._simple(e.self_attn) for e in part.layers):
            return self._encoder(layer, part)
        return self._opaque(layer, part, names)

    def _dropout(self, layer: str, part: nn.Module) -> Rule:
        p = float(getattr(part, "p", 0.0))
        if p == 0:
            self._say(layer, part, "left out: it does nothing")
            return lambda tape, x: x
        self.streams = True
        channels = type(part) in CHANNEL_DROPOUTS
        self._say(layer, part, "all rows at once, noise from each client's stream")
        return lambda tape, x: layers.dropout(tape, x, p, channels=channels)

    def _convolution(self, layer: str, part: Any, names: Names) -> Rule:
        padding = part.padding
        if isinstance(padding, str):
            spans = [d * (k - 1) for d, k in zip(part.dilation, part.kernel_size, strict=True)]
            if padding == "same" and any(span % 2 for span in spans):
                return self._opaque(layer, part, names)
            padding = tuple(span // 2 if padding == "same" else 0 for span in spans)
        self.opaque = True
        self._say(layer, part, "client by client on a CPU, as groups on a GPU; channels last")
        stride, dilation, groups = part.stride, part.dilation, part.groups
        return lambda tape, x: layers.convolution(
            tape, x, names["weight"], names.get("bias"), stride, padding, dilation, groups
        )

    def _norm(self, layer: str, part: Any, names: Names) -> Rule:
        self._say(layer, part, "all rows at once, weights by client")
        weight, bias = names.get("weight"), names.get("bias")
        if isinstance(part, nn.LayerNorm):
            shape = tuple(part.normalized_shape)
            return lambda tape, x: layers.normalize(
                tape, x, "layer", shape, 0, part.eps, weight, bias
            )
        return lambda tape, x: layers.normalize(
            tape, x, "group", (), part.num_groups, part.eps, weight, bias
        )

    def _opaque(self, layer: str, part: nn.Module, names: Names) -> Rule:
        if dict(part.named_buffers()):
            raise Refused(f"{layer} ({type(part).__name__}) has buffers of its own")
        recurrent = isinstance(part, RECURRENT)
        draws = _may_draw(part)
        vectorized = not recurrent and not draws
        self.opaque, self.draws = True, self.draws or draws
        how = "client by client, by torch's own kernel" if recurrent else (
            "vmap over clients" if vectorized else "client by client"
        )  # fmt: skip
        self._say(layer, part, how)
        apart = layers.Apart(part)
        return lambda tape, *arguments, **options: layers.module_for_each(
            tape, apart, names, list(arguments), options, vectorized=vectorized, draws=draws
        )

    def _simple(self, part: nn.MultiheadAttention) -> bool:
        return (
            part.batch_first
            and part._qkv_same_embed_dim
            and part.bias_k is None
            and not part.add_zero_attn
        )

    def _attention(self, layer: str, part: nn.MultiheadAttention, names: Names) -> Rule:
        self.streams |= part.dropout > 0
        self._say(layer, part, "batched products; torch's fused attention on all rows")

        def attend(
            tape: Tape, query: Value, key: Value, value: Value, *, need_weights: bool = True,
            attn_mask: Any = None, is_causal: bool = False, key_padding_mask: Any = None,
            average_attn_weights: bool = True,
        ) -> tuple[Value, None]:  # fmt: skip
            if need_weights or key_padding_mask is not None or not (query is key is value):
                raise Refused(
                    f"{layer} is not plain self-attention; say need_weights=False and give one "
                    "sequence"
                )
            mask = attn_mask.data if isinstance(attn_mask, Value) else attn_mask
            out = layers.attention(tape, query, part, names, mask, is_causal)
            return out, None

        return attend

    def _encoder_layer(self, layer: str, part: nn.TransformerEncoderLayer) -> Rule:
        self._say(layer, part, "by its parts:")
        attention = part.self_attn
        names = {n: f"{layer}.self_attn.{n}" for n, _ in attention.named_parameters()}
        self.streams |= attention.dropout > 0
        self._say(f"{layer}.self_attn", attention, "batched products; torch's fused attention")
        before = list(self.used)
        rules = {
            inner: self._layer(None, f"{layer}.{inner}", getattr(part, inner))
            for inner in ("linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")
        }
        self.used = before
        activation = part.activation

        def work(tape: Tape, x: Value, src_mask: Any = None, src_key_padding_mask: Any = None,
                 is_causal: bool = False) -> Value:  # fmt: skip
            if src_key_padding_mask is not None:
                raise Refused(f"{layer} is given a padding mask")

            def attend(y: Value) -> Value:
                out = layers.attention(tape, y, attention, names, src_mask, is_causal)
                return layers.dropout(tape, out, part.dropout1.p, time_first=True)

            def feed(y: Value) -> Value:
                hidden = rules["linear1"](tape, y)
                if activation is F.relu:
                    hidden = layers.relu(tape, hidden, True)
                elif activation is F.gelu:
                    hidden = layers.activation(tape, hidden, "gelu")
                else:
                    hidden = local(tape, activation, [hidden], {})
                hidden = rules["dropout"](tape, hidden)
                out = rules["linear2"](tape, hidden)
                return rules["dropout2"](tape, out)  # type: ignore[no-any-return]

            def plus(a: Value, b: Value) -> Value:
                return layers.arithmetic(tape, torch.add, a, b)  # type: ignore[no-any-return]

            if part.norm_first:
                x = plus(x, attend(rules["norm1"](tape, x)))
                return plus(x, feed(rules["norm2"](tape, x)))
            x = rules["norm1"](tape, plus(x, attend(x)))
            return rules["norm2"](tape, plus(x, feed(x)))  # type: ignore[no-any-return]

        return work

    def _encoder(self, layer: str, part: nn.TransformerEncoder) -> Rule:
        self._say(layer, part, "by its layers:")
        before = list(self.used)
        rules = [
            self._layer(None, f"{layer}.layers.{number}", each)
            for number, each in enumerate(part.layers)
        ]
        if part.norm is not None:
            rules.append(self._layer(None, f"{layer}.norm", part.norm))
        self.used = before

        def work(tape: Tape, src: Value, mask: Any = None, src_key_padding_mask: Any = None,
                 is_causal: Any = None) -> Value:  # fmt: skip
            for rule in rules[: len(part.layers)]:
                src = rule(tape, src, mask, src_key_padding_mask, bool(is_causal))
            return rules[-1](tape, src) if part.norm is not None else src

        return work

    def _function(self, node: fx.Node, target: Callable[..., Any]) -> Rule:
        name = getattr(target, "__name__", str(target))
        if target in RELUS and len(node.args) == 1:
            in_place = self._exclusive(node)
            return lambda tape, x, inplace=False: layers.relu(tape, x, in_place)
        if target is F.dropout:
            if node.meta["off"]:
                return lambda tape, x, *rest, **options: x
            self.streams = True

            def drop(
                tape: Tape, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False
            ) -> Value:
                # `training` was read when the module was traced; the tape knows what is true now.
                return layers.dropout(tape, x, p)

            return drop
        if target is F.max_pool2d:

            def pool(tape: Tape, x: Value, kernel_size: Any, stride: Any = None, padding: Any = 0,
                     dilation: Any = 1, ceil_mode: bool = False, **_: Any) -> Value:  # fmt: skip
                settings = _pooling(kernel_size, stride, padding, dilation)
                return layers.max_pool(tape, x, *settings, ceil_mode)

            return pool
        module = getattr(target, "__module__", "") or ""
        known = module.startswith(("torch", "_operator", "operator", "builtins", "math"))
        if name not in FUNCTIONS or not (known or isinstance(target, type(torch.add))):
            raise Refused(f"its forward calls {name}, for which there is no rule")
        return self._general(name, target)

    def _method(self, name: str) -> Rule:
        if name not in FUNCTIONS:
            raise Refused(f"its forward calls .{name}(), for which there is no rule")
        return self._general(name, lambda x, *rest, **options: getattr(x, name)(*rest, **options))

    def _general(self, name: str, function: Callable[..., Any]) -> Rule:
        if name in ELEMENTWISE:
            plain = getattr(operator, name.lstrip("i") if name in ("iadd", "isub", "imul") else
                            {"div": "truediv"}.get(name, name))  # fmt: skip
            return lambda tape, a, b: layers.arithmetic(tape, plain, a, b)
        if name in RESHAPING:

            def form(tape: Tape, x: Value, *rest: Any, **options: Any) -> Any:
                return layers.reshape(tape, x, function(x.data, *rest, **options))

            return form

        def work(tape: Tape, *arguments: Any, **options: Any) -> Any:
            values = [a for a in arguments if isinstance(a, Value)]
            if any(value.per_client for value in values):
                raise Refused(f"{name} of a parameter has no rule")
            if name == "getitem" and not isinstance(arguments[0], Value):
                return arguments[0][arguments[1]]
            result = local(tape, function, arguments, options)
            return result.data if isinstance(result, Value) and not _flows(arguments) else result

        return work

    def _exclusive(self, node: fx.Node) -> bool:
        """Whether the input is made for this node alone, by something that does not read it."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            return False
        if source.op != "call_module":
            return source.target is F.max_pool2d
        kinds = (nn.Linear, *CONVOLUTIONS, nn.LayerNorm, nn.GroupNorm, *BATCH_NORMS, nn.MaxPool2d)
        return isinstance(self.modules[str(source.target)], kinds)


def _whole(module: nn.Module, trained: set[str], why: str) -> Program:
    """The module as one piece, through `vmap`."""
    for part in module.modules():
        if dict(part.named_buffers(recurse=False)):
            raise Refused(f"{why}; and it has buffers, which vmap cannot keep apart")
    draws = _may_draw(module)
    if draws:
        raise Refused(f"{why}; and it may draw random numbers, which vmap cannot key by client")
    names = {name: name for name in trained}
    apart = layers.Apart(module)

    def run(tape: Tape, x: Value) -> Value:
        return layers.module_for_each(  # type: ignore[no-any-return]
            tape, apart, names, [x], {}, vectorized=True, draws=False
        )

    rows = (Row("", type(module).__name__, f"whole, vmap over clients: {why}"),)
    return Program(
        run, rows, layered=False, draws=False, streams=False, mixes=False, complete=False,
        dense=False,
    )  # fmt: skip


def _may_draw(module: nn.Module) -> bool:
    """Whether a module that has no rule may draw random numbers in training."""
    for part in module.modules():
        if isinstance(part, RECURRENT):
            if part.dropout > 0:
                return True
        elif "Dropout" in type(part).__name__ or isinstance(part, nn.RReLU):
            if getattr(part, "p", 1.0) > 0:
                return True
        elif getattr(part, "dropout", 0.0) and isinstance(part.dropout, float):
            return True
    return False


def _flows(arguments: Iterable[Any]) -> bool:
    """Whether anything that depends on the batch is among the arguments."""
    return any(
        isinstance(a, Value) or (isinstance(a, list | tuple) and _flows(a)) for a in arguments
    )


def _pooling(*settings: Any) -> list[list[int]]:
    kernel, stride, padding, dilation = settings
    stride = kernel if stride is None or stride == [] else stride
    return [
        [value, value] if isinstance(value, int) else list(value)
        for value in (kernel, stride, padding, dilation)
    ]


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
