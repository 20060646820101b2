"""NVFP4: blocks of 4-bit floating-point numbers."""

from typing import ClassVar

from pydantic import Field

from kvcc.bases import change_scales, check_channel_groups, largest
from kvcc.kernels.layout import Plane, Side
from kvcc.kernels.levels import E2M1_MOST, E4M3_MOST
from kvcc.passes.contract import Compilation, Pass
from kvcc.runtime.plan import HeadPlan
from kvcc.surgery import tidy


class NvFp4(Pass):
    """NVFP4 (arXiv 2509.25149), as in ModelOpt's NVFP4_KV: numbers of e2m1, an e4m3 scale for 16 channels of a token.

    The tensor's own scale, here one a KV head, puts the greatest magnitude of calibration on what the largest scale
    times the largest number reach; K's is applied as a basis, V's goes into W_v and W_o. Departure: sinks and the
    recent window stay exact.
    """

    name: ClassVar[str] = "nvfp4"
    needs_profile: ClassVar[bool] = True

    group_size: int = Field(16, ge=8, description="channels of a token that share an e4m3 scale")

    def apply(self, compilation: Compilation) -> None:
        for index, layer in self.paged(compilation):
            check_channel_groups(index, layer, self.group_size)
            found = largest(compilation.need_profile(self.name), index)
            most = E2M1_MOST * E4M3_MOST
            change_scales(compilation, index, *(x.amax(1, keepdim=True).expand_as(x) / most for x in found))
            k, v = (
                Side((Plane(4, size),), "channels", self.group_size, steps="scaled", levels="e2m1")
                for size in (layer.k_dim, layer.v_dim)
            )
            compilation.update(index, heads=(HeadPlan(k=k, v=v),) * layer.kv_heads)
            self.note(compilation, index, f"K and V e2m1, an e4m3 scale for {self.group_size} channels")
        tidy(compilation.graph.module)
