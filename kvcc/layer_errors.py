"""What each layer's compression costs by itself: divergence with all other layers' caches exact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcc.measure import divergences
from kvcc.runtime import CompiledModel
from kvcc.runtime.plan import Plan

CHUNK = 64  # tokens appended at once; each attends to pages as a single one would


@dataclass(frozen=True)
class LayerError:
    """Divergence from the uncompressed model when only this layer is compressed."""

    layer: int
    kl: float  # nats, mean KL(uncompressed || compressed)


def layer_errors(
    model: CompiledModel,
    texts: Sequence[Sequence[int]],
    expected: Sequence[Tensor],
    context: int,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[LayerError, ...]:
    """One LayerError for each layer that has pages.

    `texts` are token ids; `expected` the uncompressed model's logits of tokens context … length - 1 of each
    (kvcc.measure.expected_logits). The first `context` tokens are prefilled, the rest appended in chunks.
    """
    layers = [index for index, layer in enumerate(model.plan.layers) if layer.page]
    longest = max(map(len, texts))
    found = []
    for done, layer in enumerate(layers):
        alone = replace(model, plan=only(model.plan, layer, longest), steps={})
        found.append(LayerError(layer, _divergence(alone, texts, expected, context)))
        if on_step is not None:
            on_step(done + 1, len(layers))
    return tuple(found)


def only(plan: Plan, layer: int, tokens: int) -> Plan:
    """The plan in which, up to `tokens` tokens, no other layer seals a page."""
    layers = (
        each if index == layer or not each.page else each.model_copy(update={"recent": tokens})
        for index, each in enumerate(plan.layers)
    )
    return plan.model_copy(update={"layers": tuple(layers)})


def _divergence(
    model: CompiledModel, texts: Sequence[Sequence[int]], expected: Sequence[Tensor], context: int
) -> float:
    total = count = 0.0
    for text, wanted in zip(texts, expected):
        cache = model.new_cache(1)
        parts = [model.forward([text[:context]], cache)]
        if len(text) > context + 1:
            parts.append(model.forward([text[context:-1]], cache, chunk=CHUNK, every=True))
        ours, theirs = torch.cat(parts).float().log_softmax(-1), wanted.float().log_softmax(-1)
        total += float(divergences(theirs, ours.to(theirs.device)).sum())
        count += len(wanted)
    return total / count
