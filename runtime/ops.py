"""The closed list of operators that a graph in an artifact may call.

All are pure functions of their arguments: none writes in place, draws random numbers, reads uninitialised or
foreign memory (no empty, as_strided, view.dtype), gives a result whose shape depends on values (no nonzero),
or reaches outside the process.
"""

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

CACHED_ATTENTION = "kvcc.cached_attention"

_ATEN = """
abs add.Scalar add.Tensor ceil clamp clamp.Tensor clamp_max clamp_min cos div.Scalar div.Tensor
div.Tensor_mode elu erf exp expm1 floor floor_divide gelu hardswish leaky_relu log log1p log2 log_sigmoid
maximum minimum mish mul.Scalar mul.Tensor neg pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal
relu relu6 remainder.Scalar round rsqrt rsub.Scalar sigmoid sign silu sin softplus sqrt square sub.Scalar
sub.Tensor tanh

bitwise_and.Tensor bitwise_not bitwise_or.Tensor eq.Scalar eq.Tensor ge.Scalar ge.Tensor gt.Scalar gt.Tensor
le.Scalar le.Tensor logical_and logical_not logical_or lt.Scalar lt.Tensor masked_fill.Scalar
masked_fill.Tensor ne.Scalar ne.Tensor where.Scalar where.ScalarOther where.ScalarSelf where.self

alias cat chunk clone contiguous detach expand expand_as flatten.using_ints flip movedim.int narrow permute
repeat repeat_interleave.self_int reshape reshape_as roll select.int slice.Tensor split.Tensor
split_with_sizes squeeze squeeze.dim squeeze.dims stack t tile transpose.int tril triu unbind.int
unflatten.int unsqueeze view view_as

to.device to.dtype to.dtype_layout to.other type_as

embedding gather index.Tensor index_add index_select scatter.src scatter.value scatter_add sym_size.int
take_along_dim

all.dim amax amin any.dim argmax argsort cumsum layer_norm linalg_vector_norm log_softmax.int logsumexp
max.dim mean mean.dim min.dim prod.dim_int rms_norm softmax.int sort sum sum.dim_IntList topk var.correction

addmm baddbmm bmm einsum linear matmul mm

arange arange.start arange.start_step full full_like lift_fresh_copy new_full new_ones new_zeros ones
ones_like scalar_tensor zeros zeros_like
"""
_INTEGERS = ("add", "sub", "mul", "floordiv", "mod", "neg")  # on sizes, which are Python ints

INTEGER_OPS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name) for name in _INTEGERS
}
GETITEM = "operator.getitem"  # of an operator with several results, never of a tensor
ATEN_OPS = frozenset(f"aten.{name}" if "." in name else f"aten.{name}.default" for name in _ATEN.split())
NAMES = ATEN_OPS | frozenset(INTEGER_OPS) | {GETITEM, CACHED_ATTENTION}


@cache
def resolve(name: str) -> Callable[..., Any] | None:
    """The function that `name` stands for; None when it is not on the list, or torch has no such operator."""
    if name in INTEGER_OPS:
        return INTEGER_OPS[name]
    if name == GETITEM:
        return operator.getitem
    if name == CACHED_ATTENTION:
        from kvcc.runtime.attention import cached_attention

        return cached_attention
    return overload(name)


def overload(name: str) -> "torch._ops.OpOverload | None":
    """The aten operator on the list called `name` ("aten.add.Tensor"), or None."""
    if name not in ATEN_OPS:
        return None
    _, packet, variant = name.split(".")
    found = getattr(getattr(torch.ops.aten, packet, None), variant, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def name_of(target: Any) -> str | None:
    """The name under which an artifact calls `target`; None when it may not."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name if name in ATEN_OPS else None
    return next((name for name in sorted(NAMES - ATEN_OPS) if resolve(name) is target), None)
