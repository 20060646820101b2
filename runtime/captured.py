"""A decode step captured once and replayed: the graph of one new token for each of n sequences, on the CPU.

Shapes of a decode step never change, so its buffers are made once, views are taken once, and what `cpu_step.c` can
do becomes a list of records that one call runs. Operators that it cannot do run as torch operators in between.
Activations are float32 whatever the model's type: weights are widened in registers, and casts disappear.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from kvcc.kernels import step
from kvcc.kernels.linear import scratch_bytes
from kvcc.kernels.step import Record
from kvcc.runtime import fused
from kvcc.runtime.attention import cached_attention, check_new_tokens, seal_full
from kvcc.runtime.cache import Cache
from kvcc.runtime.fuse import CASTS, activation_name, aten, weight_of
from kvcc.runtime.plan import LayerPlan

Call = Callable[[], None]
Policy = tuple[int, int, int, int]


class NotCapturable(Exception):
    """An operator of this graph cannot be captured; the graph then runs as it is."""


@dataclass(frozen=True)
class Attention:
    """One layer's attention in a step; tensors are views of the step's buffers."""

    layer: int
    plan: LayerPlan
    scale: float
    softcap: float
    q: Tensor  # [Hq, n, Dk]
    k: Tensor  # [Hkv, n, Dk]
    v: Tensor  # [Hkv, n, Dv]
    q_pages: Tensor | None  # [n, Hq, kept], for pages that store some of the channels
    bias: Tensor | None  # [n, Hq]
    sinks: Tensor | None  # [Hq]
    out: Tensor  # [n, Hq, Dv]
    lse: Tensor  # [n, Hq]


@dataclass(frozen=True)
class Places:
    """Where the new tokens go under one policy; buffers that every step fills anew."""

    slots: Tensor  # [n] int64
    lengths: Tensor  # [n] int32
    sealed: Tensor  # [n] int32


@dataclass
class Bound:
    """A step's records pointing into one cache, as that lay when they were made."""

    where: list[tuple[int, int]]  # `_where` of all layers
    calls: list[Call] = field(default_factory=list)
    alive: list[Any] = field(default_factory=list)  # owns what records point at


class CapturedStep:
    """Made by `capture`; `run` gives the logits of one more token for every sequence of a cache."""

    def __init__(
        self,
        tokens: Tensor,
        positions: Tensor,
        parts: list[list[Record | Attention] | Call],
        logits: Tensor,
        alive: Any,  # owns what records point at
    ) -> None:
        self.tokens, self.positions, self.logits = tokens, positions, logits
        self.parts, self.alive = parts, alive
        self.attentions = [a for p in parts if isinstance(p, list) for a in p if isinstance(a, Attention)]
        self.threads = torch.get_num_threads()
        n = tokens.shape[1]
        self._places = {a.plan.policy: (a.plan, _places(n)) for a in self.attentions}
        self._lock = threading.Lock()
        self._bound: WeakKeyDictionary[Cache, Bound] = WeakKeyDictionary()

    def run(self, tokens: Sequence[int], cache: Cache) -> Tensor:
        """Logits [n, V] after `tokens`, one for each sequence; between `cache.begin` and `cache.commit`."""
        with self._lock:  # caches of several threads share these buffers
            return self._run(tokens, cache)

    def _run(self, tokens: Sequence[int], cache: Cache) -> Tensor:
        self.tokens.copy_(torch.tensor([list(tokens)]))
        self.positions.copy_(torch.tensor([cache.lengths]))
        full: dict[Policy, list[int]] = {}  # sequences whose oldest page is due after this token
        for policy, (plan, places) in self._places.items():
            at = cache.decode_step(plan)
            places.slots.copy_(at.slots)
            places.lengths.copy_(at.lengths)
            places.sealed.copy_(at.sealed)
            if at.full:
                full[policy] = at.full
        for call in self._bind(cache).calls:
            call()
        if full:
            for attention in self.attentions:
                if rows := full.get(attention.plan.policy):
                    seal_full(cache, attention.layer, rows)
        return self.logits.clone()

    def _bind(self, cache: Cache) -> Bound:
        """Records that point into this cache: those of its last step, unless it has moved since."""
        where = [place for attention in self.attentions for place in _where(cache, attention.layer)]
        bound = self._bound.get(cache)
        if bound is not None and bound.where == where:
            return bound
        bound = self._bound[cache] = Bound(where)
        for part in self.parts:
            if not isinstance(part, list):
                bound.calls.append(part)
                continue
            records = [r for entry in part for r in self._records(entry, cache, bound.alive)]
            bound.calls.append(_runner((Record * len(records))(*records), len(records), self.threads))
        return bound

    def _records(self, entry: Record | Attention, cache: Cache, alive: list[Any]) -> Iterator[Record]:
        if isinstance(entry, Record):
            yield entry
            return
        layer = cache.layers[entry.layer]
        _, places = self._places[layer.plan.policy]
        yield step.store(entry.k, layer.window_k, places.slots)
        yield step.store(entry.v, layer.window_v, places.slots)
        bias, q_pages = None, None
        if layer.basis is not None and entry.q_pages is not None and entry.bias is not None:
            q_pages = entry.q_pages[:, None]
            bias = None if layer.basis.mean is None else entry.bias
            basis, mean = layer.basis.queries, layer.basis.mean
            yield step.project(entry.q, basis, mean, entry.scale, entry.q_pages, entry.bias)
        elif layer.query_channels is not None and entry.q_pages is not None and entry.bias is not None:
            q_pages = entry.q_pages[:, None]
            bias = None if layer.pruned_mean is None else entry.bias
            yield step.gather(
                entry.q, layer.query_channels, layer.pruned_mean, entry.scale, entry.q_pages, entry.bias
            )
        q = entry.q.transpose(0, 1)[:, None]  # [n, 1, Hq, D]
        view = layer.view(slice(None), places.lengths, places.sealed)
        call = step.attend_call(
            view, q, q if q_pages is None else q_pages, entry.scale, entry.softcap, bias, entry.out, entry.lse
        )
        alive.append((call, view))
        yield step.attend(call)
        if entry.sinks is not None:
            yield step.sink(entry.lse, entry.sinks, entry.out)


def _places(n: int) -> Places:
    return Places(
        torch.zeros(n, dtype=torch.int64),
        torch.zeros(n, dtype=torch.int32),
        torch.zeros(n, dtype=torch.int32),
    )


def _runner(records: Any, count: int, threads: int) -> Call:
    return lambda: step.run(records, count, threads)


def _where(cache: Cache, index: int) -> Iterator[tuple[int, int]]:
    """Address and first stride of all of a layer's memory that may move: what records say of it."""
    layer = cache.layers[index]
    pool = None if layer.pool is None else layer.pool.addresses
    for tensor in (
        layer.window_k,
        layer.window_v,
        layer.table,
        pool,
        layer.query_channels,
        layer.pruned_mean,
    ):
        yield (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def capture(module: fx.GraphModule, cache: Cache) -> CapturedStep:
    """The step of `module` (fused, on the CPU) for as many sequences as `cache` has. Raises NotCapturable."""
    return _Recorder(module, cache).step()


class _Recorder:
    """Runs the graph once on buffers, and writes down what would have to run again."""

    def __init__(self, module: fx.GraphModule, cache: Cache) -> None:
        self.module, self.cache, self.n = module, cache, cache.batch
        self.parts: list[list[Record | Attention] | Call] = []
        self.values: dict[fx.Node, Any] = {}
        self.dynamic: set[fx.Node] = set()  # depend on the step's tokens
        self.buffers: dict[int, Tensor] = {}  # by address: bytes in use
        self.users: dict[int, int] = {}  # by address: readers still to come
        self.free: dict[int, list[Tensor]] = {}  # by size
        self.widened: dict[fx.Node, Tensor] = {}
        self.scratch = torch.empty(0, dtype=torch.uint8)

    def step(self) -> CapturedStep:
        n = self.n
        tokens, positions = torch.zeros(2, 1, n, dtype=torch.int64)
        inputs = {"tokens": tokens, "positions": positions, "rows": torch.arange(n), "cache": None}
        self.scratch = torch.empty(self._scratch_bytes(), dtype=torch.uint8)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = inputs[str(node.target)]
                self.dynamic.add(node)
            elif node.op == "get_attr":
                self.values[node] = weight_of(self.module, node)
            elif node.op == "output":
                (logits,) = self.values[node.all_input_nodes[0]]
            else:
                self._visit(node)
                self._release(node)
        alive = (self.module, self.scratch, self.values, self.widened)
        return CapturedStep(tokens, positions, self.parts, logits, alive)

    def _visit(self, node: fx.Node) -> None:
        target: Any = node.target
        args: Any = fx.node.map_arg(node.args, lambda n: self.values[n])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: self.values[n])
        if not self.dynamic & set(node.all_input_nodes):
            self._keep(node, target(*args, **kwargs))
            return
        self.dynamic.add(node)
        value: Any
        if node.op == "call_module":
            value = self._linear(node, args[0])
        else:
            value = self._fused(node, args, kwargs)
            if value is None:
                value = self._replayed(node, args, kwargs)
        if isinstance(value, int):  # a size, which n fixes
            self.dynamic.discard(node)
        self._keep(node, value)

    # ------------------------------------------------------------------ operators of cpu_step.c

    def _fused(self, node: fx.Node, args: Any, kwargs: Any) -> Tensor | None:
        """The result of an operator that becomes a record, or that float32 makes idle; else None."""
        target: Any = node.target
        if target is cached_attention:
            return self._attention(*args[1:], **kwargs)
        if not args or not isinstance(args[0], Tensor):  # torch takes a size for a tensor of no dimension
            return None
        if target in CASTS and len(args) > 1:
            to_float = not isinstance(args[1], torch.dtype) or args[1].is_floating_point
            x: Tensor = args[0]
            return x if x.is_floating_point() and to_float else None
        if target is fused.rms_norm:
            x, weight, eps, offset, _ = args
            out = self._like(x)
            return self._emit(step.rms_norm(x, self._wide(node.args[1], weight), eps, offset, out), out)
        if target is aten.layer_norm.default and not kwargs:
            x, shape, weight, bias, eps = (*args, *(None, None, 1e-5)[len(args) - 2 :])[:5]
            out = self._like(x)
            weight, bias = (self._wide(a, w) for a, w in zip((*node.args, None, None)[2:4], (weight, bias)))
            return self._emit(step.layer_norm(x, weight, bias, eps, out) if len(shape) == 1 else None, out)
        if target is fused.rotate:
            out = self._like(args[0])
            return self._emit(step.rotate(args[0], args[1], args[2], out), out)
        if target is fused.gate:
            out = self._like(args[0])
            return self._emit(step.gate(args[0], args[1], args[2], out), out)
        if name := activation_name(node):
            out = self._like(args[0])
            return self._emit(step.gate(args[0], None, name, out), out)
        if target in (aten.add.Tensor, aten.mul.Tensor) and not kwargs and _alike(*args):
            out = self._like(args[0])
            make = step.add if target is aten.add.Tensor else step.multiply
            return self._emit(make(args[0], args[1], out), out)
        return None

    def _linear(self, node: fx.Node, x: Tensor) -> Tensor:
        layer = self.module.get_submodule(str(node.target))
        assert isinstance(layer, fused.Linear)
        out = self._buffer((*x.shape[:-1], layer.weight.rows), torch.float32)
        bias = None if layer.bias is None else self.widened.setdefault(node, layer.bias.float())
        record = step.linear(x, layer.weight.struct, bias, out, self.scratch)
        if record is None:
            self.parts.append(lambda: _put(out, layer(x)))
        else:
            self._append(record)
        return out

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        *,
        layer: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        held, heads = self.cache.layers[layer], q.shape[1]
        check_new_tokens(held.plan, layer, self.n, q, k, v, sinks)
        if held.plan.salient:
            raise NotCapturable(
                f"layer {layer}: which tokens are salient is seen from queries when a page is sealed"
            )
        out = self._buffer((1, self.n, heads, v.shape[-1]), torch.float32)
        lse = torch.empty(self.n, heads)
        q_pages = bias = None
        if held.plan.select != "all" and held.layout is not None:
            q_pages = torch.empty(self.n, heads, held.layout.k_channels)
            bias = torch.empty(self.n, heads)
        sinks = None if sinks is None else sinks.float()
        if sinks is not None and not sinks.is_contiguous():
            raise NotCapturable(f"layer {layer}: attention-sink logits do not lie in a row")
        if any(x.stride(-1) != 1 or x.dtype != torch.float32 for x in (q, k, v)):
            raise NotCapturable(f"layer {layer}: queries, keys or values do not lie in rows of float32")
        self._append(
            Attention(layer, held.plan, scale, softcap, q[0], k[0], v[0], q_pages, bias, sinks, out[0], lse)
        )
        return out

    # ------------------------------------------------------------------ all others

    def _replayed(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The result of a torch operator: a view is taken now, for good; anything else is computed at every step."""
        target: Any = node.target
        try:
            found = target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise NotCapturable(f"{target} does not run on float32 activations: {error}") from error
        if isinstance(found, Tensor):
            if self._shares(found, node):
                return found
            out = self._copy_of(found)
            self.parts.append(lambda: _put(out, target(*args, **kwargs)))
            return out
        if isinstance(found, list | tuple):
            if all(self._shares(t, node) for t in found):
                return found
            outs = [self._copy_of(t) for t in found]
            self.parts.append(lambda: _put_all(outs, target(*args, **kwargs)))
            return outs
        return found  # a size

    def _shares(self, found: Tensor, node: fx.Node) -> bool:
        inputs = (t for n in node.all_input_nodes for t in _tensors(self.values[n]))
        return any(found.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in inputs)

    # ------------------------------------------------------------------ buffers

    def _emit(self, record: Record | None, out: Tensor) -> Tensor | None:
        """`out` when the record could be made; else its buffer goes back."""
        if record is None:
            self._give_back(out.untyped_storage().data_ptr())
            return None
        self._append(record)
        return out

    def _append(self, entry: Record | Attention) -> None:
        if not self.parts or not isinstance(self.parts[-1], list):
            self.parts.append([])
        last = self.parts[-1]
        assert isinstance(last, list)
        last.append(entry)

    def _like(self, x: Tensor) -> Tensor:
        stride = torch.empty_like(x, device="meta").stride()
        return self._buffer(x.shape, torch.float32).as_strided(x.shape, stride)

    def _copy_of(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if x.is_floating_point() else x.dtype
        stride = torch.empty_like(x, device="meta").stride()
        out = self._buffer(x.shape, dtype).as_strided(x.shape, stride)
        out.copy_(x)
        return out

    def _buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = max(1, torch.Size(shape).numel()) * dtype.itemsize
        size = -(-size // 64) * 64
        waiting = self.free.setdefault(size, [])
        data = waiting.pop() if waiting else torch.zeros(size, dtype=torch.uint8)
        self.buffers[data.data_ptr()] = data
        return data.view(dtype)[: torch.Size(shape).numel()].view(shape)

    def _keep(self, node: fx.Node, value: Any) -> None:
        self.values[node] = value
        for address in {t.untyped_storage().data_ptr() for t in _tensors(value)}:
            self.users[address] = self.users.get(address, 0) + len(node.users)

    def _release(self, node: fx.Node) -> None:
        """Buffers whose last reader was `node` may be used again."""
        for earlier in node.all_input_nodes:
            for address in {t.untyped_storage().data_ptr() for t in _tensors(self.values[earlier])}:
                self.users[address] = self.users.get(address, 0) - 1
                if self.users[address] == 0:
                    self._give_back(address)

    def _give_back(self, address: int) -> None:
        data = self.buffers.pop(address, None)
        if data is not None:
            self.free[len(data)].append(data)

    def _wide(self, node: Any, weight: Tensor | None) -> Tensor | None:
        """A weight as float32, made once; one that depends on the step's tokens stays as it is."""
        if weight is None or weight.dtype == torch.float32 or node in self.dynamic:
            return weight
        return self.widened.setdefault(node, weight.float())

    def _scratch_bytes(self) -> int:
        layers = [m for m in self.module.modules() if isinstance(m, fused.Linear)]
        threads = torch.get_num_threads()
        return max((scratch_bytes(layer.weight, self.n, threads) for layer in layers), default=1) + 64


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        yield from (t for t in value if isinstance(t, Tensor))


def _alike(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.shape == b.shape and a.dtype == b.dtype == torch.float32


def _put(out: Tensor, found: Tensor) -> None:
    out.copy_(found)


def _put_all(outs: list[Tensor], found: Sequence[Tensor]) -> None:
    for out, tensor in zip(outs, found):
        out.copy_(tensor)
