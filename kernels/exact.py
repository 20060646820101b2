"""Attention over exact K and V with its log-sum-exp: prefill, and the new tokens of a multi-token append."""

import torch
from torch import Tensor

FUSED_ROWS = 512  # queries of a fused call that needs a mask: [FUSED_ROWS, keys] of it
PLAIN_ROWS = 256  # queries at once where no fused kernel applies, at most
PLAIN_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}  # and logits, of all heads


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last n of T tokens.

    q: [Hq, n, Dk]; k: [Hkv, T, Dk]; v: [Hkv, T, Dv]; query i sits at position T - n + i and sees keys up to
    itself, of which only the last `window` when window > 0. Returns out [n, Hq, Dv] in q's type and
    lse [n, Hq] float32. What is alive meanwhile grows with n and with T, not with their product: logits and masks are
    made for some queries at a time, over the keys that these see.
    """
    n, length = q.shape[1], k.shape[1]
    banded = 0 < window < length
    if softcap or k.shape[-1] != v.shape[-1] or q.device.type != "cpu":
        most = PLAIN_LOGITS.get(q.device.type, PLAIN_LOGITS["cpu"])
        rows = max(1, min(PLAIN_ROWS, most // (q.shape[0] * max(1, length))))
        return _in_blocks(q, k, v, scale, window if banded else 0, softcap, rows)
    if banded or n != length:
        return _in_blocks(q, k, v, scale, window if banded else 0, None, FUSED_ROWS)
    return _fused(q, k, v, scale, None)


def merged(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One attention out of two over disjoint keys: (out [..., D], lse [...]) each, of which one saw a key.

    Overwrites float32 `out` tensors of its arguments.
    """
    (out, lse), (other, other_lse) = a, b
    share = torch.sigmoid(lse - other_lse)[..., None]  # of `a` in the softmax over all keys
    mixed = out.float().mul_(share)
    return mixed.addcmul_(other.float(), 1 - share), torch.logaddexp(lse, other_lse)


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float | None, rows: int
) -> tuple[Tensor, Tensor]:
    """`rows` queries at a time, over the keys that they see; `softcap` None: by the fused kernel."""
    q_heads, n, _ = q.shape
    past = k.shape[1] - n
    out = q.new_empty(n, q_heads, v.shape[-1])
    lse = torch.empty(n, q_heads, dtype=torch.float32, device=q.device)
    hidden: tuple[tuple[int, int, int], Tensor] | None = None  # interior blocks of a band have the same mask
    for first in range(0, n, rows):
        last = min(first + rows, n)
        start = max(0, past + first - window + 1) if window else 0
        shape = last - first, past + last - start, past + first - start
        if hidden is None or hidden[0] != shape:
            hidden = shape, _hidden(*shape, window, q.device)
        part = q[:, first:last], k[:, start : past + last], v[:, start : past + last], scale
        made = _fused(*part, hidden[1]) if softcap is None else _plain(*part, softcap, hidden[1])
        out[first:last], lse[first:last] = made
        del made  # before the next block makes its own
    return out, lse


def _hidden(queries: int, keys: int, first: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: which keys a query must not see, when query 0 is key number `first`."""
    query = torch.arange(first, first + queries, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    return (key > query) | (key <= query - window) if window else key > query


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch's flash attention on the CPU, causal without `hidden`: out [n, Hq, D], lse [n, Hq]."""
    bias = None if hidden is None else q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, bias is None, attn_mask=bias, scale=scale
    )
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Products in float32 through one buffer of logits: out [n, Hq, Dv], lse [n, Hq]."""
    rows = q.float().unflatten(0, (k.shape[0], -1)).mul(scale).flatten(1, 2)  # [Hkv, group * n, Dk]
    logits = torch.bmm(rows, k.float().transpose(1, 2))
    if softcap:
        logits.div_(softcap).tanh_().mul_(softcap)
    logits.unflatten(1, (-1, len(hidden))).masked_fill_(hidden, -torch.inf)
    largest = logits.amax(-1, keepdim=True)
    logits.sub_(largest).exp_()
    total = logits.sum(-1, keepdim=True)
    out = torch.bmm(logits, v.float()).div_(total).view(q.shape[0], -1, v.shape[-1])
    lse = largest.add_(total.log_()).view(q.shape[0], -1)
    return out.transpose(0, 1).to(q.dtype), lse.T
