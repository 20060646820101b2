"""Attention that differentiates by stored keys and values apart, against autograd through the same in plain torch."""

import pytest
import torch
from torch import Tensor

from kvcc import stored_attention
from kvcc.graph import causal_mask
from kvcc.stored_attention import Reach, StoredAttention

BLOCK, SCALE = 8, 0.3


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_attention, "BLOCK", BLOCK)


def plain(
    q: Tensor, k: Tensor, v: Tensor, stored_k: Tensor, stored_v: Tensor, sinks: Tensor | None, reach: Reach
) -> Tensor:
    """A query at a time, of keys and values from the one or the other."""
    outs = []
    for row in range(q.shape[2]):
        old = torch.tensor([t >= reach.first and row - t > reach.recent for t in range(q.shape[2])])
        padding = (0, 0, reach.first, 0)
        keys, values = (
            torch.where(old[:, None], torch.nn.functional.pad(far, padding), near)
            for near, far in ((k, stored_k), (v, stored_v))
        )
        logits = torch.einsum("hgd,htd->hgt", q[:, :, row], keys) * reach.scale
        if reach.softcap:
            logits = reach.softcap * torch.tanh(logits / reach.softcap)
        logits = logits.masked_fill(~reach.seen[row], -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[..., None]], -1)
        weights = logits.softmax(-1)[..., : q.shape[2]]
        outs.append(torch.einsum("hgt,hte->hge", weights, values))
    return torch.stack(outs, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("length", "first", "recent", "window", "softcap", "sinks", "heads", "group"),
    [
        (1, 0, 2, 0, 0.0, False, 2, 2),
        (BLOCK - 1, 2, 2, 0, 0.0, False, 2, 3),
        (BLOCK, 2, 0, 0, 0.0, False, 2, 1),
        (BLOCK + 1, 2, 3, 0, 0.0, True, 1, 4),
        (3 * BLOCK + 5, 4, 3, 0, 0.0, False, 2, 3),
        (3 * BLOCK + 5, 4, 2 * BLOCK, 0, 0.0, True, 2, 3),  # recent tokens reach back over blocks
        (3 * BLOCK + 5, BLOCK + 3, 1, 0, 0.0, False, 3, 1),  # the first tokens do
        (3 * BLOCK, 4, 3, 0, 1.5, True, 2, 2),
        (3 * BLOCK, 3 * BLOCK, 3, BLOCK + 1, 0.0, True, 2, 2),  # a sliding window stores nothing
    ],
)
def test_gradients_are_those_of_plain_attention(
    length: int,
    first: int,
    recent: int,
    window: int,
    softcap: float,
    sinks: bool,
    heads: int,
    group: int,
    dtype: torch.dtype,
) -> None:
    random = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype)

    q, k, v = draw(heads, group, length, 16), draw(heads, length, 16), draw(heads, length, 24)
    share = draw(heads, group) if sinks else None
    seen = causal_mask(length, window)
    reach = Reach(seen, first, recent, SCALE, softcap)
    weights = draw(heads, group, length, 24)
    found, expected = [], []
    for attend, results in ((StoredAttention.apply, found), (plain, expected)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, k[:, first:], v[:, first:])]
        out = attend(*leaves, share, reach)
        results += [out, *torch.autograd.grad((out * weights).sum(), leaves)]
    for name, ours, theirs in zip(
        ("out", "q", "k", "v", "stored k", "stored v"), found, expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    stored = length - first > recent + 1
    assert bool(found[4].any()) == bool(found[5].any()) == stored
