"""Which channels to keep: scores, elimination order, and how many each KV head gets."""

import torch
from torch import Tensor


def eliminate(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Backward elimination of channels whose joint removal costs 1ᵀ Γ_PP 1.

    gamma: [H, D, D] symmetric. Returns (order [H, D] int64, the channel that goes first at index 0; cost [H, D]
    float64, the marginal cost of each removal in that order). Off-diagonals let pairs of channels that cancel
    each other go together.
    """
    heads, size, _ = gamma.shape
    gamma = gamma.double()
    marginal = gamma.diagonal(dim1=1, dim2=2).clone()
    order = torch.empty(heads, size, dtype=torch.int64)
    cost = torch.empty(heads, size, dtype=torch.float64)
    rows = torch.arange(heads)
    for step in range(size):
        least = marginal.argmin(-1)
        order[:, step] = least
        cost[:, step] = marginal[rows, least]
        marginal += 2 * gamma[rows, least]
        marginal[rows, least] = torch.inf
    return order, cost


def by_score(score: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `eliminate` for independent channels: `score` [H, D], the least goes first."""
    cost, order = score.double().sort(-1)
    return order, cost


def uniform(heads: int, size: int, keep_ratio: float) -> list[int]:
    """Channels kept per head: every head the same, floor(keep_ratio * size) but at least one."""
    return [max(1, int(keep_ratio * size + 1e-9))] * heads


def allocate(costs: list[Tensor], keep_ratio: float, floor: float = 0.125) -> list[list[int]]:
    """Channels kept per layer and head when all heads compete for one budget.

    costs: per layer [H, D] marginal costs in elimination order. The cheapest removals of the whole model are made,
    but every head keeps at least `floor` of its channels. A head's curve is made non-decreasing first, so that a
    removal is never taken before the one it depends on.
    """
    curves = [c.cummax(-1).values for c in costs]
    flat: list[tuple[float, int, int]] = []
    for layer, curve in enumerate(curves):
        heads, size = curve.shape
        for head in range(heads):
            removable = size - max(1, int(floor * size))
            flat.extend((float(curve[head, i]), layer, head) for i in range(removable))
    total = sum(c.numel() for c in curves)
    removals = min(len(flat), total - int(keep_ratio * total + 1e-9))
    kept = [[c.shape[1]] * c.shape[0] for c in curves]
    for _, layer, head in sorted(flat)[:removals]:
        kept[layer][head] -= 1
    return kept
