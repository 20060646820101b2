"""Worker for llama.cpp through llama-cpp-python: options are gguf, prompt, kind (f16, q8_0, q4_0), states (folder).

Flash attention; every sequence of a batch in memory of its own (no unified cache). A prompt is prefilled once, its
state kept in a file, and read into every sequence of every later round.
"""

import contextlib
import ctypes
import math
import re
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import serving

KINDS = {"f16": 1, "q4_0": 2, "q8_0": 8}
CHUNK = 512  # tokens prefilled together, the library's default
PAD = 256  # tokens; the library makes contexts of a multiple

log: list[str] = []


@llama_cpp.llama_log_callback
def keep(level: int, text: bytes, _: Any) -> None:
    if b"KV buffer size" in text:
        log.append(text.decode(errors="replace"))


def main() -> None:
    options = serving.options()
    answers = serving.private_output()
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(options["gguf"].encode(), parameters)
    kind = KINDS[options["kind"]]
    folder, stem = Path(options["states"]), f"{version('llama-cpp-python')}-{options['kind']}"

    def feed(context: Any, begin: int, end: int) -> None:
        """Tokens `begin` to `end` of the prompt into the first sequence."""
        ids = serving.prompt(options["prompt"], end)
        for start in range(begin, end, CHUNK):
            part = ids[start : min(start + CHUNK, end)]
            run(context, part, list(range(start, start + len(part))), [0] * len(part), logits=[len(part) - 1])
        choose(context, [len(part) - 1])

    def known_states() -> dict[int, Path]:
        """Files with a sequence's state, by its tokens."""
        return {int(path.stem.rpartition("-")[2]): path for path in folder.glob(f"{stem}-*.bin")}

    def save(context: Any, tokens: int) -> None:
        size = llama_cpp.llama_state_seq_get_size(context, 0)
        kept = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(context, kept, size, 0)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{stem}-{tokens}.part"
        part.write_bytes(bytes(kept))
        part.rename(part.with_suffix(".bin"))

    def state(tokens: int) -> bytes:
        """A sequence's state after a prompt of `tokens` tokens or a few more, from its file where there is one."""
        known = known_states()
        if not any(tokens <= length < tokens + PAD for length in known):
            with new_context(model, kind, 1, tokens) as context:
                begin = max((length for length in known if length < tokens), default=0)
                if begin:
                    restore(context, known[begin].read_bytes(), 0)
                feed(context, begin, tokens)
                save(context, tokens)
            known = known_states()
        return known[min(length for length in known if length >= tokens)].read_bytes()

    def decode(context: int, batch: int, steps: int, seconds: float) -> dict[str, Any]:
        filled = serving.first_length(context, steps)
        kept = state(filled)
        with new_context(model, kind, batch, filled + serving.WARM_STEPS + steps) as made:
            nbytes, room = cache_bytes(), llama_cpp.llama_n_ctx(made)
            memory = llama_cpp.llama_get_memory(made)
            kept = for_streams(kept, batch)
            for row in range(batch):
                restore(made, kept, row)
                llama_cpp.llama_memory_seq_rm(memory, row, filled, -1)
            tokens, position, rows = [1000] * batch, filled, list(range(batch))

            def step() -> None:
                nonlocal tokens, position
                run(made, tokens, [position] * batch, rows, logits=rows)
                tokens, position = choose(made, rows), position + 1

            times = serving.timed_steps(step, steps, seconds)
        return serving.decoded(times, filled, batch, nbytes, room)

    def prefill(tokens: int) -> dict[str, Any]:
        with new_context(model, kind, 1, tokens) as context:
            feed(context, 0, 128)
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            started = time.perf_counter()
            feed(context, 0, tokens)
            rate = tokens / (time.perf_counter() - started)
            if tokens not in known_states():
                save(context, tokens)
        return {"tokens_per_second": rate}

    def largest_batch(context: int, bytes: int) -> dict[str, Any]:
        with new_context(model, kind, 1, context):
            return {"batch": int(bytes // cache_bytes())}

    functions = {"decode": decode, "prefill": prefill, "largest_batch": largest_batch}
    serving.serve(answers, functions, ("llama-cpp-python",))


@contextlib.contextmanager
def new_context(model: Any, kind: int, batch: int, tokens: int) -> Iterator[Any]:
    """A context for `batch` sequences of `tokens` tokens each."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = batch * math.ceil(tokens / PAD) * PAD
    parameters.n_seq_max = batch
    parameters.n_batch = parameters.n_ubatch = CHUNK
    parameters.n_threads = parameters.n_threads_batch = serving.THREADS
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    parameters.type_k = parameters.type_v = kind
    parameters.kv_unified = False
    log.clear()
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise RuntimeError(f"no context for {batch} sequences of {tokens} tokens")
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)


def restore(context: Any, state: bytes, row: int) -> None:
    """Give a sequence the saved state of one."""
    data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    if not llama_cpp.llama_state_seq_set_data(context, data, len(state), row):
        raise RuntimeError(f"a saved state does not fit sequence {row}")


def for_streams(state: bytes, count: int) -> bytes:
    """The state of a sequence saved from a context with one stream, as a context with `count` streams reads it.

    In the pinned version a state is two 32-bit words, the number of streams, and for each stream the number of cells
    and, unless that is 0, the cells.
    """
    if int.from_bytes(state[8:12], "little") != 1:
        raise RuntimeError("a sequence's state is not laid out as in the pinned llama-cpp-python")
    return state[:8] + count.to_bytes(4, "little") + state[12:] + bytes(4 * (count - 1))


def cache_bytes() -> float:
    """Bytes of the newest context's cache, as the library reports them."""
    return sum(float(found) for found in re.findall(r"KV buffer size = +([\d.]+) MiB", "".join(log))) * 2**20


def run(context: Any, ids: list[int], positions: list[int], rows: list[int], logits: list[int]) -> None:
    """One pass over tokens, each with its position and sequence; `logits` are the indices that want them."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    wanted = set(logits)
    for i, (token, position, row) in enumerate(zip(ids, positions, rows)):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
        batch.logits[i] = i in wanted
    status = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)
    if status:
        raise RuntimeError(f"llama_decode returned {status}")


def choose(context: Any, indices: list[int]) -> list[int]:
    """The greedy choice at each index of the last pass."""
    vocabulary = llama_cpp.llama_vocab_n_tokens(
        llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context))
    )
    rows = (llama_cpp.llama_get_logits_ith(context, i) for i in indices)
    return [int(np.ctypeslib.as_array(row, (vocabulary,)).argmax()) for row in rows]


if __name__ == "__main__":
    main()
