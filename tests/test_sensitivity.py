"""Gradients at attention nodes: the graph is unchanged, and they predict what errors cost."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from kvcc import sensitivity, statistics
from kvcc.calibration import PromptSet, TokenPrompt, calibrate
from kvcc.graph import Graph
from kvcc.sensitivity import Gradients
from tests.compiled import tokens
from tests.tiny import ARCHITECTURES, tiny_graph

SKIP, RECENT, LENGTH = 4, 6, 40


@pytest.fixture(autouse=True)
def _short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "RECENT", RECENT)


def inputs(ids: list[int]) -> tuple[Tensor, ...]:
    given = torch.tensor([ids])
    return given, torch.arange(len(ids))[None], torch.ones_like(given), torch.arange(len(ids))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_differentiable_graph_gives_the_same_logits(name: str) -> None:
    graph = tiny_graph(name)
    (ids,) = tokens(LENGTH)
    with torch.no_grad():
        found = Gradients(graph.module, SKIP).run(*inputs(ids))
        expected = graph.module(*inputs(ids))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


class Disturbed(fx.Interpreter):
    """Attention in which keys and values that are RECENT tokens old or older, and no sinks, have errors."""

    def __init__(self, graph: Graph, size: float, which: str, seed: int) -> None:
        super().__init__(graph.module)
        self.size, self.which = size, which
        self.random = torch.Generator().manual_seed(seed)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.kvcc.attention.default:
            return super().call_function(target, args, kwargs)
        q, k, v, *_, scale, _window, _softcap = args
        wrong = {"k": k, "v": v}
        error = torch.randn(wrong[self.which].shape, generator=self.random) * self.size
        error[:, :, :SKIP] = 0
        wrong[self.which] = wrong[self.which] + error
        outs = []
        for i in range(q.shape[2]):  # a query at a time: nothing shared with what is tested
            old = torch.arange(i + 1) < i - RECENT
            keys = torch.where(old[:, None], wrong["k"][:, :, : i + 1], k[:, :, : i + 1])
            values = torch.where(old[:, None], wrong["v"][:, :, : i + 1], v[:, :, : i + 1])
            group = q.shape[1] // k.shape[1]
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            weights = (torch.einsum("bhd,bhtd->bht", q[:, :, i], keys) * scale).softmax(-1)
            outs.append(torch.einsum("bht,bhtd->bhd", weights, values))
        return torch.stack(outs, 1)


@pytest.mark.parametrize("which", ["k", "v"])
def test_fisher_information_predicts_the_divergence_of_small_errors(which: str) -> None:
    """Random errors of one size in every key, or value: their mean divergence is half their size² times the trace."""
    graph, size = tiny_graph("llama"), 0.02
    (ids,) = tokens(LENGTH)
    layers = {}
    gradients = Gradients(graph.module, SKIP)
    labelled = 150
    for node_layer in range(graph.model.layers):
        shape = statistics.LayerShape(graph.model.q_heads, graph.model.kv_heads, 16, 16, 0.25)
        layers[node_layer] = statistics.empty(shape)
    for draw in range(labelled):
        gradients.add(layers, ids, f"labels {draw}")
    sums = (getattr(held, f"{which}_grad") for held in layers.values())
    predicted = 0.5 * size**2 * sum(float(s.diagonal(dim1=1, dim2=2).sum()) for s in sums) / labelled
    rows = slice(SKIP + RECENT, None)
    measured = []
    with torch.no_grad():
        expected = graph.module(*inputs(ids))[0, rows].log_softmax(-1)
        for seed in range(60):
            found = Disturbed(graph, size, which, seed).run(*inputs(ids))[0, rows].log_softmax(-1)
            measured.append(float((expected.exp() * (expected - found)).sum()))
    assert predicted > 0
    assert sum(measured) / len(measured) == pytest.approx(predicted, rel=0.25)


def test_calibration_takes_gradients_when_asked() -> None:
    graph = tiny_graph("llama")
    prompts = tuple(TokenPrompt(tuple(ids), str(i)) for i, ids in enumerate(tokens(40, 30, 8)))
    sets = [PromptSet("random", "sha256:0", 0, prompts)]
    plain = calibrate(graph, sets, skip_first=SKIP)
    assert not plain.has_gradients
    profile = calibrate(graph, sets, skip_first=SKIP, gradients=True)
    assert profile.has_gradients
    together = calibrate(graph, sets, skip_first=SKIP, gradients=True, batch_size=3)
    for layer in range(graph.model.layers):
        fisher = profile.k_fisher(layer)
        assert fisher.diagonal(dim1=1, dim2=2).min() > 0
        torch.testing.assert_close(fisher, together.k_fisher(layer))
        torch.testing.assert_close(profile.v_fisher(layer), together.v_fisher(layer))
        k, v = profile.samples(layer)
        assert k.shape[1] == v.shape[1] == profile.body_tokens(layer)
        torch.testing.assert_close(k.double().mean(1), profile.k_mean(layer), atol=1e-5, rtol=1e-5)
