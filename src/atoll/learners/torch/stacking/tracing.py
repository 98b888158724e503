"""Tracing: a module as a graph of layers and functions, put into the order that costs least."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from atoll.learners.torch.stacking.kinds import RELUS
from atoll.learners.torch.stacking.program import Refused


class _Tracer(fx.Tracer):
    """Stops at torch's own layers and at modules that hold parameters or buffers themselves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in (nn.Sequential, nn.Identity) or type(m).__module__.startswith("torch.nn"):
            return type(m) is not nn.Sequential
        return bool(m._buffers)


def traced(module: nn.Module) -> fx.Graph:
    """The graph of the module, which must be the same in training and in evaluation."""
    if type(module).__module__.startswith("torch.nn") and type(module) is not nn.Sequential:
        graph = fx.Graph()
        graph.output(graph.call_module("", (graph.placeholder("x"),)))
        return graph
    before = module.training
    graph, other = (_Tracer().trace(module.train(training)) for training in (True, False))
    module.train(before)
    if [(n.op, n.target) for n in graph.nodes] != [(n.op, n.target) for n in other.nodes]:
        raise Refused("its forward goes another way in training than in evaluation")
    for ours, theirs in zip(graph.nodes, other.nodes, strict=True):
        if ours.target is F.dropout:
            told = [_told(node) for node in (ours, theirs)]
            if told == [True, True]:
                raise Refused("it drops out in evaluation too")
            ours.meta["off"] = told[0] is False
    _pool_first(graph, dict(module.named_modules()))
    return graph


def _pool_first(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Let a ReLU that is only pooled come after its max pooling, where fewer numbers are left.

    The largest of a window is found before or after: ReLU keeps the order of what is positive, and
    where nothing is both give zero and no gradient.
    """
    for relu in list(graph.nodes):
        if not _calls(relu, modules, nn.ReLU, RELUS) or len(relu.users) != 1:
            continue
        (pool,) = relu.users
        if not _calls(pool, modules, nn.MaxPool2d, (F.max_pool2d,)):
            continue
        if pool.all_input_nodes == [relu] and pool.args[0] is relu:
            # From source, relu, pool, users to source, pool, relu, users; all where the ReLU was.
            source = relu.args[0]
            pool.replace_all_uses_with(relu)
            pool.replace_input_with(relu, source)
            relu.replace_input_with(source, pool)
            relu.prepend(pool)


def _calls(
    node: fx.Node, modules: dict[str, nn.Module], layer: type[nn.Module], functions: Container[Any]
) -> bool:
    """Whether a node is such a layer, or one of these functions, with its input in first place."""
    if node.op == "call_module":
        part = modules[str(node.target)]
        known = type(part) is layer and not getattr(part, "return_indices", False)
    else:
        known = node.op == "call_function" and node.target in functions
    return known and bool(node.args)


def _told(node: fx.Node) -> Any:
    """What `F.dropout` is told of training; the tracer has put the module's state there."""
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
