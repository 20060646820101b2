"""Mean and basis of V folded into the weights around attention: exact, and free at run time."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcc.errors import PassError
from kvcc.folds import fold_value_map, output_side, value_projection
from kvcc.passes.contract import Compilation, Pass
from kvcc.surgery import tidy
from kvcc.transform_coding import hadamard


class FoldValues(Pass):
    """V' = (V - mean) M instead of V, with M orthogonal per KV head: W_v and W_o absorb M, the output bias the mean.

    Softmax weights sum to one, so Σ p v = (Σ p v') Mᵀ + mean exactly (method card "channel and precision" §15;
    SpinQuant's R2, arXiv 2405.16406, is the basis part). Refused for models with attention sinks when the mean is
    removed, because their weights sum to less than one.
    """

    name: ClassVar[str] = "fold-values"
    needs_profile: ClassVar[bool] = True

    mean: bool = Field(True, description="remove V's calibrated mean")
    basis: Literal["native", "pca", "hadamard"] = Field("native", description="basis of V per KV head")

    def requires_profile(self) -> bool:
        return self.mean or self.basis == "pca"

    def apply(self, compilation: Compilation) -> None:
        module = compilation.graph.module
        for index, plan in self.chosen(compilation):
            if self.mean and compilation.specs()[index].has_sinks:
                raise PassError(f"layer {index}: the model has attention sinks; set mean: false")
            v = value_projection(compilation, index)
            out = output_side(compilation, index)
            basis = self._basis(compilation, index)  # [Hkv, D, D], columns are the new axes
            mean = torch.zeros(plan.kv_heads, plan.v_dim, dtype=torch.float64)
            if self.mean:
                mean = compilation.need_profile(self.name).v_mean(index)
            fold_value_map(compilation, v, out, mean, basis)
            compilation.value_maps[index] = mean, basis
            what = [
                *(["mean"] if self.mean else []),
                *([f"{self.basis} basis"] if self.basis != "native" else []),
            ]
            self.note(compilation, index, f"V {' and '.join(what) or 'nothing'} folded into W_v, W_o and b_o")
        tidy(module)

    def _basis(self, compilation: Compilation, index: int) -> Tensor:
        plan = compilation.plan.layers[index]
        if self.basis == "pca":
            cov = compilation.need_profile(self.name).v_cov(index)
            return torch.linalg.eigh(cov).eigenvectors.flip(-1)
        if self.basis == "hadamard":
            return hadamard(plan.v_dim, index).expand(plan.kv_heads, -1, -1)
        return torch.eye(plan.v_dim, dtype=torch.float64).expand(plan.kv_heads, -1, -1)
