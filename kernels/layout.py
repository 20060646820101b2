"""Where each byte of a sealed page lies. Pure arithmetic: every backend and every byte count follows from it.

A page holds `tokens` tokens of one layer. It is one contiguous record:

    head 0: K plane 0 (codes, scales, zeros), K plane 1, …, V plane 0 (codes, scales, zeros), …
    head 1: …

A *plane* is a run of channels of one width. Channels of width 0 (pruned) are simply absent. Sections start
on 16-byte boundaries.

With `steps = "adaptive"`, groups of codes have a scale and a zero, float16; a code q stands for `q * scale + zero`.
With `steps = "unit"` a page has none: the plan's basis gives each channel a step of 1, fixed by calibration, and a code
of b bits stands for `q + 1/2 - 2^(b-1)`. `token_scales` then follow the planes of a side: a code e of 4 bits a token,
packed as one run, for the factor `2^((e - 3) / 3)` by which its values were divided before they were rounded.

Codes of one packed run (see `packed_bytes`): `n` codes of width b in {1, 2, 4, 8} take n*b/8 bytes, byte i holding
codes i, i + n*b/8, i + 2*n*b/8, … from its low bits up, so that unpacking yields contiguous codes. Width 3 is a
width-2 run followed by a width-1 run of the third bits.

`groups = "tokens"`: codes [channels][tokens], an adaptive scale per channel and group_size tokens.
`groups = "channels"`: codes [tokens][channels], an adaptive scale per token and group_size channels.
Widths 16 and 32 are raw floats in the same order as codes, without scales.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvcc.errors import PlanError

WIDTHS = (1, 2, 3, 4, 8, 16, 32)
ALIGNMENT = 16
METADATA_BYTES = 2  # float16, for a scale or a zero

TOKEN_SCALE_BITS, TOKEN_SCALE_ONE, TOKEN_SCALE_OCTAVE = 4, 3, 3  # width, the code of 1, codes to the double

Groups = Literal["tokens", "channels"]
Steps = Literal["adaptive", "unit"]


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
    group_size: int = 0  # none with unit steps
    steps: Steps = "adaptive"
    token_scales: bool = False

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
    scales: int  # 0 without adaptive steps
    zeros: int  # 0 without adaptive steps
    unit: bool = False

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
    k_token_scales: tuple[int | None, ...] = ()  # by head: where they lie
    v_token_scales: tuple[int | None, ...] = ()

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
    sections: dict[str, list[tuple[Section, ...]]] = {"K": [], "V": []}
    scales: dict[str, list[int | None]] = {"K": [], "V": []}
    for head, sides in enumerate(zip(k, v, strict=True)):
        for name, side in zip("KV", sides):
            found, offset = _sections(tokens, side, offset, f"KV head {head}, {name}")
            sections[name].append(found)
            scales[name].append(offset if side.token_scales else None)
            offset = _aligned(offset + packed_bytes(TOKEN_SCALE_BITS, tokens) * side.token_scales)
    return PageLayout(
        *(tokens, len(k), tuple(sections["K"]), tuple(sections["V"]), offset, half),
        *(tuple(scales["K"]), tuple(scales["V"])),
    )


def _sections(tokens: int, side: Side, offset: int, where: str) -> tuple[tuple[Section, ...], int]:
    _check_side(side, where)
    unit = side.steps == "unit"
    sections = []
    first = 0
    for plane in side.planes:
        _check(tokens, side, plane, where)
        codes = offset
        offset = _aligned(codes + packed_bytes(plane.bits, tokens * plane.channels))
        scales = zeros = 0
        if not plane.raw and not unit:
            metadata = METADATA_BYTES * tokens * plane.channels // side.group_size
            scales, zeros = offset, _aligned(offset + metadata)
            offset = _aligned(zeros + metadata)
        sections.append(
            Section(
                *(plane.bits, plane.channels, first, side.groups, side.group_size, codes, scales, zeros, unit)
            )
        )
        first += plane.channels
    return tuple(sections), offset


def _check_side(side: Side, where: str) -> None:
    if side.token_scales and side.steps != "unit":
        raise PlanError(f"{where}: token_scales go with unit steps; adaptive ones have scales of their own")
    if side.steps != "unit":
        return
    if side.group_size:
        raise PlanError(f"{where}: unit steps have no groups; leave group_size out")
    if any(plane.raw for plane in side.planes):
        raise PlanError(f"{where}: a plane of floats has no steps; use steps: adaptive")


def _check(tokens: int, side: Side, plane: Plane, where: str) -> None:
    if plane.bits not in WIDTHS:
        raise PlanError(f"{where}: width {plane.bits} is unknown; use one of {WIDTHS}")
    if plane.channels < 1:
        raise PlanError(f"{where}: a plane of {plane.channels} channels; leave it out instead")
    if plane.raw:
        return
    run, what = (tokens, "page tokens") if side.groups == "tokens" else (plane.channels, "plane channels")
    if side.steps == "adaptive" and (side.group_size < 1 or run % side.group_size):
        raise PlanError(f"{where}: group_size {side.group_size} does not divide {run} {what}")
    if run % 8:
        raise PlanError(f"{where}: {run} {what} cannot be packed; use a multiple of 8")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
