"""Contenders take turns on every cell, round after round, one process busy at a time."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.peers.contenders import Contender
from benchmarks.peers.process import Gone, Worker
from benchmarks.peers.records import Cell, Record, Results

LOADING = 180.0  # seconds until a worker must be ready
MODEL_BYTES = 1.5e9  # that a worker takes without a cache
SPARE = 1e9  # bytes to leave free
FILLING = 420.0  # seconds that an engine may take to prefill the prompts of a cell


@dataclass(frozen=True)
class Limits:
    """Seconds: of the timed steps of a run; from which on a cell is run once only; beyond which it is left out."""

    steps: int
    seconds: float
    once: float
    most: float
    budget: int  # bytes, for the largest batch


@dataclass
class Session:
    """Workers that are alive, and what is known of them. `python` gives an environment's interpreter."""

    results: Results
    limits: Limits
    python: Callable[[str], Path]
    logs: Path
    say: Callable[[str], None]
    alive: dict[str, Worker] = field(default_factory=dict)  # the one used last is last
    broken: dict[str, str] = field(default_factory=dict)  # contenders that do not start, and why

    def run(self, everyone: Sequence[Contender], cells: Sequence[Cell], rounds: int) -> None:
        """Measure what is not in the results yet."""
        try:
            for cell in cells:
                for turn in range(1 if cell.do == "largest_batch" else rounds):
                    for contender in everyone:
                        if contender.takes(cell) and not self._done(contender, cell, turn):
                            record = self._measure(contender, cell, turn)
                            self.results.add(record)
                            self.say(f"{contender.name}: {cell}, round {turn + 1}: {told(record)}")
        finally:
            self.stop()

    def stop(self) -> None:
        for worker in self.alive.values():
            worker.stop()
        self.alive.clear()

    def _done(self, contender: Contender, cell: Cell, turn: int) -> bool:
        known = self.results.of(contender.name, cell)
        return any(r.round == turn or r.error or r.seconds > self.limits.once for r in known)

    def _measure(self, contender: Contender, cell: Cell, turn: int) -> Record:
        started = time.monotonic()
        why = self._reason_not_to(contender, cell)
        answer: dict[str, Any] = {}
        if why is None:
            try:
                worker = self._worker(contender)
                request = self._request(contender, cell)
                if contender.prefills and cell.do == "decode" and turn == 0:
                    worker.ask(request | {"steps": 1}, FILLING)
                started = time.monotonic()
                answer = worker.ask(request, 60 + 3 * self.limits.most)
                why = answer.get("error")
            except Gone as gone:
                self.alive.pop(contender.name, None)
                why = str(gone)
        seconds = round(time.monotonic() - started, 3)
        return Record(contender.name, cell, turn, seconds, {} if why else answer, why)

    def _request(self, contender: Contender, cell: Cell) -> dict[str, Any]:
        if cell.do == "prefill":
            return {"do": "prefill", "tokens": cell.context}
        if cell.do == "largest_batch":
            return {"do": "largest_batch", "context": cell.context, "bytes": self.limits.budget}
        steps = contender.steps if contender.steps and cell.batch == 1 else self.limits.steps
        timing = {"steps": steps, "seconds": self.limits.seconds}
        return {"do": "decode", "context": cell.context, "batch": cell.batch} | timing

    def _reason_not_to(self, contender: Contender, cell: Cell) -> str | None:
        if contender.name in self.broken:
            return self.broken[contender.name]
        need = contender.token_bytes * cell.context * cell.batch + SPARE
        if contender.name not in self.alive:
            need += MODEL_BYTES
        if not self._make_room(contender, need):
            return f"would take about {need / 1e9:.1f} GB, which is not there"
        if cell.do == "decode":
            seconds = predicted(self.results.records, contender.name, cell, self.limits)
            if seconds is not None and seconds > self.limits.most:
                return f"would take about {seconds:.0f} s"
        return None

    def _make_room(self, contender: Contender, need: float) -> bool:
        """Whether `need` bytes are free, ending the workers that were idle longest where that helps."""
        while psutil.virtual_memory().available < need:
            idle = [name for name in self.alive if name != contender.name]
            if not idle:
                return False
            self.alive.pop(idle[0]).stop()
        return True

    def _worker(self, contender: Contender) -> Worker:
        """The contender's process, started where it is not alive. Raises Gone."""
        worker = self.alive.pop(contender.name, None)
        if worker is None:
            try:
                worker = self._start(contender)
            except Gone as gone:
                self.broken[contender.name] = str(gone)
                raise
        self.alive[contender.name] = worker
        return worker

    def _start(self, contender: Contender) -> Worker:
        command = [str(self.python(contender.environment)), str(contender.worker)]
        log = self.logs / f"{contender.name.replace(' ', '-').replace('%', '').replace(',', '')}.log"
        worker = Worker([*command, json.dumps(contender.options)], log)
        versions = worker.ready(LOADING)
        if versions.items() - self.results.versions.items():
            self.results.note("versions", versions)
        return worker


def predicted(records: Sequence[Record], contender: str, cell: Cell, limits: Limits) -> float | None:
    """Seconds of a decode run by those of the largest smaller one, were all its costs those of cached tokens."""
    tokens = cell.context * cell.batch
    smaller = [
        r
        for r in records
        if r.contender == contender and r.cell.do == "decode" and not r.error and size(r.cell) < tokens
    ]
    if not smaller:
        return None
    largest = max(size(r.cell) for r in smaller)
    runs = [r for r in smaller if size(r.cell) == largest]
    growth = tokens / largest
    step = growth * median(t for r in runs for t in r.answer["ms"]) / 1e3
    rest = growth * min(r.seconds - sum(r.answer["ms"]) / 1e3 for r in runs)
    return rest + max(3 * step, min(limits.steps * step, limits.seconds))


def size(cell: Cell) -> int:
    return cell.context * cell.batch


def expected_seconds(
    earlier: Sequence[Record],
    done: Sequence[Record],
    everyone: Sequence[Contender],
    cells: Sequence[Cell],
    rounds: int,
    limits: Limits,
) -> float:
    """What the runs that are not `done` take by earlier ones' times, and where there are none by a guess."""
    guess = {"decode": limits.seconds + 3, "prefill": 8.0, "largest_batch": 5.0}
    total = 10.0 * len(everyone)  # loading
    for contender in everyone:
        for cell in filter(contender.takes, cells):
            mine = (contender.name, cell)
            known = [r.seconds for r in earlier if (r.contender, r.cell) == mine]
            runs = [r for r in done if (r.contender, r.cell) == mine]
            seconds = median(known) if known else guess[cell.do]
            wanted = 1 if cell.do == "largest_batch" or seconds > limits.once else rounds
            if not any(r.error for r in runs):
                total += seconds * max(0, wanted - len(runs))
    return total


def told(record: Record) -> str:
    """A record in a few words."""
    if record.error:
        return f"n/a: {record.error}"
    answer = record.answer
    if record.cell.do == "decode":
        return f"{median(answer['ms']):.1f} ms, in {record.seconds:.1f} s"
    if record.cell.do == "prefill":
        return f"{answer['tokens_per_second']:.0f} tokens/s, in {record.seconds:.1f} s"
    return f"{answer['batch']}, in {record.seconds:.1f} s"
