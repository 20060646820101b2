"""Mutations of the graph: nodes that torch would take, and nodes that it would not."""

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

from kvcc.runtime import ops
from kvcc.runtime.graph import DTYPES, FLOATS, INPUTS
from tests.fuzz.material import NUMBERS, ODD, replace

ATEN = sorted(ops.ATEN_OPS)


def graph(path: Path, rng: Random) -> None:
    """Other operators, calls nobody made, and arguments of other nodes, in one to three places."""
    file = path / "graph/graph.json"
    program = json.loads(file.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        rng.choice([_other_operator, _insert, _insert, _insert, _rewire, _number, _drop, _swap])(
            program["nodes"], rng
        )
    replace(file, json.dumps(program).encode())


def _other_operator(nodes: list[dict[str, Any]], rng: Random) -> None:
    rng.choice(nodes)["op"] = rng.choice(
        [*sorted(ops.NAMES), "weight", "aten.nonzero.default", "builtins.eval"]
    )


def _insert(nodes: list[dict[str, Any]], rng: Random) -> None:
    """A call of a random operator, with arguments that fit its schema mostly, whose result a later node then takes."""
    at = rng.randrange(len(nodes))
    earlier = [*INPUTS[:3], *(node["name"] for node in nodes[max(0, at - 40) : at])]
    target = ops.overload(rng.choice(ATEN))
    assert target is not None
    args = []
    for argument in target._schema.arguments:
        if argument.kwarg_only or (argument.has_default_value() and rng.random() < 0.3):
            break
        args.append(_argument(str(argument.real_type), earlier, rng))
    name = f"fuzz{rng.randrange(1 << 30)}"
    nodes.insert(at, {"name": name, "op": str(target), "args": args, "kwargs": {}})
    readers = [node for node in nodes[at + 1 :] if any(_is_reference(a) for a in node["args"])]
    if readers and rng.random() < 0.8:
        reader = rng.choice(readers[: rng.choice([3, 1000])])
        slots = [i for i, a in enumerate(reader["args"]) if _is_reference(a)]
        reader["args"][rng.choice(slots)] = {"ref": name}


def _argument(kind: str, earlier: list[str], rng: Random) -> Any:
    if rng.random() < 0.03:
        return copy.deepcopy(rng.choice(ODD))
    if kind.startswith("Optional["):
        return None if rng.random() < 0.3 else _argument(kind[9:-1], earlier, rng)
    if kind.startswith("List["):
        return [_argument(kind[5:-1], earlier, rng) for _ in range(rng.choice([0, 1, 1, 2, 3, 4]))]
    if kind == "Tensor":
        return {"ref": rng.choice(earlier)} if rng.random() < 0.95 else rng.choice(NUMBERS)
    if kind in ("int", "number", "float"):
        size = [{"ref": name} for name in earlier if "size" in name]
        small = [0, 1, -1, 2, 3, 4, 8, 16]
        number = rng.choice(
            [*small, *small, *NUMBERS, *size] if kind != "float" else [0.0, 1.0, -1.0, 1e-6, 1e300]
        )
        return {"float": rng.choice(list(FLOATS))} if kind == "number" and rng.random() < 0.1 else number
    exact = {
        "bool": rng.random() < 0.5,
        "str": rng.choice(["none", "tanh", "floor", "trunc", "ij,jk->ik", "a...->a"]),
    }
    exact |= {"Device": {"device": "runtime"}, "Layout": {"layout": "strided"}}
    exact |= {
        "ScalarType": {"dtype": rng.choice(list(DTYPES))},
        "MemoryFormat": {"memory_format": "preserve_format"},
    }
    return exact.get(kind)


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"ref"}


def _rewire(nodes: list[dict[str, Any]], rng: Random) -> None:
    """Let a node read another earlier one."""
    at = rng.randrange(1, len(nodes))
    slots = [i for i, a in enumerate(nodes[at]["args"]) if _is_reference(a)]
    nodes[at]["args"][rng.choice(slots)] = {
        "ref": rng.choice(nodes[max(0, at - rng.choice([5, 1000])) : at])["name"]
    }


def _number(nodes: list[dict[str, Any]], rng: Random) -> None:
    """Another number among the arguments of a node."""
    node = rng.choice([n for n in nodes if _numbers(n["args"]) or n["kwargs"]])
    if node["kwargs"] and rng.random() < 0.5:
        key = rng.choice(sorted(node["kwargs"]))
        node["kwargs"][key] = rng.choice([*NUMBERS, *ODD, {"dtype": rng.choice(list(DTYPES))}])
        return
    holder, key = rng.choice(_numbers(node["args"]))
    holder[key] = rng.choice([*NUMBERS, holder[key] + 1, holder[key] - 1, 0.5, {"ref": "tokens"}])


def _numbers(values: list[Any]) -> list[tuple[list[Any], int]]:
    found = [(values, i) for i, v in enumerate(values) if isinstance(v, (int, float))]
    return found + [place for v in values if isinstance(v, list) for place in _numbers(v)]


def _drop(nodes: list[dict[str, Any]], rng: Random) -> None:
    """Take a node away; its readers read what it read."""
    at = rng.randrange(len(nodes))
    node = nodes.pop(at)
    before = [a for a in node["args"] if _is_reference(a)][0]  # noqa: RUF015 - an IndexError without one
    text = json.dumps(nodes).replace(json.dumps({"ref": node["name"]}), json.dumps(before))
    nodes[:] = json.loads(text)


def _swap(nodes: list[dict[str, Any]], rng: Random) -> None:
    """Exchange the arguments of two nodes of one operator, weights preferably."""
    op = rng.choice(["weight", rng.choice(nodes)["op"]])
    first, second = rng.sample([n for n in nodes if n["op"] == op], 2)
    first["args"], second["args"] = second["args"], first["args"]
