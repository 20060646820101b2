"""Attention with several KV heads taken as one wide head, so that their channels can share a basis."""

from typing import Any

import torch
from torch import Tensor, fx

from kvcc.errors import PassError
from kvcc.graph import attention_nodes
from kvcc.passes.contract import Compilation
from kvcc.runtime.plan import HeadPlan, LayerPlan, Plane, Side
from kvcc.surgery import call, constant

aten = torch.ops.aten


def join_heads(compilation: Compilation, index: int, count: int, back: Tensor) -> None:
    """Make one KV head of every `count` of layer `index`: K and V of `count` heads stand side by side.

    Queries are zero in other heads' channels, so logits stay what they were. `back` [H / count, count * E, count * E]
    brings what attention gives from the coordinates in which V will be stored to V's own, of which a query head takes
    its KV head's part. The arithmetic of attention grows `count`-fold. The layer's plan becomes exact pages of the
    wide heads. Raises PassError when `count` does not divide the KV heads.
    """
    module, layer = compilation.graph.module, compilation.plan.layers[index]
    check_joint_heads(index, layer, count)
    node = attention_nodes(module)[index]
    node.update_arg(0, _spread(module, node, layer, count))
    for side in (1, 2):
        node.update_arg(side, _side_by_side(module, node, side, count))
    _split(module, node, layer, back.unflatten(2, (count, layer.v_dim)).transpose(1, 2).flatten(0, 1))
    bits = layer.heads[0].k.planes[0].bits
    k_dim, v_dim, wide = count * layer.k_dim, count * layer.v_dim, layer.kv_heads // count
    head = HeadPlan(
        k=Side((Plane(bits, k_dim),), "tokens", layer.page), v=Side((Plane(bits, v_dim),), "channels", v_dim)
    )
    compilation.update(index, kv_heads=wide, k_dim=k_dim, v_dim=v_dim, heads=(head,) * wide)


def check_joint_heads(index: int, layer: LayerPlan, count: int) -> None:
    """Raise PassError unless `count` divides a layer's KV heads."""
    if layer.kv_heads % count:
        usable = ", ".join(str(n) for n in range(1, layer.kv_heads + 1) if layer.kv_heads % n == 0)
        raise PassError(
            f"layer {index}: joint_heads {count} does not divide {layer.kv_heads} KV heads; use {usable}"
        )


def _spread(module: fx.GraphModule, node: fx.Node, layer: LayerPlan, count: int) -> fx.Node:
    """Queries [B, Hq, T, count * D]: each at its KV head's place in the wide head, zero elsewhere."""
    q: Any = node.args[0]
    wide, group = layer.kv_heads // count, layer.q_heads // layer.kv_heads
    place = torch.eye(count, dtype=q.meta["val"].dtype)[:, None, None, :, None]
    heads = call(module, node, aten.unflatten.int, q, 1, [wide, count, group], like=q)
    heads = call(module, node, aten.unsqueeze.default, heads, 5, like=q)  # [B, wide, count, group, T, 1, D]
    spread = call(module, node, aten.mul.Tensor, heads, constant(module, place, node, "own_head"), like=q)
    spread = call(module, node, aten.flatten.using_ints, spread, 5, 6, like=q)
    spread = call(module, node, aten.flatten.using_ints, spread, 1, 3, like=q)
    spread.meta["val"] = q.meta["val"].repeat(1, 1, 1, count)
    return spread


def _side_by_side(module: fx.GraphModule, node: fx.Node, side: int, count: int) -> fx.Node:
    """K or V [B, H / count, T, count * D]."""
    x: Any = node.args[side]
    heads = call(module, node, aten.unflatten.int, x, 1, [-1, count], like=x)
    heads = call(module, node, aten.transpose.int, heads, 2, 3, like=x)
    joined = call(module, node, aten.flatten.using_ints, heads, 3, 4, like=x)
    joined.meta["val"] = x.meta["val"][:, ::count].repeat(1, 1, 1, count)
    return joined


def _split(module: fx.GraphModule, node: fx.Node, layer: LayerPlan, back: Tensor) -> None:
    """Let whoever reads attention read [B, T, Hq, E], each query head's result by the table of its KV head."""
    readers, value = list(node.users), node.meta["val"]
    first = readers[0]
    table = constant(module, back.to(value.dtype), first, "own_values")  # [H, count * E, E]
    heads = call(module, first, aten.unflatten.int, node, 2, [layer.kv_heads, -1], like=node)
    own = call(module, first, aten.matmul.default, heads, table, like=node)
    out = call(module, first, aten.flatten.using_ints, own, 2, 3, like=node)
    node.replace_all_uses_with(out, delete_user_cb=readers.__contains__)
    out.meta["val"] = value
    node.meta["val"] = value.repeat(1, 1, 1, back.shape[1] // back.shape[2])
