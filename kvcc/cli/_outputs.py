"""Files that commands write: refused before the work if they could not be written, and in one line after it."""

import os
from pathlib import Path

from kvcc.atomic import write_atomically
from kvcc.errors import ArtifactUnwritable


def trust_own() -> None:
    """Let this process read artifacts that it writes, which nobody has signed yet, whatever key vouches for others."""
    from kvcc.runtime.signature import TRUSTED_KEY

    os.environ.pop(TRUSTED_KEY, None)


def check_outputs(*paths: Path | None) -> None:
    """To be called before hours of work. Raises ArtifactUnwritable for a path that no file could be written to."""
    given = [path for path in paths if path is not None]
    for path in given:
        if not path.name or path.is_dir():
            raise ArtifactUnwritable(
                f"{path}: the file cannot be written: it is a folder; give a file's name"
            )
        if not path.parent.is_dir():
            raise ArtifactUnwritable(f"{path}: the file cannot be written: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise ArtifactUnwritable(f"{path}: the file cannot be written: no permission in {path.parent}")
    if len({path.resolve() for path in given}) < len(given):
        raise ArtifactUnwritable(f"{given[0]}: several outputs have the same name")


def write_output(path: Path, text: str, *, append: bool = False) -> None:
    """Write a whole file, or add to it; where a link leads, and into devices such as /dev/null.

    Raises ArtifactUnwritable.
    """
    try:
        if append or (path.exists() and not path.is_file()):
            with path.open("a" if append else "w", encoding="utf-8") as file:
                file.write(text)
        else:
            write_atomically(path.resolve(), text.encode())
    except OSError as error:
        raise ArtifactUnwritable(f"{path}: the file cannot be written: {error.strerror or error}") from error
