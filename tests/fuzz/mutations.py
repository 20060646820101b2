"""Ways to spoil an artifact folder. Each takes the folder and a random generator; bad luck changes nothing.

`mutate` picks a few and then, mostly, makes the manifest's sizes and digests right again, so that deeper checks are
reached.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests.fuzz.documents import any_json, kernels, manifest, plan, some_bytes, template
from tests.fuzz.folders import folder
from tests.fuzz.graphs import graph
from tests.fuzz.material import replace
from tests.fuzz.tensors import tensors

Mutation = Callable[[Path, Random], None]

MUTATIONS: dict[str, tuple[Mutation, float]] = {  # and how often each is chosen
    "bytes": (some_bytes, 2),
    "json": (any_json, 3),
    "plan": (plan, 3),
    "manifest": (manifest, 1),
    "kernels": (kernels, 0.5),
    "graph": (graph, 6),
    "tensors": (tensors, 3),
    "folder": (folder, 1),
    "template": (template, 1),
}


def mutate(path: Path, rng: Random) -> list[str]:
    """Change an artifact in place, in one to three ways. Gives their names."""
    weights = [weight for _, weight in MUTATIONS.values()]
    chosen = list(dict.fromkeys(rng.choices(list(MUTATIONS), weights, k=rng.choice([1, 1, 2, 3]))))
    chosen.sort(key=lambda name: name == "folder")  # last: the others would wait for a pipe
    for name in chosen:
        with _bad_luck():
            MUTATIONS[name][0](path, rng)
    if rng.random() < 0.95:
        with _bad_luck():
            reseal(path)
    return chosen


@contextlib.contextmanager
def _bad_luck() -> Iterator[None]:
    """What an earlier mutation left may no longer be what the next one expects."""
    with contextlib.suppress(LookupError, ValueError, TypeError, AttributeError, OSError, RecursionError):
        yield


def reseal(path: Path) -> None:
    """Make the manifest's sizes and digests those of the files."""
    file = path / "manifest.json"
    if not file.is_file():  # a pipe, perhaps, which would be waited for
        return
    data = json.loads(file.read_bytes())
    for name, entry in data["files"].items():
        if (path / name).is_file() and isinstance(entry, dict):
            content = (path / name).read_bytes()
            entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    replace(file, json.dumps(data).encode())
