"""The three graphs of an artifact in ONNX, as torch modules and as onnx_ir models."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import Tensor, fx, nn
from torch.export import Dim, export

from kvcc.exchange.onnx_attention import RECORDS, TORCH_TYPES, Layer, layer_of
from kvcc.runtime.artifact import Artifact, module
from kvcc.runtime.attention import cached_attention
from kvcc.runtime.plan import LayerPlan

OPSET = 24
SAMPLE = 3, 2  # sequences, and pages of each, of the tensors that graphs are traced with

State = tuple[str, int]  # what it is (window_k, window_v, bytes, halves, floats), and of which layer


@dataclass(frozen=True)
class Traced:
    """One graph before ONNX: a module, inputs to trace it with, and names."""

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]  # by input: names of the axes that vary
    outputs: dict[str, dict[int, str]]


def layers_of(artifact: Artifact) -> list[Layer]:
    """The layers of an artifact whose plan ONNX can express."""
    found = []
    for index, layout in enumerate(artifact.plan.layouts()):
        assert layout is not None  # a layer with a sliding window is refused before
        found.append(layer_of(index, artifact.plan, layout, artifact.tables))
    return found


def states(layers: list[Layer]) -> list[State]:
    """Everything that a cache consists of, in the order of graphs' inputs and outputs."""
    return [
        (what, index)
        for index, layer in enumerate(layers)
        for what in ("window_k", "window_v", *layer.pages.sizes)
    ]


def name_of(state: State, prefix: str) -> str:
    """Of an input or output: `past.0.window_k`."""
    return f"{prefix}.{state[1]}.{state[0]}"


def state_shape(state: State, layer: Layer) -> tuple[torch.dtype, tuple[str | int, ...]]:
    """Type and shape of a state, with names for the axes that vary."""
    what, plan = state[0], layer.plan
    if what in RECORDS:
        return TORCH_TYPES[what], ("batch", "pages", layer.pages.sizes[what])
    size = plan.k_dim if what == "window_k" else plan.v_dim
    return (
        torch.float16 if layer.half_window else torch.float32,
        ("batch", plan.kv_heads, plan.slots, size),
    )


# --------------------------------------------------------------------------- torch modules


class _Prefill(nn.Module):
    """tokens [B, L], lengths [B] -> logits [B, V] of each last token, states."""

    def __init__(self, graph: fx.GraphModule, layers: list[Layer]) -> None:
        super().__init__()
        self.model, self.layers = rewired(graph, self.attend), layers

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        batch, length = tokens.shape
        starts = torch.arange(batch) * length
        positions = torch.arange(length).expand(batch, length).reshape(1, -1)
        kept = _kept_tokens(self.layers[0].plan, lengths).clamp(0, length - 1)
        step: dict[str, Any] = {"batch": batch, "kept": (kept + starts[:, None]).flatten(), "made": {}}
        logits = self.model(tokens.reshape(1, -1), positions, starts + lengths - 1, step)
        return logits[0], *(step["made"][state] for state in states(self.layers))

    def attend(
        self,
        step: dict[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: None,
        *,
        layer: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        this, batch = self.layers[layer], step["batch"]
        q, k, v = (x[0].unflatten(1, (batch, -1)).transpose(0, 1) for x in (q, k, v))
        sizes = [this.plan.slots, int(this.half_window)]
        sizes += [this.pages.sizes.get(name, 0) for name in RECORDS]
        out, *made = torch.ops.kvcc_onnx.prefill(q, k, v, step["kept"], layer, scale, softcap, sizes)
        names = ("window_k", "window_v", *RECORDS)
        step["made"] |= {(name, layer): tensor for name, tensor in zip(names, made)}
        return out.transpose(1, 2).flatten(0, 1)[None]


class _Decode(nn.Module):
    """tokens [B], lengths [B] before this token, states -> logits [B, V], windows."""

    def __init__(self, graph: fx.GraphModule, layers: list[Layer]) -> None:
        super().__init__()
        self.model, self.layers = rewired(graph, self.attend), layers

    def forward(self, tokens: Tensor, lengths: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        named = dict(zip(states(self.layers), past, strict=True))
        record = next(tensor for (what, _), tensor in named.items() if what in RECORDS)
        plan = self.layers[0].plan
        step: dict[str, Any] = {"past": named, "made": {}}
        step["slot"] = torch.where(
            lengths < plan.sinks, lengths, plan.sinks + (lengths - plan.sinks) % plan.ring
        )
        step["hidden"] = _hidden(plan, lengths, record.shape[1])
        logits = self.model(tokens[None], lengths[None], torch.arange(tokens.shape[0]), step)
        return logits[0], *(step["made"][state] for state in states(self.layers) if state[0] not in RECORDS)

    def attend(
        self,
        step: dict[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: None,
        *,
        layer: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        q, k, v = (x[0].transpose(0, 1)[:, :, None] for x in (q, k, v))
        past = step["past"]
        out, *made = torch.ops.kvcc_onnx.decode(
            q,
            k,
            v,
            step["slot"],
            step["hidden"],
            *(past[name, layer] for name in ("window_k", "window_v")),
            [past[name, layer] for name in self.layers[layer].pages.sizes],
            layer,
            scale,
            softcap,
        )
        step["made"] |= {("window_k", layer): made[0], ("window_v", layer): made[1]}
        return out[:, :, 0][None]


class _Seal(nn.Module):
    """lengths [B], rows [R] of sequences whose oldest recent tokens fill a page, windows -> records [R, 1, n]."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, lengths: Tensor, rows: Tensor, windows: list[Tensor]) -> tuple[Tensor, ...]:
        plan = self.layers[0].plan
        sealed = _sealed(plan, lengths[rows] - 1)  # the token just added made the page full
        slots = plan.sinks + (sealed[:, None] + torch.arange(plan.page)) % plan.ring
        places = (rows[:, None] * plan.slots + slots).flatten()
        made: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            k, v = (_tokens_at(window, places, plan.page) for window in windows[2 * index : 2 * index + 2])
            sizes = [layer.pages.sizes.get(name, 0) for name in RECORDS]
            found = zip(RECORDS, torch.ops.kvcc_onnx.seal(k, v, index, sizes))
            made += [tensor for name, tensor in found if name in layer.pages.sizes]
        return tuple(made)


def rewired(graph: fx.GraphModule, attend: Callable[..., Tensor]) -> fx.GraphModule:
    """A lowered graph that calls `attend` where it attended over a cache."""
    for node in graph.graph.nodes:
        if node.target is cached_attention:
            node.target = attend
    graph.recompile()
    return graph


def _sealed(plan: LayerPlan, lengths: Tensor) -> Tensor:
    """Tokens in pages of sequences of these lengths."""
    beyond = (lengths - plan.sinks - plan.recent).clamp_min(0)
    return beyond - beyond % plan.page


def _kept_tokens(plan: LayerPlan, lengths: Tensor) -> Tensor:
    """[B, slots]: the token that a window slot holds, the last of those that share it; below 0 where there is none."""
    slots = torch.arange(plan.slots)
    turns = (lengths[:, None] - 1 - slots).div(plan.ring, rounding_mode="floor")
    return torch.where(slots < plan.sinks, slots.expand_as(turns), slots + plan.ring * turns)


def _hidden(plan: LayerPlan, lengths: Tensor, pages: int) -> Tensor:
    """[B, 1, 1, slots + pages * page]: 0 for what a new token behind `lengths` others sees, also itself; else -inf."""
    sealed = _sealed(plan, lengths)
    slots, kept = torch.arange(plan.slots), _kept_tokens(plan, lengths + 1)
    first = torch.where(slots < plan.sinks, torch.zeros_like(kept), plan.sinks + sealed[:, None])
    exact = (kept >= first) & (kept <= lengths[:, None])
    paged = torch.arange(pages * plan.page) < sealed[:, None]
    seen = torch.cat([exact, paged], 1)
    return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)[:, None, None]


def _tokens_at(window: Tensor, places: Tensor, page: int) -> Tensor:
    """[R, H, page, D] of a window [B, H, slots, D]; places: [R * page] in B * slots."""
    found = window.transpose(1, 2).flatten(0, 1).index_select(0, places)
    return found.unflatten(0, (-1, page)).transpose(1, 2)


# --------------------------------------------------------------------------- from torch to ONNX


def traced(artifact: Artifact, layers: list[Layer], name: str) -> Traced:
    """Graph `name` ("prefill", "decode" or "seal") ready for export."""
    batch, pages = SAMPLE
    sizes = {"batch": batch, "pages": pages}
    wanted = states(layers)
    shapes = {state: state_shape(state, layers[state[1]]) for state in wanted}
    axes = {
        state: {i: size for i, size in enumerate(shapes[state][1]) if isinstance(size, str)}
        for state in wanted
    }
    past = {
        name_of(state, "past"): torch.zeros(
            [n if isinstance(n, int) else sizes[n] for n in shape], dtype=dtype
        )
        for state, (dtype, shape) in shapes.items()
    }
    dynamic = {name_of(state, "past"): axes[state] for state in wanted}
    lengths, one = torch.full((batch,), 2), {0: "batch"}
    windows = [state for state in wanted if state[0] not in RECORDS]
    records = [state for state in wanted if state[0] in RECORDS]
    if name == "seal":
        held = [name_of(state, "past") for state in windows]
        return Traced(
            _Seal(layers),
            {"lengths": lengths, "rows": torch.arange(2)} | {n: past[n] for n in held},
            {"lengths": one, "rows": {0: "rows"}} | {n: dynamic[n] for n in held},
            {name_of(state, "page"): {0: "rows"} for state in records},
        )
    graph = module(artifact, "cpu")
    outputs = {name_of(state, "present"): axes[state] for state in wanted}
    if name == "prefill":
        length = layers[0].plan.sinks + layers[0].plan.recent + 2 * layers[0].plan.page
        return Traced(
            _Prefill(graph, layers),
            {"tokens": torch.zeros(batch, length, dtype=torch.int64), "lengths": lengths},
            {"tokens": {0: "batch", 1: "length"}, "lengths": one},
            {"logits": one} | outputs,
        )
    return Traced(
        _Decode(graph, layers),
        {"tokens": torch.zeros(batch, dtype=torch.int64), "lengths": lengths} | past,
        {"tokens": one, "lengths": one} | dynamic,
        {"logits": one} | {name_of(state, "present"): axes[state] for state in windows},
    )


def onnx_model(found: Traced, table: Mapping[Any, Callable[..., Any]]) -> onnx_ir.Model:
    """The ONNX of a traced graph, optimised, its weights still those of torch; `table`: see `translations`."""
    names = list(found.inputs)
    free = [name for name in names if not name.startswith("past.")]
    dims: dict[str, Any] = {
        axis: Dim(axis, min=1 if axis != "pages" else 0, max=1 << 20)
        for axes in found.dynamic.values()
        for axis in axes.values()
    }
    shapes = [{i: dims[axis] for i, axis in found.dynamic[name].items()} for name in names]
    rest = [found.inputs[name] for name in names[len(free) :]]
    arguments = (*(found.inputs[name] for name in free), *([rest] if rest else []))
    dynamic = (*shapes[: len(free)], *([shapes[len(free) :]] if rest else []))
    with _quiet(), torch.no_grad():
        program = export(found.module, arguments, dynamic_shapes=dynamic, strict=False)
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=list(found.outputs),
            custom_translation_table=dict(table),
            optimize=False,
            verbose=False,
        )
    assert made is not None
    return _tidied(made.model, found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that nothing here needs."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _tidied(model: onnx_ir.Model, found: Traced) -> onnx_ir.Model:
    """Folded and deduplicated, and axes under their names."""
    shared = {value.name for value in model.graph.initializers.values() if len(list(value.uses())) > 1}

    def should_fold(node: onnx_ir.Node) -> bool | None:
        """A weight that is also used as it is (tied embeddings) is not stored again, transposed."""
        return False if any(x is not None and x.name in shared for x in node.inputs) else None

    # Its rewriting of patterns takes minutes for thirty layers, and ONNX Runtime does that, too.
    optimizer.fold_constants(
        model, input_size_limit=1 << 40, output_size_limit=1 << 40, should_fold=should_fold
    )
    for step in (
        common.RemoveUnusedNodesPass(),
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True),
        common.DeduplicateInitializersPass(size_limit=1 << 10),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    for value in model.graph.inputs:
        _name_axes(value, found.dynamic[value.name])
    for value in model.graph.outputs:
        _name_axes(value, found.outputs[value.name])
    return model


def _name_axes(value: onnx_ir.Value, axes: Mapping[int, str]) -> None:
    assert value.shape is not None
    value.shape = onnx_ir.Shape([axes.get(i, size) for i, size in enumerate(value.shape)])
