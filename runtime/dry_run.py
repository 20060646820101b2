"""A graph run without data: that its shapes fit together, fit the plan, and stay within bounds.

Meta tensors have shapes and no memory, so a graph that would fail at the first prompt, or allocate without
bound, is found while loading. The run is long, which shows growth beyond what a decoder needs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvcc.errors import ArtifactGraph
from kvcc.runtime import ops
from kvcc.runtime.graph import Node, Program, call_arguments
from kvcc.runtime.plan import LayerPlan, Plan

MAX_RESULTS = 4096  # of one operator
MAX_TENSORS = 500_000
MAX_DIMENSIONS = 16
_TOKENS, _ROWS = 4093, 5  # new tokens and rows of logits of the run: sizes that no weight has
_LEAST = 1 << 20  # elements per token that any model may use, however small
_META = torch.device("meta")

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def check_shapes(program: Program, weights: Shapes, plan: Plan, vocabulary: int) -> None:
    """Raise ArtifactGraph unless the graph gives logits [1, M, vocabulary] and calls each layer once.

    weights: dtype and shape of every tensor the program names. No value may have more elements per new token
    than the whole model.
    """
    limit = max(sum(_elements(shape) for _, shape in weights.values()), _LEAST)
    out = _run(program, weights, plan, _TOKENS * limit)
    if tuple(out.shape) != (1, _ROWS, vocabulary) or not out.is_floating_point():
        raise ArtifactGraph(
            f"graph: gives {out.dtype} {list(out.shape)} for {_ROWS} rows, "
            f"not logits [1, {_ROWS}, {vocabulary}]"
        )


def _run(program: Program, weights: Shapes, plan: Plan, limit: int) -> Tensor:
    def integers(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device=_META)

    values: list[Any] = [integers(1, _TOKENS), integers(1, _TOKENS), integers(_ROWS), None]
    layers: list[int] = []
    made = 0
    for node in program.nodes:
        if node.op == "weight":
            dtype, shape = weights[node.args[0]]
            values.append(torch.empty(shape, dtype=dtype, device=_META))
            continue
        args, kwargs = call_arguments(node, values, _META)
        if node.op == ops.CACHED_ATTENTION:
            layers.append(kwargs["layer"])
            value: Any = _attend(node, args, kwargs, plan)
        else:
            value = _call(node, args, kwargs)
        made += _check_value(node, value, limit)
        if made > MAX_TENSORS:
            raise ArtifactGraph(f"{node.where}: the graph makes more than {MAX_TENSORS:,} tensors")
        values.append(value)
    if layers != list(range(len(plan.layers))):
        raise ArtifactGraph(
            f"graph: attends in layers {layers[:8]}…; the plan has layers 0 to {len(plan.layers) - 1}"
        )
    out: Tensor = values[program.output]
    return out


def _call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target = ops.resolve(node.op)
    assert target is not None  # parse_graph has resolved it
    try:
        _check_results(node, args, kwargs)
        return target(*args, **kwargs)
    except ArtifactGraph:
        raise
    except Exception as error:  # operators raise many kinds; all mean that these arguments do not go together
        line = (str(error).strip().splitlines() or [""])[0]
        raise ArtifactGraph(f"{node.where}: its arguments do not fit: {line[:200]}") from error


def _check_results(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse to cut a tensor into very many, before it is done."""
    if node.op not in ("aten.split.Tensor", "aten.unbind.int", "aten.chunk.default"):
        return
    target = ops.overload(node.op)
    assert target is not None
    given = dict(zip([a.name for a in target._schema.arguments], args)) | kwargs
    size = given["self"].shape[given.get("dim", 0)]
    count = -(-size // max(given.get("split_size", 1), 1))
    if min(count, given.get("chunks", count)) > MAX_RESULTS:
        raise ArtifactGraph(f"{node.where}: more than {MAX_RESULTS} results")


def _check_value(node: Node, value: Any, limit: int) -> int:
    """The number of tensors in a result. Raises ArtifactGraph when one, or a number, is beyond all use."""
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise ArtifactGraph(f"{node.where}: an integer beyond 64 bits")
        return 0
    tensors = [value] if isinstance(value, Tensor) else list(value)
    for tensor in tensors:
        if tensor.dim() > MAX_DIMENSIONS or tensor.numel() > limit:
            raise ArtifactGraph(
                f"{node.where}: gives a tensor of {tensor.numel():,} elements in {tensor.dim()} dimensions, "
                f"more than {limit:,} or {MAX_DIMENSIONS}"
            )
    return len(tensors)


def _attend(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan) -> Tensor:
    _, q, k, v, sinks = args
    index = kwargs["layer"]
    if index >= len(plan.layers):
        raise ArtifactGraph(f"{node.where}: layer {index}; the plan has {len(plan.layers)}")
    layer: LayerPlan = plan.layers[index]
    wanted = {
        "q": (1, layer.q_heads, _TOKENS, layer.k_dim),
        "k": (1, layer.kv_heads, _TOKENS, layer.k_dim),
        "v": (1, layer.kv_heads, _TOKENS, layer.v_dim),
        "sinks": (layer.q_heads,),
    }
    for name, tensor in zip(wanted, (q, k, v, sinks)):
        if tensor is not None and (tuple(tensor.shape) != wanted[name] or not tensor.is_floating_point()):
            raise ArtifactGraph(
                f"{node.where}: layer {index}: {name} is {tensor.dtype} {list(tensor.shape)}; "
                f"the plan says {list(wanted[name])}"
            )
    if kwargs["window"] != layer.window:
        raise ArtifactGraph(
            f"{node.where}: layer {index}: a window of {kwargs['window']}; the plan says {layer.window}"
        )
    return q.new_empty(1, _TOKENS, layer.q_heads, layer.v_dim)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
