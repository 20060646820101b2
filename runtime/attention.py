"""Cached attention: what `kvcc::attention` becomes when a graph is lowered onto a plan.

One function for any number of new tokens per sequence. Sequences are packed one after another along the token
axis, so a ragged batch has no padding.
"""

import torch
from torch import Tensor

from kvcc.errors import ArtifactGraph
from kvcc.kernels.exact import causal_attention, merged
from kvcc.runtime.cache import Cache, KeyBasis, LayerCache
from kvcc.runtime.plan import LayerPlan
from kvcc.runtime.saliency import Probes, salient_first

REQUEST_QUERIES = 32  # ThinK's observation window: the last prompt queries that choose the channels
ATTENDED = (torch.float32, torch.float16, torch.bfloat16)  # types that kernels take
GATHERED = 4096  # tokens whose stored channels are gathered at a time while sealing


def cached_attention(
    cache: Cache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Attend over the cache and the new tokens, then store the new tokens.

    q: [1, Hq, N, Dk], k: [1, Hkv, N, Dk], v: [1, Hkv, N, Dv], the N new tokens of all sequences in order
    (`cache.counts` of each); sinks: [Hq] attention-sink logits or None. Returns [1, N, Hq, Dv].
    """
    check_new_tokens(cache.layers[layer].plan, layer, sum(cache.counts), q, k, v, sinks)
    one_each = all(count == 1 for count in cache.counts) and all(cache.lengths)
    if one_each:
        out, lse = _decode(cache, layer, q[0], k[0], v[0], scale, softcap)
    else:
        out, lse = _extend(cache, layer, q[0], k[0], v[0], scale, window, softcap)
    if sinks is not None:  # a sink logit takes its share of the softmax and gives nothing
        out = out * torch.sigmoid(lse - sinks.float())[..., None].to(out.dtype)
    return out.to(q.dtype)[None]


def check_new_tokens(
    plan: LayerPlan, layer: int, n: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> None:
    """Raise ArtifactGraph unless the tensors of `n` new tokens are the plan's: kernels trust shapes and types."""
    heads, kv_heads = plan.q_heads, plan.kv_heads
    shapes = (1, heads, n, plan.k_dim), (1, kv_heads, n, plan.k_dim), (1, kv_heads, n, plan.v_dim)
    fits = (q.shape, k.shape, v.shape) == shapes and (sinks is None or sinks.shape == (heads,))
    if not fits or not all(x.dtype in ATTENDED for x in (q, k, v)):
        raise ArtifactGraph(
            f"graph: layer {layer} attends with tensors of other shapes or types than the plan's"
        )


def _decode(
    cache: Cache, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """One new token for every sequence: write it to its window slot, attend once, seal a page that came full."""
    layer = cache.layers[index]
    step = cache.decode_step(layer.plan)
    layer.window_k[step.rows, :, step.slots] = k.transpose(0, 1).to(layer.window_k.dtype)
    layer.window_v[step.rows, :, step.slots] = v.transpose(0, 1).to(layer.window_v.dtype)
    view = layer.view(slice(None), step.lengths, step.sealed)
    queries = q.transpose(0, 1)[:, None]  # [B, 1, Hq, D]
    q_pages, bias = _page_queries(layer, slice(None), queries, scale)
    out, lse = cache.backend.attend(view, queries, q_pages, scale, softcap, bias)
    if step.full:
        seen = Probes(q, lse[:, 0], scale, softcap) if layer.plan.salient else None
        seal_full(cache, index, step.full, seen)
    return out[:, 0], lse[:, 0]


def _extend(
    cache: Cache, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Any number of new tokens: exact causal attention among them, merged with attention over what is cached."""
    parts, first, many = None, 0, sum(count > 0 for count in cache.counts) > 1
    for row, count in enumerate(cache.counts):
        if count == 0:
            continue
        new = slice(first, first + count)
        first += count
        q_row, k_row, v_row = q[:, new], k[:, new], v[:, new]
        out, lse = _attend_row(cache, index, row, q_row, k_row, v_row, scale, window, softcap)
        seen = Probes(q_row, lse, scale, softcap) if cache.layers[index].plan.salient else None
        store(cache, index, row, q_row, k_row, v_row, seen)
        if not many:
            return out, lse
        if parts is None:
            parts = out.new_empty(q.shape[1], *out.shape[1:]), lse.new_empty(q.shape[1], q.shape[0])
        parts[0][new], parts[1][new] = out, lse
        del out, lse  # before the next sequence makes its own
    assert parts is not None
    return parts


def _attend_row(
    cache: Cache,
    index: int,
    row: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """New tokens of one sequence over what it has cached and themselves: out [n, Hq, Dv], lse [n, Hq]."""
    layer, length = cache.layers[index], cache.lengths[row]
    if not layer.plan.window:
        dtype = cache.exact_in or q.dtype
        exact = causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), scale, 0, softcap)
        return merged(exact, _attend_cached(cache, index, row, q, scale, softcap)) if length else exact
    slots = _recent_slots(layer, row, length)
    if not len(slots):
        return causal_attention(q, k, v, scale, window, softcap)
    # Only the first `window` tokens see cached ones, so no more than these are copied behind them.
    near = min(k.shape[1], window)
    k_near = torch.cat([layer.window_k[row][:, slots].to(k.dtype), k[:, :near]], dim=1)
    v_near = torch.cat([layer.window_v[row][:, slots].to(v.dtype), v[:, :near]], dim=1)
    head = causal_attention(q[:, :near], k_near, v_near, scale, window, softcap)
    if near == k.shape[1]:
        return head
    rest = causal_attention(q[:, near:], k, v, scale, window, softcap)
    return torch.cat([head[0], rest[0]]), torch.cat([head[1], rest[1]])


def _attend_cached(
    cache: Cache, index: int, row: int, q: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Queries [Hq, n, D] of one sequence over what it has cached: out [n, Hq, Dv], lse [n, Hq]."""
    layer, length, rows = cache.layers[index], cache.lengths[row], slice(row, row + 1)
    count = torch.tensor([length], dtype=torch.int32, device=q.device)
    sealed = torch.tensor([layer.plan.sealed(length)], dtype=torch.int32, device=q.device)
    queries = q.transpose(0, 1)[None]  # [1, n, Hq, D]
    q_pages, bias = _page_queries(layer, rows, queries, scale)
    view = layer.view(rows, count, sealed)
    out, lse = cache.backend.attend(view, queries, q_pages, scale, softcap, bias)
    return out[0], lse[0]


def store(
    cache: Cache, index: int, row: int, q: Tensor, k: Tensor, v: Tensor, seen: Probes | None = None
) -> None:
    """Cache the new tokens k, v [Hkv, n, D] of one sequence: sinks, pages that come full, the recent window.

    Their queries q [Hq, n, D] choose the channels of a sequence that begins, where the plan says so; `seen` is what
    tells salient tokens from others, where it wants that.
    """
    layer, plan, length = cache.layers[index], cache.layers[index].plan, cache.lengths[row]
    if plan.select == "request" and length == 0:
        select_channels(layer, row, q, k)
    total = length + k.shape[1]
    if length < plan.sinks:
        count = min(plan.sinks - length, k.shape[1])
        layer.window_k[row][:, length : length + count] = k[:, :count]
        layer.window_v[row][:, length : length + count] = v[:, :count]
        k, v = k[:, count:], v[:, count:]
    due = plan.sealed(total) - plan.sealed(length) if plan.page else 0
    if due:
        slots = _recent_slots(layer, row, length)
        # Pages that begin among the recent tokens are put together; those behind them are sealed where k and v lie.
        borrowed = min(due, -(-len(slots) // plan.page) * plan.page)
        if borrowed:
            k_joined, v_joined = (
                torch.cat([window[row][:, slots], x[:, : max(0, borrowed - len(slots))]], dim=1)
                for window, x in ((layer.window_k, k), (layer.window_v, v))
            )
            _seal(cache, index, row, k_joined[:, :borrowed], v_joined[:, :borrowed], seen)
        taken = max(0, borrowed - len(slots))
        behind = taken + due - borrowed
        if behind > taken:
            _seal(cache, index, row, k[:, taken:behind], v[:, taken:behind], seen)
    _put_recent(layer, row, total, k[:, -plan.ring :], v[:, -plan.ring :])


def _put_recent(layer: LayerCache, row: int, total: int, k: Tensor, v: Tensor) -> None:
    """Write the last tokens k, v of a sequence of `total` tokens, at most as many as the ring has slots."""
    plan, count = layer.plan, k.shape[1]
    at = (total - count - plan.sinks) % plan.ring if count else 0
    straight = min(count, plan.ring - at)  # up to the ring's end; the others go to its beginning
    for window, x in ((layer.window_k[row], k), (layer.window_v[row], v)):
        window[:, plan.sinks + at : plan.sinks + at + straight] = x[:, :straight]
        window[:, plan.sinks : plan.sinks + count - straight] = x[:, straight:]


def _recent_slots(layer: LayerCache, row: int, length: int) -> Tensor:
    """Window slots of the recent tokens of a sequence of `length` tokens, before any new sealing, oldest first."""
    plan = layer.plan
    held = len(layer.pages[row]) * plan.page if plan.page else plan.sealed(length)
    tokens = torch.arange(plan.sinks + held, max(length, plan.sinks + held), device=layer.window_k.device)
    return plan.sinks + (tokens - plan.sinks) % plan.ring


def _seal(cache: Cache, index: int, row: int, k: Tensor, v: Tensor, seen: Probes | None) -> None:
    """Seal k, v [Hkv, pages * page, D], the oldest recent tokens of one sequence."""
    layer = cache.layers[index]
    if seen is not None:
        first = layer.plan.sinks + len(layer.pages[row]) * layer.plan.page
        k, v = salient_first(seen, cache.lengths[row], first, layer.plan.page, k, v)
    assert layer.layout is not None
    assert layer.pool is not None
    page = layer.plan.page
    ids = layer.add_pages(row, k.shape[1] // page)
    if layer.channels is None and layer.basis is None:
        _seal_pages(cache, layer, ids, k, v)
        return
    step = max(1, GATHERED // page)
    for first in range(0, len(ids), step):  # some pages at a time: what pages store of K is a copy
        some = slice(first * page, (first + step) * page)
        stored = _stored_keys(layer, [row], k[None, :, some])[0]
        _seal_pages(cache, layer, ids[first : first + step], stored, v[:, some])


def _stored_keys(layer: LayerCache, rows: list[int], k: Tensor) -> Tensor:
    """What pages store of k [rows, Hkv, n, Dk] of sequences `rows`, in plane order: [rows, Hkv, n, C]."""
    if layer.basis is not None:
        centred = k.float() if layer.basis.mean is None else k.float() - layer.basis.mean[:, None]
        return centred @ layer.basis.keys
    if layer.channels is None:
        return k
    chosen = layer.channels[rows] if len(layer.channels) > 1 else layer.channels  # [rows or 1, Hkv, C]
    return k.gather(-1, chosen[:, :, None].expand(len(rows), -1, k.shape[2], -1))


def _seal_pages(cache: Cache, layer: LayerCache, ids: Tensor, k: Tensor, v: Tensor) -> None:
    """Seal k, v [Hkv, pages * page, D] as pages `ids`, K in plane order."""
    assert layer.layout is not None
    assert layer.pool is not None
    k, v = (x.unflatten(1, (len(ids), layer.plan.page)).transpose(0, 1) for x in (k, v))
    cache.backend.seal(layer.layout, k, v, layer.pool, ids)


def seal_full(cache: Cache, index: int, rows: list[int], seen: Probes | None = None) -> None:
    """Seal, in one call, the page of oldest recent tokens of each of the sequences `rows`.

    `seen`: the new tokens of all sequences, one each, where the plan tells salient tokens from others.
    """
    layer, plan = cache.layers[index], cache.layers[index].plan
    assert layer.layout is not None
    assert layer.pool is not None
    device = layer.window_k.device
    sealed = torch.tensor([len(layer.pages[row]) * plan.page for row in rows], device=device)
    slots = plan.sinks + (sealed[:, None] + torch.arange(plan.page, device=device)) % plan.ring
    here = torch.tensor(rows, device=device)[:, None]
    k, v = (window[here, :, slots].transpose(1, 2) for window in (layer.window_k, layer.window_v))
    if seen is not None:
        pairs = [
            salient_first(seen.of(row), cache.lengths[row], plan.sinks + int(first), plan.page, k[i], v[i])
            for i, (row, first) in enumerate(zip(rows, sealed))
        ]
        k, v = (torch.stack(x) for x in zip(*pairs))
    ids = torch.cat([layer.add_pages(row, 1) for row in rows])
    cache.backend.seal(layer.layout, _stored_keys(layer, rows, k), v, layer.pool, ids)


def _page_queries(layer: LayerCache, rows: slice, q: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Queries q [B, n, Hq, D] as pages want them, and what their logits lack for the mean that pages leave out."""
    if layer.basis is not None:
        return _in_basis(layer.basis, q, scale)
    if layer.query_channels is None:
        return q, None
    index = layer.query_channels if len(layer.query_channels) == 1 else layer.query_channels[rows]
    bias = None if layer.pruned_mean is None else scale * (q.float() * layer.pruned_mean).sum(-1)
    return q.gather(-1, index.expand(*q.shape[:2], -1, -1)), bias


def _in_basis(basis: KeyBasis, q: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Queries [B, n, Hq, D] in the coordinates of pages [B, n, Hq, C], and their logits with K's mean."""
    grouped = q.float().unflatten(2, (len(basis.queries), -1))
    turned = torch.einsum("bnhgd,hdc->bnhgc", grouped, basis.queries).flatten(2, 3).to(q.dtype)
    if basis.mean is None:
        return turned, None
    return turned, scale * torch.einsum("bnhgd,hd->bnhg", grouped, basis.mean).flatten(2)


def select_channels(layer: LayerCache, row: int, q: Tensor, k: Tensor) -> None:
    """Choose a sequence's K channels from its own prompt, as ThinK does (arXiv 2407.21018).

    q: [Hq, n, D], k: [Hkv, n, D]. The score of a channel is mean(q²) over the last 32 queries, pooled over the
    query group, times mean(k²) over all keys; the best `k_channels` of each KV head are stored, in their order.
    """
    assert layer.layout is not None
    kv_heads, kept = k.shape[0], layer.layout.k_channels
    observed = q[:, -REQUEST_QUERIES:].float().square().unflatten(0, (kv_heads, -1)).mean((1, 2))
    energy = torch.linalg.vector_norm(k, dim=1, dtype=torch.float32).square() / k.shape[1]
    score = observed * energy  # [Hkv, D]
    chosen = score.topk(kept, dim=-1).indices.sort(-1).values
    layer.choose(row, chosen)
