"""Transform coding of cached keys and values: bases, steps, and bits given to channels by what their errors cost.

The cost of an error δ in a token's key or value is ½ δᵀ M δ nats, M the metric: the Fisher information where the
profile has gradients (kvcc.sensitivity). A basis decorrelates channels; each channel then gets the step at which codes
of some width lose least, measured on sampled tokens; and widths go where a bit gains most (greedy marginal gain, which
is exact for convex curves; Shoham & Gersho, 1988). Everything is float64 and by KV head.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvcc.kernels.levels import Levels, nearest, span, unit_levels, values_of

Basis = Literal["native", "hadamard", "pca", "dual"]
GridLevels = Literal["uniform", "normal"]

WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8)
QUANTUM = 8  # channels that share a width: what a packed run of values must be a multiple of
RANGES = 1.5 * 1.11 ** torch.arange(32).double()  # candidates for all steps together, in deviations
COARSE = 4  # of which one in so many is tried first


@dataclass(frozen=True)
class Coder:
    """One side (K or V) of a layer in its basis: x' = (x - mean) @ forward, x = x' @ inverse + mean.

    Channels are in order of falling cost. steps and cost are for each of WIDTHS.
    """

    mean: Tensor  # [H, D]
    forward: Tensor  # [H, D, D]
    inverse: Tensor  # [H, D, D]
    steps: Tensor  # [H, D, W]
    cost: Tensor  # [H, D, W] nats a token


def basis_of(
    kind: Basis, covariance: Tensor, metric: Tensor, seed: int, joint_heads: int = 1
) -> tuple[Tensor, Tensor]:
    """forward, inverse [H, D, D]. `dual`: uncorrelated channels whose errors add up under the metric, too.

    `pca` of `joint_heads` heads side by side weighs each of them by what its errors cost on average.
    """
    heads, size, _ = covariance.shape
    if kind == "pca":
        cost = metric.diagonal(dim1=1, dim2=2).unflatten(1, (joint_heads, -1)).mean(-1)
        weight = (cost / cost.mean(-1, keepdim=True)).clamp_min(1e-9).sqrt()
        weight = weight.repeat_interleave(size // joint_heads, 1)  # [H, D], 1 for one head
        turn = torch.linalg.eigh(weight[..., None] * covariance * weight[:, None]).eigenvectors.flip(-1)
        return weight[..., None] * turn, turn.mT / weight[:, None]
    if kind == "dual":
        root, back = _power(metric, 0.5), _power(metric, -0.5)
        turn = torch.linalg.eigh(root @ covariance @ root).eigenvectors.flip(-1)
        return root @ turn, turn.mT @ back
    one = hadamard(size, seed) if kind == "hadamard" else torch.eye(size, dtype=torch.float64)
    forward = one.expand(heads, -1, -1)
    return forward, forward.mT


def _power(metric: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(1e-9 * values.amax(-1, keepdim=True))
    return vectors * values.pow(exponent)[:, None] @ vectors.mT


def shrunk(metric: Tensor, share: float) -> Tensor:
    """A metric [H, D, D] drawn towards a multiple of the identity, against what few tokens make of it."""
    mean = metric.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    return (1 - share) * metric + share * mean * torch.eye(metric.shape[-1], dtype=metric.dtype)


@dataclass(frozen=True)
class Observed:
    """What calibration saw of one side of a layer: samples [H, S, D], mean [H, D], covariance and metric [H, D, D].

    `weights` [H, S] of the samples, of mean 1; None: all alike.
    """

    samples: Tensor
    mean: Tensor
    covariance: Tensor
    metric: Tensor
    weights: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Weights [H, S, 1], float64."""
        if self.weights is None:
            return torch.ones(*self.samples.shape[:2], 1, dtype=torch.float64)
        return self.weights[..., None].double()


def widened(side: Observed, spread: float, seed: int) -> Observed:
    """What text unlike the calibration's may show: all directions vary by `spread` of a head's mean variance more.

    Directions that calibration found empty get steps and, where they cost much, bits. Samples are moved at random.
    """
    size = side.covariance.shape[-1]
    variance = spread * side.covariance.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    noise = torch.randn(side.samples.shape, generator=torch.Generator().manual_seed(seed))
    samples = side.samples + noise * variance.sqrt().to(noise.dtype)
    covariance = side.covariance + variance * torch.eye(size, dtype=variance.dtype)
    return replace(side, samples=samples, covariance=covariance)


def joint(side: Observed, count: int) -> Observed:
    """The same of every `count` heads side by side, [H / count, ..., count * D].

    Statistics hold no covariances between heads, so these come from the samples; errors of different heads are
    taken to cost what they cost alone, and a sample weighs what errors in all its heads cost.
    """
    if count == 1:
        return side
    samples = side.samples.unflatten(0, (-1, count)).transpose(1, 2).flatten(2)
    mean = side.mean.unflatten(0, (-1, count)).flatten(1)
    cost = side.metric.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None].clamp_min(1e-30)
    weights = (side.weight * cost).unflatten(0, (-1, count)).sum(1)[..., 0]
    found = Observed(
        samples,
        mean,
        _blocks(side.metric, count),
        _blocks(side.metric, count),
        weights / weights.mean(1, keepdim=True),
    )
    x = samples.double() - mean[:, None]
    return replace(found, covariance=x.mT @ (x * found.weight) / max(1, x.shape[1]))


def _blocks(matrices: Tensor, count: int) -> Tensor:
    """Block-diagonal matrices [H / count, count * D, count * D] of [H, D, D]."""
    return torch.stack([torch.block_diag(*some) for some in matrices.unflatten(0, (-1, count))])


def coder(
    side: Observed,
    kind: Basis,
    *,
    scaled: bool,
    seed: int,
    joint_heads: int = 1,
    levels: GridLevels = "uniform",
) -> Coder:
    """Fit one side of a layer. `scaled`: tokens will have scales of their own."""
    samples, mean, metric, share = side.samples, side.mean, side.metric, side.weight
    forward, inverse = basis_of(kind, side.covariance, metric, seed, joint_heads)
    x = (samples.double() - mean[:, None]) @ forward
    weight = torch.einsum("hcd,hde,hce->hc", inverse, metric, inverse)  # of a channel's squared error
    order = (weight * (share * x.square()).mean(1)).argsort(-1, descending=True)
    forward = forward.gather(-1, order[:, None].expand_as(forward))
    inverse = inverse.gather(1, order[..., None].expand_as(inverse))
    x, weight = x.gather(-1, order[:, None].expand_as(x)), weight.gather(-1, order)
    scale = _scales(x, share) if scaled else torch.ones_like(x[..., :1])
    steps, error = _steps(x / scale, share, scale, levels)
    return Coder(mean, forward, inverse, steps, 0.5 * weight[..., None] * error)


def _scales(x: Tensor, share: Tensor) -> Tensor:
    """Scales [H, S, 1] that tokens x [H, S, D] will have, before steps are known: by their size in deviations."""
    deviation = (share * x.square()).mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    return (x / deviation).square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


def _steps(x: Tensor, share: Tensor, scale: Tensor, levels: GridLevels) -> tuple[Tensor, Tensor]:
    """Best steps of x [H, S, D], tokens weighing `share` [H, S, 1], for every width, and the mean squared error of
    x * scale with them: [H, D, W] each.
    """
    deviation = (share * x.square()).mean(1).sqrt().clamp_min(1e-12)
    weight = share * scale.square()
    steps, errors = [deviation], [(x.square() * weight).mean(1)]
    for bits in WIDTHS[1:]:
        best, chosen = torch.full_like(deviation, torch.inf), torch.zeros_like(deviation, dtype=torch.int64)
        coarse = [torch.full_like(chosen, index) for index in range(COARSE // 2, len(RANGES), COARSE)]
        own = unit_levels(levels, bits)
        best, chosen = _better(x, weight, deviation, own, bits, coarse, best, chosen)
        near = [(chosen + away).clamp(0, len(RANGES) - 1) for away in range(1 - COARSE, COARSE) if away]
        best, chosen = _better(x, weight, deviation, own, bits, near, best, chosen)
        steps.append(RANGES[chosen] * deviation / span(own, bits))
        errors.append(best)
    return torch.stack(steps, -1), torch.stack(errors, -1)


def _rounded(x: Tensor, levels: Levels, bits: int) -> Tensor:
    """x at the nearest of what codes stand for, in steps."""
    if levels == "normal":
        return values_of(nearest(x, levels, bits), levels, bits).to(x.dtype)
    half = 2.0 ** (bits - 1)
    return x.floor().clamp(-half, half - 1) + 0.5


def _better(
    x: Tensor,
    weight: Tensor,
    deviation: Tensor,
    levels: Levels,
    bits: int,
    ranges: list[Tensor],
    best: Tensor,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:
    """The least errors [H, D] and the ranges that have them, of those known and of `ranges`, indices into RANGES."""
    for index in ranges:
        step = (RANGES[index] * deviation / span(levels, bits))[:, None]
        error = ((_rounded(x / step, levels, bits) * step - x).square() * weight).mean(1)
        chosen = torch.where(error < best, index, chosen)
        best = torch.minimum(error, best)
    return best, chosen


def damped(cost: Tensor, share: float) -> Tensor:
    """Costs [..., W] of groups of channels, differences between groups shrunk by `share` on a logarithmic scale.

    What a group costs is known from few tokens, and other text has it differ by a factor; what seems to cost most was
    mostly overrated. So a group's costs are divided by the `share`-th power of what it costs without bits.
    """
    return cost / cost[..., :1].clamp_min(torch.finfo(cost.dtype).tiny) ** share


def give_bits(costs: Sequence[Tensor], budget: float) -> list[Tensor]:
    """Widths, as indices into WIDTHS, of groups of channels; costs: [groups, W] tensors, one a side of a layer.

    `budget` counts bits times groups. What gains most per bit comes first; jumps over widths that never pay count.
    """
    tables = [cost.tolist() for cost in costs]
    chosen = [[0] * len(table) for table in tables]
    heap: list[tuple[float, int, int, int]] = []

    def offer(table: int, group: int) -> None:
        now, curve = chosen[table][group], tables[table][group]
        gains = [
            ((curve[now] - curve[w]) / (WIDTHS[w] - WIDTHS[now]), -w) for w in range(now + 1, len(WIDTHS))
        ]
        if gains and max(gains)[0] > 0:
            gain, width = max(gains)
            heapq.heappush(heap, (-gain, table, group, -width))

    for table, rows in enumerate(tables):
        for group in range(len(rows)):
            offer(table, group)
    left = budget
    while heap:
        _, table, group, width = heapq.heappop(heap)
        price = WIDTHS[width] - WIDTHS[chosen[table][group]]
        if price > left:
            continue  # something cheaper may still fit
        left -= price
        chosen[table][group] = width
        offer(table, group)
    return [torch.tensor(rows) for rows in chosen]


def hadamard(size: int, seed: int) -> Tensor:
    """A randomised orthogonal Hadamard matrix [size, size], float64; size = 2^n times an odd factor.

    The odd factor takes a random orthogonal block (there is no Hadamard matrix of most odd orders).
    """
    generator = torch.Generator().manual_seed(seed)
    odd = size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        odd //= 2
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0) / 2**0.5
    if odd > 1:
        block = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator)).Q
        matrix = torch.kron(matrix.contiguous(), block.contiguous())
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return matrix * signs[:, None]
