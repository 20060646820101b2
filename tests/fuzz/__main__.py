"""python -m tests.fuzz: many mutants, in processes that may crash.

Mutant N of seed S is the same on every run, so `--seed S --first N --mutants 1` shows one again, and `--first` goes on
where another run ended. Exits with 1 when a mutant was neither used nor refused.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.originals import write_originals
from tests.fuzz.trial import Violation, quiet, trial

BATCH = 500  # mutants of one process, whose memory then starts anew
PATIENCE = 30  # seconds without a word from it
HEADROOM = 4 << 30  # bytes of address space that a process may add; the machine's safety, not what is judged


def main() -> int:
    """Run as the command line says; the exit status."""
    options = _options()
    quiet()
    results: Counter[str] = Counter()
    violations: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        originals = write_originals(Path(folder))
        start = time.monotonic()
        at, end = options.first, options.first + options.mutants
        while at < end:
            at = _batch(originals, Path(folder), options.seed, at, min(at + BATCH, end), results, violations)
            done = at - options.first
            rate = done / (time.monotonic() - start)
            print(
                f"seed {options.seed}: {at} next, {rate:.0f} a second, {len(violations)} violations",
                flush=True,
            )
    for result, count in results.most_common():
        print(f"{count:8} {result}")
    print(f"{sum(results.values())} mutants, {len(violations)} violations")
    return 1 if violations else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first mutant's number")
    parser.add_argument("--folder", help="where mutants are written (default: the system's temporary folder)")
    return parser.parse_args()


def _batch(
    originals: list[Path],
    folder: Path,
    seed: int,
    first: int,
    end: int,
    results: Counter[str],
    violations: list[str],
) -> int:
    """Mutants from `first` in a process of their own, until `end` or its death. Gives the next mutant's number."""
    context = multiprocessing.get_context("fork")  # torch is loaded already
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, originals, folder / "mutant", seed, first, end))
    process.start()
    theirs.close()
    at = first
    try:
        while at < end:
            if not ours.poll(PATIENCE):
                process.kill()
                raise EOFError
            result, violation = ours.recv()
            results[result] += 1
            if violation:
                violations.append(violation)
                print(f"--seed {seed} --first {at} --mutants 1: {violation}", flush=True)
            at += 1
    except EOFError:
        process.join()
        results["died"] += 1
        violations.append(f"{at}: the process died ({process.exitcode})")
        print(f"--seed {seed} --first {at} --mutants 1: the process died ({process.exitcode})", flush=True)
        at += 1
    process.join()
    return at


def _work(pipe: Connection, originals: list[Path], folder: Path, seed: int, first: int, end: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(first, end):
        try:
            pipe.send((trial(originals, folder, f"{seed}:{number}"), ""))
        except Violation as error:
            pipe.send(("VIOLATION", str(error)))


if __name__ == "__main__":
    sys.exit(main())
