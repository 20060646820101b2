"""`python -m kvcc.kernels.report`: what the shipped Triton kernels use on each target; what their bytes cost.

`--write` puts the tables into docs/kernels.md between its markers; `--check` fails when a kernel spills.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from kvcc.errors import KernelUnavailable, KvccError

if TYPE_CHECKING:
    from kvcc.kernels.compile_targets import Usage

DOCUMENT = Path("docs") / "kernels.md"
BEGIN, END = "<!-- kernel tables: begin -->", "<!-- kernel tables: end -->"

# Bytes per second of memory, as the makers state them.
BANDWIDTH = {"A100": 2.0e12, "H100": 3.35e12, "MI300X": 5.3e12}
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


def usage_tables(table: Table) -> str:
    """Markdown: a table for each kernel."""
    import triton

    from kvcc.kernels.compile_targets import TARGETS

    parts = [
        f"Triton {triton.__version__}. Each cell: registers a thread / spilled bytes / shared KiB / code KiB."
    ]
    for kernel, rows in table.items():
        parts.append(f"**`{kernel}`**")
        body = [[name, *(_cell(row[t]) if t in row else "" for t in TARGETS)] for name, row in rows.items()]
        parts.append(_markdown(["configuration", *TARGETS], body))
    return "\n\n".join(parts)


def _cell(usage: "Usage") -> str:
    return f"{usage.registers} / {usage.spilled} / {usage.shared / 1024:.1f} / {usage.code / 1024:.1f}"


def roofline_table() -> str:
    """Markdown: bytes read for each cached token, and the time below which no kernel can go."""
    from kvcc.kernels.compile_targets import HEAD_SIZES, STORAGE, bytes_per_token, operations_per_token

    body = []
    for storage in STORAGE:
        for size in HEAD_SIZES:
            per_token = bytes_per_token(storage, size)
            total = per_token * SEQUENCES * TOKENS * KV_HEADS
            body.append(
                [
                    f"{storage}, head {size}",
                    f"{per_token:.1f}",
                    f"{4 * size / per_token:.2f}×",
                    f"{operations_per_token(storage, size, GROUP) / per_token:.0f}",
                    *(f"{total / rate * 1e6:.0f}" for rate in BANDWIDTH.values()),
                ]
            )
    times = [f"{chip} ({rate / 1e12:.2f} TB/s), µs" for chip, rate in BANDWIDTH.items()]
    head = ["storage", "bytes per token and KV head", "fp16 cache is", "operations per byte", *times]
    workload = (
        f"Times: one layer's decode step at {SEQUENCES} sequences of {TOKENS:,} sealed tokens and {KV_HEADS} "
        f"KV heads, each shared by {GROUP} query heads: bytes of pages over memory bandwidth. They are "
        "bounds, not measurements."
    )
    return f"{workload}\n\n{_markdown(head, body)}"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


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
    """The command; returns its exit status: 0, 1 when --check found spills, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m kvcc.kernels.report", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {DOCUMENT}")
    parser.add_argument("--check", action="store_true", help="exit 1 when a shipped configuration spills")
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
    text = f"{usage_tables(table)}\n\n### Bytes and bounds\n\n{roofline_table()}"
    if options.write:
        write(DOCUMENT, text)
    else:
        print(text)
    found = spills(table)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if options.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
