"""Capture of a whole model as a Graph, by torch.export and transformers' attention interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers
from torch import Tensor, fx, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvcc.errors import UnsupportedModel
from kvcc.frontend.cacheable import check_cacheable
from kvcc.frontend.loading import LoadedModel
from kvcc.frontend.quiet import first_line, quiet
from kvcc.frontend.refusal import refusal
from kvcc.graph import Graph, clean

# What transformers passes to an attention function and _attention honours, or that changes nothing.
_NEUTRAL = {
    "scaling", "sliding_window", "softcap", "s_aux", "dropout", "is_causal", "position_ids", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "layer_idx",
    "cache_position", "num_items_in_batch", "logits_to_keep",
}  # fmt: skip


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """kvcc's entry in transformers' attention interface: one marker node, or a refusal."""
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedModel(f"{type(module).__name__} does not know its layer index")
    for name, argument in kwargs.items():
        if name not in _NEUTRAL and argument is not None:
            raise UnsupportedModel(f"layer {layer}: attention argument {name} is not supported")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModel(f"layer {layer}: attention is not causal")
    scaling = kwargs.get("scaling")
    out = torch.ops.kvcc.attention(
        query,
        key,
        value,
        attention_mask,
        kwargs.get("s_aux"),
        layer,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        int(kwargs.get("sliding_window") or 0),
        float(kwargs.get("softcap") or 0.0),
    )
    return out, None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' bool mask, always written out: what a graph needs must not depend on the traced batch."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register("kvcc", _attention)
AttentionMaskInterface.register("kvcc", _mask)


class _Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        out = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=rows,
        )
        return out.logits


def capture(loaded: LoadedModel) -> Graph:
    """Export the model to a Graph with dynamic batch, length and rows.

    The model keeps its own attention and experts implementation afterwards; weights are shared with it, not
    copied. Raises UnsupportedModel, with the reason, when the model does not use transformers' attention
    interface, cannot be exported, or computes something a KV cache cannot reproduce token by token.
    """
    with _implementation(loaded, "kvcc", "batched_mm"), torch.no_grad():
        module = _export(loaded)
    module = _plain(clean(module))
    check_cacheable(module, loaded.identity)
    return Graph(module, loaded.identity)


@contextmanager
def _implementation(loaded: LoadedModel, attention: str, experts: str | None = None) -> Iterator[None]:
    """The model with another attention (and experts) implementation."""
    model = cast(transformers.PreTrainedModel, loaded.model)
    before, experts_before = model.config._attn_implementation, model.get_experts_implementation()
    with quiet():
        model.set_attn_implementation(attention)
        if experts is not None and model._can_set_experts_implementation():
            model.set_experts_implementation(experts)
    try:
        if model.config._attn_implementation != attention:
            raise refusal(loaded.identity, "does not use transformers' attention interface")
        yield
    finally:
        with quiet():
            model.set_attn_implementation(before)
            if experts is not None and model._can_set_experts_implementation():
                model.set_experts_implementation(experts_before)


def _export(loaded: LoadedModel) -> fx.GraphModule:
    batch, length, rows = (torch.export.Dim(name) for name in ("batch", "length", "rows"))
    # Sizes that no weight has, so that none is taken for another.
    tokens = torch.ones(3, 11, dtype=torch.int64)
    positions = torch.arange(11).expand(3, 11).contiguous()
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[0, :4] = 0
    plane = {0: batch, 1: length}
    try:
        with quiet():
            program = torch.export.export(
                _Wrapper(loaded.model),
                (tokens, positions, mask, torch.arange(2, 7)),
                dynamic_shapes=[plane, plane, plane, {0: rows}],
                strict=False,
            )
    except UnsupportedModel as error:
        raise refusal(loaded.identity, f"cannot be compiled: {error}") from error
    except Exception as error:  # torch.export raises many kinds; all mean that the model cannot be captured
        raise refusal(loaded.identity, f"cannot be exported: {first_line(error)}") from error
    return program.module()


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph as an ordinary GraphModule, without torch.export's hooks and calling convention."""
    (output,) = module.graph.find_nodes(op="output")
    (logits,) = output.args[0]
    output.args = (logits,)
    module.graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, module.graph, "Graph")


def reference_logits(loaded: LoadedModel, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """transformers' own logits [B, T, V] with its eager attention, for tests and checks.

    tokens, mask (1 real, 0 padding), positions: [B, T] int64. Rows at padding mean nothing.
    """
    with _implementation(loaded, "eager"), torch.no_grad():
        out = loaded.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return cast(Tensor, out.logits)
