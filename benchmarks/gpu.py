"""One layer's decode attention on a GPU: kvcc's Triton kernels against torch's SDPA and FlexAttention at float16.

    python benchmarks/gpu.py --json gpu.json

Every contender reads a cache of the same tokens for one new query a sequence. Times are medians of CUDA-graph replays,
between which the L2 cache is overwritten; "called" is the wall time of an ordinary call, launches included. The bound
is the bytes that a contender must read over the bandwidth that a large copy reaches on this device in the same run.
Before anything is timed, each storage is compared with the reference backend. Exits with 2 without a GPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcc.errors import KernelUnavailable, KvccError
from kvcc.kernels.layout import PageLayout
from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Cached
from kvcc.kernels.storages import STORAGE, storage_layout

STORAGES = ("kivi-4", "kivi-2", "think-40-kivi-4")
SINKS, RECENT = 16, 32
LARGEST_ERROR = 4e-3  # of float16 queries against the reference in float32; values here are of size 1
COPIED = 1 << 30  # bytes
FLUSHED = 256 << 20  # bytes: more than any L2 cache

Timer = Callable[[Callable[[], object], int], list[float]]  # what to run, rounds -> seconds of each


@dataclass(frozen=True)
class Shape:
    """One layer: `length` cached tokens in each of `batch` sequences; one new query each."""

    batch: int
    length: int
    kv_heads: int
    group: int
    dim: int

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def exact_bytes(self) -> int:
        """Bytes of K and V in float16."""
        return 4 * self.batch * self.length * self.kv_heads * self.dim


@dataclass(frozen=True)
class Contender:
    """Something to time, and the bytes that one run has to read and write."""

    name: str
    run: Callable[[], object]
    nbytes: int


@dataclass(frozen=True)
class Clock:
    """How to time on a device: replayed, without the cost of launching; and called as it is."""

    device: torch.device
    replayed: Timer
    called: Timer
    compile: Callable[[Any], Any] = torch.compile  # of FlexAttention


@dataclass(frozen=True)
class Row:
    """One contender at one shape. Seconds; `of_bound` is the bound over the median, 1 being the best possible."""

    contender: str
    dim: int
    batch: int
    length: int
    seconds: float
    low: float  # quartiles
    high: float
    called: float
    nbytes: int
    bound: float
    of_bound: float
    of_sdpa: float | None  # its time over SDPA's


# ---- what is timed


def packed(shape: Shape, storage: str, device: torch.device) -> Contender:
    """Attention over a cache of `storage`, by the triton backend."""
    from kvcc.kernels import triton

    cached, arguments = case(shape, storage, device)
    pages = int(cached.sealed.sum()) // (cached.layout.tokens if cached.layout else 1)
    page_bytes = cached.layout.nbytes if cached.layout else 0
    exact = (shape.length - int(cached.sealed[0])) * 4 * shape.batch * shape.kv_heads * shape.dim
    return Contender(f"kvcc {storage}", lambda: triton.attend(cached, *arguments), pages * page_bytes + exact)


def case(shape: Shape, storage: str, device: torch.device) -> tuple[Cached, tuple[Any, ...]]:
    """A cache full of normal values, sealed by the triton backend, and the other arguments of `attend`."""
    layout = layout_of(shape, storage)
    cached = fill(shape, layout, device)
    q = _normal(device, shape.batch, 1, shape.q_heads, shape.dim)
    narrow = layout.k_channels < shape.dim
    q_pages = _normal(device, shape.batch, 1, shape.q_heads, layout.k_channels) if narrow else q
    bias = _normal(device, shape.batch, 1, shape.q_heads).float() if narrow else None
    return cached, (q, q_pages, shape.dim**-0.5, 0.0, bias)


def layout_of(shape: Shape, storage: str) -> PageLayout:
    """The page of a storage."""
    return storage_layout(storage, shape.dim, torch.float16, shape.kv_heads)


def fill(shape: Shape, layout: PageLayout, device: torch.device) -> Cached:
    """Sinks, recent window and as many pages as `shape.length` tokens seal, in shuffled order."""
    from kvcc.kernels import triton

    pool = PagePool(layout.nbytes, device)
    count = max(0, shape.length - SINKS - RECENT) // layout.tokens
    pool.reserve(shape.batch * count)
    free = torch.tensor(pool.take(shape.batch * count), dtype=torch.int64, device=device)
    table = free[torch.randperm(len(free), device=device)].reshape(shape.batch, count)
    for ids in table:
        k = _normal(device, count, shape.kv_heads, layout.tokens, layout.k_channels)
        v = _normal(device, count, shape.kv_heads, layout.tokens, layout.v_channels)
        triton.seal(layout, k, v, pool, ids)
    slots = SINKS + RECENT + layout.tokens
    window = [_normal(device, shape.batch, shape.kv_heads, slots, shape.dim) for _ in range(2)]
    lengths = torch.full((shape.batch,), shape.length, dtype=torch.int32, device=device)
    sealed = torch.full_like(lengths, count * layout.tokens)
    return Cached(layout, window[0], window[1], SINKS, lengths, sealed, pool, table)


def sealing(shape: Shape, storage: str, device: torch.device) -> Contender:
    """Sealing one page of every sequence."""
    from kvcc.kernels import triton

    layout = layout_of(shape, storage)
    pool = PagePool(layout.nbytes, device)
    ids = torch.tensor(pool.take(shape.batch), dtype=torch.int64, device=device)
    k = _normal(device, shape.batch, shape.kv_heads, layout.tokens, layout.k_channels)
    v = _normal(device, shape.batch, shape.kv_heads, layout.tokens, layout.v_channels)
    nbytes = k.nbytes + v.nbytes + shape.batch * layout.nbytes
    return Contender(f"kvcc {storage}, seal a page", lambda: triton.seal(layout, k, v, pool, ids), nbytes)


def exact(shape: Shape, clock: Clock) -> Iterator[Contender]:
    """torch's attention over an uncompressed float16 cache."""
    from torch.nn.attention.flex_attention import flex_attention

    q = _normal(clock.device, shape.batch, shape.q_heads, 1, shape.dim)
    k, v = (_normal(clock.device, shape.batch, shape.kv_heads, shape.length, shape.dim) for _ in range(2))
    nbytes = k.nbytes + v.nbytes
    yield Contender("SDPA", lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True), nbytes)
    torch._dynamo.reset()  # shapes of other runs would make it compile for any shape
    flex = clock.compile(flex_attention)
    yield Contender("FlexAttention", lambda: flex(q, k, v, enable_gqa=True), nbytes)


def _normal(device: torch.device, *sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float16, device=device)


# ---- measuring


@dataclass(frozen=True)
class Times:
    """Of one contender, in seconds."""

    contender: str
    nbytes: int
    replayed: list[float]
    called: float


def measure(
    shapes: Sequence[Shape], storages: Sequence[str], clock: Clock, rounds: int, bandwidth: float
) -> list[Row]:
    """Every contender at every shape; what does not fit into memory is left out, and said so."""
    rows: list[Row] = []
    for shape in shapes:
        try:
            times = [_time(contender, clock, rounds) for contender in exact(shape, clock)]
            times += [_time(packed(shape, s, clock.device), clock, rounds) for s in storages]
            times += [_time(sealing(shape, s, clock.device), clock, rounds) for s in storages]
        except torch.OutOfMemoryError:
            print(f"{shape}: does not fit into the device's memory; left out", file=sys.stderr)
            continue
        sdpa = median(times[0].replayed)
        rows += [row(shape, found, bandwidth, sdpa) for found in times]
    return rows


def _time(contender: Contender, clock: Clock, rounds: int) -> Times:
    replayed = clock.replayed(contender.run, rounds)
    return Times(contender.name, contender.nbytes, replayed, median(clock.called(contender.run, rounds)))


def row(shape: Shape, times: Times, bandwidth: float, sdpa: float) -> Row:
    """A row from what was measured; `bandwidth` in bytes a second, `sdpa` in seconds."""
    middle, bound = median(times.replayed), times.nbytes / bandwidth
    low, _, high = quantiles(times.replayed, n=4) if len(times.replayed) > 1 else (middle,) * 3
    sealed = "seal" in times.contender
    return Row(
        times.contender, shape.dim, shape.batch, shape.length, middle, low, high, times.called, times.nbytes,
        bound, bound / middle, None if sealed else middle / sdpa,
    )  # fmt: skip


def copy_bandwidth(clock: Clock, rounds: int) -> float:
    """Bytes a second that a large copy reads and writes."""
    nbytes = COPIED if clock.device.type == "cuda" else 1 << 20
    source = torch.zeros(nbytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / median(clock.replayed(lambda: target.copy_(source), rounds))


def check_storages(shape: Shape, storages: Sequence[str], device: torch.device) -> dict[str, float]:
    """Largest difference from the reference backend by storage. Raises KernelUnavailable when one is too large."""
    from kvcc.kernels import reference, triton

    errors = {}
    for storage in storages:
        cached, arguments = case(shape, storage, device)
        mine, expected = (backend.attend(cached, *arguments)[0] for backend in (triton, reference))
        errors[storage] = float((mine - expected).abs().max())
        if not errors[storage] <= LARGEST_ERROR:
            raise KernelUnavailable(
                f"{storage}, head {shape.dim}: differs by {errors[storage]:.1e} from the reference; nothing was timed"
            )
    return errors


def gpu_clock() -> Clock:
    """Times on the current GPU. Raises KernelUnavailable where there is none, or no triton."""
    if not torch.cuda.is_available():
        raise KernelUnavailable("this benchmark needs a CUDA or ROCm GPU, and torch finds none here")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise KernelUnavailable("triton is not installed; pip install 'kvcc[triton]'") from error
    return Clock(torch.device("cuda", torch.cuda.current_device()), _replayed, _called)


def _replayed(run: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each replay of `run` captured as a CUDA graph, with a cold L2 cache."""
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and allocates what capturing may not
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    seconds = []
    for _ in range(rounds):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return seconds


def _called(run: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of wall time of each call, from an idle device to an idle device."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


# ---- the command


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--storages", nargs="+", default=list(STORAGES), choices=list(STORAGE))
    for name, default in (
        ("dims", (64, 128)),
        ("batches", (1, 8, 32)),
        ("lengths", (1024, 4096, 16384)),
    ):
        made.add_argument(f"--{name}", nargs="+", type=int, default=list(default))
    made.add_argument("--kv-heads", type=int, default=8)
    made.add_argument("--group", type=int, default=4, help="query heads that share a KV head")
    made.add_argument("--rounds", type=int, default=51)
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    return made


def shapes_of(arguments: argparse.Namespace) -> list[Shape]:
    """The shapes that the arguments ask for."""
    sizes = (*arguments.dims, *arguments.batches, *arguments.lengths, arguments.kv_heads, arguments.group)
    if min(*sizes, arguments.rounds) < 1:
        raise KernelUnavailable("dims, batches, lengths, kv-heads, group and rounds are numbers from 1 on")
    return [
        Shape(batch, length, arguments.kv_heads, arguments.group, dim)
        for dim in arguments.dims
        for batch in arguments.batches
        for length in arguments.lengths
    ]


def report(arguments: argparse.Namespace, clock: Clock, machine: dict[str, str]) -> dict[str, Any]:
    """Check, measure, print the table; returns everything, as plain JSON."""
    torch.manual_seed(0)
    shapes = shapes_of(arguments)
    errors: dict[str, float] = {}
    for dim in arguments.dims:
        small = Shape(2, 150, arguments.kv_heads, arguments.group, dim)
        found = check_storages(small, arguments.storages, clock.device)
        errors |= {f"{storage}, head {dim}": error for storage, error in found.items()}
    bandwidth = copy_bandwidth(clock, arguments.rounds)
    rows = measure(shapes, arguments.storages, clock, arguments.rounds, bandwidth)
    Console(width=150).print(table(rows, f"{machine['device']}; copy {bandwidth / 1e9:,.0f} GB/s"))
    return {
        "machine": machine,
        "copy_bytes_per_second": bandwidth,
        "largest_errors": errors,
        "kv_heads": arguments.kv_heads,
        "group": arguments.group,
        "rows": [asdict(r) for r in rows],
    }


def table(rows: Sequence[Row], title: str) -> Table:
    """For people; times in microseconds."""
    made = Table(title=title, title_justify="left")
    for heading in (
        "head", "batch", "tokens", "contender", "median µs", "quartiles", "called µs", "MB", "GB/s",
        "of bound", "of SDPA",
    ):  # fmt: skip
        made.add_column(heading, justify="left" if heading == "contender" else "right")
    for r in rows:
        made.add_row(
            str(r.dim),
            str(r.batch),
            f"{r.length:,}",
            r.contender,
            f"{r.seconds * 1e6:,.1f}",
            f"{r.low * 1e6:,.1f}–{r.high * 1e6:,.1f}",
            f"{r.called * 1e6:,.1f}",
            f"{r.nbytes / 1e6:,.1f}",
            f"{r.nbytes / r.seconds / 1e9:,.0f}",
            f"{r.of_bound:.2f}",
            "" if r.of_sdpa is None else f"{r.of_sdpa:.2f}",
        )
    return made


def machine_facts() -> dict[str, str]:
    """What the figures were measured on."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "runtime": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}",
    }


def main(given: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 when it cannot run here."""
    arguments = parser().parse_args(given)
    try:
        clock = gpu_clock()
        found = report(arguments, clock, machine_facts())
    except KvccError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
