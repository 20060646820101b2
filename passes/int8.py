"""Static 8-bit integers, as engines' INT8 caches."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kvcc.bases import change_scales, largest
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.profile import Profile
from kvcc.runtime.plan import HeadPlan
from kvcc.surgery import tidy


class Int8(Pass):
    """Eight-bit integers with steps fixed by calibration, one a KV head or a channel; larger values are clipped.

    Linear quantisation (Jacob et al., arXiv 1712.05877) as engines' static INT8 caches have it. Departure: codes stand
    for the middles of steps, so 0 is off by half a step; sinks and the recent window stay exact. V's scales go into
    W_v and W_o.
    """

    name: ClassVar[str] = "int8"
    needs_profile: ClassVar[bool] = True

    scales: Literal["head", "channel"] = Field("channel", description="what has a step of its own")
    margin: float = Field(1.0, gt=0, le=4, description="range over the greatest magnitude in calibration")

    def head_scales(self, profile: Profile | None, index: int) -> tuple[Tensor, Tensor]:
        """Steps of K and of V of each KV head, [Hkv] each."""
        assert profile is not None
        k, v = (x.amax(1) * self.margin / 127.5 for x in largest(profile, index))
        return k, v

    def apply(self, compilation: Compilation) -> None:
        for index, layer in self.paged(compilation):
            profile = compilation.need_profile(self.name)
            k, v = (x * self.margin / 127.5 for x in largest(profile, index))
            if self.scales == "head":
                k, v = (s[:, None].expand_as(x) for s, x in zip(self.head_scales(profile, index), (k, v)))
            change_scales(compilation, index, k, v)
            head = HeadPlan(
                k=Side((Plane(8, layer.k_dim),), "tokens", steps="unit"),
                v=Side((Plane(8, layer.v_dim),), "channels", steps="unit"),
            )
            compilation.update(index, heads=(head,) * layer.kv_heads)
            self.note(compilation, index, f"K and V 8 bits, a static step a {self.scales}")
        tidy(compilation.graph.module)
