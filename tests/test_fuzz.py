"""Mutated artifacts load and run, or are refused; `make fuzz` tries a hundred thousand."""

import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import MUTATIONS
from tests.fuzz.originals import RECIPES, write_originals
from tests.fuzz.trial import trial

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = [RECIPES[0], RECIPES[1], RECIPES[4]]  # of ten, which take half a minute to make


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_originals(tmp_path_factory.mktemp("originals"), FEW)


def test_originals_are_used(originals: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mutated works as it is, so that a refusal is the mutation's doing."""
    monkeypatch.setattr("tests.fuzz.trial.mutate", lambda path, rng: [])
    for original in originals:
        assert trial([original], tmp_path / "same", "0") == "ran"


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_changes_something(name: str, originals: list[Path], tmp_path: Path) -> None:
    """… of the first artifact, which has every optional file, for some of ten seeds."""
    before = content(originals[0])
    changed = []
    for seed in range(10):
        path = tmp_path / f"{seed}" / "a.kvcc"
        shutil.copytree(originals[0], path)
        try:
            MUTATIONS[name][0](path, Random(seed))
        except (LookupError, ValueError, TypeError, AttributeError, OSError):
            continue
        changed.append(content(path) != before)
    assert any(changed)
    assert content(originals[0]) == before


def content(path: Path) -> dict[str, bytes | None]:
    """All files by name; None for what is no regular file."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes() if file.is_file() else None
        for file in sorted(path.rglob("*"))
    }


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 1 << 32))
def test_mutants_are_used_or_refused(number: int, originals: list[Path], tmp_path: Path) -> None:
    """`trial` raises on a crash, on more than 5 s or too much memory, and on an error of another family."""
    assert trial(originals, tmp_path / "mutant", f"hypothesis:{number}")


@pytest.mark.slow
def test_two_thousand_mutants(tmp_path: Path) -> None:
    """In processes that may crash, as `make fuzz` runs them."""
    command = [sys.executable, "-m", "tests.fuzz", "--mutants", "2000", "--seed", "1000"]
    made = subprocess.run(
        [*command, "--folder", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.endswith("2000 mutants, 0 violations\n")
