"""Hadamard rotation of K and V before quantisation per token."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from kvcc.errors import PassError
from kvcc.folds import fold_value_map, output_side, value_projection
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.runtime.plan import HeadPlan, LayerPlan
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
        for index, layer in enumerate(compilation.plan.layers):
            if not layer.page:
                self.note(
                    compilation, index, f"sliding window of {layer.window} tokens stays exact", fired=False
                )
                continue
            self._check(index, layer)
            self._rotate(compilation, index, layer)
            head = HeadPlan(
                k=Side((Plane(self.k_bits, layer.k_dim),), "channels", self.group_size),
                v=Side((Plane(self.v_bits, layer.v_dim),), "channels", self.group_size),
            )
            compilation.update(index, select="basis", heads=(head,) * layer.kv_heads)
            text = f"rotated K {self.k_bits} and V {self.v_bits} bits per token, groups of {self.group_size}"
            self.note(compilation, index, text)
        tidy(compilation.graph.module)

    def _check(self, index: int, layer: LayerPlan) -> None:
        for size in (layer.k_dim, layer.v_dim):
            if size % self.group_size:
                raise PassError(
                    f"layer {index}: group_size {self.group_size} does not divide head_dim {size}; "
                    f"use {', '.join(str(d) for d in range(8, size + 1, 8) if size % d == 0)}"
                )

    def _rotate(self, compilation: Compilation, index: int, layer: LayerPlan) -> None:
        turn = hadamard(layer.k_dim, index).float().expand(layer.kv_heads, -1, -1).contiguous()
        compilation.tables[f"layers.{index}.k_basis"] = turn
        compilation.tables[f"layers.{index}.q_basis"] = turn.clone()
        basis = hadamard(layer.v_dim, index).expand(layer.kv_heads, -1, -1)
        no_mean = torch.zeros(layer.kv_heads, layer.v_dim, dtype=torch.float64)
        projections = value_projection(compilation, index), output_side(compilation, index)
        fold_value_map(compilation, *projections, no_mean, basis)
