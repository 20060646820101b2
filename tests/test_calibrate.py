"""Calibration runs: what is measured, in batches, resumed, killed, and refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_profile import agree, naive, same
from torch import Tensor, fx, nn

from kvcc import statistics
from kvcc.calibrate import Progress, PromptSet, TokenPrompt, calibrate, encode_set, without_repeats
from kvcc.errors import CapacityError, DataError, ProfileError
from kvcc.graph import Graph
from kvcc.profile import merge
from kvcc.runtime.identity import ModelIdentity
from kvcc.statistics import LayerShape

SKIP = 16
LENGTHS = (1, SKIP - 1, SKIP + 1, 40, 75)


class Toy(nn.Module):
    """Two attention layers without norms, whose graph has the inputs of a captured model."""

    def __init__(self, q_heads: int, kv_heads: int, dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(q_heads)
        self.heads, self.dim = (q_heads, kv_heads), dim
        self.embed, self.place = nn.Embedding(50, 24), nn.Embedding(128, 24)
        sizes = {"q": q_heads, "k": kv_heads, "v": kv_heads}
        layers = ({n: nn.Linear(24, h * dim) for n, h in sizes.items()} for _ in range(2))
        self.layers = nn.ModuleList(
            nn.ModuleDict(layer | {"o": nn.Linear(q_heads * dim, 24)}) for layer in layers
        )

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        keep = (positions[:, :, None] >= positions[:, None, :]) & mask[:, None, :].bool()
        x = self.embed(tokens) + self.place(positions)
        for i, layer in enumerate(self.layers):
            q, k, v = (layer[n](x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for n in "qkv")
            out = torch.ops.kvcc.attention.default(q, k, v, keep[:, None], None, i, 0.4, 0, 0.0)
            x = x + layer["o"](out.flatten(2))
        return x[:, rows]

    @torch.no_grad()
    def seen(self, ids: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q, k, v of each layer for one prompt alone, with plain attention."""
        x = self.embed(torch.tensor(ids)) + self.place(torch.arange(len(ids)))
        found = []
        for layer in self.layers:
            q, k, v = (layer[n](x).view(len(ids), -1, self.dim).transpose(0, 1) for n in "qkv")
            found.append((q, k, v))
            many_k, many_v = (y.repeat_interleave(len(q) // len(k), 0) for y in (k, v))
            logits = (q @ many_k.mT * 0.4).masked_fill(torch.ones(len(ids), len(ids)).triu(1) > 0, -torch.inf)
            x = x + layer["o"]((logits.softmax(-1) @ many_v).transpose(0, 1).flatten(1))
        return found


def toy(q_heads: int = 4, kv_heads: int = 2, **identity: object) -> tuple[Toy, Graph]:
    module = Toy(q_heads, kv_heads)
    facts = {
        "name": "toy", "model_type": "toy", "layers": 2, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": 8,
        "hidden_size": 24, "vocab_size": 50, "context_length": 128, "dtype": "float32", "digest": "sha256:toy",
        "tokenizer_digest": "sha256:words",
    }  # fmt: skip
    return module, Graph(fx.symbolic_trace(module), ModelIdentity(**(facts | identity)))


def prompts(name: str, lengths: Sequence[int], seed: int = 0) -> PromptSet:
    random = torch.Generator().manual_seed(len(name) + seed)
    made = (
        TokenPrompt(tuple(torch.randint(50, (n,), generator=random).tolist()), f"prompt {i} of {name}")
        for i, n in enumerate(lengths)
    )
    return PromptSet(name, f"sha256:{name}", seed, tuple(made))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 2), (3, 3)], ids=["gqa", "mha"])
def test_statistics_of_padded_batches_equal_naive_loops(
    q_heads: int, kv_heads: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph = toy(q_heads, kv_heads)
    one = prompts("one", LENGTHS)
    profile = calibrate(graph, [one], batch_size=batch_size)
    seen = [model.seen(prompt.ids) for prompt in one.prompts]
    names = {f"prompt {i}": prompt.id for i, prompt in enumerate(one.prompts)}
    rows = statistics.probe_rows
    monkeypatch.setattr(statistics, "probe_rows", lambda length, name: rows(length, names[name]))
    for layer in range(2):
        shape = LayerShape(q_heads, kv_heads, 8, 8, 0.4)
        assert profile.shapes[layer] == shape
        agree(profile.layers[layer], naive(shape, [each[layer] for each in seen]), rtol=2e-4)


def test_batches_of_other_sizes_change_rounding_only() -> None:
    _, graph = toy()
    sets = [prompts("one", LENGTHS)]
    same(calibrate(graph, sets, batch_size=2), calibrate(graph, sets), rtol=1e-4, atol=1e-4, sketches=False)


def test_half_precision_is_measured_as_it_is() -> None:
    module, graph = toy()
    half = Graph(fx.symbolic_trace(module.half()), graph.model)
    profile = calibrate(half, [prompts("one", LENGTHS)])
    assert profile.layers[1].k_max.half().double().equal(profile.layers[1].k_max)
    full = calibrate(toy()[1], [prompts("one", LENGTHS)])
    assert torch.allclose(profile.k_cov(1), full.k_cov(1), atol=0.02)


def test_merging_equals_one_run_in_any_order() -> None:
    _, graph = toy()
    a, b = prompts("a", LENGTHS), prompts("bb", (64, 2, 30))
    for size in (1, 2):
        parts = [calibrate(graph, [each], batch_size=size) for each in (a, b)]
        whole = calibrate(graph, [a, b], batch_size=size)
        same(merge(parts), whole, rtol=1e-9)
        same(merge(reversed(parts)), merge(parts))
        same(calibrate(graph, [b, a], batch_size=size), whole, rtol=1e-9)


def test_a_repeated_prompt_counts_once() -> None:
    _, graph = toy()
    a, b = prompts("a", (20, 30)), prompts("b", (40,))
    again = replace(b, prompts=(a.prompts[1], *b.prompts, b.prompts[0]))
    assert [p.id for s in without_repeats([a, again]) for p in s.prompts] == [
        "prompt 0 of a", "prompt 1 of a", "prompt 0 of b",
    ]  # fmt: skip
    same(calibrate(graph, [a, again, a]), calibrate(graph, [a, b]))
    with pytest.raises(ProfileError, match="1 prompts are in both"):
        merge([calibrate(graph, [a]), calibrate(graph, [again])])


def test_memory_does_not_grow_with_tokens() -> None:
    _, graph = toy()
    sizes = {
        sum(tensor.nbytes for layer in calibrate(graph, [each]).layers for tensor in layer.tensors().values())
        for each in (prompts("few", (17,)), prompts("many", (100,) * 9))
    }
    assert len(sizes) == 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("batch_size", [1, 2])
def test_resuming_after_any_batch_gives_the_same_bits(tmp_path: Path, batch_size: int) -> None:
    _, graph = toy()
    sets, state = [prompts("a", LENGTHS), prompts("bb", (33, 50, 3))], tmp_path / "deep" / "p.partial"
    undisturbed = calibrate(graph, sets, batch_size=batch_size)
    total = sum(len(each.prompts) for each in sets)

    def stop(progress: Progress) -> None:
        if progress.prompts < total:
            raise Stop

    attempts = 0
    while True:
        attempts += 1
        reports: list[Progress] = []
        try:
            resumed = calibrate(
                graph, sets, batch_size=batch_size, state=state, resume=True, save_every=0,
                progress=lambda p: (reports.append(p), stop(p))[0],
            )  # fmt: skip
        except Stop:
            assert attempts < 20
            continue
        break
    assert attempts == (8 if batch_size == 1 else 5)
    assert reports[-1].resumed_tokens > 0
    same(resumed, undisturbed)


def test_without_resume_a_run_starts_again(tmp_path: Path) -> None:
    _, graph = toy()
    state = tmp_path / "state"
    sets = [prompts("a", (30, 20))]
    calibrate(graph, sets, state=state, save_every=0)
    seen: list[Progress] = []
    calibrate(graph, sets, state=state, save_every=0, progress=seen.append)
    assert [p.tokens for p in seen] == [30, 50]
    assert seen[-1].seconds_left == 0
    calibrate(graph, sets, state=state, resume=True, progress=seen.append)
    assert len(seen) == 2  # everything was in the state


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    _, graph = toy()
    state, sets = tmp_path / "state", [prompts("a", (30, 20))]
    calibrate(graph, sets, state=state, save_every=0)

    def refused(reason: str, graph: Graph = graph, sets: list[PromptSet] = sets, **options: int) -> None:
        with pytest.raises(
            ProfileError, match=f"is the state of another run: its {reason}.*without --resume"
        ):
            calibrate(graph, sets, state=state, resume=True, **options)

    refused("model is sha256:toy, not sha256:other", graph=toy(digest="sha256:other")[1])
    refused("tokenizer is sha256:words, not sha256:t", graph=toy(tokenizer_digest="sha256:t")[1])
    refused("dtype is float32, not float16", graph=toy(dtype="float16")[1])
    refused("seed is 0, not 1", sets=[replace(sets[0], seed=1)])
    refused("data is a sha256:a, not a sha256:b", sets=[replace(sets[0], digest="sha256:b")])
    refused(r"prompt tokens \(length\)", sets=[replace(sets[0], prompts=sets[0].prompts[:1])])
    refused("batch size is 1, not 2", batch_size=2)
    refused("skip_first is 16, not 4", skip_first=4)
    for broken in (state.read_bytes()[:-5], b"", b"\0" * 50):
        state.write_bytes(broken)
        with pytest.raises(ProfileError, match="not a readable calibration state"):
            calibrate(graph, sets, state=state, resume=True)


def test_prompts_that_cannot_be_measured_are_refused() -> None:
    _, graph = toy(context_length=64)
    with pytest.raises(CapacityError, match="has 65 tokens, but toy has a context of 64: use --length 64"):
        calibrate(graph, [prompts("a", (65,))])
    with pytest.raises(DataError, match="no prompt is longer than the 16 first tokens"):
        calibrate(graph, [prompts("a", (16, 3))])
    with pytest.raises(DataError, match="no prompt is longer"):
        calibrate(graph, [])
    with pytest.raises(DataError, match="batch size 0"):
        calibrate(graph, [prompts("a", (20,))], batch_size=0)


def test_prompts_are_cut_to_length_and_empty_ones_left_out() -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(c) for c in text]

    made = encode_set(["abcdef", "", "x"], Letters(), name="n", digest="d", seed=3, length=4)
    assert [p.ids for p in made.prompts] == [(97, 98, 99, 100), (120,)]
    longer = encode_set(["abcdef"], Letters(), name="n", digest="d", seed=3, length=6)
    assert longer.prompts[0].id == made.prompts[0].id  # cutting does not make it another prompt
    with pytest.raises(DataError, match="n: holds no text"):
        encode_set(["", ""], Letters(), name="n", digest="d", seed=0, length=4)


def test_a_model_that_overflows_is_refused() -> None:
    module, graph = toy()
    module.layers[1]["k"].weight.data.fill_(torch.inf)
    with pytest.raises(ProfileError, match="layer 1: k is not finite on prompt prompt 0 of a"):
        calibrate(Graph(fx.symbolic_trace(module), graph.model), [prompts("a", (20,))])


def test_a_batch_too_large_for_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = toy()

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(statistics, "add_prompt", full)
    with pytest.raises(
        CapacityError, match="a batch of 2 prompts of up to 30 tokens does not fit into memory"
    ):
        calibrate(graph, [prompts("a", (20, 30))], batch_size=2)
