"""How much predictions mind errors in cached keys and values: gradients at the attention nodes.

Labels are drawn from the model's own predictions, so that the mean of g gᵀ over tokens is the Fisher information, the
second derivative of KL(model || model with errors): small errors δ of a token's key cost ½ δᵀ E[g gᵀ] δ nats.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kvcc.graph import causal_mask
from kvcc.statistics import RECENT, LayerStatistics, add_gradients
from kvcc.stored_attention import Reach, StoredAttention

ROWS = 512  # predictions of a prompt, at most, whose labels are drawn


class Gradients(fx.Interpreter):
    """Runs the graph with keys and values that are stored, as seen from later queries, as leaves of their own.

    A token counts as stored for queries more than RECENT tokens after it, unless it is one of the first `skip_first`.
    Gradients reach a layer's stored tokens through everything after that layer but other layers' stored tokens:
    those were computed while the prompt was still exact.
    """

    def __init__(self, module: fx.GraphModule, skip_first: int) -> None:
        super().__init__(module)
        self.skip_first = skip_first
        self.leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def add(
        self, layers: dict[int, LayerStatistics], ids: Sequence[int], prompt_id: str, start: int = 0
    ) -> None:
        """Add one prompt's gradients to the layers' statistics; none for a prompt without a stored token.

        `start`: the position of its first token.
        """
        length = len(ids)
        first = self.skip_first + RECENT
        if length <= first:
            return
        draw = random.Random(prompt_id)
        rows = torch.tensor(sorted(draw.sample(range(first, length), min(ROWS, length - first))))
        generator = torch.Generator().manual_seed(draw.getrandbits(62))
        self.leaves = {}
        tokens = torch.tensor([list(ids)])
        with torch.enable_grad():
            logits = self.run(tokens, start + torch.arange(length)[None], torch.ones_like(tokens), rows)
            predicted = logits[0].float().log_softmax(-1)
            labels = torch.multinomial(predicted.detach().exp(), 1, generator=generator)
            loss = -predicted.gather(1, labels).sum()
        flat = [leaf for pair in self.leaves.values() for leaf in pair]
        found = torch.autograd.grad(loss, flat)
        for number, (layer, stored) in enumerate(self.leaves.items()):
            layers[layer].grad_rows.add_(len(rows))
            k, v, k_grad, v_grad = (x.detach()[0] for x in (*stored, *found[2 * number : 2 * number + 2]))
            add_gradients(layers[layer], k, v, k_grad, v_grad, generator)
        self.leaves = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not torch.ops.kvcc.attention.default:
            return super().call_function(target, args, kwargs)
        names = (argument.name for argument in target._schema.arguments)
        return self._attend(**(dict(zip(names, args, strict=False)) | kwargs))

    def _attend(
        self,
        *,
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
        """What the node computes, of q [1, Hq, T, D], k [1, H, T, D], v [1, H, T, E], as [1, T, Hq, E]."""
        length, heads = q.shape[2], k.shape[1]
        first = length if window else min(self.skip_first, length)
        stored = tuple(x[:, :, first:].detach().requires_grad_() for x in (k, v))
        if not window:
            self.leaves[layer] = stored[0], stored[1]
        out = StoredAttention.apply(
            q[0].float().unflatten(0, (heads, -1)),
            *(x[0].float() for x in (k, v, *stored)),
            None if sinks is None else sinks.float().view(heads, -1),
            Reach(
                causal_mask(length, window, q.device) if mask is None else mask[0, 0],
                first,
                RECENT,
                scale,
                softcap,
            ),
        )
        return out.flatten(0, 1).transpose(0, 1)[None].to(q.dtype)
