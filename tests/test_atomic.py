"""Artifacts and profiles appear whole or not at all: killed, several at once, on a full disk, without permission."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvcc.artifact import read_artifact
from kvcc.atomic import write_atomically
from kvcc.profile import Profile
from tests.saved import save_tiny_llama
from tests.test_profile import tiny_profile

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
MAIN = "from kvcc.cli import main; main()"
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def kvcc(*words: object) -> subprocess.Popen[str]:
    """A kvcc of its own process."""
    command = [sys.executable, "-c", MAIN, *map(str, words)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@posix
@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "calibrate"])
def test_killed_at_fifty_moments(command: str, model: Path, tmp_path: Path) -> None:
    """It leaves the old, the new, or nothing where nothing was; the next run removes what lies around."""
    words = [sys.executable, "-m", "tests.killed", command, model, tmp_path, "50"]
    made = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout.splitlines()[-1])
    assert sum(result["found"].values()) >= 50
    assert min(result["found"].get(state, 0) for state in ("nothing", "old", "new")) > 0, result
    names = {"export": "graph", "calibrate": "profile.json"}
    assert result["left"][0] == "target"
    assert names[command] in result["left"]
    assert not [name for name in result["left"] if name.startswith(".")]


@pytest.mark.slow
def test_exports_at_once_do_not_mix(model: Path, tmp_path: Path) -> None:
    """With --force one of them is there in the end; without, the first stays and the other says so."""
    path = tmp_path / "out" / "a.kvcc"
    path.parent.mkdir()
    recipes = {name: tmp_path / f"{name}.yaml" for name in ("exact", "kivi")}
    recipes["exact"].write_text("name: exact\npasses: []\n")
    recipes["kivi"].write_text("name: kivi\npasses:\n  - kivi: {group_size: 16}\n")
    running = [kvcc("export", model, "-r", recipe, "-o", path) for recipe in recipes.values()]
    told = [process.communicate()[1] for process in running]
    lost = [i for i, process in enumerate(running) if process.returncode]
    assert len(lost) == 1
    assert running[lost[0]].returncode == 2
    assert "appeared while this artifact was written" in told[lost[0]] or "exists already" in told[lost[0]]
    assert read_artifact(path).manifest.recipe_name == list(recipes)[1 - lost[0]]
    running = [kvcc("export", model, "-r", recipe, "--force", "-o", path) for recipe in recipes.values()]
    assert [process.wait() for process in running] == [0, 0]
    assert read_artifact(path).manifest.recipe_name in recipes
    assert [entry.name for entry in path.parent.iterdir()] == ["a.kvcc"]


def _save_often(lengths: list[tuple[int, int]], folder: Path) -> None:
    profile = tiny_profile(lengths)
    for _ in range(30):
        profile.save(folder)


def test_profiles_saved_at_once_do_not_mix(tmp_path: Path) -> None:
    """Each of two processes saves its own many times; the folder holds one of them, and nothing else."""
    shapes = [[(1, 40)], [(2, 30)]]
    fresh = multiprocessing.get_context("spawn")
    children = [fresh.Process(target=_save_often, args=(shape, tmp_path)) for shape in shapes]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert Profile.load(tmp_path).prompts in [tiny_profile(shape).prompts for shape in shapes]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_is_written_whole_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x"
    dead = tmp_path / ".x.000000000000.tmp"
    dead.touch()
    os.utime(dead, (1, 1))
    fresh = tmp_path / ".x.111111111111.tmp"
    fresh.touch()
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"x", fresh.name} or (os.name != "posix" and left == {"x", fresh.name, dead.name})


MOUNT = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'
LOOK = '"$@"; status=$?; find "$FOLDER" -type f >&2; exit $status'
COMMANDS: dict[str, list[object]] = {
    "export": ["-r", "exact", "-o"],
    "calibrate": ["--data", "prose", "--samples", 2, "--length", 48, "-o"],
}
REASONS = {
    ("export", "size=64k"): "No space left on device",
    ("export", "ro"): "no permission to write",
    ("calibrate", "size=64k"): "No space left on device",
    ("calibrate", "ro"): "Read-only file system",
}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "options"), REASONS)
def test_a_full_or_read_only_disk_is_one_error(
    command: str, options: str, model: Path, tmp_path: Path
) -> None:
    """On a real file system of its own, where the kernel lets a user mount one."""
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c", MOUNT, "sh", options, tmp_path]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")
    words = [command, model, *COMMANDS[command], tmp_path / "made"]
    made = subprocess.run(
        [*inside, "sh", "-c", LOOK, "sh", sys.executable, "-c", MAIN, *map(str, words)],
        env=ENVIRONMENT | {"FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 2, made.stderr
    told = made.stderr.splitlines()
    assert told[-1].startswith("kvcc: ")  # no file is there, which would be named behind it
    assert REASONS[command, options] in told[-1]
    assert "Traceback" not in made.stderr
