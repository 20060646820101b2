"""The model as it is, through kvcc's own runtime: what everything is measured against."""

import torch
from torch import Tensor

from kvcc.errors import DataError
from kvcc.frontend import LoadedModel, capture, load_model, reference_logits, runtime_tokenizer
from kvcc.graph import Graph
from kvcc.pipeline import in_memory, run_passes
from kvcc.raising import is_artifact, raised
from kvcc.recipe import load_recipe
from kvcc.runtime import CompiledModel, load
from kvcc.runtime.artifact import read_artifact
from kvcc.runtime.tokenizer import Tokenizer

# Departures that are rounding; SmolLM2's from transformers are 3e-6, 0.06 and 0.005, those of weights folded a half.
EXACT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.02}


def opened(source: str, dtype: str = "float32") -> tuple[Graph, CompiledModel]:
    """A model by its name (see load_model), or the graph in its artifact of the recipe `exact`, in its own dtype.

    Returns the graph, and the uncompressed model with its tokenizer. Raises UnsupportedModel, ArtifactError, or
    DataError for an artifact that passes may have changed.
    """
    if is_artifact(source):
        return raised(read_artifact(source)), load(source, verify=False)
    loaded = load_model(source, dtype)
    graph = capture(loaded)
    return graph, uncompressed(loaded, runtime_tokenizer(loaded), graph)


def uncompressed(
    loaded: LoadedModel, tokenizer: Tokenizer | None, graph: Graph | None = None
) -> CompiledModel:
    """The model (captured already as `graph`, or now) through the `exact` recipe.

    Its logits are first compared with transformers' own on a short text.

    Raises DataError when they differ by more than rounding: nothing may be measured against a wrong reference.
    """
    compiled = run_passes(graph or capture(loaded), None, load_recipe("exact"))
    model = in_memory(compiled, loaded.identity, "exact", tokenizer)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, loaded.identity.vocab_size, (1, 32), generator=generator)
    mask = torch.ones_like(tokens)
    theirs = reference_logits(loaded, tokens, mask, torch.arange(32)[None])[0]
    error = departure(model.forward(tokens.tolist(), model.new_cache(1), every=True), theirs)
    if not error <= EXACT_TOLERANCE[loaded.identity.dtype]:
        raise DataError(
            f"the captured graph of {loaded.identity.name} is off by {error:.1%} in its logits: a bug in kvcc"
        )
    return model


def departure(found: Tensor, expected: Tensor) -> float:
    """Root mean square difference of logits from expected ones [N, V], in standard deviations of these.

    The largest difference tells nothing in half precision: of 32 x 49,152 logits of one model, by one's own code and by
    transformers', some are apart by half a deviation.
    """
    found, expected = found.float(), expected.float()
    return float((found - expected).square().mean().sqrt() / expected.std().clamp_min(1e-30))
