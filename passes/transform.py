"""Transform coding: calibrated bases, steps and bits per channel, with nothing but codes in a page."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcc.errors import PassError
from kvcc.folds import (
    fold_into_values,
    fold_out_of_values,
    fold_value_map,
    output_side,
    value_projection,
)
from kvcc.joint_heads import check_joint_heads, join_heads
from kvcc.kernels.layout import PAGE_MEAN_BITS, TOKEN_SCALE_BITS, Groups, Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.profile import Profile
from kvcc.runtime.plan import HeadPlan, LayerPlan
from kvcc.surgery import tidy
from kvcc.transform_coding import (
    QUANTUM,
    WIDTHS,
    Basis,
    Coder,
    GridLevels,
    Observed,
    coder,
    damped,
    give_bits,
    joint,
    shrunk,
    widened,
)
from kvcc.weighed import weighed_keys, weighed_values

Allocation = Literal["model", "layer", "head"]


class Transform(Pass):
    """K and V of sealed pages in a calibrated basis, each channel with a width and a step of its own.

    The basis decorrelates channels, so that few of them carry most of what matters, and turns them so that what their
    errors cost adds up (`dual`). Bits go where they gain most, in the whole model's currency: nats, by the Fisher
    information of keys and values where the profile has gradients (kvcc calibrate --gradients), else by errors of
    logits and of the layer's output. Steps are fixed by calibration and
    folded into the basis, so a page holds codes only; `token_scales` adds four bits a token and side, by which tokens
    with heavy tails are scaled down; `page_means` adds a byte a page and channel of K for what keys of a page have in
    common, because errors that they share do not average out in attention. V's basis and mean go into W_v, W_o and
    b_o; K's are applied to queries and to keys that are sealed. Sinks and the recent window stay exact. With
    `joint_heads` several KV heads of a layer share one basis, which removes what they have in common, too; attention
    over them then does `joint_heads` times the arithmetic.

    Transform coding with greedy marginal gains is classical (Huang & Schultheiss, 1963; Shoham & Gersho, 1988); compare
    SVDq (arXiv 2502.15304), which gives bits to singular directions of K, and OSCAR (arXiv 2605.17757), whose
    bases come from the covariances of queries and values.
    """

    name: ClassVar[str] = "transform"
    needs_profile: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ()

    bits: float = Field(
        2.5, gt=0.1, le=9, description="bits per element of K and V, token scales and page means included"
    )
    k_basis: Basis = Field("dual", description="native, hadamard, pca, or dual (weighted by the metric)")
    v_basis: Basis = Field("dual", description="the same for V")
    token_scales: bool = Field(True, description="four bits a token and side, against heavy tails")
    page_means: bool = Field(True, description="a byte a page and channel of K for the mean of its keys")
    levels: GridLevels = Field(
        "uniform",
        description="what codes choose from: steps, or up to 4 bits the best levels for a normal variable",
    )
    joint_heads: int = Field(
        1, ge=1, description="KV heads of a layer that share a basis; divides their number"
    )
    allocation: Allocation = Field(
        "model", description="what competes for bits: channels of the model, a layer, a head"
    )
    damping: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="of differences between channels' costs, which text of other kinds does not share",
    )
    heads: Literal["shared", "own"] = Field(
        "own",
        description="whether the KV heads of a layer share one allocation (fewer GPU kernels) or have their own",
    )
    metric: Literal["auto", "fisher", "output"] = Field("auto", description="what errors cost")
    shrinkage: float = Field(0.15, ge=0, le=1, description="of the metric towards the identity")
    spread: float = Field(
        0.3, ge=0, le=10, description="of the mean variance, added to every direction for text of other kinds"
    )

    def apply(self, compilation: Compilation) -> None:
        layers = [index for index, _ in self.paged(compilation)]
        coders = [self._coders(compilation, index) for index in layers]
        widths = self._widths(compilation, layers, coders)
        for index, (k, v), (k_bits, v_bits) in zip(layers, coders, widths):
            if self.joint_heads > 1:
                _join(compilation, index, self.joint_heads, v, v_bits)
            else:
                _fold_values(compilation, index, v, v_bits)
            self._store_keys(compilation, index, k, k_bits)
            self._narrow(compilation, index, k_bits, v_bits)
        tidy(compilation.graph.module)

    def _coders(self, compilation: Compilation, index: int) -> tuple[Coder, Coder]:
        layer, profile = compilation.plan.layers[index], compilation.need_profile(self.name)
        if layer.k_dim % QUANTUM or layer.v_dim % QUANTUM:
            raise PassError(
                f"layer {index}: {layer.k_dim} K and {layer.v_dim} V channels are no multiples of {QUANTUM}; "
                "use kivi"
            )
        check_joint_heads(index, layer, self.joint_heads)
        k_metric, v_metric = (shrunk(m, self.shrinkage) for m in self._metrics(compilation, index))
        # Weights that do not sum to one would lose V's mean.
        values = self._values(profile, index, v_metric, centred=not compilation.specs()[index].has_sinks)
        sides = ((self.k_basis, self._keys(profile, index, k_metric)), (self.v_basis, values))
        many = self.joint_heads
        k_coder, v_coder = (
            coder(
                joint(widened(side, self.spread, index), many),
                basis,
                scaled=self.token_scales,
                seed=index,
                joint_heads=many,
                levels=self.levels,
            )
            for basis, side in sides
        )
        return k_coder, v_coder

    def _keys(self, profile: Profile, index: int, metric: Tensor) -> Observed:
        """Keys as pages will hold them: with page means, what differs from these."""
        if self._fisher(profile):
            seen = weighed_keys(profile, index, within_pages=self.page_means)
            return Observed(seen.samples, seen.mean, seen.covariance, metric, seen.weights)
        k, mean = profile.samples(index)[0], profile.k_mean(index)
        if not self.page_means:
            return Observed(k, mean, profile.k_cov(index), metric)
        within = k - profile.page_samples(index) + mean[:, None]
        return Observed(within, mean, profile.k_page_cov(index), metric)

    def _values(self, profile: Profile, index: int, metric: Tensor, *, centred: bool) -> Observed:
        """Values; not `centred`: about 0."""
        if self._fisher(profile):
            seen = weighed_values(profile, index, centred=centred)
            return Observed(seen.samples, seen.mean, seen.covariance, metric, seen.weights)
        covariance = profile.v_cov(index) if centred else profile.vv(index)
        return Observed(profile.samples(index)[1], profile.v_mean(index) * centred, covariance, metric)

    def _fisher(self, profile: Profile) -> bool:
        """Whether errors cost what gradients say."""
        return self.metric == "fisher" or (self.metric == "auto" and profile.has_gradients)

    def _metrics(self, compilation: Compilation, index: int) -> tuple[Tensor, Tensor]:
        """What errors in K and V of a layer cost, [H, D, D] each."""
        profile, layer = compilation.need_profile(self.name), compilation.plan.layers[index]
        if self._fisher(profile):
            if not profile.has_gradients:
                raise PassError(
                    "transform: metric fisher needs gradients in the profile; run kvcc calibrate --gradients"
                )
            return profile.k_fisher(index), profile.v_fisher(index)
        spec = compilation.specs()[index]
        # An error of a logit moves the output by about the spread of V; both relative to the layer's own output.
        spread = profile.vv(index).diagonal(dim1=1, dim2=2).sum(-1)[:, None, None].clamp_min(1e-12)
        identity = torch.eye(layer.v_dim, dtype=torch.float64).expand(layer.kv_heads, -1, -1)
        return spec.scale**2 * profile.qq(index), identity / spread

    def _widths(
        self, compilation: Compilation, layers: list[int], coders: list[tuple[Coder, Coder]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Bits of K's and V's channels by layer, in the coders' order: [H, D] each."""
        costs = [
            damped(side.cost.unflatten(1, (-1, QUANTUM)).sum(2), self.damping)
            for pair in coders
            for side in pair
        ]  # [H, groups, W]
        plans = [compilation.plan.layers[index] for index in layers]
        budgets = [self._bits_of_codes(plan) / QUANTUM for plan in plans]
        heads = [len(cost) for cost in costs]
        if self.heads == "shared":
            costs = [cost.sum(0, keepdim=True) for cost in costs]
            budgets = [budget / count for budget, count in zip(budgets, heads[::2])]
        found = [
            torch.tensor(WIDTHS)[groups].repeat_interleave(QUANTUM, 1).expand(count, -1)
            for groups, count in zip(_allocated(costs, budgets, self.allocation), heads)
        ]
        return list(zip(found[::2], found[1::2]))

    def _bits_of_codes(self, layer: LayerPlan) -> float:
        """Of a layer's token, what is left for codes."""
        bits = self.bits * layer.model_elements
        bits -= 2 * TOKEN_SCALE_BITS * self.token_scales * (layer.kv_heads // self.joint_heads)
        bits -= PAGE_MEAN_BITS * layer.kv_heads * layer.k_dim / layer.page * self.page_means
        if bits < 0:
            raise PassError(
                f"transform: {self.bits:g} bits do not hold page_means and token_scales; use more, or leave them out"
            )
        return bits

    def _narrow(self, compilation: Compilation, index: int, k_bits: Tensor, v_bits: Tensor) -> None:
        heads = tuple(
            HeadPlan(k=self._side(k, "tokens", len(k) if self.page_means else 0), v=self._side(v, "channels"))
            for k, v in zip(k_bits, v_bits)
        )
        compilation.update(index, select="basis", mean_correction=True, heads=heads)
        text = f"K {_text(k_bits)} bits a channel, V {_text(v_bits)}"
        self.note(compilation, index, text)

    def _side(self, bits: Tensor, groups: Groups, page_means: int = 0) -> Side:
        """What one head's channels of these widths [D] take; without channels tokens need no scales."""
        planes = _planes(bits)
        scales = self.token_scales and bool(planes)
        return Side(
            planes, groups, steps="unit", token_scales=scales, levels=self.levels, page_means=page_means
        )

    def _store_keys(self, compilation: Compilation, index: int, k: Coder, bits: Tensor) -> None:
        """Tables that turn keys and queries into the coordinates of pages, in which steps are 1."""
        order, step = _chosen(k, bits)
        stored = bits.shape[-1] if self.page_means else int((bits > 0).sum(-1).max())
        keys = _columns(k.forward, order) / step[:, None]
        queries = _columns(k.inverse.mT, order) * step[:, None]
        tables = {"k_basis": keys[..., :stored], "q_basis": queries[..., :stored], "k_mean": k.mean}
        for name, table in tables.items():
            compilation.tables[f"layers.{index}.{name}"] = table.float().contiguous()


def _allocated(costs: list[Tensor], budgets: list[float], scope: Allocation) -> list[Tensor]:
    """Widths, as indices into WIDTHS, [H, groups] by side, of costs [H, groups, W] of each layer's K and V in turn.

    `budgets`: bits times groups, by layer. What competes for them: a whole model's groups, a layer's, or a head's.
    """
    if scope == "model":
        chosen = give_bits([cost.flatten(0, 1) for cost in costs], sum(budgets))
        return [groups.unflatten(0, cost.shape[:2]) for groups, cost in zip(chosen, costs)]
    found = []
    for k, v, budget in zip(costs[::2], costs[1::2], budgets):
        if scope == "layer":
            found += _allocated([k, v], [budget], "model")
            continue
        heads = [_allocated([a[None], b[None]], [budget / len(k)], "model") for a, b in zip(k, v)]
        found += [torch.cat(side) for side in zip(*heads)]
    return found


def _fold_values(compilation: Compilation, index: int, v: Coder, bits: Tensor) -> None:
    """W_v, W_o and biases in which V has the coordinates of pages."""
    projections = value_projection(compilation, index), output_side(compilation, index)
    fold_value_map(compilation, *projections, v.mean, *_value_maps(v, bits))


def _join(compilation: Compilation, index: int, count: int, v: Coder, bits: Tensor) -> None:
    """Every `count` heads as one; W_v, b_v and b_o in which V has its coordinates of pages, a table that leads back.

    The way back is not folded into W_o, which would grow `count`-fold.
    """
    forward, inverse = _value_maps(v, bits)
    output = output_side(compilation, index)
    mean = v.mean.unflatten(1, (count, -1)).flatten(0, 1)  # [Hkv, E]
    join_heads(compilation, index, count, inverse)
    fold_out_of_values(compilation, output, mean)
    fold_into_values(compilation, value_projection(compilation, index), v.mean, forward)


def _value_maps(v: Coder, bits: Tensor) -> tuple[Tensor, Tensor]:
    """What leads to the coordinates of pages, in which steps are 1, and back."""
    order, step = _chosen(v, bits)
    forward = _columns(v.forward, order) / step[:, None]
    return forward, (_columns(v.inverse.mT, order) * step[:, None]).mT


def _chosen(side: Coder, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Channels in order of falling width, and their steps in that order: [H, D] each."""
    order = bits.argsort(dim=-1, descending=True, stable=True)
    width = torch.tensor([[WIDTHS.index(b) for b in row] for row in bits.tolist()])
    step = side.steps.gather(-1, width[..., None])[..., 0]
    return order, step.gather(-1, order)


def _columns(matrices: Tensor, order: Tensor) -> Tensor:
    return matrices.gather(-1, order[:, None].expand_as(matrices))


def _planes(bits: Tensor) -> tuple[Plane, ...]:
    """Of one head's channels [D]."""
    counts = {width: int((bits == width).sum()) for width in reversed(WIDTHS) if width}
    return tuple(Plane(width, count) for width, count in counts.items() if count)


def _text(bits: Tensor) -> str:
    low, high = (float(x) for x in (bits.float().mean(-1).min(), bits.float().mean(-1).max()))
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
