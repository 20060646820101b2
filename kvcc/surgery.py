"""Finding the projections around an attention node, and rewriting their weights.

Between a projection (aten.linear) and attention, values are only moved (view, transpose, chunk, …). Which row of a
weight becomes which channel of which head is therefore found by sending row numbers through those same nodes.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_MOVES: frozenset[Any] = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.transpose.int,
        aten.permute.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.unflatten.int,
        aten.flatten.using_ints,
        operator.getitem,
    }
)
_SYMBOLIC: dict[Any, Callable[..., Any]] = {
    operator.mul: operator.mul,
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.floordiv: operator.floordiv,
}


@dataclass(frozen=True)
class Projection:
    """An aten.linear next to attention, and where each head's channels lie in its weight.

    index: [heads, channels] int64, rows of the weight for q, k and v, columns for the output projection.
    scale: a constant the projected values are multiplied by on the way.
    """

    linear: fx.Node
    index: Tensor
    scale: float = 1.0

    @property
    def weight(self) -> fx.Node:
        node = self.linear.args[1]
        assert isinstance(node, fx.Node)
        return node

    @property
    def bias(self) -> fx.Node | None:
        node = self.linear.args[2] if len(self.linear.args) > 2 else None
        return node if isinstance(node, fx.Node) else None


def input_projection(module: fx.GraphModule, value: fx.Node) -> Projection | None:
    """The linear whose rows become `value` [B, heads, T, channels]; None when arithmetic stands between them."""
    path: list[fx.Node] = []
    node, scale = value, 1.0
    while node.target in _MOVES or _is_scaling(node):
        if _is_scaling(node):
            scale *= float(node.args[1])  # type: ignore[arg-type]
        else:
            path.append(node)
        first = node.args[0]
        if not isinstance(first, fx.Node):
            return None
        node = first
    if node.target is not aten.linear.default:
        return None
    rows = attribute(module, node.args[1]).shape[0]
    moved = _send(torch.arange(rows)[None, None], reversed(path))
    return Projection(node, moved[0, :, 0], scale)


def _is_scaling(node: fx.Node) -> bool:
    return node.target is aten.mul.Tensor and isinstance(node.args[1], (int, float))


def output_projection(
    module: fx.GraphModule, attention: fx.Node, heads: int, channels: int
) -> Projection | None:
    """The linear that consumes `attention` [B, T, heads, channels]; None when arithmetic stands between them."""
    path: list[fx.Node] = []
    node = attention
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        node = users[0]
        if node.target is aten.linear.default:
            break
        if node.target not in _MOVES:
            return None
        path.append(node)
    moved = _send(torch.arange(heads * channels).view(1, 1, heads, channels), path).flatten()
    columns = torch.empty_like(moved)
    columns[moved] = torch.arange(len(moved))
    return Projection(node, columns.view(heads, channels))


def _send(x: Tensor, path: Iterable[fx.Node]) -> Tensor:
    """Put `x` through the moves of `path`, each taking what the one before gave."""

    def value(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [value(a) for a in arg]
        if not isinstance(arg, fx.Node):
            return arg
        if arg.target is aten.sym_size.int:
            return 1  # batch and length are 1 while row numbers travel
        return _SYMBOLIC[arg.target](*(value(a) for a in arg.args))

    for node in path:
        kwargs = {k: value(a) for k, a in node.kwargs.items()}
        x = node.target(x, *(value(a) for a in node.args[1:]), **kwargs)  # type: ignore[operator]
    return x


def attribute(module: fx.GraphModule, node: Any) -> Tensor:
    """The parameter or buffer a get_attr node names."""
    assert isinstance(node, fx.Node)
    assert node.op == "get_attr"
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found


def constant(module: fx.GraphModule, value: Tensor, before: fx.Node, name: str) -> fx.Node:
    """A get_attr node, placed before `before`, of a new buffer that holds `value`."""
    fresh, count = name, 0
    while hasattr(module, fresh):
        count += 1
        fresh = f"{name}_{count}"
    module.register_buffer(fresh, value.detach().contiguous())
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(fresh)
    node.meta["val"] = value
    return node


def set_linear(module: fx.GraphModule, linear: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear node new weights; whoever else uses the old ones keeps them."""
    old = attribute(module, linear.args[1])
    nodes = [constant(module, weight.to(old.dtype), linear, "folded_weight")]
    if bias is not None:
        nodes.append(constant(module, bias.to(old.dtype), linear, "folded_bias"))
    linear.args = (linear.args[0], *nodes)


def call(module: fx.GraphModule, before: fx.Node, target: Any, *args: Any, like: fx.Node) -> fx.Node:
    """A new call placed before `before`, with `like`'s place in the module tree."""
    with module.graph.inserting_before(before):
        node = module.graph.call_function(target, args)
    node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    return node


def project(
    module: fx.GraphModule, projection: Projection, rows: Tensor, like: fx.Node, before: fx.Node
) -> fx.Node:
    """[B, heads, T, width] from the rows `rows` ([heads, width]) of a projection, in new nodes before `before`."""
    x, weight = projection.linear.args[0], attribute(module, projection.weight)
    args = [x, constant(module, weight[rows.flatten()] * projection.scale, before, "narrow_weight")]
    if projection.bias is not None:
        bias = attribute(module, projection.bias)
        args.append(constant(module, bias[rows.flatten()] * projection.scale, before, "narrow_bias"))
    flat = call(module, before, aten.linear.default, *args, like=like)
    split = call(module, before, aten.unflatten.int, flat, -1, list(rows.shape), like=like)
    moved = call(module, before, aten.transpose.int, split, 1, 2, like=like)
    moved.meta["val"] = like.meta["val"][..., : rows.shape[1]]
    return moved


def tidy(module: fx.GraphModule) -> None:
    """Drop dead nodes and attributes, check the graph, regenerate its code."""
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for store in (module._parameters, module._buffers):
        for name in [n for n in store if n not in used]:
            del store[name]
    module.graph.lint()
    module.recompile()
