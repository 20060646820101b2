"""The layer storages that kernel tables and GPU benchmarks are about, their bytes and what decoding them computes."""

from functools import lru_cache

import torch

from kvcc.kernels.head_classes import head_classes, padded
from kvcc.kernels.layout import PageLayout, Plane, Side, page_layout

HEAD_SIZES = (64, 80, 96, 128, 256)
COMMON_SIZES = (64, 128)  # for what no shipped recipe stores, but a user's may
PAGE_TOKENS = 64

# Storage of K and V: (bits, share of the channels) planes, and the group size wished for.
STORAGE: dict[str, tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...], int]] = {
    "exact": (((16, 1.0),), ((16, 1.0),), 64),
    "think-40": (((16, 0.6),), ((16, 1.0),), 64),
    "kivi-8": (((8, 1.0),), ((8, 1.0),), 64),
    "kivi-4": (((4, 1.0),), ((4, 1.0),), 64),
    "kivi-3": (((3, 1.0),), ((3, 1.0),), 32),
    "kivi-2": (((2, 1.0),), ((2, 1.0),), 32),
    "think-40-kivi-4": (((4, 0.6),), ((4, 1.0),), 64),
    "think-40-kivi-2": (((2, 0.6),), ((2, 1.0),), 32),
    "mixed-4-2": (((4, 0.25), (2, 0.75)), ((2, 1.0),), 32),
    "mixed-6-5": (((6, 0.5), (5, 0.5)), ((5, 1.0),), 32),
}
RECIPES = ("exact", "think-40", "kivi-4", "kivi-2", "think-40-kivi-4", "think-40-kivi-2")


@lru_cache
def storage_layout(
    storage: str, head_size: int, half: torch.dtype = torch.float16, kv_heads: int = 2
) -> PageLayout:
    """Page of equal KV heads under one of STORAGE; groups of V are the widest allowed that divide the head."""
    k, v, wished = STORAGE[storage]
    v_group = max(g for g in range(8, wished + 1, 8) if head_size % g == 0)
    k_side = Side(_planes(k, head_size), "tokens", wished)
    v_side = Side(_planes(v, head_size), "channels", v_group)
    return page_layout(PAGE_TOKENS, (k_side,) * kv_heads, (v_side,) * kv_heads, half)


def _planes(shares: tuple[tuple[int, float], ...], head_size: int) -> tuple[Plane, ...]:
    return tuple(Plane(bits, int(share * head_size)) for bits, share in shares)


@lru_cache
def bytes_per_token(storage: str, head_size: int) -> float:
    """Bytes of pages that decoding reads per cached token and KV head, metadata and alignment included."""
    layout = storage_layout(storage, head_size)
    return layout.nbytes / layout.tokens / layout.kv_heads


def vector_operations(storage: str, head_size: int, group: int) -> float:
    """Instructions of ordinary arithmetic per cached token and KV head, as `attend_pages` is written.

    An element of a code takes about 4.5: shift, mask, to float, multiply-add, and a conversion to half that does two.
    A raw one takes 1, a logit's softmax about 6. Loads, addresses, and scales, which many elements share, are not
    counted.
    """
    heads = head_classes(storage_layout(storage, head_size))[0]
    return sum((4.5 if p.bits < 16 else 1) * p.channels for p in heads.k + heads.v) + 6 * group


def matrix_operations(storage: str, head_size: int, group: int) -> int:
    """Floating-point operations of the two matrix products per cached token and KV head, padded rows included."""
    heads = head_classes(storage_layout(storage, head_size))[0]
    return 2 * padded(group) * sum(p.channels for p in heads.k + heads.v)
