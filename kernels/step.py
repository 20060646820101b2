"""Records of `cpu_step.c`: fused operations on float32 tensors whose addresses are fixed, run many by one call.

Every function below makes one record. Tensors are float32 unless said otherwise and must outlive the record; rows
may lie apart, but the elements of a row lie together.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import Literal

import torch
from torch import Tensor

from kvcc.errors import CapacityError
from kvcc.kernels import build, cpu
from kvcc.kernels.cpu import ELEMENT
from kvcc.kernels.protocol import Cached

Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]

_NAMES = (
    *("linear", "rms_norm", "layer_norm", "rotate", "gate", "add", "multiply"),
    *("store", "gather", "project", "attend", "sink"),
)
_OP = {name: number for number, name in enumerate(_NAMES)}  # the C file's enums
_ACTIVATION: dict[str, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}


class Record(ctypes.Structure):
    """One operation, as the C code reads it."""

    _fields_ = [
        *((f, c_int64) for f in ("op", "rows", "cols", "kind")),
        ("inputs", c_void_p * 4),
        ("out", c_void_p),
        ("stride", c_int64 * 8),
        ("number", c_float),
        ("scratch", c_void_p),
    ]


def _record(
    op: str,
    rows: int,
    cols: int,
    inputs: Sequence[int | None],
    out: int | None,
    stride: Sequence[int] = (),
    *,
    kind: int = 0,
    number: float = 0.0,
    scratch: int | None = None,
) -> Record:
    return Record(
        *(_OP[op], rows, cols, kind), (c_void_p * 4)(*inputs), out, (c_int64 * 8)(*stride), number, scratch
    )


def run(records: "ctypes.Array[Record]", count: int, threads: int) -> None:
    """Run the first `count` records in order. Raises CapacityError when memory for scratch is short."""
    if build.load().kvcc_run(records, c_int64(count), threads):
        raise CapacityError("no memory for the cpu kernels' scratch during a decode step")


def run_now(record: Record) -> None:
    """Run one record."""
    run((Record * 1)(record), 1, torch.get_num_threads())


def rows_of(x: Tensor) -> tuple[int, int, int, tuple[int, ...]] | None:
    """(rows, cols, elements between rows, order of the outer dimensions) of evenly spaced float32 rows, else None."""
    if x.dtype != torch.float32 or x.dim() < 1 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return None
    outer = [d for d in range(x.dim() - 1) if x.shape[d] != 1]
    outer.sort(key=x.stride)
    rows, between = 1, x.stride(outer[0]) if outer else x.shape[-1]
    for d in outer:
        if x.stride(d) != rows * between:
            return None
        rows *= x.shape[d]
    return rows, x.shape[-1], between, tuple(outer)


def _spans(*tensors: Tensor) -> list[tuple[int, int, int, tuple[int, ...]]] | None:
    """`rows_of` each, if all have the same rows in the same order."""
    spans = [span for x in tensors if (span := rows_of(x))]
    alike = len(spans) == len(tensors) and len({(span[0], span[3]) for span in spans}) == 1
    return spans if alike else None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: int, out: Tensor) -> Record | None:
    """out = x / rms(x) * (offset + weight) over the last dimension; None when x does not lie in even rows."""
    return _norm("rms_norm", x, weight, None, eps, offset, out)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> Record | None:
    """out = (x - mean) / deviation * weight + bias over the last dimension; None as in `rms_norm`."""
    return _norm("layer_norm", x, weight, bias, eps, 0, out)


def _norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: int, out: Tensor
) -> Record | None:
    spans = _spans(x, out)
    if spans is None or x.shape != out.shape or not all(_flat(w, x.shape[-1]) for w in (weight, bias)):
        return None
    inputs = (x.data_ptr(), _pointer(weight), _pointer(bias))
    stride = [span[2] for span in spans]
    return _record(op, *spans[0][:2], inputs, out.data_ptr(), stride, kind=offset, number=eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Record | None:
    """out = x * cos + rotate_half(x) * sin; x, out [1, heads, n, dim], cos and sin [1, 1, n, dim] or [n, dim]."""
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor):  # a graph may multiply by a size
        return None
    if x.dim() != 4 or cos.numel() != x.shape[-2] * x.shape[-1] or sin.shape != cos.shape:
        return None
    cos, sin = cos.reshape(x.shape[-2:]), sin.reshape(x.shape[-2:])
    fits = (
        all(t.dtype == torch.float32 and t.stride(-1) == 1 for t in (x, cos, sin, out))
        and x.shape[0] == 1
        and x.shape == out.shape
        and x.shape[-1] % 2 == 0
    )
    if not fits:
        return None
    _, heads, n, dim = x.shape
    stride = (
        x.stride(2),
        x.stride(1),
        out.stride(2),
        out.stride(1),
        cos.stride(0),
        sin.stride(0),
        heads,
    )
    inputs = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), None)
    return _record("rotate", n, dim, inputs, out.data_ptr(), stride)


def gate(g: Tensor, up: Tensor | None, activation: Activation, out: Tensor) -> Record | None:
    """out = activation(g) * up, or activation(g) without `up`; all of one shape."""
    return _rowwise("gate", g, up, out, _ACTIVATION[activation])


def add(a: Tensor, b: Tensor, out: Tensor) -> Record | None:
    """out = a + b, of one shape."""
    return _rowwise("add", a, b, out)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Record | None:
    """out = a * b, of one shape."""
    return _rowwise("multiply", a, b, out)


def _rowwise(op: str, a: Tensor, b: Tensor | None, out: Tensor, kind: int = 0) -> Record | None:
    if not isinstance(b, Tensor | None):  # a size
        return None
    spans = _spans(a, a if b is None else b, out)
    if spans is None or a.shape != out.shape or (b is not None and a.shape != b.shape):
        return None
    stride = [span[2] for span in spans]
    return _record(op, *spans[0][:2], (a.data_ptr(), _pointer(b)), out.data_ptr(), stride, kind=kind)


def linear(
    x: Tensor, weight: ctypes.Structure, bias: Tensor | None, out: Tensor, scratch: Tensor
) -> Record | None:
    """out = x Wᵀ + bias, rows by rows; weight: `kvcc.kernels.linear.Packed.struct`; scratch: bytes."""
    spans = _spans(x, out)
    if (
        spans is None
        or not _flat(bias, weight.rows)
        or (x.shape[-1], out.shape[-1]) != (weight.cols, weight.rows)
    ):
        return None
    inputs = (x.data_ptr(), ctypes.addressof(weight), _pointer(bias))
    stride = [span[2] for span in spans]
    return _record("linear", *spans[0][:2], inputs, out.data_ptr(), stride, scratch=scratch.data_ptr())


def store(x: Tensor, window: Tensor, slots: Tensor) -> Record:
    """Write x [heads, rows, dim] to window [rows, heads, slots, dim] (any float type) at slots [rows] int64."""
    heads, rows, dim = x.shape
    stride = (x.stride(1), x.stride(0), *window.stride()[:3], heads)
    return _record(
        "store",
        rows,
        dim,
        (x.data_ptr(), slots.data_ptr()),
        window.data_ptr(),
        stride,
        kind=ELEMENT[window.dtype],
    )


def gather(
    q: Tensor, channels: Tensor, mean: Tensor | None, scale: float, out: Tensor, bias: Tensor
) -> Record:
    """Queries' stored channels, and what the others' mean adds to logits.

    q: [heads, rows, dim]; channels: [1 or rows, 1, heads, kept] int64; mean: [heads, dim] or None; out: [rows,
    heads, kept]; bias: [rows, heads].
    """
    heads, rows, dim = q.shape
    stride = (q.stride(1), q.stride(0), channels.stride(0) if len(channels) > 1 else 0, heads, dim)
    inputs = (q.data_ptr(), channels.data_ptr(), _pointer(mean))
    return _record(
        "gather", rows, out.shape[-1], inputs, out.data_ptr(), stride, number=scale, scratch=bias.data_ptr()
    )


def project(q: Tensor, basis: Tensor, mean: Tensor | None, scale: float, out: Tensor, bias: Tensor) -> Record:
    """Queries in the basis of pages, and their logits with K's mean.

    q: [heads, rows, dim]; basis: [KV heads, dim, kept], contiguous; mean: [KV heads, dim] or None; out: [rows, heads,
    kept]; bias: [rows, heads].
    """
    heads, rows, dim = q.shape
    stride = (q.stride(1), q.stride(0), heads // len(basis), heads, dim)
    inputs = (q.data_ptr(), basis.data_ptr(), _pointer(mean))
    return _record(
        "project", rows, out.shape[-1], inputs, out.data_ptr(), stride, number=scale, scratch=bias.data_ptr()
    )


def attend_call(
    cached: Cached,
    q: Tensor,
    q_pages: Tensor,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> ctypes.Structure:
    """A `Backend.attend` call on tensors that stay where they are."""
    batch, n, q_heads, dk = q.shape
    _, kv_heads, slots, dv = cached.window_v.shape
    described = (
        cpu._describe(cached.layout) if cached.layout is not None and cached.pool is not None else None
    )
    call = cpu._Attend(
        described.record if described else cpu.NO_PAGES,
        *(batch, n, q_heads, kv_heads, dk, dv, q_pages.shape[-1], slots, cached.sinks),
        *(cpu._array(x) for x in (q, q_pages, cached.window_k, cached.window_v)),
        *(
            cached.lengths.data_ptr(),
            cached.sealed.data_ptr(),
            cached.table.data_ptr(),
            cached.table.stride(0),
        ),
        cached.pool.addresses.data_ptr() if cached.pool is not None else None,
        _pointer(bias),
        *(scale, softcap, out.data_ptr(), lse.data_ptr(), torch.get_num_threads()),
        *((described.max_section, described.max_metadata) if described else (0, 0)),
    )
    call.described = described  # its tables live as long as the call
    return call


def attend(call: ctypes.Structure) -> Record:
    """One `kvcc_attend` call."""
    return _record("attend", 1, 1, (ctypes.addressof(call),), None)


def sink(lse: Tensor, logits: Tensor, out: Tensor) -> Record:
    """out [rows, heads, dim] *= sigmoid(lse [rows, heads] - logits [heads])."""
    rows, heads, dim = out.shape
    return _record("sink", rows, dim, (lse.data_ptr(), logits.data_ptr()), out.data_ptr(), (heads,))


def _flat(x: Tensor | None, size: int) -> bool:
    return x is None or (x.dtype == torch.float32 and x.shape == (size,) and x.is_contiguous())


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
