"""Prompts of different lengths in one batch, and where the cache's bytes are.

python examples/batch.py model.kvcc "A short prompt" "Another, which is a little longer than the first"
"""

import sys

from kvcc.runtime import CompiledModel, Generation, Sampling, load


def answer(model: CompiledModel, prompts: list[str], max_tokens: int = 40) -> list[Generation]:
    """Generate for all prompts at once. Each gives the tokens that it would give alone."""
    return model.generate(
        prompts, max_tokens=max_tokens, sampling=Sampling(temperature=0.7, top_p=0.9, seed=1)
    )


def show_cache(model: CompiledModel, prompts: list[str]) -> None:
    """Prefill the prompts, and print the cache's allocated bytes beside those of an fp16 cache."""
    if model.tokenizer is None:
        raise SystemExit("this artifact has no tokenizer")
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    cache = model.new_cache(len(ids))
    model.forward(ids, cache)
    window = sum(layer.window for layer in cache.memory())
    pages = sum(layer.pages for layer in cache.memory())
    fp16 = sum(model.plan.uncompressed_bytes(len(tokens)) for tokens in ids)
    print(f"{sum(cache.lengths):,} tokens: {window:,} bytes exact, {pages:,} in sealed pages; fp16 {fp16:,}")


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    model = load(sys.argv[1])
    prompts = sys.argv[2:]
    for prompt, generation in zip(prompts, answer(model, prompts)):
        print(f"{prompt}{generation.text}\n")
    show_cache(model, prompts)


if __name__ == "__main__":
    main()
