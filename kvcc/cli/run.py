"""kvcc run: generate from an artifact."""

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvcc.cli._console import err, json_option, print_json, size
from kvcc.errors import DataError

if TYPE_CHECKING:
    from kvcc.kernels.linear import WeightType


@click.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", "-p", help="The prompt; @FILE reads a file, - standard input.")
@click.option("--max-tokens", "-n", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="0 is all tokens.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--stop", multiple=True, help="End at this text; may be given several times.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, also to a chat model.")
@click.option("--system", help="System message, for a chat model.")
@click.option("--chunk", type=click.IntRange(min=1), help="Prefill this many tokens at a time (approximate).")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--backend", default="auto", show_default=True, type=click.Choice(["auto", "reference", "cpu", "triton"])
)
@click.option(
    "--weights",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    help="Store linear layers so (CPU): fewer bytes to read a step, at some accuracy.  [default: as they are]",
)
@click.option(
    "--precompiled",
    is_flag=True,
    help="Use GPU kernels that ARTIFACT carries. They are code: only from a maker you trust.",
)
@json_option
def command(
    artifact: Path,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: tuple[str, ...],
    raw: bool,
    system: str | None,
    chunk: int | None,
    device: str,
    backend: str,
    weights: "WeightType | None",
    precompiled: bool,
    as_json: bool,
) -> None:
    """Generate text from ARTIFACT, streaming it; ends with tokens per second and cache bytes against fp16."""
    from kvcc.runtime import Sampling, Timing, load

    text = _read(prompt)
    sampling = Sampling(temperature, top_k, top_p, seed)
    start = time.perf_counter()
    if precompiled:  # then say whether they were used
        logging.basicConfig(format="%(message)s")
        logging.getLogger("kvcc.runtime.precompiled").setLevel(logging.INFO)
    model = load(artifact, device=device, backend=backend, weights=weights, precompiled=precompiled)
    loading = time.perf_counter() - start
    chat = not raw and model.tokenizer is not None and model.tokenizer.has_chat_template
    if system and not chat:
        raise DataError("--system is for chat models, and not for --raw: put it into the prompt")
    messages = [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": text},
    ]
    timing, pieces = Timing(), []
    if chunk is not None:
        err.print(
            f"[dim]prefill in chunks of {chunk} tokens: later chunks attend to pages already compressed[/]"
        )
    stream = model.stream(
        [messages if chat else text],
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        chunk=chunk,
        timing=timing,
    )
    for piece in stream:
        pieces.append(piece.text)
        if not as_json:
            click.echo(piece.text, nl=False)
            sys.stdout.flush()
    speed = timing.decode_tokens / timing.decode_seconds if timing.decode_seconds else 0.0
    plain = model.plan.uncompressed_bytes(timing.cache_tokens)
    if as_json:
        print_json(
            {
                "text": "".join(pieces),
                **timing.__dict__,
                "load_seconds": loading,
                "tokens_per_second": speed,
                "fp16_bytes": plain,
                "backend": model.backend.name,
            }
        )
        return
    click.echo()
    err.print(
        f"[dim]{timing.prompt_tokens} prompt tokens in {timing.prefill_seconds:.2f} s, {timing.decode_tokens} more at "
        f"{speed:.1f} tokens/s; cache {size(timing.cache_bytes)} for {timing.cache_tokens} tokens, fp16 "
        f"{size(plain)} ({plain / max(timing.cache_bytes, 1):.2f}x); {model.backend.name} kernels[/]"
    )


def _read(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise DataError("no prompt; give -p TEXT, -p @FILE, or text on standard input")
    try:
        if prompt is None or prompt == "-":
            text = sys.stdin.read()
        elif prompt.startswith("@"):
            text = Path(prompt[1:]).read_text(encoding="utf-8")
        else:
            text = prompt
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt cannot be read: {error}") from error
    if not text.strip():
        raise DataError("the prompt is empty")
    return text
