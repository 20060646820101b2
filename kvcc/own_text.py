"""Text that a model writes itself: prompts of whatever it knows, to calibrate on beside those of one kind.

Statistics of one kind of text leave directions empty that other kinds use. A model's own samples show those, need no
data, and follow its languages and formats; quantisers have been fitted to such text alone (LLM-QAT, arXiv 2305.17888).
"""

import random
from collections.abc import Callable

from kvcc.runtime import CompiledModel, Sampling, stream

NAME = "own text"
BATCH = 16  # prompts that are written side by side


def own_text(
    model: CompiledModel,
    *,
    samples: int,
    length: int,
    seed: int,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """`samples` prompts of `length` tokens that `model` draws at temperature 1, each from a random first token.

    An end of text is drawn like any other token, and what follows is another text. `on_token(done, total)` is called
    as tokens come. The same for the same seed, up to rounding.
    """
    rows = [_start(model, random.Random(f"own text {seed} {index}")) for index in range(samples)]
    written = sum(map(len, rows))
    for first in range(0, samples, BATCH):
        some = rows[first : first + BATCH]
        room = length - max(map(len, some))
        # Rows draw from this seed and the next ones.
        sampling = Sampling(temperature=1.0, seed=random.Random(f"{NAME} {seed} {first}").getrandbits(48))
        for piece in stream(model, [*some], max_tokens=room, sampling=sampling, ignore_eos=True):
            rows[first + piece.index].append(piece.token)
            written += 1
            if on_token is not None:
                on_token(written, samples * length)
    return rows


def _start(model: CompiledModel, draw: random.Random) -> list[int]:
    """What the tokenizer puts before any text, and a token that stands for some text."""
    assert model.tokenizer is not None
    before = model.tokenizer.encode("")
    while True:
        token = draw.randrange(model.identity.vocab_size)
        if model.tokenizer.decode([token]).strip() and token not in model.identity.eos_token_ids:
            return [*before, token]
