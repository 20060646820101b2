"""The triton backend under Triton's interpreter, on CPU tensors.

Not collected by itself: the interpreter must be chosen before triton is imported, which would spoil the other
tests of a process. `test_triton` runs this file in a process of its own.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("run this file with TRITON_INTERPRET=1")

from kernel_cases import SPECS, Spec, build, side, tolerance

from benchmarks import gpu
from kvcc.kernels import reference, triton
from kvcc.kernels.layout import Plane, Side, page_layout
from kvcc.kernels.pool import PagePool

# One case of each kind stays in the quick run; they cover every branch of the kernels.
QUICK = {
    "k2v2-group32",
    "k3v3-group32",
    "k8v8-group64",
    "k2v4-float16",
    "k2v4-bfloat16",
    "raw16-bfloat16",
    "k32v32-group64",
    "odd-mixed",
    "fp8",
    "nvfp4-by-channel",
    "normal3",
    "normal-unit",
    "clipped",
    "means",
    "per-head",
    "v-by-channel",
    "k-by-token",
    "page-8",
    "page-24",
    "sinks16-length0",
    "sinks0-length1",
    "bias-softcap-queries5",
    "sliding-sinks4",
}
CASES = [pytest.param(s, id=str(s), marks=[] if s.name in QUICK else [pytest.mark.slow]) for s in SPECS]
SEALED = [case for case, s in zip(CASES, SPECS, strict=True) if s.paged and any(map(s.sealed, s.lengths))]


# Every head size with every group size, and with every width (0 stands for 4 bits of pruned K) in both half types.
HEAD_SIZES = (64, 80, 96, 128, 256)
WIDTHS = (2, 3, 4, 8, 16, 0)


def _matrix() -> Iterator[Spec]:
    for dim in HEAD_SIZES:
        for i, group in enumerate(range(1, 17)):
            width, dtype = WIDTHS[i % 6], (torch.float16, torch.bfloat16)[i // 6 % 2]
            bits = width or 4
            k = side("tokens", 32, (bits, dim if width else int(dim * 0.6)))
            v = side("channels", 16, (bits, dim))
            heads = 2 if group < 3 else 1
            yield Spec(
                f"dim{dim}-group{group}-width{width}-{str(dtype)[6:]}", (k,) * heads, (v,) * heads, dim=dim,
                page=32, group=group, dtype=dtype, lengths=(79, 10), sinks=4, recent=8, bias=not width,
            )  # fmt: skip


MATRIX = list(_matrix())
MATRIX_CASES = [
    pytest.param(s, id=str(s), marks=[] if i % 27 == 0 else [pytest.mark.slow]) for i, s in enumerate(MATRIX)
]


def test_the_matrix_is_complete() -> None:
    for dim in HEAD_SIZES:
        mine = [s for s in MATRIX if s.dim == dim]
        assert {s.group for s in mine} == set(range(1, 17))
        stored = {(s.k[0].planes[0], s.dtype) for s in mine}
        assert len(stored) == 12
        assert {plane.bits for plane, _ in stored} == {2, 3, 4, 8, 16}
        assert any(plane.channels < dim for plane, _ in stored)


@pytest.mark.parametrize("spec", MATRIX_CASES)
def test_head_sizes_groups_and_widths(spec: Spec) -> None:
    """Attention agrees with the reference, over pages that this backend sealed to the reference's bytes."""
    case = build(spec)
    assert case.layout is not None
    assert case.cached.pool is not None
    expected_out, expected_lse = reference.attend(
        case.cached, case.q, case.q_pages, case.scale, 0.0, case.page_bias
    )
    sealed = case.cached.pool.read(case.ids)
    for block in case.cached.pool.blocks:
        block.zero_()
    triton.seal(case.layout, case.k_pages, case.v_pages, case.cached.pool, case.ids)
    assert torch.equal(case.cached.pool.read(case.ids), sealed)
    out, lse = triton.attend(case.cached, case.q, case.q_pages, case.scale, 0.0, case.page_bias)
    torch.testing.assert_close(out, expected_out, atol=tolerance(spec.dtype), rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance(spec.dtype), rtol=0)


@pytest.mark.slow
def test_the_gpu_benchmark_from_its_arguments_to_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """All of it but the GPU's clock: what it checks, fills, runs and computes."""
    arguments = gpu.parser().parse_args(
        ["--dims=64", "--batches=2", "--lengths=140", "--kv-heads=1", "--group=2", "--rounds=3"]
    )
    ran: list[object] = []

    def timed(run: Callable[[], object], rounds: int) -> list[float]:
        ran.append(run())
        return [1e-6 * (2 + i) for i in range(rounds)]

    clock = gpu.Clock(torch.device("cpu"), timed, timed, compile=lambda function: function)
    found = gpu.report(arguments, clock, {"device": "none"})
    names = [f"kvcc {storage}" for storage in gpu.STORAGES]
    assert [r["contender"] for r in found["rows"]] == [
        "SDPA", "FlexAttention", *names, *(f"{name}, seal a page" for name in names)
    ]  # fmt: skip
    assert len(found["largest_errors"]) == 3
    assert all(0 < error <= gpu.LARGEST_ERROR for error in found["largest_errors"].values())
    assert found["copy_bytes_per_second"] == pytest.approx(2 * (1 << 20) / 3e-6)
    sdpa, _, kivi = found["rows"][:3]
    assert sdpa["nbytes"] == 4 * 2 * 140 * 64
    assert kivi["nbytes"] == 2 * (64 * 72 + 76 * 4 * 64)  # a page at 72 bytes a token; 76 exact tokens
    assert kivi["of_bound"] == pytest.approx(kivi["nbytes"] / found["copy_bytes_per_second"] / 3e-6)
    assert all(r["of_sdpa"] == 1 for r in found["rows"][:5])
    assert [r["of_sdpa"] for r in found["rows"][5:]] == [None] * 3
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    torch.testing.assert_close(ran[1], ran[3], atol=2e-3, rtol=0)  # SDPA and FlexAttention, after the copy


def test_quick_cases_exist() -> None:
    assert not QUICK - {spec.name for spec in SPECS}


@pytest.mark.parametrize("spec", CASES)
def test_attend(spec: Spec) -> None:
    case = build(spec)
    arguments = (case.cached, case.q, case.q_pages, case.scale, case.softcap, case.page_bias)
    out, lse = triton.attend(*arguments)
    expected_out, expected_lse = reference.attend(*arguments)
    limit = tolerance(spec.dtype)
    torch.testing.assert_close(out, expected_out, atol=limit, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=limit, rtol=0)  # -inf equals -inf


@pytest.mark.parametrize("spec", SEALED)
def test_seal_gives_the_bytes_of_the_reference(spec: Spec) -> None:
    case = build(spec)
    assert case.layout is not None
    count = min(len(case.ids), 3)
    k, v = case.k_pages[:count], case.v_pages[:count]
    pool = PagePool(case.layout.nbytes, torch.device("cpu"))
    ids = torch.tensor(list(reversed(pool.take(count + 2)))[1 : count + 1])
    for block in pool.blocks:
        block.zero_()  # bytes between sections are undefined; the reference happens to clear them
    triton.seal(case.layout, k, v, pool, ids)
    mine = pool.read(ids)
    others = pool.read(torch.tensor([i for i in range(count + 2) if i not in ids]))
    reference.seal(case.layout, k, v, pool, ids)
    assert torch.equal(mine, pool.read(ids))
    assert not others.any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_seal_at_the_edges_of_float16(bits: int) -> None:
    """Ties between codes, huge and tiny groups, constant groups, transposed inputs: the same bytes."""
    k_side = Side((Plane(bits, 24),), "tokens", 16)
    v_side = Side((Plane(bits, 24),), "channels", 12)
    layout = page_layout(16, (k_side,), (v_side,))
    rng = torch.Generator().manual_seed(5)
    ties = torch.randint(0, 2 ** (bits + 1), (1, 1, 24, 16), generator=rng) / 2
    huge = (torch.randn(1, 1, 24, 16, generator=rng) * 3e4).clamp(-6e4, 6e4)
    tiny = torch.randn(1, 1, 24, 16, generator=rng) * 1e-6
    constant = torch.full((1, 1, 24, 16), -7.3)
    k = torch.cat([ties, huge, tiny, constant]).transpose(2, 3)
    pool = PagePool(layout.nbytes, torch.device("cpu"))
    ids = torch.tensor(pool.take(4))
    pool.blocks[0].zero_()
    triton.seal(layout, k, k.flip(0), pool, ids)
    mine = pool.read(ids)
    reference.seal(layout, k, k.flip(0), pool, ids)
    assert torch.equal(mine, pool.read(ids))


def test_strided_queries_and_any_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits change only the order of sums; queries may be a view whose channels are not contiguous."""
    case = build(next(s for s in SPECS if s.name == "k2v2-group32"))
    expected = reference.attend(case.cached, case.q, case.q_pages, case.scale)
    q, q_pages = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (case.q, case.q_pages))
    for splits in ((1, 1), (3, 2), (5, 4)):
        monkeypatch.setattr(triton, "_splits", lambda *_, splits=splits: splits)
        out, lse = triton.attend(case.cached, q, q_pages, case.scale)
        torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=0)


def test_supports_says_why_not() -> None:
    side = Side((Plane(4, 64),), "tokens", 64)
    layout = page_layout(64, (side,), (side,))
    cpu = torch.device("cpu")
    assert triton.supports(layout, torch.bfloat16, cpu) is None
    assert "float64" in str(triton.supports(layout, torch.float64, cpu))
    wide = Side((Plane(4, 320),), "tokens", 64)
    assert "320" in str(triton.supports(page_layout(64, (wide,), (side,)), torch.float16, cpu))
