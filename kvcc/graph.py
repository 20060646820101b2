"""The Graph: a whole model as one torch.fx module with one `kvcc::attention` node per attention layer."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kvcc.runtime.identity import ModelIdentity

aten = torch.ops.aten
_ROOT = "model."  # where capture puts the model in the exported module


@torch.library.custom_op("kvcc::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Plain causal attention: the marker of a layer in a Graph, and its exact meaning.

    q: [B, Hq, T, D], k: [B, Hkv, T, D], v: [B, Hkv, T, Dv]; mask: bool [B, 1, T, T], True = keep, which
    already contains causality and the window, or None for causal attention over the last `window` tokens
    (0: all); sinks: [Hq] logits that take a share of the softmax, or None; softcap: tokens' logits become
    softcap * tanh(logit / softcap) (0: as they are). Returns [B, T, Hq, Dv], contiguous, of q's dtype. Rows
    with nothing to keep are zero.
    """
    if mask is None:
        mask = causal_mask(q.shape[2], window, q.device)[None, None]
    if sinks is None and not softcap:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    else:
        out = _explicit(q, k, v, mask, sinks, scale, softcap)
    out = out.masked_fill(~mask.any(-1, keepdim=True), 0)  # SDPA leaves NaN there on some devices
    return out.transpose(1, 2).contiguous()


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def causal_mask(length: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """bool [length, length], True = keep: a token sees itself and earlier ones, `window` of them if not 0."""
    token = torch.arange(length, device=device)
    distance = token[:, None] - token[None, :]
    keep = distance >= 0
    return keep & (distance < window) if window else keep


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = (q.float() @ k.float().transpose(2, 3)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        extra = sinks.float()[None, :, None, None].expand(logits.shape[0], -1, logits.shape[2], 1)
        logits = torch.cat([logits, extra], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : k.shape[2]]
    return (weights @ v.float()).to(q.dtype)


@dataclass
class Graph:
    """A captured model.

    module: called with tokens, positions, mask (1 real, 0 padding), each [B, T] int64, and rows [M] int64
    (which places along T get logits); returns logits [B, M, V]. B, T and M are dynamic. Its code is plain:
    placeholders of those names, one output node. Every node but the output has meta["val"] (its fake value)
    and, inside the model, meta["nn_module_stack"].
    """

    module: fx.GraphModule
    model: ModelIdentity


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention layer computes. Dimensions are channels per head; window in tokens."""

    layer: int
    scale: float
    window: int  # 0 = none
    softcap: float  # 0 = none
    has_sinks: bool
    q_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    module_path: str  # "model.layers.0.self_attn", as named in the transformers model; "" when unknown


def attention_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The kvcc::attention nodes, by layer."""
    target = torch.ops.kvcc.attention.default
    nodes = module.graph.find_nodes(op="call_function", target=target)
    return sorted(nodes, key=lambda node: int(_bound(node)["layer"]))


def attention_spec(node: fx.Node) -> AttentionSpec:
    """What a kvcc::attention node computes. q, k and v need meta["val"], also where a pass narrowed them."""
    args = _bound(node)
    q, k, v = (args[name].meta["val"] for name in "qkv")
    return AttentionSpec(
        layer=args["layer"],
        scale=args["scale"],
        window=args["window"],
        softcap=args["softcap"],
        has_sinks=args["sinks"] is not None,
        q_heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        k_dim=int(k.shape[3]),
        v_dim=int(v.shape[3]),
        module_path=module_path(node),
    )


def _bound(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in torch.ops.kvcc.attention.default._schema.arguments]
    return dict(zip(names, node.args)) | node.kwargs


def module_path(node: fx.Node) -> str:
    """Path of the transformers module a node came from, "" when unknown."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return ""
    path = str(stack[-1][0])
    return path.removeprefix(_ROOT) if path.startswith(_ROOT) else ""


def clean(module: fx.GraphModule) -> fx.GraphModule:
    """Remove what torch.export leaves behind and inference does not need; results and meta stay the same.

    Gone are metadata assertions and input guards; dropout; casts, slices, copies and arithmetic that change
    nothing; writes in place to values nobody else sees; dead code. Changes `module` and returns it.
    """
    for node in list(module.graph.nodes):
        _make_functional(node)
        if _is_check(node):
            if not node.users:
                module.graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return module


def _is_check(node: fx.Node) -> bool:
    if node.op == "call_module":
        return "guards" in str(node.target)
    return node.target is aten._assert_tensor_metadata.default


def _is_identity(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    target, kwargs = node.target, node.kwargs
    args: tuple[Any, ...] = node.args
    if target in (aten.alias.default, aten.detach.default, aten.detach_.default):
        return True
    if target is aten.dropout.default:
        return bool(args[1] == 0 or not args[2])
    if target in (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default):
        return _same_kind(node, args[0]) and not _copies(node)
    if target is aten.slice.Tensor:
        defaults: tuple[Any, ...] = (None, None, 1)
        start, end, step = args[2:] + defaults[len(args) - 2 :]
        return bool(start in (None, 0) and end in (None, sys.maxsize) and step == 1 and not kwargs)
    if (target, _number(args[1:])) in ((aten.mul.Tensor, 1), (aten.add.Tensor, 0)):
        return _same_kind(node, args[0]) and not kwargs
    if target is aten.contiguous.default:
        return isinstance(args[0], fx.Node) and args[0].target is torch.ops.kvcc.attention.default
    return False


def _number(args: tuple[Any, ...]) -> float | None:
    """The one argument, if it is a number."""
    return args[0] if len(args) == 1 and isinstance(args[0], (int, float)) else None


def _make_functional(node: fx.Node) -> None:
    """Turn `x.op_(…)` into `op(x, …)` where nobody else sees the new x: passes need not think of writes."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    if (
        packet is None
        or target._overloadname not in packet.overloads()
        or not _seen_last_by(node.args[0], node)
    ):
        return
    node.target = getattr(packet, target._overloadname)


def _seen_last_by(value: Any, node: fx.Node) -> bool:
    """Whether nobody uses `value`, or what it shares memory with, after `node` or through another name."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        others = [user for user in value.users if user is not node]
        # Of several results (topk, split) each has its own memory, so the others do not matter.
        if isinstance(value.meta["val"], Tensor) and any(user > node or _aliases(user) for user in others):
            return False
        if not _aliases(value):
            return True
        node, value = value, value.args[0]
    return False  # a weight or an input


def _aliases(node: fx.Node) -> bool:
    """Whether a node's result may share memory with what it is made from."""
    if isinstance(node.target, torch._ops.OpOverload):
        return any(argument.alias_info is not None for argument in node.target._schema.arguments)
    return node.op != "output"  # an item of several results, most often


def _same_kind(node: fx.Node, source: Any) -> bool:
    new, old = node.meta["val"], source.meta["val"]
    return bool(new.dtype == old.dtype and new.device == old.device and new.layout == old.layout)


def _copies(node: fx.Node) -> bool:
    """Whether a cast asks for a fresh tensor or another memory format."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = dict(zip([a.name for a in schema], node.args)) | node.kwargs
    return bool(bound.get("copy")) or bound.get("memory_format") not in (None, torch.preserve_format)


def render(module: fx.GraphModule) -> str:
    """A stable short text: a line a node with its number, operation, arguments, dtype, shape, module path.

    Symbolic sizes are written as the names they get in order of appearance (s0, s1, …).
    """
    numbers: dict[fx.Node, str] = {}
    symbols: dict[str, str] = {}
    lines = []
    for index, node in enumerate(module.graph.nodes):
        numbers[node] = f"%{index}"
        args = [_text(a, numbers) for a in node.args]
        args += [f"{name}={_text(a, numbers)}" for name, a in node.kwargs.items()]
        parts = [
            f"{numbers[node]} = {_operation(node)}({', '.join(args)})",
            _shape(node, symbols),
            module_path(node),
        ]
        lines.append("  ".join(part for part in parts if part))
    return "\n".join(lines) + "\n"


def _operation(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return f"{node.op} {node.target}" if node.op == "placeholder" else "output"
    if node.op == "get_attr":
        return f"get {node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removeprefix("aten.").removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _text(value: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(v, numbers) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    if value == sys.maxsize:
        return "end"
    return str(value).removeprefix("torch.")


def _shape(node: fx.Node, symbols: dict[str, str]) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    sizes = ", ".join(_size(size, symbols) for size in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def _size(size: Any, symbols: dict[str, str]) -> str:
    if isinstance(size, int):
        return str(size)
    return symbols.setdefault(str(size), f"s{len(symbols)}")
