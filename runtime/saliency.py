"""Which tokens are salient: seen when a page is sealed, by the attention that probe queries pay."""

from dataclasses import dataclass

import torch
from torch import Tensor

PROBED = 0.05  # share of the new tokens that probe because they are the last, and of others, drawn at random
TOKENS_AT_A_TIME = 1024  # bounds what saliency holds: weights of all probes


@dataclass(frozen=True)
class Probes:
    """New tokens of a sequence, after they attended: what they paid other tokens follows from `lse`."""

    q: Tensor  # [Hq, n, D]
    lse: Tensor  # [n, Hq] float32, natural log, over everything that each token saw
    scale: float
    softcap: float

    def of(self, index: int) -> "Probes":
        """One of the tokens alone."""
        return Probes(self.q[:, index : index + 1], self.lse[index : index + 1], self.scale, self.softcap)


def salient_first(
    seen: Probes, length: int, first: int, page: int, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """k, v [Hkv, pages * page, D] with the tokens of every page and head in order of falling saliency.

    `length` tokens were cached before those of `seen`; k[:, 0] is token `first` of the sequence.
    """
    score = saliency(seen, length, first, k).unflatten(1, (-1, page))
    order = score.argsort(dim=-1, descending=True, stable=True)[..., None]
    sorted_ = (x.unflatten(1, (-1, page)).gather(2, order.expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    k, v = (x.flatten(1, 2) for x in sorted_)
    return k, v


def saliency(seen: Probes, length: int, first: int, k: Tensor) -> Tensor:
    """Normalised attention that keys k [Hkv, t, D] received: [Hkv, t] float32 (ZipCache, arXiv 2405.14256).

    A token's weights are summed over the probes and the query group and divided by how many probes could see it.
    The last 5 % of the new tokens probe and another 5 % drawn at random, the same for all layers; 0 where none saw.
    """
    kv_heads, count, _ = k.shape
    rows = _probes(seen.lse.shape[0]).to(k.device)
    q = seen.q[:, rows].float().unflatten(0, (kv_heads, -1))  # [Hkv, group, probes, D]
    lse = seen.lse[rows].T.unflatten(0, (kv_heads, -1))  # [Hkv, group, probes]
    found = []
    for start in range(0, count, TOKENS_AT_A_TIME):
        keys = k[:, start : start + TOKENS_AT_A_TIME].float()
        logits = seen.scale * torch.einsum("hgpd,htd->hgpt", q, keys)
        if seen.softcap:
            logits = seen.softcap * torch.tanh(logits / seen.softcap)
        token = first + start + torch.arange(keys.shape[1], device=k.device)
        sees = token <= (length + rows)[:, None]  # [probes, t]
        weights = (logits - lse[..., None]).exp() * sees
        found.append(weights.sum((1, 2)) / sees.sum(0).clamp_min(1))
    return torch.cat(found, 1)


def _probes(count: int) -> Tensor:
    """Rows of `count` new tokens that probe: [probes] int64, rising."""
    share = max(1, round(PROBED * count))
    others = torch.randperm(max(0, count - share), generator=torch.Generator().manual_seed(count))[:share]
    return torch.cat([others, torch.arange(max(0, count - share), count)]).sort().values
