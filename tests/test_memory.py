"""What is alive during a prefill, and what becomes of pages that are given back."""

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvcc.errors import CapacityError
from kvcc.kernels import cpu, exact, reference
from kvcc.runtime.fuse import fuse
from kvcc.runtime.model import CompiledModel
from tests.compiled import recipe, runnable, tokens

WINDOWS = "windows: {sinks: 2, recent: 8, page: 8}\n"
KIVI = "[kivi: {k_bits: 2, v_bits: 2, group_size: 8}]"
ACTIVATIONS = (
    14  # the most rows as wide as the model that may live beside one layer's K and V, measured 8 to 11
)


class Living(TorchDispatchMode):
    """Counts the bytes of every storage made in its context, from its first tensor until it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in before | self._known:
                self._count(storage)
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def living() -> Iterator[Living]:
    with Living() as mode:
        yield mode


def allowed(model: CompiledModel, together: int, cached: int) -> int:
    """Bytes that may live while `together` tokens go through a model and `cached` ones end up in its cache."""
    plan = max(p.exact_elements for p in model.plan.layers)
    rows = together * 4 * (plan + ACTIVATIONS * max(model.identity.hidden_size, model.identity.head_dim * 4))
    return rows + model.plan.cache_bytes(cached)


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_prefill_holds_the_cache_one_layer_and_its_activations(name: str, chunk: int | None) -> None:
    """Four times the prompt takes four times the memory, and chunks take a chunk's."""
    model = runnable(name, recipe(KIVI, WINDOWS), backend())
    longer = model.identity.model_copy(update={"context_length": 4096})  # so that a square of it would show
    model = dataclasses.replace(model, identity=longer)
    fuse(model.graph)
    for length in (512, 4096):
        (row,) = tokens(length)
        cache = model.new_cache(1)
        model.forward([row[:3]], model.new_cache(1))  # what is made on first use
        with living() as alive:
            model.forward([row], cache, chunk=chunk)
        # Masks are made for some queries at a time over all keys.
        masks = 4 * min(exact.FUSED_ROWS, chunk or length) * length * 4
        assert alive.peak <= allowed(model, min(length, chunk or length), length) + masks


def backend() -> Any:
    return reference if cpu.available() is not None else cpu


def test_pages_given_back_are_used_again() -> None:
    model = runnable("llama", recipe(KIVI, WINDOWS))
    cache = model.new_cache(3)
    rows = tokens(90, 60, 75)
    model.forward(rows, cache)
    allocated = cache.nbytes
    held = [layer.pool.used for layer in cache.layers if layer.pool]
    cache.keep([2])
    freed = [layer.pool.used for layer in cache.layers if layer.pool]
    assert all(0 < after < before for before, after in zip(held, freed, strict=True))
    taken = [layer.pool.capacity for layer in cache.layers if layer.pool]
    model.forward([tokens(100, seed=5)[0]], cache)  # grows into what the others left
    assert [layer.pool.capacity for layer in cache.layers if layer.pool] == taken
    assert cache.nbytes < allocated  # windows and tables of the others are gone

    alone = model.new_cache(1)
    model.forward([rows[2]], alone)
    model.forward([tokens(100, seed=5)[0]], alone)
    torch.testing.assert_close(model.forward([[7]], cache), model.forward([[7]], alone))


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_prompt_beyond_the_budget_leaves_the_cache_as_it_was(chunk: int | None) -> None:
    model = runnable("llama", recipe(KIVI, WINDOWS))
    first, second = tokens(40, 200)
    cache = model.new_cache(1, budget=model.plan.cache_bytes(120))
    model.forward([first], cache)
    before = cache.nbytes, list(cache.lengths), [list(layer.pages[0]) for layer in cache.layers]
    with pytest.raises(CapacityError, match="cache budget"):
        model.forward([second], cache, chunk=chunk)
    assert (cache.nbytes, cache.lengths, [list(layer.pages[0]) for layer in cache.layers]) == before
    other = model.new_cache(1)
    model.forward([first], other)
    torch.testing.assert_close(model.forward([[3]], cache), model.forward([[3]], other))


def test_decoding_stops_at_the_budget_with_every_token_intact() -> None:
    model = runnable("llama", recipe(KIVI, WINDOWS), backend())
    fuse(model.graph)
    budget = model.plan.cache_bytes(40)
    cache = model.new_cache(1, budget=budget)
    (row,) = tokens(200)
    model.forward([row[:20]], cache)
    done = 20
    while model.plan.cache_bytes(done + 1) <= budget:
        model.forward([[row[done]]], cache)
        done += 1
    with pytest.raises(CapacityError, match="cache budget"):
        model.forward([[row[done]]], cache)
    assert model.plan.cache_bytes(done) <= budget < model.plan.cache_bytes(done + 1)
    assert cache.lengths == [done]
    free = model.new_cache(1)
    model.forward([row[:20]], free)
    for token in row[20:done]:
        model.forward([[token]], free)
    cache.budget = None
    torch.testing.assert_close(model.forward([[5]], cache), model.forward([[5]], free))
