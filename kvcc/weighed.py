"""Keys and values of a profile, tokens weighed by what errors in them cost.

Attention looks at few tokens, and at these again and again: a quantiser that is fitted to all tokens alike is fitted to
those that nobody reads. An error in a token costs in proportion to the square of its gradient (kvcc.sensitivity), so
tokens weigh that much in means, covariances and samples; a share of each is of all tokens alike, as a guard.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcc.profile import Profile, covariance
from kvcc.statistics import LayerStatistics

PLAIN = 0.03  # share of the weight that tokens have without regard to cost


@dataclass(frozen=True)
class Weighed:
    """Keys or values of one layer: samples [H, S, D], their weights [H, S] of mean 1, and moments of all tokens."""

    samples: Tensor
    weights: Tensor
    mean: Tensor  # [H, D]
    covariance: Tensor  # [H, D, D]


def weighed_keys(profile: Profile, layer: int, *, within_pages: bool) -> Weighed:
    """Keys of a layer; `within_pages`: less the means of their pages, plus the mean of all. Needs gradients."""
    held, mean = profile.layers[layer], profile.k_mean(layer)
    total = _trace(held.k_grad)
    plain, won = profile.samples(layer)[0], held.k_won.transpose(0, 1)
    if within_pages:
        plain = plain - profile.page_samples(layer) + mean[:, None]
        won = won - held.k_page_won.transpose(0, 1) + mean[:, None]
        spread = _mixed(profile.k_page_cov(layer), held.k_page_cost_sum, total)
    else:
        mean = _mixed(mean, held.k_cost_sum, total)
        spread = covariance(_mixed(profile.kk(layer), held.kk_cost_sum, total), mean)
    return Weighed(*_samples(held, plain, won, held.k_won_weight), mean, spread)


def weighed_values(profile: Profile, layer: int, *, centred: bool) -> Weighed:
    """Values of a layer; not `centred`: moments about 0. Needs gradients."""
    held, total = profile.layers[layer], _trace(profile.layers[layer].v_grad)
    mean = _mixed(profile.v_mean(layer), held.v_cost_sum, total) * centred
    spread = covariance(_mixed(profile.vv(layer), held.vv_cost_sum, total), mean)
    plain, won = profile.samples(layer)[1], held.v_won.transpose(0, 1)
    return Weighed(*_samples(held, plain, won, held.v_won_weight), mean, spread)


def _samples(held: LayerStatistics, plain: Tensor, won: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that won races, and some of all [H, S, D], with weights [H, S] of mean 1."""
    run = held.races.isfinite()
    share = PLAIN if bool(run.any()) else 1.0
    some = plain[:, : max(1, int(share * plain.shape[1]))]
    by_cost = weight[run].mT.double()
    by_cost = (1 - share) * by_cost / by_cost.sum(1, keepdim=True).clamp_min(_TINY)
    alike = torch.full(some.shape[:2], share / some.shape[1], dtype=torch.float64)
    weights = torch.cat([by_cost, alike], 1)
    return torch.cat([won[:, run], some], 1), weights / weights.mean(1, keepdim=True)


def _mixed(plain: Tensor, costed: Tensor, total: Tensor) -> Tensor:
    """A mean over tokens [H, …]: PLAIN of it over all alike, the rest by cost; `costed` and `total` are sums."""
    size = total.view(-1, *[1] * (plain.dim() - 1))
    by_cost = torch.where(size > 0, costed / size.clamp_min(_TINY), plain)
    return PLAIN * plain + (1 - PLAIN) * by_cost


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(-1)


_TINY = torch.finfo(torch.float64).tiny
