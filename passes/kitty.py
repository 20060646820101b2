"""Kitty: KIVI at 2 bits with the K channels that matter most at 4."""

from typing import ClassVar

from pydantic import Field

from kvcc.errors import PassError
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.runtime.plan import HeadPlan


class Kitty(Pass):
    """Kitty (arXiv 2511.18643): 2-bit codes per K channel along tokens and per token of V; some K channels get 4 bits.

    Departures: the boosted channels are those with the largest E[q²] E[k²] in calibration, chosen once for a KV head,
    where the paper ranks mean |K| in every page; so there is no index, and a page holds two planes of its own widths.
    Sinks, residual and pages are the recipe's windows.
    """

    name: ClassVar[str] = "kitty"
    needs_profile: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fold-values",)

    boosted: float = Field(0.25, ge=0, le=1, description="share of K channels with 4 bits")
    group_size: int = Field(64, ge=8, description="tokens (K) or channels (V) that share a scale and a zero")

    def apply(self, compilation: Compilation) -> None:
        for index, layer in self.paged(compilation):
            if layer.page % self.group_size or layer.v_dim % self.group_size:
                raise PassError(
                    f"layer {index}: group_size {self.group_size} must divide the page of {layer.page} tokens and "
                    f"head_dim {layer.v_dim}"
                )
            high = round(self.boosted * layer.k_dim)
            score = compilation.need_profile(self.name).think_score(index)
            compilation.tables[f"layers.{index}.k_channels"] = score.argsort(
                dim=-1, descending=True, stable=True
            )
            planes = tuple(Plane(bits, n) for bits, n in ((4, high), (2, layer.k_dim - high)) if n)
            head = HeadPlan(
                k=Side(planes, "tokens", self.group_size),
                v=Side((Plane(2, layer.v_dim),), "channels", self.group_size),
            )
            compilation.update(index, select="static", heads=(head,) * layer.kv_heads)
            self.note(compilation, index, f"{high} of {layer.k_dim} K channels at 4 bits, all else at 2")
