"""FP8: e4m3 numbers under a static scale."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcc.bases import change_scales, largest
from kvcc.kernels.layout import Plane, Side
from kvcc.kernels.levels import E4M3_MOST
from kvcc.passes.contract import Compilation, Pass
from kvcc.profile import Profile
from kvcc.runtime.plan import HeadPlan
from kvcc.surgery import tidy


class Fp8(Pass):
    """Numbers of e4m3 (Micikevicius et al., arXiv 2209.05433), as in the FP8 caches of vLLM and ModelOpt.

    `calibrated` scales put the greatest magnitude of a KV head on 448; `one` stores values as they are, and needs no
    profile. Departure: sinks and the recent window stay exact. Stored here; products are computed in float32 or half.
    """

    name: ClassVar[str] = "fp8"

    scale: Literal["calibrated", "one"] = Field("calibrated", description="one scale a KV head, or none")

    def requires_profile(self) -> bool:
        return self.scale == "calibrated"

    def head_scales(self, profile: Profile | None, index: int) -> tuple[Tensor, Tensor]:
        """Scales of K and of V of each KV head, [Hkv] each; 1 where they are not calibrated."""
        if self.scale == "one":
            return torch.ones(1), torch.ones(1)
        assert profile is not None
        k, v = (x.amax(1) / E4M3_MOST for x in largest(profile, index))
        return k, v

    def apply(self, compilation: Compilation) -> None:
        for index, layer in self.paged(compilation):
            if self.scale == "calibrated":
                k_scale, v_scale = self.head_scales(compilation.need_profile(self.name), index)
                sizes = layer.k_dim, layer.v_dim
                wide = (s[:, None].expand(-1, size) for s, size in zip((k_scale, v_scale), sizes))
                change_scales(compilation, index, *wide)
            k, v = (
                Side((Plane(8, size),), "channels", steps="unit", levels="e4m3")
                for size in (layer.k_dim, layer.v_dim)
            )
            compilation.update(index, heads=(HeadPlan(k=k, v=v),) * layer.kv_heads)
            self.note(compilation, index, f"K and V e4m3, scale {self.scale}")
        tidy(compilation.graph.module)
