"""Packing, page layouts, pools and plans: properties, and byte counts known from elsewhere."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcc.errors import PlanError
from kvcc.kernels.layout import ALIGNMENT, PageLayout, Plane, Side, joined, packed_bytes, page_layout
from kvcc.kernels.packing import pack, unpack
from kvcc.kernels.pool import PagePool
from kvcc.kernels.reference import merge, quantize, seal, unseal
from kvcc.runtime.plan import HeadPlan, LayerPlan, Plan, parse_plan

BITS = st.sampled_from([2, 3, 4, 8])


@given(st.sampled_from([1, 2, 3, 4, 5, 6, 8]), st.integers(0, 12), st.integers(0, 3), st.integers(0, 999))
def test_packing_round_trip(bits: int, eights: int, rows: int, seed: int) -> None:
    n = 8 * eights
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_bytes(bits, n))
    assert torch.equal(unpack(packed, bits, n), codes)


def test_packing_order_is_the_documented_one() -> None:
    assert pack(torch.arange(8) % 4, 2).tolist() == [0b10_00_10_00, 0b11_01_11_01]
    assert pack(torch.tensor([1, 2, 3, 4]), 4).tolist() == [0x31, 0x42]
    three = pack(torch.arange(8), 3)
    assert three.tolist() == [*pack(torch.arange(8) & 3, 2).tolist(), 0b1111_0000]


@st.composite
def sides(draw, tokens: int) -> tuple[Side, Side]:  # type: ignore[no-untyped-def]
    widths = st.sampled_from([2, 3, 4, 8, 16, 32])
    k = draw(st.lists(st.tuples(widths, st.integers(1, 20)), min_size=0, max_size=3))
    v = draw(st.lists(st.tuples(widths, st.integers(1, 4)), min_size=1, max_size=2))
    k_group = draw(st.sampled_from([g for g in (1, 8, 16, tokens) if tokens % g == 0]))
    v_side = Side(tuple(Plane(b, 8 * c) for b, c in v), "channels", 8)
    if all(b < 16 for b, _ in k) and draw(st.booleans()):
        means, scales = draw(st.integers(0, 9)), draw(st.booleans())
        planes = tuple(Plane(b, c) for b, c in k)
        return Side(planes, "tokens", steps="unit", token_scales=scales, page_means=means), v_side
    return Side(tuple(Plane(b, c) for b, c in k), "tokens", k_group), v_side


@given(st.data(), st.sampled_from([8, 16, 48]), st.integers(1, 3))
@settings(max_examples=60)
def test_sections_are_aligned_disjoint_and_cover_what_they_say(
    data: st.DataObject, tokens: int, heads: int
) -> None:
    stored = [data.draw(sides(tokens)) for _ in range(heads)]
    layout = page_layout(tokens, tuple(k for k, _ in stored), tuple(v for _, v in stored))
    spans = [where for where in layout.k_means if where[1]]
    spans += [(place, tokens // 2) for place in layout.k_token_scales if place is not None]
    for sections in (*layout.k, *layout.v):
        for s in sections:
            metadata = 0 if s.raw or s.unit else 2 * tokens * s.channels // s.group_size
            spans.append((s.codes, packed_bytes(s.bits, tokens * s.channels)))
            spans += [] if s.raw or s.unit else [(s.scales, metadata), (s.zeros, metadata)]
    spans.sort()
    assert all(start % ALIGNMENT == 0 for start, _ in spans)
    assert all(a + size <= b for (a, size), (b, _) in zip(spans, spans[1:]))
    assert all(start + size <= layout.nbytes for start, size in spans)
    assert layout.nbytes - sum(size for _, size in spans) < ALIGNMENT * max(1, len(spans))


@st.composite
def unit_sides(draw, most_means: int) -> Side:  # type: ignore[no-untyped-def]
    widths = st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 8]), st.integers(1, 20))
    planes = draw(st.lists(widths, max_size=3))
    means = draw(st.sampled_from([0, 1, 15, 16, 17, most_means]) | st.integers(0, most_means))
    groups = draw(st.sampled_from(["tokens", "channels"]))
    every = tuple(Plane(b, c) for b, c in planes)
    scales = draw(st.booleans())
    return Side(every, groups, steps="unit", token_scales=scales, page_means=means if most_means else 0)


@given(st.data(), st.sampled_from([8, 16, 48]), st.integers(1, 3))
@settings(max_examples=60)
def test_page_means_and_token_scales_lie_apart_from_planes(
    data: st.DataObject, tokens: int, heads: int
) -> None:
    k, v = (tuple(data.draw(unit_sides(most)) for _ in range(heads)) for most in (70, 0))
    layout = page_layout(tokens, k, v)
    spans = [
        (s.codes, packed_bytes(s.bits, tokens * s.channels))
        for sections in (*layout.k, *layout.v)
        for s in sections
    ]
    places = [place for place in layout.k_token_scales + layout.v_token_scales if place is not None]
    assert len(places) == sum(side.token_scales for side in k + v)
    spans += [(place, tokens // 2) for place in places]
    assert [count for _, count in layout.k_means] == [side.page_means for side in k]
    spans += [(place, count) for place, count in layout.k_means if count]
    spans.sort()
    assert all(start % ALIGNMENT == 0 for start, _ in spans)
    assert all(a + size <= b for (a, size), (b, _) in zip(spans, spans[1:]))
    assert layout.nbytes == sum(-(-size // ALIGNMENT) * ALIGNMENT for _, size in spans)
    assert layout.k_channels == max(side.channels for side in k)


@given(st.data(), st.sampled_from([8, 16]), st.integers(1, 2), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_sealed_page_stands_for_what_went_in(
    data: st.DataObject, tokens: int, heads: int, seed: int
) -> None:
    """Every element comes back within half a step and the float16 rounding of scale and zero."""
    stored = [data.draw(sides(tokens)) for _ in range(heads)]
    layout = page_layout(tokens, tuple(k for k, _ in stored), tuple(v for _, v in stored))
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(2, heads, tokens, layout.k_channels, generator=generator)
    v = torch.randn(2, heads, tokens, layout.v_channels, generator=generator)
    pool = PagePool(layout.nbytes, torch.device("cpu"))
    ids = torch.tensor(pool.take(2))
    seal(layout, k, v, pool, ids)
    back_k, back_v = unseal(layout, pool.read(ids))
    for head in range(heads):
        for x, back, sections in ((k, back_k, layout.k[head]), (v, back_v, layout.v[head])):
            for s in sections:
                if s.unit:
                    continue  # clips: see test_page_means_come_back and tests of kernels
                span = slice(s.first_channel, s.first_channel + s.channels)
                error = (x[:, head, :, span] - back[:, head, :, span]).abs().max()
                spread = x[:, head, :, span].max() - x[:, head, :, span].min()
                limit = {16: 4e-3, 32: 0.0}.get(
                    s.bits, 0.51 * float(spread) / (2 ** min(s.bits, 8) - 1) + 0.02
                )
                assert error <= limit
            last = sections[-1].first_channel + sections[-1].channels if sections else 0
            last = max(last, layout.k_means[head][1] if x is k else 0)
            assert not back[:, head, :, last:].any()


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 7.0])
def test_page_means_come_back(bits: int, scale: float) -> None:
    """Within half of what a code counts, where 127 codes reach; beyond that, the last code."""
    planes = (Plane(bits, 5),) if bits else ()
    k = Side(planes, "tokens", steps="unit", page_means=5)
    layout = page_layout(24, (k,), (Side((Plane(4, 8),), "channels", 8),))
    step = 2.0**bits / 16
    mean = torch.tensor([0.0, -0.5, 1.5, 126.9, -300.0]) * step * scale
    pool = PagePool(layout.nbytes, torch.device("cpu"))
    ids = torch.tensor(pool.take(1))
    seal(layout, mean.expand(1, 1, 24, 5), torch.zeros(1, 1, 24, 8), pool, ids)
    start, count = layout.k_means[0]
    codes = pool.read(ids)[0, start : start + count].view(torch.int8).float()
    expected = (mean / step).double().round().clamp(-127, 127)
    assert torch.equal(codes.double(), expected)
    back, _ = unseal(layout, pool.read(ids))
    middle = 0.5 if bits else 0.0  # 0 lies between two codes of a plane
    fits = (mean / step).abs() <= 127
    assert ((back[0, 0] - mean).abs()[:, fits] <= step / 2 + middle + 1e-6).all()


@pytest.mark.parametrize("value", [0.0, -3.5, 65504.0, -65504.0, 1e-9])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_constant_groups_come_back(value: float, bits: int) -> None:
    codes, scale, zero = quantize(torch.full((1, 32), value), bits, 32)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert abs(float((codes.float() * scale.float() + zero.float())[0, 0]) - value) <= 1e-6


@pytest.mark.parametrize(
    ("tokens", "side", "message"),
    [
        (12, Side((Plane(4, 8),), "tokens", 4), "page of 12 tokens: use a multiple of 8"),
        (16, Side((Plane(7, 8),), "tokens", 8), "width 7 is unknown"),
        (16, Side((Plane(4, 0),), "tokens", 8), "leave it out"),
        (16, Side((Plane(4, 8),), "tokens", 12), "group_size 12 does not divide 16 page tokens"),
        (16, Side((Plane(4, 24),), "channels", 16), "group_size 16 does not divide 24 plane channels"),
        (16, Side((Plane(4, 12),), "channels", 12), "12 plane channels cannot be packed"),
        (16, Side((Plane(4, 8),), "tokens", 8, page_means=8), "page_means 8: .* unit steps"),
        (16, Side((Plane(4, 8),), "tokens", steps="unit", page_means=-1), "page_means -1: .* unit steps"),
        (
            16,
            Side((Plane(8, 8),), "tokens", steps="unit", levels="e4m3", page_means=8),
            "page_means 8: .* uniform or normal levels",
        ),
        (
            16,
            Side((Plane(4, 8),), "tokens", steps="unit", page_means=8),
            "V: page_means are for K; leave them",
        ),
    ],
)
def test_layouts_that_do_not_come_out_even(tokens: int, side: Side, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        page_layout(tokens, (side,), (side,))


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (
            Side((Plane(4, 8),), "tokens", 8, page_means=8),
            "K: page_means 8: .* unit steps of uniform or normal levels",
        ),
        (Side((), "tokens", 8, page_means=1), "K: page_means 1: "),
        (Side((Plane(8, 8),), "tokens", steps="unit", levels="e4m3", page_means=8), "K: page_means 8: "),
        (Side((Plane(3, 8),), "tokens", 8, "scaled", levels="normal", page_means=8), "K: page_means 8: "),
        (
            Side((Plane(4, 8),), "tokens", steps="unit", page_means=-1),
            "K: page_means -1: a number of channels",
        ),
        (Side((Plane(4, 8),), "tokens", 8, page_means=-1), "K: page_means -1: "),
    ],
)
def test_page_means_go_with_unit_steps_of_uniform_or_normal_levels(side: Side, message: str) -> None:
    other = Side((Plane(4, 8),), "tokens", 8)
    with pytest.raises(PlanError, match=f"KV head 1, {message}"):
        page_layout(16, (other, side), (other, other))


def test_classes_of_tokens_are_equally_wide() -> None:
    def part(k: Side, channels: int = 8, start: int = 0) -> PageLayout:
        v = Side((Plane(2, channels),), "channels", steps="unit")
        return page_layout(16, (bare, k), (v, v), start=start)

    bare = Side((), "tokens", steps="unit")
    planes = replace(bare, planes=(Plane(3, 12),))
    first = part(planes)
    for rest in (replace(bare, page_means=12), replace(planes, page_means=5)):
        assert joined(first, part(rest, start=first.nbytes)).k_channels == 12
    with pytest.raises(PlanError, match="salient tokens store 12 K channels and others 13"):
        joined(first, part(replace(planes, page_means=13)))
    with pytest.raises(PlanError, match="salient tokens store 8 V channels and others 16"):
        joined(first, part(planes, 16))


@pytest.mark.parametrize("means", [-1, 1, 8, 1 << 62])
def test_v_has_no_page_means(means: int) -> None:
    k = Side((Plane(4, 8),), "tokens", steps="unit", page_means=8)
    with pytest.raises(PlanError, match="KV head 0, V: page_means"):
        page_layout(16, (k,), (replace(k, page_means=means),))


def test_pool_grows_by_blocks_and_reuses_pages() -> None:
    pool = PagePool(48, torch.device("cpu"))
    pool.reserve(3)
    first = pool.take(3)
    blocks = [b.data_ptr() for b in pool.blocks]
    more = pool.take(2)
    assert [b.data_ptr() for b in pool.blocks][: len(blocks)] == blocks  # nothing moved
    assert len({*first, *more}) == 5
    records = torch.arange(5 * 48, dtype=torch.uint8).view(5, 48)
    ids = torch.tensor([*first, *more])
    pool.write(ids, records)
    assert torch.equal(pool.read(ids.flip(0)), records.flip(0))
    assert len(set(pool.addresses.tolist())) == pool.capacity
    capacity = pool.capacity
    pool.give_back(first)
    assert set(pool.take(3)) == set(first)
    assert pool.capacity == capacity
    assert pool.nbytes == capacity * 48
    assert pool.read(torch.empty(0, dtype=torch.int64)).shape == (0, 48)


@given(st.integers(1, 4), st.integers(0, 99))
def test_partial_attentions_merge_to_the_whole(parts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6 * parts, generator=generator) * 3
    values = torch.randn(6 * parts, 5, generator=generator)
    pieces = [
        (x.softmax(-1) @ y, x.logsumexp(-1)) for x, y in zip(logits.chunk(parts, 1), values.chunk(parts))
    ]
    pieces.append((torch.zeros(2, 5), torch.full((2,), -torch.inf)))  # nothing cached adds nothing
    out, lse = merge(pieces)
    torch.testing.assert_close(out, logits.softmax(-1) @ values)
    torch.testing.assert_close(lse, logits.logsumexp(-1))


def _plan(k: Side, v: Side, dim: int = 128, heads: int = 1, **windows: int) -> Plan:
    shape = {"q_heads": heads, "kv_heads": heads, "k_dim": dim, "v_dim": dim}
    select = "all" if k.channels == dim else "static"
    layer = LayerPlan(
        **shape,
        **({"sinks": 16, "recent": 64, "page": 128} | windows),
        select=select,
        heads=(HeadPlan(k=k, v=v),) * heads,
    )
    return Plan(dtype="float16", layers=(layer,))


def _k(*planes: tuple[int, int], group: int = 32) -> Side:
    return Side(tuple(Plane(b, c) for b, c in planes), "tokens", group)


def _v(bits: int, channels: int = 128, group: int = 32) -> Side:
    return Side((Plane(bits, channels),), "channels", group)


@pytest.mark.parametrize(
    ("k", "v", "expected"),
    [  # bytes a token and KV head of 128 channels, from the method card
        (_k((2, 128)), _v(2), 96),
        (_k((2, 128), group=128), _v(2, group=128), 72),
        (_k((4, 128)), _v(4), 160),
        (_k((2, 64)), _v(2), 72),
        (_k((4, 32), (2, 64), group=128), _v(2, group=128), 71),
        (_k((16, 128)), _v(16), 512),
        (_k((16, 77)), _v(16), 410),
    ],
)
def test_bytes_per_token_of_the_method_card(k: Side, v: Side, expected: float) -> None:
    assert _plan(k, v).bytes_per_token() == expected


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([8, 16, 64]), st.integers(0, 500))
def test_sealed_tokens_are_whole_pages_and_leave_the_windows_exact(
    sinks: int, recent: int, page: int, n: int
) -> None:
    layer = _plan(_k((4, 128), group=8), _v(4), sinks=sinks, recent=recent, page=page).layers[0]
    sealed = layer.sealed(n)
    assert sealed % page == 0
    exact = n - sealed
    assert exact >= min(n, sinks + recent)
    assert exact < layer.slots  # there is a slot for the next token
    assert layer.sealed(n + 1) - sealed in (0, page)


@given(st.sampled_from([2, 4, 8]), st.sampled_from([0, 16, 100]), st.sampled_from([0, 64, 200]))
def test_break_even_is_where_the_sizes_cross(bits: int, sinks: int, recent: int) -> None:
    plan = _plan(_k((bits, 128)), _v(bits), sinks=sinks, recent=recent, page=64)
    even = plan.break_even()
    assert even is not None
    assert plan.cache_bytes(even) < plan.uncompressed_bytes(even)
    assert even == 0 or plan.cache_bytes(even - 64) >= plan.uncompressed_bytes(even - 64)


def test_a_plan_that_saves_nothing_says_so() -> None:
    assert _plan(_k((16, 128)), _v(16)).break_even() is None


def test_a_plan_survives_json_and_bad_ones_are_refused() -> None:
    import json

    plan = _plan(_k((2, 64)), _v(2), heads=2)
    data = json.loads(plan.model_dump_json())
    assert parse_plan(data) == plan
    cases = {
        "layers.0: give either a page": lambda d: d["layers"][0].update(page=0),
        "layers.0: 3 KV heads do not divide": lambda d: d["layers"][0].update(kv_heads=3),
        "layers.0: 1 head plans for 2": lambda d: d["layers"][0]["heads"].pop(),
        "layers.0.heads.0.k.planes.0.depth": lambda d: d["layers"][0]["heads"][0]["k"]["planes"][0].update(
            depth=1
        ),
        "layers.0.sinks": lambda d: d["layers"][0].update(sinks=-1),
        "dtype": lambda d: d.update(dtype="int8"),
        "prunes K channels": lambda d: d["layers"][0].update(select="all"),
        "layers.0: KV head 0 stores 129 K": lambda d: d["layers"][0]["heads"][0]["k"].update(page_means=129),
        "layer 0: KV head 0, K: page_means 64": lambda d: d["layers"][0]["heads"][0]["k"].update(
            page_means=64
        ),
        "layer 0: KV head 1, V: page_means -1": lambda d: d["layers"][0]["heads"][1]["v"].update(
            page_means=-1
        ),
        "k.page_means": lambda d: d["layers"][0]["heads"][0]["k"].update(page_means=0.5),
        "width 7 is unknown": lambda d: d["layers"][0]["heads"][0]["k"]["planes"][0].update(bits=7),
    }
    for message, break_it in cases.items():
        broken = json.loads(plan.model_dump_json())
        break_it(broken)
        with pytest.raises(PlanError, match=message):
            parse_plan(broken)
