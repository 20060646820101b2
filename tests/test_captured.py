"""Captured decode steps against the graph run operator by operator."""

import dataclasses
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, fx

from kvcc.frontend import capture as capture_model
from kvcc.kernels import cpu, reference
from kvcc.pipeline import run_passes
from kvcc.runtime.cache import Cache
from kvcc.runtime.captured import Attention, CapturedStep, capture
from kvcc.runtime.fuse import fuse
from kvcc.runtime.model import CompiledModel
from tests.compiled import recipe, runnable, running, tokens
from tests.tiny import ARCHITECTURES, shared_graph, tiny_loaded

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
EXACT = "[]"


def decoded(model: CompiledModel, prompts: list[list[int]], following: list[list[int]]) -> Tensor:
    """Logits of decode steps after the prompts, [steps, B, V]."""
    cache = model.new_cache(len(prompts))
    model.forward(prompts, cache)
    return torch.stack([model.forward([[t] for t in step], cache) for step in following])


def captured(model: CompiledModel) -> list[CapturedStep]:
    return [step for step in model.steps.values() if step is not None]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_steps_agree_with_the_plain_graph(name: str) -> None:
    plain = runnable(name, recipe(EXACT), reference)
    fast = dataclasses.replace(runnable(name, recipe(EXACT), cpu), steps={})
    fuse(fast.graph)
    prompts = tokens(37, 5, 21)
    following = [list(step) for step in zip(*tokens(40, 40, 40, seed=3))]
    expected, found = decoded(plain, prompts, following), decoded(fast, prompts, following)
    assert captured(fast), "the step was not captured"
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "passes",
    [
        "[kivi: {k_bits: 4, v_bits: 2, group_size: 8}]",
        "[think: {keep_ratio: 0.5}, kivi: {k_bits: 2, v_bits: 2, group_size: 8}]",
        "[think: {keep_ratio: 0.5, mean_correction: true}]",
        "[think: {keep_ratio: 0.5, mode: request}]",
    ],
)
def test_steps_agree_on_compressed_pages(passes: str) -> None:
    """Against the same kernels called by the plain graph; a code that rounds the other way moves few logits."""
    plain, fast = (runnable("llama", recipe(passes), cpu) for _ in range(2))
    plain.steps[(2, torch.get_num_threads())] = None
    fuse(fast.graph)
    prompts, following = tokens(30, 11), [list(step) for step in zip(*tokens(12, 12, seed=3))]
    expected, found = decoded(plain, prompts, following), decoded(fast, prompts, following)
    assert captured(fast)
    difference = (found - expected).abs()
    assert difference.mean() < 1e-3
    assert difference.max() < 0.1


def test_between_attentions_no_torch_operator_is_left() -> None:
    model = runnable("llama", recipe(), cpu)
    fuse(model.graph)
    decoded(model, tokens(5, 6, 7), [[1, 2, 3]])
    (step,) = captured(model)
    (records,) = [p for p in step.parts if isinstance(p, list) and any(isinstance(r, Attention) for r in p)]
    assert sum(isinstance(r, Attention) for r in records) == len(model.plan.layers)


def test_one_step_serves_several_caches_and_what_is_left_of_a_batch() -> None:
    model, plain = (runnable("llama", recipe(), cpu) for _ in range(2))
    fuse(model.graph)
    for rows in (1, 2):
        plain.steps[(rows, torch.get_num_threads())] = None
    logits = []
    for m in (model, plain):
        first, second = m.new_cache(2), m.new_cache(2)
        m.forward(tokens(30, 4), first)
        m.forward(tokens(3, 17, seed=1), second)
        got = [m.forward([[t], [t + 1]], cache) for t in range(20) for cache in (first, second)]
        first.keep([1])
        got += [m.forward([[t]], first) for t in range(20)]
        got += [m.forward([[t], [t]], second) for t in range(3)]
        logits.append(torch.cat(got))
    assert {rows for rows, _ in model.steps} == {1, 2}
    torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=2e-4)


def test_a_step_keeps_no_cache_alive() -> None:
    model = runnable("llama", recipe(), cpu)
    fuse(model.graph)
    caches = [model.new_cache() for _ in range(2)]
    for cache in caches:
        model.forward(tokens(30), cache)
        model.forward([[1]], cache)
    (step,) = captured(model)
    bound = {id(cache): step._bound[cache] for cache in caches}
    for cache in caches:  # in turn, without records made anew
        model.forward([[2]], cache)
        assert step._bound[cache] is bound[id(cache)]
    window = weakref.ref(caches[0].layers[0].window_k)
    del caches, cache, bound
    gc.collect()
    assert not step._bound
    assert window() is None


def test_threads_capture_a_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def slowly(module: fx.GraphModule, cache: Cache) -> CapturedStep:
        time.sleep(0.05)
        made.append(capture(module, cache))
        return made[-1]

    monkeypatch.setattr("kvcc.runtime.model.capture", slowly)
    model = runnable("llama", recipe(), cpu)
    fuse(model.graph)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda prompt: decoded(model, [prompt], [[1]]), tokens(5, 6, 7)))
    assert captured(model) == made
    assert len(made) == 1


def test_threads_may_decode_with_caches_of_their_own() -> None:
    model = runnable("llama", recipe(), cpu)
    fuse(model.graph)
    following = [[t] for t in range(30)]
    prompts = [[row] for row in tokens(9, 14, 30)]
    alone = [decoded(model, prompt, following) for prompt in prompts]
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda prompt: decoded(model, prompt, following), prompts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_a_step_returns_logits_of_its_own() -> None:
    model = runnable("llama", recipe(), cpu)
    cache = model.new_cache()
    model.forward(tokens(5), cache)
    first = model.forward([[1]], cache)
    kept = first.clone()
    model.forward([[2]], cache)
    assert torch.equal(first, kept)


def test_a_bfloat16_model_decodes_with_activations_in_float32() -> None:
    """The captured step lies nearer to the float32 model than the plain bfloat16 graph does."""
    found = {}
    half = capture_model(tiny_loaded("llama", "bfloat16"))
    graphs = {"float32": shared_graph("llama"), "bfloat16": half}
    for dtype, captures in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        made = run_passes(graphs[dtype], None, recipe())
        model = running("llama", made, backend=cpu)
        if captures:
            fuse(model.graph)
        else:
            model.steps[(2, torch.get_num_threads())] = None
        prompts, following = tokens(1, 1), [list(step) for step in zip(*tokens(19, 19, seed=3))]
        found[dtype, captures] = decoded(model, prompts, following)
        assert bool(captured(model)) == captures
    expected = found["float32", False]
    fast, plain = (
        (found["bfloat16", captures].float() - expected).abs().mean() for captures in (True, False)
    )
    assert found["bfloat16", True].dtype == torch.float32
    assert fast < plain


def test_biases_of_a_bfloat16_model_outlive_the_capture() -> None:
    """Widened ones belong to nobody else: freed, records would add whatever lies there now."""
    loaded = tiny_loaded("qwen2", "bfloat16")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in loaded.model.named_parameters():
            if name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    graph, logits = capture_model(loaded), []
    prompts, following = tokens(9, 5), [list(step) for step in zip(*tokens(6, 6, seed=3))]
    for captures in (False, True):
        model = running("qwen2", run_passes(graph, None, recipe()), backend=cpu)
        if captures:
            fuse(model.graph)
        else:
            model.steps[(2, torch.get_num_threads())] = None
        logits.append(decoded(model, prompts, following).float())
        assert bool(captured(model)) == captures
    torch.testing.assert_close(*logits, atol=0.05, rtol=0.05)
