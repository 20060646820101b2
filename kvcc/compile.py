"""The main road: a model, a profile and a recipe in; an artifact out."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from kvcc._version import __version__
from kvcc.artifact import write_artifact
from kvcc.frontend import LoadedModel, capture, save_tokenizer
from kvcc.graph import Graph
from kvcc.key_energy import calibrated
from kvcc.pipeline import Compiled, PassReport, run_passes
from kvcc.profile import Profile
from kvcc.recipe import Recipe
from kvcc.report import report_facts, report_html
from kvcc.surgery import attribute


def compile_model(
    loaded: LoadedModel,
    profile: Profile | None,
    recipe: Recipe,
    output: Path,
    *,
    graph: Graph | None = None,
    overwrite: bool = False,
    on_pass: Callable[[PassReport], None] | None = None,
) -> Compiled:
    """Capture (unless `graph` is given), run the passes, lower, and write the artifact folder `output`.

    Returns what was packed. Raises the KvccError of whichever stage refuses; nothing half-written is left.
    """
    graph = graph or capture(loaded)
    compiled = run_passes(graph, profile, recipe, on_pass)
    recorded = None if profile is None else calibrated(profile, compiled.plan, compiled.tables)
    provenance = {"kvcc": __version__, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = None
        if loaded.tokenizer is not None:
            tokenizer = Path(folder) / "tokenizer"
            tokenizer.mkdir()
            save_tokenizer(loaded, tokenizer)
        write_artifact(
            output,
            identity=loaded.identity,
            plan=compiled.plan,
            module=compiled.module,
            tables=compiled.tables,
            recipe=recipe.as_dict(),
            recipe_name=recipe.name,
            passes=[_log(r) for r in compiled.reports],
            tokenizer_dir=tokenizer,
            accuracy=None,
            report_html=report_html(
                report_facts(
                    compiled.plan, loaded.identity, recipe.as_dict(), provenance, None, calibration=recorded
                )
            ),
            licence=None,
            folded=folded(graph.module, compiled.module),
            calibration=recorded,
            overwrite=overwrite,
        )
    return compiled


def folded(before: fx.GraphModule, after: fx.GraphModule) -> dict[str, str]:
    """Tensors that passes changed or added, by name, and what each is in the model: a parameter's name, or "".

    A linear keeps its place in the graph when its weight and bias are rewritten.
    """
    held, places = _tensors(before), _linears(before)
    names: dict[str, str] = {}
    for node, (weight, bias) in _linears(after).items():
        own = places.get(node, ("", ""))[0]
        names[weight] = own
        names[bias] = f"{own.removesuffix('weight')}bias" if own else ""
    return {
        name: name if name in held and name not in names else names.get(name, "")
        for name, tensor in sorted(_tensors(after).items())
        if name not in held or held[name].shape != tensor.shape or not torch.equal(held[name], tensor)
    }


def _linears(module: fx.GraphModule) -> dict[str, tuple[str, str]]:
    """Names of weight and bias ("": none) by the name of the node."""
    found = {}
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            weight, bias = ([*node.args, None])[1:3]
            found[node.name] = str(weight.target), "" if bias is None else str(bias.target)
    return found


def _tensors(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {str(node.target): attribute(module, node) for node in module.graph.nodes if node.op == "get_attr"}


def _log(report: PassReport) -> dict[str, Any]:
    return {
        "name": report.name,
        "parameters": report.parameters,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "layers": [{"layer": n.layer, "fired": n.fired, "text": n.text} for n in report.notes],
    }
