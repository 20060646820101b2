"""What the ONNX lowering can express, and why not the rest. Needs neither onnx nor ONNX Runtime."""

from kvcc.runtime.graph import Program
from kvcc.runtime.ops import CACHED_ATTENTION
from kvcc.runtime.plan import LayerPlan, Plan


def why_not(plan: Plan, graph: Program) -> str | None:
    """Why a compiled model cannot be lowered to ONNX, in one line; None where it can."""
    if plan.dtype != "float32":
        return f"the model is {plan.dtype}; ONNX Runtime's CPU kernels want float32"
    if any(node.op == CACHED_ATTENTION and node.args[4] is not None for node in graph.nodes):
        return "the model's attention has learned sinks, which ONNX's operator lacks"
    for index, layer in enumerate(plan.layers):
        if reason := _layer(layer):
            return f"layer {index} {reason}"
    if len({layer.policy for layer in plan.layers}) > 1:
        return "its layers have windows of different sizes"
    return None


def _layer(layer: LayerPlan) -> str | None:
    if layer.window:
        return "attends over a sliding window"
    if layer.select == "request":
        return "chooses K channels for each prompt (think, mode: request)"
    if layer.salient:
        return "stores salient tokens otherwise (zipcache), and graphs do not measure saliency"
    for side in "kv":
        if not any(getattr(head, side).channels for head in layer.heads):
            return f"stores nothing of {side.upper()} in pages"
    return None
