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


@dataclass(frozen=True)
class LayerMemory:
    """Bytes allocated for one layer."""

    window: int
    pages: int  # allocated, whether or not a sealed page lies in them
    pages_used: int


@dataclass(frozen=True)
class DecodeStep:
    """One new token for every sequence, under one policy (sinks, recent, page, window)."""

    rows: Tensor  # [B] int64: 0, 1, …
    slots: Tensor  # [B] int64: the new token's window slot
    lengths: Tensor  # [B] int32: tokens cached, the new one included
    sealed: Tensor  # [B] int32: of these, in pages while attending (or forgotten by a sliding window)
    full: list[int]  # sequences whose recent window overflows into a page after this token


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

    def use(self, channels: Tensor, mean: Tensor | None) -> None:
        """Store K channels `channels` ([1 or B, Hkv, C]); `mean` ([Hkv, Dk]) is 0 where a channel is stored."""
        group = self.plan.q_heads // self.plan.kv_heads
        self.channels = channels
        self.query_channels = channels.repeat_interleave(group, dim=1)[:, None]
        self.pruned_mean = None if mean is None else mean.repeat_interleave(group, dim=0)

    def choose(self, row: int, channels: Tensor) -> None:
        """Store K channels `channels` ([Hkv, C]) of sequence `row`."""
        if self.channels is None:
            self.channels = channels.new_zeros(len(self.pages), *channels.shape)
        self.channels[row] = channels
        self.use(self.channels, None)

    def add_pages(self, row: int, count: int) -> Tensor:
        """Take `count` new pages for sequence `row`: their ids, [count] int64."""
        assert self.pool is not None
        ids = self.pool.take(count)
        first, last = len(self.pages[row]), len(self.pages[row]) + count
        if last > self.table.shape[1]:
            grown = self.table.new_zeros(self.table.shape[0], max(last, 2 * self.table.shape[1]))
            grown[:, : self.table.shape[1]] = self.table
            self.table = grown
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
        """Bytes allocated now."""
        window = self.window_k.nbytes + self.window_v.nbytes
        if self.pool is None:
            return LayerMemory(window, 0, 0)
        return LayerMemory(window, self.pool.nbytes, self.pool.used * self.pool.page_bytes)


class Cache:
    """The cache of a batch of sequences, grown by `CompiledModel.forward`.

    `lengths[row]` is the number of tokens cached for a sequence. A step is `begin(counts)`, one `cached_attention`
    per layer, `commit()`; what does not fit is refused by `begin`, before anything has changed.
    """

    def __init__(
        self,
        plan: Plan,
        tables: Mapping[str, Tensor],
        backend: Backend,
        batch: int,
        device: torch.device,
        budget: int | None = None,
    ) -> None:
        self.plan = plan
        self.backend = backend
        self.device = device
        self.budget = budget  # bytes for the whole batch, None for what memory allows
        self.lengths = [0] * batch
        self.counts: list[int] = []
        _check_fits(batch * plan.cache_bytes(0), budget, f"an empty cache of batch {batch}")
        dtype = getattr(torch, plan.dtype)
        self.layers = [
            LayerCache(layer, layout, batch, dtype, device)
            for layer, layout in zip(plan.layers, plan.layouts())
        ]
        for index, layer_cache in enumerate(self.layers):
            if layer_cache.layout is not None and layer_cache.plan.select == "static":
                channels = tables[f"layers.{index}.k_channels"][None, :, : layer_cache.layout.k_channels]
                mean = tables[f"layers.{index}.k_mean"] if layer_cache.plan.mean_correction else None
                layer_cache.use(channels, mean)
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
        pages = {
            plan.policy: sum(plan.sealed(n) // plan.page for n in tokens)
            for plan in {layer.plan.policy: layer.plan for layer in self.layers if layer.plan.page}.values()
        }
        short = [
            (layer.pool, missing)
            for layer in self.layers
            if layer.pool is not None and (missing := pages[layer.plan.policy] - layer.pool.capacity) > 0
        ]
        if not short:
            return
        extra = sum(missing * pool.page_bytes for pool, missing in short)
        _check_fits(extra, self.budget, f"{max(tokens)} tokens a sequence", self.nbytes)
        for pool, missing in short:
            room = missing if self.budget is not None else max(missing, pool.growth)
            pool.reserve(pool.spare + room)

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
        """Go on with these sequences only, in this order; the others' pages become free."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        for layer in self.layers:
            if layer.pool is not None:
                for row in set(range(self.batch)) - set(rows):
                    layer.pool.give_back(layer.pages[row])
            layer.pages = [layer.pages[row] for row in rows]
            layer.table = layer.table[index]
            layer.window_k, layer.window_v = layer.window_k[index], layer.window_v[index]
            if layer.plan.select == "request" and layer.channels is not None:
                layer.use(layer.channels[index], None)
        self.lengths = [self.lengths[row] for row in rows]

    def memory(self) -> list[LayerMemory]:
        """Allocated bytes by layer and segment."""
        return [layer.memory() for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Allocated bytes, all layers and segments."""
        return sum(m.window + m.pages for m in self.memory())


def _check_fits(extra: int, budget: int | None, what: str, held: int = 0) -> None:
    limit = budget - held if budget is not None else psutil.virtual_memory().available
    if extra > limit:
        source = "the cache budget" if budget is not None else "memory"
        raise CapacityError(
            f"{what} needs {extra / 2**20:.1f} MiB more cache and {source} has {max(limit, 0) / 2**20:.1f} MiB left; "
            "use a smaller batch, a shorter context or a recipe with fewer bits"
        )
