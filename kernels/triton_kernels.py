# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"
# ruff: noqa: RET505, RUF005 - only if/else is resolved at compile time; no star in kernel tuples
"""Triton kernels: seal pages, attend over pages, attend over the window, merge the parts.

Arguments of kernels have no Python types; comments give shapes. All is computed in float32 after loads;
only operands of matrix products are rounded, to DOT. A *plane* argument is a constant `PlaneSpec`, used by
index: 0 bits, 1 channels, 2 width, 3 first channel, 4 by tokens, 5 group size, 6 codes, 7 scales, 8 zeros,
9 steps (0 adaptive, 1 scaled, 2 unit), 10 levels (0 uniform, 1 normal, 2 e2m1, 3 e4m3), 11 magnitudes, 12 all codes
are one run, 13 clip.
Channels are contiguous. ALIGNED says that a tensor and all its strides are multiples of 16 bytes, so that rows are
read in wide pieces; `tl.multiple_of` passes it on, and only where the address is computed: not from a helper.
Tiles are runs x positions: a run is what one packed row of codes spans (see `layout`). Split-K with merge is
flash-decoding (Dao et al., 2023); the online softmax is that of Milakov and Gimelshein, arXiv 1805.02867.
"""

import triton
import triton.language as tl

SCALE_FLOOR = tl.constexpr(1.0132789611816406e-06)  # float16(1e-6), as the reference rounds it
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds a small float32 half to even

# Triton would compile a kernel again for arguments that are 1 or a multiple of 16. Here `do_not_specialize` names all
# arguments, by number, and constants and dtypes alone decide: nothing is compiled in the middle of a sequence, and it
# is known beforehand what a plan needs.


# ---- reading a page


@triton.jit
def _load_bits(rows, pos, mask, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Codes of one packed width at positions `pos` of each of `rows` ([R, 1] pointers): int32 [R, L]."""
    byte = tl.load(rows + (pos % BYTES)[None, :], mask=mask, other=0).to(tl.int32)
    return (byte >> ((pos // BYTES) * BITS)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def _load_codes(base, run, pos, mask, BITS: tl.constexpr, LENGTH: tl.constexpr):
    """Codes of runs of LENGTH codes: int32 [R, L]. Widths 3, 5, 6 are a run of 2 or 4 bits and one of those above."""
    rows = base + run[:, None] * (LENGTH * BITS // 8)
    if 8 % BITS:
        LOW: tl.constexpr = 2 if BITS == 3 else 4
        BYTES: tl.constexpr = LENGTH * LOW // 8
        low = _load_bits(rows, pos, mask, BYTES, LOW)
        return low | (_load_bits(rows + BYTES, pos, mask, LENGTH * (BITS - LOW) // 8, BITS - LOW) << LOW)
    else:
        return _load_bits(rows, pos, mask, LENGTH * BITS // 8, BITS)


@triton.jit
def _load_flat(base, at, mask, BITS: tl.constexpr, LENGTH: tl.constexpr):
    """Codes `at` positions [R, L] of one run of LENGTH codes: int32 [R, L]."""
    if 8 % BITS:
        LOW: tl.constexpr = 2 if BITS == 3 else 4
        BYTES: tl.constexpr = LENGTH * LOW // 8
        low = _load_flat_bits(base, at, mask, BYTES, LOW)
        return low | (_load_flat_bits(base + BYTES, at, mask, LENGTH * (BITS - LOW) // 8, BITS - LOW) << LOW)
    else:
        return _load_flat_bits(base, at, mask, LENGTH * BITS // 8, BITS)


@triton.jit
def _load_flat_bits(base, at, mask, BYTES: tl.constexpr, BITS: tl.constexpr):
    byte = tl.load(base + at % BYTES, mask=mask, other=0).to(tl.int32)
    return (byte >> (at // BYTES * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _e4m3_values(codes):
    """Numbers of e4m3: their bits lie in a float32's as they are, but for the exponent's bias."""
    bits = ((codes & 128) << 24) | ((codes & 127) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def _e4m3_codes(x):
    """To the nearest, halves to even; 448 where x is larger: int32."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 128
    size = tl.abs(x)
    bits = bits & 0x7FFFFFFF
    small = ((size * 512.0 + ROUND) - ROUND).to(tl.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    code = tl.where(size < 0.015625, small, normal)
    return sign | tl.where(size >= 448.0, 126, code)


@triton.jit
def _level_values(codes, PLANE: tl.constexpr):
    """What codes of levels that are no uniform grid stand for: float32."""
    if PLANE[10] == 3:
        return _e4m3_values(codes)
    else:
        HALF_RANGE: tl.constexpr = 1 << (PLANE[0] - 1)
        index = codes & (HALF_RANGE - 1)
        size = tl.zeros(codes.shape, tl.float32)
        for i in tl.static_range(HALF_RANGE):
            size = tl.where(index == i, PLANE[11][i], size)
        return tl.where(codes >= HALF_RANGE, -size, size)


@triton.jit
def _nearest_levels(x, PLANE: tl.constexpr):
    """Codes of the levels nearest to x, of two as near the smaller one: int32."""
    if PLANE[10] == 3:
        return _e4m3_codes(x)
    else:
        HALF_RANGE: tl.constexpr = 1 << (PLANE[0] - 1)
        size = tl.abs(x)
        index = tl.zeros(x.shape, tl.int32)
        for i in tl.static_range(HALF_RANGE - 1):
            index += (size > (PLANE[11][i] + PLANE[11][i + 1]) / 2).to(tl.int32)
        return tl.where(x < 0, index + HALF_RANGE, index)


@triton.jit
def _scale_at(at, mask, SMALL: tl.constexpr):
    """Scales at `at`: float16, or e4m3 if SMALL; 0 where not `mask`."""
    x = tl.load(at, mask=mask, other=0)
    if SMALL:
        return _e4m3_values(x.to(tl.int32))
    else:
        return x.to(tl.float32)


@triton.jit
def _load_groups(
    base, run, run_mask, start, G: tl.constexpr, LENGTH: tl.constexpr, L: tl.constexpr, SMALL: tl.constexpr
):
    """One float16 (e4m3 if SMALL) per group, spread over the positions start .. start + L: float32 [R, L] or [R, 1].

    Where it can, a group's value is loaded once and broadcast: a load per element costs more than its code.
    """
    GROUPS: tl.constexpr = LENGTH // G
    KIND: tl.constexpr = tl.uint8 if SMALL else tl.float16
    rows = base.to(tl.pointer_type(KIND)) + run[:, None] * GROUPS
    if GROUPS == 1:
        return _scale_at(rows, run_mask[:, None], SMALL)
    elif G % L == 0:
        return _scale_at(rows + start // G, run_mask[:, None], SMALL)
    elif L % G == 0:
        group = start // G + tl.arange(0, L // G)
        mask = run_mask[:, None] & (group < GROUPS)[None, :]
        x = _scale_at(rows + group[None, :], mask, SMALL)
        R: tl.constexpr = x.shape[0]
        return tl.broadcast_to(x[:, :, None], [R, L // G, G]).reshape([R, L])
    else:
        pos = start + tl.arange(0, L)
        mask = run_mask[:, None] & (pos < LENGTH)[None, :]
        return _scale_at(rows + (pos // G)[None, :], mask, SMALL)


@triton.jit
def _load_runs(
    page,
    run,
    runs,
    start,
    PLANE: tl.constexpr,
    LENGTH: tl.constexpr,
    L: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    """What positions start .. start + L of runs `run` ([R]; those below `runs` exist) stand for: [R, L]."""
    pos = start + tl.arange(0, L)
    run_mask = run < runs
    mask = run_mask[:, None] & (pos < LENGTH)[None, :]
    base = page + PLANE[6]
    if PLANE[0] == 32:
        at = base.to(tl.pointer_type(tl.float32)) + run[:, None] * LENGTH + pos[None, :]
        return tl.load(at, mask=mask, other=0)
    elif PLANE[0] == 16:
        at = base.to(tl.pointer_type(HALF)) + run[:, None] * LENGTH + pos[None, :]
        return tl.load(at, mask=mask, other=0).to(tl.float32)
    elif PLANE[12]:
        codes = _load_flat(base, run[:, None] * LENGTH + pos[None, :], mask, PLANE[0], TOKENS * LENGTH)
        if PLANE[10] != 0:
            return tl.where(mask, _level_values(codes, PLANE), 0.0)
        return tl.where(mask, codes.to(tl.float32) + (0.5 - (1 << (PLANE[0] - 1))), 0.0)
    elif PLANE[10] != 0:
        codes = _load_codes(base, run, pos, mask, PLANE[0], LENGTH)
        x = _level_values(codes, PLANE)
        if PLANE[9] == 1:
            x = x * _load_groups(page + PLANE[7], run, run_mask, start, PLANE[5], LENGTH, L, PLANE[10] == 2)
        return tl.where(mask, x, 0.0)
    elif PLANE[9] == 2:
        codes = _load_codes(base, run, pos, mask, PLANE[0], LENGTH).to(tl.float32)
        return tl.where(mask, codes + (0.5 - (1 << (PLANE[0] - 1))), 0.0)
    else:
        codes = _load_codes(base, run, pos, mask, PLANE[0], LENGTH).to(tl.float32)
        scale = _load_groups(page + PLANE[7], run, run_mask, start, PLANE[5], LENGTH, L, False)
        zero = _load_groups(page + PLANE[8], run, run_mask, start, PLANE[5], LENGTH, L, False)
        return codes * scale + zero


@triton.jit
def _load_keys(
    page, start, PLANE: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr
):
    """K of one plane for tokens start .. start + TILE: [width, TILE]."""
    if PLANE[4]:
        return _load_runs(page, tl.arange(0, PLANE[2]), PLANE[1], start, PLANE, TOKENS, TILE, TOKENS, HALF)
    else:
        token = start + tl.arange(0, TILE)
        return tl.trans(_load_runs(page, token, TOKENS, 0, PLANE, PLANE[1], PLANE[2], TOKENS, HALF))


@triton.jit
def _load_values(
    page, start, PLANE: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr
):
    """V of one plane for tokens start .. start + TILE: [TILE, width]."""
    if PLANE[4]:
        return tl.trans(
            _load_runs(page, tl.arange(0, PLANE[2]), PLANE[1], start, PLANE, TOKENS, TILE, TOKENS, HALF)
        )
    else:
        token = start + tl.arange(0, TILE)
        return _load_runs(page, token, TOKENS, 0, PLANE, PLANE[1], PLANE[2], TOKENS, HALF)


@triton.jit
def _token_scales(page, start, SCALES: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Scales of tokens start .. start + TILE, which lie SCALES bytes into the record: float32 [TILE]."""
    token = start + tl.arange(0, TILE)
    byte = tl.load(page + SCALES + token % (TOKENS // 2), mask=token < TOKENS, other=0).to(tl.int32)
    code = (byte >> (token // (TOKENS // 2) * 4)) & 15
    return tl.exp2((code.to(tl.float32) - 3.0) * (1.0 / 3.0))


@triton.jit
def _mean_queries(q_rows, exists, scale, K: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Queries times what a code of K's page means counts, by channel: float32 [ROWS, WIDTH]."""
    channel = tl.arange(0, WIDTH)
    step = tl.full([WIDTH], 0.0625, tl.float32)  # of channels behind the planes
    for p in tl.static_range(len(K)):
        inside = (channel >= K[p][3]) & (channel < K[p][3] + K[p][1])
        if K[p][10] == 1:  # normal levels span twice the largest magnitude
            step = tl.where(inside, 0.125 * K[p][11][(1 << (K[p][0] - 1)) - 1], step)
        else:
            step = tl.where(inside, 0.0625 * (1 << K[p][0]), step)
    mask = exists[:, None] & (channel < COUNT)[None, :]
    x = tl.load(q_rows[:, None] + channel[None, :], mask=mask, other=0).to(tl.float32)
    return x * (step * scale)[None, :]


@triton.jit
def _mean_logits(page, queries, MEANS: tl.constexpr, COUNT: tl.constexpr):
    """What queries of `_mean_queries` make of a page's means, which lie MEANS bytes into the record: float32 [ROWS]."""
    channel = tl.arange(0, queries.shape[1])
    codes = tl.load((page + MEANS).to(tl.pointer_type(tl.int8)) + channel, mask=channel < COUNT, other=0)
    return tl.sum(queries * codes.to(tl.float32)[None, :], 1)


# ---- softmax


@triton.jit
def _finite(x):
    """x, with 0 for -inf, so that differences of logits are never inf - inf."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _softcap(logits, softcap):
    """softcap * tanh(logits / softcap), tanh(x) = 2 * sigmoid(2x) - 1."""
    return softcap * (2.0 / (1.0 + tl.exp(-2.0 * logits / softcap)) - 1.0)


@triton.jit
def _online(logits, top, total):
    """One step of the online softmax: weights [ROWS, TILE], decay [ROWS], new maximum and total."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    safe = _finite(new_top)
    weights = tl.exp(logits - safe[:, None])
    decay = tl.exp(top - safe)
    return weights, decay, new_top, total * decay + tl.sum(weights, 1)


@triton.jit
def _rows(tile, head, n_queries, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Rows of this program: (query index, query head, whether it exists); row r is query r // GROUP."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return row // GROUP, head * GROUP + row % GROUP, row < n_queries * GROUP


@triton.jit
def _store_part(
    part_out, at, mask, acc, total, FIRST: tl.constexpr, CHANNELS: tl.constexpr, V_DIM: tl.constexpr
):
    """Normalise and store one plane's accumulator [ROWS, width] as rows `at` of part_out [.., V_DIM]."""
    channel = tl.arange(0, acc.shape[1])
    share = 1.0 / tl.where(total > 0, total, 1.0)
    rows = part_out + at * V_DIM
    if V_DIM % 4 == 0:
        rows = tl.multiple_of(rows, 16)
    out = rows[:, None] + (FIRST + channel)[None, :]
    tl.store(out, acc * share[:, None], mask=mask[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def _store_lse(part_lse, at, mask, top, total):
    some = total > 0
    tl.store(
        part_lse + at, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")), mask=mask
    )


# ---- attention


@triton.jit(do_not_specialize=range(18))
def attend_pages(
    q,  # [B, n, Hq, Dk'] in plane order
    bias,  # [B, n, Hq] float32, contiguous; unread unless BIASED
    addresses,  # [capacity] int64
    table,  # [B, max pages] int64
    sealed,  # [B] int32
    heads,  # [class heads, 2] int32: KV head, byte offset of its record
    part_out,  # [splits, B, n, Hq, Dv] float32
    part_lse,  # [splits, B, n, Hq] float32
    n_queries,
    q_heads,
    class_heads,
    splits,
    q_row_stride,
    q_query_stride,
    q_head_stride,
    table_stride,
    scale,
    softcap,
    K: tl.constexpr,
    V: tl.constexpr,
    K_SCALES: tl.constexpr,  # where a head's token scales lie in its record; -1: nowhere
    V_SCALES: tl.constexpr,
    K_MEANS: tl.constexpr,  # where the page's means of K lie in a head's record, and of how many channels
    TOKENS: tl.constexpr,  # of a page, of the class of tokens that this launch is for
    PAGE: tl.constexpr,  # of a page, of all classes
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    V_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    HALF: tl.constexpr,
    DOT: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Grid (B * class heads, splits, row tiles): one KV head's query rows over a split of a sequence's pages.

    Each packed byte is read once per KV head, whatever the number of query heads that share it.
    """
    sequence = (tl.program_id(0) // class_heads).to(tl.int64)
    split = tl.program_id(1)
    entry = heads + 2 * (tl.program_id(0) % class_heads)
    head = tl.load(entry)
    offset = tl.load(entry + 1).to(tl.int64)
    query, q_head, exists = _rows(tl.program_id(2), head, n_queries, GROUP, ROWS)

    q_rows = q + sequence * q_row_stride + query.to(tl.int64) * q_query_stride + q_head * q_head_stride
    if ALIGNED:
        q_rows = tl.multiple_of(q_rows, 16)
    queries = ()
    for p in tl.static_range(len(K)):
        channel = tl.arange(0, K[p][2])
        mask = exists[:, None] & (channel < K[p][1])[None, :]
        x = tl.load(q_rows[:, None] + (K[p][3] + channel)[None, :], mask=mask, other=0).to(tl.float32)
        queries = queries + ((x * scale).to(DOT),)
    at = (sequence * n_queries + query) * q_heads + q_head
    if BIASED:
        row_bias = tl.load(bias + at, mask=exists, other=0)
    if K_MEANS[1]:
        mean_queries = _mean_queries(q_rows, exists, scale, K, K_MEANS[1], K_MEANS[2])

    TILES: tl.constexpr = (TOKENS + TILE - 1) // TILE
    tiles = tl.load(sealed + sequence) // PAGE * TILES
    share = tl.cdiv(tiles, splits)
    acc = ()
    for p in tl.static_range(len(V)):
        acc = acc + (tl.zeros([ROWS, V[p][2]], tl.float32),)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in range(split * share, tl.minimum(tiles, (split + 1) * share)):
        page_id = tl.load(table + sequence * table_stride + tile // TILES)
        page = (tl.load(addresses + page_id) + offset).to(tl.pointer_type(tl.uint8))
        page = tl.multiple_of(page, 16)  # records and sections are aligned to 16 bytes
        start = 0 if TILES == 1 else tile % TILES * TILE
        logits = tl.zeros([ROWS, TILE], tl.float32)
        for p in tl.static_range(len(K)):
            keys = _load_keys(page, start, K[p], TOKENS, TILE, HALF).to(DOT)
            logits = tl.dot(queries[p], keys, logits, input_precision="ieee")
        if K_SCALES >= 0:
            logits *= _token_scales(page, start, K_SCALES, TOKENS, TILE)[None, :]
        if K_MEANS[1]:
            logits += _mean_logits(page, mean_queries, K_MEANS[0], K_MEANS[1])[:, None]
        if BIASED:
            logits += row_bias[:, None]
        if CAPPED:
            logits = _softcap(logits, softcap)
        if TOKENS % TILE != 0:
            logits = tl.where((start + tl.arange(0, TILE) < TOKENS)[None, :], logits, float("-inf"))
        weights, decay, top, total = _online(logits, top, total)
        if V_SCALES >= 0:
            weights *= _token_scales(page, start, V_SCALES, TOKENS, TILE)[None, :]
        weights = weights.to(DOT)
        updated = ()
        for p in tl.static_range(len(V)):
            values = _load_values(page, start, V[p], TOKENS, TILE, HALF).to(DOT)
            updated = updated + (tl.dot(weights, values, acc[p] * decay[:, None], input_precision="ieee"),)
        acc = updated

    sequences = tl.num_programs(0) // class_heads
    at += split.to(tl.int64) * sequences * n_queries * q_heads
    for p in tl.static_range(len(V)):
        _store_part(part_out, at, exists, acc[p], total, V[p][3], V[p][1], V_DIM)
    _store_lse(part_lse, at, exists, top, total)


@triton.jit(do_not_specialize=range(24))
def attend_window(
    q,  # [B, n, Hq, Dk]
    k,  # [B, Hkv, slots, Dk]
    v,  # [B, Hkv, slots, Dv]
    lengths,  # [B] int32
    sealed,  # [B] int32
    part_out,  # [splits, B, n, Hq, Dv] float32
    part_lse,  # [splits, B, n, Hq] float32
    n_queries,
    q_heads,
    kv_heads,
    splits,
    slots,
    sinks,
    q_row_stride,
    q_query_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    k_slot_stride,
    v_row_stride,
    v_head_stride,
    v_slot_stride,
    scale,
    softcap,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DOT: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Grid (B * Hkv, splits, row tiles): one KV head's query rows over a split of the window's slots."""
    sequence = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    query, q_head, exists = _rows(tl.program_id(2), head, n_queries, GROUP, ROWS)

    k_channel = tl.arange(0, K_WIDTH)
    v_channel = tl.arange(0, V_WIDTH)
    q_rows = q + sequence * q_row_stride + query.to(tl.int64) * q_query_stride + q_head * q_head_stride
    if ALIGNED:
        q_rows = tl.multiple_of(q_rows, 16)
    q_mask = exists[:, None] & (k_channel < K_DIM)[None, :]
    x = tl.load(q_rows[:, None] + k_channel[None, :], mask=q_mask, other=0).to(tl.float32)
    queries = (x * scale).to(DOT)
    k_rows = k + sequence * k_row_stride + head.to(tl.int64) * k_head_stride
    v_rows = v + sequence * v_row_stride + head.to(tl.int64) * v_head_stride

    length = tl.load(lengths + sequence)
    oldest = tl.load(sealed + sequence)  # of the ring, counted from the first token that is no sink
    recent = tl.maximum(length - sinks - oldest, 0)
    ring = tl.maximum(slots - sinks, 1)
    tiles = tl.cdiv(slots, TILE)
    share = tl.cdiv(tiles, splits)
    acc = tl.zeros([ROWS, V_WIDTH], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in range(split * share, tl.minimum(tiles, (split + 1) * share)):
        slot = tile * TILE + tl.arange(0, TILE)
        age = (
            slot - sinks + ring - oldest % ring
        ) % ring  # how long after the oldest a ring slot was written
        filled = tl.where(slot < sinks, slot < length, age < recent) & (slot < slots)
        k_at = k_rows + slot.to(tl.int64) * k_slot_stride
        v_at = v_rows + slot.to(tl.int64) * v_slot_stride
        if ALIGNED:
            k_at = tl.multiple_of(k_at, 16)
            v_at = tl.multiple_of(v_at, 16)
        k_at = k_at[:, None] + k_channel[None, :]
        keys = tl.load(k_at, mask=filled[:, None] & (k_channel < K_DIM)[None, :], other=0).to(tl.float32)
        logits = tl.dot(queries, tl.trans(keys.to(DOT)), input_precision="ieee")
        if CAPPED:
            logits = _softcap(logits, softcap)
        logits = tl.where(filled[None, :], logits, float("-inf"))
        weights, decay, top, total = _online(logits, top, total)
        v_at = v_at[:, None] + v_channel[None, :]
        values = tl.load(v_at, mask=filled[:, None] & (v_channel < V_DIM)[None, :], other=0).to(tl.float32)
        acc = tl.dot(weights.to(DOT), values.to(DOT), acc * decay[:, None], input_precision="ieee")

    sequences = tl.num_programs(0) // kv_heads
    at = ((split.to(tl.int64) * sequences + sequence) * n_queries + query) * q_heads + q_head
    _store_part(part_out, at, exists, acc, total, 0, V_DIM, V_DIM)
    _store_lse(part_lse, at, exists, top, total)


@triton.jit(do_not_specialize=range(6))
def merge_parts(part_out, part_lse, out, lse, rows, parts, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr):
    """Grid (rows,): out [rows, Dv], lse [rows] of part_out [parts, rows, Dv], part_lse [parts, rows]."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, V_WIDTH)
    mask = channel < V_DIM
    one = tl.arange(0, 1)  # the interpreter takes no scalars in mixed expressions
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([V_WIDTH], tl.float32)
    for part in range(parts):
        at = row + part * rows
        part_top = tl.load(part_lse + at + one)
        new_top = tl.maximum(top, part_top)
        safe = _finite(new_top)
        decay = tl.exp(top - safe)
        weight = tl.exp(part_top - safe)
        x_row = part_out + at * V_DIM
        if V_DIM % 4 == 0:
            x_row = tl.multiple_of(x_row, 16)
        x = tl.load(x_row + channel, mask=mask & (weight > 0), other=0)
        acc = acc * decay + x * weight
        total = total * decay + weight
        top = new_top
    some = total > 0
    out_row = out + row * V_DIM
    if V_DIM % 4 == 0:
        out_row = tl.multiple_of(out_row, 16)
    tl.store(out_row + channel, acc / tl.where(some, total, 1.0), mask=mask)
    tl.store(lse + row + one, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")))


# ---- sealing


@triton.jit
def _load_exact(x, token_stride, run, run_mask, pos, inside, PLANE: tl.constexpr, ALIGNED: tl.constexpr):
    """K or V of one head at runs `run` [R] and positions `pos` [S, L], 0 where not `inside`: float32 [R, S, L]."""
    mask = run_mask[:, None, None] & inside[None, :, :]
    if PLANE[4]:  # a run is a channel, and channels are contiguous
        tokens = x + pos * token_stride
        if ALIGNED:
            tokens = tl.multiple_of(tokens, [16, 16])
        at = tokens[None, :, :] + (PLANE[3] + run)[:, None, None]
    else:
        tokens = x + run * token_stride
        if ALIGNED:
            tokens = tl.multiple_of(tokens, 16)
        at = tokens[:, None, None] + (PLANE[3] + pos)[None, :, :]
    return tl.load(at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _quantise_levels(
    x, run, run_mask, pos, inside, page, PLANE: tl.constexpr, LENGTH: tl.constexpr, METADATA: tl.constexpr
):
    """Codes of x [R, STRIPS, SPAN] by levels, and the scales of its groups; see `level_codes` in levels.py."""
    if PLANE[9] == 2:
        return _nearest_levels(x, PLANE)
    else:
        GROUPS: tl.constexpr = LENGTH // PLANE[5]
        group = tl.where(inside, pos // PLANE[5], GROUPS)
        codes = tl.zeros(x.shape, tl.int32)
        one = tl.full(run.shape, 1.0, tl.float32)
        for g in range(GROUPS):
            here = (group == g)[None, :, :]
            own = tl.where(here, x, 0.0)
            if PLANE[10] == 2:
                most = tl.max(tl.max(tl.abs(own), 2), 1)
                wanted = tl.minimum(tl.maximum(tl.div_rn(most, one * 6.0), 0.001953125), 448.0)
                code = _e4m3_codes(wanted)
                divisor = _e4m3_values(code)
            else:
                squares = tl.sum(tl.sum(own * own, 2), 1)
                spread = tl.sqrt_rn(tl.div_rn(squares, one * PLANE[5]))
                spread = tl.minimum(tl.maximum(spread, 1e-6), 65504.0)
                divisor = spread.to(tl.float16).to(tl.float32)
            found = _nearest_levels(tl.div_rn(own, tl.broadcast_to(divisor[:, None, None], own.shape)), PLANE)
            codes = tl.where(here, found, codes)
            if METADATA:
                at = run * GROUPS + g
                if PLANE[10] == 2:
                    tl.store(page + PLANE[7] + at, code.to(tl.uint8), mask=run_mask)
                else:
                    levels = tl.where(here, _level_values(found, PLANE), 0.0)
                    length = tl.sum(tl.sum(levels * levels, 2), 1)
                    scale = tl.minimum(tl.sqrt_rn(tl.div_rn(squares, length)), 65504.0).to(tl.float16)
                    scales = (page + PLANE[7]).to(tl.pointer_type(tl.float16))
                    tl.store(scales + at, scale, mask=run_mask)
        return codes


@triton.jit
def _quantise(
    x, token_stride, run, run_mask, page, PLANE: tl.constexpr, LENGTH: tl.constexpr, STRIPS: tl.constexpr,
    SPAN: tl.constexpr, METADATA: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Codes of runs, in packing order: int32 [R, STRIPS, SPAN]; LENGTH / STRIPS positions of SPAN exist.

    Element [r, j, i] is position j * LENGTH / STRIPS + i. With METADATA, scales and zeros are stored.
    """
    LEVELS: tl.constexpr = (1 << PLANE[0]) - 1
    i = tl.arange(0, SPAN)
    pos = (tl.arange(0, STRIPS) * (LENGTH // STRIPS))[:, None] + i[None, :]
    inside = tl.broadcast_to(i[None, :] < LENGTH // STRIPS, [STRIPS, SPAN])
    x = _load_exact(x, token_stride, run, run_mask, pos, inside, PLANE, ALIGNED)
    if PLANE[10] != 0:
        return _quantise_levels(x, run, run_mask, pos, inside, page, PLANE, LENGTH, METADATA)
    if PLANE[9] == 2:
        code = tl.floor(x) + (1 << (PLANE[0] - 1))
        return tl.minimum(tl.maximum(code, 0.0), LEVELS).to(tl.int32)
    G: tl.constexpr = PLANE[5] if PLANE[5] else 1
    GROUPS: tl.constexpr = LENGTH // G
    group = tl.where(inside, pos // G, GROUPS)
    scale = tl.full(x.shape, 1.0, tl.float32)
    zero = tl.full(x.shape, 0.0, tl.float32)
    for g in range(GROUPS):
        here = (group == g)[None, :, :]
        low = tl.min(tl.min(tl.where(here, x, float("inf")), 2), 1)
        high = tl.max(tl.max(tl.where(here, x, float("-inf")), 2), 1)
        if PLANE[13] != 1.0:
            low = low * PLANE[13]
            high = high * PLANE[13]
        g_zero = low.to(tl.float16).to(tl.float32)
        levels = tl.full(g_zero.shape, LEVELS, tl.float32)
        g_scale = tl.div_rn(high - g_zero, levels).to(tl.float16).to(tl.float32)
        g_scale = tl.maximum(g_scale, SCALE_FLOOR)
        if METADATA:
            at = run * GROUPS + g
            scales = (page + PLANE[7]).to(tl.pointer_type(tl.float16))
            zeros = (page + PLANE[8]).to(tl.pointer_type(tl.float16))
            tl.store(scales + at, g_scale.to(tl.float16), mask=run_mask)
            tl.store(zeros + at, g_zero.to(tl.float16), mask=run_mask)
        scale = tl.where(here, g_scale[:, None, None], scale)
        zero = tl.where(here, g_zero[:, None, None], zero)
    steps = tl.minimum(tl.maximum(tl.div_rn(x - zero, scale), 0.0), LEVELS)
    return ((steps + ROUND) - ROUND).to(tl.int32)


@triton.jit
def _store_packed(rows, run_mask, codes, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Pack codes [R, STRIPS, SPAN] of BITS bits into BYTES bytes of each of `rows` ([R] pointers)."""
    STRIPS: tl.constexpr = codes.shape[1]
    i = tl.arange(0, codes.shape[2])
    byte = tl.sum(codes << (tl.arange(0, STRIPS) * BITS)[None, :, None], 1)
    tl.store(rows[:, None] + i[None, :], byte.to(tl.uint8), mask=run_mask[:, None] & (i < BYTES)[None, :])


@triton.jit
def _flat_codes(
    x,
    token_stride,
    first,
    PLANE: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIPS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Codes of a plane by channels with unit steps, all of its LENGTH one run: int32 [STRIPS, SPAN].

    Element [j, i] is position j * LENGTH / STRIPS + first + i.
    """
    i = first + tl.arange(0, SPAN)
    pos = (tl.arange(0, STRIPS) * (LENGTH // STRIPS))[:, None] + i[None, :]
    inside = tl.broadcast_to(i[None, :] < LENGTH // STRIPS, [STRIPS, SPAN])
    at = x + (pos // PLANE[1]) * token_stride + PLANE[3] + pos % PLANE[1]
    values = tl.load(at, mask=inside, other=0).to(tl.float32)
    if PLANE[10] != 0:
        return _nearest_levels(values, PLANE)
    else:
        code = tl.floor(values) + (1 << (PLANE[0] - 1))
        return tl.minimum(tl.maximum(code, 0.0), (1 << PLANE[0]) - 1).to(tl.int32)


@triton.jit
def _store_flat(base, first, codes, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Pack codes [STRIPS, SPAN] into bytes first … first + SPAN of BYTES."""
    i = first + tl.arange(0, codes.shape[1])
    byte = tl.sum(codes << (tl.arange(0, codes.shape[0]) * BITS)[:, None], 0)
    tl.store(base + i, byte.to(tl.uint8), mask=i < BYTES)


@triton.jit
def _seal_runs(
    x, token_stride, tile, page, PLANE: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr,
    HALF: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Quantise, pack and store one tile of runs of a plane of one head, x [tokens, channels] being its K or V."""
    RUNS: tl.constexpr = PLANE[1] if PLANE[4] else TOKENS
    LENGTH: tl.constexpr = TOKENS if PLANE[4] else PLANE[1]
    BITS: tl.constexpr = PLANE[0]
    LOW: tl.constexpr = 2 if BITS == 3 else 4  # of a width that is two runs: bits of the first,
    HIGH: tl.constexpr = BITS - LOW  # and of the second
    SPAN: tl.constexpr = TILES[2]
    run = (tile - TILES[0]) * TILES[3] + tl.arange(0, TILES[3])
    run_mask = run < RUNS
    base = page + PLANE[6]
    if BITS >= 16:
        pos = tl.arange(0, SPAN)[None, :]
        inside = pos < LENGTH
        values = _load_exact(x, token_stride, run, run_mask, pos, inside, PLANE, ALIGNED)
        values = values.reshape([TILES[3], SPAN])
        KIND: tl.constexpr = tl.float32 if BITS == 32 else HALF
        at = base.to(tl.pointer_type(KIND)) + run[:, None] * LENGTH + pos
        tl.store(at, values.to(KIND), mask=run_mask[:, None] & inside)
    elif PLANE[12]:
        first = (tile - TILES[0]) * SPAN
        if 8 % BITS:
            FLAT: tl.constexpr = RUNS * LENGTH * LOW // 8
            PART: tl.constexpr = SPAN * HIGH // LOW  # bytes of the upper bits of as many codes
            low = _flat_codes(x, token_stride, first, PLANE, RUNS * LENGTH, 8 // LOW, SPAN)
            _store_flat(base, first, low & ((1 << LOW) - 1), FLAT, LOW)
            above = (tile - TILES[0]) * PART
            high = _flat_codes(x, token_stride, above, PLANE, RUNS * LENGTH, 8 // HIGH, PART)
            _store_flat(base + FLAT, above, high >> LOW, RUNS * LENGTH * HIGH // 8, HIGH)
        else:
            codes = _flat_codes(x, token_stride, first, PLANE, RUNS * LENGTH, 8 // BITS, SPAN)
            _store_flat(base, first, codes, RUNS * LENGTH * BITS // 8, BITS)
    elif 8 % BITS:
        BYTES: tl.constexpr = LENGTH * LOW // 8
        rows = base + run * (LENGTH * BITS // 8)
        low = _quantise(
            x, token_stride, run, run_mask, page, PLANE, LENGTH, 8 // LOW, SPAN * LOW // 8, True, ALIGNED
        )
        _store_packed(rows, run_mask, low & ((1 << LOW) - 1), BYTES, LOW)
        high = _quantise(
            x, token_stride, run, run_mask, page, PLANE, LENGTH, 8 // HIGH, SPAN * HIGH // 8, False, ALIGNED
        )
        _store_packed(rows + BYTES, run_mask, high >> LOW, LENGTH * HIGH // 8, HIGH)
    else:
        STRIPS: tl.constexpr = 8 // BITS
        rows = base + run * (LENGTH * BITS // 8)
        codes = _quantise(
            x, token_stride, run, run_mask, page, PLANE, LENGTH, STRIPS, SPAN // STRIPS, True, ALIGNED
        )
        _store_packed(rows, run_mask, codes, LENGTH * BITS // 8, BITS)


@triton.jit
def _store_scales(scales, page, SCALES: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr):
    """Pack a head's codes of token scales into its record."""
    token = tl.arange(0, SPAN)
    inside = token < TOKENS // 2
    low = tl.load(scales + token, mask=inside, other=0)
    high = tl.load(scales + TOKENS // 2 + token, mask=inside, other=0)
    tl.store(page + SCALES + token, low | (high << 4), mask=inside)


@triton.jit
def _store_means(means, page, MEANS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Copy a head's codes of page means into its record."""
    channel = tl.arange(0, WIDTH)
    codes = tl.load(means + channel, mask=channel < COUNT, other=0)
    tl.store((page + MEANS).to(tl.pointer_type(tl.int8)) + channel, codes, mask=channel < COUNT)


@triton.jit(do_not_specialize=range(14))
def seal_pages(
    k,  # [N, Hkv, TOKENS, Ck]
    v,  # [N, Hkv, TOKENS, Cv]
    k_scales,  # [N, Hkv, TOKENS] uint8, contiguous; unread where K_SCALES is -1
    v_scales,
    k_means,  # [N, Hkv, K_CHANNELS] int8, contiguous; unread without means
    pages,  # [N] int64
    addresses,  # [capacity] int64
    heads,  # [class heads, 2] int32: KV head, byte offset of its record
    k_page_stride,
    k_head_stride,
    k_token_stride,
    v_page_stride,
    v_head_stride,
    v_token_stride,
    K: tl.constexpr,
    V: tl.constexpr,
    K_TILES: tl.constexpr,  # for each plane of K: its first tile, the one after its last, positions, runs a tile
    V_TILES: tl.constexpr,
    K_SCALES: tl.constexpr,  # where a head's token scales lie in its record; -1: nowhere
    V_SCALES: tl.constexpr,
    K_MEANS: tl.constexpr,  # where the page's means of K lie in a head's record, and of how many channels
    K_CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,  # tokens, rounded up to a power of two
    KV_HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    K_ALIGNED: tl.constexpr,
    V_ALIGNED: tl.constexpr,
    HALF: tl.constexpr,
):
    """Grid (N, class heads, tiles): one tile of runs of one plane, of K or of V, of one head of a page."""
    page_id = tl.load(pages + tl.program_id(0))
    entry = heads + 2 * tl.program_id(1)
    head = tl.load(entry).to(tl.int64)
    page = (tl.load(addresses + page_id) + tl.load(entry + 1)).to(tl.pointer_type(tl.uint8))
    page = tl.multiple_of(page, 16)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(2)
    if tile == 0:
        at = (row * KV_HEADS + head) * TOKENS
        if K_SCALES >= 0:
            _store_scales(k_scales + at, page, K_SCALES, TOKENS, SPAN)
        if V_SCALES >= 0:
            _store_scales(v_scales + at, page, V_SCALES, TOKENS, SPAN)
        if K_MEANS[1]:
            means = k_means + (row * KV_HEADS + head) * K_CHANNELS
            _store_means(means, page, K_MEANS[0], K_MEANS[1], K_MEANS[2])
    keys = k + row * k_page_stride + head * k_head_stride
    for p in tl.static_range(len(K)):
        if (tile >= K_TILES[p][0]) & (tile < K_TILES[p][1]):
            _seal_runs(keys, k_token_stride, tile, page, K[p], K_TILES[p], TOKENS, HALF, K_ALIGNED)
    values = v + row * v_page_stride + head * v_head_stride
    for p in tl.static_range(len(V)):
        if (tile >= V_TILES[p][0]) & (tile < V_TILES[p][1]):
            _seal_runs(values, v_token_stride, tile, page, V[p], V_TILES[p], TOKENS, HALF, V_ALIGNED)
