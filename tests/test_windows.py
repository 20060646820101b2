"""Exact segments of 16 bits in a float32 model."""

import pytest
import torch

from kvcc.cli.export import _saved
from kvcc.errors import RecipeError
from kvcc.frontend import capture as capture_model
from kvcc.kernels import cpu, reference
from kvcc.kernels.protocol import Backend
from kvcc.pipeline import run_passes
from kvcc.recipe import load_recipe
from kvcc.runtime.fuse import fuse
from tests.compiled import compiled, recipe, runnable, stepwise, tokens, transformers_logits
from tests.tiny import tiny_loaded

HALF = "windows: {sinks: 2, recent: 4, page: 8, dtype: half}\n"
KIVI = "[kivi: {k_bits: 4, v_bits: 4, group_size: 8}]"
BACKENDS = [
    reference,
    pytest.param(cpu, marks=pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt_neox"])
def test_logits_differ_by_the_rounding_of_keys_and_values(name: str, backend: Backend) -> None:
    """Token by token, in chunks, and over a page's border; float16 keeps 11 bits."""
    model = runnable(name, recipe(windows=HALF), backend)
    fuse(model.graph)
    (row,) = tokens(29)
    expected = transformers_logits(name, row)
    for cuts in (range(3, 29), (1, 7, 8, 23)):
        (found,) = stepwise(model, [row], list(cuts))
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("length", [0, 1, 13, 14, 15, 40])
def test_windows_take_half_the_bytes(length: int) -> None:
    wide, narrow = (runnable("llama", recipe(KIVI, **windows)) for windows in ({}, {"windows": HALF}))
    allocated = []
    for model in (wide, narrow):
        cache = model.new_cache(1)
        cache.reserve([length])
        if length:
            model.forward(tokens(length), cache)
        memory = cache.memory()
        assert cache.nbytes == model.plan.cache_bytes(length)
        allocated.append((sum(m.window for m in memory), sum(m.pages for m in memory)))
    (wide_windows, wide_pages), (narrow_windows, narrow_pages) = allocated
    assert 2 * narrow_windows == wide_windows
    assert narrow_pages == wide_pages


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_model_keeps_its_own_type(dtype: str) -> None:
    made = run_passes(capture_model(tiny_loaded("llama", dtype)), None, recipe(windows=HALF))
    assert made.plan.window_dtype is None
    assert made.plan.exact == getattr(torch, dtype)


def test_exact_is_the_model_s_type_unless_asked() -> None:
    assert compiled("llama", recipe()).plan.exact == torch.float32
    assert compiled("llama", recipe(windows=HALF)).plan.exact == torch.float16


def test_a_cache_that_does_not_grow_is_no_division_by_zero() -> None:
    plan = compiled("mistral", load_recipe("exact")).plan
    assert not plan.bytes_per_token()
    assert "does not grow" in _saved(plan)


def test_another_type_is_refused() -> None:
    with pytest.raises(RecipeError, match="dtype"):
        recipe(windows="windows: {dtype: int8}\n")
