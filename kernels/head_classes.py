"""Groups the KV heads of a page layout so that one compiled kernel serves all heads stored alike."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from kvcc.kernels.layout import PageLayout, Section
from kvcc.kernels.levels import KINDS, magnitudes

STEPS = ("adaptive", "scaled", "unit")  # as kernels number them


class PlaneSpec(NamedTuple):
    """One plane, as constants of a kernel; offsets are in bytes from where the head's record starts."""

    bits: int
    channels: int
    width: int  # channels rounded up to a power of two, at least 16: what a tile of the plane spans
    first_channel: int
    by_tokens: (
        int  # 1: a run is a channel and groups span tokens; 0: a run is a token and groups span channels
    )
    group_size: int
    codes: int
    scales: int
    zeros: int
    steps: int  # ADAPTIVE, SCALED or UNIT
    levels: int  # UNIFORM, NORMAL, E2M1 or E4M3
    magnitudes: tuple[float, ...]  # of levels that are a list
    flat: int  # 1: all codes are one packed run
    clip: float  # share of a group's range that adaptive steps reach


@dataclass(frozen=True)
class HeadClass:
    """KV heads with the same planes: heads[i] = (KV head, byte offset of its record in the page)."""

    heads: tuple[tuple[int, int], ...]
    k: tuple[PlaneSpec, ...]
    v: tuple[PlaneSpec, ...]
    k_scales: int  # where token scales lie in the record; -1: nowhere
    v_scales: int
    k_means: tuple[int, int, int]  # where page means of K lie, of how many channels, and that number padded


@lru_cache(maxsize=256)
def head_classes(layout: PageLayout) -> tuple[HeadClass, ...]:
    """The classes of a layout, each head in exactly one. A uniform layout has a single class."""
    Stored = tuple[tuple[PlaneSpec, ...], tuple[PlaneSpec, ...], int, int, tuple[int, int, int]]
    members: dict[Stored, list[tuple[int, int]]] = {}
    for head, (k, v) in enumerate(zip(layout.k, layout.v, strict=True)):
        places = (layout.k_token_scales[head], layout.v_token_scales[head])
        start, count = layout.k_means[head]
        starts = [section.codes for section in k + v] + [place for place in places if place is not None]
        starts += [start] if count else []
        base = min(starts, default=0)
        k_scales, v_scales = (-1 if place is None else place - base for place in places)
        means = (start - base, count, padded(count)) if count else (0, 0, 0)
        stored = (_planes(k, base), _planes(v, base), k_scales, v_scales, means)
        members.setdefault(stored, []).append((head, base))
    return tuple(HeadClass(tuple(heads), *stored) for stored, heads in members.items())


def _planes(sections: tuple[Section, ...], base: int) -> tuple[PlaneSpec, ...]:
    return tuple(
        PlaneSpec(
            bits=s.bits,
            channels=s.channels,
            width=padded(s.channels),
            first_channel=s.first_channel,
            by_tokens=int(s.groups == "tokens"),
            group_size=s.group_size,
            codes=s.codes - base,
            scales=0 if s.raw or s.unit else s.scales - base,
            zeros=0 if s.raw or s.steps != "adaptive" else s.zeros - base,
            steps=STEPS.index(s.steps),
            levels=KINDS.index(s.levels),
            magnitudes=magnitudes(s.levels, s.bits),
            flat=int(s.flat),
            clip=s.clip / 100,
        )
        for s in sections
    )


def padded(size: int) -> int:
    """The power of two, at least 16 (the least a matrix instruction takes), that holds `size`."""
    return max(16, 1 << (size - 1).bit_length())
