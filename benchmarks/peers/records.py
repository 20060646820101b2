"""What a run measured, one JSON object a line, so that an interrupted run goes on where it stopped."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, order=True)
class Cell:
    """One thing to measure of a contender."""

    do: str  # decode, prefill or largest_batch
    context: int  # tokens
    batch: int = 1

    def __str__(self) -> str:
        if self.do == "decode":
            return f"decode, batch {self.batch} at {self.context:,} tokens"
        return f"{self.do.replace('_', ' ')}, {self.context:,} tokens"


@dataclass(frozen=True)
class Record:
    """One run of a cell, or why there is none: then `error` is one line and `answer` empty."""

    contender: str
    cell: Cell
    round: int
    seconds: float  # in all
    answer: dict[str, Any]
    error: str | None = None


class Results:
    """The file of a run: its settings, what was run with, and a record a line."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Goes on with the file at `path`. Raises ValueError when that was made with other settings."""
        self.path = path
        self.records: list[Record] = []
        self.versions: dict[str, str] = {}
        self.machine: dict[str, Any] = {}
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"settings": settings})
            return
        if not path.read_bytes().endswith(b"\n"):
            self._append_line("")  # what a killed run left stays a line of its own
        for entry in entries(path):
            if entry.get("settings", settings) != settings:
                raise ValueError(
                    f"{path} was measured with {entry['settings']}, not {settings}; begin anew with --fresh"
                )
            self.versions |= entry.get("versions", {})
            self.machine |= entry.get("machine", {})
            if "contender" in entry:
                self.records.append(as_record(entry))

    def add(self, record: Record) -> None:
        self.records.append(record)
        self._append(asdict(record))

    def note(self, kind: str, what: dict[str, Any]) -> None:
        """Keep `what` as versions or machine."""
        getattr(self, kind).update(what)
        self._append({kind: what})

    def of(self, contender: str, cell: Cell) -> list[Record]:
        return [r for r in self.records if r.contender == contender and r.cell == cell]

    def _append(self, entry: dict[str, Any]) -> None:
        self._append_line(json.dumps(entry))

    def _append_line(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")


def entries(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; what a killed run left unfinished at its end is passed over."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def as_record(entry: dict[str, Any]) -> Record:
    return Record(**(entry | {"cell": Cell(**entry["cell"])}))


def put_aside(path: Path) -> None:
    """Keep earlier results under another name: they tell how long cells take."""
    if path.is_file():
        path.rename(path.with_stem(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"))


def earlier(folder: Path, stem: str) -> list[Record]:
    """The records of all runs in a folder."""
    paths: Sequence[Path] = sorted(folder.glob(f"{stem}*.jsonl"))
    return [as_record(entry) for path in paths for entry in entries(path) if "contender" in entry]
