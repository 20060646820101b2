"""Writing a lowered graph as JSON, which `kvcc.runtime.graph` reads. No pickle, no code."""

import json
import math
from typing import Any

import torch
from torch import Tensor, fx

from kvcc.errors import UnsupportedModel
from kvcc.runtime.graph import DTYPES, INPUTS, LAYOUTS, MEMORY_FORMATS, VERSION
from kvcc.runtime.ops import name_of
from kvcc.surgery import attribute

_TAGS: dict[type, tuple[str, dict[str, Any]]] = {
    torch.dtype: ("dtype", DTYPES),
    torch.memory_format: ("memory_format", MEMORY_FORMATS),
    torch.layout: ("layout", LAYOUTS),
}


def write_graph(module: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON data of a lowered graph, and the tensors it names, contiguous and each stored once.

    Raises UnsupportedModel for an operator or argument that artifacts cannot hold.
    """
    module.graph.eliminate_dead_code()
    inputs = [node.name for node in module.graph.find_nodes(op="placeholder")]
    if inputs != list(INPUTS):
        raise UnsupportedModel(
            f"the graph takes {', '.join(inputs)}; an artifact's takes {', '.join(INPUTS)}"
        )
    tensors: dict[str, Tensor] = {}
    stored: dict[Any, str] = {}
    nodes, outputs = [], []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            name = _store(str(node.target), attribute(module, node), tensors, stored)
            nodes.append({"name": node.name, "op": "weight", "args": [name], "kwargs": {}})
        elif node.op == "call_function":
            nodes.append(_call(node))
        elif node.op == "output":
            outputs.append(_encode(node.args[0], node))
        elif node.op != "placeholder":
            raise UnsupportedModel(
                f"{node.name}: the graph has a node of kind {node.op}, which artifacts cannot hold"
            )
    return {"version": VERSION, "inputs": inputs, "nodes": nodes, "outputs": outputs}, tensors


def graph_text(data: dict[str, Any]) -> str:
    """graph.json: one line a node, so that two graphs can be compared."""
    nodes = ",\n".join(json.dumps(node, allow_nan=False) for node in data["nodes"])
    head, inputs, outputs = (json.dumps(data[key]) for key in ("version", "inputs", "outputs"))
    return f'{{"version": {head},\n"inputs": {inputs},\n"nodes": [\n{nodes}\n],\n"outputs": {outputs}}}\n'


def _store(name: str, tensor: Tensor, tensors: dict[str, Tensor], stored: dict[Any, str]) -> str:
    """The name under which `tensor` is stored: the first of those that share its memory and shape."""
    tensor = tensor.detach()
    key: Any = (
        tensor.untyped_storage().data_ptr() or name,  # empty tensors have no address
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )
    if key not in stored:
        if tensor.dtype not in DTYPES.values():
            raise UnsupportedModel(f"{name}: tensors of {tensor.dtype} cannot be stored")
        stored[key] = name
        tensors[name] = tensor.contiguous()
    return stored[key]


def _call(node: fx.Node) -> dict[str, Any]:
    op = name_of(node.target)
    if op is None:
        raise UnsupportedModel(
            f"{node.name}: the model uses the operator {node.target}, which artifacts cannot hold"
        )
    return {
        "name": node.name,
        "op": op,
        "args": [_encode(argument, node) for argument in node.args],
        "kwargs": {name: _encode(argument, node) for name, argument in node.kwargs.items()},
    }


def _encode(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"ref": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(entry, node) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.device):
        return {"device": "runtime"}
    for kind, (tag, table) in _TAGS.items():
        if isinstance(value, kind):
            name = next((name for name, entry in table.items() if entry == value), None)
            if name is not None:
                return {tag: name}
    raise UnsupportedModel(
        f"{node.name}: argument {value!r} of {node.target} cannot be stored in an artifact"
    )
