"""Shared cases of the kernel tests: what every backend must seal and attend over.

`SPECS` is a list of cheap descriptions (give them to `pytest.mark.parametrize`, `ids=str`);
`build(spec, device)` makes the tensors of one, always the same ones. Pages are sealed with the reference.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcc.kernels import reference
from kvcc.kernels.layout import Groups, PageLayout, Plane, Side, Steps, joined, page_layout
from kvcc.kernels.levels import Levels
from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Cached


@dataclass(frozen=True)
class Spec:
    """One case. `k` and `v` hold one Side per KV head; lengths are tokens cached per sequence."""

    name: str
    k: tuple[Side, ...]
    v: tuple[Side, ...]
    dim: int = 64  # of q, window K and window V; pages may store fewer K channels
    page: int = 64
    group: int = 2  # query heads per KV head
    dtype: torch.dtype = torch.float32  # of the window, of q and of what is sealed
    lengths: tuple[int, ...] = (300,)
    sinks: int = 16
    recent: int = 32
    queries: int = 1
    softcap: float = 0.0
    bias: bool = False
    salient: int = 0  # tokens of a page that are stored as `salient_k`, `salient_v`, the first of them
    salient_k: tuple[Side, ...] = ()
    salient_v: tuple[Side, ...] = ()
    paged: bool = True  # False: a sliding window of `recent` tokens, older ones forgotten

    def __str__(self) -> str:
        return self.name

    @property
    def ring(self) -> int:
        return self.recent + self.page if self.paged else self.recent

    def sealed(self, length: int) -> int:
        """Tokens of a sequence that are in pages (or forgotten)."""
        old = max(0, length - self.sinks - self.recent)
        return old // self.page * self.page if self.paged else old


@dataclass(frozen=True)
class Case:
    """Tensors of a spec; k_pages, v_pages [N, Hkv, tokens, C] were sealed as pages `ids` ([N]) of `pool`."""

    spec: Spec
    layout: PageLayout | None
    cached: Cached
    q: Tensor  # [B, n, Hq, dim]
    q_pages: Tensor  # [B, n, Hq, k_channels]
    scale: float
    softcap: float
    page_bias: Tensor | None  # [B, n, Hq]
    k_pages: Tensor
    v_pages: Tensor
    ids: Tensor


def tolerance(dtype: torch.dtype) -> float:
    """Largest absolute difference from the reference that a backend may show (values here are of size 1)."""
    return 1e-4 if dtype == torch.float32 else 2e-3


def side(groups: str, group_size: int, *planes: tuple[int, int]) -> Side:
    """A Side of planes given as (bits, channels)."""
    assert groups in ("tokens", "channels")
    return Side(tuple(Plane(bits, channels) for bits, channels in planes), groups, group_size)  # type: ignore[arg-type]


def unit(groups: str, *planes: tuple[int, int], scales: bool = True) -> Side:
    """A Side of unit steps, with or without token scales."""
    assert groups in ("tokens", "channels")
    return Side(
        tuple(Plane(bits, channels) for bits, channels in planes),
        groups,  # type: ignore[arg-type]
        steps="unit",
        token_scales=scales,
    )


def levelled(
    levels: Levels, bits: int, channels: int, group_size: int = 0, groups: Groups = "channels"
) -> Side:
    """A Side of one plane of `levels`, with scales of groups or, without group_size, in steps of 1."""
    steps: Steps = "scaled" if group_size else "unit"
    return Side((Plane(bits, channels),), groups, group_size, steps=steps, levels=levels)


def build(spec: Spec, device: torch.device | str = "cpu") -> Case:
    """The tensors of a spec, made on the CPU from a seed that the name gives, then moved."""
    rng = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
    batch, heads, slots = len(spec.lengths), len(spec.k), spec.sinks + spec.ring
    half = spec.dtype if spec.dtype != torch.float32 else torch.float16
    layout = _layout(spec, half) if spec.paged else None

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(spec.dtype).to(device)

    sealed = [spec.sealed(length) for length in spec.lengths]
    k_channels = layout.k_channels if layout else spec.dim
    pages = sum(sealed) // spec.page if layout else 0
    k_pages = normal(pages, heads, spec.page, k_channels) * 1.5 + 0.25
    v_pages = normal(pages, heads, spec.page, layout.v_channels if layout else spec.dim)
    v_pages[:, :, ::7] = 0.5  # constant groups
    pool, ids = None, torch.zeros(0, dtype=torch.int64, device=device)
    table = torch.full(
        (batch, max(sealed) // spec.page + 2), 2**40, dtype=torch.int64, device=device
    )  # undefined
    if layout is not None:
        pool, ids = _sealed_pool(layout, k_pages, v_pages, rng)
        first = 0
        for row, tokens in enumerate(sealed):
            count = tokens // spec.page
            table[row, :count] = ids[first : first + count]
            first += count
    window = [normal(batch, heads, slots, spec.dim) for _ in range(2)]
    cached = Cached(
        layout,
        *(_stale(spec, x) for x in window),
        spec.sinks,
        torch.tensor(spec.lengths, dtype=torch.int32, device=device),
        torch.tensor(sealed, dtype=torch.int32, device=device),
        pool,
        table,
    )
    q_heads = heads * spec.group
    q = normal(batch, spec.queries, q_heads, spec.dim)
    q_pages = normal(batch, spec.queries, q_heads, k_channels)
    bias = torch.randn(batch, spec.queries, q_heads, generator=rng).to(device) if spec.bias else None
    scale = spec.dim**-0.5
    return Case(spec, layout, cached, q, q_pages, scale, spec.softcap, bias, k_pages, v_pages, ids)


def _layout(spec: Spec, half: torch.dtype) -> PageLayout:
    if not spec.salient:
        return page_layout(spec.page, spec.k, spec.v, half)
    first = page_layout(spec.salient, spec.salient_k, spec.salient_v, half)
    return joined(first, page_layout(spec.page - spec.salient, spec.k, spec.v, half, first.nbytes))


def _sealed_pool(layout: PageLayout, k: Tensor, v: Tensor, rng: torch.Generator) -> tuple[PagePool, Tensor]:
    """A pool of several blocks, pages in shuffled order, other pages between them."""
    pool = PagePool(layout.nbytes, k.device)
    free = [page for some in (1, 2, 5, len(k)) for page in pool.take(some)]
    order = torch.randperm(len(free), generator=rng)[: len(k)]
    ids = torch.tensor(free, device=k.device)[order.to(k.device)]
    for block in pool.blocks:
        block.fill_(0xFF)
    if len(ids):
        reference.seal(layout, k, v, pool, ids)
    return pool, ids


def _stale(spec: Spec, window: Tensor) -> Tensor:
    """Slots that hold no token keep something from long ago: make it large, so that reading it shows."""
    for row, length in enumerate(spec.lengths):
        live = set(range(min(length, spec.sinks)))
        recent = range(spec.sinks + spec.sealed(length), length)
        live |= {spec.sinks + (t - spec.sinks) % spec.ring for t in recent}
        dead = [slot for slot in range(window.shape[2]) if slot not in live]
        window[row][:, dead] = 1000.0
    return window


def _specs() -> Iterator[Spec]:
    yield from _widths()
    yield from _layouts()
    yield from _shapes()
    yield from _lengths()
    yield from _sliding()


def _widths() -> Iterator[Spec]:
    for bits in (2, 3, 4, 8, 16, 32):
        for group_size in (8, 32, 64):
            k, v = side("tokens", group_size, (bits, 64)), side("channels", group_size, (bits, 64))
            yield Spec(f"k{bits}v{bits}-group{group_size}", (k, k), (v, v))
    k, v = side("tokens", 32, (2, 64)), side("channels", 64, (4, 64))
    for dtype in (torch.float16, torch.bfloat16):
        yield Spec(f"k2v4-{str(dtype)[6:]}", (k, k), (v, v), dtype=dtype, lengths=(300, 90))
        raw = (side("tokens", 64, (16, 64)),), (side("channels", 64, (16, 64)),)
        yield Spec(f"raw16-{str(dtype)[6:]}", *raw, dtype=dtype, queries=2)


def _layouts() -> Iterator[Spec]:
    v = side("channels", 32, (4, 64))
    mixed_k = side("tokens", 32, (8, 8), (4, 24), (2, 32))
    mixed_v = side("channels", 8, (16, 8), (4, 24), (3, 8), (2, 24))
    yield Spec("mixed-planes", (mixed_k, mixed_k), (mixed_v, mixed_v), group=3)
    yield Spec("mixed-planes-float16", (mixed_k,), (mixed_v,), group=3, dtype=torch.float16)
    narrow = side("tokens", 64, (4, 39))
    yield Spec("narrow-k39", (narrow, narrow), (v, v), group=3)
    yield Spec("narrow-k39-k2", (side("tokens", 32, (2, 39)),) * 2, (v, v), group=1, queries=3)
    odd = side("tokens", 32, (8, 3), (6, 2), (5, 2), (4, 3), (3, 5), (2, 11))
    yield Spec("odd-mixed", (odd, odd), (v, v), group=4, bias=True)
    per_head_k = (
        side("tokens", 32, (4, 39)),
        side("tokens", 64, (2, 64)),
        side("tokens", 8, (3, 20), (16, 5)),
    )
    per_head_v = (side("channels", 32, (4, 64)), side("channels", 8, (2, 24)), side("channels", 16, (8, 64)))
    yield Spec("per-head", per_head_k, per_head_v, group=3, lengths=(300, 17), dim=64)
    by_token = side("channels", 32, (4, 64))
    yield Spec("k-by-token", (by_token,) * 2, (v, v))
    yield Spec(
        "v-by-channel", (side("tokens", 32, (3, 64)),) * 2, (side("tokens", 32, (2, 40), (8, 24)),) * 2
    )
    yield Spec(
        "page-8", (side("tokens", 8, (4, 64)),), (side("channels", 64, (2, 64)),), page=8, lengths=(200, 25)
    )
    yield Spec("page-24", (side("tokens", 12, (3, 17)),), (v,), page=24, lengths=(200,))
    yield Spec(
        "page-128",
        (side("tokens", 128, (2, 64)),),
        (side("channels", 32, (2, 64)),),
        page=128,
        lengths=(700,),
    )
    yield from _unit_steps()
    yield from _page_means()
    yield from _levels()
    yield from _classes()
    mostly_pruned = side("tokens", 64, (4, 1))
    yield Spec("narrow-k1", (mostly_pruned,), (v,), bias=True)


def _unit_steps() -> Iterator[Spec]:
    for bits in (1, 2, 3, 4, 5, 6, 8):
        k, v = unit("tokens", (bits, 64), scales=False), unit("channels", (bits, 64), scales=False)
        yield Spec(f"unit{bits}", (k, k), (v, v), group=3)
    mixed_k = unit("tokens", (8, 8), (6, 8), (5, 8), (4, 8), (2, 16), (1, 8))
    mixed_v = unit("channels", (6, 8), (5, 8), (4, 8), (3, 8), (1, 24))
    yield Spec("unit-mixed", (mixed_k, mixed_k), (mixed_v, mixed_v), group=3, bias=True)
    yield Spec("unit-mixed-float16", (mixed_k,), (mixed_v,), group=4, dtype=torch.float16)
    yield Spec("unit-queries70", (mixed_k,) * 2, (mixed_v,) * 2, queries=70, lengths=(300, 0, 20))
    short = {"page": 24, "lengths": (200, 90)}
    yield Spec("unit-page24", (unit("tokens", (3, 17)),), (unit("channels", (2, 40)),), **short)  # type: ignore[arg-type]
    other = side("tokens", 32, (4, 39)), side("channels", 32, (4, 64))
    plain = unit("tokens", (2, 40), scales=False), unit("channels", (4, 64), scales=False)
    k, v = zip(other, (mixed_k, mixed_v), plain)
    yield Spec("unit-per-head", k, v, group=2)
    by_token = unit("channels", (4, 64))
    yield Spec("unit-by-token", (by_token,), (unit("tokens", (2, 40), (8, 24)),))
    yield Spec("unit-no-keys", (unit("tokens"),), (unit("channels", (2, 64)),), bias=True)


def _page_means() -> Iterator[Spec]:
    def means(count: int, *planes: tuple[int, int], scales: bool = True) -> Side:
        return replace(unit("tokens", *planes, scales=scales), page_means=count)

    v = unit("channels", (4, 24), (3, 8), (1, 24))
    every = means(64, (8, 8), (4, 16), (3, 8), (2, 16), (1, 16))
    yield Spec("means", (every, every), (v, v), group=3)
    yield Spec("means-bfloat16", (every,), (v,), group=4, dtype=torch.bfloat16, lengths=(300, 90), bias=True)
    beyond = means(64, (4, 8), (2, 24))
    yield Spec("means-beyond-planes", (beyond, beyond), (v, v), group=3, softcap=1.5)
    yield Spec("means-queries70", (beyond,) * 2, (v,) * 2, queries=70, lengths=(300, 0, 20), bias=True)
    yield Spec("means-without-scales", (means(64, (3, 40), scales=False),), (v,), lengths=(300, 113))
    some = means(21, (4, 8), (3, 31))  # fewer than the planes have
    yield Spec("means-some", (some, some), (v, v), group=3, dtype=torch.float16, queries=5)
    yield Spec("means-only", (means(64, scales=False),), (v,), bias=True)
    yield Spec("means-page24", (means(19, (3, 17)),), (v,), page=24, lengths=(200, 90))
    other = side("tokens", 32, (4, 39)), side("channels", 32, (4, 64))
    k, vs = zip((beyond, v), other, (some, v), (unit("tokens", (2, 40)), v))
    yield Spec("means-per-head", k, vs, group=2)
    parts = {"salient": 40, "salient_k": (beyond,), "salient_v": (v,)}
    yield Spec("means-classes", (means(64, (1, 40)),), (v,), lengths=(400, 90), **parts)  # type: ignore[arg-type]


def _levels() -> Iterator[Spec]:
    fp8 = levelled("e4m3", 8, 64)
    yield Spec("fp8", (fp8, fp8), (fp8, fp8), group=3)
    yield Spec("fp8-float16", (fp8,), (fp8,), group=3, dtype=torch.float16, queries=5)
    block = levelled("e2m1", 4, 64, 16)
    yield Spec("nvfp4", (block, block), (block, block), group=3)
    yield Spec("nvfp4-bfloat16", (block,), (block,), dtype=torch.bfloat16, lengths=(300, 90), bias=True)
    yield Spec("nvfp4-by-channel", (levelled("e2m1", 4, 39, 32, "tokens"),), (levelled("e2m1", 4, 40, 8),))
    for bits in (1, 2, 3, 4):
        k = levelled("normal", bits, 64, 64)
        v = levelled("normal", bits, 64, 32)
        yield Spec(f"normal{bits}", (k, k), (v, v), group=3)
    yield Spec("normal-unit", (levelled("normal", 3, 64, 0, "tokens"),), (levelled("normal", 2, 40),))
    k = unit("tokens", (8, 8), (5, 8), (4, 8), (3, 8), (2, 16), (1, 8))
    k, v = (
        replace(side, levels="normal")
        for side in (replace(k, page_means=64), unit("channels", (6, 8), (4, 8), (3, 8), (2, 8), (1, 16)))
    )
    yield Spec("normal-mixed", (k, k), (v, v), group=3, bias=True)
    yield Spec("normal-mixed-float16", (k,), (v,), group=4, dtype=torch.float16)
    plain = unit("tokens", (3, 40)), unit("channels", (4, 24), (2, 16))
    yield Spec("normal-per-head", (k, plain[0]), (v, plain[1]), lengths=(300, 113))
    clipped = replace(side("channels", 32, (2, 64)), clip=92)
    yield Spec("clipped", (clipped, clipped), (clipped, clipped))


def _classes() -> Iterator[Spec]:
    low = side("tokens", 24, (2, 64)), side("channels", 64, (2, 64))
    high = side("tokens", 40, (4, 64)), side("channels", 64, (4, 64))
    base = Spec("", (low[0],) * 2, (low[1],) * 2, group=3, salient=40)
    base = replace(base, salient_k=(high[0],) * 2, salient_v=(high[1],) * 2)
    yield replace(base, name="salient40")
    yield replace(base, name="salient40-bias-queries5", bias=True, queries=5, lengths=(300, 0, 700))
    yield replace(base, name="salient40-float16", dtype=torch.float16, softcap=2.0)
    units = unit("tokens", (3, 40)), unit("channels", (2, 40), (1, 8))
    raw = side("tokens", 16, (16, 40)), side("channels", 48, (16, 48))
    yield Spec(
        "salient-raw",
        units[:1],
        units[1:],
        salient=16,
        salient_k=raw[:1],
        salient_v=raw[1:],
        lengths=(400, 90),
    )


def _shapes() -> Iterator[Spec]:
    for dim in (16, 64, 80, 128):
        k, v = side("tokens", 32, (4, dim)), side("channels", 16, (4, dim))
        for group in (1, 3, 4, 8):
            yield Spec(f"dim{dim}-group{group}", (k, k), (v, v), dim=dim, group=group, lengths=(200,))
    k, v = side("tokens", 32, (2, 80)), side("channels", 40, (2, 80))
    yield Spec("dim80-2bit", (k,), (v,), dim=80, group=3)
    base = Spec("", (side("tokens", 32, (4, 39)),) * 2, (side("channels", 64, (2, 64)),) * 2, group=3)
    yield replace(base, name="queries5", queries=5)
    yield replace(base, name="queries70", queries=70, lengths=(300, 0, 20))
    yield replace(base, name="softcap", softcap=1.5)
    yield replace(base, name="bias", bias=True)
    yield replace(base, name="bias-softcap-queries5", bias=True, softcap=1.5, queries=5, lengths=(300, 5))
    yield replace(base, name="bias-softcap-bfloat16", bias=True, softcap=1.5, dtype=torch.bfloat16)


def _lengths() -> Iterator[Spec]:
    sides = (side("tokens", 64, (4, 64)),) * 2, (side("channels", 32, (2, 64)),) * 2
    for sinks in (0, 16):
        full = sinks + 32 + 64  # the first page is sealed
        for length in (0, 1, 15, 16, 17, full - 1, full, full + 1, full + 64 * 9 + 5):
            yield Spec(f"sinks{sinks}-length{length}", *sides, lengths=(length,), sinks=sinks)
        ragged = (0, 1, full, full - 1, 700, sinks, 250)
        yield Spec(f"ragged-sinks{sinks}", *sides, lengths=ragged, sinks=sinks, group=3)
        yield Spec(f"ragged-queries5-sinks{sinks}", *sides, lengths=ragged, sinks=sinks, queries=5)
    yield Spec("no-recent", *sides, lengths=(16 + 64 * 3, 100), recent=0)
    yield Spec("long", *sides, lengths=(3000, 40), group=3, dtype=torch.bfloat16)


def _sliding() -> Iterator[Spec]:
    sides = (side("tokens", 64, (4, 64)),) * 2, (side("channels", 32, (2, 64)),) * 2
    for sinks in (0, 4):
        lengths = (0, 3, 24, 25, 100)
        yield Spec(f"sliding-sinks{sinks}", *sides, lengths=lengths, sinks=sinks, recent=24, paged=False)
    yield Spec(
        "sliding-queries5", *sides, lengths=(7, 100), recent=24, paged=False, queries=5, softcap=2.0, dim=80
    )


SPECS = list(_specs())
