"""A cache filled from another recipe's prefill against one that the recipe's own forward pass filled."""

import pytest
import torch

from kvcc.runtime.fuse import fuse
from kvcc.runtime.model import CompiledModel
from kvcc.shared_prefill import filler, record
from tests.compiled import WINDOWS, recipe, runnable, tokens
from tests.tiny import ARCHITECTURES

RECIPES = {
    "kivi": "\n  - kivi: {k_bits: 4, v_bits: 3, group_size: 8}",
    "request": "\n  - think: {keep_ratio: 0.7, mode: request}",
    "zipcache": "\n  - zipcache: {}",
    "transform": "\n  - transform: {bits: 3}",
    "folded": "\n  - fold-values: {basis: pca, mean: false}",
}
PAGES = {"zipcache": "windows: {sinks: 2, recent: 4, page: 16}\n"}


def continued(model: CompiledModel, prompt: list[int], behind: list[int], shared: bool) -> torch.Tensor:
    """Logits behind a prompt that the uncompressed model recorded, or that this model computed itself."""
    cache = model.new_cache(1)
    if shared:
        exact = runnable(model.identity.name.removeprefix("tiny-"), recipe())
        fuse(exact.graph)
        recorded = record(exact, prompt, exact.new_cache(1))
        found = filler(model, recorded)
        assert found is not None
        assert len(recorded.entering) == len(model.plan.layers)
        found.fill(cache, recorded)
    else:
        model.forward([prompt], cache)
    assert cache.lengths == [len(prompt)]
    return model.forward([behind], cache, chunk=5, every=True)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_is_that_of_a_forward_pass(architecture: str, name: str) -> None:
    model = runnable(architecture, recipe(RECIPES[name], PAGES.get(name, WINDOWS)))
    fuse(model.graph)
    for length in (1, 7, 33):
        prompt, behind = tokens(length, 12, seed=length)
        own, shared = (continued(model, prompt, behind, shared) for shared in (False, True))
        torch.testing.assert_close(shared, own, atol=1e-3, rtol=0)  # a code may fall to the other side


def test_a_shorter_prompt_is_the_beginning_of_a_longer_one() -> None:
    model = runnable("llama", recipe(RECIPES["kivi"]))
    (row,) = tokens(40)
    recorded = record(model, row, model.new_cache(1))
    found = filler(model, recorded.first(21))
    assert found is not None
    ours, theirs = model.new_cache(1), model.new_cache(1)
    found.fill(ours, recorded.first(21))
    model.forward([row[:21]], theirs)
    torch.testing.assert_close(model.forward([[5]], ours), model.forward([[5]], theirs))


def test_graphs_that_are_cut_elsewhere_share_nothing() -> None:
    model, other = (runnable(name, recipe()) for name in ("llama", "mixtral"))
    recorded = record(model, [1, 2, 3], model.new_cache(1))
    assert filler(other, recorded) is not None  # as many layers: who asks knows whether it is the same model
    fewer = type(recorded)(recorded.tokens, recorded.entering[:1])
    assert filler(model, fewer) is None
