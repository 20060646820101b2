"""Graphs raised from artifacts: the model they were captured from, on every architecture."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from kvcc.artifact import write_artifact
from kvcc.errors import DataError
from kvcc.graph import Graph, attention_nodes, attention_spec
from kvcc.pipeline import run_passes
from kvcc.raising import is_artifact, raised
from kvcc.runtime.artifact import read_artifact
from tests.compiled import compiled, recipe, running, stepwise, tiny_profile, tokens
from tests.tiny import ARCHITECTURES, shared_graph

SOME = ("llama", "gemma2", "gpt_oss", "gpt_neox")
EVERY = [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES]
NARROW = "\n  - think: {keep_ratio: 0.5}\n  - kivi: {group_size: 8}"


def _written(name: str, path: Path, passes: str = "[]") -> Path:
    chosen = recipe(passes)
    made = compiled(name, chosen)
    return write_artifact(
        path,
        identity=shared_graph(name).model,
        plan=made.plan,
        module=made.module,
        tables=made.tables,
        recipe=chosen.as_dict(),
        recipe_name=chosen.name,
        passes=[],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@lru_cache
def _raised(name: str, folder: Path) -> Graph:
    return raised(read_artifact(_written(name, folder / f"{name}.kvcc")))


@pytest.mark.parametrize("name", EVERY)
def test_logits_are_those_of_the_captured_model(name: str, folder: Path) -> None:
    """Left padding, windows, sinks and soft caps too."""
    graph, captured = _raised(name, folder), shared_graph(name)
    assert graph.model == captured.model
    ids = torch.tensor(tokens(20, 20, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    inputs = ids, (mask.cumsum(1) - 1).clamp(min=0), mask, torch.arange(20)
    assert torch.equal(graph.module(*inputs)[mask.bool()], captured.module(*inputs)[mask.bool()])
    specs = [[attention_spec(node) for node in attention_nodes(g.module)] for g in (graph, captured)]
    for ours, theirs in zip(*specs, strict=True):
        assert vars(ours) == vars(theirs) | {"module_path": ""}


@pytest.mark.parametrize("name", SOME)
def test_passes_find_in_it_what_they_find_in_the_model(name: str, folder: Path) -> None:
    chosen = recipe(NARROW)
    found = run_passes(_raised(name, folder), tiny_profile(name), chosen)
    wanted = compiled(name, chosen)
    assert found.plan == wanted.plan
    assert found.tables.keys() == wanted.tables.keys()
    rows = tokens(30, 21)
    for ours, theirs in zip(
        *(stepwise(running(name, made), rows, [20, 25]) for made in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_rewritten_model_is_refused(tmp_path: Path) -> None:
    path = _written("llama", tmp_path / "a.kvcc", NARROW)
    assert is_artifact(path)
    assert not is_artifact(tmp_path)
    with pytest.raises(DataError, match="was compiled with think, kivi; give the model"):
        raised(read_artifact(path))
