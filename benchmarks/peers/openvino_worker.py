"""Worker for OpenVINO GenAI: options are gguf (file), model (folder to keep the converted model in), prompt, precision.

The pipeline that schedules batches is stepped by hand, and keeps the blocks of prompts it has seen: a prompt is
prefilled once, and later rounds start from its cache. Prompts begin differently, so sequences share no block.
"""

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import serving

BLOCK = 32  # tokens of a block of the CPU's cache
PROMPT_CHUNK = 4096  # tokens prefilled together


def main() -> None:
    options = serving.options()
    answers = serving.private_output()
    pipeline = make_pipeline(options)
    requests = itertools.count()
    handles: list[Any] = []

    def add(ids: list[int], new_tokens: int) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        handle = pipeline.add_request(next(requests), openvino.Tensor(np.array([ids], np.int64)), config)
        handles.append(handle)  # a request whose handle is gone is dropped

    def finish() -> None:
        while pipeline.has_non_finished_requests():
            pipeline.step()
        handles.clear()

    def decode(context: int, batch: int, steps: int, seconds: float) -> dict[str, Any]:
        filled = serving.first_length(context, steps)
        prompts = [serving.prompt(options["prompt"], filled, row) for row in range(batch)]
        for ids in prompts:
            add(ids, 1)  # one after the other: a prompt's blocks are kept
            finish()
        for ids in prompts:
            add(ids, steps + serving.WARM_STEPS + 1)
        pipeline.step()  # what of the prompts filled no block, and their first new tokens
        times = serving.timed_steps(pipeline.step, steps, seconds)
        metrics = pipeline.get_metrics()
        finish()
        blocks = batch * math.ceil((filled + serving.WARM_STEPS + len(times)) / BLOCK)
        used = metrics.kv_cache_size_in_bytes * metrics.cache_usage / 100
        return serving.decoded(times, filled, batch, used, blocks * BLOCK)

    unseen = itertools.count(1000)  # rows of prompts that only `prefill` uses

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
        each = decode(context, 1, 1, 1.0)["bytes_per_token"]
        return {"batch": int(bytes // (each * BLOCK * math.ceil(context / BLOCK)))}

    functions = {"decode": decode, "prefill": prefill, "largest_batch": largest_batch}
    serving.serve(answers, functions, ("openvino", "openvino-genai"))


def make_pipeline(options: dict[str, Any]) -> Any:
    folder, source = Path(options["model"]), Path(options["gguf"])
    properties = {"INFERENCE_NUM_THREADS": serving.THREADS}
    if not (
        folder / "openvino_model.xml"
    ).is_file():  # reading the GGUF file writes the converted model beside it
        folder.mkdir(parents=True, exist_ok=True)
        copied = folder / source.name
        copied.write_bytes(source.read_bytes())
        openvino_genai.LLMPipeline(str(copied), "CPU", enable_save_ov_model=True, **properties)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = True
    scheduler.cache_size = 0  # grows as needed
    scheduler.max_num_batched_tokens = PROMPT_CHUNK
    properties["KV_CACHE_PRECISION"] = options["precision"]
    return openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)


if __name__ == "__main__":
    main()
