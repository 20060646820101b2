"""Transform coding: bases, steps and bits against plain computations, and the pass through the real cache."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcc.calibration import PromptSet, TokenPrompt, calibrate
from kvcc.errors import PassError
from kvcc.graph import attention_nodes, attention_spec
from kvcc.kernels import cpu, reference, token_scales
from kvcc.kernels.levels import NORMAL
from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Backend
from kvcc.passes import pass_class
from kvcc.passes.transform import _allocated
from kvcc.pipeline import run_passes
from kvcc.profile import Profile
from kvcc.runtime.fuse import fuse
from kvcc.runtime.model import CompiledModel
from kvcc.transform_coding import (
    WIDTHS,
    Observed,
    basis_of,
    coder,
    damped,
    give_bits,
    hadamard,
    joint,
    shrunk,
    widened,
)
from tests.compiled import CPU, compiled, recipe, runnable, running, stepwise, tokens, transformers_logits
from tests.tiny import tiny_graph


def moments(seed: int, heads: int = 2, size: int = 16) -> tuple[Tensor, Tensor]:
    """A covariance and a metric, [heads, size, size] float64."""
    random = torch.Generator().manual_seed(seed)
    made = (torch.randn(heads, size, size, generator=random, dtype=torch.float64) for _ in range(2))
    covariance, metric = (m @ m.mT / size for m in made)
    return covariance, metric


@pytest.mark.parametrize("kind", ["native", "hadamard", "pca", "dual"])
def test_bases_invert_and_decorrelate(kind: str) -> None:
    covariance, metric = moments(0)
    forward, inverse = basis_of(kind, covariance, metric, seed=3)  # type: ignore[arg-type]
    eye = torch.eye(16, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(forward @ inverse, eye, atol=1e-6, rtol=0)
    if kind in ("pca", "dual"):
        turned = forward.mT @ covariance @ forward
        off = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
        assert off.abs().max() < 1e-6 * turned.abs().max()
    if kind == "dual":  # squared errors of channels add up under the metric
        torch.testing.assert_close(inverse @ metric @ inverse.mT, eye, atol=1e-5, rtol=0)


def test_joint_heads_share_a_basis_by_what_their_errors_cost() -> None:
    """Two heads that say the same need the channels of one, and what costs more comes first."""
    random = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4000, 8, generator=random)
    samples = torch.stack([one, one + 0.01 * other])
    metric = torch.eye(8, dtype=torch.float64) * torch.tensor([4.0, 1.0])[:, None, None]
    covariance = (samples.mT @ samples / 4000).double()
    side = joint(Observed(samples, torch.zeros(2, 8).double(), covariance, metric), 2)
    assert side.samples.shape == (1, 4000, 16)
    torch.testing.assert_close(side.metric[0], torch.block_diag(*metric))
    forward, inverse = basis_of("pca", side.covariance, side.metric, 0, joint_heads=2)
    torch.testing.assert_close(forward @ inverse, torch.eye(16, dtype=torch.float64)[None], atol=1e-9, rtol=0)
    turned = (side.samples.double() @ forward).square().mean(1)[0]
    assert turned[8:].sum() < 1e-3 * turned.sum()
    lost = (side.samples.double() @ forward[..., :8] @ inverse[:, :8] - side.samples).square().mean(1)[0]
    assert lost[:8].sum() < lost[8:].sum()  # the first head costs four times as much


@pytest.mark.parametrize("size", [8, 16, 24, 80])
def test_hadamard_is_orthogonal(size: int) -> None:
    matrix = hadamard(size, 1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


def test_steps_are_the_best_of_their_neighbourhood() -> None:
    random = torch.Generator().manual_seed(0)
    samples = torch.randn(1, 2000, 8, generator=random) * torch.tensor([9.0, 5, 3, 2, 1, 1, 0.5, 0.1])
    covariance = torch.diag_embed(samples.double().square().mean(1))
    identity = torch.eye(8, dtype=torch.float64)[None]
    seen = Observed(samples, torch.zeros(1, 8).double(), covariance, identity)
    found = coder(seen, "native", scaled=False, seed=0)
    x = samples.double() @ found.forward
    for width, bits in enumerate(WIDTHS):
        if not bits:
            torch.testing.assert_close(found.cost[..., 0], 0.5 * x.square().mean(1))
            continue
        errors = []
        for factor in (0.8, 1.0, 1.25):
            step = found.steps[..., width] * factor
            codes = (x / step[:, None]).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
            errors.append(0.5 * (codes * step[:, None] - x).square().mean(1))
        torch.testing.assert_close(errors[1], found.cost[..., width])
        assert (errors[1] <= torch.minimum(errors[0], errors[2])).all()


@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=7, max_size=7), min_size=1, max_size=3),
    st.integers(0, 30),
)
@settings(deadline=None)
def test_greedy_bits_are_the_best_of_their_price(ratios: list[list[float]], budget: int) -> None:
    """For convex curves no other choice costs less that leaves room for the largest jump, which may not fit."""
    curves = []
    for row in ratios:
        slopes = sorted(row, reverse=True)
        curve = [sum(slopes) * 8]
        for (low, high), slope in zip(itertools.pairwise(WIDTHS), slopes):
            curve.append(curve[-1] - slope * (high - low))
        curves.append(curve)
    (chosen,) = give_bits([torch.tensor(curves, dtype=torch.float64)], budget)
    cost = sum(curve[w] for curve, w in zip(curves, chosen.tolist()))
    assert sum(WIDTHS[w] for w in chosen.tolist()) <= budget
    for other in itertools.product(range(len(WIDTHS)), repeat=len(curves)):
        if sum(WIDTHS[w] for w in other) <= budget - 8:
            assert cost <= sum(curve[w] for curve, w in zip(curves, other)) + 1e-9


def test_token_scales_are_the_best_candidates() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(50, 24, generator=random) * torch.logspace(-1, 2, 50)[:, None]
    x[0] = 0
    half = torch.tensor([128.0] * 4 + [8.0] * 8 + [2.0] * 8 + [1.0] * 2 + [0.0] * 2)
    found = token_scales.token_scales(x, half)
    stored = half > 0

    def error(row: Tensor, code: int) -> float:
        scale = 2 ** ((code - 3) / 3)
        middles = (row / scale).floor().clamp(-half, half - 1) + 0.5
        return float(((middles * scale - row)[stored] ** 2).sum())

    for row, code in zip(x, found.tolist()):
        best = min(error(row, other) for other in range(16))
        assert error(row, code) <= best * (1 + 1e-5) + 1e-9


def test_token_scales_are_the_best_candidates_for_normal_levels() -> None:
    """Where some channels have levels, and others, too wide for them, steps."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(40, 24, generator=random) * torch.logspace(-1, 1, 40)[:, None]
    half = torch.tensor([16.0] * 8 + [4.0] * 8 + [1.0] * 8)
    at = [(3, half == 4), (1, half == 1)]

    def error(row: Tensor, code: int) -> float:
        scale = 2 ** ((code - 3) / 3)
        middles = (row[:8] / scale).floor().clamp(-16, 15) + 0.5
        total = float(((middles * scale - row[:8]) ** 2).sum())
        for some, bits in ((slice(8, 16), 3), (slice(16, 24), 1)):
            levels = torch.tensor([s * m for s in (-1, 1) for m in NORMAL[bits]]) * scale
            total += float((row[some][:, None] - levels).square().amin(1).sum())
        return total

    for row, code in zip(x, token_scales.token_scales(x, half, at).tolist()):
        best = min(error(row, other) for other in range(16))
        assert error(row, code) <= best * (1 + 1e-5) + 1e-9


def test_normal_levels_lose_what_is_known_of_them() -> None:
    """A normal variable on Lloyd and Max's levels: errors of 0.3634, 0.1175, 0.03454, 0.009497 (Max, 1960)."""
    random = torch.Generator().manual_seed(2)
    samples = torch.randn(1, 100_000, 8, generator=random)
    eye = torch.eye(8, dtype=torch.float64)[None]
    side = Observed(samples, torch.zeros(1, 8).double(), eye, eye)
    normal, uniform = (coder(side, "native", scaled=False, seed=0, levels=k) for k in ("normal", "uniform"))
    errors = 2 * normal.cost[0].mean(0)
    known = torch.tensor([1, 0.3634, 0.1175, 0.03454, 0.009497]).double()
    torch.testing.assert_close(errors[:5], known, rtol=0.02, atol=0)
    torch.testing.assert_close(normal.cost[..., 5:], uniform.cost[..., 5:])  # 5, 6 and 8 bits are steps
    assert (normal.cost[..., 2:5] < uniform.cost[..., 2:5]).all()


def test_damped_costs_keep_their_order_and_their_curves() -> None:
    cost = torch.tensor([[16.0, 4.0, 1.0], [1.0, 0.5, 0.25], [0.0, 0.0, 0.0]]).double()
    assert torch.equal(damped(cost, 0), cost)
    found = damped(cost, 0.25)
    torch.testing.assert_close(found[0], cost[0] / 2)
    torch.testing.assert_close(found[1:], cost[1:])


def test_bits_compete_where_they_are_told_to() -> None:
    """Errors in the second head cost 64 times as much, in the second layer's 1,000 times."""
    curve = torch.tensor([4.0**-w for w in WIDTHS]).expand(2, 6, -1)  # [H, groups, W]
    layer = curve * torch.tensor([1.0, 64.0])[:, None, None]
    costs = [layer, layer, 1000 * layer, 1000 * layer]
    bits = {
        scope: [sum(torch.tensor(WIDTHS)[side].sum(1) for side in found[i : i + 2]).tolist() for i in (0, 2)]
        for scope in ("model", "layer", "head")
        for found in [_allocated(costs, [48.0, 48.0], scope)]
    }
    assert bits["head"] == [[24, 24], [24, 24]]
    for heads in bits["layer"]:
        assert sum(heads) == 48
        assert heads[0] < heads[1]
    assert sum(bits["model"][0]) + sum(bits["model"][1]) == 96
    assert sum(bits["model"][0]) < sum(bits["model"][1])


@pytest.fixture(scope="module")
def profile() -> Profile:
    texts = tokens(*(150, 140, 130) * 2, seed=7)
    prompts = tuple(TokenPrompt(tuple(ids), str(i)) for i, ids in enumerate(texts))
    sets = [PromptSet("random", "sha256:0", 7, prompts)]
    return calibrate(tiny_graph("llama"), sets, skip_first=2, gradients=True)


def model_of(profile: Profile, options: str, backend: Backend = reference) -> CompiledModel:
    made = run_passes(tiny_graph("llama"), profile, recipe(f"\n  - transform: {{{options}}}"))
    return running("llama", replace(made, module=fuse(made.module)), backend=backend)


@pytest.mark.parametrize(
    "options",
    [
        "",
        ", k_basis: pca, v_basis: hadamard",
        ", heads: shared",
        ", page_means: false",
        ", joint_heads: 2",
        ", joint_heads: 2, k_basis: pca, v_basis: native, heads: shared",
        ", allocation: head, levels: normal",
    ],
)
def test_eight_bits_are_nearly_the_model(profile: Profile, options: str) -> None:
    (row,) = tokens(60)
    (found,) = stepwise(model_of(profile, f"bits: 9, spread: 0{options}"), [row], [20, 33, 47])
    # 32 channels side by side have steps from 800 tokens, most of which weigh little.
    atol = 0.1 if "joint_heads" in options else 0.05
    torch.testing.assert_close(found, transformers_logits("llama", row), atol=atol, rtol=0.05)


def test_a_byte_less_costs_more(profile: Profile) -> None:
    """On average, over random text: 8, 4 and 1 bits."""
    rows = tokens(60, 60, 60)
    expected = [transformers_logits("llama", row) for row in rows]
    losses = []
    for bits in (8, 4, 1):
        found = stepwise(model_of(profile, f"bits: {bits}"), rows, [30, 45])
        losses.append(sum(float((f - e).square().mean()) for f, e in zip(found, expected)))
    assert losses == sorted(losses)
    assert losses[0] < losses[2] / 10


@pytest.mark.parametrize("bits", [1, 2.5, 6])
@pytest.mark.parametrize("extras", ["true", "false"])
def test_plans_keep_to_the_bits_asked_for(profile: Profile, bits: float, extras: str) -> None:
    plan = model_of(profile, f"bits: {bits}, token_scales: {extras}, page_means: {extras}").plan
    # Planes of tiny heads and pages fill whole lines of 16 bytes.
    sides = [(h.k, h.v) for layer in plan.layers for h in layer.heads]
    stored = sum(p.bits * p.channels for pair in sides for side in pair for p in side.planes)
    stored += sum(4 * side.token_scales for pair in sides for side in pair)
    stored += sum(8 * h.k.page_means // layer.page for layer in plan.layers for h in layer.heads)
    elements = sum(layer.exact_elements for layer in plan.layers)
    assert bits - 8 * 8 / elements <= stored / elements <= bits


def test_what_keys_of_a_page_have_in_common_is_kept(profile: Profile) -> None:
    """Even of channels that get no bits: keys of a page that differ in nothing come back."""
    model = model_of(profile, "bits: 0.75, token_scales: false")
    layer = model.plan.layers[0]
    layout = layer.layout(torch.float16)
    assert layout is not None
    assert layer.heads[0].k.page_means == layout.k_channels == 16
    assert sum(plane.channels for plane in layer.heads[0].k.planes) < 16
    k, mean = (model.tables[f"layers.0.{name}"] for name in ("k_basis", "k_mean"))
    keys = (profile.page_samples(0)[:, 0] - mean)[:, None] @ k  # [H, 1, C]
    pool = PagePool(layout.nbytes, CPU)
    pages = torch.tensor(pool.take(1))
    v = torch.zeros(1, layer.kv_heads, layer.page, layout.v_channels)
    reference.seal(layout, keys[None].expand(-1, -1, layer.page, -1), v, pool, pages)
    back, _ = reference.unseal(layout, pool.read(pages))
    widths = [[p.bits for p in h.k.planes for _ in range(p.channels)] for h in layer.heads]
    steps = torch.tensor([[2.0 ** (w[c] if c < len(w) else 0) / 16 for c in range(16)] for w in widths])
    codes_off = 0.5 * (steps * 16 > 1)  # a mean removed leaves 0, which lies between two codes
    assert ((back[0] - keys).abs() <= (steps / 2 + codes_off)[:, None] + 1e-5).all()


def test_too_few_bits_for_page_means(profile: Profile) -> None:
    with pytest.raises(PassError, match=r"0\.5 bits do not hold page_means and token_scales"):
        model_of(profile, "bits: 0.5")


@pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
@pytest.mark.parametrize(
    "options",
    [
        "bits: 3",
        "bits: 3, page_means: false",
        "bits: 3, token_scales: false, heads: shared",
        "bits: 3, joint_heads: 2",
        "bits: 3, levels: normal",
    ],
)
def test_captured_steps_and_kernels_agree_with_the_reference(profile: Profile, options: str) -> None:
    rows = tokens(33, 50, seed=4)
    found, expected = (stepwise(model_of(profile, options, b), rows, range(20, 50)) for b in (cpu, reference))
    for ours, theirs in zip(found, expected):
        difference = (ours - theirs).abs()
        assert difference.mean() < 1e-3  # a code that rounds the other way moves few logits


@pytest.mark.parametrize("text", ["one token", "two tokens", "loud"])
def test_no_text_breaks_the_model(profile: Profile, text: str) -> None:
    """What calibration never saw: repeats, and keys and values far beyond every range."""
    model = model_of(profile, "bits: 2")
    row = [5] * 100 if text == "one token" else [5, 9] * 50
    if text == "loud":
        for table in model.tables.values():
            table.mul_(1000)
    logits = stepwise(model, [row], range(40, 100))[0]
    assert logits.isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_joint_heads_are_exact_where_nothing_is_sealed(architecture: str) -> None:
    """GQA and MHA: wide heads with zeros elsewhere, and values that come back by tables."""
    (row,) = tokens(40)
    options = "{bits: 8, joint_heads: 2, k_basis: native, metric: output}"
    chosen = recipe(f"\n  - transform: {options}", "windows: {sinks: 2, recent: 64, page: 8}\n")
    model = runnable(architecture, chosen)
    heads = attention_spec(attention_nodes(tiny_graph(architecture).module)[0]).kv_heads
    assert model.plan.layers[0].kv_heads == heads // 2
    (found,) = stepwise(model, [row], [20, 33])
    torch.testing.assert_close(found, transformers_logits(architecture, row), atol=1e-4, rtol=1e-4)


def test_joint_heads_must_divide() -> None:
    with pytest.raises(PassError, match=r"layer 0: joint_heads 3 does not divide 2 KV heads; use 1, 2"):
        compiled("llama", recipe("\n  - transform: {joint_heads: 3, metric: output}"))


def test_fisher_needs_gradients() -> None:
    with pytest.raises(PassError, match="kvcc calibrate --gradients"):
        compiled("llama", recipe("\n  - transform: {metric: fisher}"))
    assert runnable("llama", recipe("\n  - transform: {bits: 4}")).plan.layers[0].select == "basis"


def test_widened_statistics_have_the_variance_added_everywhere() -> None:
    """Covariance and samples alike, by a share of the mean variance of a head."""
    covariance, metric = moments(4)
    root = torch.linalg.cholesky(covariance)
    made = (
        torch.randn(2, 20000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ root.mT
    )
    side = Observed(made.float(), torch.zeros(2, 16).double(), covariance, metric)
    wide = widened(side, 0.3, seed=1)
    added = 0.3 * covariance.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(16)
    torch.testing.assert_close(wide.covariance, covariance + added)
    seen = (wide.samples.mT @ wide.samples / 20000).double()
    torch.testing.assert_close(seen, wide.covariance, atol=0.1, rtol=0.05)
    assert torch.equal(widened(side, 0.3, seed=1).samples, wide.samples)
    assert torch.equal(widened(side, 0.0, seed=1).samples, side.samples)


def test_shrinkage_keeps_the_trace() -> None:
    _, metric = moments(1)
    for share in (0.0, 0.3, 1.0):
        drawn = shrunk(metric, share).diagonal(dim1=1, dim2=2).sum(-1)
        torch.testing.assert_close(drawn, metric.diagonal(dim1=1, dim2=2).sum(-1))


def test_hadamard_pass_is_exact_up_to_its_codes() -> None:
    """With 8 bits; and its tables are orthogonal, so that queries meet what keys became."""
    model = runnable("llama", recipe("\n  - hadamard: {k_bits: 8, v_bits: 8, group_size: 16}"))
    (row,) = tokens(50)
    (found,) = stepwise(model, [row], [20, 30])
    torch.testing.assert_close(found, transformers_logits("llama", row), atol=0.03, rtol=0.03)
    keys, queries = (model.tables[f"layers.0.{name}"] for name in ("k_basis", "q_basis"))
    torch.testing.assert_close(keys @ queries.mT, torch.eye(16).expand_as(keys), atol=1e-5, rtol=0)


def test_kitty_boosts_the_channels_that_matter() -> None:
    found = compiled("llama", recipe("\n  - kitty: {boosted: 0.25, group_size: 8}"))
    layer = found.plan.layers[0]
    assert [(p.bits, p.channels) for p in layer.heads[0].k.planes] == [(4, 4), (2, 12)]
    order = found.tables["layers.0.k_channels"]
    from tests.compiled import tiny_profile

    score = tiny_profile("llama").think_score(0)
    assert (
        score.gather(-1, order[:, :4]).min(-1).values >= score.gather(-1, order[:, 4:]).max(-1).values
    ).all()


def test_registered() -> None:
    assert [pass_class(name).name for name in ("transform", "hadamard", "kitty")] == [
        "transform",
        "hadamard",
        "kitty",
    ]
