"""Bit packing in plain torch: the specification that fast kernels are tested against."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes [..., n] of width 1, 2, 3, 4 or 8 into uint8 [..., n * bits / 8].

    Byte i holds codes i, i + m, i + 2m, … (m = bytes) from its low bits up; width 3 is widths 2 and 1 in turn.
    """
    codes = codes.to(torch.uint8)
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-1)
    per_byte = 8 // bits
    strips = codes.unflatten(-1, (per_byte, codes.shape[-1] // per_byte))  # [..., per_byte, m]
    packed = torch.zeros_like(strips[..., 0, :])
    for i in range(per_byte):
        packed |= strips[..., i, :] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The `n` codes of each run of `pack`, as uint8 [..., n]."""
    if bits == 3:
        low, high = packed[..., : n // 4], packed[..., n // 4 :]
        return unpack(low, 2, n) | (unpack(high, 1, n) << 2)
    strips = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.cat(strips, dim=-1)
