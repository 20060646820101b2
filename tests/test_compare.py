"""kvcc compare: the same numbers as check, what nothing beats, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from kvcc.checking import CheckSize, check, largest
from kvcc.cli import cli, main
from kvcc.compare import Entry, compare, drawn, marked
from kvcc.compile import compile_model
from kvcc.errors import ArtifactMissing
from kvcc.frontend import load_model
from kvcc.gates import GateResult
from kvcc.recipe import parse_recipe
from tests.saved import save_tiny_llama

SIZE = CheckSize(2, 120, 96, (), 1, greedy_prompts=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifacts(model: Path) -> list[Path]:
    loaded, made = load_model(str(model), "float32"), []
    for bits in (8, 2):
        text = (
            "windows: {sinks: 2, recent: 8, page: 8}\npasses:\n"
            f"  - kivi: {{k_bits: {bits}, v_bits: {bits}, group_size: 8}}\n"
        )
        path = model / f"kivi-{bits}.kvcc"
        compile_model(loaded, None, parse_recipe(f"name: kivi-{bits}\n{text}", "test"), path)
        made.append(path)
    return made


def entry(name: str, bits: float, kl: float) -> Entry:
    return Entry(name, bits, 0, {"prose": kl}, {"prose": 1}, {"prose": 0}, None, 0, 1.0, False)


def test_the_front() -> None:
    points = [("a", 2, 0.5), ("b", 3, 0.1), ("c", 3, 0.2), ("d", 4, 0.1), ("e", 5, 0.01), ("f", 5, 0.01)]
    found = marked([entry(*point) for point in points])
    assert [e.name for e in found if e.on_front] == ["a", "b", "e", "f"]
    assert drawn(found).startswith("<svg")


def test_numbers_are_those_of_check(model: Path, artifacts: list[Path]) -> None:
    found = compare(artifacts, str(model), data=("prose", "code"), size=SIZE, steps=2)
    assert [e.name for e in found] == ["kivi-2", "kivi-8"]  # by bits
    assert found[0].bits_per_element < found[1].bits_per_element
    assert found[0].mean_kl > found[1].mean_kl
    assert all(e.on_front and e.decode_ms > 0 for e in found)
    verdict = check(artifacts[1], str(model), data=("prose", "code"), size=SIZE)
    assert found[0].kl == {t.kind: pytest.approx(t.overall.kl, rel=1e-4) for t in verdict.texts}
    assert found[0].bytes_per_token == verdict.bytes_per_token
    twice = compare([artifacts[0], artifacts[0]], str(model), size=SIZE, steps=1)
    assert {e.name for e in twice} == {str(artifacts[0])}


def test_odd_texts_are_measured(model: Path, artifacts: list[Path]) -> None:
    size = replace(SIZE, texts=5)
    (text,) = check(artifacts[0], str(model), data=("odd",), size=size).texts
    assert text.sequences == 5
    assert 0 <= text.overall.kl < 1


def test_the_command_writes_numbers_and_a_plot(model: Path, artifacts: list[Path], tmp_path: Path) -> None:
    command = ["compare", *map(str, artifacts), "--against", str(model), "--texts", "1", "--length", "112"]
    command += [
        "--context",
        "96",
        "--steps",
        "1",
        "-o",
        str(tmp_path / "c.json"),
        "--plot",
        str(tmp_path / "c.svg"),
    ]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert "kivi-8" in done.output
    numbers = json.loads((tmp_path / "c.json").read_text())["artifacts"]
    assert [set(n["kl"]) for n in numbers] == [{"prose", "code"}] * 2
    assert (
        "}svg" in ElementTree.parse(tmp_path / "c.svg").getroot().tag
    )  # with its namespace: browsers show it


def test_a_measurement_that_is_no_number_fails_its_gate_wherever_it_stands() -> None:
    for values in ([0.01, math.nan], [math.nan, 0.01]):
        assert not GateResult("kl", 0.05, largest(values)).holds
    assert GateResult("kl", 0.05, largest([0.01, 0.02])).holds


def test_calibration_s_own_texts_measure_nothing(
    model: Path, artifacts: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["kvcc", "check", str(artifacts[0]), "--against", str(model), "--data", "prose,stdlib-docs"]
    monkeypatch.setattr("sys.argv", [*command, "--length", "112", "--context", "96"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "stdlib-docs is for calibration; measure on prose, code" in capsys.readouterr().err


def test_all_artifacts_are_opened_before_any_is_measured(
    model: Path, artifacts: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactMissing, match="does not exist"):
        compare([artifacts[0], tmp_path / "tpyo.kvcc"], "no model is loaded before")


def test_another_model_s_artifact_is_one_line(
    model: Path,
    artifacts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = save_tiny_llama(tmp_path / "other", layers=3)
    monkeypatch.setattr("sys.argv", ["kvcc", "compare", str(artifacts[0]), "--against", str(other)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("kvcc: ")
    assert "compiled from" in line
