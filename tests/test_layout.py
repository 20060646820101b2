"""Packing, page layouts, pools and plans: properties, and byte counts known from elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcc.errors import PlanError
from kvcc.kernels.layout import ALIGNMENT, Plane, Side, packed_bytes, page_layout
from kvcc.kernels.packing import pack, unpack
from kvcc.kernels.pool import PagePool
from kvcc.kernels.reference import merge, quantize, seal, unseal
from kvcc.runtime.plan import HeadPlan, LayerPlan, Plan, parse_plan

BITS = st.sampled_from([2, 3, 4, 8])


@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 12), st.integers(0, 3), st.integers(0, 999))
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
    return (
        Side(tuple(Plane(b, c) for b, c in k), "tokens", k_group),
        Side(tuple(Plane(b, 8 * c) for b, c in v), "channels", 8),
    )


@given(st.data(), st.sampled_from([8, 16, 48]), st.integers(1, 3))
@settings(max_examples=60)
def test_sections_are_aligned_disjoint_and_cover_what_they_say(
    data: st.DataObject, tokens: int, heads: int
) -> None:
    stored = [data.draw(sides(tokens)) for _ in range(heads)]
    layout = page_layout(tokens, tuple(k for k, _ in stored), tuple(v for _, v in stored))
    spans = []
    for sections in (*layout.k, *layout.v):
        for s in sections:
            metadata = 0 if s.raw else 2 * tokens * s.channels // s.group_size
            spans.append((s.codes, packed_bytes(s.bits, tokens * s.channels)))
            spans += [] if s.raw else [(s.scales, metadata), (s.zeros, metadata)]
    spans.sort()
    assert all(start % ALIGNMENT == 0 for start, _ in spans)
    assert all(a + size <= b for (a, size), (b, _) in zip(spans, spans[1:]))
    assert all(start + size <= layout.nbytes for start, size in spans)
    assert layout.nbytes - sum(size for _, size in spans) < ALIGNMENT * max(1, len(spans))


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
                span = slice(s.first_channel, s.first_channel + s.channels)
                error = (x[:, head, :, span] - back[:, head, :, span]).abs().max()
                spread = x[:, head, :, span].max() - x[:, head, :, span].min()
                limit = {16: 4e-3, 32: 0.0}.get(
                    s.bits, 0.51 * float(spread) / (2 ** min(s.bits, 8) - 1) + 0.02
                )
                assert error <= limit
            last = sections[-1].first_channel + sections[-1].channels if sections else 0
            assert not back[:, head, :, last:].any()


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
        (16, Side((Plane(5, 8),), "tokens", 8), "width 5 is unknown"),
        (16, Side((Plane(4, 0),), "tokens", 8), "leave it out"),
        (16, Side((Plane(4, 8),), "tokens", 12), "group_size 12 does not divide 16 page tokens"),
        (16, Side((Plane(4, 24),), "channels", 16), "group_size 16 does not divide 24 plane channels"),
        (16, Side((Plane(4, 12),), "channels", 12), "12 plane channels cannot be packed"),
    ],
)
def test_layouts_that_do_not_come_out_even(tokens: int, side: Side, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        page_layout(tokens, (side,), (side,))


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
        "width 7 is unknown": lambda d: d["layers"][0]["heads"][0]["k"]["planes"][0].update(bits=7),
    }
    for message, break_it in cases.items():
        broken = json.loads(plan.model_dump_json())
        break_it(broken)
        with pytest.raises(PlanError, match=message):
            parse_plan(broken)
