"""The serialised graph: every architecture survives it, and nothing but the listed calls gets through."""

import contextlib
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from kvcc.errors import (
    ArtifactError,
    ArtifactGraph,
    ArtifactOperator,
    ArtifactTensor,
    ArtifactVersion,
    UnsupportedModel,
)
from kvcc.graph_format import graph_text, write_graph
from kvcc.kernels import reference
from kvcc.pipeline import Compiled, run_passes
from kvcc.runtime import ops
from kvcc.runtime.dry_run import check_shapes
from kvcc.runtime.graph import FLOATS, parse_graph, read_graph
from kvcc.runtime.model import CompiledModel
from kvcc.runtime.strict_json import parse_json
from tests.compiled import recipe, runnable, tokens
from tests.tiny import ARCHITECTURES, VOCABULARY, tiny_graph

CPU = torch.device("cpu")
THINK = "\n  - think: {keep_ratio: 0.6, mode: fold}"


@lru_cache
def _written(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Compiled]:
    found = run_passes(tiny_graph(name), None, recipe())
    data, tensors = write_graph(found.module)
    return json.loads(graph_text(data)), tensors, found


def _check(data: Any, name: str = "llama") -> None:
    """All that a reader checks of a graph."""
    _, tensors, found = _written(name)
    program = parse_graph(data)
    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    if missing := set(program.weights()) - set(shapes):
        raise ArtifactTensor(f"missing {missing}")
    check_shapes(program, shapes, found.plan, VOCABULARY)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_outputs_after_reading(name: str) -> None:
    data, tensors, found = _written(name)
    _check(data, name)
    before = CompiledModel(tiny_graph(name).model, "", found.plan, found.module, {}, None, reference, CPU)
    after = replace(before, graph=read_graph(data, tensors, CPU))
    rows = tokens(13, 5, seed=3)
    caches = [model.new_cache(2) for model in (before, after)]
    for step in (rows, [[4], [9]], [[7, 7, 1], []]):
        old, new = (model.forward(step, cache) for model, cache in zip((before, after), caches))
        assert torch.equal(old, new)


def test_folded_weights_survive() -> None:
    before = runnable("llama", recipe(THINK))
    data, tensors = write_graph(before.graph)
    after = replace(before, graph=read_graph(json.loads(graph_text(data)), tensors, CPU))
    rows = tokens(30)
    assert torch.equal(before.forward(rows, before.new_cache()), after.forward(rows, after.new_cache()))


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 4))
        self.b = self.a
        self.c = nn.Parameter(self.a.detach().t())  # the same memory, another shape
        self.unused = nn.Parameter(torch.randn(7))


def test_shared_tensors_are_stored_once_and_unused_ones_not() -> None:
    root, graph = _Shared(), fx.Graph()
    inputs = [graph.placeholder(name) for name in ("tokens", "positions", "rows", "cache")]
    a, b, c = (graph.get_attr(name) for name in "abc")
    graph.get_attr("unused")
    both = graph.call_function(torch.ops.aten.add.Tensor, (a, b))
    out = graph.call_function(torch.ops.aten.matmul.default, (both, c))
    graph.output(out)
    data, tensors = write_graph(fx.GraphModule(root, graph))
    assert set(tensors) == {"a", "c"}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert torch.equal(tensors["c"], root.a.t())
    again = read_graph(json.loads(graph_text(data)), tensors, CPU)
    torch.testing.assert_close(again(*[None] * len(inputs)), (2 * root.a @ root.a.t()).detach())


def test_arguments_of_every_kind_survive() -> None:
    aten, graph = torch.ops.aten, fx.Graph()
    tokens_, *_ = (graph.placeholder(name) for name in ("tokens", "positions", "rows", "cache"))
    size = graph.call_function(aten.sym_size.int, (tokens_, 1))
    where = {"device": torch.device("cpu"), "dtype": torch.float64, "layout": torch.strided}
    row = graph.call_function(aten.arange.default, (size,), where)
    full = graph.call_function(aten.full.default, ([size], -torch.inf), {"dtype": torch.float64})
    high = graph.call_function(aten.where.self, (graph.call_function(aten.gt.Scalar, (row, 1.5)), full, row))
    out = graph.call_function(aten.clone.default, (high,), {"memory_format": torch.contiguous_format})
    graph.output(out)
    data, tensors = write_graph(fx.GraphModule(nn.Module(), graph))
    again = read_graph(json.loads(graph_text(data)), tensors, CPU)
    got = again(torch.zeros(1, 4, dtype=torch.int64), None, None, None)
    assert torch.equal(got, torch.tensor([0, 1, -torch.inf, -torch.inf], dtype=torch.float64))


def test_writer_refuses_what_the_reader_would() -> None:
    graph = fx.Graph()
    x, *_ = (graph.placeholder(name) for name in ("tokens", "positions", "rows", "cache"))
    graph.output(graph.call_function(torch.ops.aten.nonzero.default, (x,)))
    with pytest.raises(UnsupportedModel, match=r"aten\.nonzero"):
        write_graph(fx.GraphModule(nn.Module(), graph))


def test_listed_operators_are_pure() -> None:
    for name in sorted(ops.ATEN_OPS):
        found = ops.overload(name)
        assert found is not None, name
        assert not found._schema.is_mutable, name
        assert torch.Tag.nondeterministic_seeded not in found.tags, name
        assert ops.name_of(found) == name
    assert ops.name_of(torch.ops.aten.add_.Tensor) is None
    assert ops.name_of(eval) is None


# --------------------------------------------------------------------------- malformed graphs


def _node(data: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in data["nodes"] if node["op"] == op)


def _call(op: str, *args: Any, **kwargs: Any) -> Callable[[dict[str, Any]], None]:
    """A change: one more node, before the others."""

    def change(data: dict[str, Any]) -> None:
        data["nodes"].insert(0, {"name": "extra", "op": op, "args": list(args), "kwargs": kwargs})

    return change


def _chain(op: str, count: int, *args: Any) -> Callable[[dict[str, Any]], None]:
    """A change: `count` nodes, each made of the one before, "@" in `args`."""

    def change(data: dict[str, Any]) -> None:
        last, made = {"ref": "length"}, []
        made.append(
            {"name": "length", "op": "aten.sym_size.int", "args": [{"ref": "tokens"}, 1], "kwargs": {}}
        )
        if op.startswith("aten."):
            last = {"ref": "tokens"}
        for index in range(count):
            filled = [last if a == "@" else [last, last] if a == "@@" else a for a in args]
            made.append({"name": f"c{index}", "op": op, "args": filled, "kwargs": {}})
            last = {"ref": f"c{index}"}
        data["nodes"][:0] = made

    return change


def _set(op: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        _node(data, op)[key] = value

    return change


def _replace(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.__setitem__(key, value)


def _attention(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        call = _node(data, ops.CACHED_ATTENTION)
        if isinstance(key, int):
            call["args"][key] = value
        else:
            call["kwargs"][key] = value

    return change


TOKENS = {"ref": "tokens"}
MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[ArtifactError], str]] = {
    "version": (_replace("version", 2), ArtifactVersion, "version 2"),
    "version true": (_replace("version", True), ArtifactVersion, "version True"),
    "inputs": (_replace("inputs", ["tokens"]), ArtifactGraph, "inputs"),
    "foreign key": (_replace("code", "x"), ArtifactGraph, "keys"),
    "nodes": (_replace("nodes", {}), ArtifactGraph, "not a list"),
    "two outputs": (_replace("outputs", [TOKENS, TOKENS]), ArtifactGraph, "one output"),
    "output of cache": (_replace("outputs", [{"ref": "cache"}]), ArtifactGraph, "not a tensor"),
    "output shape": (_replace("outputs", [TOKENS]), ArtifactGraph, "logits"),
    "foreign operator": (_call("aten.nonzero.default", TOKENS), ArtifactOperator, "nonzero"),
    "in place": (_call("aten.add_.Tensor", TOKENS, TOKENS), ArtifactOperator, "add_"),
    "python": (_call("builtins.eval", "1"), ArtifactOperator, "eval"),
    "file": (_call("aten.from_file.default", "/etc/passwd"), ArtifactOperator, "from_file"),
    "uninitialised": (_call("aten.empty.memory_format", [9]), ArtifactOperator, "empty"),
    "foreign memory": (_call("aten.as_strided.default", TOKENS, [9], [9]), ArtifactOperator, "as_strided"),
    "no name": (_set("aten.neg.default", "name", ""), ArtifactGraph, "identifier"),
    "code as name": (_set("aten.neg.default", "name", "x; import os"), ArtifactGraph, "identifier"),
    "name taken": (_set("aten.neg.default", "name", "cache"), ArtifactGraph, "taken"),
    "extra key": (_set("aten.neg.default", "code", 1), ArtifactGraph, "not an object of"),
    "later ref": (_call("aten.neg.default", {"ref": "linear_14"}), ArtifactGraph, "no earlier node"),
    "itself": (_call("aten.neg.default", {"ref": "extra"}), ArtifactGraph, "no earlier node"),
    "too few": (_call("aten.add.Tensor", TOKENS), ArtifactGraph, "other is missing"),
    "too many": (_call("aten.neg.default", TOKENS, 1), ArtifactGraph, "takes 1"),
    "twice": (_call("aten.neg.default", TOKENS, self=TOKENS), ArtifactGraph, "twice"),
    "unknown argument": (_call("aten.neg.default", TOKENS, out=TOKENS), ArtifactGraph, "no argument 'out'"),
    "text for tensor": (_call("aten.neg.default", "x"), ArtifactGraph, "not of type Tensor"),
    "cache for tensor": (_call("aten.neg.default", {"ref": "cache"}), ArtifactGraph, "not of type Tensor"),
    "tensor for int": (_call("aten.unsqueeze.default", TOKENS, TOKENS), ArtifactGraph, "not of type int"),
    "bool for int": (_call("aten.unsqueeze.default", TOKENS, True), ArtifactGraph, "not of type int"),
    "float for int": (_call("aten.unsqueeze.default", TOKENS, 1.0), ArtifactGraph, "not of type int"),
    "int for list": (_call("aten.view.default", TOKENS, 1), ArtifactGraph, "not of type List"),
    "nested list": (_call("aten.view.default", TOKENS, [[1]]), ArtifactGraph, "nested"),
    "unknown tag": (_call("aten.neg.default", {"pickle": "x"}), ArtifactGraph, "pickle"),
    "unknown dtype": (_call("aten.to.dtype", TOKENS, {"dtype": "complex64"}), ArtifactGraph, "complex64"),
    "other device": (_call("aten.neg.default", {"device": "cuda:7"}), ArtifactGraph, "device"),
    "two tags": (_call("aten.neg.default", {"ref": "tokens", "x": "y"}), ArtifactGraph, "several keys"),
    "text": (_call("aten.einsum.default", "__import__('os')", [TOKENS]), ArtifactGraph, "equation"),
    "pinned": (_call("aten.zeros.default", [2], pin_memory=True), ArtifactGraph, "pinned"),
    "getitem of a tensor": (_call("operator.getitem", TOKENS, 0), ArtifactGraph, "results"),
    "getitem out of range": (
        lambda data: (
            _call("operator.getitem", {"ref": "cut"}, 5)(data),
            data["nodes"].insert(
                0, {"name": "cut", "op": "aten.chunk.default", "args": [TOKENS, 2], "kwargs": {}}
            ),
        ),
        ArtifactGraph,
        "out of range",
    ),
    "integers of tensors": (_call("operator.add", TOKENS, 1), ArtifactGraph, "2 integers"),
    "division by zero": (_call("operator.floordiv", 1, 0), ArtifactGraph, "zero"),
    "shapes": (_call("aten.view.default", TOKENS, [7, 7]), ArtifactGraph, "do not fit"),
    "values decide shape": (
        lambda data: (
            _call("aten.index.Tensor", TOKENS, [{"ref": "mask"}])(data),
            data["nodes"].insert(
                0, {"name": "mask", "op": "aten.gt.Scalar", "args": [TOKENS, 0], "kwargs": {}}
            ),
        ),
        ArtifactGraph,
        "do not fit",
    ),
    "memory": (_call("aten.zeros.default", [1 << 40]), ArtifactGraph, "elements"),
    "memory by repetition": (_call("aten.repeat.default", TOKENS, [1 << 30, 9]), ArtifactGraph, "elements"),
    "memory by doubling": (_chain("aten.cat.default", 40, "@@"), ArtifactGraph, "elements"),
    "memory of a constant": (_call("aten.zeros.default", [1 << 21]), ArtifactGraph, "elements"),
    "memory of many values": (
        lambda data: (
            _call("aten.cat.default", [{"ref": f"big{i}"} for i in range(9)])(data),
            data["nodes"].__setitem__(
                slice(0, 0),
                [
                    {"name": f"big{i}", "op": "aten.ones.default", "args": [[1 << 18]], "kwargs": {}}
                    for i in range(9)
                ],
            ),
        ),
        ArtifactGraph,
        "at once",
    ),
    "memory inside a product": (
        lambda data: (
            _call("aten.einsum.default", "a,b,c->", [{"ref": "row"}, {"ref": "row"}, {"ref": "row"}])(data),
            data["nodes"].insert(
                0, {"name": "row", "op": "aten.ones.default", "args": [[1 << 15]], "kwargs": {}}
            ),
        ),
        ArtifactGraph,
        "in between",
    ),
    "memory inside a broadcast product": (
        lambda data: (
            _call("aten.matmul.default", {"ref": "one"}, {"ref": "other"})(data),
            data["nodes"].__setitem__(
                slice(0, 0),
                [
                    {"name": name, "op": "aten.ones.default", "args": [shape], "kwargs": {}}
                    for name, shape in (("one", [900, 1, 1, 900]), ("other", [900, 900, 1]))
                ],
            ),
        ),
        ArtifactGraph,
        "in between",
    ),
    "one number of tokens": (
        lambda data: (_call("aten.narrow.default", TOKENS, 1, 0, 4093)(data),),
        ArtifactGraph,
        "do not fit",
    ),
    "processor fault": (
        lambda data: (_call("aten.div.Tensor_mode", TOKENS, -1, rounding_mode="trunc")(data),),
        ArtifactGraph,
        "whole numbers",
    ),
    "memory overflow": (_call("aten.zeros.default", [1 << 40, 1 << 40]), ArtifactGraph, "fit|elements"),
    "cubic in tokens": (
        lambda data: (
            _call("aten.zeros.default", [{"ref": "c0"}, {"ref": "length"}])(data),
            data["nodes"].append(data["nodes"].pop(0)),
            _chain("operator.mul", 1, "@", "@")(data),
        ),
        ArtifactGraph,
        "elements",
    ),
    "number by squaring": (_chain("operator.mul", 70, "@", "@"), ArtifactGraph, "64 bits"),
    "very many results": (
        lambda data: (
            _call("aten.unbind.int", {"ref": "big"})(data),
            data["nodes"].insert(
                0, {"name": "big", "op": "aten.zeros.default", "args": [[1 << 20]], "kwargs": {}}
            ),
        ),
        ArtifactGraph,
        "results",
    ),
    "many dimensions": (_chain("aten.unsqueeze.default", 30, "@", 0), ArtifactGraph, "dimensions"),
    "weight missing": (_call("weight", "elsewhere"), ArtifactTensor, "elsewhere"),
    "weight of two": (_call("weight", "a", "b"), ArtifactGraph, "one tensor name"),
    "attention without q": (_attention(1, None), ArtifactGraph, "not a tensor"),
    "attention without cache": (_attention(0, TOKENS), ArtifactGraph, "wants cache"),
    "attention of tokens": (_attention(2, TOKENS), ArtifactGraph, "the plan says"),
    "attention layer": (_attention("layer", 1), ArtifactGraph, "layers"),
    "attention beyond": (_attention("layer", 5), ArtifactGraph, "layer 5"),
    "attention window": (_attention("window", 3), ArtifactGraph, "window of 3"),
    "attention scale": (_attention("scale", "1"), ArtifactGraph, "scale"),
    "attention argument": (_attention("path", "x"), ArtifactGraph, "wants layer"),
    "attention dropped": (
        lambda data: _node(data, ops.CACHED_ATTENTION).update(
            op="aten.transpose.int", args=[_node(data, ops.CACHED_ATTENTION)["args"][1], 1, 2], kwargs={}
        ),
        ArtifactGraph,
        "layers",
    ),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed(fault: str) -> None:
    change, error, message = MALFORMED[fault]
    data = copy.deepcopy(_written("llama")[0])
    change(data)
    with pytest.raises(error, match=message) as caught:
        _check(data)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_too_many_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcc.runtime.graph.MAX_NODES", 10)
    with pytest.raises(ArtifactGraph, match="at most 10"):
        _check(_written("llama")[0])


def test_names_of_the_file_stay_out_of_the_code() -> None:
    data, tensors, _ = _written("llama")
    code = read_graph(data, tensors, CPU).code
    assert "linear" not in code.replace("torch.ops.aten.linear", "")


def test_odd_floats_survive_as_tags() -> None:
    assert {"inf", "-inf", "nan"} == set(FLOATS)
    for text in (b"[1e999]", b"[NaN]", b"[Infinity]", b"[1" + b"0" * 400 + b"]"):
        with pytest.raises(ArtifactGraph):
            parse_json(text, "x", ArtifactGraph, 1000)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b"[" * 40 + b"]" * 40,
        b'"\\u001b[2J"',
        b'"\\ud800"',
        b"\xff",
        b"9223372036854775808",
        b"",
        b"[1,]",
    ],
)
def test_odd_json_is_refused(text: bytes) -> None:
    with pytest.raises(ArtifactGraph, match=r"^here: "):
        parse_json(text, "here", ArtifactGraph, 1 << 20)


def test_long_json_is_refused() -> None:
    with pytest.raises(ArtifactGraph, match="at most 10"):
        parse_json(b"[" + b"1," * 10 + b"1]", "here", ArtifactGraph, 10)


ODD = st.sampled_from(
    [None, True, 0, 1, -1, 2, 1 << 40, -(1 << 62), 0.5, 1e300, "x", "tokens", [], [0], [[0]], {}, TOKENS,
     {"ref": "cache"}, {"dtype": "float32"}, {"device": "runtime"}, {"float": "nan"}, [TOKENS, None],
     "aten.cat.default", "aten.view.default", "aten.repeat.default", "operator.getitem", "weight"]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["llama", "mixtral", "phi3", "opt"]))
def test_mutated_graph_is_read_or_refused(draw: Any, name: str) -> None:
    _mutate_and_check(draw, name)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(st.data(), st.sampled_from(["llama", "mixtral", "phi3", "opt"]))
def test_many_mutated_graphs_are_read_or_refused(draw: Any, name: str) -> None:
    _mutate_and_check(draw, name)


def _mutate_and_check(draw: Any, name: str) -> None:
    data = copy.deepcopy(_written(name)[0])
    for _ in range(draw.draw(st.integers(1, 3))):
        mutate(data, draw)
    with contextlib.suppress(ArtifactError):
        _check(data, name)


def mutate(data: Any, draw: Any) -> None:
    """Put something odd at a random place of decoded JSON, or take something away."""
    while isinstance(data, (dict, list)) and data:
        keys = sorted(data) if isinstance(data, dict) else range(len(data))
        key = draw.draw(st.sampled_from(keys))
        if not isinstance(data[key], (dict, list)) or not data[key] or draw.draw(st.integers(0, 3)) == 0:
            if draw.draw(st.integers(0, 4)) == 0:
                del data[key]
            else:
                data[key] = copy.deepcopy(draw.draw(ODD))
            return
        data = data[key]
