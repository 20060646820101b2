"""The main road: a model, a profile and a recipe in; an artifact out."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvcc._version import __version__
from kvcc.artifact import write_artifact
from kvcc.frontend import LoadedModel, capture, save_tokenizer
from kvcc.graph import Graph
from kvcc.pipeline import Compiled, PassReport, run_passes
from kvcc.profile import Profile
from kvcc.recipe import Recipe
from kvcc.report import report_html


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
    compiled = run_passes(graph or capture(loaded), profile, recipe, on_pass)
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
            report_html=report_html(compiled.plan, loaded.identity, recipe.as_dict(), provenance, None),
            licence=None,
            overwrite=overwrite,
        )
    return compiled


def _log(report: PassReport) -> dict[str, Any]:
    return {
        "name": report.name,
        "parameters": report.parameters,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "layers": [{"layer": n.layer, "fired": n.fired, "text": n.text} for n in report.notes],
    }
