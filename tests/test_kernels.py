"""Every kernel backend against the reference, and that against the page format read bit by bit."""

import ctypes
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcc.errors import KernelUnavailable
from kvcc.kernels import build as compiled
from kvcc.kernels import cpu, reference
from kvcc.kernels.layout import PageLayout, Section, page_layout
from kvcc.kernels.levels import NORMAL, Levels, nearest, values_of
from kvcc.kernels.pool import PagePool
from tests.kernel_cases import SPECS, Case, Spec, build, side, tolerance, unit

BACKENDS = ["cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """A backend other than the reference, and skipped only where it cannot run at all."""
    if reason := cpu.available():
        pytest.skip(reason)
    return cpu


def attend(module: ModuleType, case: Case) -> tuple[Tensor, Tensor]:
    out, lse = module.attend(case.cached, case.q, case.q_pages, case.scale, case.softcap, case.page_bias)
    assert out.dtype == lse.dtype == torch.float32
    return out, lse


# ---- the reference against the format's description --------------------------------------------------------


def code_at(record: np.ndarray, start: int, bits: int, length: int, i: int) -> int:
    """Code i of a packed run of `length` codes that starts at byte `start`, by the format's description."""
    if bits in (3, 5, 6):
        low = 2 if bits == 3 else 4
        high = code_at(record, start + length * low // 8, bits - low, length, i)
        return code_at(record, start, low, length, i) | high << low
    strip_bytes = length * bits // 8
    return int(record[start + i % strip_bytes]) >> bits * (i // strip_bytes) & (1 << bits) - 1


def naive_section(layout: PageLayout, s: Section, record: np.ndarray) -> np.ndarray:
    """What a section of one page stands for: float64 [tokens, channels]."""
    out = np.zeros((layout.tokens, s.channels))
    by_channel = s.groups == "tokens"
    length = layout.tokens if by_channel else s.channels
    for token in range(layout.tokens):
        for channel in range(s.channels):
            run, i = (channel, token) if by_channel else (token, channel)
            at = run * length + i
            if s.bits >= 16:
                width, dtype = (2, layout.half) if s.bits == 16 else (4, torch.float32)
                raw = record[s.codes + width * at : s.codes + width * (at + 1)].tobytes()
                out[token, channel] = torch.frombuffer(bytearray(raw), dtype=dtype).item()
                continue
            if s.flat:
                code = code_at(record, s.codes, s.bits, layout.tokens * s.channels, at)
            else:
                code = code_at(record, s.codes + run * length * s.bits // 8, s.bits, length, i)
            if s.levels != "uniform":
                out[token, channel] = naive_level(s, code) * naive_scale(s, record, at)
                continue
            if s.steps == "unit":
                out[token, channel] = code + 0.5 - 2 ** (s.bits - 1)
                continue
            group = 2 * (at // s.group_size)
            scale, zero = (record[b + group : b + group + 2].view(np.float16)[0] for b in (s.scales, s.zeros))
            out[token, channel] = code * float(scale) + float(zero)
    return out


def naive_level(s: Section, code: int) -> float:
    """What a code of a sign and a magnitude stands for."""
    sign, size = (-1) ** (code >> (s.bits - 1)), code & ((1 << (s.bits - 1)) - 1)
    if s.levels == "normal":
        return sign * NORMAL[s.bits][size]
    mantissa, least = (3, -6) if s.levels == "e4m3" else (1, 0)
    exponent, fraction = size >> mantissa, (size & ((1 << mantissa) - 1)) / 2**mantissa
    return float(sign * (fraction if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - 1)) * 2.0**least)


def naive_scale(s: Section, record: np.ndarray, at: int) -> float:
    if s.steps == "unit":
        return 1.0
    if s.levels == "e2m1":
        return naive_level(replace(s, levels="e4m3", bits=8), int(record[s.scales + at // s.group_size]))
    place = s.scales + 2 * (at // s.group_size)
    return float(record[place : place + 2].view(np.float16)[0])


def naive_attend(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Token by token from the definition: the segment it lies in, its logit, a softmax over all. Float64."""
    spec, cached, layout = case.spec, case.cached, case.layout
    heads, batch = len(spec.k), len(spec.lengths)
    out = np.zeros((batch, spec.queries, heads * spec.group, spec.dim))
    lse = np.full(out.shape[:3], -np.inf)
    for b, length in enumerate(spec.lengths):
        sealed = int(cached.sealed[b])
        for h in range(heads):
            pages = naive_pages(case, b, h)
            for n in range(spec.queries):
                for j in range(h * spec.group, (h + 1) * spec.group):
                    logits, values = [], []
                    for t in range(length):
                        if spec.sinks <= t < spec.sinks + sealed:
                            if layout is None:
                                continue
                            k, v = pages[0][t - spec.sinks], pages[1][t - spec.sinks]
                            logit = case.scale * float(case.q_pages[b, n, j, : len(k)].double().numpy() @ k)
                            logit += 0.0 if case.page_bias is None else float(case.page_bias[b, n, j])
                        else:
                            slot = t if t < spec.sinks else spec.sinks + (t - spec.sinks) % spec.ring
                            k, v = (
                                w[b, h, slot].double().numpy() for w in (cached.window_k, cached.window_v)
                            )
                            logit = case.scale * float(case.q[b, n, j].double().numpy() @ k)
                        logits.append(
                            case.softcap * math.tanh(logit / case.softcap) if case.softcap else logit
                        )
                        values.append(v)
                    if logits:
                        weights = np.exp(np.array(logits) - max(logits))
                        out[b, n, j] = weights @ np.array(values) / weights.sum()
                        lse[b, n, j] = math.log(weights.sum()) + max(logits)
    return out, lse


def naive_pages(case: Case, b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    """All sealed tokens of one sequence and head: K [tokens, stored channels], V [tokens, dim]."""
    layout, cached = case.layout, case.cached
    if layout is None or cached.pool is None or not int(cached.sealed[b]):
        return np.zeros((0, 0)), np.zeros((0, 0))
    records = cached.pool.read(cached.table[b, : int(cached.sealed[b]) // case.spec.page]).numpy()
    sides = [
        np.concatenate([naive_side(part, r, h, which) for r in records for part in layout.parts])
        for which in "kv"
    ]
    missing = case.spec.dim - sides[1].shape[1]  # pruned V channels are zero
    return sides[0], np.pad(sides[1], ((0, 0), (0, missing)))


def naive_side(layout: PageLayout, record: np.ndarray, h: int, which: str) -> np.ndarray:
    """K or V of one head in one record: [tokens, stored channels]."""
    sections, place = {
        "k": (layout.k[h], layout.k_token_scales[h]),
        "v": (layout.v[h], layout.v_token_scales[h]),
    }[which]
    side = np.concatenate(
        [np.zeros((layout.tokens, 0)), *(naive_section(layout, s, record) for s in sections)], 1
    )
    if place is not None:
        codes = [code_at(record, place, 4, layout.tokens, t) for t in range(layout.tokens)]
        side *= 2.0 ** ((np.array(codes)[:, None] - 3) / 3)
    start, count = layout.k_means[h] if which == "k" else (0, 0)
    side = np.pad(side, ((0, 0), (0, max(0, count - side.shape[1]))))
    widths = [s.bits for s in sections for _ in range(s.channels)] + [0] * count
    for channel in range(count):
        side[:, channel] += int(record[start + channel].view(np.int8)) * 2.0 ** widths[channel] / 16
    return side


NAIVE = [
    "k2v4-float16", "raw16-bfloat16", "mixed-planes", "odd-mixed", "per-head", "v-by-channel", "k3v3-group8",
    "k8v8-group32", "k-by-token", "page-24", "bias-softcap-queries5", "sinks0-length96", "sinks16-length111",
    "fp8", "nvfp4", "nvfp4-by-channel", "normal3", "normal-unit", "clipped", "unit-mixed", "unit-per-head",
    "means", "means-beyond-planes", "means-some", "means-only", "means-per-head", "means-classes",
    "salient40-bias-queries5", "queries5", "sliding-sinks4", "sliding-sinks0",
]  # fmt: skip


@pytest.mark.parametrize("spec", [s for s in SPECS if s.name in NAIVE], ids=str)
def test_reference_is_what_the_format_says(spec: Spec) -> None:
    case = build(spec)
    out, lse = attend(reference, case)
    expected, expected_lse = naive_attend(case)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(lse.numpy(), expected_lse, atol=2e-5)


def test_naive_cases_exist() -> None:
    assert set(NAIVE) <= {s.name for s in SPECS}


@pytest.mark.parametrize(("levels", "bits"), [("normal", 1), ("normal", 3), ("e2m1", 4), ("e4m3", 8)])
def test_reference_levels_are_nearest(levels: Levels, bits: int) -> None:
    x = torch.cat([torch.linspace(-7, 7, 4001), torch.tensor([0.0, -0.0, 1e-9, -1e-9, 500.0, -1e6])])
    every = values_of(torch.arange(2**bits).to(torch.uint8), levels, bits)
    every = every[every.isfinite()]
    found = values_of(nearest(x, levels, bits), levels, bits)
    best = (every - x[:, None]).abs().amin(-1)
    torch.testing.assert_close((found - x).abs(), best, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_normal_levels_are_means_of_what_they_stand_for(bits: int) -> None:
    """The condition of Lloyd and Max, for a normal variable."""
    levels = NORMAL[bits]
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), 40.0]
    for level, low, high in zip(levels, edges, edges[1:]):
        below, above = (math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high))
        share = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
        assert (below - above) / share == pytest.approx(level, abs=2e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reference_codes_are_nearest(bits: int) -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(bits))
    codes, scale, zero = reference.quantize(x, bits, 32)
    error = (reference.dequantize(codes, scale, zero) - x).abs().unflatten(-1, (-1, 32))
    assert int(codes.max()) == 2**bits - 1
    # half a step, and what float16 rounding of the metadata moves the ends of the range by
    assert torch.all(error <= scale.float()[..., None] * 0.5 + 4e-3)


# ---- backends against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_attend(backend: ModuleType, spec: Spec) -> None:
    case = build(spec)
    out, lse = attend(backend, case)
    expected, expected_lse = attend(reference, case)
    torch.testing.assert_close(out, expected, atol=tolerance(spec.dtype), rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance(spec.dtype), rtol=0)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.paged], ids=str)
def test_seal(backend: ModuleType, spec: Spec) -> None:
    case = build(spec)
    assert case.layout is not None
    assert case.cached.pool is not None
    pool, ids = fresh_pool(case.layout, len(case.ids))
    backend.seal(case.layout, case.k_pages, case.v_pages, pool, ids)
    assert torch.equal(pool.read(ids), case.cached.pool.read(case.ids))


def fresh_pool(layout: PageLayout, pages: int) -> tuple[PagePool, Tensor]:
    """A pool full of ones with `pages` pages taken."""
    pool = PagePool(layout.nbytes, torch.device("cpu"))
    ids = torch.tensor(pool.take(pages), dtype=torch.int64)
    for block in pool.blocks:
        block.fill_(0xFF)
    return pool, ids


SEALED = page_layout(
    64,
    (side("tokens", 32, (2, 20), (3, 9), (4, 7), (8, 3), (16, 1)),) * 2,
    (side("channels", 8, (4, 24), (3, 8), (32, 8)),) * 2,
)
MEANS = page_layout(
    64,
    (  # channels with a mean, of those with a plane: fewer, all, more; a K that lies by tokens
        replace(unit("tokens", (4, 7), (2, 30)), page_means=13),
        replace(unit("tokens", (8, 3), (1, 28), scales=False), page_means=31),
        replace(unit("tokens", (3, 8)), page_means=40),
        replace(unit("channels", (2, 5), (4, 20), scales=False), page_means=17),
    ),
    (unit("channels", (2, 40)),) * 4,
)
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "zero": lambda x: x * 0 + 0.0,  # which of 0 and -0 is the smaller is nobody's promise
    "constant": lambda x: x * 0 + 3.14159,
    "huge": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-7,
    "halves": lambda x: (x * 4).round() / 2 + 0.0,  # many codes exactly between two
    "alike": lambda x: ((x[:, :, :1] * 32).round() / 32).expand(x.shape),  # means between two codes
    "outlier": lambda x: torch.where(x > 2.5, x * 3000, x),
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2].repeat_interleave(2, -1),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]],
}


@pytest.mark.parametrize("layout", [SEALED, MEANS], ids=["steps", "means"])
@pytest.mark.parametrize("kind", INPUTS)
def test_seal_inputs(backend: ModuleType, kind: str, layout: PageLayout) -> None:
    rng = torch.Generator().manual_seed(7)
    k, v = (INPUTS[kind](torch.randn(3, layout.kv_heads, 64, 40, generator=rng)) for _ in range(2))
    expected, ids = fresh_pool(layout, 3)
    reference.seal(layout, k, v, expected, ids)
    pool, ids = fresh_pool(layout, 3)
    backend.seal(layout, k, v, pool, ids)
    assert torch.equal(pool.read(ids), expected.read(ids))


@pytest.mark.parametrize(
    ("value", "code"), [(1.0, 16), (3 / 32, 2), (5 / 32, 2), (-7 / 32, -4), (9.0, 127), (-9.0, -127)]
)
def test_codes_of_page_means(backend: ModuleType, value: float, code: int) -> None:
    """Sixteenths behind the planes, halves to even, and no further than 127 to either side."""
    layout = page_layout(8, (replace(unit("tokens"), page_means=19),), (unit("channels", (1, 8)),))
    for module in (reference, backend):
        pool, ids = fresh_pool(layout, 1)
        module.seal(layout, torch.full((1, 1, 8, 19), value), torch.zeros(1, 1, 8, 8), pool, ids)
        place, count = layout.k_means[0]
        record = pool.read(ids)[0, place : place + 32].view(torch.int8)
        assert record.tolist() == [code] * count + [0] * (32 - count)


def test_seal_leaves_other_pages_alone(backend: ModuleType) -> None:
    pool, ids = fresh_pool(SEALED, 4)
    x = torch.randn(2, 2, 64, 40)
    backend.seal(SEALED, x, x, pool, ids[[2, 0]])
    assert (pool.read(ids[[1, 3]]) == 0xFF).all()


def test_strides_do_not_matter(backend: ModuleType) -> None:
    case = build(next(s for s in SPECS if s.name == "bias-softcap-bfloat16"))
    expected = attend(backend, case)
    cached = case.cached
    wide = torch.cat([cached.window_k, cached.window_k], -1)[..., : cached.window_k.shape[-1]]
    tall = cached.window_v.transpose(1, 2).contiguous().transpose(1, 2)
    spread = type(cached)(**{**vars(cached), "window_k": wide, "window_v": tall})
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    q_pages = case.q_pages.repeat_interleave(2, -1)[..., ::2]
    got = backend.attend(spread, q, q_pages, case.scale, case.softcap, case.page_bias)
    for mine, its in zip(got, expected):
        assert torch.equal(mine, its)


def test_large_logits(backend: ModuleType) -> None:
    """Logits far apart from page to page: no overflow, and the largest wins."""
    case = build(next(s for s in SPECS if s.name == "long"))
    for scale in (20.0, -20.0):
        got = backend.attend(case.cached, case.q, case.q_pages, scale)
        expected = reference.attend(case.cached, case.q, case.q_pages, scale)
        for mine, its in zip(got, expected):
            torch.testing.assert_close(mine, its, atol=1e-3, rtol=1e-5)


# ---- the cpu backend's own --------------------------------------------------------------------------------


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCC_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_cache")
def test_two_builds_at_once_of_wider_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give one whole library and leave nothing else behind; its 16-lane vectors compute the same."""
    if compiled.compiler() is None:
        pytest.skip("no C compiler")
    with ThreadPoolExecutor(2) as pool:
        paths = [job.result() for job in [pool.submit(compiled.build, ("-DVL=16", "-O0")) for _ in range(2)]]
    assert list(tmp_path.iterdir()) == [paths[0]] == [paths[1]]
    library = ctypes.CDLL(str(paths[0]))
    monkeypatch.setattr(compiled, "load", lambda: library)
    for spec in SPECS[::5]:
        case = build(spec)
        for mine, its in zip(attend(cpu, case), attend(reference, case)):
            torch.testing.assert_close(mine, its, atol=tolerance(spec.dtype), rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(backend: ModuleType, threads: int) -> None:
    before = torch.get_num_threads()
    case = build(next(s for s in SPECS if s.name == "ragged-sinks16"))
    expected = attend(reference, case)
    try:
        torch.set_num_threads(threads)
        for mine, its in zip(attend(backend, case), expected):
            torch.testing.assert_close(mine, its, atol=1e-5, rtol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("fresh_cache")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from kvcc import kernels

    compiled.load.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels, "_warned", set())
    device = torch.device("cpu")
    try:
        assert compiled.compiler() is None
        reason = kernels.usable()["cpu"]
        assert reason is not None
        assert "no C compiler" in reason
        assert kernels.usable()["reference"] is None
        assert cpu.supports(SEALED, torch.float32, device) == reason
        with pytest.raises(KernelUnavailable, match="no C compiler"):
            kernels.backend("cpu", device)
        assert kernels.backend("auto", device).name == "reference"
        assert kernels.backend("auto", device).name == "reference"
        assert len([r for r in caplog.records if "no C compiler" in r.message]) == 1
    finally:
        compiled.load.cache_clear()


@pytest.mark.usefixtures("fresh_cache")
def test_broken_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'x.c:1: error: no luck' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(KernelUnavailable, match="no luck"):
        compiled.build()


@pytest.mark.usefixtures("fresh_cache")
def test_a_compiler_may_have_a_launcher_and_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launcher, asked = tmp_path / "launcher", tmp_path / "asked"
    launcher.write_text(f'#!/bin/sh\necho "$*" > {asked}\n[ "$3" = --version ] && exit 0\ntouch "$0.so"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CC", f"'{launcher}' gcc -m64")
    assert compiled.compiler() == (str(launcher), "gcc", "-m64")
    with pytest.raises(KernelUnavailable, match="cannot keep compiled kernels"):  # it made none
        compiled.build()
    assert asked.read_text().startswith("gcc -m64 -std=")


@pytest.mark.usefixtures("fresh_cache")
def test_unreadable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled.compiler() is None:
        pytest.skip("no C compiler")

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(KernelUnavailable, match="KVCC_CACHE_DIR"):
        compiled.build()


@pytest.mark.usefixtures("fresh_cache")
def test_unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if compiled.compiler() is None:
        pytest.skip("no C compiler")
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVCC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(KernelUnavailable, match="KVCC_CACHE_DIR"):
        compiled.build()


def test_backend_names() -> None:
    from kvcc import kernels

    with pytest.raises(KernelUnavailable, match="unknown kernel backend 'cuda'"):
        kernels.backend("cuda", torch.device("cpu"))
    with pytest.raises(KernelUnavailable, match="cuda devices only"):
        kernels.backend("triton", torch.device("cpu"))
    assert set(kernels.usable()) == set(kernels.BACKENDS)
    assert kernels.backend("reference", torch.device("cpu")).name == "reference"


def test_supports_says_why_not() -> None:
    for dtype, device, word in ((torch.float64, "cpu", "float64"), (torch.float32, "meta", "meta")):
        reason = cpu.supports(SEALED, dtype, torch.device(device))
        assert reason is not None
        assert word in reason
