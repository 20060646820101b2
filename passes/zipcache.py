"""ZipCache: salient tokens with more bits than others."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcc.bases import fold_value_scales
from kvcc.errors import PassError
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.runtime.plan import HeadPlan
from kvcc.surgery import tidy

Bits = Literal[2, 3, 4, 8]


class ZipCache(Pass):
    """ZipCache (He et al., arXiv 2405.14256): tokens that receive much attention at 4 bits, others at 2.

    When a page is sealed, probe queries (the last 5 % of the tokens that come with it, and 5 % at random) say what
    attention its tokens receive, divided by how many of the probes could see them; the `salient` share is stored
    with more bits. K per channel over the tokens of a class; V per token, its channels first divided by the root of
    their greatest magnitude ("channel-separable").

    Departures: the class is decided once, when a page is sealed, and nothing is quantised again; shares are of a page
    and a KV head; the divisors of V come from calibration and go into W_v and W_o; V's codes are per token and head;
    while decoding, the token that fills a page is the only probe, as in the paper's code. Sinks and the recent window
    stay exact. A page keeps no index: attention does not mind the order of tokens.
    """

    name: ClassVar[str] = "zipcache"

    salient: float = Field(0.6, gt=0, lt=1, description="share of a page's tokens that are salient")
    salient_bits: Bits = Field(4, description="bits per code of salient tokens")
    other_bits: Bits = Field(2, description="bits per code of others")
    separable: bool = Field(True, description="divide V's channels by the root of their range in calibration")

    def requires_profile(self) -> bool:
        return self.separable

    def apply(self, compilation: Compilation) -> None:
        for index, layer in self.paged(compilation):
            salient = max(8, min(layer.page - 8, 8 * round(self.salient * layer.page / 8)))
            if layer.page < 16:
                raise PassError(
                    f"layer {index}: a page of {layer.page} tokens has no room for two classes; use 16 or more"
                )
            if self.separable:
                fold_value_scales(compilation, index, self._divisors(compilation, index))
            high, low = (
                HeadPlan(
                    k=Side((Plane(bits, layer.k_dim),), "tokens", tokens),
                    v=Side((Plane(bits, layer.v_dim),), "channels", layer.v_dim),
                )
                for bits, tokens in ((self.salient_bits, salient), (self.other_bits, layer.page - salient))
            )
            heads = {"heads": (low,) * layer.kv_heads, "salient_heads": (high,) * layer.kv_heads}
            compilation.update(index, salient=salient, **heads)
            text = (
                f"{salient} of {layer.page} tokens at {self.salient_bits} bits, others at {self.other_bits}"
            )
            self.note(compilation, index, text)
        tidy(compilation.graph.module)

    def _divisors(self, compilation: Compilation, index: int) -> Tensor:
        low, high = compilation.need_profile(self.name).v_range(index)
        return torch.maximum(low.abs(), high.abs()).double().sqrt().clamp_min(1e-3)
