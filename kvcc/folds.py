"""Exact and approximate rewrites of the weights around attention: what folds do to K and V for every token."""

import torch
from torch import Tensor, fx

from kvcc.errors import PassError
from kvcc.graph import attention_nodes
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation
from kvcc.profile import Profile
from kvcc.rope import match_rope, narrow_rope
from kvcc.runtime.plan import HeadPlan
from kvcc.surgery import (
    Projection,
    attribute,
    call,
    input_projection,
    output_projection,
    project,
    set_linear,
    tidy,
)

aten = torch.ops.aten


def drop_pairs(compilation: Compilation, index: int, kept: Tensor) -> int:
    """Keep RoPE pairs `kept` ([Hkv, P], of D/2), or plain channels in a model without RoPE, in q and k.

    Returns the new K width. The attention scale stays the original 1/√D. Raises PassError where rows cannot leave
    the weights: QK-norm needs all channels, and partial or unknown rotations are not narrowed.
    """
    module = compilation.graph.module
    attention = attention_nodes(module)[index]
    layer = compilation.plan.layers[index]
    group = layer.q_heads // layer.kv_heads
    width = _narrow(module, attention, 1, kept, index)
    _narrow(module, attention, 0, kept.repeat_interleave(group, 0), index)
    tidy(module)
    heads = tuple(
        HeadPlan(k=Side((Plane(h.k.planes[0].bits, width),), h.k.groups, h.k.group_size), v=h.v)
        for h in layer.heads
    )
    compilation.update(index, k_dim=width, heads=heads, elements=layer.model_elements)
    return width


def _narrow(module: fx.GraphModule, attention: fx.Node, which: int, kept: Tensor, index: int) -> int:
    value = attention.args[which]
    assert isinstance(value, fx.Node)
    rope = match_rope(value)
    source = rope.value if rope else value
    projection = input_projection(module, source)
    if projection is None:
        raise PassError(
            f"layer {index}: {'QK'[which]} passes through more than a projection and full half-split RoPE "
            "(QK-norm or a partial rotation), so its channels cannot leave the weights; use mode: slice"
        )
    half = source.meta["val"].shape[-1] // 2
    channels = torch.cat([kept, kept + half], -1) if rope else kept  # [heads, width]
    rows = projection.index.gather(1, channels)
    narrow = project(module, projection, rows, source, attention)
    if rope:
        narrow = narrow_rope(module, rope, narrow, kept, attention)
    narrow.meta["val"] = value.meta["val"][..., : channels.shape[1]]
    attention.update_arg(which, narrow)
    return channels.shape[1]


def value_projection(compilation: Compilation, index: int) -> Projection:
    """W_v of a layer. Raises PassError when it cannot be found."""
    module = compilation.graph.module
    found = input_projection(module, attention_nodes(module)[index].args[2])  # type: ignore[arg-type]
    if found is None:
        raise PassError(
            f"layer {index}: V is not the plain output of a linear projection, so nothing can be folded"
        )
    return found


def output_side(compilation: Compilation, index: int) -> Projection:
    """W_o of a layer. Raises PassError when it cannot be found."""
    module, plan = compilation.graph.module, compilation.plan.layers[index]
    found = output_projection(module, attention_nodes(module)[index], plan.q_heads, plan.v_dim)
    if found is None:
        raise PassError(
            f"layer {index}: attention's output does not go straight into a linear, so nothing can be folded"
        )
    return found


def fold_value_map(
    compilation: Compilation,
    v: Projection,
    out: Projection,
    mean: Tensor,
    basis: Tensor,
    inverse: Tensor | None = None,
) -> None:
    """Rewrite W_v, b_v, W_o, b_o so that attention sees V' = (V - mean) @ basis.

    mean: [Hkv, D]; basis: [Hkv, D, D], orthogonal unless its inverse is given; all arithmetic in float64.
    """
    fold_into_values(compilation, v, mean, basis)
    fold_out_of_values(compilation, out, mean, basis.mT if inverse is None else inverse)


def fold_into_values(compilation: Compilation, v: Projection, mean: Tensor, basis: Tensor) -> None:
    """Rewrite W_v and b_v so that they give (V - mean) @ basis; mean [Hkv, D], basis [Hkv, D, D], float64."""
    module = compilation.graph.module
    w, b = _weights(module, v)
    w[v.index] = basis.mT @ w[v.index]  # [Hkv, D, hidden]
    b[v.index] = torch.einsum("hd,hde->he", b[v.index] - mean, basis)
    has_bias = v.bias is not None or bool(mean.any())
    set_linear(module, v.linear, w, b if has_bias else None)


def fold_out_of_values(
    compilation: Compilation, out: Projection, mean: Tensor, inverse: Tensor | None = None
) -> None:
    """Rewrite W_o and b_o so that they take V' @ inverse + mean (None: V' + mean) for V; as fold_into_values."""
    module = compilation.graph.module
    w, b = _weights(module, out)
    group = len(out.index) // len(mean)
    columns = w[:, out.index]  # [hidden, Hq, D]
    b = b + torch.einsum("ohd,hd->o", columns, mean.repeat_interleave(group, 0))
    if inverse is not None:
        w[:, out.index] = torch.einsum("ohd,hed->ohe", columns, inverse.repeat_interleave(group, 0))
    set_linear(module, out.linear, w, b if out.bias is not None or bool(mean.any()) else None)


def _weights(module: fx.GraphModule, projection: Projection) -> tuple[Tensor, Tensor]:
    """Copies of a projection's weight and bias (zeros where it has none), float64."""
    w = attribute(module, projection.weight).double().clone()
    if projection.bias is None:
        return w, torch.zeros(len(w), dtype=torch.float64)
    return w, attribute(module, projection.bias).double().clone()


def drop_value_channels(compilation: Compilation, index: int, keep_ratio: float) -> int:
    """Keep the V channels with the most variance after W_o (ThinK's appendix), for every token; returns the width.

    Widths are multiples of 8, so that they can be packed. The mean of dropped channels goes into the output bias; where
    attention sinks take a share of the weights it would be too much, so there channels count by their second moment.
    """
    module, layer = compilation.graph.module, compilation.plan.layers[index]
    attention = attention_nodes(module)[index]
    mean, moment = value_statistics(compilation, index, compilation.need_profile("think"))
    v, out = value_projection(compilation, index), output_side(compilation, index)
    wo = attribute(module, out.weight).double()
    group = layer.q_heads // layer.kv_heads
    gain = wo[:, out.index].square().sum(0).unflatten(0, (layer.kv_heads, group)).sum(1)  # [Hkv, D]
    score = moment.diagonal(dim1=1, dim2=2) * gain
    width = max(8, int(keep_ratio * layer.v_dim + 1e-9) // 8 * 8)
    if width >= layer.v_dim:
        return layer.v_dim
    kept = score.topk(width, dim=-1).indices.sort(-1).values  # [Hkv, width]
    dropped_mean = mean.scatter(1, kept, 0.0).repeat_interleave(group, 0)
    bias = torch.einsum("ohd,hd->o", wo[:, out.index], dropped_mean)
    if out.bias is not None:
        bias = bias + attribute(module, out.bias).double()

    value = attention.args[2]
    assert isinstance(value, fx.Node)
    attention.update_arg(2, project(module, v, v.index.gather(1, kept), value, attention))
    columns = out.index.gather(1, kept.repeat_interleave(group, 0)).flatten()
    flat = call(module, out.linear, torch.ops.aten.flatten.using_ints, attention, 2, like=out.linear)
    out.linear.args = (flat, *out.linear.args[1:])
    set_linear(module, out.linear, wo[:, columns], bias)
    tidy(module)
    attention.meta["val"] = attention.meta["val"][..., :width]
    heads = tuple(
        HeadPlan(k=h.k, v=Side((Plane(h.v.planes[0].bits, width),), h.v.groups, width)) for h in layer.heads
    )
    compilation.update(index, v_dim=width, heads=heads, elements=layer.model_elements)
    return width


def value_statistics(compilation: Compilation, index: int, profile: Profile) -> tuple[Tensor, Tensor]:
    """Mean [H, D] of V as the graph has it now, and covariance [H, D, D].

    With attention sinks zero and the second moment: weights that do not sum to one would lose part of a mean.
    """
    mean, moment = profile.v_mean(index), profile.v_cov(index)
    if compilation.specs()[index].has_sinks:
        mean, moment = torch.zeros_like(mean), profile.vv(index)
    if index in compilation.value_maps:
        removed, basis = compilation.value_maps[index]
        mean = torch.einsum("hd,hde->he", mean - removed, basis)
        moment = basis.mT @ moment @ basis
    return mean, moment
