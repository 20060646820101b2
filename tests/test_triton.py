"""The triton backend: interpreter parity, cross-compilation, and, where there is a GPU, the real thing."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import SPECS, Spec, build, tolerance

from kvcc.errors import KernelUnavailable
from kvcc.kernels import compile_targets, reference, report, storages, triton
from kvcc.kernels.cross_compile import compile_launch, pretended
from kvcc.kernels.head_classes import head_classes, padded
from kvcc.kernels.layer_launches import layer_launches
from kvcc.kernels.layout import Plane, Side, page_layout

INTERPRETED = Path(__file__).with_name("interpreted_triton.py")
QUICK = "kivi-2, head 64, 1 new, bf16"


def _interpret(selection: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", str(INTERPRETED), "-n", "0", "-m", selection]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


def test_interpreter_agrees_with_the_reference() -> None:
    _interpret("not slow")


@pytest.mark.slow
def test_interpreter_agrees_on_every_case() -> None:
    _interpret("slow")


@pytest.mark.parametrize("target", compile_targets.TARGETS)
def test_compiles_without_spills(target: str) -> None:
    configuration = next(c for c in compile_targets.configurations() if c.name == QUICK)
    usage = compile_targets.measure(configuration, compile_targets.TARGETS[target])
    assert usage.spilled == 0
    assert 0 < usage.registers <= 255
    assert 0 < usage.shared <= 64 * 1024
    assert usage.code > 1000


def test_packed_bytes_are_read_in_wide_loads() -> None:
    """Page addresses come out of a table; the compiler must still see that they are aligned."""
    configuration = next(c for c in compile_targets.configurations() if c.name == QUICK)
    ptx = compile_targets.compile_configuration(configuration, compile_targets.TARGETS["sm_90"]).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx  # the 16-byte form
    assert "mma.sync" in ptx
    assert "ld.global.b8" not in ptx


def test_aligned_rows_are_read_and_written_in_wide_pieces() -> None:
    """Strides are no constants; the compiler must still see that they are multiples of 16 bytes, where they are."""
    for dim, wide in ((64, True), (20, False)):
        shape = replace(compile_targets.layer_shape("exact", 64), layout=None, k_dim=dim, v_dim=dim)
        window = _ptx(layer_launches(shape))["attend_window"]
        assert bool(re.search(r"cp\.async\.cg|ld\.global\.v4", window)) == wide
        assert ("ld.global.b16" in window) != wide
    for storage in ("kivi-4", "kivi-3"):
        found = _ptx(layer_launches(compile_targets.layer_shape(storage, 64)))
        assert "st.global.v4.b32" in found["attend_pages"]
        assert "ld.global.v4.b32" in found["seal_pages"]
        assert "ld.global.b16" not in found["seal_pages"]


def _ptx(launches: list[triton.Launch]) -> dict[str, str]:
    """What launches compile to for sm_90, by kernel."""
    with pretended(compile_targets.TARGETS["sm_90"]):
        return {kernel.name: kernel.asm["ptx"] for kernel in map(compile_launch, launches)}


def test_a_layer_seals_in_one_launch() -> None:
    launches = layer_launches(compile_targets.layer_shape("mixed-4-2", 64))
    assert [launch.kernel.__name__ for launch in launches] == [
        "attend_window", "attend_pages", "merge_parts", "seal_pages"
    ]  # fmt: skip
    (seal,) = (launch.constants for launch in launches if launch.kernel.__name__ == "seal_pages")
    tiles = (*seal["K_TILES"], *seal["V_TILES"])
    assert len(tiles) == 3
    assert [first for first, *_ in tiles] == [0, *(last for _, last, *_ in tiles[:-1])]


def test_more_registers_than_there_are_is_seen_as_a_spill() -> None:
    """The spill figure is not always 0: a tile far too large for its warps."""
    good = next(c for c in compile_targets.configurations() if c.name == "head 128, 1 new, bf16").launch
    bad = replace(good, constants=good.constants | {"TILE": 64, "num_warps": 1, "num_stages": 1})
    target = compile_targets.TARGETS["sm_80"]
    with pretended(target):
        assert compile_targets.usage(compile_launch(bad), target).spilled > 0
    assert "too large" in report.spills(
        {"attend_pages": {"too large": {"sm_80": compile_targets.Usage(255, 8, 0, 1)}}}
    )[0]  # fmt: skip


def test_the_document_is_of_these_kernels() -> None:
    """Sooner than by compiling them all, which the slow test below does."""
    document = Path(__file__).parents[1] / report.DOCUMENT
    assert report.measured_from() in document.read_text(encoding="utf-8"), (
        "run `python -m kvcc.kernels.report --write` and look at what changed"
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)  # 273 compilations, when Triton's cache is empty
def test_no_shipped_configuration_spills() -> None:
    table = report.collect()
    assert report.spills(table) == []
    assert report.stale(Path(__file__).parents[1] / report.DOCUMENT, report.document_text(table)) == []


def test_bytes_and_operations_by_hand() -> None:
    """kivi-2, head 64, groups of 32: codes 2 bits and 2 x 16 bits a group of 32 make 3 bits an element."""
    assert storages.bytes_per_token("kivi-2", 64) == 2 * 64 * 3 / 8
    assert storages.bytes_per_token("exact", 128) == 2 * 128 * 2
    assert storages.vector_operations("exact", 64, 1) == 128 + 6
    assert storages.vector_operations("kivi-4", 64, 4) == 4.5 * 128 + 24
    assert storages.matrix_operations("think-40-kivi-4", 64, 4) == 2 * 16 * (38 + 64)


def test_a_bound_is_the_largest_of_three() -> None:
    chip = report.Chip(memory=1e12, processors=10, threads=100, clock=1e9, matrix=1e14)
    assert report.bound(chip, 2e12, 1e12, 1e14) == (2.0, "bytes")
    assert report.bound(chip, 1e12, 3e12, 1e14) == (3.0, "vector")
    assert report.bound(chip, 1e12, 1e12, 4e14) == (4.0, "matrix")


def test_report_writes_between_the_markers(tmp_path: Path) -> None:
    document = tmp_path / "kernels.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(document, "new")
    assert document.read_text() == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    document.write_text("no markers")
    with pytest.raises(KernelUnavailable, match="markers"):
        report.write(document, "new")
    with pytest.raises(KernelUnavailable, match="source tree"):
        report.write(tmp_path / "absent.md", "new")


def test_other_figures_in_the_document_are_a_fault(tmp_path: Path) -> None:
    document = tmp_path / "kernels.md"
    assert report.stale(document, "new") == []
    document.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.write(document, "new")
    assert report.stale(document, "new") == []
    (line,) = report.stale(document, "newer")
    assert "--write" in line


def test_committed_document_holds_every_configuration() -> None:
    document = (Path(__file__).parents[1] / report.DOCUMENT).read_text(encoding="utf-8")
    missing = [c.name for c in compile_targets.configurations() if f"| {c.name} |" not in document]
    assert not missing, "run `python -m kvcc.kernels.report --write`"
    assert report.roofline_table() in document


def test_report_refuses_an_unknown_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--only", "no such kernel"]) == 2
    assert "no such kernel" in capsys.readouterr().err


def test_heads_stored_alike_share_a_class() -> None:
    v = Side((Plane(4, 64),), "channels", 32)
    sides = [Side((Plane(4, n),), "tokens", 64) for n in (40, 39, 40)]
    layout = page_layout(64, tuple(sides), (v, v, v))
    classes = head_classes(layout)
    assert [[head for head, _ in c.heads] for c in classes] == [[0, 2], [1]]
    for heads in classes:
        for head, base in heads.heads:
            assert base + heads.k[0].codes == layout.k[head][0].codes
            assert base + heads.v[0].zeros == layout.v[head][0].zeros
    assert classes[0].k[0].width == 64
    assert [padded(n) for n in (1, 16, 17, 80, 128)] == [16, 16, 32, 128, 128]


def test_the_cpu_is_refused_without_the_interpreter() -> None:
    side = Side((Plane(4, 64),), "tokens", 64)
    reason = triton.supports(page_layout(64, (side,), (side,)), torch.float16, torch.device("cpu"))
    assert reason == "the triton backend needs a CUDA or ROCm device, not cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", SPECS if torch.cuda.is_available() else SPECS[:1], ids=str)
def test_on_a_gpu(spec: Spec) -> None:
    case = build(spec, "cuda")
    arguments = (case.cached, case.q, case.q_pages, case.scale, case.softcap, case.page_bias)
    out, lse = triton.attend(*arguments)
    expected_out, expected_lse = reference.attend(*arguments)
    torch.testing.assert_close(out, expected_out, atol=tolerance(spec.dtype), rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance(spec.dtype), rtol=0)
    if case.layout is not None and case.cached.pool is not None and len(case.ids):
        expected = case.cached.pool.read(case.ids)
        for block in case.cached.pool.blocks:
            block.zero_()
        triton.seal(case.layout, case.k_pages, case.v_pages, case.cached.pool, case.ids)
        assert torch.equal(case.cached.pool.read(case.ids), expected)
