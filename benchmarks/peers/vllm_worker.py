"""Worker for vLLM's CPU build: options are model (folder), prompt (file), dtype.

The engine runs in this process and is stepped by hand. It keeps the blocks of prompts it has seen: a prompt is
prefilled once, and later rounds start from its cache. Prompts begin differently, so sequences share no block.
"""

import itertools
import math
import os
import time
from typing import Any

import serving

CACHE_GIB = 4

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": str(serving.THREADS),
}


def main() -> None:
    options = serving.options()
    answers = serving.private_output()
    from vllm import LLM, SamplingParams

    engine = LLM(
        options["model"],
        dtype=options["dtype"],
        max_model_len=serving.LIMIT,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
    ).llm_engine
    requests = itertools.count()

    def add(ids: list[int], new_tokens: int) -> None:
        wanted = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0, detokenize=False)
        engine.add_request(str(next(requests)), {"prompt_token_ids": ids}, wanted)

    def finish() -> None:
        while engine.has_unfinished_requests():
            engine.step()

    def block_bytes() -> tuple[float, int]:
        """Bytes and tokens of a block, of all layers."""
        config = engine.vllm_config.cache_config
        return CACHE_GIB * 2**30 / config.num_gpu_blocks, config.block_size

    def decode(context: int, batch: int, steps: int, seconds: float) -> dict[str, Any]:
        filled = serving.first_length(context, steps)
        prompts = [serving.prompt(options["prompt"], filled, row) for row in range(batch)]
        for ids in prompts:
            add(ids, 1)
            finish()
        for ids in prompts:
            add(ids, steps + serving.WARM_STEPS + 1)
        engine.step()  # what of the prompts filled no block, and their first new tokens
        times = serving.timed_steps(engine.step, steps, seconds)
        finish()
        nbytes, size = block_bytes()
        return serving.decoded(times, filled, batch, nbytes, size)

    unseen = itertools.count(1000)

    def prefill(tokens: int) -> dict[str, Any]:
        def run(count: int) -> float:
            ids = [5000 + next(unseen), *serving.prompt(options["prompt"], count - 1)]
            started = time.perf_counter()
            add(ids, 1)
            finish()
            return time.perf_counter() - started

        run(128)
        return {"tokens_per_second": tokens / run(tokens)}

    def largest_batch(context: int, bytes: int) -> dict[str, Any]:
        nbytes, size = block_bytes()
        return {"batch": int(bytes // (nbytes * math.ceil(context / size)))}

    functions = {"decode": decode, "prefill": prefill, "largest_batch": largest_batch}
    serving.serve(answers, functions, ("vllm-cpu", "torch"))


if __name__ == "__main__":
    main()
