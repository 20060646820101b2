"""Tiny models, profiled and compiled in memory, for tests."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kvcc.calibration import PromptSet, TokenPrompt, calibrate
from kvcc.frontend import reference_logits
from kvcc.kernels import reference
from kvcc.kernels.protocol import Backend
from kvcc.pipeline import Compiled, run_passes
from kvcc.profile import Profile
from kvcc.recipe import Recipe, parse_recipe
from kvcc.runtime.model import CompiledModel
from tests.tiny import shared_graph, tiny_loaded

WINDOWS = "windows: {sinks: 2, recent: 4, page: 8}\n"
CPU = torch.device("cpu")


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids of the tiny vocabulary, one list a length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 128, (n,), generator=generator).tolist() for n in lengths]


@lru_cache
def tiny_profile(name: str) -> Profile:
    """A profile of the tiny model on a few random prompts."""
    prompts = tuple(TokenPrompt(tuple(ids), str(i)) for i, ids in enumerate(tokens(60, 50, 40, seed=7)))
    return calibrate(shared_graph(name), [PromptSet("random", "sha256:0", 7, prompts)], skip_first=2)


def recipe(passes: str = "[]", windows: str = WINDOWS) -> Recipe:
    """A recipe from YAML for its passes, with small windows."""
    return parse_recipe(f"{windows}passes: {passes}\n", "test.yaml")


def compiled(name: str, chosen: Recipe) -> Compiled:
    """A tiny architecture through a recipe."""
    return run_passes(shared_graph(name), tiny_profile(name), chosen)


def runnable(name: str, chosen: Recipe, backend: Backend = reference) -> CompiledModel:
    """A tiny architecture, compiled and ready to run."""
    return running(name, compiled(name, chosen), chosen.name, backend)


def running(name: str, found: Compiled, chosen: str = "", backend: Backend = reference) -> CompiledModel:
    """A compiled tiny architecture, ready to run."""
    return CompiledModel(
        shared_graph(name).model, chosen, found.plan, found.module, found.tables, None, backend, CPU
    )


def stepwise(model: CompiledModel, rows: Sequence[Sequence[int]], cuts: Sequence[int]) -> list[Tensor]:
    """All logits of each row when it goes through the cache in pieces that end at `cuts` (and at its end)."""
    cache = model.new_cache(len(rows))
    outs: list[list[Tensor]] = [[] for _ in rows]
    first = 0
    for last in [*cuts, max(map(len, rows))]:
        parts = [row[first:last] for row in rows]
        if any(parts):
            for out, piece in zip(
                outs, model.forward(parts, cache, every=True).split([len(p) for p in parts])
            ):
                out.append(piece)
        first = last
    return [torch.cat(out) for out in outs]


def transformers_logits(name: str, row: Sequence[int]) -> Tensor:
    """transformers' own logits of one sequence, [T, V]."""
    ids = torch.tensor([row])
    return reference_logits(tiny_loaded(name), ids, torch.ones_like(ids), torch.arange(len(row))[None])[0]
