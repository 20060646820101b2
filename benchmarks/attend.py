"""Times one layer's decode attention over packed pages against torch's: `python benchmarks/attend.py`.

Contenders are timed in turn, round after round, so that a busy machine slows all alike; medians are compared.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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
    run: Callable[[], object]
    nbytes: int  # read from the cache by one call


def packed(shape: Shape, bits: int, group_size: int, backend: Backend, dtype: torch.dtype) -> Contender:
    """Attention by `backend` over a cache with `bits`-bit pages."""
    layout = layout_of(shape, bits, group_size)
    cached = fill(shape, layout, dtype)
    q = torch.randn(shape.batch, 1, shape.kv_heads * shape.group, shape.dim).to(dtype)
    nbytes = (
        cached.window_k.nbytes
        + cached.window_v.nbytes
        + int(cached.sealed.sum()) // shape.page * layout.nbytes
    )
    name = f"{backend.name}, {bits}-bit pages"
    return Contender(name, lambda: backend.attend(cached, q, q, shape.dim**-0.5), nbytes)


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


def exact(shape: Shape, dtype: torch.dtype) -> list[Contender]:
    """What an uncompressed cache costs in torch: the fused kernel, and two batched products."""
    heads = shape.kv_heads * shape.group
    q = torch.randn(shape.batch, heads, 1, shape.dim).to(dtype)
    k, v = torch.randn(2, shape.batch, shape.kv_heads, shape.length, shape.dim).to(dtype)
    k_all, v_all = (x.repeat_interleave(shape.group, 1) for x in (k, v))

    def matmul() -> Tensor:
        grouped = q.view(shape.batch, shape.kv_heads, shape.group, shape.dim)
        return torch.softmax(grouped @ k.transpose(-1, -2) * shape.dim**-0.5, -1) @ v

    nbytes, kind = k.nbytes + v.nbytes, str(dtype).removeprefix("torch.")
    return [
        Contender(
            f"SDPA {kind}, grouped", lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True), nbytes
        ),
        Contender(
            f"SDPA {kind}, heads expanded",
            lambda: scaled_dot_product_attention(q, k_all, v_all),
            nbytes * shape.group,
        ),
        Contender(f"matmul {kind}", matmul, nbytes),
    ]


def copy_rate() -> float:
    """Bytes per second that a large copy reads (it writes as many)."""
    source = torch.ones(2**27)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source)) for _ in range(5)]
    return source.nbytes / median(times[1:])


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(contenders: list[Contender], rounds: int) -> list[list[float]]:
    """Seconds of every contender in every round; the slow ones sit out most rounds."""
    times: list[list[float]] = [[] for _ in contenders]
    cost = [min(timed(c.run) for _ in range(2)) for c in contenders]
    for i in range(rounds):
        for mine, contender, seconds in zip(times, contenders, cost):
            if seconds < 0.05 or i < 3:
                contender.run()  # its own data into the caches that it would find warm
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
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = Shape(args.batch, args.length, args.kv_heads, args.group, args.dim, args.page)
    contenders = [
        packed(shape, bits, group_size, cpu, torch.float32)
        for bits, group_size in ((2, 32), (3, 32), (4, 64), (8, 64), (16, 64))
    ]
    contenders += [packed(shape, 4, 64, reference, torch.float32)]
    contenders += exact(shape, torch.float32) + exact(shape, torch.bfloat16)
    rate = copy_rate()
    times = measure(contenders, args.rounds)
    show(shape, contenders, times, rate)


def show(shape: Shape, contenders: list[Contender], times: list[list[float]], rate: float) -> None:
    medians = [median(t) for t in times]
    peers = {c.name: m for m, c in zip(medians, contenders)}
    sdpa, matmul = peers["SDPA float32, grouped"], peers["matmul bfloat16"]
    table = Table(
        title=f"{shape}; copy {rate / 1e9:.1f} GB/s, {torch.get_num_threads()} threads", title_justify="left"
    )
    for heading in (
        "contender",
        "median ms",
        "quartiles",
        "fastest",
        "of SDPA f32",
        "of matmul bf16",
        "MB read",
        "GB/s",
        "of copy",
    ):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for contender, middle, all_times in zip(contenders, medians, times):
        ordered = sorted(all_times)
        low, high = ordered[len(ordered) // 4] * 1e3, ordered[-1 - len(ordered) // 4] * 1e3
        speed = contender.nbytes / middle
        table.add_row(
            contender.name,
            f"{middle * 1e3:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{ordered[0] * 1e3:.3f}",
            f"{middle / sdpa:.2f}",
            f"{middle / matmul:.2f}",
            f"{contender.nbytes / 1e6:.1f}",
            f"{speed / 1e9:.1f}",
            f"{speed / rate:.2f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
