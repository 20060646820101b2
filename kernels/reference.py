"""The reference backend: plain torch, obvious, the specification of the others."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcc.kernels.layout import TOKEN_SCALE_BITS, PageLayout, Section, packed_bytes
from kvcc.kernels.levels import level_codes, values_of
from kvcc.kernels.packing import pack, unpack
from kvcc.kernels.page_means import less_means, mean_steps
from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Cached
from kvcc.kernels.token_scales import of_layout, scale_of

SCALE_FLOOR = 1e-6  # a constant group (padding, a dead channel) must not divide by zero

name = "reference"


def supports(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> str | None:
    """The reference runs every layout everywhere."""
    return None


def quantize(x: Tensor, bits: int, group_size: int, clip: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric min-max codes of runs x [..., n]: codes uint8 [..., n]; scale, zero float16 [..., n / group_size].

    `clip`: percent of minimum and maximum that codes reach.
    """
    groups = x.float().unflatten(-1, (-1, group_size))
    zero = (groups.amin(-1) * (clip / 100)).half()
    span = groups.amax(-1) * (clip / 100) - zero.float()
    scale = (span / (2**bits - 1)).half().clamp_min(SCALE_FLOOR)
    steps = (groups - zero.float()[..., None]) / scale.float()[..., None]
    codes = steps.clamp(0, 2**bits - 1).round().to(torch.uint8)
    return codes.flatten(-2), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """float32 [..., n] from codes [..., n] and scale, zero [..., groups]."""
    groups = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.float()[..., None] + zero.float()[..., None]).flatten(-2)


def seal(layout: PageLayout, k: Tensor, v: Tensor, pool: PagePool, pages: Tensor) -> None:
    """See `Backend.seal`."""
    records = torch.zeros(len(pages), layout.nbytes, dtype=torch.uint8, device=k.device)
    first = 0
    for part in layout.parts:
        some = slice(first, first + part.tokens)
        _seal_part(part, k[:, :, some], v[:, :, some], records)
        first += part.tokens
    pool.write(pages, records)


def _seal_part(layout: PageLayout, k: Tensor, v: Tensor, records: Tensor) -> None:
    """The tokens of one class."""
    k, means = less_means(layout, k)
    for head, (start, count) in enumerate(layout.k_means):
        if means is not None and count:
            _put(records, start, means[:, head, :count])
    k, v, *scales = of_layout(layout, k, v)
    for stored, places in zip(scales, (layout.k_token_scales, layout.v_token_scales)):
        for head, place in enumerate(places):
            if stored is not None and place is not None:
                _put(records, place, pack(stored[:, head], TOKEN_SCALE_BITS))
    for head in range(layout.kv_heads):
        for x, sections in ((k, layout.k[head]), (v, layout.v[head])):
            for section in sections:
                last = section.first_channel + section.channels
                _seal_section(layout, section, x[:, head, :, section.first_channel : last], records)


def unit_codes(x: Tensor, bits: int) -> Tensor:
    """uint8 codes of x on a grid of steps of 1: code q covers [q - 2^(bits-1), q + 1 - 2^(bits-1))."""
    half = 2 ** (bits - 1)
    return (x.float().floor() + half).clamp(0, 2 * half - 1).to(torch.uint8)


def _seal_section(layout: PageLayout, section: Section, x: Tensor, records: Tensor) -> None:
    runs = x.transpose(1, 2) if section.groups == "tokens" else x  # [N, runs, run length]
    if section.raw:
        half = layout.half if section.bits == 16 else torch.float32
        _put(records, section.codes, runs.to(half))
        return
    if section.levels != "uniform":
        scaled = section.steps == "scaled"
        codes, scale = level_codes(runs, section.levels, section.bits, section.group_size if scaled else None)
        _put(records, section.codes, pack(_packed_runs(section, codes), section.bits))
        if scale is not None:
            _put(records, section.scales, scale)
        return
    if section.unit:
        _put(
            records, section.codes, pack(_packed_runs(section, unit_codes(runs, section.bits)), section.bits)
        )
        return
    codes, scale, zero = quantize(runs, section.bits, section.group_size, section.clip)
    _put(records, section.codes, pack(codes, section.bits))
    _put(records, section.scales, scale)
    _put(records, section.zeros, zero)


def _packed_runs(section: Section, codes: Tensor) -> Tensor:
    """Codes [N, runs, length] as they are packed: by runs, or all of a page together."""
    return codes.flatten(1)[:, None] if section.flat else codes


def _put(records: Tensor, offset: int, x: Tensor) -> None:
    raw = x.contiguous().flatten(1).view(torch.uint8)
    records[:, offset : offset + raw.shape[1]] = raw


def unseal(layout: PageLayout, records: Tensor) -> tuple[Tensor, Tensor]:
    """What pages stand for, in float32: k [N, Hkv, tokens, k_channels], v [N, Hkv, tokens, v_channels].

    Channels beyond a narrower head's own are zero.
    """
    k, v = zip(*(_unseal_part(part, records) for part in layout.parts))
    return torch.cat(k, 2), torch.cat(v, 2)


def _unseal_part(layout: PageLayout, records: Tensor) -> tuple[Tensor, Tensor]:
    n, tokens, device = len(records), layout.tokens, records.device
    k = torch.zeros(n, layout.kv_heads, tokens, layout.k_channels, device=device)
    v = torch.zeros(n, layout.kv_heads, tokens, layout.v_channels, device=device)
    for head in range(layout.kv_heads):
        for x, sections in ((k, layout.k[head]), (v, layout.v[head])):
            for section in sections:
                last = section.first_channel + section.channels
                x[:, head, :, section.first_channel : last] = _unseal_section(layout, section, records)
        for x, places in ((k, layout.k_token_scales), (v, layout.v_token_scales)):
            if (place := places[head]) is not None:
                packed = _get(records, place, packed_bytes(TOKEN_SCALE_BITS, tokens))
                x[:, head] *= scale_of(unpack(packed, TOKEN_SCALE_BITS, tokens))[..., None]
        start, count = layout.k_means[head]
        means = _get(records, start, count).view(torch.int8).float()
        k[:, head, :, :count] += (means * mean_steps(layout, count)[head].to(device))[:, None]
    return k, v


def _unseal_section(layout: PageLayout, section: Section, records: Tensor) -> Tensor:
    tokens, channels = layout.tokens, section.channels
    runs, length = (channels, tokens) if section.groups == "tokens" else (tokens, channels)
    stored = _get(records, section.codes, packed_bytes(section.bits, tokens * channels))
    if section.raw:
        x = (
            stored.view(layout.half if section.bits == 16 else torch.float32)
            .float()
            .unflatten(1, (runs, length))
        )
    elif section.levels != "uniform":
        x = _unseal_levels(section, records, _unpacked(section, stored, runs, length))
    elif section.unit:
        x = _unpacked(section, stored, runs, length) + (0.5 - 2 ** (section.bits - 1))
    else:
        metadata = 2 * runs * length // section.group_size
        scale = _get(records, section.scales, metadata).view(torch.float16).unflatten(1, (runs, -1))
        zero = _get(records, section.zeros, metadata).view(torch.float16).unflatten(1, (runs, -1))
        x = dequantize(_unpacked(section, stored, runs, length), scale, zero)
    return x.transpose(1, 2) if section.groups == "tokens" else x


def _unpacked(section: Section, stored: Tensor, runs: int, length: int) -> Tensor:
    """Codes uint8 [N, runs, length]."""
    if section.flat:
        return unpack(stored, section.bits, runs * length).unflatten(1, (runs, length))
    return unpack(stored.unflatten(1, (runs, -1)), section.bits, length)


def _unseal_levels(section: Section, records: Tensor, codes: Tensor) -> Tensor:
    x = values_of(codes, section.levels, section.bits)
    if section.steps == "unit":
        return x
    runs, groups = codes.shape[1], codes.shape[2] // section.group_size
    stored = _get(records, section.scales, section.scale_bytes * runs * groups)
    scale = stored.view(torch.float8_e4m3fn if section.scale_bytes == 1 else torch.float16)
    return (x.unflatten(-1, (groups, -1)) * scale.float().unflatten(1, (runs, groups, 1))).flatten(-2)


def _get(records: Tensor, offset: int, nbytes: int) -> Tensor:
    return records[:, offset : offset + nbytes].clone()


def attend(
    cached: Cached,
    q: Tensor,
    q_pages: Tensor,
    scale: float,
    softcap: float = 0.0,
    page_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `Backend.attend`."""
    batch, n, q_heads, _ = q.shape
    out = torch.zeros(batch, n, q_heads, cached.window_v.shape[-1], device=q.device)
    lse = torch.full((batch, n, q_heads), -torch.inf, device=q.device)
    for row in range(batch):
        slots = window_slots(cached, row)
        logits = _logits(q[row], cached.window_k[row][:, slots].float(), scale, None)
        values = cached.window_v[row][:, slots].float()
        if cached.layout is not None and cached.pool is not None and int(cached.sealed[row]):
            ids = cached.table[row, : int(cached.sealed[row]) // cached.layout.page_tokens]
            k, v = unseal(cached.layout, cached.pool.read(ids))
            bias = None if page_bias is None else page_bias[row]
            body = _logits(q_pages[row], k.transpose(0, 1).flatten(1, 2), scale, bias)
            logits = torch.cat([logits, body], dim=-1)
            v = F.pad(v, (0, values.shape[-1] - v.shape[-1]))  # what pages do not store of V is 0
            values = torch.cat([values, v.transpose(0, 1).flatten(1, 2)], dim=1)
        if logits.shape[-1] == 0:
            continue
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        lse[row] = logits.logsumexp(-1)
        weights = logits.softmax(-1).unflatten(1, (values.shape[0], -1))  # [n, Hkv, group, T]
        out[row] = torch.einsum("nhgt,htd->nhgd", weights, values).flatten(1, 2)
    return out, lse


def _logits(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """[n, Hq, T] from q [n, Hq, D] and k [Hkv, T, D]."""
    grouped = q.float().unflatten(1, (k.shape[0], -1))
    logits = scale * torch.einsum("nhgd,htd->nhgt", grouped, k).flatten(1, 2)
    return logits if bias is None else logits + bias[..., None]


def window_slots(cached: Cached, row: int) -> Tensor:
    """Window slots of sequence `row` that hold a token, oldest first: [slots] int64."""
    length, sealed, sinks = int(cached.lengths[row]), int(cached.sealed[row]), cached.sinks
    ring = cached.window_k.shape[2] - sinks
    first = torch.arange(min(length, sinks))
    recent = torch.arange(sinks + sealed, max(length, sinks + sealed))
    return torch.cat([first, sinks + (recent - sinks) % max(ring, 1)]).to(cached.window_k.device)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One attention out of partial ones over disjoint keys: parts of (out [..., D], lse [...])."""
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    safe = torch.where(total == -torch.inf, torch.zeros_like(total), total)
    out = sum(o.float() * (lse - safe).exp()[..., None] for o, lse in parts)
    assert isinstance(out, Tensor)
    return out, total
