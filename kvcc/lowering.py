"""From the captured graph to the one the runtime runs: each `kvcc::attention` becomes cached attention."""

import torch
from torch import fx

from kvcc.errors import UnsupportedModel
from kvcc.graph import attention_nodes, attention_spec
from kvcc.runtime.attention import cached_attention
from kvcc.surgery import tidy


def lower(module: fx.GraphModule) -> fx.GraphModule:
    """Replace, in place, every attention node by `cached_attention` on a new input `cache`.

    The padding mask goes: sequences are packed along the token axis, and the cache knows their lengths. Inputs
    become tokens [1, N], positions [1, N], rows [M], cache; the output is logits [1, M, V].
    Raises UnsupportedModel when the model uses the mask for anything but attention.
    """
    graph = module.graph
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    with graph.inserting_after(inputs["rows"]):
        cache = graph.placeholder("cache")
    for node in attention_nodes(module):
        spec = attention_spec(node)
        q, k, v, _, sinks = node.args[:5]
        with graph.inserting_before(node):
            cached = graph.call_function(
                cached_attention,
                (cache, q, k, v, sinks),
                {"layer": spec.layer, "scale": spec.scale, "window": spec.window, "softcap": spec.softcap},
            )
        cached.meta = dict(node.meta)
        node.replace_all_uses_with(cached)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    for user in list(inputs["mask"].users):
        if user.target is torch.ops.aten.sym_size.int:  # tokens have the same sizes
            user.replace_input_with(inputs["mask"], inputs["tokens"])
    if inputs["mask"].users:
        raise UnsupportedModel(
            "the model uses its padding mask outside attention "
            f"({', '.join(str(u.target) for u in inputs['mask'].users)}), which kvcc cannot compile"
        )
    graph.erase_node(inputs["mask"])
    tidy(module)
    return module
