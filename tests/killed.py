"""python -m tests.killed export|calibrate MODEL FOLDER KILLS: a command killed at random moments, and what it left.

The command runs in children of one warm process, which remembers the model's graph, so that a run takes a part of a
second and not ten. Half of the kills come at any moment of a run, the others while something is being written. Prints
how often nothing, something old or something new was there afterwards, as JSON; anything else ends with a traceback.
There are more kills, up to four times as many, while one of the three was never found: a machine that is busy now was
idle when a run was timed, or the reverse.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import kvcc.compile
import kvcc.frontend
from kvcc.artifact import read_artifact
from kvcc.cli import cli
from kvcc.frontend import LoadedModel
from kvcc.graph import Graph
from kvcc.profile import Profile

RECIPES = {"old": "name: old\npasses: []\n", "new": "name: new\npasses:\n  - kivi: {group_size: 16}\n"}
SEEDS = {"old": "1", "new": "2"}


def main() -> None:
    """Run as the command line says."""
    command, model, folder, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    kvcc.frontend.capture = kvcc.compile.capture = _remembered(kvcc.frontend.capture)
    chance, found = random.Random(kills), Counter[str]()
    target = folder / "target"
    whole, writing = _warm(command, model, target, "new")
    _warm(command, model, target, "old")
    for kill in range(4 * kills):
        if kill >= kills and len(found) == 3:
            break
        if kill % 3 == 0:
            shutil.rmtree(target, ignore_errors=True)
        elif _state(command, target) != "old":
            _finish(_start(command, model, target, "old"))
        child = _start(command, model, target, "new")
        if kill % 2 == 0:
            time.sleep(chance.uniform(0, 1.1 * whole))
        else:
            _wait_for_writing(target, child)
            time.sleep(chance.uniform(0, 1.1 * writing))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found[_state(command, target)] += 1
    _outdate(folder)
    _finish(_start(command, model, target, "new"))
    assert _state(command, target) == "new"
    left = sorted(path.name for path in folder.iterdir()) + sorted(path.name for path in target.iterdir())
    print(json.dumps({"found": found, "left": left}))


def _remembered(capture: Callable[[LoadedModel], Graph]) -> Callable[[LoadedModel], Graph]:
    """The graph of the first model, for all."""
    graphs: list[Graph] = []

    def first(loaded: LoadedModel) -> Graph:
        if not graphs:
            graphs.append(capture(loaded))
        return graphs[0]

    return first


def _words(command: str, model: str, target: Path, which: str) -> list[str]:
    if command == "export":
        recipe = Path(model, f"{which}.yaml")
        recipe.write_text(RECIPES[which])
        return ["export", model, "--recipe", str(recipe), "--force", "--output", str(target)]
    data = ["--data", "prose", "--samples", "3", "--length", "48", "--seed", SEEDS[which]]
    return ["calibrate", model, *data, "--save-every", "0", "--output", str(target)]


def _start(command: str, model: str, target: Path, which: str) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        status = 1
        try:
            cli(_words(command, model, target, which), standalone_mode=False)
            status = 0
        finally:
            os._exit(status)
    return child


def _finish(child: int) -> None:
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"ended with {status}"


def _warm(command: str, model: str, target: Path, which: str) -> tuple[float, float]:
    """Seconds of a run that nobody kills, after one that imports everything, and those from its first write on."""
    cli(_words(command, model, target, which), standalone_mode=False)
    shutil.rmtree(target)
    start = time.monotonic()
    child = _start(command, model, target, which)
    _wait_for_writing(target, child)
    first = time.monotonic()
    _finish(child)
    end = time.monotonic()
    return end - start, end - first


def _wait_for_writing(target: Path, child: int) -> None:
    """Until an unfinished file or folder is there, or the command has ended."""
    before = _unfinished(target)
    while (
        _unfinished(target) <= before
        and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        time.sleep(0.0005)


def _unfinished(target: Path) -> set[Path]:
    return {*target.parent.glob(".*.tmp"), *target.glob(".*.tmp")}


def _state(command: str, target: Path) -> str:
    """What is there: nothing, or one whole thing."""
    if command == "export":
        if not target.exists():
            return "nothing"
        return read_artifact(target).manifest.recipe_name
    if not (target / "profile.json").exists():
        return "nothing"
    profile = Profile.load(target)
    return next(
        which for which, seed in SEEDS.items() if {source.seed for source in profile.sources} == {int(seed)}
    )


def _outdate(folder: Path) -> None:
    """What killed runs left is an hour old."""
    for path in [*folder.rglob(".*.tmp")]:
        os.utime(path, (time.time() - 3600,) * 2)


if __name__ == "__main__":
    main()
