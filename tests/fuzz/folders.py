"""Mutations of what lies in the folder, whatever the files hold."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from random import Random

from tests.fuzz.material import files, replace


def folder(path: Path, rng: Random) -> None:
    """A file missing, replaced by a link, a pipe, a folder or a hole, added, or exchanged for another."""
    file = rng.choice(files(path))
    what = rng.randrange(9)
    if what == 0:
        file.unlink()
    elif what == 1:
        target = path.parent / "elsewhere"
        shutil.copy(file, target)
        file.unlink()
        file.symlink_to(rng.choice([str(target), file.name, "/etc/passwd", "/dev/zero", "nowhere"]))
    elif what == 2:
        file.unlink()
        os.mkfifo(file)
    elif what == 3:
        file.unlink()
        file.mkdir()
    elif what == 4:
        name = rng.choice(
            ["tokenizer/x", "tokenizer/a/b", "graph/x.py", "x.py", "kernels/sm_80.json", "tokenizer/.x"]
        )
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"{}")
        if rng.random() < 0.7:
            _list_file(path, name)
    elif what == 5:
        _list_file(
            path,
            rng.choice(["../x", "/etc/passwd", "tokenizer/../../x", "graph//graph.json", "a\\b", "\n", ""]),
        )
    elif what == 6:
        other = rng.choice(files(path))
        first, second = file.read_bytes(), other.read_bytes()
        replace(file, second)
        replace(other, first)
    elif what == 7:
        inner = path / rng.choice(["graph", "kernels", "tokenizer"])
        inner.rename(path.parent / "moved")
        inner.symlink_to(path.parent / "moved")
    else:
        replace(file, b"")
        with file.open("r+b") as opened:
            opened.truncate(rng.choice([1, 100, 1 << 24]))  # a hole


def _list_file(path: Path, name: str) -> None:
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"][name] = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    replace(path / "manifest.json", json.dumps(manifest).encode())
