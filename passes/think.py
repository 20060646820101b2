"""ThinK: drop the K channels that contribute least to query-key products."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcc.channels import allocate, by_score, eliminate, uniform
from kvcc.errors import PassError
from kvcc.folds import drop_pairs, drop_value_channels
from kvcc.graph import attention_nodes
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.rope import match_rope
from kvcc.runtime.plan import HeadPlan


class Think(Pass):
    """ThinK (Xu et al., arXiv 2407.21018): greedy query-driven pruning of K channels, stored narrow, not zeroed.

    mode `slice`: a fixed keep-set per KV head on post-RoPE K of sealed pages; sinks and the recent window keep all
    channels. What pruned channels add to logits on average (q·mean) is restored, so pages and window stay on one
    scale. mode `fold`: whole RoPE pairs leave W_q, W_k and the rotary tables, for every token (as RAP,
    arXiv 2602.02599, does): prefill becomes approximate, and cheaper. mode `request`: as published, the keep-set is
    chosen per request from the last 32 prompt queries; pages sealed later use the same set.

    score `think` is the paper's (norm of q times norm of K, calibrated unless mode is `request`); `centred` is the
    expected variance of the lost logit, Γ = E[qqᵀ] ∘ Cov(k), minimised by backward elimination with its
    off-diagonals. allocation `global` lets all KV heads of the model compete for one budget.
    `value_keep_ratio` < 1 drops V channels through W_v and W_o for every token (the paper's appendix), by their
    variance after W_o; the mean of what goes is added to the output bias.
    """

    name: ClassVar[str] = "think"
    after: ClassVar[tuple[str, ...]] = ("fold-values",)

    keep_ratio: float = Field(0.6, gt=0, le=1, description="K channels kept, of all")
    mode: Literal["slice", "fold", "request"] = "slice"
    score: Literal["think", "centred"] = "think"
    allocation: Literal["uniform", "global"] = "uniform"
    mean_correction: bool = Field(True, description="slice: restore the pruned channels' mean logit")
    value_keep_ratio: float = Field(1.0, gt=0, le=1, description="V channels kept, of all")

    def requires_profile(self) -> bool:
        return self.mode != "request" or self.value_keep_ratio < 1

    def apply(self, compilation: Compilation) -> None:
        layers = [index for index, _ in self.paged(compilation)]
        if self.mode == "request":
            self._request(compilation, layers)
        else:
            self._static(compilation, layers)
        if self.value_keep_ratio < 1:
            for index in layers:
                kept = drop_value_channels(compilation, index, self.value_keep_ratio)
                self.note(compilation, index, f"V keeps {kept} channels, for every token")

    def _request(self, compilation: Compilation, layers: list[int]) -> None:
        if self.allocation == "global":
            raise PassError(
                "think: mode request keeps the same number of channels everywhere; use allocation: uniform"
            )
        if self.score != "think":
            raise PassError("think: mode request scores channels by each prompt's queries; use score: think")
        for index in layers:
            layer = compilation.plan.layers[index]
            kept = uniform(layer.kv_heads, layer.k_dim, self.keep_ratio)
            compilation.update(index, select="request", heads=_narrowed(layer.heads, kept))
            self.note(compilation, index, f"K keeps {kept[0]} of {layer.k_dim} channels, chosen per request")

    def _static(self, compilation: Compilation, layers: list[int]) -> None:
        orders, costs = zip(*(self._ranking(compilation, i) for i in layers)) if layers else ((), ())
        if self.allocation == "global":
            counts = allocate(list(costs), self.keep_ratio)
        else:
            counts = [uniform(len(order), order.shape[1], self.keep_ratio) for order in orders]
        for index, order, kept in zip(layers, orders, counts):
            if self.mode == "fold":
                self._fold(compilation, index, order, kept)
            else:
                self._slice(compilation, index, order, kept)

    def _ranking(self, compilation: Compilation, index: int) -> tuple[Tensor, Tensor]:
        """Elimination order and marginal costs over channels (slice) or RoPE pairs (fold)."""
        profile = compilation.need_profile(self.name)
        paired = self.mode == "fold" and _has_rope(compilation, index)
        if self.score == "centred":
            gamma = profile.channel_gamma(index)
            if paired:
                half = gamma.shape[-1] // 2
                gamma = gamma.unflatten(2, (2, half)).sum(2).unflatten(1, (2, half)).sum(1)
            order, cost = eliminate(gamma)
        else:
            score = profile.think_score(index)
            if paired:
                score = score.unflatten(1, (2, -1)).sum(1)
            order, cost = by_score(score / score.sum(-1, keepdim=True))
        return order, cost

    def _slice(self, compilation: Compilation, index: int, order: Tensor, kept: list[int]) -> None:
        layer = compilation.plan.layers[index]
        channels = torch.stack([_kept_first(row, n) for row, n in zip(order, kept)])
        compilation.tables[f"layers.{index}.k_channels"] = channels
        if self.mean_correction:
            mean = compilation.need_profile(self.name).k_mean(index).float().clone()
            for head, n in enumerate(kept):
                mean[head, channels[head, :n]] = 0
            compilation.tables[f"layers.{index}.k_mean"] = mean
        compilation.update(
            index, select="static", mean_correction=self.mean_correction, heads=_narrowed(layer.heads, kept)
        )
        self.note(compilation, index, f"K keeps {_range(kept)} of {layer.k_dim} channels in sealed pages")

    def _fold(self, compilation: Compilation, index: int, order: Tensor, kept: list[int]) -> None:
        layer = compilation.plan.layers[index]
        if len(set(kept)) > 1:  # one K tensor per layer: its heads share the widest width
            kept = [max(kept)] * len(kept)
        groups = torch.stack([_kept_first(row, n)[:n] for row, n in zip(order, kept)])
        width = drop_pairs(compilation, index, groups)
        self.note(
            compilation,
            index,
            f"K keeps {width} of {layer.k_dim} channels, for every token, folded into W_q and W_k",
        )


def _has_rope(compilation: Compilation, index: int) -> bool:
    return match_rope(attention_nodes(compilation.graph.module)[index].args[1]) is not None


def _kept_first(order: Tensor, kept: int) -> Tensor:
    """A permutation from an elimination order: the `kept` last ones, sorted, then the rest."""
    return torch.cat([order[-kept:].sort().values, order[:-kept].sort().values])


def _narrowed(heads: tuple[HeadPlan, ...], kept: list[int]) -> tuple[HeadPlan, ...]:
    return tuple(
        HeadPlan(k=Side((Plane(h.k.planes[0].bits, n),), h.k.groups, h.k.group_size), v=h.v)
        for h, n in zip(heads, kept)
    )


def _range(kept: list[int]) -> str:
    return str(kept[0]) if len(set(kept)) == 1 else f"{min(kept)} to {max(kept)}"
