"""Speed and memory of a compiled model on its own cache: decode, prefill, batches that fit, attention kernels.

Caches are real: random K and V go through the model's own backend into real pages, so that a cache of 16 x 8,192
tokens takes seconds to make, and a step over it costs what it costs after a real prompt. Timings say as much about the
machine as about the model; compare only what one machine gave, idle.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from kvcc.calibration_data import load_prompts
from kvcc.errors import CapacityError, DataError
from kvcc.progress import OnProgress
from kvcc.runtime import CompiledModel
from kvcc.runtime.attention import cached_attention, store
from kvcc.runtime.cache import Cache

WARM_STEPS = 3  # before the timed ones
PREFILL_REPEATS = 3
PREFILL_SECONDS = 10.0  # after which no repeat begins
ATTEND_ROUNDS = 15
RATE_BYTES = 2**29  # of a buffer that is read or copied: beyond any processor's cache

T = TypeVar("T")


@dataclass(frozen=True)
class Decode:
    """Timed decode steps; each gives every sequence of the batch one token. Bytes are of all sequences together."""

    context: int  # tokens cached per sequence before the steps, as asked for
    batch: int
    milliseconds: list[float]  # of each step: forward and the greedy choice
    cache_bytes: int  # allocated at the end
    tokens: int  # cached at the end, in total
    fp16_bytes: int  # of an ordinary cache of as many tokens
    peak_rss: int  # bytes in memory, weights included; see `peak_rss`

    @property
    def length(self) -> float:
        """Tokens that a sequence attended to, the mean over the timed steps."""
        return self.tokens / self.batch - (len(self.milliseconds) - 1) / 2

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the median, quartiles and mean of the steps (one that seals pages shows in the mean)."""
        return asdict(self) | spread(self.milliseconds) | {"length": self.length}


@dataclass(frozen=True)
class AttendRate:
    """One layer's attention for one new token per sequence; means over the layers."""

    context: int
    batch: int
    milliseconds: list[float]  # of one layer's call, an entry a round over all layers
    nbytes: float  # of the cache that a call reads: pages, and the window's tokens

    @property
    def gigabytes_per_second(self) -> float:
        """10^9 bytes of the cache read per second, in the median round."""
        return self.nbytes / median(self.milliseconds) / 1e6

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the median, quartiles and mean of the rounds."""
        return asdict(self) | spread(self.milliseconds) | {"gigabytes_per_second": self.gigabytes_per_second}


@dataclass(frozen=True)
class Slope:
    """Milliseconds of a step as a line over the tokens cached per sequence."""

    per_thousand: float  # extra milliseconds for 1,000 more tokens in every sequence: the cache's own cost
    at_zero: float  # what a step over an empty cache would take: the weights' cost


def filled_cache(
    model: CompiledModel, tokens: int, batch: int = 1, *, room: int = 0, budget: int | None = None
) -> Cache:
    """A cache of `batch` sequences of `tokens` tokens of random K and V, with pages for `room` more allocated.

    Raises CapacityError when memory, or `budget` bytes, do not suffice.
    """
    cache = model.new_cache(batch, budget)
    cache.reserve([tokens + room] * batch)
    cache.begin([tokens] * batch)
    noise: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def random(heads: int, dim: int, row: int, dtype: torch.dtype) -> Tensor:
        """[heads, tokens, dim], for each sequence other tokens of the same noise."""
        key = heads, dim, dtype
        if key not in noise:
            generator = torch.Generator().manual_seed(len(noise))
            made = torch.randn(heads, tokens + batch, dim, generator=generator)
            noise[key] = made.to(model.device, dtype)
        return noise[key][:, row : row + tokens]

    for index, layer in enumerate(cache.layers):
        plan, dtype = layer.plan, getattr(torch, model.plan.dtype)
        for row in range(batch):
            q = random(plan.q_heads, plan.k_dim, row, dtype)
            k = random(plan.kv_heads, plan.k_dim, row, dtype)
            store(cache, index, row, q, k, random(plan.kv_heads, plan.v_dim, row, dtype).neg())
    cache.commit()
    return cache


def filled_cache_bytes(model: CompiledModel, tokens: int) -> int:
    """Bytes that the real cache allocates for one sequence of `tokens` tokens."""
    return filled_cache(model, tokens).nbytes


def decode_times(model: CompiledModel, context: int, batch: int, steps: int) -> Decode:
    """Time `steps` greedy decode steps on `batch` sequences of `context` cached tokens, sealing pages as they fill.

    Where context and steps go beyond what the model takes, the steps end at its context length instead. Raises
    CapacityError when the cache does not fit memory or the context is longer than the model's.
    """
    limit = model.identity.context_length
    _check_context(model, context)
    filled = min(context, limit - WARM_STEPS - steps)
    if filled < 1:
        raise CapacityError(
            f"{steps} steps do not fit the model's context of {limit}; use at most {limit - WARM_STEPS - 1}"
        )
    cache = filled_cache(model, filled, batch, room=WARM_STEPS + steps)
    tokens, milliseconds = _text(model, batch), []
    peak_rss(restart=True)
    for _ in range(WARM_STEPS + steps):
        start = time.perf_counter()
        logits = model.forward([[token] for token in tokens], cache)
        tokens = logits[:, : model.identity.vocab_size].argmax(-1).tolist()  # waits for a GPU, too
        milliseconds.append(1e3 * (time.perf_counter() - start))
    plain = sum(map(model.plan.uncompressed_bytes, cache.lengths))
    timed = milliseconds[WARM_STEPS:]
    return Decode(context, batch, timed, cache.nbytes, sum(cache.lengths), plain, peak_rss())


def prefill_rate(model: CompiledModel, tokens: int) -> float:
    """Tokens per second of a prompt of `tokens` tokens of prose in one piece, sealing included.

    The median of PREFILL_REPEATS prompts, or of as many as begin within PREFILL_SECONDS. Raises CapacityError as
    `decode_times` does.
    """
    _check_context(model, tokens)
    ids = _text(model, tokens)

    def prefill(count: int) -> float:
        cache = model.new_cache()
        start = time.perf_counter()
        model.forward([ids[:count]], cache).argmax(-1).tolist()
        return time.perf_counter() - start

    prefill(min(tokens, 64))  # what is made on first use
    seconds = [prefill(tokens)]
    while len(seconds) < PREFILL_REPEATS and sum(seconds) < PREFILL_SECONDS:
        seconds.append(prefill(tokens))
    return tokens / median(seconds)


def largest_batch(model: CompiledModel, context: int, nbytes: int) -> int:
    """How many sequences of `context` tokens a cache of `nbytes` bytes holds, 0 when not one.

    Counted from what the allocator takes for one and for two sequences, then tried: the answer itself under that
    budget, or the largest batch that fits half of the free memory. Raises CapacityError when the trial fails.
    """
    _check_context(model, context)
    one, two = (_allocated(model, context, batch) for batch in (1, 2))
    each, shared = two - one, 2 * one - two
    most = max(0, (nbytes - shared) // each)
    trial = min(most, max(1, (_free_memory(model.device) // 2 - shared) // each))
    budget = nbytes if trial == most else shared + trial * each
    if trial and _allocated(model, context, trial, budget) > budget:
        raise CapacityError(f"{trial} sequences of {context} tokens take more than {budget} bytes of cache")
    return int(most)


def attend_rate(model: CompiledModel, context: int, batch: int) -> AttendRate:
    """Time the attention kernel alone over the model's own layers, each `batch` sequences of `context` tokens.

    Layers take turns, as in a decode step, so that a call does not find its pages in the processor's cache from the
    call before. Raises CapacityError as `decode_times` does.
    """
    _check_context(model, context)
    cache = filled_cache(model, context, batch)
    calls = [_attend_call(model, cache, index) for index in range(len(cache.layers))]
    times = []
    for _ in range(1 + ATTEND_ROUNDS):
        start = time.perf_counter()
        for call in calls:
            call()
        _wait(model.device)
        times.append(1e3 * (time.perf_counter() - start) / len(calls))
    return AttendRate(context, batch, times[1:], _bytes_read(cache) / len(cache.layers))


def memory_rates(device: str | torch.device = "cpu", nbytes: int | None = None) -> tuple[float, float]:
    """10^9 bytes per second that all threads read, and that they move (read plus written) in a copy.

    Medians over buffers of `nbytes` (RATE_BYTES) bytes. The faster of two reductions counts as reading.
    """
    target = torch.device(device)
    source = torch.ones((nbytes or RATE_BYTES) // 4, device=target)
    copy = torch.empty_like(source)

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            run()
            _wait(target)
            times.append(time.perf_counter() - start)
        return median(times[1:])

    read = min(seconds(source.sum), seconds(source.amax))
    return source.nbytes / read / 1e9, 2 * source.nbytes / seconds(lambda: copy.copy_(source)) / 1e9


def slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """The least-squares line through (tokens per sequence, milliseconds); None when all have one length."""
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (fmean(values) for values in zip(*points))
    per_token = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )
    return Slope(1000 * per_token, mean_y - per_token * mean_x)


def peak_rss(restart: bool = False) -> int:
    """Most bytes this process had in memory so far, or on Linux since the last call with `restart`."""
    try:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
    except (OSError, IndexError):
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak


def spread(milliseconds: Sequence[float]) -> dict[str, float]:
    """median_ms, lower_ms and upper_ms (quartiles) and mean_ms of one or more times."""
    lower, middle, upper = (
        quantiles(milliseconds, method="inclusive") if len(milliseconds) > 1 else 3 * list(milliseconds)
    )
    return {"median_ms": middle, "lower_ms": lower, "upper_ms": upper, "mean_ms": fmean(milliseconds)}


@dataclass(frozen=True)
class Prefill:
    """One sequence's prompt of `context` tokens."""

    context: int
    tokens_per_second: float
    peak_rss: int  # bytes in memory, weights included


@dataclass(frozen=True)
class LargestBatch:
    """Sequences of `context` tokens within `budget` bytes of cache: compiled, and in an ordinary fp16 cache."""

    context: int
    budget: int
    batch: int
    fp16_batch: int


@dataclass(frozen=True)
class Bench:
    """What `bench` measured; `slopes` by batch size, rates of memory in 10^9 bytes per second."""

    bytes_per_token: float  # by the plan, of sealed tokens
    fp16_bytes_per_token: int
    decode: list[Decode]
    slopes: dict[int, Slope]
    prefill: list[Prefill]
    largest_batch: list[LargestBatch]
    attend: list[AttendRate]
    read_rate: float
    copy_rate: float
    skipped: list[str]  # what was asked for and not measured, and why

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; slopes are a list of rows with their batch."""
        return asdict(self) | {
            "decode": [row.as_dict() for row in self.decode],
            "slopes": [{"batch": batch, **asdict(line)} for batch, line in self.slopes.items()],
            "attend": [row.as_dict() for row in self.attend],
        }


def bench(
    model: CompiledModel,
    contexts: Sequence[int] = (1024, 4096, 8192),
    batches: Sequence[int] = (1, 4, 16),
    *,
    steps: int = 64,
    budget: int = 2**32,
    on_progress: OnProgress | None = None,
) -> Bench:
    """Everything above for one model; `budget` is what `largest_batch` fills. on_progress: what, done, total.

    What does not fit the model's context or memory is left out and named in `skipped`. Attention alone is measured at
    the middle one of the contexts. Raises DataError when nothing is left to measure.
    """
    limit = model.identity.context_length
    lengths, batches = sorted({n for n in contexts if n <= limit}), sorted(set(batches))
    if not lengths or not batches:
        raise DataError(f"nothing to measure: {model.identity.name} takes contexts of at most {limit} tokens")
    skipped = [f"{n:,} tokens: the model's context is {limit:,}" for n in sorted(set(contexts)) if n > limit]
    done, total = 0, len(lengths) * (2 + len(batches)) + len(batches) + 1

    def announce(what: str) -> None:
        nonlocal done
        if on_progress is not None:
            on_progress(what, done, total)
        done += 1

    def each(what: str, measure: Callable[[int, int], T], pairs: Sequence[tuple[int, int]]) -> list[T]:
        rows = []
        for batch, context in pairs:
            name = what.format(batch=batch, context=f"{context:,}")
            announce(name)
            try:
                rows.append(measure(batch, context))
            except CapacityError as error:
                skipped.append(f"{name}: {error}")
        return rows

    alone = [(1, n) for n in lengths]
    together = [(batch, n) for batch in batches for n in lengths]
    middle = [(batch, lengths[len(lengths) // 2]) for batch in batches]
    prefill = each("prefill of {context} tokens", lambda _, n: _prefill(model, n), alone)
    decode = each(
        "decode, batch {batch} at {context} tokens", lambda b, n: decode_times(model, n, b, steps), together
    )
    attend = each(
        "attention, batch {batch} at {context} tokens", lambda b, n: attend_rate(model, n, b), middle
    )
    largest = each("largest batch at {context} tokens", lambda _, n: _largest_batch(model, n, budget), alone)
    announce("memory")
    read, copy = memory_rates(model.device)
    lines = {
        batch: slope([(row.length, median(row.milliseconds)) for row in decode if row.batch == batch])
        for batch in batches
    }
    return Bench(
        model.plan.bytes_per_token(),
        model.plan.uncompressed_bytes_per_token(),
        decode,
        {batch: line for batch, line in lines.items() if line is not None},
        prefill,
        largest,
        attend,
        read,
        copy,
        skipped,
    )


def _prefill(model: CompiledModel, context: int) -> Prefill:
    peak_rss(restart=True)
    return Prefill(context, prefill_rate(model, context), peak_rss())


def _largest_batch(model: CompiledModel, context: int, budget: int) -> LargestBatch:
    plain = budget // model.plan.uncompressed_bytes(context)
    return LargestBatch(context, budget, largest_batch(model, context, budget), plain)


def _attend_call(model: CompiledModel, cache: Cache, index: int) -> Callable[[], object]:
    """The backend's call for one layer and random queries, all its arguments made."""
    layer, batch = cache.layers[index], cache.batch
    plan, dtype = layer.plan, getattr(torch, model.plan.dtype)
    (node,) = (
        n for n in model.graph.graph.nodes if n.target is cached_attention and n.kwargs["layer"] == index
    )
    lengths = torch.tensor(cache.lengths, dtype=torch.int32, device=model.device)
    sealed = torch.tensor([plan.sealed(n) for n in cache.lengths], dtype=torch.int32, device=model.device)
    view = layer.view(slice(None), lengths, sealed)
    q = torch.randn(batch, 1, plan.q_heads, plan.k_dim).to(model.device, dtype)
    q_pages, bias = q, None
    basis = layer.basis
    if layer.layout is not None and (layer.channels is not None or basis is not None):
        q_pages = q[..., : layer.layout.k_channels].contiguous()
        if layer.pruned_mean is not None or (basis is not None and basis.mean is not None):
            bias = q.new_zeros(batch, 1, plan.q_heads, dtype=torch.float32)
    scale, softcap = node.kwargs["scale"], node.kwargs["softcap"]
    return lambda: cache.backend.attend(view, q, q_pages, scale, softcap, bias)


def _bytes_read(cache: Cache) -> int:
    """Bytes of all layers' pages and of the tokens in their windows."""
    total = 0
    for layer in cache.layers:
        plan, element = layer.plan, layer.window_k.element_size()
        for length in cache.lengths:
            sealed = plan.sealed(length)
            total += (length - sealed) * plan.exact_elements * element
            if layer.layout is not None:
                total += sealed // plan.page * layer.layout.nbytes
    return total


def _allocated(model: CompiledModel, context: int, batch: int, budget: int | None = None) -> int:
    """Bytes that the allocator takes for `batch` sequences of `context` tokens."""
    cache = model.new_cache(batch, budget)
    cache.reserve([context] * batch)
    return cache.nbytes


def _text(model: CompiledModel, count: int) -> list[int]:
    """`count` token ids of prose; random ones for a model without a tokenizer."""
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.identity.vocab_size, (count,), generator=generator).tolist()
    prompt = load_prompts("prose", samples=1, length=count, seed=2)[0].text or ""
    ids = model.tokenizer.encode(prompt)
    return (ids * -(-count // len(ids)))[:count]


def _check_context(model: CompiledModel, context: int) -> None:
    limit = model.identity.context_length
    if not 1 <= context <= limit:
        raise CapacityError(f"a context of {context} tokens; {model.identity.name} takes 1 to {limit}")


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
