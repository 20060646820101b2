"""kvcc's attention as operators of torch.export graphs, and how ONNX computes them.

Three operators, one a graph: `prefill` attends exactly among a prompt's tokens and makes window and pages of it,
`decode` attends with one token over both, `seal` makes a page of the oldest recent tokens. They have no code in torch:
torch.export only needs to know their shapes, and the exporter asks `translations` for their ONNX.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnxscript.onnx_opset import opset24 as op
from torch import Tensor

from kvcc.exchange import onnx_operators as ops
from kvcc.exchange.onnx_operators import FLOAT16, Value, constant, float32, shape
from kvcc.exchange.onnx_pages import ITEM_BYTES, OnnxPages, onnx_pages
from kvcc.kernels.layout import PageLayout
from kvcc.runtime.plan import LayerPlan, Plan

RECORDS = tuple(ITEM_BYTES)
TORCH_TYPES = {"bytes": torch.uint8, "halves": torch.float16, "floats": torch.float32}


@dataclass(frozen=True)
class Layer:
    """What the ONNX of one layer follows from. Arrays are float32."""

    plan: LayerPlan
    pages: OnnxPages
    half_window: bool  # exact segments are float16
    keys: np.ndarray | None  # [H, Dk, C]: pages store (k - mean) @ keys; None: k
    queries: np.ndarray | None  # [H, Dk, C]: and meet q @ queries
    mean: np.ndarray | None  # [H, 1, Dk], subtracted from keys
    bias: np.ndarray | None  # [H, Dk, 1]: logits of pages get scale * q @ bias


def layer_of(index: int, plan: Plan, layout: PageLayout, tables: Mapping[str, Tensor]) -> Layer:
    """Layer `index` of a plan, with its tables as matrices."""
    layer = plan.layers[index]
    keys = queries = mean = bias = None
    k_mean = tables[f"layers.{index}.k_mean"].numpy() if layer.mean_correction else None
    if layer.select == "basis":
        keys, queries = (tables[f"layers.{index}.{side}_basis"].numpy() for side in "kq")
        if k_mean is not None:
            mean, bias = k_mean[:, None], k_mean[:, :, None]
    elif layer.select == "static":
        channels = tables[f"layers.{index}.k_channels"][:, : layout.k_channels].numpy()
        keys = queries = (channels[:, None] == np.arange(layer.k_dim)[None, :, None]).astype(np.float32)
        bias = None if k_mean is None else k_mean[:, :, None]
    half = plan.exact == torch.float16
    return Layer(layer, onnx_pages(layout), half, keys, queries, mean, bias)


# --------------------------------------------------------------------------- operators of torch graphs


def _operator(shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Define the operator `kvcc_onnx::NAME` of a function that gives what it would return, of the right shapes only."""
    name = f"kvcc_onnx::{shapes.__name__}"
    schema = torch.library.infer_schema(shapes, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(name, shapes)
    return shapes


@_operator
def prefill(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, layer: int, scale: float, softcap: float, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q [B, Hq, L, Dk], k, v [B, Hkv, L, D]; kept [B * slots]: the token of each window slot, in B * L.

    sizes: slots, whether the window is float16, then the size of each record. Gives attention
    [B, Hq, L, Dv], window_k, window_v [B, Hkv, slots, D] and the records [B, pages, size].
    """
    slots, half, *records = sizes
    batch, heads, length, k_dim = k.shape
    window = torch.float16 if half else torch.float32
    # Any number of pages will do: nothing here computes with it, and the right one would guard against 0 and 1.
    first, second, third = (
        q.new_empty(batch, length, n, dtype=t) for n, t in zip(records, TORCH_TYPES.values())
    )
    return (
        q.new_empty(batch, q.shape[1], length, v.shape[-1]),
        q.new_empty(batch, heads, slots, k_dim, dtype=window),
        q.new_empty(batch, heads, slots, v.shape[-1], dtype=window),
        *(first, second, third),
    )


@_operator
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    hidden: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    records: list[Tensor],
    layer: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, 1, Dk], k, v [B, Hkv, 1, D]; slot [B]; hidden [B, 1, 1, slots + tokens of pages], added to logits.

    Gives attention [B, Hq, 1, Dv] and both windows with the new token.
    """
    out = q.new_empty(q.shape[0], q.shape[1], 1, v.shape[-1])
    return out, torch.empty_like(window_k), torch.empty_like(window_v)


@_operator
def seal(k: Tensor, v: Tensor, layer: int, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Records [B, 1, size] of a page's tokens k, v [B, Hkv, T, D]; sizes: of each record."""
    first, second, third = (
        k.new_empty(k.shape[0], 1, n, dtype=t) for n, t in zip(sizes, TORCH_TYPES.values())
    )
    return first, second, third


# --------------------------------------------------------------------------- their ONNX


def translations(layers: list[Layer]) -> dict[Any, Callable[..., Any]]:
    """What torch.onnx.export wants to know about the operators, for these layers."""

    def onnx_prefill(
        q: Value,
        k: Value,
        v: Value,
        kept: Value,
        layer: int,
        scale: float,
        softcap: float,
        sizes: list[int],
    ) -> tuple[Value, ...]:
        this = layers[layer]
        out, *_ = op.Attention(q, k, v, is_causal=1, scale=scale, softcap=softcap)
        windows = (_window(this, x, kept) for x in (k, v))
        return out, *windows, *_all_records(_seal_prompt(this, k, v))

    def onnx_decode(
        q: Value,
        k: Value,
        v: Value,
        slot: Value,
        hidden: Value,
        window_k: Value,
        window_v: Value,
        records: list[Value],
        layer: int,
        scale: float,
        softcap: float,
    ) -> tuple[Value, ...]:
        this = layers[layer]
        named = dict(zip(this.pages.sizes, records, strict=True))
        window_k, window_v = (
            op.TensorScatter(window, _exact(this, x), slot, axis=2)
            for window, x in ((window_k, k), (window_v, v))
        )
        return _attend(this, q, hidden, window_k, window_v, named, scale, softcap), window_k, window_v

    def onnx_seal(k: Value, v: Value, layer: int, sizes: list[int]) -> tuple[Value, ...]:
        this = layers[layer]
        k, v = (op.Unsqueeze(float32(x), shape(2)) for x in (k, v))  # [B, H, 1, T, D]
        return tuple(_all_records(_seal(this, k, v)))

    kvcc = torch.ops.kvcc_onnx
    return {
        kvcc.prefill.default: onnx_prefill,
        kvcc.decode.default: onnx_decode,
        kvcc.seal.default: onnx_seal,
    }


def _exact(layer: Layer, x: Value) -> Value:
    return op.Cast(x, to=FLOAT16) if layer.half_window else x


def _all_records(records: dict[str, Value]) -> list[Value]:
    """By name, in order; a stand-in where a layer has none, which is no output of the graph."""
    return [records.get(name, constant(0)) for name in RECORDS]


def _window(layer: Layer, x: Value, kept: Value) -> Value:
    """[B, H, slots, D] of tokens x [B, H, L, D]; kept: [B * slots] places in B * L."""
    plan = layer.plan
    tokens = op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), shape(-1, plan.kv_heads, _size(layer, x)))
    found = op.Reshape(op.Gather(tokens, kept), shape(-1, plan.slots, plan.kv_heads, _size(layer, x)))
    return _exact(layer, op.Transpose(found, perm=[0, 2, 1, 3]))


def _size(layer: Layer, x: Value) -> int:
    """Channels of a value: known when the graph is made."""
    return int(x.shape[-1])


def _seal_prompt(layer: Layer, k: Value, v: Value) -> dict[str, Value]:
    """Records of all pages of a prompt's k, v [B, H, L, D], in a batch as many as its longest one has."""
    plan = layer.plan
    length = op.Shape(k, start=2, end=3)
    beyond = op.Max(op.Sub(length, shape(plan.sinks + plan.recent)), shape(0))
    pages = op.Div(beyond, shape(plan.page))
    last = op.Add(op.Mul(pages, shape(plan.page)), shape(plan.sinks))
    k, v = (
        op.Reshape(
            op.Slice(x, shape(plan.sinks), last, shape(2)),
            op.Concat(shape(0, plan.kv_heads), pages, shape(plan.page, _size(layer, x)), axis=0),
        )
        for x in (k, v)
    )
    return _seal(layer, k, v)


def _seal(layer: Layer, k: Value, v: Value) -> dict[str, Value]:
    """Records of k, v [B, H, P, T, D] float32, K in the model's channels."""
    if layer.keys is not None:
        if layer.mean is not None:
            k = op.Sub(k, constant(layer.mean[:, None]))
        k = op.MatMul(k, constant(layer.keys[:, None]))
    if layer.pages.v.width < layer.plan.v_dim:
        v = ops.part(v, 0, layer.pages.v.width)
    k, v = (op.Transpose(x, perm=[0, 2, 1, 4, 3]) for x in (k, v))
    return ops.seal(layer.pages, k, v)


def _attend(
    layer: Layer,
    q: Value,
    hidden: Value,
    window_k: Value,
    window_v: Value,
    records: dict[str, Value],
    scale: float,
    softcap: float,
) -> Value:
    """[B, Hq, 1, Dv]: one softmax over window and pages."""
    plan, pages = layer.plan, layer.pages
    group = plan.q_heads // plan.kv_heads
    q = op.Mul(op.Reshape(q, shape(0, plan.kv_heads, group, plan.k_dim)), constant(scale))
    near = op.MatMul(q, op.Transpose(float32(window_k), perm=[0, 1, 3, 2]))  # [B, H, g, slots]
    turned = q if layer.queries is None else op.MatMul(q, constant(layer.queries))
    far = op.Transpose(ops.logits(pages, records, turned), perm=[0, 2, 3, 1, 4])  # [B, H, g, P, T]
    # The tokens of all pages, also of none, which -1 could not say.
    tokens = op.Sub(op.Shape(hidden, start=3, end=4), shape(plan.slots))
    far = op.Reshape(far, op.Concat(shape(0, plan.kv_heads, group), tokens, axis=0))
    if layer.bias is not None:
        far = op.Add(far, op.MatMul(q, constant(layer.bias)))
    both = op.Concat(near, far, axis=-1)
    if softcap:
        both = op.Mul(op.Tanh(op.Div(both, constant(softcap))), constant(softcap))
    weights = op.Softmax(op.Add(both, hidden), axis=-1)
    out = op.MatMul(ops.part(weights, 0, plan.slots), float32(window_v))
    rest = op.Slice(weights, shape(plan.slots), shape(np.iinfo(np.int64).max), shape(-1))
    count = op.Div(tokens, shape(plan.page))
    rest = op.Reshape(rest, op.Concat(shape(0, plan.kv_heads, group), count, shape(plan.page), axis=0))
    found = ops.weighted(pages, records, op.Transpose(rest, perm=[0, 3, 1, 2, 4]))
    if pages.v.width < plan.v_dim:
        found = op.Pad(found, shape(0, 0, 0, 0, 0, 0, 0, plan.v_dim - pages.v.width))
    return op.Reshape(op.Add(out, found), shape(0, plan.q_heads, 1, plan.v_dim))
