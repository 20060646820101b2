"""Scales of tokens before unit steps: of a few candidates, the one with which a token's codes are off by least.

In plain torch, for the reference and for triton; `cpu_attend.c` does the same.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kvcc.kernels.layout import TOKEN_SCALE_BITS, TOKEN_SCALE_OCTAVE, TOKEN_SCALE_ONE, PageLayout, Section


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
    codes = token_scales(x, half)
    return x / scale_of(codes)[..., None], codes


def token_scales(x: Tensor, half_range: Tensor) -> Tensor:
    """Codes [...] of the scales with which values x [..., C] of a token lie closest to unit grids; the least of equals.

    half_range: 2^(bits - 1) of each channel, broadcast to x; 0 where a channel does not count. The code of 1 where
    none counts.
    """
    best = torch.full(x.shape[:-1], torch.inf, device=x.device)
    chosen = torch.full(x.shape[:-1], TOKEN_SCALE_ONE, dtype=torch.uint8, device=x.device)
    counts = (half_range > 0).float()
    for code in range(2**TOKEN_SCALE_BITS):
        scale = float(scale_of(torch.tensor(code)))
        steps = x / scale
        rounded = steps.floor().clamp(-half_range, half_range - 1) + 0.5
        error = (rounded - steps).square().mul(counts).sum(-1) * scale**2
        closer = (error < best) & (counts.sum(-1) > 0)
        best = torch.where(closer, error, best)
        chosen = torch.where(closer, code, chosen)
    return chosen


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
