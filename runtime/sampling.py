"""Choosing the next token from logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcc.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """How to choose. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise DataError(f"temperature {self.temperature} is negative or not finite; use 0 for greedy")
        if self.top_k < 0:
            raise DataError(f"top_k {self.top_k} is negative; use 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p {self.top_p} is outside (0, 1]")


def choose(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """One token a row of logits [B, V]; row i draws from generators[i], so a batch does not change its draw."""
    if sampling.temperature == 0:
        greedy: list[int] = logits.argmax(-1).tolist()
        return greedy
    probabilities = (
        filtered(logits.float() / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1).cpu()
    )
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators)
    ]


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [B, V] with everything outside the top k, and outside the smallest set of mass top_p, at -inf."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        beyond = mass - ordered.softmax(-1) >= top_p  # the mass before a token already suffices
        logits = logits.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)
    return logits
