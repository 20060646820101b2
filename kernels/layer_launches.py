"""Which kernels a layer launches: the triton backend's own launchers, run on small tensors with nothing launched."""

from dataclasses import dataclass

import torch

from kvcc.kernels import triton
from kvcc.kernels.layout import PageLayout
from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Cached

BATCH = 2  # more than one, so that every stride counts; kernels are the same for any batch
SLOTS = 2  # of the exact window, likewise
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class LayerShape:
    """What of a layer decides which kernels it needs. Layers with equal shapes need the same."""

    layout: PageLayout | None  # None: a sliding window, without pages
    q_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype  # of queries
    exact: torch.dtype  # of the exact window, and of what is sealed of it
    gathered: bool = False  # pages store some K channels, in another order or basis: q is turned for them
    based: bool = False  # pages store K in a basis, into which it is turned in float32
    biased: bool = False
    capped: bool = False


def layer_launches(shape: LayerShape, queries: int = 1) -> list[triton.Launch]:
    """Every launch of a step with `queries` new tokens a sequence: attention, then the sealing of a page.

    The tensors in it are tiny and on the CPU; constants, dtypes and alignment are those of the real ones.
    """
    q = torch.zeros(BATCH, queries, shape.q_heads, shape.k_dim, dtype=shape.dtype)
    window_k, window_v = (
        torch.zeros(BATCH, shape.kv_heads, SLOTS, dim, dtype=shape.exact)
        for dim in (shape.k_dim, shape.v_dim)
    )
    lengths = torch.zeros(BATCH, dtype=torch.int32)
    pool = PagePool(shape.layout.nbytes, _CPU) if shape.layout else None
    table = torch.zeros(BATCH, 1 if shape.layout else 0, dtype=torch.int64)
    cached = Cached(shape.layout, window_k, window_v, 0, lengths, lengths, pool, table)
    q_pages, k_channels = q, shape.k_dim
    if shape.layout is not None and shape.gathered:
        k_channels = shape.layout.k_channels
        q_pages = torch.zeros(BATCH, queries, shape.q_heads, k_channels, dtype=shape.dtype)
    bias = torch.zeros(BATCH, queries, shape.q_heads) if shape.biased else None
    with triton.recorded() as launches:
        triton.attend(cached, q, q_pages, 1.0, 1.0 if shape.capped else 0.0, bias)
        if shape.layout is not None and pool is not None:
            k, v = (
                torch.zeros(BATCH, shape.kv_heads, shape.layout.page_tokens, channels, dtype=dtype)
                for channels, dtype in (
                    (k_channels, torch.float32 if shape.based else shape.exact),
                    (shape.v_dim, shape.exact),
                )
            )
            triton.seal(shape.layout, k, v, pool, table[:, 0])
    return launches
