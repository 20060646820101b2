"""Worker for kvcc itself: options are artifact (folder) and weights."""

from typing import Any

import serving
import torch

from kvcc import bench
from kvcc.runtime import load


def main() -> None:
    options = serving.options()
    answers = serving.private_output()
    torch.set_num_threads(serving.THREADS)
    model = load(options["artifact"], weights=options["weights"])

    def decode(context: int, batch: int, steps: int, seconds: float) -> dict[str, Any]:
        """All steps are taken, however long they take, so that every run seals pages as often."""
        row = bench.decode_times(model, context, batch, steps)
        return {
            "ms": row.milliseconds,
            "length": row.length,
            "batch": batch,
            "bytes_per_token": row.cache_bytes / row.tokens,
        }

    def prefill(tokens: int) -> dict[str, Any]:
        return {"tokens_per_second": bench.prefill_rate(model, tokens)}

    def largest_batch(context: int, bytes: int) -> dict[str, Any]:
        return {"batch": bench.largest_batch(model, context, bytes)}

    functions = {"decode": decode, "prefill": prefill, "largest_batch": largest_batch}
    serving.serve(answers, functions, ("kvcc", "torch"))


if __name__ == "__main__":
    main()
