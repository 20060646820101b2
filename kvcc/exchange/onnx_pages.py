"""Where sealed pages lie in the tensors of an ONNX graph: the bytes of `kernels/layout.py`, in an order ONNX can read.

ONNX has no view of bytes as numbers, so a page is up to three records, one a type: `bytes` (uint8: codes, scales of
tokens, e4m3 scales, page means), `halves` (float16: scales and zeros, planes of 16 bits) and `floats` (float32: planes
of 32). There is no padding between sections. Channels of one width and kind are one *run*, whichever head they are of,
so that a graph unpacks them with one set of operators; a run's codes are [channels][tokens], whatever `groups` says.
Codes of page means, which have a sign, are 128 more here.
"""

from dataclasses import dataclass, field, fields, replace

from kvcc.kernels.layout import TOKEN_SCALE_BITS, PageLayout, Section, packed_bytes
from kvcc.kernels.page_means import mean_steps


@dataclass(frozen=True)
class Run:
    """Channels of one side, of all heads, that are stored alike."""

    like: Section  # of the first; its places and channels mean nothing here
    channels: tuple[int, ...]  # head * width + stored channel, in the order of codes
    codes: int  # place of the first code among `bytes`, or of the first number of a raw plane in its record
    scales: int = 0  # among halves, or among bytes where they are e4m3
    zeros: int = 0

    @property
    def groups_of_tokens(self) -> bool:
        return self.like.groups == "tokens"


@dataclass(frozen=True)
class SidePages:
    """K or V of a layer's pages."""

    width: int  # channels of the widest head
    runs: tuple[Run, ...]
    stored: tuple[int, ...]  # channels of each head that have planes
    scaled_heads: tuple[int, ...] = ()  # whose tokens have scales
    token_scales: int = 0  # among bytes: [scaled heads][tokens / 2]
    mean_steps: tuple[float, ...] = ()  # of page means [heads * width], 0 for none; empty without any
    means: int = 0  # among bytes: one for each channel that has a step

    @property
    def even(self) -> bool:
        """Whether all heads store `width` channels in one run, in order."""
        return len(self.runs) == 1 and self.runs[0].channels == tuple(range(len(self.stored) * self.width))

    @property
    def mean_channels(self) -> tuple[int, ...]:
        """head * width + channel of the channels with page means, in the order of their codes."""
        return tuple(channel for channel, step in enumerate(self.mean_steps) if step)


@dataclass(frozen=True)
class OnnxPages:
    """The records of one page of one layer: numbers in each, and where things lie."""

    tokens: int
    kv_heads: int
    k: SidePages
    v: SidePages
    sizes: dict[str, int] = field(default_factory=dict)  # by record: bytes, halves, floats; none of 0

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        return sum(size * ITEM_BYTES[record] for record, size in self.sizes.items())


ITEM_BYTES = {"bytes": 1, "halves": 2, "floats": 4}


def onnx_pages(layout: PageLayout) -> OnnxPages:
    """The same page for ONNX. Its tokens are of one class (`layout.rest` is None)."""
    sizes = dict.fromkeys(ITEM_BYTES, 0)
    k = _side(layout, layout.k, layout.k_token_scales, layout.k_channels, sizes)
    if any(count for _, count in layout.k_means):
        steps = mean_steps(layout, layout.k_channels).flatten().tolist()
        k = replace(k, mean_steps=tuple(steps), means=sizes["bytes"])
        sizes["bytes"] += len(k.mean_channels)
    v = _side(layout, layout.v, layout.v_token_scales, layout.v_channels, sizes)
    return OnnxPages(layout.tokens, layout.kv_heads, k, v, {name: n for name, n in sizes.items() if n})


def _side(
    layout: PageLayout,
    heads: tuple[tuple[Section, ...], ...],
    places: tuple[int | None, ...],
    width: int,
    sizes: dict[str, int],
) -> SidePages:
    """Lay out one side behind what `sizes` counts already, and count it."""
    kinds: dict[tuple[object, ...], tuple[Section, list[int]]] = {}
    for head, sections in enumerate(heads):
        for section in sections:
            first = head * width + section.first_channel
            kinds.setdefault(_kind(section), (section, []))[1].extend(range(first, first + section.channels))
    runs = tuple(_run(layout.tokens, section, tuple(channels), sizes) for section, channels in kinds.values())
    scaled = tuple(head for head, place in enumerate(places) if place is not None)
    at = sizes["bytes"]
    sizes["bytes"] += len(scaled) * packed_bytes(TOKEN_SCALE_BITS, layout.tokens)
    return SidePages(width, runs, tuple(sum(s.channels for s in h) for h in heads), scaled, at)


_PLACES = ("channels", "first_channel", "codes", "scales", "zeros")


def _kind(section: Section) -> tuple[object, ...]:
    return tuple(getattr(section, f.name) for f in fields(Section) if f.name not in _PLACES)


def _run(tokens: int, section: Section, channels: tuple[int, ...], sizes: dict[str, int]) -> Run:
    def take(record: str, count: int) -> int:
        sizes[record] += count
        return sizes[record] - count

    elements = tokens * len(channels)
    if section.raw:
        return Run(section, channels, take("halves" if section.bits == 16 else "floats", elements))
    codes = take("bytes", packed_bytes(section.bits, elements))
    if section.unit:
        return Run(section, channels, codes)
    groups = elements // section.group_size
    scales = take("bytes" if section.scale_bytes == 1 else "halves", groups)
    zeros = take("halves", groups) if section.steps == "adaptive" else 0
    return Run(section, channels, codes, scales, zeros)
