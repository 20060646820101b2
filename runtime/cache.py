"""The compressed cache of a batch: per layer an exact window (sinks and a ring of recent tokens) and sealed pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from kvcc.errors import CapacityError
from kvcc.kernels.layout import PageLayout
from kvcc.kernels.pool import PagePool
from kvcc.kernels.protocol import Backend, Cached
from kvcc.runtime.plan import LayerPlan, Plan

ENTRY = torch.int64.itemsize  # bytes of a page id, and of a page's address


@dataclass(frozen=True)
class LayerMemory:
    """Bytes allocated for one layer."""

    window: int
    pages: int  # allocated, whether or not a sealed page lies in them
    pages_used: int
    tables: int = 0  # where pages lie, and which K channels each sequence chose for itself

    @property
    def nbytes(self) -> int:
        return self.window + self.pages + self.tables


@dataclass(frozen=True)
class DecodeStep:
    """One new token for every sequence, under one policy (sinks, recent, page, window)."""

    rows: Tensor  # [B] int64: 0, 1, …
    slots: Tensor  # [B] int64: the new token's window slot
    lengths: Tensor  # [B] int32: tokens cached, the new one included
    sealed: Tensor  # [B] int32: of these, in pages while attending (or forgotten by a sliding window)
    full: list[int]  # sequences whose recent window overflows into a page after this token


@dataclass(frozen=True)
class KeyBasis:
    """Coordinates in which pages store K, the same for every sequence; made once for a model.

    Products stay what they were: keys @ queries.T is a projection onto what is stored.
    """

    keys: Tensor  # [Hkv, Dk, C] float32: pages store (k - mean) @ keys
    queries: Tensor  # [Hkv, Dk, C] float32: and meet q @ queries
    mean: Tensor | None  # [Hkv, Dk] float32


@dataclass(frozen=True)
class KeptChannels:
    """Which K channels pages store, the same for every sequence; made once for a model."""

    channels: Tensor  # [1, Hkv, C] int64, in plane order
    query_channels: Tensor  # [1, 1, Hq, C] int64: the same, per query head
    pruned_mean: Tensor | None  # [Hq, Dk], 0 where a channel is stored


def kept_channels(plan: Plan, tables: Mapping[str, Tensor]) -> list[KeptChannels | KeyBasis | None]:
    """By layer, from the artifact's tables; None where pages store all channels or sequences choose."""
    return [
        _kept(index, layer, layout, tables)
        for index, (layer, layout) in enumerate(zip(plan.layers, plan.layouts()))
    ]


def _kept(
    index: int, plan: LayerPlan, layout: PageLayout | None, tables: Mapping[str, Tensor]
) -> KeptChannels | KeyBasis | None:
    if layout is None or plan.select not in ("static", "basis"):
        return None
    mean = tables[f"layers.{index}.k_mean"] if plan.mean_correction else None
    if plan.select == "basis":
        return KeyBasis(tables[f"layers.{index}.k_basis"], tables[f"layers.{index}.q_basis"], mean)
    group = plan.q_heads // plan.kv_heads
    channels = tables[f"layers.{index}.k_channels"][None, :, : layout.k_channels]
    return KeptChannels(
        channels,
        channels.repeat_interleave(group, dim=1)[:, None],
        None if mean is None else mean.repeat_interleave(group, dim=0),
    )


class LayerCache:
    """One layer's storage for every sequence of the batch."""

    def __init__(
        self, plan: LayerPlan, layout: PageLayout | None, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.plan = plan
        self.layout = layout
        shape = (batch, plan.kv_heads, plan.slots)
        self.window_k = torch.zeros(*shape, plan.k_dim, dtype=dtype, device=device)
        self.window_v = torch.zeros(*shape, plan.v_dim, dtype=dtype, device=device)
        self.pool = PagePool(layout.nbytes, device) if layout else None
        self.table = torch.zeros(batch, 0, dtype=torch.int64, device=device)  # page ids
        self.pages: list[list[int]] = [[] for _ in range(batch)]
        # What pages store of K, in plane order (None: all, in order): [1 or B, Hkv, C] int64; the same per query
        # head, as queries are gathered: [1 or B, 1, Hq, C]; the mean of what they leave out: [Hq, Dk] or None.
        self.channels: Tensor | None = None
        self.query_channels: Tensor | None = None
        self.pruned_mean: Tensor | None = None
        self.basis: KeyBasis | None = None
        if layout is not None and plan.select == "request":
            self.channels = self.table.new_zeros(batch, plan.kv_heads, layout.k_channels)
            self.query_channels = self.table.new_zeros(batch, 1, plan.q_heads, layout.k_channels)

    def use(self, kept: KeptChannels | KeyBasis) -> None:
        """Store the same K channels of every sequence, or K in one basis."""
        if isinstance(kept, KeyBasis):
            self.basis = kept
            return
        self.channels, self.query_channels = kept.channels, kept.query_channels
        self.pruned_mean = kept.pruned_mean

    def choose(self, row: int, channels: Tensor) -> None:
        """Store K channels `channels` ([Hkv, C]) of sequence `row`."""
        assert self.channels is not None
        assert self.query_channels is not None
        self.channels[row] = channels
        self.query_channels[row, 0] = channels.repeat_interleave(
            self.plan.q_heads // self.plan.kv_heads, dim=0
        )

    def growth(self, tokens: Sequence[int]) -> tuple[int, int]:
        """More pages for sequences that grow to tokens[row] tokens, and the most of one: as in its policy."""
        pages = [self.plan.sealed(n) // self.plan.page for n in tokens]
        new = sum(max(0, wanted - len(held)) for wanted, held in zip(pages, self.pages))
        return new, max(pages, default=0)

    def lacks(self, new: int, longest: int) -> int:
        """Bytes to allocate for `new` more pages of all sequences, at most `longest` pages of one."""
        assert self.pool is not None
        batch, columns = self.table.shape
        missing, wider = max(0, new - self.pool.spare), max(0, longest - columns)
        return missing * (self.pool.page_bytes + ENTRY) + batch * wider * ENTRY

    def reserve(self, new: int, longest: int, exactly: bool) -> None:
        """Allocate what `lacks` counts; unless `exactly`, a sixty-fourth more of what has to grow, so that it grows
        rarely. Raises CapacityError when memory is short.
        """
        assert self.pool is not None
        missing = new - self.pool.spare
        if missing > 0:
            self.pool.reserve(self.pool.spare + (missing if exactly else max(missing, self.pool.growth)))
        columns = self.table.shape[1]
        if longest > columns:
            self.widen(longest if exactly else max(longest, columns + columns // 64))

    def widen(self, columns: int) -> None:
        """Room in the table for `columns` pages a sequence."""
        batch, held = self.table.shape
        if columns > held:
            grown = self.table.new_zeros(batch, columns)
            grown[:, :held] = self.table
            self.table = grown

    def keep(self, rows: Sequence[int]) -> None:
        """See `Cache.keep`."""
        if self.pool is not None:
            for row, ids in enumerate(self.pages):
                times = rows.count(row)
                for _ in range(times - 1):
                    self.pool.share(ids)
                if not times:
                    self.pool.give_back(ids)
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.table.device)
        self.pages = [list(self.pages[row]) for row in rows]
        self.table = self.table[index]
        self.window_k, self.window_v = self.window_k[index], self.window_v[index]
        if self.plan.select == "request" and self.channels is not None and self.query_channels is not None:
            self.channels, self.query_channels = self.channels[index], self.query_channels[index]

    def add_pages(self, row: int, count: int) -> Tensor:
        """Take `count` new pages for sequence `row`: their ids, [count] int64."""
        assert self.pool is not None
        ids = self.pool.take(count)
        first, last = len(self.pages[row]), len(self.pages[row]) + count
        self.widen(last)
        new = torch.tensor(ids, dtype=torch.int64, device=self.table.device)
        self.table[row, first:last] = new
        self.pages[row].extend(ids)
        return new

    def view(self, rows: slice, lengths: Tensor, sealed: Tensor) -> Cached:
        """Sequences `rows` as a backend reads them; lengths and sealed: int32, one entry a sequence."""
        return Cached(
            self.layout,
            self.window_k[rows],
            self.window_v[rows],
            self.plan.sinks,
            lengths,
            sealed,
            self.pool,
            self.table[rows],
        )

    def memory(self) -> LayerMemory:
        """Bytes allocated now. Channels that all sequences share belong to the model, like its weights."""
        window, tables = self.window_k.nbytes + self.window_v.nbytes, self.table.nbytes
        if self.plan.select == "request" and self.channels is not None and self.query_channels is not None:
            tables += self.channels.nbytes + self.query_channels.nbytes
        if self.pool is None:
            return LayerMemory(window, 0, 0, tables)
        used = self.pool.used * self.pool.page_bytes
        return LayerMemory(window, self.pool.nbytes, used, tables + self.pool.addresses.nbytes)


class Cache:
    """The cache of a batch of sequences, grown by `CompiledModel.forward`.

    `lengths[row]` is the number of tokens cached for a sequence. A step is `begin(counts)`, one `cached_attention`
    per layer, `commit()`; what does not fit is refused by `begin`, before anything has changed.
    """

    def __init__(
        self,
        plan: Plan,
        kept: Sequence[KeptChannels | KeyBasis | None],  # by layer
        backend: Backend,
        batch: int,
        device: torch.device,
        budget: int | None = None,
        exact_in: torch.dtype | None = None,
    ) -> None:
        self.plan = plan
        self.backend = backend
        self.device = device
        self.budget = budget  # bytes for the whole batch, None for what memory allows
        self.exact_in = exact_in  # type in which new tokens attend to each other; None: the model's
        self.lengths = [0] * batch
        self.counts: list[int] = []
        _check_fits(batch * plan.cache_bytes(0), device, budget, f"an empty cache of batch {batch}")
        self.layers = [
            LayerCache(layer, layout, batch, plan.exact, device)
            for layer, layout in zip(plan.layers, plan.layouts())
        ]
        for layer_cache, channels in zip(self.layers, kept, strict=True):
            if channels is not None:
                layer_cache.use(channels)
        self._decode_steps: dict[tuple[int, ...], DecodeStep] = {}

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def begin(self, counts: Sequence[int]) -> None:
        """Announce `counts[row]` new tokens for each sequence; raises CapacityError when they do not fit."""
        if len(counts) != self.batch:
            raise CapacityError(f"{len(counts)} sequences given to a cache of batch {self.batch}")
        self.reserve([length + count for length, count in zip(self.lengths, counts)])
        self.counts = list(counts)
        self._decode_steps = {}

    def reserve(self, tokens: Sequence[int]) -> None:
        """Allocate, in one block a layer, pages for sequences that will grow to `tokens[row]` tokens.

        Raises CapacityError, before anything is allocated, when they do not fit.
        """
        some = {layer.plan.policy: layer for layer in self.layers if layer.pool is not None}
        wanted = {policy: layer.growth(tokens) for policy, layer in some.items()}
        short = [
            (layer, more)
            for layer in self.layers
            if layer.pool is not None and (more := layer.lacks(*wanted[layer.plan.policy]))
        ]
        if not short:
            return
        more = sum(more for _, more in short)
        _check_fits(more, self.device, self.budget, f"{max(tokens)} tokens a sequence", self.nbytes)
        for layer, _ in short:
            layer.reserve(*wanted[layer.plan.policy], exactly=self.budget is not None)

    def commit(self) -> None:
        """End the step: the announced tokens are cached."""
        self.lengths = [length + count for length, count in zip(self.lengths, self.counts)]
        self.counts = []

    def decode_step(self, plan: LayerPlan) -> DecodeStep:
        """Where one new token for every sequence goes; the same for all layers of one policy, so made once a step."""
        key = plan.policy
        if key not in self._decode_steps:
            slots = [n if n < plan.sinks else plan.sinks + (n - plan.sinks) % plan.ring for n in self.lengths]
            after = [n + 1 for n in self.lengths]
            sealed = [plan.sealed(n if plan.page else n + 1) for n in self.lengths]
            full = [
                row for row, n in enumerate(self.lengths) if plan.page and plan.sealed(n + 1) > plan.sealed(n)
            ]
            self._decode_steps[key] = DecodeStep(
                torch.arange(self.batch, device=self.device),
                torch.tensor(slots, device=self.device),
                torch.tensor(after, dtype=torch.int32, device=self.device),
                torch.tensor(sealed, dtype=torch.int32, device=self.device),
                full,
            )
        return self._decode_steps[key]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only, in this order; the others' pages become free.

        A sequence may be named more than once: its sealed pages are then shared, and stored once.
        """
        for layer in self.layers:
            layer.keep(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def memory(self) -> list[LayerMemory]:
        """Allocated bytes by layer and segment."""
        return [layer.memory() for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Allocated bytes, all layers and segments."""
        return sum(m.nbytes for m in self.memory())


def _check_fits(extra: int, device: torch.device, budget: int | None, what: str, held: int = 0) -> None:
    limit = budget - held if budget is not None else _available(device)
    if extra > limit:
        source = "the cache budget" if budget is not None else "memory"
        raise CapacityError(
            f"{what} needs {extra / 2**20:.1f} MiB more cache and {source} has {max(limit, 0) / 2**20:.1f} MiB left; "
            "use a smaller batch, a shorter context or a recipe with fewer bits"
        )


def _available(device: torch.device) -> int:
    """Bytes that can be allocated on a device: on a GPU also what torch keeps there for itself to use again."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
