"""Linear layers whose weights are stored as float32, bfloat16 or int8: y = x Wᵀ + b at the speed at which W is read.

Few rows of x run through `cpu_linear.c`; many through torch's matmul, on blocks of W widened to float32 where torch
has nothing faster for what is stored. int8: symmetric, with a bfloat16 scale for every 32 weights or fewer of a row
(those that meet in one lane of the C kernels, see `cpu_linear.h`); the kernels take x as int16 with one scale a row,
which loses a thousandth of what int8 weights lose.
"""

import ctypes
import functools
import logging
import mmap
import threading
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcc.kernels import build, cpu

WeightType = Literal["float32", "bfloat16", "int8"]
KINDS: dict[WeightType, int] = {"float32": 0, "bfloat16": 1, "int8": 2}  # the C header's enum

LANES, BLOCK = 8, 256  # int8: groups of a block, and its columns at most; the C file's
# Rows of x up to which the C kernels are faster than torch (measured, AVX2) ...
FEW: dict[WeightType, int] = {"float32": 512, "bfloat16": 512, "int8": 1 << 40}
# ... and where torch multiplies bfloat16 matrices in units of their own (by arithmetic: 5 times as many a second).
FEW_BESIDE_UNITS: dict[WeightType, int] = {"float32": 512, "bfloat16": 16, "int8": 256}
WIDENED = 1 << 20  # weights widened at a time

log = logging.getLogger(__name__)


class _Weight(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("scales", c_void_p), *((f, c_int64) for f in ("rows", "cols", "kind"))]


@dataclass(frozen=True)
class Packed:
    """A weight [rows, cols] as the C kernels read it.

    data: float32 or bfloat16 [rows, cols], or int8 [rows, blocks, steps, 8, 2], filled up by zeros;
    scales: of int8 weights, bfloat16 [rows, blocks, 8], else None.
    """

    data: Tensor
    scales: Tensor | None
    kind: WeightType
    rows: int
    cols: int

    @cached_property
    def struct(self) -> ctypes.Structure:
        """The C header's Weight; valid as long as this object."""
        scales = None if self.scales is None else self.scales.data_ptr()
        return _Weight(self.data.data_ptr(), scales, self.rows, self.cols, KINDS[self.kind])

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def dequantised(self, rows: slice | Tensor | None = None) -> Tensor:
        """`rows` (default: all; a tensor of row numbers for an embedding) of the weight as float32 [n, cols]."""
        select = slice(None) if rows is None else rows
        data = self.data[select]
        if self.scales is None:
            return data.float()
        wide = data.float().mul_(self.scales[select].float()[..., None, :, None])
        return wide.flatten(-4)[..., : self.cols]


def pack(weight: Tensor, kind: WeightType, *, move: bool = False) -> Packed:
    """Store a weight [rows, cols] of any float type, in large pages where the system has them.

    One that needs no conversion stays where it lies, memory-mapped perhaps, unless it shall `move` there, too: a
    second copy, read a twentieth faster.
    """
    weight = weight.detach()
    rows, cols = weight.shape
    if kind != "int8":
        data = weight.to(getattr(torch, kind)).contiguous()
        converted = data.data_ptr() != weight.data_ptr()
        return Packed(placed(data) if move or converted else data, None, kind, rows, cols)
    data, scales = _quantised(weight)
    return Packed(placed(data), placed(scales), kind, rows, cols)


def concat(weights: Sequence[Packed]) -> Packed:
    """One weight that has the rows of all, in order; they must agree in kind and columns."""
    first = weights[0]
    if any((w.kind, w.cols) != (first.kind, first.cols) for w in weights):
        raise ValueError("weights of different kinds or widths cannot be one weight")
    data = placed(torch.cat([w.data for w in weights]))
    scales = [w.scales for w in weights if w.scales is not None]
    return Packed(
        data,
        placed(torch.cat(scales)) if scales else None,
        first.kind,
        sum(w.rows for w in weights),
        first.cols,
    )


def scratch_bytes(weight: Packed, n: int, threads: int) -> int:
    """How much scratch the C kernels need for `n` rows of x. Raises KernelUnavailable where they do not build."""
    return _library().kvcc_linear_scratch(weight.cols, n, threads)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., cols] times Wᵀ, plus bias [rows]: [..., rows] in x's type; products and sums in float32.

    Where the processor multiplies bfloat16 matrices, many rows of x are cut to bfloat16 unless weights are float32.
    """
    rows = x.reshape(-1, weight.cols)
    few = FEW_BESIDE_UNITS if multiplies_bfloat16() else FEW
    if len(rows) <= few[weight.kind] and _usable():
        out = _few(rows.float(), weight, None if bias is None else bias.float())
    else:
        out = _many(rows, weight, bias)
    return out.to(x.dtype).view(*x.shape[:-1], weight.rows)


def _few(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    n, threads, library = len(x), torch.get_num_threads(), _library()
    out = torch.empty(n, weight.rows)
    scratch = torch.empty(library.kvcc_linear_scratch(weight.cols, n, threads), dtype=torch.uint8)
    library.kvcc_linear(
        *(ctypes.byref(weight.struct), x.data_ptr(), x.stride(0), n, out.data_ptr(), weight.rows),
        *(None if bias is None else bias.data_ptr(), 0, threads, scratch.data_ptr()),
    )
    return out


def _many(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    if weight.kind == "float32":
        return F.linear(x.float(), weight.data, None if bias is None else bias.float())
    dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    x = x.to(dtype)
    if weight.data.dtype == dtype:
        return F.linear(x, weight.data, None if bias is None else bias.to(dtype))
    out = torch.empty(len(x), weight.rows, dtype=dtype)
    step = max(1, WIDENED // weight.cols)
    for start in range(0, weight.rows, step):
        rows = slice(start, start + step)
        torch.mm(x, weight.dequantised(rows).to(dtype).T, out=out[:, rows])
    return out if bias is None else out.add_(bias)


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [rows, blocks, steps, 8, 2] and scales [rows, blocks, 8] bfloat16, some rows at a time."""
    rows, cols = weight.shape
    blocks, steps = _blocks(cols)
    data = torch.empty(rows, blocks, steps, LANES, 2, dtype=torch.int8)
    scales = torch.empty(rows, blocks, LANES, dtype=torch.bfloat16)
    filler = data[0].numel() - cols
    step = max(1, WIDENED // cols)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        wide = F.pad(weight[part].float(), (0, filler)).view(data[part].shape)
        scale = (wide.abs().amax((2, 4)) / 127).bfloat16()
        scales[part] = scale
        divisor = scale.float().masked_fill_(scale == 0, 1.0)
        data[part] = wide.div_(divisor[:, :, None, :, None]).round_().clamp_(-127, 127)
    return data, scales


def _blocks(cols: int) -> tuple[int, int]:
    """(blocks of a row of int8 weights, steps of 16 columns in each): as even as whole pairs of steps allow."""
    blocks = -(-cols // BLOCK)
    return blocks, -(-cols // (blocks * 32)) * 2


# --------------------------------------------------------------------------- memory


CHUNK = 64 << 20  # bytes of memory taken at a time
LINE = 64  # bytes of a cache line


@dataclass
class _Chunk:
    """Memory that weights are being put into, one behind the other."""

    memory: mmap.mmap | None = None
    used: int = 0


_chunk = _Chunk()
_placing = threading.Lock()


def placed(tensor: Tensor) -> Tensor:
    """A copy in large pages, next to the one placed before; the tensor itself where the system has no such pages.

    Memory comes in chunks; a chunk goes when the last tensor in it does.
    """
    if not tensor.numel() or not _large_pages():
        return tensor.contiguous()
    size = -(-tensor.nbytes // LINE) * LINE
    with _placing:
        if _chunk.memory is None or _chunk.used + size > len(_chunk.memory):
            memory = mmap.mmap(-1, max(size, CHUNK), mmap.MAP_ANONYMOUS | mmap.MAP_PRIVATE)
            memory.madvise(mmap.MADV_HUGEPAGE)
            _chunk.memory, _chunk.used = memory, 0
        flat = torch.frombuffer(_chunk.memory, dtype=tensor.dtype, count=tensor.numel(), offset=_chunk.used)
        _chunk.used += size
    return flat.view(tensor.shape).copy_(tensor)


@functools.cache
def _large_pages() -> bool:
    """Whether memory may be asked for in large pages (Linux's transparent ones)."""
    try:
        enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    return "[never]" not in enabled and hasattr(mmap, "MADV_HUGEPAGE")


# --------------------------------------------------------------------------- what this machine has


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.load()
    library.kvcc_linear.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p]
    library.kvcc_linear.argtypes += [ctypes.c_int, ctypes.c_int, c_void_p]
    library.kvcc_linear_scratch.argtypes = [c_int64] * 3
    library.kvcc_linear_scratch.restype = c_int64
    return library


@functools.cache
def _usable() -> bool:
    reason = cpu.available()
    if reason is not None:
        log.warning("linear layers run in torch: %s", reason)
    return reason is None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has units for products of bfloat16 matrices."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
