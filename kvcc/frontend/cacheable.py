"""Whether a captured graph computes what a KV cache can reproduce token by token; if not, why."""

from typing import Any, cast

import torch
from torch import Tensor, fx

from kvcc.frontend.refusal import refusal
from kvcc.graph import attention_nodes, attention_spec, causal_mask
from kvcc.runtime.identity import ModelIdentity


@torch.no_grad()
def check_cacheable(module: fx.GraphModule, identity: ModelIdentity) -> None:
    """Raise UnsupportedModel unless a cache of K and V can stand for the past of the captured `module`."""
    _check_nodes(module, identity)
    _check_masks(module, identity)
    _check_tokenwise(module, identity)


def _check_nodes(module: fx.GraphModule, identity: ModelIdentity) -> None:
    """One attention node a layer, plain operators only, one width per layer."""
    layers = [attention_spec(node).layer for node in attention_nodes(module)]
    if layers != list(range(identity.layers)):
        raise refusal(
            identity,
            f"calls the attention interface in layers {layers}, not once in each of {identity.layers} layers",
        )
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "kvcc"):
            raise refusal(identity, f"uses the operator {node.target}, which artifacts cannot hold")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise refusal(
                identity, f"uses the control-flow operator {node.target}, which artifacts cannot hold"
            )


def _check_masks(module: fx.GraphModule, identity: ModelIdentity) -> None:
    """Each layer's mask is causal, within its window, and without padding: what the runtime will compute."""
    specs = {node: attention_spec(node) for node in attention_nodes(module)}
    # Windows beyond this would need gigabytes of mask; the smaller ones show that the rule holds.
    windows = [spec.window for spec in specs.values() if 0 < spec.window <= 4096]
    length, padding = max(windows, default=0) + 9, 3
    real = torch.ones(1, length, dtype=torch.int64)
    real[0, :padding] = 0
    inputs = {
        "tokens": torch.ones(1, length, dtype=torch.int64),
        "positions": (torch.arange(length) - padding).clamp(min=0)[None],
        "mask": real,
        "rows": torch.tensor([0]),
    }
    known: dict[fx.Node, Any] = {}
    for node, spec in specs.items():
        mask = node.args[3]
        if mask is None:
            continue
        got = _evaluate(module, cast(fx.Node, mask), inputs, known)[0, 0, padding:]
        want = causal_mask(length, spec.window)[padding:] & (real[0] == 1)
        if not torch.equal(got, want):
            raise refusal(
                identity, f"attends in layer {spec.layer} to other tokens than the past (and its window)"
            )


def _evaluate(
    module: fx.GraphModule, node: fx.Node, inputs: dict[str, Tensor], known: dict[fx.Node, Any]
) -> Any:
    """The value of one node, computing only what it depends on."""
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        if one not in needed and one not in known:
            needed.add(one)
            stack.extend(one.all_input_nodes)
    interpreter = fx.Interpreter(module)
    interpreter.env = known
    for one in module.graph.nodes:
        if one in needed:
            known[one] = inputs[str(one.target)] if one.op == "placeholder" else interpreter.run_node(one)
    return known[node]


class _LocalAttention(fx.Interpreter):
    """Runs a graph with something of each token's own q, k and v in place of attention."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not torch.ops.kvcc.attention.default:
            return super().call_function(target, args, kwargs)
        q, k, v = args[:3]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        # Sums over rotated channels depend on the position, which products of q and k of one token would not.
        gain = 2 + torch.tanh(q.sum(-1, keepdim=True)) + torch.tanh(k.sum(-1, keepdim=True))
        return (v * gain).transpose(1, 2).contiguous()


def _check_tokenwise(module: fx.GraphModule, identity: ModelIdentity) -> None:
    """Outside attention, a token's logits depend on that token and its position alone.

    This is what lets a cache of K and V stand for the past; convolutions, recurrent states, and positions
    taken from the mask or the length break it.
    """
    length = min(6, identity.context_length)
    picked = torch.Generator().manual_seed(0)
    tokens = torch.randint(identity.vocab_size, (1, length), generator=picked)
    positions = torch.randperm(identity.context_length, generator=picked)[None, :length]
    ones, rows = torch.ones(1, length, dtype=torch.int64), torch.arange(length)
    together = _LocalAttention(module).run(tokens, positions, ones, rows)[0].float()
    masked = _LocalAttention(module).run(tokens, positions, ones.tril(-1), rows)[0].float()
    alone = torch.cat(
        [
            _LocalAttention(module).run(tokens[:, i : i + 1], positions[:, i : i + 1], ones[:, :1], rows[:1])[
                0
            ]
            for i in range(length)
        ]
    ).float()
    tolerance = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 2e-1}[identity.dtype] * float(
        together.abs().max()
    )
    for other in (masked, alone):
        if not torch.allclose(together, other, rtol=0, atol=tolerance):
            raise refusal(
                identity,
                "mixes tokens outside attention, or takes positions from elsewhere than position_ids",
            )
