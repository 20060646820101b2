"""Salient tokens: what probes see, the order in which pages hold tokens, and two classes through the real cache."""

import logging
from dataclasses import replace

import pytest
import torch

from kvcc.errors import PassError
from kvcc.kernels import cpu, reference
from kvcc.runtime.fuse import fuse
from kvcc.runtime.model import CompiledModel
from kvcc.runtime.saliency import Probes, saliency, salient_first
from tests.compiled import compiled, recipe, runnable, running, stepwise, tokens, transformers_logits

PAGES = "windows: {sinks: 2, recent: 4, page: 16}\n"


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("length", "new", "first"), [(0, 60, 2), (20, 40, 4), (63, 1, 16), (0, 3, 0)])
def test_saliency_from_all_weights(softcap: float, length: int, new: int, first: int) -> None:
    """Against the definition, over the whole matrix of attention weights."""
    random = torch.Generator().manual_seed(length + new)
    total, group, heads, size = length + new, 3, 2, 8
    q, k = (torch.randn(n, total, size, generator=random) for n in (heads * group, heads))
    logits = 0.4 * torch.einsum("htd,hsd->hts", q, k.repeat_interleave(group, 0))
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits = logits.masked_fill(torch.ones(total, total).triu(1).bool(), -torch.inf)
    seen = Probes(q[:, length:], logits.logsumexp(-1)[:, length:].T, 0.4, softcap)
    last = max(1, round(0.05 * new))
    drawn = torch.randperm(new - last, generator=torch.Generator().manual_seed(new))[:last]
    probes = [length + p for p in sorted([*drawn.tolist(), *range(new - last, new)])]
    weights = logits.softmax(-1)[:, probes].unflatten(0, (heads, group)).sum((1, 2))  # [heads, total]
    seeing = torch.tensor([sum(p >= t for p in probes) for t in range(total)]).clamp_min(1)
    found = saliency(seen, length, first, k[:, first:])
    torch.testing.assert_close(found, (weights / seeing)[:, first:], atol=1e-6, rtol=1e-5)


def test_pages_hold_salient_tokens_first() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 1, 8, generator=random), *torch.randn(2, 1, 32, 8, generator=random)
    logits = torch.einsum("hnd,td->nht", q, k[0])
    seen = Probes(q, logits.logsumexp(-1), 1.0, 0.0)
    k_sorted, v_sorted = salient_first(seen, 40, 2, 16, k, v)
    score = logits.softmax(-1).sum((0, 1))
    for page in (slice(0, 16), slice(16, 32)):
        order = sorted(range(16), key=lambda i: -float(score[page][i]))
        assert torch.equal(k_sorted[0, page], k[0, page][order])
        assert torch.equal(v_sorted[0, page], v[0, page][order])


def on_cpu(options: str) -> CompiledModel:
    found = compiled("llama", recipe(f"\n  - zipcache: {{{options}}}", PAGES))
    return running("llama", replace(found, module=fuse(found.module)), backend=cpu)


def test_more_bits_for_salient_tokens_help(caplog: pytest.LogCaptureFixture) -> None:
    """Logits of random text, in pieces and token by token, ragged, on both backends."""
    if reason := cpu.available():
        pytest.skip(reason)
    rows, cuts = tokens(70, 70, 70), [30, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60]
    expected = [transformers_logits("llama", row) for row in rows]
    losses = {}
    for high, low in ((8, 8), (8, 2), (2, 2)):
        options = f"salient_bits: {high}, other_bits: {low}"
        with caplog.at_level(logging.WARNING):
            found = stepwise(on_cpu(options), rows, cuts)
        slow = stepwise(
            runnable("llama", recipe(f"\n  - zipcache: {{{options}}}", PAGES), reference), rows, cuts
        )
        for a, b in zip(found, slow):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
        losses[high, low] = sum(float((f - e).square().mean()) for f, e in zip(found, expected))
    assert list(losses.values()) == sorted(losses.values())
    assert losses[8, 8] < 0.05 * losses[2, 2]
    assert "salient" in caplog.text  # decode steps are not captured, and the log says so


def test_bits_are_those_of_both_classes() -> None:
    plan = compiled("llama", recipe("\n  - zipcache: {salient: 0.5}", PAGES)).plan
    layer = plan.layers[0]
    layout = layer.layout(torch.float16)
    assert layer.salient == 8
    assert layout is not None
    assert [part.tokens for part in layout.parts] == [8, 8]
    assert layout.page_tokens == layer.page
    # heads x (K codes, K scales and zeros; V codes, V scales and zeros), each on lines of 16 bytes
    high = 16 * 8 * 4 // 8 + 2 * 32 + 8 * 16 * 4 // 8 + 2 * 16
    low = 16 * 8 * 2 // 8 + 2 * 32 + 8 * 16 * 2 // 8 + 2 * 16
    assert layout.nbytes == layer.kv_heads * (high + low)


def test_small_pages_are_refused() -> None:
    with pytest.raises(PassError, match="layer 0: a page of 8 tokens has no room"):
        compiled("llama", recipe("\n  - zipcache: {}"))
