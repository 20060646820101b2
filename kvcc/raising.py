"""From the graph in an artifact that no pass has touched back to the Graph it was lowered from."""

from pathlib import Path

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from kvcc.errors import DataError
from kvcc.graph import Graph, causal_mask
from kvcc.runtime.artifact import MANIFEST, Artifact, module
from kvcc.runtime.attention import cached_attention
from kvcc.surgery import tidy

SIZES = (3, 11, 5)  # batch, length and rows that shapes are computed for; passes read those of heads alone


def is_artifact(path: str | Path) -> bool:
    """Whether a folder claims to be an artifact."""
    return (Path(path) / MANIFEST).is_file()


def raised(artifact: Artifact) -> Graph:
    """The model in an artifact as a Graph, on the artifact's weights: the reverse of `kvcc.lowering.lower`.

    Node and weight names are the artifact's, and nodes do not know their module in transformers.
    Raises DataError for an artifact whose recipe has passes: they may have rewritten the model.
    """
    passes = [name for entry in artifact.manifest.recipe.get("passes", []) for name in entry]
    if passes:
        raise DataError(
            f"{artifact.path} was compiled with {', '.join(passes)}; give the model, or its artifact of the recipe "
            "exact"
        )
    plain = module(artifact, "cpu")
    graph = plain.graph
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    with graph.inserting_after(inputs["positions"]):
        mask = graph.placeholder("mask")
    for node in graph.find_nodes(op="call_function", target=cached_attention):
        _raise(node, mask)
    graph.erase_node(inputs["cache"])
    tidy(plain)
    _infer_shapes(plain)
    return Graph(plain, artifact.manifest.model)


def padded_mask(mask: Tensor, window: int) -> Tensor:
    """bool [B, 1, T, T], True = keep, of a padding mask [B, T] (1 real): what captured models give their attention."""
    return causal_mask(mask.shape[1], window, mask.device) & mask.bool()[:, None, None, :]


def _raise(node: fx.Node, mask: fx.Node) -> None:
    graph, kwargs = node.graph, node.kwargs
    with graph.inserting_before(node):
        keep = graph.call_function(padded_mask, (mask, kwargs["window"]))
        order = (kwargs[name] for name in ("layer", "scale", "window", "softcap"))
        q, k, v, sinks = node.args[1:]
        plain = graph.call_function(torch.ops.kvcc.attention.default, (q, k, v, keep, sinks, *order))
    node.replace_all_uses_with(plain)
    graph.erase_node(node)


def _infer_shapes(plain: fx.GraphModule) -> None:
    """Give every node its meta["val"]."""
    batch, length, rows = SIZES
    plane = torch.zeros(batch, length, dtype=torch.int64)
    FakeTensorProp(plain, FakeTensorMode(allow_non_fake_inputs=True)).propagate(
        plane, plane, plane, torch.arange(rows)
    )
