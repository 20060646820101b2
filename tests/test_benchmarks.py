"""The comparison with peers, but for the peers: protocol, broken workers, rounds, statistics, tables, plots."""

import json
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import compare
from benchmarks.peers import environments, pages, serving
from benchmarks.peers.contenders import Contender, chosen, contenders
from benchmarks.peers.figures import Figures, Goal, figures, goals, spread
from benchmarks.peers.process import Gone, Worker
from benchmarks.peers.records import Cell, Record, Results, earlier, put_aside
from benchmarks.peers.rounds import Limits, Session, expected_seconds, predicted

PEERS = Path(compare.__file__).parent / "peers"
LIMITS = Limits(steps=4, seconds=1.0, once=10.0, most=30.0, budget=2**32)
WORKER = f"""
import sys, os, time
sys.path.insert(0, {str(PEERS)!r})
import serving
options = serving.options()
def decode(context, batch, steps, seconds):
    print("libraries print on standard output")
    if options.get("fails") == context:
        raise ValueError("no room\\nsecond line")
    if options.get("dies") == context:
        os.write(2, b"a note\\nthe last words\\n"); os.abort()
    if options.get("hangs") == context:
        time.sleep(60)
    if options.get("garbage") == context:
        os.write(answers, b"Segmentation what?\\n")
    ms = [options["ms"] + context * batch / 1000] * steps
    return serving.decoded(ms, context, batch, 100.0 * context * batch, context * batch)
def prefill(tokens):
    return {{"tokens_per_second": 500.0}}
def largest_batch(context, bytes):
    return {{"batch": bytes // (100 * context)}}
answers = serving.private_output()
serving.serve(answers, {{"decode": decode, "prefill": prefill, "largest_batch": largest_batch}}, ("numpy",))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def contender(script: Path, name: str, **options: Any) -> Contender:
    return Contender(name, "here", str(script), {"ms": 10.0} | options, 100.0)


def started(script: Path, **options: Any) -> Worker:
    command = [sys.executable, str(script), json.dumps({"ms": 10.0} | options)]
    worker = Worker(command, script.parent / "log")
    assert worker.ready(30) == {"numpy": np.__version__}
    return worker


def ask(worker: Worker, context: int, timeout: float = 30) -> dict[str, Any]:
    return worker.ask({"do": "decode", "context": context, "batch": 2, "steps": 3, "seconds": 1.0}, timeout)


def test_worker_answers_and_goes_on_after_an_error(script: Path) -> None:
    worker = started(script, fails=7)
    assert ask(worker, 7) == {"error": "ValueError: no room"}
    answer = ask(worker, 1000)
    assert answer["ms"] == [12.0] * 3
    assert answer["bytes_per_token"] == 100.0
    assert answer["length"] == 1000 + serving.WARM_STEPS + 2
    assert answer["peak_rss"] > 2**20
    worker.stop()
    assert worker.process.returncode == 0


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("dies", "died of SIGABRT: the last words"),
        ("garbage", "said 'Segmentation what?', which is no answer"),
        ("hangs", "no answer in 1 s"),
    ],
)
def test_worker_that_breaks_is_ended_and_says_how(script: Path, how: str, told: str) -> None:
    worker = started(script, **{how: 5})
    began = time.monotonic()
    with pytest.raises(Gone, match=re.escape(told)):
        ask(worker, 5, timeout=1 if how == "hangs" else 30)
    assert worker.process.poll() is not None
    assert time.monotonic() - began < 20
    with pytest.raises(Gone):
        ask(worker, 1000)


def test_worker_that_never_is_ready(tmp_path: Path) -> None:
    for code, told in [
        ("print('{\"ready\": 1}')", "said something else"),
        ("import nothing_like_this", "No module named 'nothing_like_this'"),
        ("print('[1]')", "which is no answer"),
    ]:
        worker = Worker([sys.executable, "-c", code], tmp_path / "log")
        with pytest.raises(Gone, match=told):
            worker.ready(30)


def session(tmp_path: Path, limits: Limits = LIMITS) -> Session:
    results = Results(tmp_path / "results.jsonl", {"steps": limits.steps})
    return Session(results, limits, lambda _: Path(sys.executable), tmp_path / "logs", lambda _: None)


def test_rounds_alternate_and_a_broken_peer_ends_nothing(script: Path, tmp_path: Path) -> None:
    peers = [contender(script, "good"), contender(script, "bad", dies=2000), contender(script, "slow", ms=90)]
    cells = [Cell("decode", 1000), Cell("decode", 2000), Cell("prefill", 100), Cell("largest_batch", 8192)]
    run = session(tmp_path)
    run.run(peers, cells, 2)
    first = [(r.contender, r.round) for r in run.results.records if r.cell == cells[0]]
    assert first == [(name, turn) for turn in (0, 1) for name in ("good", "bad", "slow")]
    assert [r.contender for r in run.results.of("bad", cells[1])] == ["bad"]  # not tried again
    (dead,) = run.results.of("bad", cells[1])
    assert dead.error == "died of SIGABRT: the last words"
    assert dead.answer == {}
    assert len(run.results.of("bad", cells[2])) == 2  # a new process serves the rest
    assert len(run.results.of("good", cells[3])) == 1
    assert not run.alive


def test_interrupted_run_goes_on(script: Path, tmp_path: Path) -> None:
    cells = [Cell("decode", 1000), Cell("decode", 2000)]
    session(tmp_path).run([contender(script, "good")], cells[:1], 2)
    path = tmp_path / "results.jsonl"
    with path.open("a") as file:
        file.write('{"contender": "good", "ce')  # killed while writing
    before = len(path.read_text().splitlines())
    again = session(tmp_path)
    again.run([contender(script, "good")], cells, 2)
    records = Results(path, {"steps": LIMITS.steps}).records
    assert sorted((r.cell.context, r.round) for r in records) == [(1000, 0), (1000, 1), (2000, 0), (2000, 1)]
    assert len(path.read_text().splitlines()) > before
    with pytest.raises(ValueError, match="--fresh"):
        Results(path, {"steps": 5})


def test_fresh_keeps_what_earlier_runs_took(script: Path, tmp_path: Path) -> None:
    session(tmp_path).run([contender(script, "good")], [Cell("decode", 1000)], 1)
    put_aside(tmp_path / "results.jsonl")
    assert not (tmp_path / "results.jsonl").exists()
    assert [r.contender for r in earlier(tmp_path, "results")] == ["good"]


def record(name: str, cell: Cell, turn: int = 0, seconds: float = 1.0, **answer: Any) -> Record:
    error = answer.pop("error", None)
    if cell.do == "decode" and not error:
        answer = {"length": cell.context, "bytes_per_token": 100.0, "peak_rss": 2**30} | answer
    return Record(name, cell, turn, seconds, answer, error)


def test_too_large_cells_are_left_out(script: Path, tmp_path: Path) -> None:
    small = record("good", Cell("decode", 1000), seconds=12.0, ms=[500.0] * 4)
    # 16 times the tokens: ten seconds of filling become 160; a step takes 8 s, and three are timed at least
    assert predicted([small], "good", Cell("decode", 4000, 4), LIMITS) == pytest.approx(160 + 24)
    assert predicted([small], "good", Cell("decode", 1000), LIMITS) is None
    assert predicted([small], "other", Cell("decode", 4000), LIMITS) is None
    run = session(tmp_path)
    run.results.add(small)
    run.run([contender(script, "good")], [Cell("decode", 4000, 4)], 3)
    (left_out,) = run.results.of("good", Cell("decode", 4000, 4))
    assert left_out.error == "would take about 184 s"
    huge = Contender("huge", "here", str(script), {"ms": 1.0}, 1e15)
    run.run([huge], [Cell("decode", 1000)], 1)
    (left_out,) = run.results.of("huge", Cell("decode", 1000))
    assert left_out.error is not None
    assert "GB, which is not there" in left_out.error


def test_slow_cells_run_once(script: Path, tmp_path: Path) -> None:
    run = session(tmp_path)
    run.results.add(record("good", Cell("prefill", 100), seconds=11.0, tokens_per_second=9.0))
    run.run([contender(script, "good")], [Cell("prefill", 100)], 3)
    assert len(run.results.of("good", Cell("prefill", 100))) == 1


def test_expected_time_is_that_of_earlier_runs(script: Path) -> None:
    cells = [Cell("decode", 1000), Cell("prefill", 100)]
    past = [record("good", cells[0], seconds=4.0, ms=[1.0]), record("good", cells[1], seconds=20.0)]
    good = contender(script, "good")
    assert expected_seconds(past, [], [good], cells, 3, LIMITS) == 10 + 3 * 4 + 20
    assert expected_seconds(past, past, [good], cells, 3, LIMITS) == 10 + 2 * 4


def test_spread_is_over_all_rounds() -> None:
    rng = np.random.default_rng(0)
    rounds = [rng.exponential(size=n).tolist() for n in (5, 8, 1)]
    found = spread(rounds)
    values = np.concatenate(rounds)
    wanted = [*np.percentile(values, [50, 25, 75]), values.mean()]
    assert [found.median, found.lower, found.upper, found.mean] == pytest.approx(wanted)
    assert found.rounds == pytest.approx([np.median(part) for part in rounds])
    assert spread([[3.0]]).lower == 3.0


def test_figures() -> None:
    records = []
    for turn in range(3):
        for context in (1000, 4000, 8000):
            for batch in (1, 4):
                ms = [20 + batch * 5 * context / 1000 + turn * 0.1 + extra for extra in (-1.0, 0.0, 1.0)]
                records.append(record("a", Cell("decode", context, batch), turn, ms=ms))
        records.append(record("a", Cell("prefill", 4096), turn, tokens_per_second=100.0 + turn))
    records.append(record("a", Cell("largest_batch", 8192), batch=77))
    records.append(record("a", Cell("decode", 8000, 16), error="no"))
    found = figures("a", records)
    assert found.slopes[1] == pytest.approx(5.0)
    assert found.slopes[4] == pytest.approx(20.0)
    assert found.decode[Cell("decode", 4000, 1)].median == pytest.approx(40.1)
    assert found.prefill[4096].median == 101.0
    assert found.largest_batch == {8192: 77}
    assert found.missing == {Cell("decode", 8000, 16): "no"}
    empty = figures("b", records)
    assert (empty.decode, empty.slopes, empty.bytes_per_token) == ({}, {}, None)


def some() -> list[Figures]:
    """Two contenders; kvcc decodes in a quarter of the time with an eighth of the slope."""
    records = []
    for name, zero, per_token in (
        ("kvcc kivi-4, int8 weights", 10, 0.5),
        ("transformers DynamicCache bf16", 40, 4),
    ):
        for batch in (1, 4, 16):
            for context in (1024, 4096):
                ms = zero + batch * per_token * context / 1000
                records.append(record(name, Cell("decode", context, batch), ms=[ms, ms]))
        records.append(record(name, Cell("prefill", 4096), tokens_per_second=4000 / zero))
    records.append(
        record("kvcc kivi-4, int8 weights", Cell("decode", 8192, 16), error="a | <b> /tmp/x/y.log")
    )
    return [figures(name, records) for name in dict.fromkeys(r.contender for r in records)]


def test_goals() -> None:
    found = {goal.what: goal for goal in goals(some())}
    slope = found["slope of kivi-4 to transformers bf16, batch 4"]
    assert slope.ratio == pytest.approx(0.125)
    assert slope.kept
    prefill = found["prefill tokens/s at 4k, kivi-4 to transformers bf16"]
    assert prefill.ratio == pytest.approx(4.0)
    assert prefill.kept
    many = found["batch 16 at 4k, transformers bf16 to kivi-4"]
    assert many.ratio == pytest.approx((40 + 16 * 4 * 4.096) / (10 + 16 * 0.5 * 4.096))
    assert found["slope of kivi-4 to llama.cpp's best, batch 1"].kept is None
    assert Goal("x", 2.1, 2.2, at_most=False, of="").kept is False


ABOUT = {
    "machine": "A machine",
    "date": "2026-01-01",
    "versions": {"torch": "2"},
    "threads": 2,
    "kvcc_steps": 64,
    "rounds": 3,
    "steps": 8,
    "seconds": 2.0,
    "once": 10.0,
    "budget": 2**32,
}


def test_block_and_plots(tmp_path: Path) -> None:
    found = some()
    text = pages.block(found, goals(found), [1024, 4096, 8192], [1, 4, 16], ABOUT)
    assert "A machine, 2 threads" in text
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    (row,) = (line for line in text.splitlines() if line.startswith("| kvcc") and "42.8 (42.8–42.8)" in line)
    assert "18.2 (18.2–18.2)" in row  # batch 16 at 1k
    assert "n/a" in row
    assert "‹b› (path)" in text
    assert "/tmp" not in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    plots = {"decode.svg": pages.decode_plot(found, [1, 4, 16]), "slope.svg": pages.slope_plot(found, [1, 4])}
    for _ in range(2):
        pages.write(page, text, plots)
    written = page.read_text()
    assert written == f"before\n{pages.BEGIN}\n\n{text}\n\n{pages.END}\nafter\n"
    for name in plots:
        root = ET.parse(tmp_path / name).getroot()
        assert root.tag.endswith("svg")
        assert "kvcc kivi-4, int8 weights" in "".join(root.itertext())
    with pytest.raises(ValueError, match="no block"):
        pages.write(Path(__file__), text, {})


def test_nothing_measured_is_still_a_page() -> None:
    text = pages.block([figures("a", [])], goals([]), [1024], [1], ABOUT)
    assert "not measured" in text
    assert "svg" in pages.decode_plot([], [1])
    assert "svg" in pages.slope_plot([], [1])


def test_docs_have_the_block() -> None:
    page = (Path(compare.ROOT) / "docs" / "performance.md").read_text()
    assert page.count(pages.BEGIN) == page.count(pages.END) == 1


def test_contenders_have_workers_and_pinned_requirements(tmp_path: Path) -> None:
    everyone = contenders(tmp_path, tmp_path / "x.gguf")
    assert len({c.name for c in everyone}) == len(everyone)
    for environment in {c.environment for c in everyone} - {"kvcc"}:
        lines = (PEERS / f"{environment}.txt").read_text().splitlines()
        assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert all(c.worker.is_file() for c in everyone)
    assert [c.name for c in chosen(everyone, "vllm, Q4_0")] == ["llama.cpp Q4_0", "vLLM bf16"]
    with pytest.raises(ValueError, match="no peer is called 'nobody'"):
        chosen(everyone, "nobody")


def test_environment_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(environments.Uninstallable) as error:
        environments.call(
            tmp_path / "log", sys.executable, "-c", "print('fine'); raise SystemExit('ERROR: no wheel')"
        )
    assert str(error.value).startswith("ERROR: no wheel")
    assert "\n" not in str(error.value)


def test_timed_steps_ends_in_time() -> None:
    assert len(serving.timed_steps(lambda: None, 5, 10.0)) == 5
    slow = serving.timed_steps(lambda: time.sleep(0.05), 50, 0.2)
    assert 3 <= len(slow) < 10
    assert min(slow) >= 49
    assert len(serving.timed_steps(lambda: time.sleep(0.05), 50, 0.01)) == 1


def test_command_line_lists_contenders() -> None:
    command = [sys.executable, "-m", "benchmarks.compare", "--list", "--peers", "openvino"]
    done = subprocess.run(command, cwd=compare.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("OpenVINO GenAI ") for line in done.stdout.splitlines())
    assert done.stdout
