"""Files and folders that appear whole or not at all: written under another name, then renamed.

Another name is `.NAME.RANDOM.tmp` beside the target. Its writer holds a lock on it, so what a killed one left is known
and removed by the next.
"""

import contextlib
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not POSIX: no locks, and what was abandoned stays
    fcntl = None

_FRESH = 60  # seconds


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is absent, old, or whole, even when the process is killed or the machine stops."""
    partial = unfinished(path)
    remove_abandoned(path)
    try:
        with partial.open("xb") as file, locked(partial):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def unfinished(target: Path) -> Path:
    """A name that nothing has, for what will take the place of `target`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Mark a file or folder as being worked on, while this process lives; gives False when another one does that.

    With `wait`, until that one is done; then False only where there are no locks.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:  # taken, or a file system without locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def remove_abandoned(target: Path) -> None:
    """Remove what killed writers of the same target left: what is old, and nobody works on."""
    for found in target.parent.glob(f".{glob.escape(target.name)}.????????????.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - found.lstat().st_mtime < _FRESH:  # it may not be locked yet
                continue
            with locked(found) as free:
                if free and found.is_dir():
                    shutil.rmtree(found, ignore_errors=True)
                elif free:
                    found.unlink()
