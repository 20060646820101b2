"""The triton backend under Triton's interpreter, on CPU tensors.

Not collected by itself: the interpreter must be chosen before triton is imported, which would spoil the other
tests of a process. `test_triton` runs this file in a process of its own.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("run this file with TRITON_INTERPRET=1")

from kernel_cases import SPECS, Spec, build, tolerance

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
    "per-head",
    "v-by-channel",
    "k-by-token",
    "page-8",
    "page-24",
    "dim80-2bit",
    "dim128-group8",
    "sinks16-length0",
    "sinks0-length1",
    "bias-softcap-queries5",
    "sliding-sinks4",
}
CASES = [pytest.param(s, id=str(s), marks=[] if s.name in QUICK else [pytest.mark.slow]) for s in SPECS]
SEALED = [case for case, s in zip(CASES, SPECS, strict=True) if s.paged and any(map(s.sealed, s.lengths))]


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
