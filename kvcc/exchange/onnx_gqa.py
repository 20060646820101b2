"""ONNX Runtime's own INT8 cache: `com.microsoft::GroupQueryAttention` under static scales of channels.

It quantises every token, the newest and the first too: there are neither sinks nor a recent window, so this variant has
to be asked for, and its tokens are not those of the runtime. Its levels are whole steps, those of unit steps lie half
a step higher. K and V are moved down by that half before they are stored, so that codes are the same; attention does
not notice it of K, as every key is moved alike, and gets it back of V, as weights sum to 1.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from kvcc.exchange.onnx_graphs import Traced, rewired
from kvcc.kernels.layout import Side
from kvcc.runtime.artifact import Artifact, module
from kvcc.runtime.plan import LayerPlan

SAMPLE = 3, 5, 7  # sequences, new tokens and slots of the tensors that the graph is traced with


def why_not_gqa(artifact: Artifact) -> str | None:
    """Why a cache cannot be that of the operator, beyond `why_not`; None where it can."""
    wanted = "keeps 8 bits under static scales of channels, as the pass int8 has them"
    for index, layer in enumerate(artifact.plan.layers):
        where = f"layer {index}: GroupQueryAttention"
        if layer.k_dim != layer.v_dim:
            return f"{where} wants K and V of equal width"
        if not all(_whole_bytes(side, layer) for head in layer.heads for side in (head.k, head.v)):
            return f"{where} {wanted}"
        if layer.select != "basis" or layer.mean_correction or key_scales(artifact, index) is None:
            return f"{where} {wanted}"
    return None


def _whole_bytes(side: Side, layer: LayerPlan) -> bool:
    (first, *others) = side.planes or (None,)
    return (
        first is not None
        and not others
        and (first.bits, first.channels, side.steps, side.levels) == (8, layer.k_dim, "unit", "uniform")
        and not side.token_scales
        and not side.page_means
    )


def key_scales(artifact: Artifact, index: int) -> Tensor | None:
    """Steps of K's channels [H, D], of a basis that only scales; None of another."""
    basis = artifact.tables[f"layers.{index}.k_basis"]
    scales = basis.diagonal(dim1=1, dim2=2)
    return (
        None if scales.shape[1] != basis.shape[1] or (torch.diag_embed(scales) != basis).any() else 1 / scales
    )


def gqa_states(artifact: Artifact) -> dict[str, list[str | int]]:
    """Names and shapes of the cache's int8 tensors."""
    return {
        f"{index}.{side}": ["batch", layer.kv_heads, "slots", layer.k_dim]
        for index, layer in enumerate(artifact.plan.layers)
        for side in "kv"
    }


class _Step(nn.Module):
    """tokens [B, L], counts [B] of them, lengths [B] before, caches -> logits [B, V] of last tokens, caches."""

    def __init__(self, graph: fx.GraphModule, artifact: Artifact) -> None:
        super().__init__()
        self.model, self.layers = rewired(graph, self.attend), artifact.plan.layers
        for index in range(len(self.layers)):
            scales = key_scales(artifact, index)
            assert scales is not None  # why_not_gqa has looked
            self.register_buffer(f"scales{index}", scales)

    def forward(
        self, tokens: Tensor, counts: Tensor, lengths: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        batch, length = tokens.shape
        positions = (lengths[:, None] + torch.arange(length)).reshape(1, -1)
        step: dict[str, Any] = {"past": past, "batch": batch, "made": []}
        step["last"] = (lengths + counts - 1).to(torch.int32)
        step["total"] = (lengths.max() + length).to(torch.int32)
        rows = torch.arange(batch) * length + counts - 1
        logits = self.model(tokens.reshape(1, -1), positions, rows, step)
        return logits[0], *step["made"]

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
        plan, scales = self.layers[layer], getattr(self, f"scales{layer}")
        past = step["past"][2 * layer : 2 * layer + 2]
        k, v = k - scales[:, None] / 2, v - 0.5
        q, k, v = (x[0].transpose(0, 1).flatten(1).unflatten(0, (step["batch"], -1)) for x in (q, k, v))
        out, *made = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [
                q,
                k,
                v,
                *past,
                step["last"],
                step["total"],
                *[None] * 5,
                scales.flatten(),
                torch.ones(scales.numel()),
            ],
            {
                "num_heads": plan.q_heads,
                "kv_num_heads": plan.kv_heads,
                "scale": scale,
                "softcap": softcap,
                "k_quant_type": "PER_CHANNEL",
                "v_quant_type": "PER_CHANNEL",  # as ONNX Runtime wants both alike
                "kv_cache_bit_width": 8,
            },
            dtypes=[q.dtype, torch.int8, torch.int8],
            shapes=[q.shape, *(x.shape for x in past)],
            version=1,
        )
        step["made"] += made
        return (out + 0.5).flatten(0, 1).unflatten(1, (plan.q_heads, -1))[None]


def traced_step(artifact: Artifact) -> Traced:
    """The one graph, for prompts and single tokens, ready for export."""
    batch, length, slots = SAMPLE
    shapes = {name: [batch, shape[1], slots, shape[3]] for name, shape in gqa_states(artifact).items()}
    axes = {0: "batch", 2: "slots"}
    return Traced(
        _Step(module(artifact, "cpu"), artifact),
        {
            "tokens": torch.zeros(batch, length, dtype=torch.int64),
            "counts": torch.full((batch,), 2),
            "lengths": torch.zeros(batch, dtype=torch.int64),
        }
        | {f"past.{name}": torch.zeros(shape, dtype=torch.int8) for name, shape in shapes.items()},  # type: ignore[arg-type]
        {"tokens": {0: "batch", 1: "length"}, "counts": {0: "batch"}, "lengths": {0: "batch"}}
        | {f"past.{name}": axes for name in shapes},
        {"logits": {0: "batch"}} | {f"present.{name}": axes for name in shapes},
    )
