"""`python -m kvcc.kernels.report`: what the shipped Triton kernels use on each target; what their bytes cost.

`--write` puts the tables into docs/kernels.md between its markers; `--check` fails when a kernel spills, or, in a
source tree, when other figures stand there.
"""

import argparse
import hashlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from kvcc.errors import KernelUnavailable, KvccError
from kvcc.kernels.storages import (
    HEAD_SIZES,
    STORAGE,
    bytes_per_token,
    matrix_operations,
    vector_operations,
)

if TYPE_CHECKING:
    from kvcc.kernels.compile_targets import Usage

DOCUMENT = Path("docs") / "kernels.md"
BEGIN, END = "<!-- kernel tables: begin -->", "<!-- kernel tables: end -->"


@dataclass(frozen=True)
class Chip:
    """What a GPU can do in a second at its boost clock (SXM and OAM forms)."""

    memory: float  # bytes, as the maker states it
    processors: int
    threads: int  # of a processor, for which an instruction is issued in one clock
    clock: float
    matrix: float  # dense float16 operations of the matrix units, as the maker states it

    @property
    def instructions(self) -> float:
        """Instructions of single threads."""
        return self.processors * self.threads * self.clock


CHIPS = {
    "A100": Chip(2.0e12, 108, 128, 1.41e9, 312e12),
    "H100": Chip(3.35e12, 132, 128, 1.98e9, 989e12),
    "MI300X": Chip(5.3e12, 304, 64, 2.1e9, 1307e12),
}
# The workload of the roofline table: one layer's decode step.
SEQUENCES, TOKENS, KV_HEADS, GROUP = 32, 8192, 8, 4

Table = dict[str, dict[str, dict[str, "Usage"]]]  # kernel -> configuration -> target


def collect(only: str = "", jobs: int = 2) -> Table:
    """What every configuration whose "kernel name" contains `only` uses on every target."""
    from kvcc.kernels import compile_targets

    chosen = [
        (index, target)
        for index, configuration in enumerate(compile_targets.configurations())
        if only in f"{configuration.kernel} {configuration.name}"
        for target in compile_targets.TARGETS
    ]
    if not chosen:
        raise KernelUnavailable(f"no configuration contains {only!r}; the table lists their names")
    table: Table = defaultdict(lambda: defaultdict(dict))
    with get_context("spawn").Pool(jobs) as pool:
        for done, (kernel, name, target, usage) in enumerate(pool.imap(_measure, chosen), 1):
            table[kernel][name][target] = usage
            print(f"\r{done} of {len(chosen)} compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return table


def _measure(job: tuple[int, str]) -> "tuple[str, str, str, Usage]":
    from kvcc.kernels import compile_targets

    index, target = job
    configuration = compile_targets.configurations()[index]
    usage = compile_targets.measure(configuration, compile_targets.TARGETS[target])
    return configuration.kernel, configuration.name, target, usage


def spills(table: Table) -> list[str]:
    """One line for each configuration and target that spills registers."""
    return [
        f"{kernel}, {name}, {target}: {usage.spilled} bytes a thread spilled"
        for kernel, rows in table.items()
        for name, row in rows.items()
        for target, usage in row.items()
        if usage.spilled
    ]


def measured_from() -> str:
    """Says which kernels figures belong to: a digest of all that Triton would be told, found without compiling."""
    import triton

    from kvcc.kernels.compile_targets import TARGETS, configurations
    from kvcc.kernels.precompiled import launch_key

    launches = [configuration.launch for configuration in configurations()]
    keys = sorted(launch_key(launch, target) for launch in launches for target in TARGETS.values())
    return f"Triton {triton.__version__}, kernels {hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}."


def usage_tables(table: Table) -> str:
    """Markdown: a table for each kernel."""
    from kvcc.kernels.compile_targets import TARGETS

    parts = [f"{measured_from()} Each cell: registers a thread / spilled bytes / shared KiB / code KiB."]
    for kernel, rows in table.items():
        parts.append(f"**`{kernel}`**")
        body = [[name, *(_cell(row[t]) if t in row else "" for t in TARGETS)] for name, row in rows.items()]
        parts.append(_markdown(["configuration", *TARGETS], body))
    return "\n\n".join(parts)


def _cell(usage: "Usage") -> str:
    return f"{usage.registers} / {usage.spilled} / {usage.shared / 1024:.1f} / {usage.code / 1024:.1f}"


def bound(chip: Chip, nbytes: float, vector: float, matrix: float) -> tuple[float, str]:
    """Seconds below which a chip cannot read, compute and multiply so much, and which of the three takes them.

    `vector` counts instructions, `matrix` floating-point operations; the three may go on at the same time.
    """
    times = {
        "bytes": nbytes / chip.memory,
        "vector": vector / chip.instructions,
        "matrix": matrix / chip.matrix,
    }
    which = max(times, key=times.__getitem__)
    return times[which], which


def roofline_table() -> str:
    """Markdown: bytes read and operations for each cached token, and the time below which this kernel cannot go."""
    body = []
    heads = SEQUENCES * TOKENS * KV_HEADS
    for storage in STORAGE:
        for size in HEAD_SIZES:
            per_token = bytes_per_token(storage, size)
            vector, matrix = vector_operations(storage, size, GROUP), matrix_operations(storage, size, GROUP)
            bounds = [
                bound(chip, *(heads * each for each in (per_token, vector, matrix)))
                for chip in CHIPS.values()
            ]
            body.append(
                [
                    f"{storage}, head {size}",
                    f"{per_token:.1f}",
                    f"{4 * size / per_token:.2f}×",
                    f"{vector / per_token:.1f}",
                    f"{matrix / per_token:.0f}",
                    *(f"{seconds * 1e6:.0f} {which}" for seconds, which in bounds),
                ]
            )
    head = [
        "storage", "bytes per token and KV head", "fp16 cache is", "vector per byte", "matrix per byte",
        *(f"{name}, µs" for name in CHIPS),
    ]  # fmt: skip
    peaks = "; ".join(
        f"{name} {chip.memory / 1e12:.2f} TB/s, {chip.processors} processors x {chip.threads} threads a clock at "
        f"{chip.clock / 1e9:.2f} GHz, {chip.matrix / 1e12:g} TFLOP/s"
        for name, chip in CHIPS.items()
    )
    workload = (
        f"Times: one layer's decode step at {SEQUENCES} sequences of {TOKENS:,} sealed tokens and {KV_HEADS} "
        f"KV heads, each shared by {GROUP} query heads: the largest of bytes of pages over memory bandwidth, "
        "ordinary instructions over the rate at which they are issued, and matrix operations over the matrix "
        "rate; and which of the three it is. They are bounds of this kernel, not measurements.\n\n"
        f"Peaks (memory, issue, float16 matrix): {peaks}.\n\n"
        "An element of a code takes about 4.5 instructions (shift, mask, to float, multiply-add, two to half at "
        "once), a raw one 1, a logit's softmax 6; matrix products take 16 rows, of which the query heads fill some. "
        "Where the bound is `vector`, narrower codes are smaller but not faster, until unpacking takes fewer "
        "instructions."
    )
    return f"{workload}\n\n{_markdown(head, body)}"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def document_text(table: Table) -> str:
    """What stands between the markers of the document."""
    return f"{usage_tables(table)}\n\n### Bytes and bounds\n\n{roofline_table()}"


def stale(document: Path, text: str) -> list[str]:
    """One line when the document, where there is one, says something else than `text`."""
    if not document.is_file() or f"{BEGIN}\n\n{text}\n\n{END}" in document.read_text(encoding="utf-8"):
        return []
    return [
        f"{document} has other figures; run `python -m kvcc.kernels.report --write` and look at what changed"
    ]


def write(document: Path, text: str) -> None:
    """Replace what stands between the markers of `document`."""
    if not document.is_file():
        raise KernelUnavailable(f"{document} is not here; run --write in the root of the source tree")
    old = document.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise KernelUnavailable(f"{document} has lost its markers; put back {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 when --check found a fault, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m kvcc.kernels.report", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {DOCUMENT}")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit 1 when a shipped configuration spills, or {DOCUMENT} says other figures",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only configurations that contain TEXT")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except KvccError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def _run(options: argparse.Namespace) -> int:
    if find_spec("triton") is None:
        raise KernelUnavailable("triton is not installed; pip install 'kvcc[triton]'")
    if options.write and options.only:
        raise KernelUnavailable("--write needs the whole table; leave out --only")
    table = collect(options.only, options.jobs)
    text = document_text(table)
    if options.write:
        write(DOCUMENT, text)
    else:
        print(text)
    found = spills(table)
    if options.check and not options.only:
        found += stale(DOCUMENT, text)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if options.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
