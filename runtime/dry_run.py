"""A graph run without data: that its shapes fit together, fit the plan, and stay within bounds.

Meta tensors have shapes and no memory, so a graph that would fail at the first prompt, or allocate without
bound, is found while loading. It is run twice: for many tokens, which shows growth beyond what a decoder needs, and
for one, which shows what is large however few they are, or fits no other number of tokens.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from kvcc.errors import ArtifactGraph
from kvcc.runtime import ops
from kvcc.runtime.attention import ATTENDED
from kvcc.runtime.graph import INPUTS, Node, Program, Ref, call_arguments
from kvcc.runtime.plan import LayerPlan, Plan

MAX_RESULTS = 4096  # of one operator
MAX_TENSORS = 500_000
MAX_DIMENSIONS = 16
RUNS = ((4093, 5), (1, 1))  # new tokens and rows of logits: sizes that no weight has, and a decode step's
_LEAST = 1 << 20  # elements per token that any model may use, however small
_META = torch.device("meta")

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def check_shapes(program: Program, weights: Shapes, plan: Plan, vocabulary: int) -> None:
    """Raise ArtifactGraph unless the graph gives logits [1, M, vocabulary] and calls each layer once.

    weights: dtype and shape of every tensor the program names. No value, no product inside an operator, and not all
    values alive at one time together may have more elements per new token than the whole model.
    """
    limit = max(sum(prod(shape) for _, shape in weights.values()), _LEAST)
    for tokens, rows in RUNS:
        out = _run(program, weights, plan, tokens, rows, tokens * limit)
        if tuple(out.shape) != (1, rows, vocabulary) or not out.is_floating_point():
            raise ArtifactGraph(
                f"graph: gives {out.dtype} {list(out.shape)} for {rows} rows, "
                f"not logits [1, {rows}, {vocabulary}]"
            )


def _run(program: Program, weights: Shapes, plan: Plan, tokens: int, rows: int, limit: int) -> Tensor:
    def integers(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device=_META)

    values: list[Any] = [integers(1, tokens), integers(1, tokens), integers(rows), None]
    last_reader = _last_readers(program)
    live = _Live(limit)
    layers: list[int] = []
    made = 0
    for index, node in enumerate(program.nodes):
        if node.op == "weight":
            dtype, shape = weights[node.args[0]]
            values.append(torch.empty(shape, dtype=dtype, device=_META))
            continue
        args, kwargs = call_arguments(node, values, _META)
        if node.op == ops.CACHED_ATTENTION:
            layers.append(kwargs["layer"])
            value: Any = _attend(node, args, kwargs, plan, tokens)
        else:
            value = _call(node, args, kwargs, limit)
        made += _check_value(node, value, limit)
        if made > MAX_TENSORS:
            raise ArtifactGraph(f"{node.where}: the graph makes more than {MAX_TENSORS:,} tensors")
        values.append(value)
        live.add(value, node)
        for number in last_reader.get(index, ()):
            live.remove(values[number])
            values[number] = None
    if layers != list(range(len(plan.layers))):
        raise ArtifactGraph(
            f"graph: attends in layers {layers[:8]}…; the plan has layers 0 to {len(plan.layers) - 1}"
        )
    out: Tensor = values[program.output]
    return out


def _last_readers(program: Program) -> dict[int, list[int]]:
    """By node: the numbers of the values that it is the last to read; of those nobody reads, itself."""
    first = len(INPUTS)
    last = {first + index: index for index in range(len(program.nodes))}
    for index, node in enumerate(program.nodes):
        last |= dict.fromkeys(_references(node), index)
    last.pop(program.output, None)
    found: dict[int, list[int]] = {}
    for number, index in last.items():
        found.setdefault(index, []).append(number)
    return found


def _references(node: Node) -> Iterator[int]:
    for argument in (*node.args, *node.kwargs.values()):
        for entry in argument if isinstance(argument, list) else (argument,):
            if isinstance(entry, Ref):
                yield entry.index


class _Live:
    """Memory that the values alive would take; views share theirs, inputs and weights do not count."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # elements, of 8 bytes
        self.nbytes = 0
        self.holders: dict[int, int] = {}  # by storage

    def add(self, value: Any, node: Node) -> None:
        for storage in _storages(value):
            held = self.holders.get(storage._cdata, 0)
            self.holders[storage._cdata] = held + 1
            self.nbytes += 0 if held else storage.nbytes()
        if self.nbytes > 8 * self.limit:
            raise ArtifactGraph(
                f"{node.where}: values of {self.nbytes:,} bytes at once, more than {self.limit:,} elements"
            )

    def remove(self, value: Any) -> None:
        for storage in _storages(value):
            held = self.holders.pop(storage._cdata, 0)
            if held > 1:
                self.holders[storage._cdata] = held - 1
            elif held:
                self.nbytes -= storage.nbytes()


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    for tensor in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(tensor, Tensor):
            yield tensor.untyped_storage()


def _call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], limit: int) -> Any:
    target = ops.resolve(node.op)
    assert target is not None  # parse_graph has resolved it
    try:
        _check_results(node, args, kwargs)
        value = target(*args, **kwargs)
        _check_operator(node, args, kwargs, value, limit)
    except ArtifactGraph:
        raise
    except Exception as error:  # operators raise many kinds; all mean that these arguments do not go together
        line = (str(error).strip().splitlines() or [""])[0]
        raise ArtifactGraph(f"{node.where}: its arguments do not fit: {line[:200]}") from error
    return value


def _check_operator(
    node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, limit: int
) -> None:
    """Refuse what shapes of results do not show: faults of the processor, and memory inside an operator."""
    if node.op == "aten.div.Tensor_mode" and not value.is_floating_point():
        raise ArtifactGraph(f"{node.where}: whole numbers; the least one by -1 would end the process")
    if node.op not in ("aten.matmul.default", "aten.einsum.default"):
        return
    target = ops.overload(node.op)
    assert target is not None
    given = dict(zip([a.name for a in target._schema.arguments], args)) | kwargs
    if node.op == "aten.matmul.default":
        one, other = given["self"].shape, given["other"].shape
        inner = max((*one[-2:], *other[-2:]), default=1)
        largest = prod(value.shape[:-2]) * max(prod(one[-2:]), prod(other[-2:]), inner)
    else:
        inputs = given["equation"].replace(" ", "").split("->")[0].split(",")
        sizes: dict[str, int] = {}
        rest = 1  # of dimensions that an ellipsis stands for
        for labels, tensor in zip(inputs, given["tensors"]):
            before, dots, after = labels.partition("...")
            head, tail = tensor.shape[: len(before)], tensor.shape[tensor.dim() - len(after) :]
            for label, size in zip(before + after, (*head, *tail)):
                sizes[label] = max(sizes.get(label, 1), size)
            if dots:
                rest = max(rest, prod(tensor.shape[len(before) : tensor.dim() - len(after)]))
        largest = prod(sizes.values()) * rest
    if largest > limit:
        raise ArtifactGraph(f"{node.where}: {largest:,} elements in between, more than {limit:,}")


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


def _attend(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan, tokens: int) -> Tensor:
    _, q, k, v, sinks = args
    index = kwargs["layer"]
    if index >= len(plan.layers):
        raise ArtifactGraph(f"{node.where}: layer {index}; the plan has {len(plan.layers)}")
    layer: LayerPlan = plan.layers[index]
    wanted = {
        "q": (1, layer.q_heads, tokens, layer.k_dim),
        "k": (1, layer.kv_heads, tokens, layer.k_dim),
        "v": (1, layer.kv_heads, tokens, layer.v_dim),
        "sinks": (layer.q_heads,),
    }
    for name, tensor in zip(wanted, (q, k, v, sinks)):
        if tensor is not None and (tuple(tensor.shape) != wanted[name] or tensor.dtype not in ATTENDED):
            raise ArtifactGraph(
                f"{node.where}: layer {index}: {name} is {tensor.dtype} {list(tensor.shape)}; "
                f"the plan says {list(wanted[name])}"
            )
    if kwargs["window"] != layer.window:
        raise ArtifactGraph(
            f"{node.where}: layer {index}: a window of {kwargs['window']}; the plan says {layer.window}"
        )
    return q.new_empty(1, tokens, layer.q_heads, layer.v_dim)
