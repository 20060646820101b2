"""Attention over exact K and V with its log-sum-exp: prefill, and the new tokens of a multi-token append."""

import torch
from torch import Tensor

QUERY_BLOCK = 256  # rows of logits alive at once where no fused kernel applies


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last n of T tokens.

    q: [Hq, n, Dk]; k: [Hkv, T, Dk]; v: [Hkv, T, Dv]; query i sits at position T - n + i and sees keys up to
    itself, of which only the last `window` when window > 0. Returns out [n, Hq, Dv] in q's type and
    lse [n, Hq] float32.
    """
    n, length = q.shape[1], k.shape[1]
    banded = 0 < window < length
    if softcap or q.dtype == torch.float16 or k.shape[-1] != v.shape[-1] or q.device.type != "cpu":
        return _blockwise(q, k, v, scale, window if banded else 0, softcap)
    mask = _visible(n, length, window, 0, n, q) if banded or n != length else None
    bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, mask is None, attn_mask=bias, scale=scale
    )
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _visible(n: int, length: int, window: int, first: int, last: int, like: Tensor) -> Tensor:
    """[last - first, length] bool: which keys queries first..last of n may see."""
    query = torch.arange(length - n + first, length - n + last, device=like.device)[:, None]
    key = torch.arange(length, device=like.device)[None]
    return (key <= query) & (key > query - window) if window else key <= query


def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    q_heads, n, _ = q.shape
    kv_heads, length, _ = k.shape
    out = q.new_empty(n, q_heads, v.shape[-1])
    lse = torch.empty(n, q_heads, dtype=torch.float32, device=q.device)
    keys, values = k.float()[:, None], v.float()[:, None]
    for first in range(0, n, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, n)
        rows = q[:, first:last].float().unflatten(0, (kv_heads, -1))
        logits = scale * (rows @ keys.transpose(-1, -2))  # [Hkv, group, rows, T]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~_visible(n, length, window, first, last, q), -torch.inf)
        lse[first:last] = logits.logsumexp(-1).flatten(0, 1).T
        out[first:last] = (logits.softmax(-1) @ values).flatten(0, 1).transpose(0, 1).to(out.dtype)
    return out, lse
