"""The `cpu` backend: `cpu_attend.c`, compiled by `kvcc.kernels.build`, called on raw pointers."""

import ctypes
import functools
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcc.errors import CapacityError, KernelUnavailable
from kvcc.kernels import build
from kvcc.kernels.head_classes import STEPS
from kvcc.kernels.layout import PageLayout, Section
from kvcc.kernels.levels import KINDS
from kvcc.kernels.page_means import mean_steps
from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Cached

name = "cpu"

FIELDS = 11  # of a section
ELEMENT = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}  # the C file's enum
LAYOUT_FIELDS = (
    *("sections", "index", "token_scales", "tokens", "half", "page_tokens", "rest"),
    *("page_means", "mean_steps", "mean_channels"),
)


class _Layout(ctypes.Structure):
    _fields_ = [(f, c_int64) for f in LAYOUT_FIELDS]


class _Array(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 4), ("type", c_int64)]


class _Attend(ctypes.Structure):
    _fields_ = [
        ("layout", _Layout),
        *(
            (f, c_int64)
            for f in ("batch", "n", "q_heads", "kv_heads", "dk", "dv", "k_channels", "slots", "sinks")
        ),
        *((f, _Array) for f in ("q", "q_pages", "window_k", "window_v")),
        *((f, c_void_p) for f in ("lengths", "sealed", "table")),
        ("table_stride", c_int64),
        *((f, c_void_p) for f in ("addresses", "bias")),
        *((f, c_float) for f in ("scale", "softcap")),
        *((f, c_void_p) for f in ("out", "lse")),
        *((f, c_int64) for f in ("threads", "max_section", "max_metadata")),
    ]


class _Seal(ctypes.Structure):
    _fields_ = [
        ("layout", _Layout),
        *((f, c_int64) for f in ("pages", "kv_heads")),
        *((f, _Array) for f in ("k", "v")),
        ("addresses", c_void_p),
        *((f, c_int64) for f in ("threads", "max_section")),
    ]


@dataclass(frozen=True)
class _Described:
    """A PageLayout as the C code reads it; the tensors own what `record` points at."""

    record: _Layout
    sections: Tensor  # [sections, FIELDS] int64
    index: Tensor  # [2 Hkv + 1] int64: head h's K sections begin at 2h, its V sections at 2h + 1
    token_scales: Tensor  # [2 Hkv] int64: of head h's K at 2h, of its V at 2h + 1; -1 for none
    page_means: Tensor  # [Hkv, 2] int64: where they lie, and of how many channels
    mean_steps: Tensor  # [Hkv, most channels] float32: what their codes count
    rest: "_Described | None"
    max_section: int  # codes, of all classes of tokens
    max_metadata: int  # scales


NO_PAGES = _Layout(*(0 for _ in LAYOUT_FIELDS))


def available() -> str | None:
    """None when the kernels run on this machine, else one line saying why not. Compiles them once."""
    try:
        build.load()
    except KernelUnavailable as error:
        return str(error)
    return None


def supports(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> str | None:
    """None when pages of `layout` with windows of `dtype` on `device` run here, else why not, in one line."""
    if device.type != "cpu":
        return f"the cpu backend runs on the CPU, not on {device}"
    if dtype not in ELEMENT:
        return f"the cpu backend has no kernels for {dtype}; use float32, float16 or bfloat16"
    if layout.half not in (torch.float16, torch.bfloat16):
        return f"the cpu backend stores 16-bit planes as float16 or bfloat16, not {layout.half}"
    return available()


def seal(layout: PageLayout, k: Tensor, v: Tensor, pool: PagePool, pages: Tensor) -> None:
    """See `Backend.seal`. k and v: float32, float16 or bfloat16 with any strides."""
    if not len(pages):
        return
    described = _describe(layout)
    addresses = pool.addresses[pages]
    call = _Seal(
        described.record,
        len(pages),
        layout.kv_heads,
        _array(k),
        _array(v),
        addresses.data_ptr(),
        torch.get_num_threads(),
        described.max_section,
    )
    if build.load().kvcc_seal(ctypes.byref(call)):
        raise CapacityError("no memory for the cpu kernels' scratch while sealing pages")


def attend(
    cached: Cached,
    q: Tensor,
    q_pages: Tensor,
    scale: float,
    softcap: float = 0.0,
    page_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `Backend.attend`. All tensors may have any strides but for a window's last, which must be 1."""
    batch, n, q_heads, dk = q.shape
    _, kv_heads, slots, dv = cached.window_v.shape
    out = torch.empty(batch, n, q_heads, dv)
    lse = torch.empty(batch, n, q_heads)
    pages = cached.layout is not None and cached.pool is not None
    described = _describe(cached.layout) if cached.layout is not None and pages else None
    window_k, window_v, table = _rows(cached.window_k), _rows(cached.window_v), _rows(cached.table)
    lengths, sealed = cached.lengths.contiguous(), cached.sealed.contiguous()
    bias = None if page_bias is None else page_bias.float().contiguous()
    call = _Attend(
        described.record if described else NO_PAGES,
        *(batch, n, q_heads, kv_heads, dk, dv, q_pages.shape[-1], slots, cached.sinks),
        *(_array(q), _array(q_pages), _array(window_k), _array(window_v)),
        *(lengths.data_ptr(), sealed.data_ptr(), table.data_ptr(), table.stride(0)),
        cached.pool.addresses.data_ptr() if cached.pool is not None else None,
        None if bias is None else bias.data_ptr(),
        *(scale, softcap, out.data_ptr(), lse.data_ptr(), torch.get_num_threads()),
        *((described.max_section, described.max_metadata) if described else (0, 0)),
    )
    if build.load().kvcc_attend(ctypes.byref(call)):
        raise CapacityError("no memory for the cpu kernels' scratch while attending")
    return out, lse


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _array(x: Tensor) -> _Array:
    return _Array(x.data_ptr(), (c_int64 * 4)(*x.stride()), ELEMENT[x.dtype])


@functools.lru_cache(maxsize=1024)
def _describe(layout: PageLayout) -> _Described:
    rows: list[list[int]] = []
    index = [0]
    for k, v in zip(layout.k, layout.v, strict=True):
        for sections in (k, v):
            rows.extend(_section_row(section) for section in sections)
            index.append(len(rows))
    sections_, index_ = torch.tensor(rows, dtype=torch.int64).reshape(-1, FIELDS), torch.tensor(index)
    scales = [
        -1 if at is None else at
        for pair in zip(layout.k_token_scales, layout.v_token_scales, strict=True)
        for at in pair
    ]
    scales_ = torch.tensor(scales, dtype=torch.int64)
    codes = [layout.tokens * row[1] for row in rows]
    metadata = [layout.tokens * row[1] // row[4] for row in rows if row[0] < 16 and row[4]]
    pointers = (x.data_ptr() for x in (sections_, index_, scales_))
    rest = None if layout.rest is None else _describe(layout.rest)
    behind = 0 if rest is None else ctypes.addressof(rest.record)
    means = torch.tensor(layout.k_means, dtype=torch.int64).reshape(-1, 2)
    mean_steps_ = mean_steps(layout, max((count for _, count in layout.k_means), default=0))
    record = _Layout(
        *(*pointers, layout.tokens, ELEMENT[layout.half], layout.page_tokens, behind),
        *(means.data_ptr(), mean_steps_.data_ptr(), mean_steps_.shape[1]),
    )
    if rest is not None:
        codes, metadata = [*codes, rest.max_section], [*metadata, rest.max_metadata]
    largest = max(codes, default=0), max(metadata, default=0)
    return _Described(record, sections_, index_, scales_, means, mean_steps_, rest, *largest)


def _section_row(s: Section) -> list[int]:
    by_token = int(s.groups == "channels")
    return [
        s.bits,
        s.channels,
        s.first_channel,
        by_token,
        s.group_size,
        s.codes,
        s.scales,
        s.zeros,
        STEPS.index(s.steps),
        KINDS.index(s.levels),
        s.clip,
    ]
