"""Linear layers whose weights are stored as float32, bfloat16 or int8: y = x Wᵀ + b at the speed at which W is read.

Few rows of x run through `cpu_linear.c`; many through torch's matmul, on blocks of W widened to float32 where torch
has nothing faster for what is stored. int8: groups of 32 along a row share a scale (symmetric, a bfloat16); the C
kernels take x as int16 with one scale a row, which loses a thousandth of what int8 weights lose.
"""

import ctypes
import functools
import logging
import mmap
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcc.kernels import build, cpu

WeightType = Literal["float32", "bfloat16", "int8"]
KINDS: dict[WeightType, int] = {"float32": 0, "bfloat16": 1, "int8": 2}  # the C header's enum

GROUP = 32  # int8 weights to a scale; the C file's
FEW = {"float32": 64, "bfloat16": 64, "int8": 64}  # rows of x up to which the C kernels are faster than torch
BLOCK = 1 << 20  # weights widened at a time

log = logging.getLogger(__name__)


class _Weight(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("scales", c_void_p), *((f, c_int64) for f in ("rows", "cols", "kind"))]


@dataclass(frozen=True)
class Packed:
    """A weight [rows, cols] as the C kernels read it.

    data: float32 or bfloat16 [rows, cols], or int8 [rows, groups, 32] with the last group filled up by zeros;
    scales: bfloat16 [rows, groups] of int8 weights, else None.
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
        wide = data.float().mul_(self.scales[select].float().unsqueeze(-1))
        return wide.flatten(-2)[..., : self.cols]


def pack(weight: Tensor, kind: WeightType) -> Packed:
    """Store a weight [rows, cols] of any float type; one that is float32 already stays where it lies."""
    rows, cols = weight.shape
    if kind != "int8":
        dtype = getattr(torch, kind)
        data = weight.contiguous() if weight.dtype == dtype else _placed(weight.to(dtype))
        return Packed(data, None, kind, rows, cols)
    data, scales = _quantised(weight)
    return Packed(_placed(data), _placed(scales), kind, rows, cols)


def concat(weights: Sequence[Packed]) -> Packed:
    """One weight that has the rows of all, in order; they must agree in kind and columns."""
    first = weights[0]
    if any((w.kind, w.cols) != (first.kind, first.cols) for w in weights):
        raise ValueError("weights of different kinds or widths cannot be one weight")
    data = _placed(torch.cat([w.data for w in weights]))
    scales = [w.scales for w in weights if w.scales is not None]
    return Packed(
        data,
        _placed(torch.cat(scales)) if scales else None,
        first.kind,
        sum(w.rows for w in weights),
        first.cols,
    )


def scratch_bytes(weight: Packed, n: int, threads: int) -> int:
    """How much scratch the C kernels need for `n` rows of x. Raises KernelUnavailable where they do not build."""
    return _library().kvcc_linear_scratch(weight.cols, n, threads)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., cols] times Wᵀ, plus bias [rows]: [..., rows] in x's type; products and sums in float32.

    Many rows of x are cut to bfloat16 where weights are, if the processor multiplies bfloat16 matrices.
    """
    rows = x.reshape(-1, weight.cols)
    if len(rows) <= FEW[weight.kind] and _usable():
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
    if weight.kind == "bfloat16" and _multiplies_bfloat16():
        return F.linear(x.bfloat16(), weight.data, None if bias is None else bias.bfloat16())
    x = x.float()
    out = torch.empty(len(x), weight.rows)
    step = max(1, BLOCK // weight.cols)
    for start in range(0, weight.rows, step):
        rows = slice(start, start + step)
        torch.mm(x, weight.dequantised(rows).T, out=out[:, rows])
    return out if bias is None else out.add_(bias)


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [rows, groups, 32] and scales [rows, groups] bfloat16, a block of rows at a time."""
    rows, cols = weight.shape
    groups = -(-cols // GROUP)
    data = torch.empty(rows, groups, GROUP, dtype=torch.int8)
    scales = torch.empty(rows, groups, dtype=torch.bfloat16)
    step = max(1, BLOCK // cols)
    for start in range(0, rows, step):
        wide = F.pad(weight[start : start + step].float(), (0, groups * GROUP - cols)).unflatten(
            -1, (groups, GROUP)
        )
        scale = (wide.abs().amax(-1) / 127).bfloat16()
        scales[start : start + step] = scale
        divisor = scale.float().masked_fill_(scale == 0, 1.0)
        data[start : start + step] = wide.div_(divisor.unsqueeze(-1)).round_().clamp_(-127, 127)
    return data, scales


# --------------------------------------------------------------------------- memory


@dataclass
class _Chunk:
    memory: mmap.mmap | None
    used: int = 0


_chunk = _Chunk(None)
CHUNK = 64 << 20


def _placed(tensor: Tensor) -> Tensor:
    """A copy in memory of large pages, where the system has them: it is read faster, and weights lie side by side.

    Memory comes in chunks, which go when the last tensor in them does.
    """
    flags = getattr(mmap, "MAP_ANONYMOUS", None)
    if flags is None or not hasattr(mmap, "MADV_HUGEPAGE") or not tensor.numel():
        return tensor.contiguous()
    size = -(-tensor.nbytes // 64) * 64
    if _chunk.memory is None or _chunk.used + size > len(_chunk.memory):
        _chunk.memory, _chunk.used = mmap.mmap(-1, max(size, CHUNK), flags | mmap.MAP_PRIVATE), 0
        _chunk.memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(_chunk.memory, dtype=tensor.dtype, count=tensor.numel(), offset=_chunk.used)
    _chunk.used += size
    return flat.view(tensor.shape).copy_(tensor)


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
def _multiplies_bfloat16() -> bool:
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
