"""A quantile sketch per channel: counts in buckets whose width grows with the value, mergeable by addition.

The idea is DDSketch's (Masson, Rim, Lee, VLDB 2019). The bucket of a value is read off the bits of its
float32 form: the exponent and the first four bits of the mantissa, so an octave has 16 buckets and no
logarithm is computed. Magnitudes below 2⁻¹² share one bucket around zero; magnitudes of 2¹² and more share
the last one.
"""

import torch
from torch import Tensor

_MANTISSA_BITS = 4
_LOWEST, _HIGHEST = -12, 12  # octaves, powers of two
_SIDE = (_HIGHEST - _LOWEST) << _MANTISSA_BITS  # buckets of one sign
_SHIFT = 23 - _MANTISSA_BITS  # float32 has 23 mantissa bits
_BASE = (127 + _LOWEST) << _MANTISSA_BITS  # 127: float32's exponent bias

BUCKETS = 2 * _SIDE + 1
RELATIVE_ERROR = 1 / (2 * 2**_MANTISSA_BITS + 1)  # of a quantile whose magnitude is in [2⁻¹², 2¹²)
ABSOLUTE_ERROR = 2.0**_LOWEST  # of a quantile of smaller magnitude


def add(sketch: Tensor, values: Tensor) -> None:
    """Count `values` [H, T, D] (any float dtype, finite) in `sketch` [H, D, BUCKETS] int32, in place."""
    heads, _, dim = values.shape
    bits = values.float().contiguous().view(torch.int32)
    step = ((bits & 0x7FFFFFFF) >> _SHIFT).sub_(_BASE - 1).clamp_(0, _SIDE)
    bucket = torch.where(bits < 0, -step, step)
    first = torch.arange(heads * dim, device=values.device, dtype=torch.int32) * BUCKETS + _SIDE
    bucket += first.view(heads, 1, dim)
    sketch += torch.bincount(bucket.flatten(), minlength=sketch.numel()).view_as(sketch)


def representatives() -> Tensor:
    """The value that stands for each bucket, [BUCKETS] float64, ascending.

    For the bucket [a, b) it is 2ab/(a+b), whose relative error to any value inside is at most (b−a)/(b+a).
    """
    steps = 2**_MANTISSA_BITS
    octave = torch.arange(_LOWEST, _HIGHEST, dtype=torch.float64).exp2()
    low = (octave[:, None] * (1 + torch.arange(steps, dtype=torch.float64) / steps)).flatten()
    high = torch.cat([low[1:], torch.tensor([2.0**_HIGHEST], dtype=torch.float64)])
    middle = 2 * low * high / (low + high)
    return torch.cat([-middle.flip(0), torch.zeros(1, dtype=torch.float64), middle])


def quantile(sketch: Tensor, p: float) -> Tensor:
    """The p-quantile of each channel, `sketch` [..., BUCKETS] → [...] float64; 0 ≤ p ≤ 1.

    With n values sorted ascending, the error is to the value of index ⌊p(n−1)⌋ and at most RELATIVE_ERROR of
    its magnitude, or ABSOLUTE_ERROR if that is smaller than 2⁻¹². An empty channel gives NaN.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"quantile {p} is not between 0 and 1")
    below = sketch.to(torch.int64).cumsum(-1)
    count = below[..., -1]
    rank = (p * (count - 1).clamp(min=0).double()).floor().to(torch.int64)
    bucket = torch.searchsorted(below, rank[..., None], right=True)[..., 0].clamp(max=BUCKETS - 1)
    values = representatives().to(sketch.device)[bucket]
    return torch.where(count > 0, values, torch.full_like(values, torch.nan))
