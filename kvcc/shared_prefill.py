"""One prefill for many recipes: prompts are computed exactly, so recipes differ only in what they store of them.

Recorded once is what enters the projections of every attention layer. A recipe's own graph, cut there, makes its keys
and values of that and stores them: no feed-forward layer runs, and no attention where storing needs none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvcc.runtime import CompiledModel
from kvcc.runtime.attention import cached_attention, store
from kvcc.runtime.cache import Cache
from kvcc.runtime.fused import Linear


@dataclass(frozen=True)
class Prompt:
    """Tokens, and what entered the projections around attention, [1, N, width] each, in the graph's order."""

    tokens: tuple[int, ...]
    entering: tuple[Tensor, ...]

    def first(self, count: int) -> "Prompt":
        """The first `count` tokens: nothing in a prompt depends on what follows."""
        return Prompt(self.tokens[:count], tuple(x[:, :count] for x in self.entering))


@torch.inference_mode()
def record(model: CompiledModel, tokens: Sequence[int], cache: Cache) -> Prompt:
    """Prefill an empty `cache` of one sequence, and keep what enters attention's projections."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(model.graph.graph, copied)
    graph.output((output, [copied[node] for node in _entering(model.graph) or ()]))
    _, entering = _run(fx.GraphModule(model.graph, graph), tokens, cache)
    return Prompt(tuple(tokens), tuple(entering))


@dataclass(frozen=True)
class Filler:
    """What fills caches of one model from recorded prompts."""

    graph: fx.GraphModule

    @torch.inference_mode()
    def fill(self, cache: Cache, prompt: Prompt) -> None:
        """Store the prompt in an empty `cache` of one sequence, as a forward pass of it would."""
        _run(self.graph, prompt.tokens, cache, *prompt.entering)


def filler(model: CompiledModel, prompt: Prompt) -> Filler | None:
    """Of a model that computes prompts as the one that `prompt` was recorded with does, which the caller knows.

    None when its graph is not cut in as many places, or attention has no linear layer before it.
    """
    entering = _entering(model.graph)
    if entering is None or len(entering) != len(prompt.entering):
        return None
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(model.graph.graph, copied)
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]):
        for number, node in reversed(list(enumerate(entering))):
            copied[node].replace_all_uses_with(graph.placeholder(f"entering{number}"))
    stores = graph.find_nodes(op="call_function", target=cached_attention)
    for node in stores:
        node.target = _store
    graph.output(tuple(stores))
    module = fx.GraphModule(model.graph, graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return Filler(module)


def _run(graph: fx.GraphModule, tokens: Sequence[int], cache: Cache, *entering: Tensor) -> Any:
    cache.begin([len(tokens)])
    flat, positions = torch.tensor([list(tokens)]), torch.arange(len(tokens))[None]
    made = graph(flat, positions, torch.tensor([len(tokens) - 1]), cache, *entering)
    cache.commit()
    return made


def _store(
    cache: Cache, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, layer: int, **spec: Any
) -> Tensor | None:
    """The half of `cached_attention` that writes; all of it where attention decides what is stored how."""
    if cache.layers[layer].plan.salient:
        return cached_attention(cache, q, k, v, sinks, layer=layer, **spec)
    store(cache, layer, 0, q[0], k[0], v[0])
    return None


def _entering(module: fx.GraphModule) -> list[fx.Node] | None:
    """Inputs of the linear layers nearest before attention, each once; None where other attention is nearer."""
    found: dict[fx.Node, None] = {}
    for attention in module.graph.find_nodes(op="call_function", target=cached_attention):
        seen, waiting = set[fx.Node](), [n for n in attention.args[1:4] if isinstance(n, fx.Node)]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.target is cached_attention:
                return None
            if _is_linear(module, node):
                assert isinstance(node.args[0], fx.Node)
                found[node.args[0]] = None
            else:
                waiting.extend(node.all_input_nodes)
    return list(found)


def _is_linear(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), Linear)
    return node.target is torch.ops.aten.linear.default
