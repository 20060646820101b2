"""Tokens weighed by what errors in them cost: sums and races against plain loops, and what coders make of weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcc import statistics, weighed
from kvcc.profile import Profile
from kvcc.statistics import LayerStatistics, add_gradients, merged
from kvcc.transform_coding import Observed, coder, joint
from kvcc.weighed import PLAIN, weighed_keys, weighed_values
from tests.test_profile import GQA, SKIP, measured, prompt, tiny_profile

LENGTHS = (SKIP + 90, SKIP + 1, SKIP + 64)
Body = tuple[Tensor, Tensor, Tensor, Tensor]


def bodies() -> list[Body]:
    """k, v and gradients of a few prompts' body tokens; errors cost a hundred times as much in every tenth token."""
    found = []
    for seed, length in enumerate(LENGTHS):
        _, k, v = prompt(GQA, length, seed)
        random = torch.Generator().manual_seed(100 + seed)
        loud = torch.where(torch.arange(length - SKIP) % 10 == 0, 10.0, 1.0)[:, None]
        grads = [torch.randn(x[:, SKIP:].shape, generator=random) * loud for x in (k, v)]
        found.append((k[:, SKIP:], v[:, SKIP:], *grads))
    return found  # type: ignore[return-value]


def added(parts: list[Body], seeds: list[int]) -> LayerStatistics:
    held = statistics.empty(GQA)
    for part, seed in zip(parts, seeds):
        add_gradients(held, *part, torch.Generator().manual_seed(seed))
    return held


def profile_of(gradients: LayerStatistics) -> Profile:
    plain = measured(GQA, [prompt(GQA, length, seed) for seed, length in enumerate(LENGTHS)])
    layer = merged(plain, gradients)
    return replace(tiny_profile([]), shapes=(GQA,), layers=(layer,))


def by_cost(x: list[Tensor], g: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean [H, D] and second moment [H, D, D] of tokens that weigh |g|², a token at a time."""
    heads, size = x[0].shape[0], x[0].shape[2]
    first, second = torch.zeros(heads, size).double(), torch.zeros(heads, size, size).double()
    total = torch.zeros(heads).double()
    for values, grads in zip(x, g):
        for head in range(heads):
            for value, grad in zip(values[head].double(), grads[head].double()):
                cost = float((grad * grad).sum())
                first[head] += cost * value
                second[head] += cost * torch.outer(value, value)
                total[head] += cost
    return first / total[:, None], second / total[:, None, None]


def covariance(mean: Tensor, second: Tensor) -> Tensor:
    return second - mean[:, :, None] * mean[:, None]


def test_moments_are_those_of_tokens_that_weigh_their_cost() -> None:
    parts = bodies()
    profile = profile_of(added(parts, [0, 1, 2]))
    k, v, gk, gv = (list(column) for column in zip(*parts))

    mean, second = by_cost(v, gv)
    mean = PLAIN * profile.v_mean(0) + (1 - PLAIN) * mean
    second = PLAIN * profile.vv(0) + (1 - PLAIN) * second
    found = weighed_values(profile, 0, centred=True)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance, covariance(mean, second))
    about_zero = weighed_values(profile, 0, centred=False)
    assert not about_zero.mean.any()
    torch.testing.assert_close(about_zero.covariance, second)

    mean, second = by_cost(k, gk)
    mean = PLAIN * profile.k_mean(0) + (1 - PLAIN) * mean
    second = PLAIN * profile.kk(0) + (1 - PLAIN) * second
    found = weighed_keys(profile, 0, within_pages=False)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance, covariance(mean, second))

    within = [torch.cat([p - p.mean(1, keepdim=True) for p in x.double().split(64, 1)], 1) for x in k]
    _, second = by_cost(within, gk)
    found = weighed_keys(profile, 0, within_pages=True)
    torch.testing.assert_close(found.mean, profile.k_mean(0))
    torch.testing.assert_close(found.covariance, PLAIN * profile.k_page_cov(0) + (1 - PLAIN) * second)


def test_samples_stand_for_the_same_tokens_as_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many races: weighted samples have the weighted mean and spread, of keys and of values, in every head."""
    monkeypatch.setattr(statistics, "SAMPLED", 40_000)
    monkeypatch.setattr(weighed, "PLAIN", 0.0)
    profile = profile_of(added(bodies(), [0, 1, 2]))
    for centred, found in (
        (True, weighed_values(profile, 0, centred=True)),
        (False, weighed_keys(profile, 0, within_pages=True)),
        (True, weighed_keys(profile, 0, within_pages=False)),
    ):
        torch.testing.assert_close(found.weights.mean(1), torch.ones(2).double())
        x = found.samples.double() - found.mean[:, None]
        spread = found.covariance.diagonal(dim1=1, dim2=2)
        if centred:
            assert (x.mul(found.weights[..., None]).mean(1).abs() < 0.05 * spread.sqrt()).all()
        second = (found.weights[..., None] * x.square()).mean(1)
        torch.testing.assert_close(second, spread, rtol=0.05, atol=0)


def test_races_are_won_by_the_same_tokens_in_whatever_parts_they_are_run() -> None:
    parts = bodies()
    whole = added(parts, [5, 6, 7])
    alone = [added([part], [seed]) for part, seed in zip(parts, (5, 6, 7))]
    for order in ((0, 1, 2), (2, 0, 1)):
        found = statistics.empty(GQA)
        for i in order:
            found = merged(found, alone[i])
        for name in ("races", "k_won", "k_page_won", "v_won", "k_won_weight", "v_won_weight"):
            assert torch.equal(getattr(found, name), getattr(whole, name))
        torch.testing.assert_close(found.kk_cost_sum, whole.kk_cost_sum)


def test_a_head_that_nobody_reads_counts_as_it_comes() -> None:
    parts = bodies()
    for part in parts:
        part[2][1] = 0.0  # gradients at the second head's keys
    profile = profile_of(added(parts, [0, 1, 2]))
    found = weighed_keys(profile, 0, within_pages=False)
    torch.testing.assert_close(found.mean[1], profile.k_mean(0)[1])
    torch.testing.assert_close(found.covariance[1], profile.k_cov(0)[1])
    assert found.weights.isfinite().all()
    assert (found.weights[1] > 0).any()


def test_without_any_gradient_nothing_is_drawn() -> None:
    parts: list[Body] = [(k, v, gk * 0, gv * 0) for k, v, gk, gv in bodies()]
    profile = profile_of(added(parts, [0, 1, 2]))
    found = weighed_values(profile, 0, centred=True)
    assert found.samples.shape[1] == profile.body_tokens(0)
    torch.testing.assert_close(found.weights, torch.ones_like(found.weights))


def test_coders_follow_weights() -> None:
    """Tokens without weight might as well not be there."""
    random = torch.Generator().manual_seed(0)
    seen, unseen = torch.randn(2, 300, 16, generator=random), 20 * torch.randn(2, 500, 16, generator=random)
    covariance = torch.diag_embed(torch.rand(2, 16, generator=random).double() + 0.5)
    plain = Observed(seen, torch.zeros(2, 16).double(), covariance, covariance.flip(-1, -2))
    weights = torch.cat([torch.ones(2, 300), torch.zeros(2, 500)], 1) * 800 / 300
    both = replace(plain, samples=torch.cat([seen, unseen], 1), weights=weights)
    for heads in (1, 2):
        expected = coder(joint(plain, heads), "dual", scaled=True, seed=0, joint_heads=heads)
        found = coder(joint(both, heads), "dual", scaled=True, seed=0, joint_heads=heads)
        torch.testing.assert_close(found.cost, expected.cost)
        torch.testing.assert_close(found.steps, expected.steps)


def test_joint_samples_weigh_what_errors_in_all_heads_cost() -> None:
    random = torch.Generator().manual_seed(1)
    metric = torch.stack([torch.eye(4), 3 * torch.eye(4)]).double()
    weights = torch.rand(2, 50, generator=random)
    side = Observed(
        torch.randn(2, 50, 4, generator=random), torch.zeros(2, 4).double(), metric, metric,
        weights / weights.mean(1, keepdim=True),
    )  # fmt: skip
    found = joint(side, 2)
    assert side.weights is not None
    assert found.weights is not None
    expected = (side.weights[0] + 3 * side.weights[1]) / 4
    torch.testing.assert_close(found.weights[0], expected.double())
    x = torch.cat([side.samples[0], side.samples[1]], -1).double()
    torch.testing.assert_close(found.covariance[0], (x * expected[:, None]).mT @ x / 50)
