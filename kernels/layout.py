"""Where each byte of a sealed page lies. Pure arithmetic: every backend and every byte count follows from it.

A page holds `tokens` tokens of one layer. It is one contiguous record:

    head 0: K plane 0 (codes, scales, zeros), K plane 1, …, V plane 0 (codes, scales, zeros), …
    head 1: …

A *plane* is a run of channels of one width. Channels of width 0 (pruned) are simply absent. Sections start
on 16-byte boundaries. Scales and zeros are float16; a code q stands for `q * scale + zero`.

Codes of one packed run (see `packed_bytes`): `n` codes of width b in {2, 4, 8} take n*b/8 bytes, byte i holding
codes i, i + n*b/8, i + 2*n*b/8, … from its low bits up, so that unpacking yields contiguous codes. Width 3 is a
width-2 run followed by a width-1 run of the third bits.

`groups = "tokens"`: codes [channels][tokens], one scale per channel and group_size tokens.
`groups = "channels"`: codes [tokens][channels], one scale per token and group_size channels.
Widths 16 and 32 are raw floats in the same order as codes, without scales.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvcc.errors import PlanError

WIDTHS = (2, 3, 4, 8, 16, 32)
ALIGNMENT = 16
METADATA_BYTES = 2  # float16, for a scale or a zero

Groups = Literal["tokens", "channels"]


@dataclass(frozen=True)
class Plane:
    """A run of `channels` channels, each stored with `bits` bits (16: half precision, 32: float32)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic when a plan is parsed

    bits: int
    channels: int

    @property
    def raw(self) -> bool:
        return self.bits >= 16


@dataclass(frozen=True)
class Side:
    """How K, or V, of one KV head is stored in a page; channels missing from `planes` are pruned."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    planes: tuple[Plane, ...]
    groups: Groups
    group_size: int

    @property
    def channels(self) -> int:
        """Channels that are stored."""
        return sum(p.channels for p in self.planes)


@dataclass(frozen=True)
class Section:
    """One plane of one head, in bytes from the start of the page."""

    bits: int
    channels: int
    first_channel: int  # where the plane begins among the head's stored channels
    groups: Groups
    group_size: int
    codes: int
    scales: int  # 0 when raw
    zeros: int  # 0 when raw

    @property
    def raw(self) -> bool:
        return self.bits >= 16


@dataclass(frozen=True)
class PageLayout:
    """The record of one page of one layer.

    k[h] and v[h] are the sections of KV head h; `nbytes` is the size of the whole record;
    `half` is the type of width-16 planes.
    """

    tokens: int
    kv_heads: int
    k: tuple[tuple[Section, ...], ...]
    v: tuple[tuple[Section, ...], ...]
    nbytes: int
    half: torch.dtype

    @property
    def k_channels(self) -> int:
        """The widest head's stored K channels: the last dimension of K and q given to a backend."""
        return max((_stored(s) for s in self.k), default=0)

    @property
    def v_channels(self) -> int:
        return max((_stored(s) for s in self.v), default=0)


def _stored(sections: tuple[Section, ...]) -> int:
    return sum(s.channels for s in sections)


def packed_bytes(bits: int, codes: int) -> int:
    """Bytes of a packed run of `codes` codes; `codes` must be a multiple of 8 when bits is 3, else of 8/bits."""
    return codes * bits // 8


def page_layout(
    tokens: int, k: tuple[Side, ...], v: tuple[Side, ...], half: torch.dtype = torch.float16
) -> PageLayout:
    """Lay out a page of `tokens` tokens for KV heads stored as k[h], v[h].

    Raises PlanError when a width is unknown or a group or packed run does not come out even.
    """
    if tokens < 8 or tokens % 8:
        raise PlanError(f"page of {tokens} tokens: use a multiple of 8")
    offset = 0
    k_sections, v_sections = [], []
    for head, (k_side, v_side) in enumerate(zip(k, v, strict=True)):
        sections, offset = _sections(tokens, k_side, offset, f"KV head {head}, K")
        k_sections.append(sections)
        sections, offset = _sections(tokens, v_side, offset, f"KV head {head}, V")
        v_sections.append(sections)
    return PageLayout(tokens, len(k), tuple(k_sections), tuple(v_sections), offset, half)


def _sections(tokens: int, side: Side, offset: int, where: str) -> tuple[tuple[Section, ...], int]:
    sections = []
    first = 0
    for plane in side.planes:
        _check(tokens, side, plane, where)
        codes = offset
        offset = _aligned(codes + packed_bytes(plane.bits, tokens * plane.channels))
        scales = zeros = 0
        if not plane.raw:
            metadata = METADATA_BYTES * tokens * plane.channels // side.group_size
            scales, zeros = offset, _aligned(offset + metadata)
            offset = _aligned(zeros + metadata)
        sections.append(
            Section(plane.bits, plane.channels, first, side.groups, side.group_size, codes, scales, zeros)
        )
        first += plane.channels
    return tuple(sections), offset


def _check(tokens: int, side: Side, plane: Plane, where: str) -> None:
    if plane.bits not in WIDTHS:
        raise PlanError(f"{where}: width {plane.bits} is unknown; use one of {WIDTHS}")
    if plane.channels < 1:
        raise PlanError(f"{where}: a plane of {plane.channels} channels; leave it out instead")
    if plane.raw:
        return
    run, what = (tokens, "page tokens") if side.groups == "tokens" else (plane.channels, "plane channels")
    if side.group_size < 1 or run % side.group_size:
        raise PlanError(f"{where}: group_size {side.group_size} does not divide {run} {what}")
    if run % 8:
        raise PlanError(f"{where}: {run} {what} cannot be packed; use a multiple of 8")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
