"""OSCAR: rotations from the covariances that attention sees, then clipped codes per token."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcc.bases import change_basis, check_channel_groups
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.profile import Profile
from kvcc.runtime.plan import HeadPlan
from kvcc.surgery import tidy
from kvcc.transform_coding import hadamard


class Oscar(Pass):
    """OSCAR (arXiv 2605.17757): asymmetric 2-bit codes per token in a calibrated rotation a layer.

    K's rotation has the eigenvectors of E[qᵀq], V's those of E[w vᵀv] with w = k E[qᵀq] kᵀ, what a token weighs in
    attention; both are mixed by a Hadamard matrix, and channels come in bit-reversed order, so that every group has
    strong and weak directions. Ranges are clipped.

    Departures: V's covariance is over the profile's sampled tokens; clipping narrows a group's minimum and maximum by
    a factor; head sizes with an odd factor take a random orthogonal block in the Hadamard matrix and keep its order.
    Sinks and the recent window are the recipe's (64 and 256 in the paper).
    """

    name: ClassVar[str] = "oscar"
    needs_profile: ClassVar[bool] = True

    k_bits: Literal[2, 3, 4, 8] = Field(2, description="bits per K code")
    v_bits: Literal[2, 3, 4, 8] = Field(2, description="bits per V code")
    group_size: int | None = Field(
        None,
        ge=8,
        description="channels that share a scale and a zero; default: a head's, or as many of 128 as divide them",
    )
    k_clip: int = Field(96, ge=1, le=100, description="percent of K's range that codes reach")
    v_clip: int = Field(92, ge=1, le=100, description="the same for V")

    def apply(self, compilation: Compilation) -> None:
        profile = compilation.need_profile(self.name)
        for index, layer in self.paged(compilation):
            k_group, v_group = (self.group_size or _group(size) for size in (layer.k_dim, layer.v_dim))
            check_channel_groups(index, layer, k_group)
            turns = (
                mixed(each, index).expand(layer.kv_heads, -1, -1) for each in _covariances(profile, index)
            )
            change_basis(compilation, index, *turns)
            head = HeadPlan(
                k=Side((Plane(self.k_bits, layer.k_dim),), "channels", k_group, clip=self.k_clip),
                v=Side((Plane(self.v_bits, layer.v_dim),), "channels", v_group, clip=self.v_clip),
            )
            compilation.update(index, heads=(head,) * layer.kv_heads)
            self.note(
                compilation, index, f"calibrated rotation, K {self.k_bits} and V {self.v_bits} bits per token"
            )
        tidy(compilation.graph.module)


def _group(size: int) -> int:
    return size if size <= 128 else math.gcd(128, size)


def _covariances(profile: Profile, index: int) -> tuple[Tensor, Tensor]:
    """What decides the rotations of K and of V, means over KV heads: [D, D] each."""
    queries = profile.qq(index)
    k, v = (x.double() for x in profile.samples(index))
    weight = torch.einsum("hsc,hcd,hsd->hs", k, queries, k)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-30)
    return queries.mean(0), torch.einsum("hsc,hs,hsd->hcd", v, weight, v).mean(0)


def mixed(covariance: Tensor, seed: int) -> Tensor:
    """Eigenvectors of a covariance [D, D], strongest first, times Hadamard, columns in bit-reversed order."""
    size = len(covariance)
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    return (vectors @ hadamard(size, seed))[:, bit_reversed(size)]


def bit_reversed(size: int) -> Tensor:
    """0 … size - 1 with their bits in reverse, by blocks of the largest power of two that divides `size`."""
    block = size & -size
    bits = block.bit_length() - 1
    order = [int(format(i, f"0{bits}b")[::-1], 2) if bits else 0 for i in range(block)]
    return torch.tensor([first + i for first in range(0, size, block) for i in order])
