"""Worker for transformers' caches, and for kvpress over them.

Options: model (folder), prompt (file), dtype, cache (dynamic, quanto or hqq), nbits, press (think or snapkv), ratio.

Decoding starts from a cache of random K and V: its cost does not depend on what they are. One layer's cache is made by
the cache's own `update`, quantising included, and copied for the other layers. What a press that drops tokens keeps is
learned from a real prompt.
"""

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

import serving
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

PACKAGES = {"dynamic": (), "quanto": ("optimum-quanto",), "hqq": ("hqq",)}
PRESS_LEARNS_FROM = 1024  # tokens


def main() -> None:
    options = serving.options()
    answers = serving.private_output()
    torch.set_num_threads(serving.THREADS)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    dtype = getattr(torch, options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype, attn_implementation="sdpa")
    model.eval()
    press = make_press(options)
    kept: list[float] = []  # of a prompt's tokens, once known

    def cached_tokens(tokens: int) -> int:
        if press is None:
            return tokens
        if not kept:
            ids = torch.tensor([serving.prompt(options["prompt"], PRESS_LEARNS_FROM)])
            cache = new_cache(model, options)
            with press(model):
                model(ids, past_key_values=cache, logits_to_keep=1)
            kept.append(cache.layers[0].keys.shape[-2] / PRESS_LEARNS_FROM)
        return round(tokens * kept[0])

    def decode(context: int, batch: int, steps: int, seconds: float) -> dict[str, Any]:
        filled = serving.first_length(context, steps)
        cache = filled_cache(model, options, cached_tokens(filled), batch)
        nbytes = tensor_bytes(cache.layers)
        times = serving.timed_steps(greedy(model, cache, filled, batch), steps, seconds)
        return serving.decoded(times, filled, batch, nbytes, filled * batch)

    def prefill(tokens: int) -> dict[str, Any]:
        def run(count: int) -> float:
            ids = torch.tensor([serving.prompt(options["prompt"], count)])
            cache = new_cache(model, options)
            started = time.perf_counter()
            with press(model) if press else contextlib.nullcontext():
                model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1).tolist()
            return time.perf_counter() - started

        run(128)  # what is made on first use
        return {"tokens_per_second": tokens / run(tokens)}

    def largest_batch(context: int, bytes: int) -> dict[str, Any]:
        each = tensor_bytes(filled_cache(model, options, cached_tokens(context), 1).layers)
        return {"batch": bytes // each}

    packages = ("torch", "transformers", *PACKAGES[options["cache"]], *(("kvpress",) if press else ()))
    serving.serve(answers, {"decode": decode, "prefill": prefill, "largest_batch": largest_batch}, packages)


def make_press(options: dict[str, Any]) -> Any:
    if "press" not in options:
        return None
    from kvpress import SnapKVPress, ThinKPress

    if options["press"] == "think":
        return ThinKPress(key_channel_compression_ratio=options["ratio"])
    return SnapKVPress(compression_ratio=options["ratio"])


def new_cache(model: Any, options: dict[str, Any]) -> Any:
    if options["cache"] == "dynamic":
        return DynamicCache(config=model.config)
    return QuantizedCache(options["cache"], model.config, nbits=options["nbits"])


def filled_cache(model: Any, options: dict[str, Any], tokens: int, batch: int) -> Any:
    """A cache of `batch` sequences of `tokens` random tokens."""
    config, cache = model.config, new_cache(model, options)
    shape = batch, config.num_key_value_heads, tokens, config.head_dim
    k, v = (torch.randn(shape, dtype=model.dtype) for _ in range(2))
    cache.update(k, v, 0)
    for index in range(1, config.num_hidden_layers):
        cache.layers[index] = copied(cache.layers[0])
    return cache


def copied(layer: Any) -> Any:
    """A cache layer with tensors of its own."""
    twin = copy.copy(layer)
    for name, held in vars(layer).items():
        setattr(twin, name, cloned(held))
    return twin


def cloned(held: Any) -> Any:
    """Tensors cloned, also inside tuples, dictionaries and tensor subclasses; anything else as it is."""
    if isinstance(held, torch.Tensor):
        if not hasattr(held, "__tensor_flatten__"):
            return held.clone()
        names, meta = held.__tensor_flatten__()
        inner = {name: cloned(getattr(held, name)) for name in names}
        rebuild: Any = type(held)
        return rebuild.__tensor_unflatten__(inner, meta, held.size(), held.stride())
    if isinstance(held, tuple):
        return tuple(map(cloned, held))
    if isinstance(held, dict):
        return {key: cloned(value) for key, value in held.items()}
    return held


def greedy(model: Any, cache: Any, filled: int, batch: int) -> Callable[[], None]:
    """A step that gives every sequence one token: the model and the greedy choice."""
    tokens = torch.full((batch, 1), 1000)
    position = torch.full((batch, 1), filled)

    def step() -> None:
        logits = model(tokens, past_key_values=cache, position_ids=position, use_cache=True).logits
        tokens.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    return step


def tensor_bytes(held: Any, seen: set[int] | None = None) -> int:
    """Bytes of the storages of all tensors in lists, dictionaries, objects and tensor subclasses."""
    seen = set() if seen is None else seen
    if isinstance(held, torch.Tensor):
        if hasattr(held, "__tensor_flatten__"):
            names = held.__tensor_flatten__()[0]
            return sum(tensor_bytes(getattr(held, name), seen) for name in names)
        storage = held.untyped_storage()
        if not storage.nbytes() or storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(held, list | tuple):
        return sum(tensor_bytes(item, seen) for item in held)
    if isinstance(held, dict):
        return tensor_bytes(list(held.values()), seen)
    if type(held).__module__.startswith("transformers.cache_utils"):
        return tensor_bytes(vars(held), seen)
    return 0


if __name__ == "__main__":
    main()
