"""TurboQuant: rotated heads on the levels of normal variables, with a norm a token."""

from typing import ClassVar, Literal

from pydantic import Field

from kvcc.bases import change_basis
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.runtime.plan import HeadPlan
from kvcc.surgery import tidy
from kvcc.transform_coding import hadamard

Bits = Literal[1, 2, 3, 4]


class TurboQuant(Pass):
    """TurboQuant (Zandieh et al., arXiv 2504.19874): after a random rotation the channels of a token over its norm are
    nearly normal, so that one table of levels, the best for a normal variable, serves all of them.

    As vLLM runs it: a randomised Hadamard matrix rotates, there is no 1-bit sketch of the residual (QJL), and the
    stored float16 length is that of the token over that of its codes. `v_levels: uniform` gives V min-max codes per
    token instead. Departure: sinks and the recent window stay exact, no layers do unless `exact_layers` says so.
    """

    name: ClassVar[str] = "turboquant"

    k_bits: Bits = Field(4, description="bits per K code")
    v_bits: Bits = Field(4, description="bits per V code")
    v_levels: Literal["normal", "uniform"] = Field("normal", description="what codes of V choose from")
    exact_layers: int = Field(0, ge=0, description="first and as many last layers that are left alone")

    def apply(self, compilation: Compilation) -> None:
        last = len(compilation.plan.layers) - self.exact_layers
        for index, layer in self.paged(compilation):
            if not self.exact_layers <= index < last:
                self.note(compilation, index, "one of the first or last layers: stays exact", fired=False)
                continue
            turns = (
                hadamard(size, index).expand(layer.kv_heads, -1, -1) for size in (layer.k_dim, layer.v_dim)
            )
            change_basis(compilation, index, *turns)
            k = Side(
                (Plane(self.k_bits, layer.k_dim),), "channels", layer.k_dim, steps="scaled", levels="normal"
            )
            v = Side(
                (Plane(self.v_bits, layer.v_dim),), "channels", layer.v_dim, steps="scaled", levels="normal"
            )
            if self.v_levels == "uniform":
                v = Side((Plane(self.v_bits, layer.v_dim),), "channels", layer.v_dim)
            compilation.update(index, heads=(HeadPlan(k=k, v=v),) * layer.kv_heads)
            self.note(compilation, index, f"rotated K {self.k_bits} and V {self.v_bits} bits, a norm a token")
        tidy(compilation.graph.module)
