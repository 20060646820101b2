"""Calibration runs: what is measured, in batches, resumed, killed, and refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from test_profile import agree, naive, same
from tiny import tiny_graph
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, fx, nn

from kvcc import statistics
from kvcc.calibration import (
    SAVE_EVERY,
    SKIP_FIRST,
    Progress,
    PromptSet,
    TokenPrompt,
    calibrate,
    encode_sets,
    without_repeats,
)
from kvcc.calibration_data import Prompt
from kvcc.cli.calibrate import command
from kvcc.errors import CapacityError, DataError, ProfileError
from kvcc.graph import Graph
from kvcc.profile import Profile, merge
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
        "name": "toy", "model_type": "toy", "layers": 2, "q_heads": q_heads, "kv_heads": kv_heads,
        "head_dim": 8, "hidden_size": 24, "vocab_size": 50, "context_length": 128, "dtype": "float32",
        "digest": "sha256:toy", "tokenizer_digest": "sha256:words",
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


class StopError(Exception):
    pass


@pytest.mark.parametrize("batch_size", [1, 2])
def test_resuming_after_any_batch_gives_the_same_bits(tmp_path: Path, batch_size: int) -> None:
    _, graph = toy()
    sets, state = [prompts("a", LENGTHS), prompts("bb", (33, 50, 3))], tmp_path / "deep" / "p.partial"
    undisturbed = calibrate(graph, sets, batch_size=batch_size)
    total = sum(len(each.prompts) for each in sets)

    def stop(progress: Progress) -> None:
        if progress.prompts < total:
            raise StopError

    stopped = 0
    options = {"batch_size": batch_size, "state": state, "resume": True, "save_every": 0, "progress": stop}
    for _ in range(8 if batch_size == 1 else 5):
        try:
            resumed = calibrate(graph, sets, **options)
        except StopError:
            stopped += 1
    assert stopped == (7 if batch_size == 1 else 4)
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


def test_progress_counts_what_an_earlier_run_did(tmp_path: Path) -> None:
    _, graph = toy()
    state, sets = tmp_path / "state", [prompts("a", (30, 20, 17))]

    def stop(progress: Progress) -> None:
        raise StopError

    with pytest.raises(StopError):
        calibrate(graph, sets, state=state, save_every=0, progress=stop)
    seen: list[Progress] = []
    calibrate(graph, sets, state=state, resume=True, progress=seen.append)
    assert [(p.prompts, p.tokens, p.resumed_tokens, p.total_tokens) for p in seen] == [
        (2, 50, 30, 67),
        (3, 67, 30, 67),
    ]
    assert seen[0].seconds_left == pytest.approx(17 / 20 * seen[0].seconds)


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


class Letters:
    """A tokenizer of one token a letter, which starts texts with a 0."""

    def __init__(self, has_chat_template: bool) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        return [0] * (special_tokens and text != "") + [ord(c) for c in text]

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        return "<".join(m["content"] for m in messages) + ">" * add_generation_prompt


def texts(*found: str, source: str = "n") -> list[Prompt]:
    return [Prompt(text, None, source, i) for i, text in enumerate(found)]


def test_prompts_are_cut_to_length_and_empty_ones_left_out() -> None:
    (made,) = encode_sets(texts("abcdef", "", "x"), Letters(True), seed=3, length=4)
    assert [p.ids for p in made.prompts] == [(0, 97, 98, 99), (0, 120)]
    (longer,) = encode_sets(texts("abcdef"), Letters(True), seed=3, length=6)
    assert longer.prompts[0].id == made.prompts[0].id  # cutting does not make it another prompt
    assert made.digest != longer.digest
    with pytest.raises(DataError, match="n: holds no text"):
        encode_sets(texts("", ""), Letters(True), seed=0, length=4)


def test_prompts_are_grouped_by_source_without_folders() -> None:
    mixed = [
        Prompt("a", None, "/home/me/x.txt", 0),
        Prompt("b", None, "hf:me/set", 0),
        Prompt("c", None, "prose", 0),
    ]
    found = encode_sets([*mixed, Prompt("d", None, "prose", 1)], Letters(True), seed=7, length=4)
    assert [(s.name, len(s.prompts), s.seed) for s in found] == [
        ("x.txt", 1, 7),
        ("hf:me/set", 1, 7),
        ("prose", 2, 7),
    ]
    alone = encode_sets([mixed[2], Prompt("d", None, "prose", 1)], Letters(True), seed=7, length=4)
    assert alone == found[2:]  # a set is the same whether it is read alone or with others


def test_chats_go_through_the_template_or_become_plain_text() -> None:
    chat = [
        Prompt(None, ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), "chat", 0)
    ]
    (templated,), (plain,) = (encode_sets(chat, Letters(has), seed=0, length=99) for has in (True, False))
    assert templated.prompts[0].ids == tuple(map(ord, "a<b"))
    assert plain.prompts[0].ids == (0, *map(ord, "User: a\n\nAssistant: b"))


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


class Recorder(fx.Interpreter):
    """Keeps what each attention node receives."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.kvcc.attention.default:
            seen = (*args, *kwargs.values())
            self.received = [*getattr(self, "received", []), seen]
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_captured_models_with_windows_softcap_and_sinks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph(name)
    one = prompts("one", (70, 5, 23))
    profile = calibrate(graph, [one], batch_size=2, positions=0)
    names = {f"prompt {i}": prompt.id for i, prompt in enumerate(one.prompts)}
    rows = statistics.probe_rows
    monkeypatch.setattr(statistics, "probe_rows", lambda length, name: rows(length, names[name]))
    runs = []
    for prompt in one.prompts:
        recorder = Recorder(graph.module)
        tokens = torch.tensor([prompt.ids])
        recorder.run(tokens, torch.arange(tokens.shape[1])[None], torch.ones_like(tokens), torch.tensor([0]))
        runs.append(recorder.received)
    for layer in range(2):
        *_, sinks, index, scale, window, softcap = runs[0][layer]
        shape = LayerShape(4, 2, 16, 16, scale, window or None, softcap or None)
        assert index == layer
        assert profile.shapes[layer] == shape
        assert window == (8 if layer == 0 else 0)
        assert (softcap, sinks is None) == ((2.0, True) if name == "gemma2" else (0.0, False))
        seen = [tuple(x[0] for x in run[layer][:3]) for run in runs]
        agree(profile.layers[layer], naive(shape, seen, sinks), rtol=2e-4)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer of one token a letter, on disk."""
    folder = tmp_path_factory.mktemp("model")
    letters = [chr(c) for c in range(32, 127)] + ["\n", "<unk>"]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def lines_of_text(path: Path, count: int) -> Path:
    rows = (
        json.dumps({"said": f"{i} " + "how many words are there in it? " * (1 + i % 5)}) for i in range(count)
    )
    path.write_text("\n".join(rows))
    return path


def test_the_command_writes_a_profile(model_folder: Path, tmp_path: Path) -> None:
    data = lines_of_text(tmp_path / "data.jsonl", 6)
    arguments = [
        str(model_folder),
        "--data",
        str(data),
        "--field",
        "said",
        "--length",
        "60",
        "-o",
        str(tmp_path / "p"),
    ]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    assert "prompt 6/6, " in done.stderr
    assert "tokens/s, 0 s left" in done.stderr
    profile = Profile.load(tmp_path / "p")
    assert done.stdout == f"{tmp_path / 'p'}: 6 prompts, {profile.tokens} tokens\n"
    (source,) = profile.sources
    assert (source.name, source.samples) == ("data.jsonl", 6)
    assert source.tokens == sum(min(60, 2 + 32 * (1 + i % 5)) for i in range(6))
    assert profile.body_tokens(1) == source.tokens - 6 * SKIP
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "p"]

    told = CliRunner().invoke(command, [*arguments, "--json", "--batch-size", "4"])
    assert told.stderr == ""
    assert {k: v for k, v in json.loads(told.stdout).items() if k != "seconds"} == {
        "profile": str(tmp_path / "p"), "prompts": 6, "tokens": profile.tokens,
    }  # fmt: skip


def test_the_command_refuses_bad_input(model_folder: Path, tmp_path: Path) -> None:
    data = lines_of_text(tmp_path / "data.jsonl", 2)
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "file").touch()
    base = {"--data": str(data), "--field": "said", "--length": "60", "-o": str(tmp_path / "p")}
    for change, kind, reason in (
        ({"--length": "257"}, CapacityError, "--length 257 is longer than the context of .*, 256 tokens"),
        ({"--data": str(tmp_path / "blank.txt")}, DataError, "blank.txt: no text in it"),
        ({"--length": "9"}, DataError, "no prompt is longer than the 16"),
        ({"-o": str(tmp_path / "file")}, ProfileError, "file is a file: a profile is a folder"),
    ):
        options = [word for pair in (base | change).items() for word in pair]
        result = CliRunner().invoke(command, [str(model_folder), *options])
        assert type(result.exception) is kind
        assert re.search(reason, str(result.exception))
    assert not (tmp_path / "p").exists()


def test_the_command_has_the_librarys_defaults() -> None:
    defaults = {option.name: option.default for option in command.params}
    assert (defaults["skip_first"], defaults["save_every"]) == (SKIP_FIRST, SAVE_EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 4])
def test_a_run_that_was_killed_ends_with_the_same_profile(
    model_folder: Path, tmp_path: Path, kills: int
) -> None:
    samples = 25 * kills + 15  # so many that none ends before it is killed
    data = lines_of_text(tmp_path / "data.jsonl", samples)
    state = tmp_path / "p.partial"
    arguments = [
        str(model_folder),
        "--data",
        str(data),
        "--field",
        "said",
        "--samples",
        str(samples),
        "--length",
        "128",
    ]
    start = [sys.executable, "-c", "from kvcc.cli import main; main()", "calibrate", *arguments]

    def run(*more: str) -> subprocess.Popen[bytes]:
        words = [*start, "--save-every", "0", "-o", str(tmp_path / "p"), *more]
        return subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)

    before = 0
    for attempt in range(kills):
        killed = run(*(["--resume"] if attempt else []))
        written = 0
        while written < 5:  # then kill it, while it measures the next prompt or writes the next state
            assert killed.poll() is None, killed.communicate()
            time.sleep(0.001)
            if state.exists() and state.stat().st_mtime_ns != before:
                before, written = state.stat().st_mtime_ns, written + 1
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        assert not (tmp_path / "p").exists()
    last = run("--resume")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    undisturbed = CliRunner().invoke(command, [*arguments, "-o", str(tmp_path / "whole")])
    torch.set_num_threads(threads)
    assert undisturbed.exit_code == 0
    _, told = last.communicate(timeout=300)
    assert last.returncode == 0, told
    assert b"resuming" in told
    assert not state.exists()
    same(Profile.load(tmp_path / "p"), Profile.load(tmp_path / "whole"))
    files = [(tmp_path / name / "profile.json").read_bytes() for name in ("p", "whole")]
    assert files[0] == files[1]


def test_keys_are_known_at_all_positions() -> None:
    """Prompts are moved about the model's context: distances, and what follows from them, stay what they were."""
    graph, sets = tiny_graph("llama"), [prompts("one", (60, 50, 40))]
    still, moved = (calibrate(graph, sets, skip_first=2, gradients=True, positions=p) for p in (0, None))
    assert (still.positions, moved.positions) == (0, graph.model.context_length)
    for layer in range(2):
        torch.testing.assert_close(moved.v_cov(layer), still.v_cov(layer), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(moved.v_fisher(layer), still.v_fisher(layer), rtol=1e-3, atol=1e-6)
        for kept in ("kk", "qq", "k_fisher"):  # rotations keep lengths, and a basis that turns with its keys
            a, b = (getattr(p, kept)(layer).diagonal(dim1=1, dim2=2).sum(-1) for p in (moved, still))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
        assert (moved.k_mean(layer) - still.k_mean(layer)).abs().max() > 0.05
    with pytest.raises(CapacityError, match="positions 9999 lie beyond the context"):
        calibrate(graph, sets, skip_first=2, positions=9999)


def test_models_of_absolute_positions_stay_where_they_are() -> None:
    profile = calibrate(tiny_graph("opt"), [prompts("one", (60, 50))], skip_first=2)
    assert profile.positions == 0
