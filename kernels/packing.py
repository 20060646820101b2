"""Bit packing in plain torch: the specification that fast kernels are tested against."""

import torch
from torch import Tensor

from kvcc.kernels.layout import SPLIT


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes [..., n] of up to 8 bits into uint8 [..., n * bits / 8].

    Byte i holds codes i, i + m, i + 2m, … (m = bytes) from its low bits up; widths 3, 5 and 6 are two such runs.
    """
    codes = codes.to(torch.uint8)
    if bits in SPLIT:
        low, high = SPLIT[bits]
        return torch.cat([pack(codes & (2**low - 1), low), pack(codes >> low, high)], dim=-1)
    per_byte = 8 // bits
    strips = codes.unflatten(-1, (per_byte, codes.shape[-1] // per_byte))  # [..., per_byte, m]
    packed = torch.zeros_like(strips[..., 0, :])
    for i in range(per_byte):
        packed |= strips[..., i, :] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The `n` codes of each run of `pack`, as uint8 [..., n]."""
    if bits in SPLIT:
        low, high = SPLIT[bits]
        at = n * low // 8
        return unpack(packed[..., :at], low, n) | (unpack(packed[..., at:], high, n) << low)
    strips = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.cat(strips, dim=-1)
