"""Text in, text out: prompts through a compiled model's cache, token by token."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

from kvcc.errors import DataError
from kvcc.runtime.model import CompiledModel
from kvcc.runtime.sampling import Sampling, choose
from kvcc.runtime.tokenizer import DecodeStream, Tokenizer

Prompt = str | Sequence[dict[str, str]] | Sequence[int]  # text, chat messages, or token ids


@dataclass(frozen=True)
class Piece:
    """One step of one sequence: its index in the batch, the new token, and the text that became certain.

    `finish` is "stop" (end of text or a stop string) or "length" (max_tokens, or the model's context) on a sequence's
    last piece, and empty before.
    """

    index: int
    token: int
    text: str
    finish: str

    @property
    def finished(self) -> bool:
        return bool(self.finish)


@dataclass
class Generation:
    """What one prompt led to; `finish` as in `Piece`."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str = ""


@dataclass
class Timing:
    """Filled in while a stream runs: seconds and tokens of prefill and decode, and the cache at its end."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    cache_tokens: int = 0
    cache_bytes: int = 0


def encode(model: CompiledModel, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; chat messages go through the model's chat template."""
    if not isinstance(prompt, str) and all(isinstance(t, Integral) for t in prompt):
        return [int(t) for t in prompt]  # type: ignore[arg-type]  # Python's, or numpy's
    tokenizer = _tokenizer(model)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    messages = [dict(message) for message in prompt if isinstance(message, dict)]
    if len(messages) < len(prompt):
        raise DataError(
            "a prompt is a text, a list of token ids, or a list of chat messages with role and content"
        )
    return tokenizer.encode(tokenizer.chat(messages), special_tokens=False)


def stream(
    model: CompiledModel,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    chunk: int | None = None,
    budget: int | None = None,
    ignore_eos: bool = False,
    timing: Timing | None = None,
) -> Iterator[Piece]:
    """Generate for a batch of prompts, yielding pieces as they come; sequences leave the batch when they finish.

    A piece's text never ends in half a character, nor in what may become a stop string. A sequence also
    ends where the model's context does. Raises DataError for an empty prompt and CapacityError for one that is longer
    than the context, before anything is computed.
    """
    sampling = sampling or Sampling()
    timing = timing if timing is not None else Timing()
    if isinstance(prompts, str):
        raise DataError("prompts are a list, also of one: [text]")
    stops = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
    if stops:
        _tokenizer(model)  # they are found in text
    ids = [encode(model, prompt) for prompt in prompts]
    for index, tokens in enumerate(ids):
        if not tokens:
            raise DataError(f"prompt {index} is empty")
    if max_tokens < 1 or not ids:
        return
    cache = model.new_cache(len(ids), budget)
    context = model.identity.context_length
    room = [min(max_tokens, context - len(tokens)) for tokens in ids]
    cache.reserve([len(t) + max(0, r) for t, r in zip(ids, room)])
    active = list(range(len(ids)))
    texts = [_Text(model.tokenizer, stops) for _ in ids]
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in active]
    counts = [0] * len(ids)
    eos = set() if ignore_eos else set(model.identity.eos_token_ids)

    start = time.perf_counter()
    logits = model.forward(ids, cache, chunk=chunk)
    timing.prefill_seconds, timing.prompt_tokens = time.perf_counter() - start, sum(map(len, ids))
    start = time.perf_counter()
    while True:
        chosen = choose(logits, sampling, [generators[i] for i in active])
        going = []
        for row, (index, token) in enumerate(zip(active, chosen)):
            counts[index] += 1
            ended = token in eos
            text, stopped = ("", False) if ended else texts[index].push(token)
            finish = "stop" if ended or stopped else "length" if counts[index] >= room[index] else ""
            if finish and not stopped:
                text += texts[index].flush()
            yield Piece(index, token, text, finish)
            if not finish:
                going.append(row)
        timing.decode_seconds = time.perf_counter() - start
        timing.cache_tokens, timing.cache_bytes = sum(cache.lengths), cache.nbytes
        if not going:
            return
        if len(going) < len(active):
            cache.keep(going)
            active = [active[row] for row in going]
        logits = model.forward([[chosen[row]] for row in going], cache)
        timing.decode_tokens += len(going)


def generate(model: CompiledModel, prompts: Sequence[Prompt], **options: Any) -> list[Generation]:
    """`stream`, collected: one Generation a prompt, in order; options are those of `stream`."""
    results = [Generation() for _ in prompts]
    for piece in stream(model, prompts, **options):
        result = results[piece.index]
        result.tokens.append(piece.token)
        result.text += piece.text
        result.finish = piece.finish
    return results


class _Text:
    """Decoded text of one sequence, with what may be the beginning of a stop string held back."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._stream = DecodeStream(tokenizer) if tokenizer else None
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string ended it."""
        self._held += self._stream.push(token) if self._stream else ""
        cuts = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if cuts:
            return self._held[: min(cuts)], True
        keep = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready, False

    def flush(self) -> str:
        """What was held back, once the sequence has ended."""
        return self._held + (self._stream.finish() if self._stream else "")


def _tokenizer(model: CompiledModel) -> Tokenizer:
    if model.tokenizer is None:
        raise DataError(
            f"{model.identity.name} was exported without a tokenizer; give token ids, and no stop strings"
        )
    return model.tokenizer
