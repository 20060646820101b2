"""What `kvcc.runtime.fuse` puts into a graph instead of chains of small operators.

On the CPU in float32 they run as one pass of C where the kernels are compiled, elsewhere as torch operators.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvcc.kernels import step
from kvcc.kernels.cpu import available
from kvcc.kernels.linear import Packed, linear
from kvcc.kernels.step import Activation, Record

TORCH_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Linear(nn.Module):
    """A linear layer whose weight is stored as `weight` says."""

    def __init__(self, weight: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., cols] to [..., rows]."""
        return linear(x, self.weight, self.bias)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: int, dtype: torch.dtype | None) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension, computed in float32, as `dtype` (None: x's)."""
    if _compiled(x):
        out = torch.empty_like(x)
        if _run(step.rms_norm(x, weight, eps, offset, out)):
            return out
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (offset + weight.float())
    return y.to(dtype or x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x * cos + (-second half of x, first half of x) * sin; x [1, heads, n, dim]."""
    if _compiled(x) and x.dim() == 4:
        out = torch.empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
        if _run(step.rotate(x, cos, sin, out)):
            return out
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def gate(g: Tensor, up: Tensor | None, activation: Activation) -> Tensor:
    """activation(g) * up; activation(g) without `up`."""
    if _compiled(g):
        out = torch.empty_like(g)
        if _run(step.gate(g, up, activation, out)):
            return out
    y = TORCH_ACTIVATIONS[activation](g)
    return y if up is None else y * up


def _compiled(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu" and x.dtype == torch.float32 and _kernels()


@cache
def _kernels() -> bool:
    return available() is None


def _run(record: Record | None) -> bool:
    if record is not None:
        step.run_now(record)
    return record is not None
