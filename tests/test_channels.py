"""Elimination orders and budgets, against brute force."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcc.channels import allocate, by_score, eliminate, uniform


def _gamma(heads: int, size: int, seed: int) -> torch.Tensor:
    x = torch.randn(heads, size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.transpose(1, 2)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 1000))
def test_marginal_costs_add_up_to_the_joint_cost(heads: int, size: int, seed: int) -> None:
    gamma = _gamma(heads, size, seed)
    order, cost = eliminate(gamma)
    for head in range(heads):
        assert sorted(order[head].tolist()) == list(range(size))
        for n in range(1, size + 1):
            gone = order[head, :n]
            joint = gamma[head][gone][:, gone].sum()
            torch.testing.assert_close(cost[head, :n].sum(), joint)


def test_cancelling_channels_go_together() -> None:
    """Channels 0 and 1 are large but opposite: removing both costs nothing, which no independent score sees."""
    gamma = torch.diag(torch.tensor([10.0, 10.0, 1.0, 2.0]))[None]
    gamma[0, 0, 1] = gamma[0, 1, 0] = -10.0
    best = min(combinations(range(4), 2), key=lambda p: gamma[0][list(p)][:, list(p)].sum())
    assert set(best) == {0, 1}
    order, cost = eliminate(gamma)
    assert order[0].tolist()[:2] == [2, 3]  # greedy is not optimal here, but its costs are honest
    torch.testing.assert_close(cost.sum(), gamma.sum().double())


def test_scores_go_in_order() -> None:
    order, cost = by_score(torch.tensor([[3.0, 1.0, 2.0]]))
    assert order.tolist() == [[1, 2, 0]]
    assert cost.tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize(("ratio", "kept"), [(1.0, 64), (0.6, 38), (0.5, 32), (0.001, 1)])
def test_uniform_counts(ratio: float, kept: int) -> None:
    assert uniform(3, 64, ratio) == [kept] * 3


@given(st.integers(0, 200), st.floats(0.2, 1.0))
def test_a_global_budget_is_met_and_takes_the_cheapest(seed: int, ratio: float) -> None:
    costs = [
        torch.rand(2, 8, generator=torch.Generator().manual_seed(seed + i)).sort(-1).values for i in range(3)
    ]
    kept = allocate(costs, ratio)
    total = 3 * 2 * 8
    assert sum(map(sum, kept)) == max(int(ratio * total + 1e-9), 3 * 2)
    assert all(1 <= n <= 8 for layer in kept for n in layer)
    gone = [
        c for cost, layer in zip(costs, kept) for row, n in zip(cost, layer) for c in row[: 8 - n].tolist()
    ]
    left = [
        c for cost, layer in zip(costs, kept) for row, n in zip(cost, layer) for c in row[8 - n : 7].tolist()
    ]
    assert max(gone, default=0) <= min(left, default=1)


def test_cheap_heads_give_more() -> None:
    costs = [torch.tensor([[1.0] * 8, [100.0] * 8])]
    assert allocate(costs, 0.75) == [[4, 8]]
