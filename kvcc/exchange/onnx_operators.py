"""Pages in ONNX operators: codes packed and unpacked, values rounded to codes, and products with what pages hold.

Functions here are called while a graph is made; a value stands for a tensor of the graph. They compute what
`kernels/reference.py`, `packing.py`, `levels.py`, `token_scales.py` and `page_means.py` do. B: sequences, P: pages of
each, H: KV heads, T: tokens of a page, C: channels of a side's widest head, g: query heads of a KV head.
"""

from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript.onnx_opset import opset24 as op

from kvcc.exchange.onnx_pages import OnnxPages, Run, SidePages
from kvcc.kernels.layout import SPLIT, TOKEN_SCALE_BITS, TOKEN_SCALE_ONE, packed_bytes
from kvcc.kernels.levels import E2M1_MOST, E4M3_LEAST, E4M3_MOST, NORM_FLOOR, magnitudes, values_of
from kvcc.kernels.reference import SCALE_FLOOR
from kvcc.kernels.token_scales import scale_of

Value = Any  # of a graph that is being made

UINT8, FLOAT, FLOAT16, DOUBLE, INT32 = (
    int(t)
    for t in (
        onnx_ir.DataType.UINT8,
        onnx_ir.DataType.FLOAT,
        onnx_ir.DataType.FLOAT16,
        onnx_ir.DataType.DOUBLE,
        onnx_ir.DataType.INT32,
    )
)
HALF_MOST = 65504.0
MEAN_MOST, MEAN_ZERO = 127, 128  # the largest code of a page mean, and what a code of 0 is among bytes


def constant(x: Any, dtype: Any = np.float32) -> Value:
    """A constant tensor of a number, a list or an array."""
    return op.Constant(value=onnx_ir.tensor(np.asarray(x, dtype=dtype)))


def shape(*sizes: int) -> Value:
    """For Reshape and the like: 0 takes over a size, -1 is what is left."""
    return constant(sizes, np.int64)


def part(x: Value, first: int, count: int, axis: int = -1) -> Value:
    """`count` entries of an axis from `first` on."""
    return op.Slice(x, shape(first), shape(first + count), shape(axis))


def float32(x: Value) -> Value:
    return op.Cast(x, to=FLOAT)


# --------------------------------------------------------------------------- packing


def pack(codes: Value, bits: int, runs: int, count: int) -> Value:
    """uint8 [B, P, runs, count * bits / 8] of codes float32 [B, P, runs, count]; see kernels/packing.py."""
    if bits == 8:
        return op.Cast(codes, to=UINT8)
    if bits in SPLIT:
        first, second = SPLIT[bits]
        high = op.Floor(op.Div(codes, constant(2**first)))
        low = op.Sub(codes, op.Mul(high, constant(2**first)))
        return op.Concat(pack(low, first, runs, count), pack(high, second, runs, count), axis=-1)
    per_byte = 8 // bits
    strips = op.Reshape(codes, shape(0, 0, runs, per_byte, count // per_byte))
    places = constant([[2.0 ** (bits * i)] for i in range(per_byte)])
    return op.Cast(op.ReduceSum(op.Mul(strips, places), shape(-2), keepdims=0), to=UINT8)


def unpack(packed: Value, bits: int, count: int) -> Value:
    """Codes uint8 [..., count] of uint8 [..., count * bits / 8]."""
    if bits == 8:
        return packed
    if bits in SPLIT:
        first, second = SPLIT[bits]
        low = unpack(part(packed, 0, count * first // 8), first, count)
        high = unpack(part(packed, count * first // 8, count * second // 8), second, count)
        return op.BitwiseOr(low, op.BitShift(high, constant(first, np.uint8), direction="LEFT"))
    strips = []
    for i in range(8 // bits):
        strip = packed
        if i:
            strip = op.BitShift(packed, constant(bits * i, np.uint8), direction="RIGHT")
        if i < 8 // bits - 1:
            strip = op.BitwiseAnd(strip, constant(2**bits - 1, np.uint8))
        strips.append(strip)
    return op.Concat(*strips, axis=-1)


# --------------------------------------------------------------------------- values to pages


def seal(pages: OnnxPages, k: Value, v: Value) -> dict[str, Value]:
    """Records [B, P, size] by name of K and V, [B, P, H, C, T] float32 in the order in which pages store channels."""
    records: dict[str, list[Value]] = {name: [] for name in pages.sizes}
    for side, x in ((pages.k, k), (pages.v, v)):
        codes = means = None
        if side.mean_steps:
            x, means = _less_means(pages, side, x)
        if side.scaled_heads:
            x, codes = _scaled_tokens(side, x, pages.tokens)
        flat = op.Reshape(x, shape(0, 0, pages.kv_heads * side.width, pages.tokens))
        for run in side.runs:
            stored = flat if side.even else op.Gather(flat, constant(run.channels, np.int64), axis=2)
            for name, found, count in _seal_run(run, stored, pages.tokens):
                records[name].append(op.Reshape(found, shape(0, 0, count)))
        if codes is not None:
            heads = len(side.scaled_heads)
            packed = pack(codes, TOKEN_SCALE_BITS, heads, pages.tokens)
            count = heads * packed_bytes(TOKEN_SCALE_BITS, pages.tokens)
            records["bytes"].append(op.Reshape(packed, shape(0, 0, count)))
        if means is not None:
            records["bytes"].append(means)
    return {
        name: op.Concat(*parts, axis=-1) if len(parts) > 1 else parts[0] for name, parts in records.items()
    }


def _seal_run(run: Run, x: Value, tokens: int) -> list[tuple[str, Value, int]]:
    """What is stored of x [B, P, channels, T], in order: a record's name, numbers for it, and how many of them."""
    like, channels = run.like, len(run.channels)
    elements = channels * tokens
    if like.raw:
        return [("halves", op.Cast(x, to=FLOAT16), elements) if like.bits == 16 else ("floats", x, elements)]
    metadata: list[tuple[str, Value, int]] = []
    if like.unit and like.levels == "uniform":
        half = 2.0 ** (like.bits - 1)
        codes = op.Clip(op.Add(op.Floor(x), constant(half)), constant(0), constant(2 * half - 1))
    elif like.unit:
        codes = _nearest(x, run)
    else:
        axis, grouped = _grouped(run, x, channels, tokens)
        if like.levels == "uniform":
            codes, *found = _quantize(grouped, axis, like.bits, like.clip)
        else:
            codes, *found = _level_codes(grouped, axis, run)
        record, groups = "bytes" if like.scale_bytes == 1 else "halves", elements // like.group_size
        metadata = [(record, numbers, groups) for numbers in found]
        codes = op.Reshape(codes, shape(0, 0, channels, tokens))
    packed = pack(codes, like.bits, channels, tokens)
    return [("bytes", packed, packed_bytes(like.bits, elements)), *metadata]


def _grouped(run: Run, x: Value, channels: int, tokens: int) -> tuple[int, Value]:
    """A group's axis, and x with it: [B, P, channels, groups, size], or [B, P, groups, size, T] by channels."""
    size = run.like.group_size
    if run.groups_of_tokens:
        return 4, op.Reshape(x, shape(0, 0, channels, tokens // size, size))
    return 3, op.Reshape(x, shape(0, 0, channels // size, size, tokens))


def _quantize(x: Value, axis: int, bits: int, clip: int) -> tuple[Value, Value, Value]:
    """Codes like x, scale and zero float16 with an axis of 1 entry."""
    low, high = op.ReduceMin(x, shape(axis)), op.ReduceMax(x, shape(axis))
    if clip != 100:
        low, high = op.Mul(low, constant(clip / 100)), op.Mul(high, constant(clip / 100))
    zero = op.Cast(low, to=FLOAT16)
    span = op.Sub(high, float32(zero))
    floor = float(np.float16(SCALE_FLOOR))
    rounded = float32(op.Cast(op.Div(span, constant(2**bits - 1)), to=FLOAT16))
    scale = op.Cast(op.Max(rounded, constant(floor)), to=FLOAT16)
    steps = op.Div(op.Sub(x, float32(zero)), float32(scale))
    return op.Round(op.Clip(steps, constant(0), constant(2**bits - 1))), scale, zero


def _level_codes(x: Value, axis: int, run: Run) -> tuple[Value, Value]:
    """Codes like x, and groups' scales: float16, or uint8 codes of e4m3."""
    if run.like.levels == "e2m1":
        wanted = op.Div(op.ReduceMax(op.Abs(x), shape(axis)), constant(E2M1_MOST))
        scale = _to_e4m3(op.Clip(wanted, constant(E4M3_LEAST), constant(E4M3_MOST)))
        return _nearest(op.Div(x, _from_e4m3(scale)), run), op.Cast(scale, to=UINT8)
    squares = op.ReduceSum(_square(x), shape(axis))
    spread = op.Sqrt(op.Div(squares, constant(run.like.group_size, np.float64)))
    spread = op.Clip(spread, constant(NORM_FLOOR, np.float64), constant(HALF_MOST, np.float64))
    spread = float32(op.Cast(float32(spread), to=FLOAT16))
    codes = _nearest(op.Div(x, spread), run)
    length = op.ReduceSum(_square(_levels(codes, run)), shape(axis))
    scale = op.Min(float32(op.Sqrt(op.Div(squares, length))), constant(HALF_MOST))
    return codes, op.Cast(scale, to=FLOAT16)


def _square(x: Value) -> Value:
    wide = op.Cast(x, to=DOUBLE)
    return op.Mul(wide, wide)


def _nearest(x: Value, run: Run) -> Value:
    """Codes float32, whole numbers, of the levels nearest to x."""
    size, negative = op.Abs(x), float32(op.Less(x, constant(0)))
    if run.like.levels == "e4m3":
        return op.Add(_to_e4m3(op.Min(size, constant(E4M3_MOST))), op.Mul(negative, constant(128)))
    table = np.array(magnitudes(run.like.levels, run.like.bits), np.float32)
    codes = op.Mul(negative, constant(2 ** (run.like.bits - 1)))
    for middle in (table[1:] + table[:-1]) / 2:
        codes = op.Add(codes, float32(op.Greater(size, constant(middle))))
    return codes


def _to_e4m3(x: Value) -> Value:
    """Codes float32 of numbers 0 to 448: with E = exponent + 7 from 1 on, code = 8 (E - 1) + round(x / 2^(E - 10))."""
    powers = constant([2.0**e for e in range(-5, 9)])
    above = float32(op.GreaterOrEqual(op.Unsqueeze(x, shape(-1)), powers))
    exponent = op.ReduceSum(above, shape(-1), keepdims=0)  # E - 1
    steps = op.Gather(constant([2.0 ** (e - 9) for e in range(15)]), op.Cast(exponent, to=INT32))
    return op.Add(op.Mul(exponent, constant(8)), op.Round(op.Div(x, steps)))


def _from_e4m3(codes: Value) -> Value:
    table = values_of(torch.arange(256, dtype=torch.uint8), "e4m3", 8).nan_to_num(0.0).numpy()
    return op.Gather(constant(table), op.Cast(codes, to=INT32))


def _levels(codes: Value, run: Run) -> Value:
    """What codes of any numeric type stand for, float32."""
    if run.like.levels == "e4m3":
        return _from_e4m3(codes)
    every = torch.arange(2**run.like.bits, dtype=torch.uint8)
    table = values_of(every, run.like.levels, run.like.bits).numpy()
    return op.Gather(constant(table), op.Cast(codes, to=INT32))


def _less_means(pages: OnnxPages, side: SidePages, x: Value) -> tuple[Value, Value]:
    """x [B, P, H, C, T] less what codes of its means stand for, and these codes as bytes [B, P, channels]."""
    steps = np.array(side.mean_steps, np.float32).reshape(pages.kv_heads, side.width, 1)
    mean = float32(op.ReduceMean(op.Cast(x, to=DOUBLE), shape(-1)))
    codes = op.Round(op.Div(mean, constant(np.where(steps > 0, steps, 1))))
    codes = op.Clip(codes, constant(-MEAN_MOST), constant(MEAN_MOST))
    x = op.Sub(x, op.Mul(codes, constant(steps)))
    found = op.Reshape(codes, shape(0, 0, pages.kv_heads * side.width))
    if len(side.mean_channels) < len(side.mean_steps):
        found = op.Gather(found, constant(side.mean_channels, np.int64), axis=2)
    return x, op.Cast(op.Add(found, constant(MEAN_ZERO)), to=UINT8)


def _scaled_tokens(side: SidePages, x: Value, tokens: int) -> tuple[Value, Value]:
    """x [B, P, H, C, T] over its tokens' scales, and the codes float32 [B, P, scaled heads, T] of these."""
    half: np.ndarray = np.zeros((len(side.stored) * side.width, 1), np.float32)
    for run in side.runs:
        half[list(run.channels)] = 2.0 ** (run.like.bits - 1)
    half = half.reshape(1, len(side.stored), side.width, 1)
    like_normal = [run for run in side.runs if run.like.levels == "normal"]
    half[:, [h for h in range(len(side.stored)) if h not in side.scaled_heads]] = 0
    candidates = scale_of(torch.arange(2**TOKEN_SCALE_BITS)).numpy()
    scales = constant(candidates.reshape(-1, 1, 1, 1))
    steps = op.Div(op.Unsqueeze(x, shape(2)), scales)  # [B, P, 16, H, C, T]
    rounded = op.Add(op.Min(op.Max(op.Floor(steps), constant(-half)), constant(half - 1)), constant(0.5))
    for run in like_normal:
        at = np.isin(np.arange(len(side.stored) * side.width), run.channels).reshape(half.shape)
        rounded = op.Where(constant(at, bool), _levels(_nearest(steps, run), run), rounded)
    off = op.Mul(op.Sub(rounded, steps), constant((half > 0).astype(np.float32)))
    error = op.ReduceSum(op.Mul(off, off), shape(4), keepdims=0)
    error = op.Mul(error, constant((candidates**2).reshape(-1, 1, 1)))
    codes = op.ArgMin(error, axis=2, keepdims=0)  # [B, P, H, T]; the least of equals
    uncounted = [h for h in range(len(side.stored)) if not half[0, h].any()]
    if uncounted:
        is_one = np.isin(np.arange(len(side.stored)), uncounted)[:, None]
        codes = op.Where(constant(is_one, bool), constant(TOKEN_SCALE_ONE, np.int64), codes)
    scaled = op.Div(x, op.Unsqueeze(op.Gather(constant(candidates), codes), shape(3)))
    if len(side.scaled_heads) < len(side.stored):
        codes = op.Gather(codes, constant(side.scaled_heads, np.int64), axis=2)
    return scaled, float32(codes)


# --------------------------------------------------------------------------- products with pages


def logits(pages: OnnxPages, records: dict[str, Value], q: Value) -> Value:
    """[B, P, H, g, T] of queries q [B, H, g, C] with the K of pages."""
    side = pages.k
    means = None
    if side.mean_steps:
        means = op.MatMul(op.Unsqueeze(q, shape(1)), _means(pages, side, records))  # [B, P, H, g, 1]
        if not side.runs:
            return op.Expand(means, shape(1, 1, 1, 1, pages.tokens))
    found = _plane_logits(pages, records, q)
    return found if means is None else op.Add(found, means)


def _plane_logits(pages: OnnxPages, records: dict[str, Value], q: Value) -> Value:
    """`logits`, without what page means add."""
    side = pages.k
    if min(side.stored) < side.width:
        q = op.Mul(q, constant(_stored_mask(side)))
    q = op.Unsqueeze(q, shape(1))  # [B, 1, H, g, C]
    if _is_units(side):
        codes, offsets = _unit_steps(pages, side, records)
        found = op.Add(op.MatMul(q, codes), op.MatMul(q, constant(offsets[:, :, None])))
    elif _one_scale_a_channel(pages, side):
        scale, zero = _metadata(pages, side.runs[0], records, shape(0, 0, pages.kv_heads, 1, side.width))
        codes = float32(_codes(pages, side, records))
        found = op.Add(
            op.MatMul(op.Mul(q, scale), codes), op.ReduceSum(op.Mul(q, zero), shape(-1), keepdims=1)
        )
    else:
        found = op.MatMul(q, _values(pages, side, records))
    scales = _token_scales(pages, side, records)
    return found if scales is None else op.Mul(found, scales)


def _means(pages: OnnxPages, side: SidePages, records: dict[str, Value]) -> Value:
    """Page means [B, P, H, C, 1] float32, 0 for channels that have none."""
    channels = side.mean_channels
    codes = op.Sub(float32(part(records["bytes"], side.means, len(channels))), constant(MEAN_ZERO))
    if len(channels) < len(side.mean_steps):
        places = {channel: place for place, channel in enumerate(channels)}
        wanted = [places.get(channel, 0) for channel in range(len(side.mean_steps))]
        codes = op.Gather(codes, constant(wanted, np.int64), axis=2)
    means = op.Mul(codes, constant(side.mean_steps))
    return op.Reshape(means, shape(0, 0, pages.kv_heads, side.width, 1))


def weighted(pages: OnnxPages, records: dict[str, Value], weights: Value) -> Value:
    """[B, H, g, C]: the V of pages, summed with weights [B, P, H, g, T]."""
    side = pages.v
    scales = _token_scales(pages, side, records)
    if scales is not None:
        weights = op.Mul(weights, scales)
    if _is_units(side):
        codes, offsets = _unit_steps(pages, side, records)
        total = op.ReduceSum(weights, shape(-1), keepdims=1)
        found = op.Add(op.MatMul(weights, _turned(codes)), op.Mul(total, constant(offsets[:, None])))
    elif _one_scale_a_token(side):
        scale, zero = _metadata(pages, side.runs[0], records, shape(0, 0, pages.kv_heads, 1, pages.tokens))
        codes = _turned(float32(_codes(pages, side, records)))
        found = op.Add(
            op.MatMul(op.Mul(weights, scale), codes),
            op.ReduceSum(op.Mul(weights, zero), shape(-1), keepdims=1),
        )
    else:
        found = op.MatMul(weights, _turned(_values(pages, side, records)))
    found = op.ReduceSum(found, shape(1), keepdims=0)
    if min(side.stored) < side.width:
        found = op.Mul(found, constant(_stored_mask(side)))
    return found


def _turned(x: Value) -> Value:
    return op.Transpose(x, perm=[0, 1, 2, 4, 3])


def _is_units(side: SidePages) -> bool:
    return all(run.like.unit and run.like.levels == "uniform" for run in side.runs)


def _one_scale_a_channel(pages: OnnxPages, side: SidePages) -> bool:
    like = side.runs[0].like
    return side.even and like.steps == "adaptive" and not like.raw and like.groups == "tokens" and (
        like.group_size == pages.tokens
    )  # fmt: skip


def _one_scale_a_token(side: SidePages) -> bool:
    if not side.even:
        return False
    like = side.runs[0].like
    return not like.raw and like.steps == "adaptive" and like.groups == "channels" and (
        like.group_size == side.width
    )  # fmt: skip


def _stored_mask(side: SidePages) -> np.ndarray:
    """[H, 1, C]: 1 where a head stores a channel."""
    return (np.arange(side.width)[None] < np.array(side.stored)[:, None]).astype(np.float32)[:, None]


def _unit_steps(pages: OnnxPages, side: SidePages, records: dict[str, Value]) -> tuple[Value, np.ndarray]:
    """Whole numbers float32 [B, P, H, C, T], and what they lack [H, C] to be values; 0 where nothing is stored.

    The numbers are codes. Those of 8 bits are so large that products would cancel: they are centred first.
    """
    middle: np.ndarray = np.zeros(len(side.stored) * side.width, np.float32)
    for run in side.runs:
        middle[list(run.channels)] = 2.0 ** (run.like.bits - 1)
    middle = middle.reshape(len(side.stored), side.width)
    stored, codes = (middle > 0).astype(np.float32), float32(_codes(pages, side, records))
    if middle.max() == 128:
        return op.Sub(codes, constant(middle[:, :, None])), stored / 2
    return codes, stored / 2 - middle


def _codes(pages: OnnxPages, side: SidePages, records: dict[str, Value]) -> Value:
    """Codes uint8 [B, P, H, C, T] of a side, any code where a head stores nothing."""
    return _by_head(pages, side, [_run_codes(pages, run, records) for run in side.runs])


def _by_head(pages: OnnxPages, side: SidePages, runs: list[Value]) -> Value:
    """[B, P, H, C, T] of runs [B, P, channels, T]."""
    joined = op.Concat(*runs, axis=2) if len(runs) > 1 else runs[0]
    order = [channel for run in side.runs for channel in run.channels]
    if order != list(range(pages.kv_heads * side.width)):
        places = {channel: place for place, channel in enumerate(order)}
        wanted = [places.get(c, 0) for c in range(pages.kv_heads * side.width)]
        joined = op.Gather(joined, constant(wanted, np.int64), axis=2)
    return op.Reshape(joined, shape(0, 0, pages.kv_heads, side.width, pages.tokens))


def _run_codes(pages: OnnxPages, run: Run, records: dict[str, Value]) -> Value:
    nbytes = pages.tokens * run.like.bits // 8
    stored = part(records["bytes"], run.codes, len(run.channels) * nbytes)
    return unpack(op.Reshape(stored, shape(0, 0, len(run.channels), nbytes)), run.like.bits, pages.tokens)


def _values(pages: OnnxPages, side: SidePages, records: dict[str, Value]) -> Value:
    """What pages hold of a side, float32 [B, P, H, C, T], without the scales of tokens."""
    return _by_head(pages, side, [_run_values(pages, run, records) for run in side.runs])


def _run_values(pages: OnnxPages, run: Run, records: dict[str, Value]) -> Value:
    like, channels = run.like, len(run.channels)
    whole = shape(0, 0, channels, pages.tokens)
    if like.raw:
        record = "halves" if like.bits == 16 else "floats"
        return op.Reshape(float32(part(records[record], run.codes, channels * pages.tokens)), whole)
    codes = _run_codes(pages, run, records)
    values = float32(codes) if like.levels == "uniform" else _levels(codes, run)
    if like.unit:
        return values if like.levels != "uniform" else op.Add(values, constant(0.5 - 2.0 ** (like.bits - 1)))
    groups = (
        shape(0, 0, channels, pages.tokens // like.group_size, 1)
        if run.groups_of_tokens
        else shape(0, 0, channels // like.group_size, 1, pages.tokens)
    )
    scale, zero = _metadata(pages, run, records, groups)
    values = op.Mul(_grouped(run, values, channels, pages.tokens)[1], scale)
    return op.Reshape(values if zero is None else op.Add(values, zero), whole)


def _metadata(pages: OnnxPages, run: Run, records: dict[str, Value], wanted: Value) -> tuple[Value, Value]:
    """Scales and, with adaptive steps, zeros of a run, float32 in a wanted shape."""
    count = len(run.channels) * pages.tokens // run.like.group_size
    if run.like.scale_bytes == 1:
        return op.Reshape(_from_e4m3(part(records["bytes"], run.scales, count)), wanted), None
    scale = op.Reshape(float32(part(records["halves"], run.scales, count)), wanted)
    if run.like.steps != "adaptive":
        return scale, None
    return scale, op.Reshape(float32(part(records["halves"], run.zeros, count)), wanted)


def _token_scales(pages: OnnxPages, side: SidePages, records: dict[str, Value]) -> Value | None:
    """Scales of tokens [B, P, H, 1, T]; None where no head has any."""
    if not side.scaled_heads:
        return None
    nbytes = pages.tokens * TOKEN_SCALE_BITS // 8
    stored = part(records["bytes"], side.token_scales, len(side.scaled_heads) * nbytes)
    packed = op.Reshape(stored, shape(0, 0, len(side.scaled_heads), nbytes))
    codes = unpack(packed, TOKEN_SCALE_BITS, pages.tokens)
    table = constant(scale_of(torch.arange(2**TOKEN_SCALE_BITS)).numpy())
    scales = op.Gather(table, op.Cast(codes, to=INT32))
    heads = len(side.stored)
    if len(side.scaled_heads) < heads:
        ones = op.Add(op.Mul(part(scales, 0, 1, axis=2), constant(0)), constant(1))
        places = [
            1 + side.scaled_heads.index(h) if h in side.scaled_heads else 0 for h in range(heads)
        ]  # fmt: skip
        scales = op.Gather(op.Concat(ones, scales, axis=2), constant(places, np.int64), axis=2)
    return op.Reshape(scales, shape(0, 0, heads, 1, pages.tokens))
