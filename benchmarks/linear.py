"""Times linear layers over stored weights against torch's: `python benchmarks/linear.py`.

A sweep multiplies a few rows by every weight of a model, layer after layer, as one decode step does: no cache holds
them all. Contenders are timed in turn, round after round, so that a busy machine slows all alike.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from kvcc.kernels import step
from kvcc.kernels.linear import Packed, WeightType, pack, placed, scratch_bytes

LAYERS, VOCABULARY = 30, 49152  # SmolLM2-135M
LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # q, k and v; o; gate and up; down: rows, columns
HEAD = (VOCABULARY, 576)
TYPES: tuple[WeightType, ...] = get_args(WeightType)
KINDS = [*TYPES, "moved", "torch"]


@dataclass(frozen=True)
class Contender:
    """One way to store the weights; `ready(n)` gives what runs all layers, and what runs the head, on n rows."""

    name: str
    nbytes: int
    head_nbytes: int
    ready: Callable[[int], tuple[Callable[[], object], Callable[[], object]]]


def shapes() -> list[tuple[int, int]]:
    return [*(LAYER * LAYERS), HEAD]


def contenders(kinds: list[str]) -> list[Contender]:
    plain = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes()]
    found = [compiled(f"kvcc {kind}", [pack(w, kind) for w in plain]) for kind in TYPES if kind in kinds]
    if "moved" in kinds:
        found.append(compiled("kvcc float32, large pages", [pack(w, "float32", move=True) for w in plain]))
    if "torch" in kinds:
        found += [in_torch(plain, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return found


def compiled(name: str, weights: list[Packed]) -> Contender:
    """As a decode step runs them: one call for all layers."""

    def ready(n: int) -> tuple[Callable[[], object], Callable[[], object]]:
        xs = {cols: torch.randn(n, cols) for _, cols in shapes()}
        out = {rows: torch.empty(n, rows) for rows, _ in shapes()}
        threads = torch.get_num_threads()
        scratch = torch.empty(max(scratch_bytes(w, n, threads) for w in weights), dtype=torch.uint8)
        made = (step.linear(xs[w.cols], w.struct, None, out[w.rows], scratch) for w in weights)
        records = [record for record in made if record is not None]
        layers, head = (step.Record * (len(records) - 1))(*records[:-1]), (step.Record * 1)(records[-1])

        def run_layers(alive: object = (xs, out, scratch)) -> None:  # alive: what the records point at
            step.run(layers, len(layers), threads)

        return run_layers, lambda: step.run(head, 1, threads)

    return Contender(name, sum(w.nbytes for w in weights), weights[-1].nbytes, ready)


def in_torch(plain: list[Tensor], dtype: torch.dtype) -> Contender:
    weights = [w.to(dtype) for w in plain]

    def ready(n: int) -> tuple[Callable[[], object], Callable[[], object]]:
        xs = {cols: torch.randn(n, cols).to(dtype) for _, cols in shapes()}
        x = xs[HEAD[1]]
        return lambda: [F.linear(xs[w.shape[1]], w) for w in weights[:-1]], lambda: F.linear(x, weights[-1])

    name = f"torch {str(dtype).removeprefix('torch.')}"
    return Contender(name, sum(w.nbytes for w in weights), weights[-1].nbytes, ready)


def measure(rivals: list[Contender], n: int, rounds: int) -> list[tuple[float, float]]:
    """Median seconds of each: (layers and head, head)."""
    times: list[list[tuple[float, float]]] = [[] for _ in rivals]
    runs = [contender.ready(n) for contender in rivals]
    for i in range(rounds + 1):
        for mine, (layers, head) in zip(times, runs, strict=True):
            if i < 3 or mine[0][0] < 0.1:
                first, second = timed(layers), timed(head)
                mine.append((first + second, second))
    return [(median(t[0] for t in mine[1:]), median(t[1] for t in mine[1:])) for mine in times]


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_rate() -> float:
    """Bytes per second at which a sum reads large pages."""
    source = placed(torch.ones(2**27))
    return source.nbytes / median([timed(source.sum) for _ in range(9)][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="Rows of x.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rivals = contenders(args.kinds)
    rate = read_rate()
    with torch.inference_mode():
        results = {n: measure(rivals, n, args.rounds) for n in args.rows}
    show(rivals, results, rate)


def show(rivals: list[Contender], results: dict[int, list[tuple[float, float]]], rate: float) -> None:
    table = Table(
        title=f"SmolLM2-135M's linear layers; read {rate / 1e9:.1f} GB/s, {torch.get_num_threads()} threads",
        title_justify="left",
    )
    headings = ("n", "weights", "MB", "sweep ms", "GB/s", "of read", "GFLOP/s", "head ms", "head GB/s")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    multiplies = sum(rows * cols for rows, cols in shapes())
    for n, rows in results.items():
        for contender, (seconds, head) in zip(rivals, rows, strict=True):
            table.add_row(
                *(str(n), contender.name, f"{contender.nbytes / 1e6:.0f}", f"{seconds * 1e3:.2f}"),
                *(f"{contender.nbytes / seconds / 1e9:.1f}", f"{contender.nbytes / seconds / rate:.2f}"),
                *(f"{2 * n * multiplies / seconds / 1e9:.0f}", f"{head * 1e3:.2f}"),
                f"{contender.head_nbytes / head / 1e9:.1f}",
            )
        table.add_section()
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
