"""Times one layer's decode attention over packed pages against torch's: `python benchmarks/attend.py`.

Contenders are timed in turn, round after round, so that a busy machine slows all alike; medians are compared. The
bound of a contender is the longer of two times: its bytes at the rate at which memory is read, and its multiply-adds
at the rate of a large float32 product. With `--layers 12` calls go round as many layers, whose caches then come from
memory, as in a decode step; one layer's may stay in the processor's cache.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcc.bench import memory_rates
from kvcc.kernels import cpu, reference
from kvcc.kernels.layout import PageLayout, Plane, Side, page_layout
from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Backend, Cached

SINKS = 16
RECENT = 32


@dataclass(frozen=True)
class Shape:
    """One layer: `length` cached tokens in each of `batch` sequences; one new query each."""

    batch: int
    length: int
    kv_heads: int
    group: int
    dim: int
    page: int


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], object]  # one layer's attention
    nbytes: int  # read from the cache by one call
    multiply_adds: int


@dataclass(frozen=True)
class Rates:
    read: float  # bytes per second
    copy: float  # bytes per second, read and written
    multiply_adds: float  # per second, float32


def packed(
    shape: Shape, bits: int, group_size: int, backend: Backend, dtype: torch.dtype, layers: int = 1
) -> Contender:
    """Attention by `backend` over caches with `bits`-bit pages, one layer a call."""
    layout = layout_of(shape, bits, group_size)
    caches = [fill(shape, layout, dtype) for _ in range(layers)]
    q = torch.randn(shape.batch, 1, shape.kv_heads * shape.group, shape.dim).to(dtype)
    nbytes = (
        caches[0].window_k.nbytes
        + caches[0].window_v.nbytes
        + int(caches[0].sealed.sum()) // shape.page * layout.nbytes
    )
    turn = cycle(caches)
    return Contender(
        f"{backend.name}, {bits}-bit pages",
        lambda: backend.attend(next(turn), q, q, shape.dim**-0.5),
        nbytes,
        multiply_adds(shape),
    )


def multiply_adds(shape: Shape) -> int:
    """Of one layer's attention: every query head with every token's K and V."""
    return 2 * shape.batch * shape.length * shape.kv_heads * shape.group * shape.dim


def layout_of(shape: Shape, bits: int, group_size: int) -> PageLayout:
    k, v = (Side((Plane(bits, shape.dim),), groups, group_size) for groups in ("tokens", "channels"))
    return page_layout(shape.page, (k,) * shape.kv_heads, (v,) * shape.kv_heads)


def fill(shape: Shape, layout: PageLayout, dtype: torch.dtype) -> Cached:
    pool = PagePool(layout.nbytes, torch.device("cpu"))
    pages = (shape.length - SINKS - RECENT) // shape.page
    pool.reserve(shape.batch * pages)
    rows = []
    for _ in range(shape.batch):
        ids = torch.tensor(pool.take(pages))
        x = torch.randn(2, pages, shape.kv_heads, shape.page, shape.dim)
        cpu.seal(layout, x[0], x[1], pool, ids)
        rows.append(ids)
    window = torch.randn(2, shape.batch, shape.kv_heads, SINKS + RECENT + shape.page, shape.dim).to(dtype)
    lengths = torch.full((shape.batch,), shape.length, dtype=torch.int32)
    sealed = torch.full((shape.batch,), pages * shape.page, dtype=torch.int32)
    return Cached(layout, window[0], window[1], SINKS, lengths, sealed, pool, torch.stack(rows))


def exact(shape: Shape, dtype: torch.dtype, layers: int = 1) -> list[Contender]:
    """What an uncompressed cache costs in torch: the fused kernel, and two batched products."""
    heads = shape.kv_heads * shape.group
    q = torch.randn(shape.batch, heads, 1, shape.dim).to(dtype)
    grouped = q.view(shape.batch, shape.kv_heads, shape.group, shape.dim)
    stored = torch.randn(layers, 2, shape.batch, shape.kv_heads, shape.length, shape.dim).to(dtype)
    fused, products = cycle(stored), cycle(stored)

    def sdpa() -> Tensor:
        k, v = next(fused)
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def matmul() -> Tensor:
        k, v = next(products)
        return torch.softmax(grouped @ k.transpose(-1, -2) * shape.dim**-0.5, -1) @ v

    nbytes, kind = stored[0].nbytes, str(dtype).removeprefix("torch.")
    work = multiply_adds(shape)
    return [
        Contender(f"SDPA {kind}", sdpa, nbytes, work),
        Contender(f"matmul {kind}", matmul, nbytes, work),
    ]


def machine_rates() -> Rates:
    """What this machine's memory and multiply-adds reach, with the threads in use."""
    read, copy = memory_rates()
    a, b = torch.randn(2, 1536, 1536)
    seconds = median(timed(lambda: a @ b) for _ in range(9))
    return Rates(read * 1e9, copy * 1e9, 1536**3 / seconds)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(contenders: list[Contender], rounds: int, warm: bool) -> list[list[float]]:
    """Seconds of every contender in every round; the slow ones sit out most rounds.

    warm: each runs once untimed before, and finds its data where that left them.
    """
    times: list[list[float]] = [[] for _ in contenders]
    cost = [min(timed(c.run) for _ in range(2)) for c in contenders]
    for i in range(rounds):
        for mine, contender, seconds in zip(times, contenders, cost):
            if seconds < 0.05 or i < 3:
                if warm:
                    contender.run()
                mine.append(timed(contender.run))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("batch", 8),
        ("length", 4096),
        ("kv-heads", 3),
        ("group", 3),
        ("dim", 64),
        ("page", 64),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, default=1, help="that calls go round")
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = Shape(args.batch, args.length, args.kv_heads, args.group, args.dim, args.page)
    contenders = [
        packed(shape, bits, group_size, cpu, torch.float32, args.layers)
        for bits, group_size in ((2, 32), (3, 32), (4, 64), (8, 64), (16, 64))
    ]
    contenders += [packed(shape, 4, 64, reference, torch.float32)]
    contenders += exact(shape, torch.float32, args.layers) + exact(shape, torch.bfloat16, args.layers)
    rates = machine_rates()
    times = measure(contenders, args.rounds, warm=args.layers == 1)
    show(f"{shape}, {args.layers} layers", contenders, times, rates)


def show(title: str, contenders: list[Contender], times: list[list[float]], rates: Rates) -> None:
    medians = [median(t) for t in times]
    peers = {c.name: m for m, c in zip(medians, contenders)}
    sdpa, matmul = peers["SDPA float32"], peers["matmul bfloat16"]
    table = Table(
        title=f"{title}; read {rates.read / 1e9:.1f} GB/s, copy {rates.copy / 1e9:.1f} GB/s, "
        f"{rates.multiply_adds / 1e9:.0f} G multiply-adds/s, {torch.get_num_threads()} threads",
        title_justify="left",
    )
    for heading in (
        "contender",
        "median ms",
        "quartiles",
        "of SDPA f32",
        "of matmul bf16",
        "MB read",
        "GB/s",
        "bound ms",
        "of bound",
    ):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for contender, middle, all_times in zip(contenders, medians, times):
        ordered = sorted(all_times)
        low, high = ordered[len(ordered) // 4] * 1e3, ordered[-1 - len(ordered) // 4] * 1e3
        bound = max(contender.nbytes / rates.read, contender.multiply_adds / rates.multiply_adds)
        table.add_row(
            contender.name,
            f"{middle * 1e3:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{middle / sdpa:.2f}",
            f"{middle / matmul:.2f}",
            f"{contender.nbytes / 1e6:.1f}",
            f"{contender.nbytes / middle / 1e9:.1f}",
            f"{bound * 1e3:.3f}",
            f"{bound / middle:.2f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
