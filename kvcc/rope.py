"""Recognising and narrowing half-split rotary position embedding in a graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvcc.surgery import call, constant

aten = torch.ops.aten


@dataclass(frozen=True)
class Rope:
    """value * cos + rotate_half(value) * sin: `value` [B, heads, T, D] before, cos and sin broadcast over heads."""

    value: fx.Node
    cos: fx.Node
    sin: fx.Node


def match_rope(node: Any) -> Rope | None:
    """The rotation that gives `node`, when it covers all channels in the half-split layout; else None."""
    if _is(node, aten.cat.default) and len(node.args[0]) == 2 and not node.args[0][1].meta["val"].shape[-1]:
        node = node.args[0][0]  # phi3 appends the channels it does not rotate: none
    if not _is(node, aten.add.Tensor) or not all(_is(arg, aten.mul.Tensor) for arg in node.args[:2]):
        return None
    (value, cos), (rotated, sin) = node.args[0].args, node.args[1].args
    if not _is(rotated, aten.cat.default) or len(rotated.args[0]) != 2:
        return None
    negated, first = rotated.args[0]
    if not _is(negated, aten.neg.default):
        return None
    half = value.meta["val"].shape[-1] // 2
    if _is_half(negated.args[0], value, half, upper=True) and _is_half(first, value, half, upper=False):
        return Rope(value, cos, sin)
    return None


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _is_half(node: Any, value: fx.Node, half: int, upper: bool) -> bool:
    if not _is(node, aten.slice.Tensor) or node.args[0] is not value or node.args[1] not in (-1, 3):
        return False
    start, end = (*node.args[2:], None, None)[:2]
    return start == half if upper else start in (0, None) and end == half


def narrow_rope(
    module: fx.GraphModule, rope: Rope, value: fx.Node, pairs: Tensor, before: fx.Node
) -> fx.Node:
    """Rotate `value` [B, heads, T, 2P] whose head h holds pairs `pairs`[h] ([heads, P]) of the original D/2.

    cos and sin, shared by all heads before, are gathered per head.
    """
    heads, count = pairs.shape
    half = rope.value.meta["val"].shape[-1] // 2
    channels = torch.cat([pairs, pairs + half], dim=-1).flatten()
    index = constant(module, channels, before, "rope_pairs")

    def per_head(table: fx.Node) -> fx.Node:
        picked = call(module, before, aten.index_select.default, table, -1, index, like=rope.value)
        split = call(module, before, aten.unflatten.int, picked, -1, [heads, 2 * count], like=rope.value)
        # [B, 1, T, heads, 2P] -> [B, heads, T, 2P]
        squeezed = call(module, before, aten.squeeze.dim, split, 1, like=rope.value)
        return call(module, before, aten.transpose.int, squeezed, 1, 2, like=rope.value)

    def part(start: int, end: int) -> fx.Node:
        return call(module, before, aten.slice.Tensor, value, -1, start, end, like=rope.value)

    negated = call(module, before, aten.neg.default, part(count, 2 * count), like=rope.value)
    rotated = call(module, before, aten.cat.default, [negated, part(0, count)], -1, like=rope.value)
    straight = call(module, before, aten.mul.Tensor, value, per_head(rope.cos), like=rope.value)
    crossed = call(module, before, aten.mul.Tensor, rotated, per_head(rope.sin), like=rope.value)
    return call(module, before, aten.add.Tensor, straight, crossed, like=rope.value)
