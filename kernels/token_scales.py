"""Scales of tokens before unit steps: of a few candidates, the one with which a token's codes are off by least.

In plain torch, for the reference and for triton; `cpu_attend.c` does the same.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kvcc.kernels.layout import TOKEN_SCALE_BITS, TOKEN_SCALE_OCTAVE, TOKEN_SCALE_ONE, PageLayout, Section
from kvcc.kernels.levels import nearest, values_of


def scale_of(codes: Tensor) -> Tensor:
    """What codes of token scales stand for, float32."""
    return torch.exp2((codes.float() - TOKEN_SCALE_ONE) / TOKEN_SCALE_OCTAVE)


def of_layout(
    layout: PageLayout, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """k, v over their tokens' scales, and the codes of both; see `scaled_tokens`."""
    k, k_codes = scaled_tokens(layout.k, layout.k_token_scales, k)
    v, v_codes = scaled_tokens(layout.v, layout.v_token_scales, v)
    return k, v, k_codes, v_codes


def scaled_tokens(
    sections: tuple[tuple[Section, ...], ...], places: tuple[int | None, ...], x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One side x [N, Hkv, tokens, C] over its tokens' scales, float32, and their codes [N, Hkv, tokens] uint8.

    `sections` and `places` by KV head, as a PageLayout has them. Heads without token scales stay as they are;
    without any the codes are None.
    """
    if all(place is None for place in places):
        return x, None
    half = _half_ranges(sections, places, x.shape[-1]).to(x.device)[:, None]  # [Hkv, 1, C]
    x = x.float()
    normal = [(bits, at.to(x.device)[:, None]) for bits, at in _normal_channels(sections, x.shape[-1])]
    codes = token_scales(x, half, normal)
    return x / scale_of(codes)[..., None], codes


def token_scales(x: Tensor, half_range: Tensor, normal: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
    """Codes [...] of the scales with which values x [..., C] of a token lie closest to levels; the least of equals.

    half_range: 2^(bits - 1) of each channel, broadcast to x; 0 where a channel does not count. The code of 1 where
    none counts. normal: widths of normal levels, and which channels have them, broadcast to x; others have unit grids.
    """
    best = torch.full(x.shape[:-1], torch.inf, device=x.device)
    chosen = torch.full(x.shape[:-1], TOKEN_SCALE_ONE, dtype=torch.uint8, device=x.device)
    counts = (half_range > 0).float()
    for code in range(2**TOKEN_SCALE_BITS):
        scale = float(scale_of(torch.tensor(code)))
        steps = x / scale
        rounded = steps.floor().clamp(-half_range, half_range - 1) + 0.5
        for bits, at in normal:
            rounded = torch.where(at, values_of(nearest(steps, "normal", bits), "normal", bits), rounded)
        error = (rounded - steps).square().mul(counts).sum(-1) * scale**2
        closer = (error < best) & (counts.sum(-1) > 0)
        best = torch.where(closer, error, best)
        chosen = torch.where(closer, code, chosen)
    return chosen


@lru_cache(maxsize=256)
def _normal_channels(
    sections: tuple[tuple[Section, ...], ...], channels: int
) -> tuple[tuple[int, Tensor], ...]:
    """Widths of planes with normal levels, and whether channels lie in one: bool [Hkv, C]."""
    found: dict[int, Tensor] = {}
    for head, planes in enumerate(sections):
        for plane in planes:
            if plane.levels == "normal":
                at = found.setdefault(plane.bits, torch.zeros(len(sections), channels, dtype=torch.bool))
                at[head, plane.first_channel : plane.first_channel + plane.channels] = True
    return tuple(found.items())


@lru_cache(maxsize=256)
def _half_ranges(
    sections: tuple[tuple[Section, ...], ...], places: tuple[int | None, ...], channels: int
) -> Tensor:
    """[Hkv, C] float32, 0 for channels that are not stored and heads whose tokens have no scales."""
    half = torch.zeros(len(sections), channels)
    for head, (planes, place) in enumerate(zip(sections, places, strict=True)):
        for plane in planes:
            last = plane.first_channel + plane.channels
            half[head, plane.first_channel : last] = 0 if place is None else 2 ** (plane.bits - 1)
    return half
