"""Means of K's channels over a page's tokens, stored as codes: what tokens of a page have in common costs a byte.

An error that all tokens of a page share does not average out in attention, as errors of single tokens do, and keys
have much in common: channels that rotate slowly hardly change within a page. In plain torch, for the reference and
for triton; `cpu_attend.c` does the same.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kvcc.kernels.layout import PageLayout, page_mean_step


def less_means(layout: PageLayout, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """k [N, Hkv, tokens, C] less what codes of its means stand for, float32, and the codes [N, Hkv, C] int8.

    Heads without page means, and channels beyond those that have one, stay as they are and have codes of 0. Without any
    the codes are None, and k is as it came.
    """
    if not any(count for _, count in layout.k_means):
        return k, None
    steps = mean_steps(layout, k.shape[-1]).to(k.device)
    k = k.float()
    mean = k.double().mean(2).float()  # in float64, so that no order of summation shows in a code
    codes = (mean / steps.clamp_min(1e-30)).round().clamp(-127, 127)
    codes = torch.where(steps > 0, codes, 0.0)
    return k - (codes * steps)[:, :, None], codes.to(torch.int8)


@lru_cache(maxsize=256)
def mean_steps(layout: PageLayout, channels: int) -> Tensor:
    """What a code of a page mean counts, [Hkv, channels] float32; 0 for channels that have none."""
    steps = torch.zeros(layout.kv_heads, channels)
    for head, (sections, (_, count)) in enumerate(zip(layout.k, layout.k_means, strict=True)):
        steps[head, :count] = page_mean_step(0)
        for section in sections:
            last = min(count, section.first_channel + section.channels)
            steps[head, section.first_channel : last] = (
                page_mean_step(section.bits, section.levels) if count else 0.0
            )
    return steps
