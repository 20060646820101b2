"""What a kernel backend does. `reference` specifies it; `cpu` and `triton` must agree with it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvcc.kernels.layout import PageLayout
from kvcc.kernels.pool import PagePool


@dataclass(frozen=True)
class Cached:
    """One layer's cache of a batch, as a backend reads it.

    Token t of a sequence (counted from 0) is a sink when t < sinks, and then lies in window slot t; else it is
    sealed when t < sinks + sealed, in page table[row, (t - sinks) // page tokens]; else it is recent, in window
    slot sinks + (t - sinks) % ring, where ring = window slots - sinks. A layer without pages (layout None) forgets
    its `sealed` oldest tokens instead of sealing them: a sliding window.
    """

    layout: PageLayout | None
    window_k: Tensor  # [B, Hkv, slots, Dk], float32, bfloat16 or float16
    window_v: Tensor  # [B, Hkv, slots, Dv]
    sinks: int
    lengths: Tensor  # [B] int32: tokens cached
    sealed: Tensor  # [B] int32: of these, tokens in pages (or forgotten, without pages)
    pool: PagePool | None
    table: Tensor  # [B, max pages] int64: page ids; entries past sealed // tokens are undefined


class Backend(Protocol):
    """Seals pages and attends over a layer's cache. Both calls only read what they are not told to write."""

    name: str

    def supports(self, layout: PageLayout, dtype: torch.dtype, device: torch.device) -> str | None:
        """None when this backend can run the layout here, else one line saying why not."""

    def seal(self, layout: PageLayout, k: Tensor, v: Tensor, pool: PagePool, pages: Tensor) -> None:
        """Quantise and pack N pages.

        k: [N, Hkv, tokens, layout.k_channels] in plane order (heads that store fewer channels ignore the rest);
        v: [N, Hkv, tokens, layout.v_channels]; pages: [N] int64 page ids taken from `pool`.
        Asymmetric min-max per group: zero = fp16(min), scale = max(fp16((max - zero) / (2^bits - 1)), 1e-6),
        code = round_half_even(clamp((x - zero) / scale, 0, 2^bits - 1)), in float32 on float16-rounded metadata.
        """

    def attend(
        self,
        cached: Cached,
        q: Tensor,
        q_pages: Tensor,
        scale: float,
        softcap: float = 0.0,
        page_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of n queries per sequence over everything cached (no causal mask: all cached tokens count).

        q: [B, n, Hq, Dk] for window slots; q_pages: [B, n, Hq, layout.k_channels] in plane order, for pages;
        page_bias: [B, n, Hq] float32 added to the logits of sealed tokens (after scale, before softcap).
        logits = scale * q·k; with softcap c > 0 they become c * tanh(logits / c).
        Returns out [B, n, Hq, Dv] float32 and lse [B, n, Hq] float32 (natural log); a sequence with nothing
        cached gives out 0 and lse -inf.
        """
