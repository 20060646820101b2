"""The triton backend: split-K attention over packed pages, for GPUs. Importable only where triton is.

Computes in float32 except for operands of matrix products, which are float16 when queries are half precision.
Runs on CPU tensors when TRITON_INTERPRET=1 was set before triton was imported (for tests: it is slow).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kvcc.kernels.head_classes import HeadClass, PlaneSpec, head_classes, padded
from kvcc.kernels.layout import SPLIT, PageLayout
from kvcc.kernels.page_means import less_means
from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Cached
from kvcc.kernels.token_scales import of_layout
from kvcc.kernels.triton_kernels import attend_pages, attend_window, merge_parts, seal_pages

name = "triton"

INTERPRETED = isinstance(attend_pages, InterpretedFunction)
WIDEST_PLANE = 256
LARGEST_PAGE = 1024
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
SEALED_ELEMENTS = 2048  # of one program that seals: 16 a thread
FLAT_BYTES = 256  # that one program packs of a plane that is one run
PROGRAMS_PER_PROCESSOR = 4  # enough programs in flight to hide the latency of loads


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments and, by name, its constants and compile options."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded launches", default=None)


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
    if layout.page_tokens > LARGEST_PAGE:
        return f"the triton backend takes pages up to {LARGEST_PAGE} tokens, not {layout.page_tokens}"
    widest = max((s.channels for part in layout.parts for head in part.k + part.v for s in head), default=0)
    means = max(count for part in layout.parts for _, count in part.k_means)
    if means > WIDEST_PLANE:
        return f"the triton backend takes page means of up to {WIDEST_PLANE} channels, not {means}"
    if widest > WIDEST_PLANE:
        return f"the triton backend takes planes up to {WIDEST_PLANE} channels, not {widest}"
    return None


def seal(layout: PageLayout, k: Tensor, v: Tensor, pool: PagePool, pages: Tensor) -> None:
    """See `Backend.seal`. One launch a class of heads; bytes between sections are left as they are."""
    if len(pages) == 0:
        return
    first = 0
    for part in layout.parts:
        some = slice(first, first + part.tokens)
        _seal_part(part, k[:, :, some], v[:, :, some], pool, pages)
        first += part.tokens


def _seal_part(layout: PageLayout, k: Tensor, v: Tensor, pool: PagePool, pages: Tensor) -> None:
    """The tokens of one class."""
    k, k_means = less_means(layout, k)
    k, v, k_scales, v_scales = of_layout(layout, k, v)
    k, v = _dense(k), _dense(v)
    for heads in head_classes(layout):
        index = _head_index(heads, k.device)
        k_tiles, tiles = _seal_tiles(heads.k, layout.tokens, 0)
        v_tiles, tiles = _seal_tiles(heads.v, layout.tokens, tiles)
        _launch(
            seal_pages,
            (len(pages), len(index), max(1, tiles)),
            k,
            v,
            k if k_scales is None else k_scales,
            v if v_scales is None else v_scales,
            k if k_means is None else k_means,
            pages,
            pool.addresses,
            index,
            *_strides(k),
            *_strides(v),
            K=heads.k,
            V=heads.v,
            K_TILES=k_tiles,
            V_TILES=v_tiles,
            K_SCALES=heads.k_scales,
            V_SCALES=heads.v_scales,
            K_MEANS=heads.k_means,
            K_CHANNELS=0 if k_means is None else k_means.shape[-1],
            SPAN=padded(layout.tokens),
            KV_HEADS=layout.kv_heads,
            TOKENS=layout.tokens,
            K_ALIGNED=_aligned(k),
            V_ALIGNED=_aligned(v),
            HALF=DTYPES[layout.half],
            num_warps=4,
            enable_fp_fusion=False,  # a fused multiply-add would give other codes than the reference
        )


def _seal_tiles(
    planes: tuple[PlaneSpec, ...], tokens: int, first: int
) -> tuple[tuple[tuple[int, int, int, int], ...], int]:
    """Tiles of `seal_pages` for some planes, numbered from `first`, and the number after the last.

    A plane's are (first tile, the one after its last, positions a run spans, runs a tile), or, of a plane that is one
    run, bytes instead of positions.
    """
    tiles = []
    for plane in planes:
        runs, length = (plane.channels, tokens) if plane.by_tokens else (tokens, plane.channels)
        if plane.flat:  # bytes of one run, or of its low bits: those above them have as many tiles
            low = SPLIT.get(plane.bits, (plane.bits,))[0]
            span, block, units = FLAT_BYTES, 1, runs * length * low // 8
            count = -(-units // span)
        else:
            span = padded(length)
            block = min(padded(runs), max(1, SEALED_ELEMENTS // span))
            count = -(-runs // block)
        tiles.append((first, first + count, span, block))
        first += count
    return tuple(tiles), first


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
    parts = cached.layout.parts if cached.layout is not None else ()
    first_window = page_splits * len(
        parts
    )  # every class of tokens has results of its own, merged with the others
    shape = (first_window + window_splits, batch, n, q_heads)
    # Every row of every split is written; heads that store fewer V channels leave the others at 0.
    full = all(sum(s.channels for s in head) == v_dim for part in parts for head in part.v)
    part_out = (torch.empty if full else torch.zeros)(*shape, v_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    if slots:
        _attend_window(cached, _dense(q), scale, softcap, part_out[first_window:], part_lse[first_window:])
    bias = None if page_bias is None else page_bias.contiguous()
    for number, part in enumerate(parts if page_splits else ()):
        mine = slice(number * page_splits, (number + 1) * page_splits)
        for heads in head_classes(part):
            _attend_pages(
                cached, part, heads, _dense(q_pages), scale, softcap, bias, part_out[mine], part_lse[mine]
            )
    out = torch.empty(batch, n, q_heads, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, n, q_heads, dtype=torch.float32, device=q.device)
    if lse.numel():
        _launch(
            merge_parts, (lse.numel(),), part_out, part_lse, out, lse, lse.numel(), len(part_out),
            V_DIM=v_dim, V_WIDTH=padded(v_dim), num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel where its first argument is, or write down that it would be run: see `recorded`."""
    launches = _recorded.get()
    if launches is not None:
        launches.append(Launch(kernel, arguments, constants))
        return
    first: Tensor = arguments[0]
    with (
        torch.cuda.device(first.device) if first.is_cuda else nullcontext()
    ):  # triton launches on the current one
        kernel[grid](*arguments, **constants)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """A list of what `attend` and `seal` launch in this context; nothing runs, and their results are undefined."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> list[int]:
    """Strides of all dimensions but the last; 0 where there is one element, and torch may say anything."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1])]


def _aligned(*tensors: Tensor) -> bool:
    """Whether all rows of the tensors begin at multiples of 16 bytes."""
    return not any(
        x.data_ptr() % 16 or any(stride * x.itemsize % 16 for stride in _strides(x)) for x in tensors
    )


def _attend_pages(
    cached: Cached,
    layout: PageLayout,
    heads: HeadClass,
    q: Tensor,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    part_out: Tensor,
    part_lse: Tensor,
) -> None:
    assert cached.layout is not None
    pool, splits = cached.pool, len(part_out)
    assert pool is not None
    batch, n, q_heads, _ = q.shape
    group = q_heads // layout.kv_heads
    index = _head_index(heads, q.device)
    dot = dot_type(q.dtype)
    tiling = page_tiling(layout.tokens, heads.k + heads.v, n * group, dot)
    _launch(
        attend_pages,
        (batch * len(index), splits, -(-n * group // tiling.rows)),
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
        len(index),
        splits,
        *_strides(q),
        cached.table.stride(0),
        float(scale),
        float(softcap),
        K=heads.k,
        V=heads.v,
        K_SCALES=heads.k_scales,
        V_SCALES=heads.v_scales,
        K_MEANS=heads.k_means,
        TOKENS=layout.tokens,
        PAGE=cached.layout.page_tokens,
        TILE=tiling.tokens,
        GROUP=group,
        ROWS=tiling.rows,
        V_DIM=part_out.shape[-1],
        ALIGNED=_aligned(q),
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
    _launch(
        attend_window,
        (batch * kv_heads, len(part_out), -(-n * group // tiling.rows)),
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
        *_strides(q),
        *_strides(k),
        *_strides(v),
        float(scale),
        float(softcap),
        K_DIM=k_dim,
        V_DIM=v_dim,
        K_WIDTH=padded(k_dim),
        V_WIDTH=padded(v_dim),
        TILE=tiling.tokens,
        GROUP=group,
        ROWS=tiling.rows,
        ALIGNED=_aligned(q, k, v),
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
