"""KIVI: K quantised per channel along tokens, V per token along channels, asymmetric, tuning-free."""

from typing import ClassVar, Literal

from pydantic import Field

from kvcc.errors import PassError
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.runtime.plan import HeadPlan, LayerPlan

Bits = Literal[2, 3, 4, 8]


class Kivi(Pass):
    """KIVI (Liu et al., arXiv 2402.02750): asymmetric min-max codes, K in groups of `group_size` tokens of one
    channel, V in groups of `group_size` channels of one token.

    Departures: sink tokens stay exact; the window is sealed a page at a time and never re-quantised, so between
    `residual` and `residual` + page - 1 recent tokens are exact; scale and zero are rounded to float16 before codes
    are computed; the scale has a floor, so constant groups give no NaN.
    """

    name: ClassVar[str] = "kivi"
    after: ClassVar[tuple[str, ...]] = ("fold-values", "think")

    k_bits: Bits = Field(2, description="bits per K code")
    v_bits: Bits = Field(2, description="bits per V code")
    group_size: int = Field(32, ge=8, description="tokens (K) or channels (V) that share a scale and a zero")
    residual: int | None = Field(
        None, ge=0, description="recent tokens kept exact; default: the recipe's windows"
    )

    def apply(self, compilation: Compilation) -> None:
        for index, layer in self.paged(compilation):
            self._check(index, layer)
            heads = tuple(self._head(head) for head in layer.heads)
            recent = layer.recent if self.residual is None else self.residual
            compilation.update(index, heads=heads, recent=recent)
            text = f"K {self.k_bits} bits per channel, V {self.v_bits} bits per token, groups of {self.group_size}"
            self.note(compilation, index, text)

    def _check(self, index: int, layer: LayerPlan) -> None:
        if layer.page % self.group_size:
            raise PassError(
                f"layer {index}: group_size {self.group_size} does not divide the page of {layer.page} tokens; "
                f"use {_divisors(layer.page)}"
            )
        if layer.v_dim % self.group_size:
            raise PassError(
                f"layer {index}: group_size {self.group_size} does not divide head_dim {layer.v_dim}; "
                f"use {_divisors(layer.v_dim)}"
            )

    def _head(self, head: HeadPlan) -> HeadPlan:
        k = tuple(Plane(self.k_bits, plane.channels) for plane in head.k.planes)
        v = tuple(Plane(self.v_bits, plane.channels) for plane in head.v.planes)
        return HeadPlan(k=Side(k, "tokens", self.group_size), v=Side(v, "channels", self.group_size))


def _divisors(size: int) -> str:
    usable = [str(d) for d in range(8, size + 1) if size % d == 0 and d % 8 == 0]
    return ", ".join(usable[:-1]) + (" or " if len(usable) > 1 else "") + "".join(usable[-1:])
