"""Replaces chains of small operators by fused ones, and linear layers by layers of stored weights, when a graph loads.

Graphs come from `torch.export`, in which every transformers decoder writes its norms, rotary positions and gates with
the same few chains. What matches none of them stays as it is.
"""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from kvcc.kernels.linear import WeightType, pack
from kvcc.kernels.step import Activation
from kvcc.runtime import fused

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.type_as.default)
ACTIVATIONS: dict[Any, Activation] = {
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.relu.default: "relu",
}
STORED: dict[torch.dtype, WeightType] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}  # how `pack` keeps a weight as it is


def fuse(module: fx.GraphModule, weights: WeightType | None = None) -> fx.GraphModule:
    """Rewrite `module` in place; `weights` says how its linear layers store their weights (None: as they are)."""
    for rewrite in (_rms_norm, _rotate, _gate):
        for node in list(module.graph.nodes):
            if (
                node.op == "call_function" and not node.kwargs
            ):  # arguments by name change what a chain computes
                rewrite(node)
    module.graph.eliminate_dead_code()
    for index, node in enumerate(module.graph.find_nodes(op="call_function", target=aten.linear.default)):
        _linear(module, node, f"linear{index}", weights)
    module.graph.eliminate_dead_code()
    used = {node.target for node in module.graph.find_nodes(op="get_attr")}
    for name in [n for n, _ in module.named_buffers(recurse=False) if n not in used]:
        delattr(module, name)
    module.recompile()
    return module


def weight_of(module: fx.GraphModule, node: Any) -> Tensor:
    """The tensor that a get_attr node names."""
    tensor: Tensor = attrgetter(str(node.target))(module)
    return tensor


def replace(node: Any, function: Any, args: tuple[Any, ...]) -> None:
    """Let `function(*args)` take the place of `node`."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args)
    node.replace_all_uses_with(new)


def _rms_norm(root: Any) -> None:
    """x * rsqrt(mean(x²) + eps), cast, times weight or 1 + weight, cast; from its rsqrt on."""
    if root.target is aten.rms_norm.default:
        x, shape, weight, eps = (*root.args, None, None)[:4]
        if isinstance(shape, list | tuple) and len(shape) == 1 and isinstance(eps, float):
            replace(root, fused.rms_norm, (x, weight, eps, 0, None))
        return
    if root.target is not aten.rsqrt.default or len(root.users) != 1:
        return
    found = _mean_square(root.args[0])
    end = next(iter(root.users))
    if found is None or not _calls(end, aten.mul.Tensor) or set(end.args) != {found[0], root}:
        return
    wide, eps = found
    x = _uncast(wide)
    dtype = None if x is wide else torch.float32
    weight, offset = None, 0
    while len(end.users) == 1:
        user = next(iter(end.users))
        if _is_cast(user) and user.args[0] is end:
            dtype = user.args[1] if isinstance(user.args[1], torch.dtype) else None
        elif _calls(user, aten.mul.Tensor) and weight is None and (scale := _scale(_other(user, end))):
            weight, offset = scale
        else:
            break
        end = user
    replace(end, fused.rms_norm, (x, weight, eps, offset, dtype))


def _mean_square(node: Any) -> tuple[Any, float] | None:
    """(x, eps) of mean(x², over the last dimension) + eps."""
    if not _calls(node, aten.add.Tensor) or not isinstance(node.args[1], float):
        return None
    mean, eps = node.args
    if not _calls(mean, aten.mean.dim) or mean.args[1:] != ([-1], True):
        return None
    square = mean.args[0]
    if _calls(square, aten.pow.Tensor_Scalar) and square.args[1] == 2:
        return square.args[0], eps
    return None


def _scale(node: Any) -> tuple[Any, int] | None:
    """(weight, 0) of a weight, (weight, 1) of one plus a weight, cast or not."""
    node, offset = _uncast(node), 0
    if _calls(node, aten.add.Tensor) and node.args[1] == 1:
        node, offset = _uncast(node.args[0]), 1
    return (node, offset) if _is_weight(node) else None


def _rotate(end: Any) -> None:
    """x * cos + cat(-second half of x, first half of x) * sin."""
    if end.target is not aten.add.Tensor or not all(_calls(a, aten.mul.Tensor) for a in end.args):
        return
    for plain, turned in (end.args, end.args[::-1]):
        for x, cos in (plain.args, plain.args[::-1]):
            for halves, sin in (turned.args, turned.args[::-1]):
                if _is_half_turn(halves, x) and isinstance(cos, fx.Node) and isinstance(sin, fx.Node):
                    replace(end, fused.rotate, (x, cos, sin))
                    return


def _is_half_turn(node: Any, x: Any) -> bool:
    if not _calls(node, aten.cat.default) or node.args[1:] not in ((-1,), (3,)) or len(node.args[0]) != 2:
        return False
    negated, first = node.args[0]
    if not _calls(negated, aten.neg.default) or not _calls(first, aten.slice.Tensor):
        return False
    second = negated.args[0]
    if not _calls(second, aten.slice.Tensor) or second.args[0] is not x or first.args[0] is not x:
        return False
    half = second.args[2]
    return first.args[1:] in ((3, 0, half), (-1, 0, half)) and second.args[3:] == (2**63 - 1,)


def _gate(end: Any) -> None:
    """activation(g) * up."""
    if end.target is not aten.mul.Tensor:
        return
    for active, up in (end.args, end.args[::-1]):
        name = activation_name(active)
        if name and len(active.users) == 1 and isinstance(up, fx.Node):
            replace(end, fused.gate, (active.args[0], up, name))
            return


def activation_name(node: Any) -> Activation | None:
    """The name of the activation that `node` computes, None when it is another operator."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in ACTIVATIONS:
        return None
    if len(node.args) != 1 or not set(node.kwargs) <= {"approximate"}:
        return None
    name = ACTIVATIONS[node.target]
    approximate = node.kwargs.get("approximate", "none")
    return "gelu_tanh" if approximate == "tanh" else name


def _linear(module: fx.GraphModule, node: Any, name: str, weights: WeightType | None) -> None:
    if node.kwargs or len(node.args) < 2:
        return
    x, weight, bias = (*node.args, None)[:3]
    if not _is_weight(weight) or (bias is not None and not _is_weight(bias)):
        return
    tensor, offset = weight_of(module, weight), None if bias is None else weight_of(module, bias)
    kind = weights or STORED.get(tensor.dtype)
    if tensor.device.type != "cpu" or kind is None or not _fits(tensor, offset):
        return
    layer = fused.Linear(pack(tensor, kind), offset)
    module.add_submodule(name, layer)
    with node.graph.inserting_before(node):
        new = node.graph.call_module(name, (x,))
    node.replace_all_uses_with(new)


def _is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _fits(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are a linear layer's weight [rows, cols] and bias [rows], which C code will read as such."""
    floats = weight.is_floating_point() and (bias is None or bias.is_floating_point())
    return (
        floats
        and weight.dim() == 2
        and weight.numel() > 0
        and (bias is None or bias.shape == weight.shape[:1])
    )


def _calls(node: Any, target: Any) -> bool:
    """Whether `node` calls `target` with no argument by name."""
    called = isinstance(node, fx.Node) and node.op == "call_function" and node.target is target
    return called and not node.kwargs


def _is_cast(node: Any) -> bool:
    called = isinstance(node, fx.Node) and node.op == "call_function" and node.target in CASTS
    return called and len(node.args) > 1


def _uncast(node: Any) -> Any:
    return node.args[0] if _is_cast(node) else node


def _other(node: Any, one: Any) -> Any:
    return node.args[1] if node.args[0] is one else node.args[0]
