"""The graph of an artifact: from decoded JSON, checked against every operator's schema, to a torch.fx module.

`docs/format.md` is the specification. Names from the file never reach generated code.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, fx

from kvcc.errors import ArtifactGraph, ArtifactOperator, ArtifactTensor, ArtifactVersion
from kvcc.runtime import ops

VERSION = 1
INPUTS = ("tokens", "positions", "rows", "cache")
MAX_NODES = 100_000
MAX_LIST = 4096  # entries of one list argument

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool",
    )
}  # fmt: skip
FLOATS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
MEMORY_FORMATS = {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format}
LAYOUTS = {"strided": torch.strided}

Kind = Literal["tensor", "tensors", "int", "cache"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_TEXT = re.compile(r"[A-Za-z_,.> -]{1,64}")  # gelu's "tanh", div's "floor", an einsum's equation


@dataclass(frozen=True)
class Ref:
    """The value of an earlier node, or an input."""

    index: int


@dataclass(frozen=True)
class RuntimeDevice:
    """Stands for the device that the graph is loaded onto."""


@dataclass(frozen=True)
class Node:
    """One call, or a weight (op "weight", args: its name). Values are numbered inputs first, then nodes."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: Kind
    where: str  # for messages


@dataclass(frozen=True)
class Program:
    """A graph whose every call fits its operator's schema. output: the number of the resulting value."""

    nodes: tuple[Node, ...]
    output: int

    def weights(self) -> dict[str, str]:
        """Tensor names, each with the place of its first use."""
        found: dict[str, str] = {}
        for node in self.nodes:
            if node.op == "weight":
                found.setdefault(node.args[0], node.where)
        return found


def read_graph(data: Any, weights: Mapping[str, Tensor], device: torch.device) -> fx.GraphModule:
    """The module of a decoded graph.json: called with tokens [1, N], positions [1, N], rows [M] and a cache.

    Weights are moved to `device` if they are elsewhere. Raises what `parse_graph` raises, or ArtifactTensor
    when a weight is missing.
    """
    return build_module(parse_graph(data), weights, device)


# --------------------------------------------------------------------------- decoding


def parse_graph(data: Any) -> Program:
    """Check a decoded graph.json. Raises ArtifactVersion, ArtifactOperator or ArtifactGraph."""
    _require(isinstance(data, dict), "graph: not an object")
    if data.get("version") != VERSION or isinstance(data.get("version"), bool):
        raise ArtifactVersion(
            f"graph: version {str(data.get('version'))[:40]}; this kvcc reads {VERSION}: "
            "use the kvcc that wrote it"
        )
    _require(set(data) == {"version", "inputs", "nodes", "outputs"}, "graph: keys are not those of version 1")
    _require(data["inputs"] == list(INPUTS), f"graph: inputs are not {', '.join(INPUTS)}")
    listed = data["nodes"]
    _require(isinstance(listed, list), "graph: nodes is not a list")
    _require(len(listed) <= MAX_NODES, f"graph: {len(listed):,} nodes; at most {MAX_NODES:,} are read")
    names = {name: index for index, name in enumerate(INPUTS)}
    kinds: list[Kind] = ["tensor", "tensor", "tensor", "cache"]
    nodes = []
    for index, entry in enumerate(listed):
        node, name = _node(entry, index, names, kinds)
        names[name] = len(kinds)
        kinds.append(node.kind)
        nodes.append(node)
    outputs = data["outputs"]
    _require(isinstance(outputs, list) and len(outputs) == 1, "graph: there must be one output")
    output = _decode(outputs[0], names, "graph: output")
    _require(isinstance(output, Ref) and kinds[output.index] == "tensor", "graph: the output is not a tensor")
    return Program(tuple(nodes), output.index)


def _node(entry: Any, index: int, names: dict[str, int], kinds: list[Kind]) -> tuple[Node, str]:
    where = f"graph: node {index}"
    _require(
        isinstance(entry, dict) and set(entry) == {"name", "op", "args", "kwargs"},
        f"{where}: not an object of name, op, args, kwargs",
    )
    name, op, args, kwargs = entry["name"], entry["op"], entry["args"], entry["kwargs"]
    _require(isinstance(name, str) and _NAME.fullmatch(name), f"{where}: its name is not an identifier")
    _require(name not in names, f"{where}: the name {name} is taken")
    _require(isinstance(op, str), f"{where}: op is not a text")
    where = f"{where} ({op[:60]})"
    _require(
        isinstance(args, list) and isinstance(kwargs, dict), f"{where}: args is no list or kwargs no object"
    )
    if op == "weight":
        _require(
            len(args) == 1 and isinstance(args[0], str) and not kwargs, f"{where}: wants one tensor name"
        )
        return Node(op, (args[0],), {}, "tensor", where), name
    if op not in ops.NAMES:
        raise ArtifactOperator(f"{where}: artifacts may not call this operator")
    _require(len(args) <= MAX_LIST, f"{where}: too many arguments")
    decoded = tuple(_decode(value, names, where) for value in args)
    named = {key: _decode(value, names, where) for key, value in kwargs.items()}
    return Node(op, decoded, named, _check_call(op, decoded, named, kinds, where), where), name


def _decode(value: Any, names: dict[str, int], where: str, depth: int = 0) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        _require(depth == 0 and len(value) <= MAX_LIST, f"{where}: a list is nested or too long")
        return [_decode(entry, names, where, depth + 1) for entry in value]
    _require(
        isinstance(value, dict) and len(value) == 1, f"{where}: an argument is an object of several keys"
    )
    ((tag, content),) = value.items()
    _require(isinstance(content, str), f"{where}: the content of {tag!r} is not a text")
    if tag == "ref":
        _require(content in names, f"{where}: refers to {content!r}, which no earlier node gives")
        return Ref(names[content])
    if (tag, content) == ("device", "runtime"):
        return RuntimeDevice()
    tables: dict[str, Mapping[str, Any]] = {
        "dtype": DTYPES,
        "float": FLOATS,
        "memory_format": MEMORY_FORMATS,
        "layout": LAYOUTS,
    }
    _require(content in tables.get(tag, {}), f"{where}: unknown argument {tag}: {content}")
    return tables[tag][content]


def _require(holds: Any, message: str) -> None:
    if not holds:
        _refuse(message)


def _refuse(message: str) -> NoReturn:
    raise ArtifactGraph(message)


# --------------------------------------------------------------------------- schemas


def _check_call(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], kinds: list[Kind], where: str
) -> Kind:
    """The kind of a call's result. Raises ArtifactGraph when it does not fit the operator."""
    if op == ops.CACHED_ATTENTION:
        _check_attention(args, kwargs, kinds, where)
        return "tensor"
    if op == ops.GETITEM:
        fits = len(args) == 2 and _is(args[0], "tensors", kinds) and type(args[1]) is int and not kwargs
        _require(fits and 0 <= args[1] < MAX_LIST, f"{where}: wants the results of a node and a number")
        return "tensor"
    if op in ops.INTEGER_OPS:
        count = 1 if op == "operator.neg" else 2
        fits = len(args) == count and not kwargs and all(_fits("int", a, kinds) for a in args)
        _require(fits, f"{where}: wants {count} integers")
        return "int"
    target = ops.overload(op)
    if target is None:
        raise ArtifactOperator(
            f"{where}: torch {torch.__version__} has no such operator; use the torch of the manifest"
        )
    return _check_schema(target._schema, args, kwargs, kinds, where)


def _check_schema(
    schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kinds: list[Kind], where: str
) -> Kind:
    positional = [a for a in schema.arguments if not a.kwarg_only]
    _require(len(args) <= len(positional), f"{where}: {len(args)} arguments; it takes {len(positional)}")
    given = {a.name: value for a, value in zip(positional, args)}
    for name in kwargs:
        _require(name not in given, f"{where}: argument {name} is given twice")
    given |= kwargs
    for argument in schema.arguments:
        name = argument.name
        if name not in given:
            _require(argument.has_default_value(), f"{where}: argument {name} is missing")
            continue
        value, kind = given.pop(name), str(argument.real_type)
        _require(_fits(kind, value, kinds), f"{where}: argument {name} is not of type {kind}")
        _require(name != "pin_memory" or not value, f"{where}: pinned memory is not for artifacts")
    _require(not given, f"{where}: it has no argument {next(iter(given), '')[:40]!r}")
    returns = [str(r.real_type) for r in schema.returns]
    known: dict[tuple[str, ...], Kind] = {("Tensor",): "tensor", ("int",): "int"}
    return known.get(tuple(returns), "tensors")


def _fits(kind: str, value: Any, kinds: list[Kind]) -> bool:
    """Whether an argument is of a schema type. Torch takes numbers for tensors, too."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind[9:-1], value, kinds)
    if kind.startswith("List["):
        return isinstance(value, list) and all(_fits(kind[5:-1], entry, kinds) for entry in value)
    if kind == "Tensor":
        return _is(value, "tensor", kinds) or _fits("number", value, kinds)
    if kind == "int":
        return type(value) is int or _is(value, "int", kinds)
    if kind == "number":
        return isinstance(value, (bool, int, float)) or _is(value, "int", kinds)
    if kind == "float":
        return type(value) in (int, float)
    if kind == "str":
        return isinstance(value, str) and _TEXT.fullmatch(value) is not None
    exact: dict[str, type] = {
        "bool": bool,
        "ScalarType": torch.dtype,
        "Device": RuntimeDevice,
        "MemoryFormat": torch.memory_format,
        "Layout": torch.layout,
    }
    return kind in exact and isinstance(value, exact[kind])


def _is(value: Any, kind: Kind, kinds: list[Kind]) -> bool:
    return isinstance(value, Ref) and kinds[value.index] == kind


def _check_attention(args: tuple[Any, ...], kwargs: dict[str, Any], kinds: list[Kind], where: str) -> None:
    _require(len(args) == 5 and _is(args[0], "cache", kinds), f"{where}: wants cache, q, k, v, sinks")
    _require(all(_is(a, "tensor", kinds) for a in args[1:4]), f"{where}: q, k or v is not a tensor")
    _require(args[4] is None or _is(args[4], "tensor", kinds), f"{where}: sinks is neither a tensor nor null")
    _require(
        set(kwargs) == {"layer", "scale", "window", "softcap"},
        f"{where}: wants layer, scale, window, softcap",
    )
    for name, least in (("layer", 0), ("window", 0)):
        _require(
            type(kwargs[name]) is int and kwargs[name] >= least, f"{where}: {name} is not a whole number"
        )
    for name in ("scale", "softcap"):
        value = kwargs[name]
        _require(
            type(value) in (int, float) and 0 <= value < float("inf"), f"{where}: {name} is out of range"
        )


# --------------------------------------------------------------------------- building


def build_module(program: Program, weights: Mapping[str, Tensor], device: torch.device) -> fx.GraphModule:
    """A checked program as a torch.fx module on `device`, under names of our own."""
    root = torch.nn.Module()
    attributes: dict[str, str] = {}
    for index, (name, where) in enumerate(program.weights().items()):
        if name not in weights:
            raise ArtifactTensor(f"{where}: weights.safetensors has no tensor {name[:200]!r}")
        attributes[name] = f"w{index}"
        root.register_buffer(f"w{index}", weights[name].to(device))
    graph = fx.Graph()
    values = [graph.placeholder(name) for name in INPUTS]
    for index, node in enumerate(program.nodes):
        if node.op == "weight":
            values.append(graph.create_node("get_attr", attributes[node.args[0]], name=f"n{index}"))
            continue
        args, kwargs = call_arguments(node, values, device)
        target = ops.resolve(node.op)
        assert target is not None  # parse_graph has looked it up
        values.append(graph.create_node("call_function", target, args, kwargs, f"n{index}"))
    graph.output(values[program.output])
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph, "ArtifactGraph")


def call_arguments(
    node: Node, values: list[Any], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with every Ref replaced by what `values` holds for it, and `device` put in.

    An operator that makes a tensor out of nothing gets the device even if the file names none.
    """

    def value(argument: Any) -> Any:
        if isinstance(argument, list):
            return [value(entry) for entry in argument]
        if isinstance(argument, Ref):
            return values[argument.index]
        return device if isinstance(argument, RuntimeDevice) else argument

    kwargs = {name: value(argument) for name, argument in node.kwargs.items()}
    target = ops.overload(node.op)
    if target is not None:
        types = {a.name: str(a.real_type) for a in target._schema.arguments}
        if "device" in types and not any("Tensor" in kind for kind in types.values()):
            kwargs["device"] = device
    return tuple(value(argument) for argument in node.args), kwargs
