"""benchmarks/gpu.py, but for what only a GPU can do; `interpreted_triton.py` runs its kernels."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import gpu
from kvcc.errors import KernelUnavailable
from kvcc.kernels.storages import STORAGE, storage_layout

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@NO_GPU
def test_without_a_gpu_it_is_one_line_and_exit_2() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: this benchmark needs a CUDA or ROCm GPU, and torch finds none here\n"


@NO_GPU
def test_nothing_is_written_without_a_gpu(tmp_path: Path) -> None:
    assert gpu.main(["--json", str(tmp_path / "x.json")]) == 2
    assert not list(tmp_path.iterdir())


def test_arguments() -> None:
    usual = gpu.parser().parse_args([])
    shapes = gpu.shapes_of(usual)
    assert len(shapes) == len(set(shapes)) == 2 * 3 * 3
    assert {s.dim for s in shapes} == {64, 128}
    assert usual.storages == ["kivi-4", "kivi-2", "think-40-kivi-4"]
    assert set(usual.storages) <= set(STORAGE)
    chosen = gpu.parser().parse_args(["--dims", "128", "--batches", "4", "--lengths", "500", "--group", "7"])
    assert gpu.shapes_of(chosen) == [gpu.Shape(4, 500, 8, 7, 128)]
    with pytest.raises(KernelUnavailable, match="from 1 on"):
        gpu.shapes_of(gpu.parser().parse_args(["--batches", "0"]))
    with pytest.raises(SystemExit):
        gpu.parser().parse_args(["--storages", "kivi-5"])


def test_a_row_by_hand() -> None:
    """1 MB at 1 GB/s cannot take less than 1 ms; it took 4, SDPA 8."""
    shape = gpu.Shape(batch=2, length=100, kv_heads=1, group=2, dim=64)
    times = gpu.Times("kvcc kivi-4", 10**6, [4e-3, 2e-3, 9e-3], 5e-3)
    found = gpu.row(shape, times, bandwidth=1e9, sdpa=8e-3)
    assert (found.seconds, found.bound, found.of_bound, found.of_sdpa) == (4e-3, 1e-3, 0.25, 0.5)
    assert found.low <= found.seconds <= found.high
    sealing = gpu.row(shape, gpu.Times("kvcc kivi-4, seal a page", 1, [1.0], 1.0), 1e9, 8e-3)
    assert sealing.of_sdpa is None
    assert (sealing.low, sealing.high) == (1.0, 1.0)


def test_bandwidth_counts_reading_and_writing() -> None:
    def half_a_second(run: object, rounds: int) -> list[float]:
        assert callable(run)
        run()
        return [0.5] * rounds

    clock = gpu.Clock(torch.device("cpu"), half_a_second, half_a_second)
    assert gpu.copy_bandwidth(clock, 3) == 2 * (1 << 20) / 0.5


def test_bytes_of_a_contender() -> None:
    assert gpu.Shape(2, 100, 3, 4, 64).exact_bytes == 2 * 2 * 100 * 3 * 64 * 2
    layout = gpu.layout_of(gpu.Shape(1, 1000, 8, 4, 128), "kivi-4")
    assert layout.kv_heads == 8
    assert layout.nbytes == 4 * storage_layout("kivi-4", 128).nbytes


def test_the_table_says_what_was_measured() -> None:
    shape = gpu.Shape(2, 4096, 1, 2, 64)
    rows = [
        gpu.row(shape, gpu.Times("SDPA", 4 * 10**6, [2e-6] * 3, 9e-6), 4e12, 2e-6),
        gpu.row(shape, gpu.Times("kvcc kivi-2", 10**6, [1e-6] * 3, 8e-6), 4e12, 2e-6),
    ]
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(gpu.table(rows, "a device; copy 4,000 GB/s"))
    shown = console.export_text()
    assert "a device; copy 4,000 GB/s" in shown
    line = next(x for x in shown.splitlines() if "kvcc kivi-2" in x)
    cells = [cell.strip() for cell in line.strip("│┃ ").split("│")]
    assert cells == [
        "64",
        "2",
        "4,096",
        "kvcc kivi-2",
        "1.0",
        "1.0–1.0",
        "8.0",
        "1.0",
        "1,000",
        "0.25",
        "0.50",
    ]
