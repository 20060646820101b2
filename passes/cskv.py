"""CSKV: low-rank K and V in pages, exact in the window."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from kvcc.bases import fold_values, set_key_tables
from kvcc.errors import PassError
from kvcc.folds import value_statistics
from kvcc.kernels.layout import Plane, Side
from kvcc.passes.contract import Compilation, Pass
from kvcc.runtime.plan import HeadPlan
from kvcc.surgery import tidy


class Cskv(Pass):
    """CSKV (arXiv 2409.10593): tokens behind the exact window keep a latent of fewer channels, quantised to 4 bits.

    The latent is what reconstructs K, and V, of the calibration tokens best: their leading principal directions, the
    closed form of the layer-wise fit that the paper starts by an activation-aware SVD and trains.

    Departures: latents are a KV head's own, and K's is taken after RoPE, so nothing is rebuilt and rotated when it is
    read: queries meet it in its own coordinates, V's are folded into W_v and W_o. The paper's latents are of all heads
    together, before RoPE, which compresses further and reads slower. Window and sinks hold K and V, not latents, too.
    """

    name: ClassVar[str] = "cskv"
    needs_profile: ClassVar[bool] = True

    k_rank: float = Field(0.5, gt=0, le=1, description="latent channels of K, of all")
    v_rank: float = Field(0.75, gt=0, le=1, description="latent channels of V, of all")
    bits: Literal[2, 3, 4, 8, 16] = Field(4, description="bits per code of a latent; 16: half precision")
    group_size: int = Field(32, ge=8, description="tokens of a K channel that share a scale and a zero")

    def apply(self, compilation: Compilation) -> None:
        for index, layer in self.paged(compilation):
            if layer.page % self.group_size:
                raise PassError(
                    f"layer {index}: group_size {self.group_size} does not divide the page of {layer.page} tokens"
                )
            k_rank, v_rank = (
                max(8, 8 * round(share * size / 8))
                for share, size in ((self.k_rank, layer.k_dim), (self.v_rank, layer.v_dim))
            )
            profile = compilation.need_profile(self.name)
            mean, moment = value_statistics(compilation, index, profile)
            k_basis, v_basis = (
                torch.linalg.eigh(each).eigenvectors.flip(-1) for each in (profile.k_cov(index), moment)
            )
            set_key_tables(compilation, index, k_basis[..., :k_rank], k_basis[..., :k_rank])
            compilation.tables[f"layers.{index}.k_mean"] = profile.k_mean(index).float().contiguous()
            fold_values(compilation, index, mean, v_basis)
            k = Side((Plane(self.bits, k_rank),), "tokens", self.group_size)
            v = Side((Plane(self.bits, v_rank),), "channels", v_rank)
            heads = (HeadPlan(k=k, v=v),) * layer.kv_heads
            compilation.update(index, heads=heads, mean_correction=True)
            self.note(
                compilation, index, f"latents of {k_rank} K and {v_rank} V channels at {self.bits} bits"
            )
        tidy(compilation.graph.module)
