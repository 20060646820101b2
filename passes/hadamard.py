"""Hadamard rotation of K and V before quantisation per token."""

from typing import ClassVar, Literal

from pydantic import Field

from kvcc.bases import change_basis, check_channel_groups
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.runtime.plan import HeadPlan
from kvcc.surgery import tidy
from kvcc.transform_coding import hadamard


class Hadamard(Pass):
    """QuaRot's cache (Ashkboos et al., arXiv 2404.00456): rotated heads, asymmetric min-max codes per token.

    A randomised Hadamard matrix spreads outlier channels over all. V's is folded into W_v and W_o (SpinQuant's R2,
    arXiv 2405.16406); K's is applied after RoPE, to queries and to keys that are sealed.

    Departures: a matrix per head, none across heads; sinks and the recent window stay exact; no clipping; head sizes
    with an odd factor take a random orthogonal block for it.
    """

    name: ClassVar[str] = "hadamard"

    k_bits: Literal[2, 3, 4, 8] = Field(4, description="bits per K code")
    v_bits: Literal[2, 3, 4, 8] = Field(4, description="bits per V code")
    group_size: int = Field(64, ge=8, description="channels of a token that share a scale and a zero")

    def apply(self, compilation: Compilation) -> None:
        for index, layer in self.paged(compilation):
            check_channel_groups(index, layer, self.group_size)
            turns = (
                hadamard(size, index).expand(layer.kv_heads, -1, -1) for size in (layer.k_dim, layer.v_dim)
            )
            change_basis(compilation, index, *turns)
            head = HeadPlan(
                k=Side((Plane(self.k_bits, layer.k_dim),), "channels", self.group_size),
                v=Side((Plane(self.v_bits, layer.v_dim),), "channels", self.group_size),
            )
            compilation.update(index, select="basis", heads=(head,) * layer.kv_heads)
            text = f"rotated K {self.k_bits} and V {self.v_bits} bits per token, groups of {self.group_size}"
            self.note(compilation, index, text)
        tidy(compilation.graph.module)
