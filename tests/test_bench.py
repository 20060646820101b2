"""kvcc bench: its arithmetic, its bytes against plan and allocator, what it refuses, what it prints. No timings."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from kvcc import bench
from kvcc.bench import (
    WARM_STEPS,
    AttendRate,
    Decode,
    attend_rate,
    decode_times,
    filled_cache,
    filled_cache_bytes,
    largest_batch,
    memory_rates,
    peak_rss,
    prefill_rate,
    slope,
    spread,
)
from kvcc.cli import main
from kvcc.cli.bench import _bytes
from kvcc.compile import compile_model
from kvcc.errors import CapacityError, DataError
from kvcc.frontend import load_model
from kvcc.kernels.reference import attend
from kvcc.runtime.model import CompiledModel
from tests.compiled import recipe, runnable
from tests.saved import CONTEXT, save_tiny_llama

Call = Callable[..., tuple[int, str, str]]
KIVI = "[{kivi: {k_bits: 4, v_bits: 4, group_size: 8}}]"
THINK = "[{think: {keep_ratio: 0.5, score: centred}}, {kivi: {k_bits: 2, v_bits: 4, group_size: 8}}]"
LIMIT = 256  # tokens, the tiny models' context
ARCHITECTURES = ("llama", "gemma2")  # plain; sliding windows and soft caps


def tiny(name: str = "llama", passes: str = KIVI) -> CompiledModel:
    return runnable(name, recipe(passes))


@pytest.mark.parametrize(
    ("per_token", "at_zero"), [(0.0125, 21.5), (0.0, 3.0), (-0.002, 7.25)], ids=["rising", "flat", "falling"]
)
def test_the_slope_of_an_exact_line(per_token: float, at_zero: float) -> None:
    line = slope([(x, at_zero + per_token * x) for x in (1027.5, 4131, 8190)])
    assert line is not None
    assert line.per_thousand == pytest.approx(1000 * per_token)
    assert line.at_zero == pytest.approx(at_zero)


def test_the_slope_is_least_squares() -> None:
    xs, ys = (1000.0, 2000.0, 4000.0, 8000.0), (3.0, 9.0, 4.0, 20.0)
    design = torch.tensor([[x / 1000, 1.0] for x in xs], dtype=torch.float64)
    solved = torch.linalg.lstsq(design, torch.tensor(ys, dtype=torch.float64)[:, None]).solution[:, 0]
    line = slope(list(zip(xs, ys)))
    assert line is not None
    assert (line.per_thousand, line.at_zero) == pytest.approx(tuple(solved.tolist()))


@pytest.mark.parametrize("points", [[], [(5.0, 1.0)], [(5.0, 1.0), (5.0, 2.0)]])
def test_no_slope_without_two_lengths(points: list[tuple[float, float]]) -> None:
    assert slope(points) is None


def test_the_spread_of_times() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 10.0]) == {
        "median_ms": 3, "lower_ms": 2, "upper_ms": 4, "mean_ms": 4,
    }  # fmt: skip
    assert set(spread([7.0]).values()) == {7.0}


def test_tokens_attended_and_bytes_per_second() -> None:
    # Steps over 101, 102, 103 and 104 tokens a sequence leave 2 x 104 cached.
    decode = Decode(100, 2, [1.0, 1.0, 1.0, 1.0], 0, 208, 0, 0)
    assert decode.length == 102.5
    assert AttendRate(1, 1, [9.0, 2.0, 1.0], 5e6).gigabytes_per_second == 2.5


@pytest.mark.parametrize("passes", [KIVI, THINK, "[]"], ids=["kivi", "think", "exact"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_filled_cache_is_as_after_a_prompt(name: str, passes: str) -> None:
    """Same lengths, pages and bytes as a real prefill leaves, whatever the length; the plan's bytes, too."""
    model = tiny(name, passes)
    for tokens in (1, 2, 5, 14, 15, 61):
        filled, real = filled_cache(model, tokens, 2), model.new_cache(2)
        model.forward([[3] * tokens] * 2, real)
        assert filled.lengths == real.lengths
        assert [layer.pages for layer in filled.layers] == [layer.pages for layer in real.layers]
        assert filled.memory() == real.memory()
        assert filled.nbytes == 2 * model.plan.cache_bytes(tokens)
    assert filled_cache_bytes(model, 61) == model.plan.cache_bytes(61)


def test_filled_sequences_and_pages_differ() -> None:
    cache = filled_cache(tiny(), 61, 2)
    for layer in cache.layers:
        assert layer.pool is not None
        records = layer.pool.read(torch.arange(layer.pool.capacity))
        assert len(records.unique(dim=0)) == len(records) == 2 * 6
        assert not torch.equal(layer.window_k[0], layer.window_k[1])


def test_a_filled_cache_keeps_to_its_budget() -> None:
    model = tiny()
    nbytes = 3 * model.plan.cache_bytes(61 + 8)
    assert filled_cache(model, 61, 3, room=8, budget=nbytes).nbytes == nbytes
    with pytest.raises(CapacityError, match="budget"):
        filled_cache(model, 61, 3, room=8, budget=nbytes - 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decode_steps_are_real(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step goes through the model with one token a sequence, sealing on the way; bytes are the plan's."""
    model, seen = tiny(name), []
    forward = CompiledModel.forward

    def watched(self: CompiledModel, tokens: list[list[int]], cache: Any) -> torch.Tensor:
        seen.append(([len(t) for t in tokens], cache.lengths[0], [len(x.pages[0]) for x in cache.layers]))
        return forward(self, tokens, cache)

    monkeypatch.setattr(CompiledModel, "forward", watched)
    steps, context = 9, 40
    decode = decode_times(model, context, 3, steps)
    last = context + WARM_STEPS + steps
    assert [(counts, length) for counts, length, _ in seen] == [([1, 1, 1], n) for n in range(context, last)]
    assert seen[-1][2] != seen[0][2]  # 12 steps seal at least one page of 8
    assert len(decode.milliseconds) == steps
    assert all(ms > 0 for ms in decode.milliseconds)
    assert (decode.context, decode.batch, decode.tokens) == (context, 3, 3 * last)
    assert decode.cache_bytes == 3 * model.plan.cache_bytes(last)
    assert decode.fp16_bytes == 3 * model.plan.uncompressed_bytes(last)
    assert decode.length == last - (steps - 1) / 2
    assert decode.peak_rss > 2**20


def test_decode_ends_where_the_context_does() -> None:
    assert decode_times(tiny(), LIMIT, 2, 5).tokens == 2 * LIMIT
    with pytest.raises(CapacityError, match=f"context of {LIMIT + 1} tokens"):
        decode_times(tiny(), LIMIT + 1, 1, 5)
    with pytest.raises(CapacityError, match=f"{LIMIT} steps do not fit"):
        decode_times(tiny(), 8, 1, LIMIT)


def test_prefill_goes_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = tiny(), []
    forward = CompiledModel.forward

    def watched(self: CompiledModel, tokens: list[list[int]], cache: Any) -> torch.Tensor:
        counts.append(len(tokens[0]))
        return forward(self, tokens, cache)

    monkeypatch.setattr(CompiledModel, "forward", watched)
    assert prefill_rate(model, 100) > 0
    assert counts == [64, 100, 100, 100]
    counts.clear()
    monkeypatch.setattr(bench, "PREFILL_SECONDS", 0.0)
    prefill_rate(model, 100)
    assert counts == [64, 100]
    with pytest.raises(CapacityError, match="takes 1 to 256"):
        prefill_rate(model, LIMIT + 1)


@pytest.mark.parametrize("passes", [KIVI, THINK, "[]"], ids=["kivi", "think", "exact"])
@pytest.mark.parametrize(("context", "nbytes"), [(1, 50_000), (61, 200_001), (250, 1_000_000)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_largest_batch_is_the_allocators(name: str, context: int, nbytes: int, passes: str) -> None:
    """That many fit a budgeted cache and can be filled; one more is refused."""
    model = tiny(name, passes)
    most = largest_batch(model, context, nbytes)
    assert most == nbytes // model.plan.cache_bytes(context) > 0
    assert filled_cache(model, context, most, budget=nbytes).nbytes <= nbytes
    with pytest.raises(CapacityError, match="budget"):
        filled_cache(model, context, most + 1, budget=nbytes)


def test_no_batch_where_not_one_sequence_fits() -> None:
    model = tiny()
    one = model.plan.cache_bytes(100)
    assert largest_batch(model, 100, one) == 1
    assert largest_batch(model, 100, one - 1) == 0
    with pytest.raises(CapacityError, match="takes 1 to 256"):
        largest_batch(model, LIMIT + 1, one)


def test_a_batch_beyond_this_machines_memory_is_counted_from_what_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny()
    one = model.plan.cache_bytes(100)
    monkeypatch.setattr(bench, "_free_memory", lambda device: 7 * one)
    tried = []
    allocated = bench._allocated

    def watched(*arguments: Any) -> int:
        tried.append(arguments[1:])
        return allocated(*arguments)

    monkeypatch.setattr(bench, "_allocated", watched)
    assert largest_batch(model, 100, 1000 * one) == 1000
    assert tried == [(100, 1), (100, 2), (100, 3, 3 * one)]


@pytest.mark.parametrize("passes", [KIVI, THINK], ids=["kivi", "think"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_alone_reads_what_is_cached(
    name: str, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls are those of a decode step, layer by layer, and the bytes are pages and window tokens."""
    model, calls = tiny(name, passes), []

    def watched(cached: Any, q: Any, q_pages: Any, *rest: Any) -> Any:
        calls.append((cached.lengths.tolist(), cached.sealed.tolist(), tuple(q_pages.shape), rest[:2]))
        out, lse = attend(cached, q, q_pages, *rest)
        assert out.isfinite().all()
        return out, lse

    monkeypatch.setattr(model.backend, "attend", watched)
    model.forward([[1] * 60, [2] * 60], cache := model.new_cache(2))
    model.forward([[3], [4]], cache)
    real, calls[:] = list(calls), []
    found = attend_rate(model, 61, 2)
    assert calls[: len(real)] == real
    assert len(calls) == (1 + len(found.milliseconds)) * len(model.plan.layers)
    expected = []
    for plan, layout in zip(model.plan.layers, model.plan.layouts()):
        exact = min(61, plan.window) if plan.window else 61 - plan.sealed(61)
        pages = plan.sealed(61) // plan.page * layout.nbytes if layout else 0
        expected.append(2 * (exact * 2 * 2 * 16 * 4 + pages))
    assert found.nbytes == sum(expected) / len(expected)


def test_memory_rates_and_peak() -> None:
    rates = memory_rates(nbytes=2**22)
    assert all(rate > 0 for rate in rates)
    peak_rss(restart=True)
    before = peak_rss()
    held = torch.ones(2**24)  # 64 MiB, touched
    assert peak_rss() - before > 0.9 * held.nbytes


def test_what_does_not_fit_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RATE_BYTES", 2**20)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 400_000}))
    model, said = tiny(), []
    found = bench.bench(
        model,
        [200, 20, 300],
        [1, 100],
        steps=2,
        budget=2**16,
        on_progress=lambda what, done, total: said.append((done, total)),
    )
    assert [(row.batch, row.context) for row in found.decode] == [(1, 20), (1, 200)]
    assert list(found.slopes) == [1]
    assert len(found.skipped) == 4
    assert found.skipped[0] == "300 tokens: the model's context is 256"
    assert found.skipped[1].startswith("decode, batch 100 at 20 tokens: ")
    assert said == [(i, len(said)) for i in range(len(said))]
    with pytest.raises(DataError, match="at most 256 tokens"):
        bench.bench(model, [300], [1])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4GiB", 2**32), ("1.5 MiB", 3 * 2**19), ("100kb", 100_000), ("2G", 2 * 10**9), ("77", 77), ("3tib", 3 * 2**40)],
)  # fmt: skip
def test_memory_sizes(text: str, nbytes: int) -> None:
    assert _bytes("--memory", text) == nbytes


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    model = load_model(str(save_tiny_llama(folder / "model")))
    windows = "windows: {sinks: 2, recent: 8, page: 16}\n"
    chosen = recipe("[{kivi: {k_bits: 4, v_bits: 4, group_size: 16}}]", windows)
    compile_model(model, None, chosen, folder / "model.kvcc")
    return folder / "model.kvcc"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """`kvcc bench` with these arguments, in this process: exit status, standard output, standard error."""
    monkeypatch.setattr(bench, "RATE_BYTES", 2**20)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvcc", "bench", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), *capfd.readouterr()

    return run


SMALL = ("--contexts", "64,256", "--batch", "1,3", "--steps", "4", "--memory", "1MiB", "--threads", "1")


def test_json(call: Call, artifact: Path, tmp_path: Path) -> None:
    status, shown, said = call(artifact, *SMALL, "--json", "--plot", tmp_path / "plot.svg")
    assert (status, said) == (0, "")
    found = json.loads(shown)
    assert set(found) == {
        "model", "recipe", "weights", "backend", "device", "threads", "kvcc", "torch", "system", "cpu_features", "gpu",
        "steps", "bytes_per_token", "fp16_bytes_per_token", "decode", "slopes", "prefill", "largest_batch", "attend",
        "read_rate", "copy_rate", "skipped",
    }  # fmt: skip
    assert [(row["batch"], row["context"]) for row in found["decode"]] == [
        (b, n) for b in (1, 3) for n in (64, 256)
    ]
    for row in found["decode"]:
        assert set(row) == {
            "context", "batch", "milliseconds", "cache_bytes", "tokens", "fp16_bytes", "peak_rss", "length",
            "median_ms", "lower_ms", "upper_ms", "mean_ms",
        }  # fmt: skip
        assert row["lower_ms"] <= row["median_ms"] <= row["upper_ms"]
        assert len(row["milliseconds"]) == found["steps"] == 4
        assert row["tokens"] == row["batch"] * (row["context"] + WARM_STEPS + 4)
    assert [set(row) for row in found["slopes"]] == [{"batch", "per_thousand", "at_zero"}] * 2
    # 4 bits, and 4 bytes of scale and zero for every 16 elements, are 6; 2 layers, 2 heads, K and V of 16
    assert (found["bytes_per_token"], found["fp16_bytes_per_token"]) == (6 / 8 * 128, 2 * 128)
    assert [row["context"] for row in found["prefill"]] == [64, 256]
    for row in found["largest_batch"]:
        assert row["fp16_batch"] == 2**20 // (256 * row["context"])
        assert row["budget"] == 2**20
    assert [(row["batch"], row["context"]) for row in found["attend"]] == [(1, 256), (3, 256)]
    assert (found["skipped"], found["weights"], found["threads"]) == ([], "float32", 1)
    drawn = ElementTree.fromstring((tmp_path / "plot.svg").read_text())
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}polyline"))) == 2


def test_tables_without_a_terminal(call: Call, artifact: Path) -> None:
    status, shown, said = call(artifact, *SMALL, "--contexts", f"64,256,{CONTEXT + 1}")
    assert status == 0
    stages = said.splitlines()
    assert stages[0] == "prefill of 64 tokens 0/11"
    assert stages[-1] == "skipped: 2,049 tokens: the model's context is 2,048"
    for text in (
        "kernels on cpu, 1 thread, float32 weights",
        "per 1,000 cached tokens",
        "prefill",
        "of copy",
    ):
        assert text in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_stored_weights(call: Call, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--weights reaches the loader, and is what the result says."""
    from kvcc import runtime

    given, load = [], runtime.load

    def watched(*arguments: Any, **options: Any) -> CompiledModel:
        given.append(options)
        return load(*arguments, **options)

    monkeypatch.setattr(runtime, "load", watched)
    status, shown, _ = call(artifact, *SMALL, "--weights", "int8", "--json")
    assert (status, json.loads(shown)["weights"]) == (0, "int8")
    assert [options["weights"] for options in given] == ["int8"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--contexts", "1k"], "--contexts '1k': give whole numbers"),
        (["--contexts", ""], "--contexts '': give whole numbers"),
        (["--batch", "1,0"], "--batch '1,0': give whole numbers"),
        (["--steps", "0"], "'--steps'"),
        (["--memory", "lots"], "--memory 'lots': give bytes with a unit"),
        (["--weights", "int3"], "'--weights'"),
        (["--device", "abacus"], "device 'abacus': torch cannot use it"),
        (["--contexts", "4096"], "takes contexts of at most 2048 tokens"),
        (["--plot", "no/such/folder/plot.svg"], "there is no folder no/such/folder"),
    ],
)
def test_bad_input_is_one_line(call: Call, artifact: Path, arguments: list[str], said: str) -> None:
    status, shown, lines = call(artifact, *arguments)
    assert (status, shown) == (2, "")
    assert said in lines.splitlines()[-1]
    assert "Traceback" not in lines


def test_other_refusals(call: Call, artifact: Path, tmp_path: Path) -> None:
    assert call(tmp_path / "none.kvcc")[0] == 2
    status, _, said = call(artifact, "--plot", artifact / "plot.svg")
    assert (status, "inside the artifact" in said) == (2, True)
    (tmp_path / "folder").mkdir()
    status, _, said = call(artifact, *SMALL, "--plot", tmp_path / "folder")
    assert (status, "cannot be written" in said) == (2, True)
