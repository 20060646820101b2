"""The triton backend: split-K attention over packed pages, for GPUs. Importable only where triton is.

Computes in float32 except for operands of matrix products, which are float16 when queries are half precision.
Runs on CPU tensors when TRITON_INTERPRET=1 was set before triton was imported (for tests: it is slow).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kvcc.kernels.head_classes import HeadClass, PlaneSpec, head_classes, padded
from kvcc.kernels.layout import PageLayout
from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Cached
from kvcc.kernels.triton_kernels import attend_pages, attend_window, merge_parts, seal_plane

name = "triton"

INTERPRETED = isinstance(attend_pages, InterpretedFunction)
WIDEST_PLANE = 256
LARGEST_PAGE = 1024
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
SEALED_ELEMENTS = 2048  # of one program that seals: 16 a thread
PROGRAMS_PER_PROCESSOR = 4  # enough programs in flight to hide the latency of loads


@dataclass(frozen=True)
class Tiling:
    """Tile sizes and warps of an attention kernel; docs/kernels.md has what they compile to."""

    rows: int  # query rows, of one KV head
    tokens: int
    warps: int
    stages: int = 2


def page_tiling(layout_tokens: int, planes: tuple[PlaneSpec, ...], rows: int, dot: tl.dtype) -> Tiling:
    """Tiling of `attend_pages` for `rows` query rows per KV head and products of type `dot`.

    K, V and their products live in registers; these sizes spill on none of the targets. Planes that are not a
    power of two wide need masks, and those registers.
    """
    widest = max((plane.width for plane in planes), default=16)
    tall = min(padded(rows), 32 if widest <= 128 else 16)
    ragged = any(plane.channels != plane.width for plane in planes)
    tokens = _tile_elements(dot) // widest // (2 if ragged or tall > 16 else 1)
    wide = widest > (128 if dot == tl.float16 else 64)
    return Tiling(tall, min(64, max(16, tokens), padded(layout_tokens)), warps=8 if wide else 4)


def window_tiling(widest: int, rows: int, dot: tl.dtype) -> Tiling:
    """Tiling of `attend_window` for heads padded to `widest` channels."""
    tall = min(padded(rows), 32 if widest <= 128 else 16)
    return Tiling(tall, min(32, max(16, _tile_elements(dot) // widest)), warps=4)


def _tile_elements(dot: tl.dtype) -> int:
    """Elements of a tile of K or V; float32 products use no matrix instruction and more registers."""
    return 8192 if dot == tl.float16 else 2048


def supports(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `Backend.supports`."""
    if device.type != "cuda" and not INTERPRETED:
        return f"the triton backend needs a CUDA or ROCm device, not {device.type}"
    if dtype not in DTYPES:
        return f"the triton backend takes float16, bfloat16 and float32, not {dtype}"
    if layout.tokens > LARGEST_PAGE:
        return f"the triton backend takes pages up to {LARGEST_PAGE} tokens, not {layout.tokens}"
    widest = max((s.channels for head in layout.k + layout.v for s in head), default=0)
    if widest > WIDEST_PLANE:
        return f"the triton backend takes planes up to {WIDEST_PLANE} channels, not {widest}"
    return None


def seal(layout: PageLayout, k: Tensor, v: Tensor, pool: PagePool, pages: Tensor) -> None:
    """See `Backend.seal`. Bytes between sections are left as they are."""
    if len(pages) == 0:
        return
    for heads in head_classes(layout):
        index = _head_index(heads, k.device)
        for x, planes in ((k, heads.k), (v, heads.v)):
            for plane in planes:
                _seal_plane(layout, plane, x, pool, pages, index)


def _seal_plane(
    layout: PageLayout, plane: PlaneSpec, x: Tensor, pool: PagePool, pages: Tensor, index: Tensor
) -> None:
    page_stride, head_stride, token_stride, channel_stride = x.stride()
    if plane.by_tokens:
        runs, length, run_stride, pos_stride = plane.channels, layout.tokens, channel_stride, token_stride
    else:
        runs, length, run_stride, pos_stride = layout.tokens, plane.channels, token_stride, channel_stride
    span, block = seal_tiling(runs, length)
    seal_plane[(len(pages), len(index), -(-runs // block))](
        x[..., plane.first_channel :],
        pages,
        pool.addresses,
        index,
        page_stride,
        head_stride,
        run_stride,
        pos_stride,
        PLANE=plane,
        RUNS=runs,
        LENGTH=length,
        SPAN=span,
        BLOCK=block,
        HALF=DTYPES[layout.half],
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add would give other codes than the reference
    )


def seal_tiling(runs: int, length: int) -> tuple[int, int]:
    """(positions, runs) that one program of `seal_plane` covers."""
    span = padded(length)
    return span, min(padded(runs), max(1, SEALED_ELEMENTS // span))


def attend(
    cached: Cached,
    q: Tensor,
    q_pages: Tensor,
    scale: float,
    softcap: float = 0.0,
    page_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `Backend.attend`. Nothing waits for the device: grids depend on shapes, not on lengths."""
    batch, n, q_heads, _ = q.shape
    _, kv_heads, slots, v_dim = cached.window_v.shape
    group = q_heads // kv_heads
    page_splits, window_splits = _splits(cached, batch * kv_heads * -(-n * group // 32), q.device)
    shape = (page_splits + window_splits, batch, n, q_heads)
    # Heads that store fewer V channels leave the others at 0.
    part_out = torch.zeros(*shape, v_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    if slots:
        _attend_window(cached, _dense(q), scale, softcap, part_out[page_splits:], part_lse[page_splits:])
    if page_splits and cached.layout is not None:
        bias = None if page_bias is None else page_bias.contiguous()
        for heads in head_classes(cached.layout):
            _attend_pages(
                cached, heads, _dense(q_pages), scale, softcap, bias, part_out, part_lse, page_splits
            )
    out = torch.empty(batch, n, q_heads, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, n, q_heads, dtype=torch.float32, device=q.device)
    if lse.numel():
        merge_parts[(lse.numel(),)](
            part_out, part_lse, out, lse, lse.numel(), len(part_out),
            V_DIM=v_dim, V_WIDTH=padded(v_dim), num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _attend_pages(
    cached: Cached,
    heads: HeadClass,
    q: Tensor,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    part_out: Tensor,
    part_lse: Tensor,
    splits: int,
) -> None:
    layout, pool = cached.layout, cached.pool
    assert layout is not None
    assert pool is not None
    batch, n, q_heads, _ = q.shape
    group = q_heads // layout.kv_heads
    index = _head_index(heads, q.device)
    dot = dot_type(q.dtype)
    tiling = page_tiling(layout.tokens, heads.k + heads.v, n * group, dot)
    attend_pages[(batch * len(index), splits, -(-n * group // tiling.rows))](
        q,
        q if bias is None else bias,
        pool.addresses,
        cached.table,
        cached.sealed,
        index,
        part_out,
        part_lse,
        n,
        q_heads,
        part_out.shape[-1],
        len(index),
        splits,
        *q.stride()[:3],
        cached.table.stride(0),
        scale,
        float(softcap),
        K=heads.k,
        V=heads.v,
        TOKENS=layout.tokens,
        TILE=tiling.tokens,
        GROUP=group,
        ROWS=tiling.rows,
        HALF=DTYPES[layout.half],
        DOT=dot,
        BIASED=bias is not None,
        CAPPED=softcap > 0,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        enable_fp_fusion=True,
    )


def _attend_window(
    cached: Cached, q: Tensor, scale: float, softcap: float, part_out: Tensor, part_lse: Tensor
) -> None:
    batch, n, q_heads, k_dim = q.shape
    k, v = _dense(cached.window_k), _dense(cached.window_v)
    kv_heads, slots, v_dim = k.shape[1], k.shape[2], v.shape[-1]
    group = q_heads // kv_heads
    dot = dot_type(q.dtype)
    tiling = window_tiling(max(padded(k_dim), padded(v_dim)), n * group, dot)
    attend_window[(batch * kv_heads, len(part_out), -(-n * group // tiling.rows))](
        q,
        k,
        v,
        cached.lengths,
        cached.sealed,
        part_out,
        part_lse,
        n,
        q_heads,
        kv_heads,
        len(part_out),
        slots,
        cached.sinks,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        scale,
        float(softcap),
        K_DIM=k_dim,
        V_DIM=v_dim,
        K_WIDTH=padded(k_dim),
        V_WIDTH=padded(v_dim),
        TILE=tiling.tokens,
        GROUP=group,
        ROWS=tiling.rows,
        DOT=dot,
        CAPPED=softcap > 0,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        enable_fp_fusion=True,
    )


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """Type of the operands of matrix products: half queries do not deserve more than float16's 11 bits.

    Not bfloat16, whose 8 bits would blur codes of 8 bits; K and V of models lie well within float16's range.
    """
    return tl.float32 if dtype == torch.float32 else tl.float16


def _splits(cached: Cached, programs: int, device: torch.device) -> tuple[int, int]:
    """(splits of the pages, splits of the window): none without pages, else enough to fill the device."""
    wanted = max(1, -(-_processors(device) * PROGRAMS_PER_PROCESSOR // max(programs, 1)))
    pages = cached.table.shape[1] if cached.layout is not None else 0
    window_tiles = -(-cached.window_k.shape[2] // 32)
    return min(pages, wanted), min(window_tiles, wanted, 16)


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter pretends to have two, so that work is split there as well."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=256)
def _head_index(heads: HeadClass, device: torch.device) -> Tensor:
    """[class heads, 2] int32: KV head and byte offset of its record."""
    return torch.tensor(heads.heads, dtype=torch.int32, device=device)
