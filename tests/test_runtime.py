"""The cache and the lowered graph: exactness, raggedness, chunks, memory, limits."""

import dataclasses

import numpy
import pytest
import torch

from kvcc.errors import CapacityError, DataError
from kvcc.runtime.sampling import Sampling
from tests.compiled import recipe, runnable, stepwise, tokens, transformers_logits
from tests.tiny import ARCHITECTURES

SPLITS = {
    "one pass": [],
    "token by token": list(range(1, 60)),
    "chunks": [7, 14, 15, 16, 30],
    "prefill then decode": list(range(20, 60)),
}
RECIPES = {
    "exact": "[]",
    "kivi-4": "[kivi: {k_bits: 4, v_bits: 4, group_size: 8}]",
    "kivi-3": "[kivi: {k_bits: 3, v_bits: 3, group_size: 8}]",
    "think": "[think: {keep_ratio: 0.6}]",
    "think per request": "[think: {keep_ratio: 0.6, mode: request}]",
    "think folded": "[think: {keep_ratio: 0.5, mode: fold}]",
    "think + kivi-2": "[think: {keep_ratio: 0.6, score: centred, allocation: global}, kivi: {group_size: 8}]",
}


def _recipe(name: str):
    text = RECIPES[name]
    if text.startswith("[think") and ", kivi" in text:
        first, _, second = text[1:-1].partition(", kivi")
        return recipe(f"\n  - {first}\n  - kivi{second}")
    return recipe(text if text == "[]" else f"\n  - {text[1:-1]}")


@pytest.mark.parametrize(
    ("name", "split"),
    [(name, "prefill then decode") for name in ARCHITECTURES]
    + [("llama", s) for s in SPLITS]
    + [("gemma2", "chunks")],
)
def test_exact_recipe_equals_transformers(name: str, split: str) -> None:
    rows = tokens(37, 20, 15, 1)  # 2 sinks + 4 recent + pages of 8: short of, at, and beyond page borders
    for row, logits in zip(rows, stepwise(runnable(name, recipe()), rows, SPLITS[split])):
        torch.testing.assert_close(logits, transformers_logits(name, row), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_a_batch_gives_each_prompt_its_own_tokens(name: str) -> None:
    model = runnable("llama", _recipe(name))
    prompts = tokens(40, 13, 14, 1, 22)
    together = [g.tokens for g in model.generate(prompts, max_tokens=20, ignore_eos=True)]
    alone = [model.generate([p], max_tokens=20, ignore_eos=True)[0].tokens for p in prompts]
    assert together == alone


def test_a_sequence_that_ends_leaves_the_others_alone() -> None:
    model = runnable("llama", _recipe("kivi-4"))
    rows = tokens(30, 25, 28)
    cache = model.new_cache(3)
    model.forward(rows, cache)
    held = cache.layers[0].pool.used
    cache.keep([2, 0])
    assert cache.layers[0].pool.used == held - 2  # 25 tokens: 2 pages
    logits = model.forward([[5], [6]], cache)
    other = model.new_cache(2)
    model.forward([rows[2], rows[0]], other)
    torch.testing.assert_close(logits, model.forward([[5], [6]], other))
    model.forward([[1] * 12, []], cache)  # takes the freed pages before it allocates new ones
    assert cache.layers[0].pool.capacity == held


def test_rows_without_new_tokens_are_left_out() -> None:
    model = runnable("llama", recipe())
    rows = tokens(9, 12)
    cache = model.new_cache(2)
    model.forward([rows[0], []], cache)
    assert cache.lengths == [9, 0]
    late = model.forward([[], rows[1]], cache)
    torch.testing.assert_close(late[0], transformers_logits("llama", rows[1])[-1], atol=1e-4, rtol=1e-4)


def test_chunked_prefill_is_exact_for_the_exact_recipe() -> None:
    model = runnable("llama", recipe())
    rows = tokens(37, 20)
    whole = model.forward(rows, model.new_cache(2))
    for chunk in (1, 5, 8, 36, 37, 100):
        torch.testing.assert_close(
            model.forward(rows, model.new_cache(2), chunk=chunk), whole, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_prompts_may_attend_in_bfloat16(name: str) -> None:
    """As `load` chooses where the processor multiplies matrices of it; cached tokens are met in the model's type."""
    model = runnable(name, recipe())
    narrow = dataclasses.replace(model, exact_in=torch.bfloat16)
    rows = tokens(37, 20)
    found, expected = (m.forward(rows, m.new_cache(2)) for m in (narrow, model))
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
    chunked = narrow.forward(rows, narrow.new_cache(2), chunk=9)
    torch.testing.assert_close(chunked, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("length", [0, 1, 2, 6, 13, 14, 15, 22, 60])
def test_allocated_bytes_are_the_plan_s(name: str, length: int) -> None:
    model = runnable("llama", _recipe(name))
    cache = model.new_cache(2)
    if length:
        model.forward(tokens(length, length), cache)
    assert cache.nbytes == 2 * model.plan.cache_bytes(length)
    assert sum(m.window + m.pages + m.tables for m in cache.memory()) == cache.nbytes


def test_pruned_pages_are_narrow() -> None:
    wide, narrow = (runnable("llama", _recipe(n)).plan.layouts()[0] for n in ("exact", "think"))
    k_bytes = [sum(s.channels for s in layout.k[0]) for layout in (wide, narrow)]
    assert k_bytes == [16, 9]
    assert narrow.nbytes == wide.nbytes - 2 * 7 * 8 * 4  # 2 heads, 7 channels fewer, 8 tokens of float32


def test_a_budget_is_refused_before_anything_changes() -> None:
    model = runnable("llama", _recipe("kivi-4"))
    rows = tokens(30, 30)
    cache = model.new_cache(2, budget=2 * model.plan.cache_bytes(30))
    model.forward(rows, cache)
    before = cache.nbytes, list(cache.lengths)
    with pytest.raises(CapacityError, match="cache budget"):
        model.forward(tokens(20, 20, seed=1), cache)
    assert (cache.nbytes, cache.lengths) == before
    follow = model.forward([[1], [2]], cache)  # still works, unharmed
    other = model.new_cache(2)
    model.forward(rows, other)
    torch.testing.assert_close(follow, model.forward([[1], [2]], other))
    with pytest.raises(CapacityError, match="empty cache"):
        model.new_cache(2, budget=10)


def test_limits_are_refused() -> None:
    model = runnable("llama", recipe())
    cache = model.new_cache(1)
    with pytest.raises(CapacityError, match=r"sequence 0 would be \d+ tokens long; .* has a context of"):
        model.forward([[1] * (model.identity.context_length + 1)], cache)
    with pytest.raises(DataError, match="token 128 is outside the vocabulary"):
        model.forward([[128]], cache)
    with pytest.raises(DataError, match="at least one new token"):
        model.forward([[]], cache)
    with pytest.raises(DataError, match="2 sequences given to a cache of batch 1"):
        model.forward([[1], [2]], cache)


def test_only_one_layer_s_exact_keys_live_at_a_time() -> None:
    """Prefill hands each layer's K and V to the cache before the next layer computes its own."""
    model = runnable("llama", _recipe("kivi-4"))
    alive: list[int] = []
    import gc
    import weakref

    keys: list[weakref.ref[torch.Tensor]] = []
    from kvcc.runtime import attention

    original = attention.store

    def spy(cache, index, row, q, k, v, seen=None):  # type: ignore[no-untyped-def]
        gc.collect()
        alive.append(sum(ref() is not None for ref in keys))
        base = k._base if k._base is not None else k
        keys.append(weakref.ref(base))
        original(cache, index, row, q, k, v, seen)

    attention.store = spy
    try:
        model.forward(tokens(40), model.new_cache(1))
    finally:
        attention.store = original
    assert len(alive) == len(model.plan.layers)
    assert max(alive) == 0


@pytest.mark.parametrize(
    "options", [{"temperature": 0.8}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_sampling_does_not_depend_on_the_batch(options: dict) -> None:
    model = runnable("llama", recipe())
    prompts = tokens(9, 9)
    first = model.generate(prompts, max_tokens=8, sampling=Sampling(seed=3, **options), ignore_eos=True)
    again = model.generate(prompts[:1], max_tokens=8, sampling=Sampling(seed=3, **options), ignore_eos=True)
    other = model.generate(prompts[:1], max_tokens=8, sampling=Sampling(seed=4, **options), ignore_eos=True)
    assert first[0].tokens == again[0].tokens != other[0].tokens


def test_token_ids_of_any_integer_type_are_prompts_and_nothing_else_is_guessed() -> None:
    model = runnable("llama", recipe("[]"))
    ids = [5, 6, 7]
    expected = model.generate([ids], max_tokens=4, ignore_eos=True)[0].tokens
    for same in (list(numpy.array(ids)), numpy.array(ids), [5, numpy.int64(6), 7]):
        assert model.generate([same], max_tokens=4, ignore_eos=True)[0].tokens == expected
    with pytest.raises(DataError, match=r"prompts are a list, also of one"):
        model.generate("Hello", max_tokens=4)
    with pytest.raises(DataError, match="chunk 0: at least one token"):
        model.forward([ids], model.new_cache(1), chunk=0)
