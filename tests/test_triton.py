"""The triton backend: interpreter parity, cross-compilation, and, where there is a GPU, the real thing."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import SPECS, Spec, build, tolerance

from kvcc.errors import KernelUnavailable
from kvcc.kernels import compile_targets, reference, report, triton, triton_kernels
from kvcc.kernels.head_classes import head_classes, padded
from kvcc.kernels.layout import Plane, Side, page_layout

INTERPRETED = Path(__file__).with_name("interpreted_triton.py")
QUICK = "kivi-2, head 64, 1 new, bf16"


def _interpret(selection: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", str(INTERPRETED), "-m", selection, "-p", "no:cacheprovider"]
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


@pytest.mark.parametrize("kernel", ["attend_pages", "attend_window", "merge_parts", "seal_plane"])
def test_arguments_equal_to_one_compile(kernel: str) -> None:
    """The just-in-time compiler makes integer arguments of 1 constants, which lack a tensor's methods."""
    good = next(c for c in compile_targets.configurations() if c.kernel == kernel)
    given = getattr(triton_kernels, kernel).arg_names
    integers = tuple(
        name
        for name in given
        if name not in good.constants
        and name not in (*compile_targets.POINTERS, *compile_targets.INPUTS, *compile_targets.FLOATS)
    )
    assert integers
    usage = compile_targets.measure(replace(good, ones=integers), compile_targets.TARGETS["sm_90"])
    assert usage.code > 100


def test_more_registers_than_there_are_is_seen_as_a_spill() -> None:
    """The spill figure is not always 0: a tile far too large for its warps."""
    good = next(c for c in compile_targets.configurations() if c.name == "head 128, 1 new, bf16")
    bad = replace(good, constants=good.constants | {"TILE": 64}, warps=1, stages=1)
    assert compile_targets.measure(bad, compile_targets.TARGETS["sm_80"]).spilled > 0
    assert "too large" in report.spills(
        {"attend_pages": {"too large": {"sm_80": compile_targets.Usage(255, 8, 0, 1)}}}
    )[0]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(2400)  # 279 compilations, when Triton's cache is empty
def test_no_shipped_configuration_spills() -> None:
    assert report.spills(report.collect()) == []


def test_bytes_per_token_by_hand() -> None:
    """kivi-2, head 64, groups of 32: codes 2 bits and 2 x 16 bits a group of 32 make 3 bits an element."""
    assert compile_targets.bytes_per_token("kivi-2", 64) == 2 * 64 * 3 / 8
    assert compile_targets.bytes_per_token("exact", 128) == 2 * 128 * 2
    assert compile_targets.operations_per_token("exact", 64, 1) == 2 * 128 + 6


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
