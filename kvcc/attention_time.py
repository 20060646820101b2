"""How long attention of a plan takes in decode, timed on the kernels alone."""

import time

import torch

from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Backend, Cached
from kvcc.runtime.plan import LayerPlan, Plan

ROUNDS = 5


def attention_ms(plan: Plan, backend: Backend, tokens: int) -> float:
    """Milliseconds in which all layers attend once over `tokens` tokens in pages, one sequence; the best of 5 rounds.

    Pages hold random values, really sealed; windows, which no codec changes, are left out. Layers without pages cost
    nothing here.
    """
    calls = [_sealed(plan, index, backend, tokens) for index, layer in enumerate(plan.layers) if layer.page]
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for cached, q, q_pages in calls:
            backend.attend(cached, q, q_pages, 0.125)
        rounds.append(time.perf_counter() - start)
    return 1000 * min(rounds)


def _sealed(
    plan: Plan, index: int, backend: Backend, tokens: int
) -> tuple[Cached, torch.Tensor, torch.Tensor]:
    layer: LayerPlan = plan.layers[index]
    layout = layer.layout(plan.half)
    assert layout is not None
    pages = tokens // layer.page
    pool = PagePool(layout.nbytes, torch.device("cpu"))
    ids = torch.tensor(pool.take(pages))
    k, v = (torch.randn(pages, layer.kv_heads, layer.page, n) for n in (layout.k_channels, layer.v_dim))
    backend.seal(layout, k, v, pool, ids)
    count = torch.tensor([pages * layer.page], dtype=torch.int32)
    no_k, no_v = (torch.zeros(1, layer.kv_heads, 0, n, dtype=plan.exact) for n in (layer.k_dim, layer.v_dim))
    cached = Cached(layout, no_k, no_v, 0, count, count, pool, ids[None])
    q, q_pages = (torch.randn(1, 1, layer.q_heads, n) for n in (layer.k_dim, layout.k_channels))
    return cached, q, q_pages
