"""Other coordinates for pages: K's in tables that the runtime applies, V's in the weights around attention."""

import torch
from torch import Tensor

from kvcc.errors import PassError
from kvcc.folds import fold_value_map, output_side, value_projection
from kvcc.passes.contract import Compilation
from kvcc.profile import Profile
from kvcc.runtime.plan import LayerPlan


def change_basis(compilation: Compilation, index: int, k: Tensor, v: Tensor) -> None:
    """Pages store K @ k and V @ v, both [Hkv, D, D] and orthogonal; queries are turned as keys are.

    Sets the layer's plan to `select: basis`. Raises PassError where V cannot be folded.
    """
    set_key_tables(compilation, index, k, k)
    _fold(compilation, index, v, v)


def change_scales(compilation: Compilation, index: int, k: Tensor, v: Tensor) -> None:
    """Pages store K / k and V / v, both [Hkv, D] and positive."""
    set_key_tables(compilation, index, torch.diag_embed(1 / k), torch.diag_embed(k))
    fold_value_scales(compilation, index, v)


def fold_value_scales(compilation: Compilation, index: int, v: Tensor) -> None:
    """Pages and windows hold V / v, v [Hkv, D] and positive."""
    _fold(compilation, index, torch.diag_embed(1 / v), torch.diag_embed(v))


def set_key_tables(compilation: Compilation, index: int, keys: Tensor, queries: Tensor) -> None:
    """Tables by which pages store K @ keys and meet Q @ queries, [Hkv, D, C] each."""
    for name, table in (("k_basis", keys), ("q_basis", queries)):
        compilation.tables[f"layers.{index}.{name}"] = table.float().contiguous().clone()
    compilation.update(index, select="basis")


def fold_values(compilation: Compilation, index: int, mean: Tensor, basis: Tensor) -> None:
    """Pages and windows hold (V - mean) @ basis; mean [Hkv, D], basis [Hkv, D, D] and orthogonal."""
    _fold(compilation, index, basis, basis, mean)


def _fold(
    compilation: Compilation, index: int, forward: Tensor, back: Tensor, mean: Tensor | None = None
) -> None:
    """`back` is the transpose of the inverse of `forward`, [Hkv, D, D]."""
    projections = value_projection(compilation, index), output_side(compilation, index)
    mean = forward.new_zeros(forward.shape[:2]) if mean is None else mean
    fold_value_map(compilation, *projections, mean.double(), forward.double(), back.double().mT)


def largest(profile: Profile, layer: int) -> tuple[Tensor, Tensor]:
    """Greatest magnitude of every channel of K and of V in calibration, [Hkv, D] each, at least 1e-6."""
    found = (
        torch.stack(bounds).abs().amax(0).double()
        for bounds in (profile.k_range(layer), profile.v_range(layer))
    )
    k, v = (x.clamp_min(1e-6) for x in found)
    return k, v


def check_channel_groups(index: int, layer: LayerPlan, group_size: int) -> None:
    """Raise PassError unless groups of `group_size` channels come out even in a layer's K and V."""
    for size in (layer.k_dim, layer.v_dim):
        if size % group_size:
            usable = ", ".join(str(d) for d in range(8, size + 1, 8) if size % d == 0)
            raise PassError(
                f"layer {index}: group_size {group_size} does not divide head_dim {size}; use {usable}"
            )
