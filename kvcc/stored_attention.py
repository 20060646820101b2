"""Exact attention whose gradients tell stored keys and values from recent ones.

Weights are computed again for the backward pass, some queries at a time (as FlashAttention does, Dao 2023): kept for
all layers, they would take gigabytes for a prompt of a thousand tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # queries at a time


@dataclass(frozen=True)
class Reach:
    """Which keys a query sees, and from where on they count as stored.

    The first `first` tokens never do, others for queries more than `recent` tokens after them.
    """

    seen: Tensor  # bool [T, T], causal; every query sees a key
    first: int
    recent: int
    scale: float
    softcap: float  # 0: none

    def old(self, rows: slice, start: int) -> Tensor:
        """bool [rows, rows.stop - start]: whether keys from `start` on, up to the last query, are not recent."""
        queries = torch.arange(rows.start, rows.stop, device=self.seen.device)
        keys = torch.arange(start, rows.stop, device=self.seen.device)
        return queries[:, None] - keys > self.recent


class StoredAttention(torch.autograd.Function):
    """Attention of q [H, group, T, D] over k [H, T, D], v [H, T, E], float32, as [H, group, T, E].

    `stored_k` and `stored_v` are the keys and values from `reach.first` on, under other names: gradients reach these
    where they count as stored, and `k` and `v` elsewhere. `sinks`: [H, group] logits that take a share, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stored_k: Tensor,
        stored_v: Tensor,
        sinks: Tensor | None,
        reach: Reach,
    ) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[2])
        for rows in _blocks(q.shape[2]):
            _, weights = _weights(q[:, :, rows], k[:, : rows.stop], sinks, rows, reach)
            out[:, :, rows] = (weights @ v[:, : rows.stop]).unflatten(1, (q.shape[1], -1))
        ctx.save_for_backward(q, k, v, sinks, out)
        ctx.reach = reach
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (q, k, v, sinks, out), reach = ctx.saved_tensors, ctx.reach
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        stored_dk, stored_dv = (torch.zeros_like(x[:, reach.first :]) for x in (k, v))
        for rows in _blocks(q.shape[2]):
            logits, weights = _weights(q[:, :, rows], k[:, : rows.stop], sinks, rows, reach)
            queries, around = q[:, :, rows].flatten(1, 2), grad[:, :, rows].flatten(1, 2)
            mean = (around * out[:, :, rows].flatten(1, 2)).sum(-1, keepdim=True)
            change = torch.baddbmm(-mean, around, v[:, : rows.stop].mT).mul_(weights)  # softmax's derivative
            if reach.softcap:
                change *= 1 - (logits / reach.softcap).square()
            change *= reach.scale
            dq[:, :, rows] = (change @ k[:, : rows.stop]).unflatten(1, (q.shape[1], -1))
            _add(dk, stored_dk, change, queries, rows, reach)
            _add(dv, stored_dv, weights, around, rows, reach)
        return dq, dk, dv, stored_dk, stored_dv, None, None


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _weights(q: Tensor, k: Tensor, sinks: Tensor | None, rows: slice, reach: Reach) -> tuple[Tensor, Tensor]:
    """Logits before the mask, and weights, of queries q [H, group, rows, D]: [H, group * rows, rows.stop]."""
    logits = (q * reach.scale).flatten(1, 2) @ k.mT
    if reach.softcap:
        logits = reach.softcap * torch.tanh(logits / reach.softcap)
    hidden = ~reach.seen[rows, : rows.stop]
    masked = logits.unflatten(1, (q.shape[1], -1)).masked_fill(hidden, -math.inf)
    if sinks is not None:
        masked = torch.cat([masked, sinks[..., None, None].expand(*masked.shape[:3], 1)], -1)
    return logits, masked.softmax(-1)[..., : rows.stop].flatten(1, 2)


def _add(near: Tensor, far: Tensor, by: Tensor, what: Tensor, rows: slice, reach: Reach) -> None:
    """Add byᵀ what, of by [H, group * rows, rows.stop] and what [H, group * rows, D], to gradients [H, T, D].

    `far` [H, T - first, D] gets the stored tokens' share. Up to `band` they are stored for all of these queries.
    """
    first = min(reach.first, rows.stop)
    band = max(first, rows.start - reach.recent)
    near[:, :first].baddbmm_(by[..., :first].mT, what)
    far[:, : band - first].baddbmm_(by[..., first:band].mT, what)
    mixed = by[..., band:].unflatten(1, (-1, rows.stop - rows.start))
    stored = (mixed * reach.old(rows, band)).flatten(1, 2)
    far[:, band - first : rows.stop - first].baddbmm_(stored.mT, what)
    near[:, band : rows.stop].baddbmm_((mixed.flatten(1, 2) - stored).mT, what)
