"""The pass pipeline: a captured graph and a recipe in; a lowered graph, its plan and its tables out."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvcc.errors import PassError
from kvcc.graph import Graph
from kvcc.kernels import backend as kernel_backend
from kvcc.lowering import lower
from kvcc.passes import Compilation, Note, Pass, start
from kvcc.profile import Profile
from kvcc.recipe import Recipe
from kvcc.runtime import CompiledModel
from kvcc.runtime.fuse import fuse
from kvcc.runtime.identity import ModelIdentity
from kvcc.runtime.plan import Plan
from kvcc.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class PassReport:
    """What one pass did: bytes per sealed token before and after, seconds, and its notes by layer."""

    name: str
    parameters: dict[str, Any]
    seconds: float
    bytes_before: float
    bytes_after: float
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Compiled:
    """A lowered graph with its plan and tables, ready to be packed."""

    module: fx.GraphModule
    plan: Plan
    tables: dict[str, Tensor]
    reports: tuple[PassReport, ...]


def run_passes(
    graph: Graph,
    profile: Profile | None,
    recipe: Recipe,
    on_pass: Callable[[PassReport], None] | None = None,
) -> Compiled:
    """Run a recipe's passes over a copy of the graph, which shares its weights, then lower it.

    Raises ProfileError when the profile is of another model, PassError when a pass does not apply.
    """
    if profile is not None:
        profile.require_model(graph.model)
    elif recipe.requires_profile():
        needing = ", ".join(p.name for p in recipe.passes if p.requires_profile())
        raise PassError(
            f"recipe {recipe.name}: {needing} needs calibration statistics; give --profile (kvcc calibrate)"
        )
    graph = Graph(_copied(graph.module), graph.model)
    compilation = start(graph, profile, recipe.windows)
    reports = []
    for pass_ in recipe.passes:
        report = _run(pass_, compilation)
        reports.append(report)
        if on_pass is not None:
            on_pass(report)
    module = lower(compilation.graph.module)
    return Compiled(module, compilation.plan, compilation.tables, tuple(reports))


def in_memory(
    compiled: Compiled, model: ModelIdentity, name: str, tokenizer: Tokenizer | None = None
) -> CompiledModel:
    """What was compiled, ready to run on the CPU under the recipe's `name`, without an artifact; fuses its graph."""
    cpu = torch.device("cpu")
    graph, kernels = fuse(compiled.module), kernel_backend("auto", cpu)
    return CompiledModel(model, name, compiled.plan, graph, compiled.tables, tokenizer, kernels, cpu)


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own on the same weights: passes put new ones beside them and never write into them."""
    weights = {id(each): each for each in (*module.parameters(), *module.buffers())}
    copied: fx.GraphModule = copy.deepcopy(module, weights)
    return copied


def _run(pass_: Pass, compilation: Compilation) -> PassReport:
    before, noted, clock = compilation.plan.bytes_per_token(), len(compilation.notes), time.perf_counter()
    pass_.apply(compilation)
    compilation.plan.layouts()  # a pass must leave a plan that comes out even
    return PassReport(
        pass_.name,
        pass_.model_dump(),
        time.perf_counter() - clock,
        before,
        compilation.plan.bytes_per_token(),
        tuple(compilation.notes[noted:]),
    )
