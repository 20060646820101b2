"""The Plan: what is stored for each cached token, per layer and KV head. Every byte count follows from it."""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, model_validator

from kvcc.errors import PlanError
from kvcc.kernels.layout import PageLayout, Plane, Side, joined, page_layout
from kvcc.runtime.identity import DType
from kvcc.runtime.strict_json import first_fault

__all__ = ["HeadPlan", "LayerPlan", "Plan", "Plane", "Side", "parse_plan"]

PAGE_ENTRIES = (
    2 * torch.int64.itemsize
)  # bytes that find a page: its id in a sequence's table, and its address


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeadPlan(_Data):
    """How sealed pages store one KV head."""

    k: Side
    v: Side


class LayerPlan(_Data):
    """One attention layer's cache: `sinks` exact tokens, pages of `page` tokens, at least `recent` exact ones.

    A layer with sliding-window attention has no pages (page 0) and keeps its last `window` tokens, exact.
    `select` says where the K channels of a page come from: "all" keeps the model's order; "static" takes table
    `layers.N.k_channels`; "request" chooses per sequence (ThinK as published); "basis" stores K in the coordinates of
    table `layers.N.k_basis`, and queries meet it in those of `layers.N.q_basis`. With `mean_correction`, table
    `layers.N.k_mean` restores the share in body logits of what pages leave out: pruned channels, or K's mean.
    A page may store fewer than all V channels; the others are 0 there.
    With `salient`, that many tokens of a page are stored as `salient_heads` say, each head's own choice: those that
    received most attention when the page was sealed.
    """

    q_heads: PositiveInt
    kv_heads: PositiveInt
    k_dim: PositiveInt
    v_dim: PositiveInt
    sinks: NonNegativeInt
    recent: NonNegativeInt
    page: NonNegativeInt
    window: NonNegativeInt = 0
    select: Literal["all", "static", "request", "basis"] = "all"
    mean_correction: bool = False
    heads: tuple[HeadPlan, ...] = ()
    salient: NonNegativeInt = 0
    salient_heads: tuple[HeadPlan, ...] = ()
    elements: PositiveInt | None = (
        None  # of one token in the uncompressed model, where folds made it narrower
    )

    @model_validator(mode="after")
    def _consistent(self) -> "LayerPlan":
        if self.q_heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} KV heads do not divide {self.q_heads} query heads")
        if bool(self.page) == bool(self.window):
            raise ValueError("give either a page (tokens) or a sliding window (tokens), and 0 for the other")
        if self.window and (self.sinks or self.recent):
            raise ValueError("a sliding-window layer has neither sinks nor a recent window of its own")
        if self.window and (self.select != "all" or self.mean_correction or self.heads):
            raise ValueError("a sliding-window layer has no pages, so nothing may say what they store")
        if self.page and len(self.heads) != self.kv_heads:
            raise ValueError(f"{len(self.heads)} head plans for {self.kv_heads} KV heads")
        if len(self.salient_heads) != (self.kv_heads if self.salient else 0) or self.salient > max(
            0, self.page - 8
        ):
            raise ValueError(
                f"{self.salient} salient tokens of a page of {self.page}, and {len(self.salient_heads)} head plans for "
                f"them; leave 8 tokens to the others, and give a plan for each of {self.kv_heads} KV heads"
            )
        for head, plan in enumerate(self.heads + self.salient_heads):
            head %= self.kv_heads
            if plan.k.channels > self.k_dim or plan.v.channels > self.v_dim:
                raise ValueError(
                    f"KV head {head} stores {plan.k.channels} K and {plan.v.channels} V channels, and there are "
                    f"{self.k_dim} and {self.v_dim}"
                )
            if self.select == "all" and plan.k.channels != self.k_dim:
                raise ValueError(f"KV head {head} prunes K channels, so `select` must not be all")
        return self

    @property
    def ring(self) -> int:
        """Window slots after the sinks: room for the recent tokens and the page that fills behind them."""
        return self.window or (self.recent + self.page)

    @property
    def policy(self) -> tuple[int, int, int, int]:
        """What decides where a token lies: layers that agree in it keep the same tokens in the same places."""
        return self.sinks, self.recent, self.page, self.window

    @property
    def slots(self) -> int:
        """Tokens that the exact segments have room for."""
        return self.sinks + self.ring

    @property
    def exact_elements(self) -> int:
        """Elements of one exact token, K and V, all KV heads."""
        return self.kv_heads * (self.k_dim + self.v_dim)

    @property
    def model_elements(self) -> int:
        """Elements of one token in the uncompressed model, K and V, all KV heads."""
        return self.elements or self.exact_elements

    def layout(self, half: torch.dtype) -> PageLayout | None:
        """The page record, or None for a layer without pages. Raises PlanError when it does not come out even."""
        if not self.page:
            return None
        if not self.salient:
            return _layout(self.page, self.heads, half)
        first = _layout(self.salient, self.salient_heads, half)
        return joined(first, _layout(self.page - self.salient, self.heads, half, first.nbytes))

    def sealed(self, tokens: int) -> int:
        """How many of a sequence's first `tokens` tokens are in sealed pages (or forgotten by a sliding window)."""
        beyond = tokens - self.sinks - self.recent
        if self.window:
            return max(0, tokens - self.window)
        return max(0, beyond // self.page * self.page)


def _layout(tokens: int, heads: tuple[HeadPlan, ...], half: torch.dtype, start: int = 0) -> PageLayout:
    return page_layout(tokens, tuple(h.k for h in heads), tuple(h.v for h in heads), half, start)


class Plan(_Data):
    """Per-layer plans of a whole model of type `dtype`, whose exact segments have it, too, or are `window_dtype`."""

    version: Literal[1] = 1
    dtype: DType
    window_dtype: DType | None = None
    layers: tuple[LayerPlan, ...]

    @property
    def exact(self) -> torch.dtype:
        """The type of exact segments."""
        exact: torch.dtype = getattr(torch, self.window_dtype or self.dtype)
        return exact

    @property
    def half(self) -> torch.dtype:
        """The type of width-16 planes."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float16

    def layouts(self) -> list[PageLayout | None]:
        """Page layouts by layer. Raises PlanError naming the layer."""
        layouts = []
        for index, layer in enumerate(self.layers):
            try:
                layouts.append(layer.layout(self.half))
            except PlanError as error:
                raise PlanError(f"layer {index}: {error}") from error
        return layouts

    def bytes_per_token(self) -> float:
        """Bytes a sealed token takes over all layers, scales, zeros and alignment included; windows are not.

        A sliding-window layer counts 0: it does not grow.
        """
        return sum(self.layer_bytes_per_token(i) for i in range(len(self.layers)))

    def layer_bytes_per_token(self, layer: int) -> float:
        """`bytes_per_token` of one layer."""
        plan = self.layers[layer]
        layout = plan.layout(self.half)
        return layout.nbytes / layout.page_tokens if layout else 0.0

    def cache_bytes(self, tokens: int) -> int:
        """Bytes allocated for one sequence of `tokens` tokens: windows, sinks, pages and where they lie, channels
        that the sequence chose for itself.
        """
        total = 0
        for plan, layout in zip(self.layers, self.layouts()):
            total += plan.slots * plan.exact_elements * self.exact.itemsize
            if layout is not None:
                total += plan.sealed(tokens) // plan.page * (layout.nbytes + PAGE_ENTRIES)
                if plan.select == "request":
                    total += (plan.kv_heads + plan.q_heads) * layout.k_channels * torch.int64.itemsize
        return total

    def uncompressed_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes the same sequence takes in an ordinary cache of `itemsize` bytes per element (2: fp16).

        Sliding-window layers hold at most their window there, too.
        """
        return sum(
            (min(tokens, p.window) if p.window else tokens) * p.model_elements * itemsize for p in self.layers
        )

    def uncompressed_bytes_per_token(self, itemsize: int = 2) -> int:
        """What `bytes_per_token` is without compression; sliding-window layers count 0 here as there."""
        return sum(p.model_elements * itemsize for p in self.layers if p.page)

    def bits_per_element(self) -> float:
        """Bits per element of the uncompressed model's cache in sealed pages, metadata included, windows not."""
        elements = self.uncompressed_bytes_per_token(itemsize=1)
        return 8 * self.bytes_per_token() / elements if elements else 0.0

    def break_even(self, itemsize: int = 2, limit: int = 1 << 20) -> int | None:
        """The least context length (tokens) from which this cache is the smaller one; None if not below `limit`."""
        step = max((p.page for p in self.layers), default=0) or 1
        if self.cache_bytes(limit) >= self.uncompressed_bytes(limit, itemsize):
            return None
        low, high = 0, limit // step
        while low < high:  # the saving per page is constant, so the comparison changes sign once
            middle = (low + high) // 2
            tokens = middle * step
            if self.cache_bytes(tokens) < self.uncompressed_bytes(tokens, itemsize):
                high = middle
            else:
                low = middle + 1
        return low * step


def parse_plan(data: Any) -> Plan:
    """A Plan from decoded JSON. Raises PlanError with the first thing that is wrong and where."""
    try:
        plan = Plan.model_validate(data)
    except ValidationError as error:
        raise PlanError(f"plan: {first_fault(error)}") from error
    plan.layouts()
    return plan
