"""Levels that are no uniform grid: those of normal variables, and small floating-point numbers.

A code is a sign in its highest bit and the index of a magnitude in the others. In plain torch, for the reference;
`cpu_attend.c` and the triton kernels do the same.
"""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Levels = Literal["uniform", "normal", "e2m1", "e4m3"]

BITS_OF: dict[str, tuple[int, ...]] = {"normal": (1, 2, 3, 4), "e2m1": (4,), "e4m3": (8,)}
KINDS = ("uniform", "normal", "e2m1", "e4m3")  # as kernels number them
E4M3_MOST = 448.0
E4M3_LEAST = 2.0**-9
E2M1_MOST = 6.0
NORM_FLOOR = 1e-6

# Magnitudes of the quantiser with the least squared error for a normal variable (Max, 1960; Lloyd, 1982).
NORMAL = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423404, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def magnitudes(levels: Levels, bits: int) -> tuple[float, ...]:
    """Of codes without their sign; empty for e4m3, whose codes are numbers of that format, and for uniform levels."""
    if levels == "normal":
        return NORMAL[bits]
    return E2M1 if levels == "e2m1" else ()


def unit_levels(levels: Levels, bits: int) -> Levels:
    """With unit steps: uniform ones for widths that have no normal levels."""
    return "uniform" if levels == "normal" and bits not in BITS_OF["normal"] else levels


def span(levels: Levels, bits: int) -> float:
    """Steps that all codes together cover, of uniform levels or of a list."""
    return float(2**bits) if levels == "uniform" else 2 * magnitudes(levels, bits)[-1]


def values_of(codes: Tensor, levels: Levels, bits: int) -> Tensor:
    """What codes uint8 [...] stand for, float32."""
    if levels == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    half = 1 << (bits - 1)
    size = _table(levels, bits).to(codes.device)[(codes & (half - 1)).long()]
    return torch.where(codes >= half, -size, size)


def nearest(x: Tensor, levels: Levels, bits: int) -> Tensor:
    """Codes uint8 of the levels nearest to x; of two as near the smaller one, for e4m3 the even one."""
    if levels == "e4m3":
        return x.float().clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).view(torch.uint8)
    table = _table(levels, bits).to(x.device)
    index = torch.bucketize(x.float().abs().contiguous(), (table[1:] + table[:-1]) / 2)
    return (index + (x < 0) * (1 << (bits - 1))).to(torch.uint8)


def level_codes(x: Tensor, levels: Levels, bits: int, group_size: int | None) -> tuple[Tensor, Tensor | None]:
    """Codes of runs x [..., n] and the scale of each group of `group_size`, None where levels are taken as they are.

    Normal levels: x over its root mean square, in float16, chooses codes; the scale then gives x its length again.
    e2m1: the scale puts the largest of a group on the largest level, and is e4m3 itself.
    """
    if group_size is None:
        return nearest(x, levels, bits), None
    groups = x.float().unflatten(-1, (-1, group_size))
    if levels == "e2m1":
        wanted = (groups.abs().amax(-1) / E2M1_MOST).clamp(E4M3_LEAST, E4M3_MOST)
        scale = wanted.to(torch.float8_e4m3fn)
        return nearest(groups / scale.float()[..., None], levels, bits).flatten(-2), scale
    squares = groups.double().square().sum(-1)  # float64: its order of summation shows in no float16
    spread = (squares / group_size).sqrt().clamp(NORM_FLOOR, 65504.0).float().half().float()
    codes = nearest(groups / spread[..., None], levels, bits)
    length = values_of(codes, levels, bits).double().square().sum(-1)
    return codes.flatten(-2), (squares / length).sqrt().float().clamp_max(65504.0).half()


@lru_cache
def _table(levels: Levels, bits: int) -> Tensor:
    return torch.tensor(magnitudes(levels, bits))
