"""Times decoding in ONNX Runtime against kvcc: `python benchmarks/onnx_decode.py model.kvcc model.onnx`.

The second is the first, exported with --format onnx. Both continue the same random prompt greedily and take turns, some
steps each, in one process, so that a busy machine slows both; a turn is long enough that a page is sealed in it.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from kvcc.integrations.onnx import OnnxCache, OnnxModel
from kvcc.runtime import CompiledModel, load
from kvcc.runtime.cache import Cache


class Kvcc:
    """An artifact in kvcc's runtime, behind a prompt."""

    def __init__(self, artifact: str) -> None:
        self.model: CompiledModel = load(artifact)

    def prefill(self, prompt: list[int], batch: int) -> None:
        self.cache: Cache = self.model.new_cache(batch)
        self.chosen = self.model.forward([prompt] * batch, self.cache).argmax(-1).tolist()

    def step(self) -> None:
        self.chosen = self.model.forward([[t] for t in self.chosen], self.cache).argmax(-1).tolist()


class Onnx:
    """The same in ONNX Runtime."""

    def __init__(self, folder: str, threads: int) -> None:
        self.model = OnnxModel(folder, threads)

    def prefill(self, prompt: list[int], batch: int) -> None:
        logits, cache = self.model.prefill([prompt] * batch)
        self.cache: OnnxCache = cache
        self.chosen = logits.argmax(-1).tolist()

    def step(self) -> None:
        self.chosen = self.model.decode(self.chosen, self.cache).argmax(-1).tolist()


def milliseconds(run: "Kvcc | Onnx", steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        run.step()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("folder")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64, help="in each turn")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    ours, theirs = Kvcc(args.artifact), Onnx(args.folder, args.threads)
    vocabulary = ours.model.identity.vocab_size
    prompt = torch.randint(vocabulary, (args.context,), generator=torch.Generator().manual_seed(0)).tolist()
    table = Table(
        "", "prefill, s", "first turn's median, ms", "median, ms", "worst turn's, ms", "cache, bytes"
    )
    medians: dict[str, list[float]] = {"kvcc": [], "ONNX Runtime": []}
    prefill = {}
    runs = {"kvcc": ours, "ONNX Runtime": theirs}
    for name, run in runs.items():
        start = time.perf_counter()
        run.prefill(prompt, args.batch)
        prefill[name] = time.perf_counter() - start
        milliseconds(run, 3)  # buffers, captured steps
    same = 0
    for _ in range(args.rounds):
        for name, run in runs.items():
            medians[name].append(median(milliseconds(run, args.steps)))
        same += ours.chosen == theirs.chosen
    for name, run in runs.items():
        found = medians[name]
        row = (prefill[name], found[0], median(found), max(found))
        table.add_row(name, *(f"{x:.2f}" for x in row), f"{run.cache.nbytes:,}")
    console = Console()
    console.print(table)
    ratio = median(medians["ONNX Runtime"]) / median(medians["kvcc"])
    console.print(f"{ratio:.2f} times kvcc's; the same token at the end of {same} of {args.rounds} rounds")
    for path in sorted(Path(args.folder).glob("*.*")):
        console.print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
