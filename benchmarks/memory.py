"""Resident memory of prefill and decode: `python benchmarks/memory.py model.kvcc`.

Each row is a process of its own. It loads the artifact, runs a short prompt, so that weights are in memory, and then
prefills one prompt and decodes. Peaks are the kernel's (VmHWM); what the cache and one layer's exact K and V take is
counted from their tensors, and "activations" is what is left of the prefill's peak.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from kvcc.bench import peak_rss
from kvcc.runtime import load

MIB = 2**20
WARM = 64  # tokens of the short prompt


def measure(artifact: str, tokens: int, chunk: int | None, steps: int, weights: Any) -> dict[str, float]:
    """Bytes; for one sequence."""
    process = psutil.Process()
    model = load(artifact, weights=weights)
    loaded = process.memory_info().rss
    ids = torch.randint(1000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    warm = model.new_cache()
    model.forward([ids[:WARM]], warm)
    model.forward([[1]], warm)
    del warm
    cache = model.new_cache()
    cache.reserve([tokens + steps])
    before = process.memory_info().rss
    peak_rss(restart=True)
    model.forward([ids], cache, chunk=chunk)
    prefill, after = peak_rss(), process.memory_info().rss
    peak_rss(restart=True)
    for _ in range(steps):
        model.forward([[1]], cache)
    together = min(tokens, chunk or tokens)
    exact = max(p.exact_elements for p in model.plan.layers) * together * cache.layers[0].window_k.itemsize
    return {
        "loaded": loaded,
        "before": before,
        "prefill_peak": prefill,
        "after": after,
        "decode_peak": peak_rss(),
        "cache": cache.nbytes,
        "exact": exact,
        "activations": prefill - before - cache.nbytes - exact,
        "fp16": model.plan.uncompressed_bytes(tokens),
    }


def in_a_process(args: argparse.Namespace, tokens: int, chunk: int) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        args.artifact,
        "--one",
        f"{tokens},{chunk}",
        "--steps",
        str(args.steps),
    ]
    if args.weights:
        command += ["--weights", args.weights]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8064])
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 512], help="0: the prompt in one piece.")
    parser.add_argument("--steps", type=int, default=16, help="Decode steps.")
    parser.add_argument("--weights", choices=["bfloat16", "int8"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        tokens, chunk = map(int, args.one.split(","))
        print(json.dumps(measure(args.artifact, tokens, chunk or None, args.steps, args.weights)))
        return
    table = Table(title="Resident memory, MiB", title_justify="left")
    names = {
        "loaded": "loaded", "before": "before", "prefill_peak": "peak, prefill", "after": "after",
        "decode_peak": "peak, decode", "cache": "cache", "exact": "K, V of a layer", "activations": "activations",
        "fp16": "fp16 cache",
    }  # fmt: skip
    for heading in ("tokens", "chunk", *names.values()):
        table.add_column(heading, justify="right")
    for tokens in args.lengths:
        for chunk in args.chunks:
            found = in_a_process(args, tokens, chunk)
            table.add_row(
                f"{tokens:,}", str(chunk or "none"), *(f"{found[name] / MIB:,.1f}" for name in names)
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
