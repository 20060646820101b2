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
`page_means` of K follow them: for each of so many channels, the first ones, a code of 8 bits with sign, for the mean of
the page's tokens that was subtracted before anything else. It counts in sixteenths of what the channel's codes span,
2^b / 16 for b bits of uniform levels, and channels behind the planes, of which nothing else is stored, have b = 0.

`levels` other than "uniform" are lists of numbers that a sign and a magnitude choose from (see `levels.py`): with unit
steps a code stands for its level; with `steps = "scaled"` for the level times its group's scale, which is float16, or
e4m3 for levels e2m1 (NVFP4's blocks). There are no zeros then. With unit steps, planes of widths that have no normal
levels have uniform ones. `clip` narrows the range of adaptive steps, in percent.

Codes of one packed run (see `packed_bytes`): `n` codes of width b in {1, 2, 4, 8} take n*b/8 bytes, byte i holding
codes i, i + n*b/8, i + 2*n*b/8, … from its low bits up, so that unpacking yields contiguous codes. Widths 3, 5 and 6
are a run of the low bits, 2 or 4 wide, followed by one of the bits above them (`SPLIT`).

`groups = "tokens"`: codes [channels][tokens], an adaptive scale per channel and group_size tokens.
`groups = "channels"`: codes [tokens][channels], an adaptive scale per token and group_size channels.
With unit steps, the codes of a plane by `channels` are one packed run of tokens * channels.
Widths 16 and 32 are raw floats in the same order as codes, without scales.

Where a page's tokens are of two classes, the tokens of the first come first, stored as above, and a second record
follows with those of the other. Attention does not mind the order of tokens, so no index is kept.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from kvcc.errors import PlanError
from kvcc.kernels.levels import BITS_OF, Levels, span, unit_levels

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 16, 32)
SPLIT = {
    3: (2, 1),
    5: (4, 1),
    6: (4, 2),
}  # widths that divide no byte: those of the runs that they are stored as
ALIGNMENT = 16
METADATA_BYTES = 2  # float16, for a scale or a zero

TOKEN_SCALE_BITS, TOKEN_SCALE_ONE, TOKEN_SCALE_OCTAVE = 4, 3, 3  # width, the code of 1, codes to the double

PAGE_MEAN_BITS, PAGE_MEAN_STEPS = 8, 16  # width, and steps of a code to what the channel's own codes span

Groups = Literal["tokens", "channels"]
Steps = Literal["adaptive", "scaled", "unit"]


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
    levels: Levels = "uniform"
    clip: int = 100  # percent of a group's least and greatest value that adaptive steps reach
    page_means: int = 0  # channels, the first ones, of which the page has a mean; with or without a plane

    @property
    def channels(self) -> int:
        """Channels that are stored, in planes or by their means."""
        return max(sum(p.channels for p in self.planes), self.page_means)


@dataclass(frozen=True)
class Section:
    """One plane of one head, in bytes from the start of the page."""

    bits: int
    channels: int
    first_channel: int  # where the plane begins among the head's stored channels
    groups: Groups
    group_size: int
    codes: int
    scales: int  # 0 where there are none
    zeros: int  # 0 without adaptive steps
    steps: Steps = "adaptive"
    levels: Levels = "uniform"
    clip: int = 100

    @property
    def raw(self) -> bool:
        return self.bits >= 16

    @property
    def unit(self) -> bool:
        """Whether codes stand for themselves, without scales and zeros."""
        return self.steps == "unit"

    @property
    def flat(self) -> bool:
        """Whether all codes of the plane are one packed run."""
        return self.steps == "unit" and self.groups == "channels" and not self.raw

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale."""
        return scale_bytes(self.levels)


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
    k_means: tuple[tuple[int, int], ...] = ()  # by head: where K's page means lie, and of how many channels
    rest: "PageLayout | None" = (
        None  # of the tokens behind the first `tokens`; places count from the same start
    )

    @property
    def parts(self) -> tuple["PageLayout", ...]:
        """One layout for each class of tokens, in the order in which they lie in a page."""
        return (self,) if self.rest is None else (self, *self.rest.parts)

    @property
    def page_tokens(self) -> int:
        """Tokens of a page, of all classes."""
        return sum(part.tokens for part in self.parts)

    @property
    def k_channels(self) -> int:
        """The widest head's stored K channels: the last dimension of K and q given to a backend."""
        return max((*(_stored(s) for s in self.k), *(count for _, count in self.k_means)), default=0)

    @property
    def v_channels(self) -> int:
        return max((_stored(s) for s in self.v), default=0)


def joined(first: PageLayout, rest: PageLayout) -> PageLayout:
    """The layout of pages with two classes of tokens; `rest` starts where `first` ends.

    Raises PlanError when they are not equally wide, as backends take the tokens of a page as one tensor.
    """
    for name, one, other in (
        ("K", first.k_channels, rest.k_channels),
        ("V", first.v_channels, rest.v_channels),
    ):
        if one != other:
            raise PlanError(
                f"salient tokens store {one} {name} channels and others {other}; the widest head must store as many of "
                "both"
            )
    return replace(first, nbytes=rest.nbytes, rest=rest)


def _stored(sections: tuple[Section, ...]) -> int:
    return sum(s.channels for s in sections)


def page_mean_step(bits: int, levels: Levels = "uniform") -> float:
    """What a code of a page mean counts, for a channel of `bits` bits."""
    return span(levels, bits) / PAGE_MEAN_STEPS


def scale_bytes(levels: Levels) -> int:
    """Bytes of one group's scale."""
    return 1 if levels == "e2m1" else METADATA_BYTES


def packed_bytes(bits: int, codes: int) -> int:
    """Bytes of a packed run of `codes` codes, which must be a multiple of 8/bits, or of 8 where bits divide no byte."""
    return codes * bits // 8


def page_layout(
    tokens: int,
    k: tuple[Side, ...],
    v: tuple[Side, ...],
    half: torch.dtype = torch.float16,
    start: int = 0,
) -> PageLayout:
    """Lay out a page of `tokens` tokens for KV heads stored as k[h], v[h], from byte `start` on.

    Raises PlanError when a width is unknown or a group or packed run does not come out even.
    """
    if tokens < 8 or tokens % 8:
        raise PlanError(f"page of {tokens} tokens: use a multiple of 8")
    offset = start
    sections: dict[str, list[tuple[Section, ...]]] = {"K": [], "V": []}
    scales: dict[str, list[int | None]] = {"K": [], "V": []}
    means: list[tuple[int, int]] = []
    for head, sides in enumerate(zip(k, v, strict=True)):
        for name, side in zip("KV", sides):
            found, offset = _sections(tokens, side, offset, f"KV head {head}, {name}")
            sections[name].append(found)
            scales[name].append(offset if side.token_scales else None)
            offset = _aligned(offset + packed_bytes(TOKEN_SCALE_BITS, tokens) * side.token_scales)
            if name == "K":
                means.append((offset if side.page_means else 0, side.page_means))
            elif side.page_means:
                raise PlanError(f"KV head {head}, V: page_means are for K; leave them out")
            offset = _aligned(offset + side.page_means)
    return PageLayout(
        *(tokens, len(k), tuple(sections["K"]), tuple(sections["V"]), offset, half),
        *(tuple(scales["K"]), tuple(scales["V"]), tuple(means)),
    )


def _sections(tokens: int, side: Side, offset: int, where: str) -> tuple[tuple[Section, ...], int]:
    _check_side(side, where)
    sections = []
    first = 0
    for plane in side.planes:
        _check(tokens, side, plane, where)
        codes = offset
        offset = _aligned(codes + packed_bytes(plane.bits, tokens * plane.channels))
        scales = zeros = 0
        if not plane.raw and side.steps != "unit":
            metadata = scale_bytes(side.levels) * tokens * plane.channels // side.group_size
            scales, offset = offset, _aligned(offset + metadata)
            if side.steps == "adaptive":
                zeros, offset = offset, _aligned(offset + metadata)
        sections.append(
            Section(
                *(plane.bits, plane.channels, first, side.groups, side.group_size, codes, scales, zeros),
                steps=side.steps,
                levels=_levels_of(side, plane),
                clip=side.clip,
            )
        )
        first += plane.channels
    return tuple(sections), offset


def _levels_of(side: Side, plane: Plane) -> Levels:
    return unit_levels(side.levels, plane.bits) if side.steps == "unit" else side.levels


def _check_side(side: Side, where: str) -> None:
    if side.token_scales and side.steps != "unit":
        raise PlanError(f"{where}: token_scales go with unit steps; others have scales of their own")
    adds_up = side.steps == "unit" and side.levels in ("uniform", "normal")
    if side.page_means < 0 or (side.page_means and not adds_up):
        raise PlanError(
            f"{where}: page_means {side.page_means}: a number of channels, with unit steps of uniform or normal levels"
        )
    _check_levels(side, where)
    if side.steps != "unit":
        return
    if side.group_size:
        raise PlanError(f"{where}: unit steps have no groups; leave group_size out")


def _check_levels(side: Side, where: str) -> None:
    if side.steps != "adaptive" and any(plane.raw for plane in side.planes):
        raise PlanError(f"{where}: a plane of floats has no steps; use steps: adaptive")
    if (side.steps == "scaled" and side.levels == "uniform") or (
        side.steps == "adaptive" and side.levels != "uniform"
    ):
        raise PlanError(f"{where}: levels {side.levels} do not go with steps {side.steps}")
    if side.levels != "uniform":
        for plane in side.planes:
            if _levels_of(side, plane) != "uniform" and plane.bits not in BITS_OF[side.levels]:
                raise PlanError(
                    f"{where}: levels {side.levels} have {' or '.join(map(str, BITS_OF[side.levels]))} bits, "
                    f"not {plane.bits}"
                )
        if side.token_scales and side.levels != "normal":
            raise PlanError(
                f"{where}: token_scales are chosen for uniform or normal levels, not {side.levels}"
            )
    if not 1 <= side.clip <= 100 or (side.clip < 100 and side.steps != "adaptive"):
        raise PlanError(f"{where}: clip {side.clip}: use 1 to 100 percent, with adaptive steps")


def _check(tokens: int, side: Side, plane: Plane, where: str) -> None:
    if plane.bits not in WIDTHS:
        raise PlanError(f"{where}: width {plane.bits} is unknown; use one of {WIDTHS}")
    if plane.channels < 1:
        raise PlanError(f"{where}: a plane of {plane.channels} channels; leave it out instead")
    if plane.raw:
        return
    run, what = (tokens, "page tokens") if side.groups == "tokens" else (plane.channels, "plane channels")
    if side.steps != "unit" and (side.group_size < 1 or run % side.group_size):
        raise PlanError(f"{where}: group_size {side.group_size} does not divide {run} {what}")
    if run % 8 and side.steps != "unit":
        raise PlanError(f"{where}: {run} {what} cannot be packed; use a multiple of 8")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
