"""How far a compressed model is from the uncompressed one, through its real cache."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcc.calibration_data.retrieval_tasks import Task, contains_answer
from kvcc.errors import DataError
from kvcc.runtime import CompiledModel

Progress = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class Bucket:
    """Teacher-forced agreement at context lengths [first, last)."""

    first: int
    last: int
    tokens: int
    kl: float  # nats, mean KL(uncompressed || compressed)
    top1: float  # fraction of positions with the same most likely token
    nll: float  # nats per token, compressed
    nll_reference: float  # nats per token, uncompressed

    @property
    def perplexity_increase(self) -> float:
        """Percent."""
        return 100 * math.expm1(self.nll - self.nll_reference)


@dataclass(frozen=True)
class TextAgreement:
    """All buckets of one kind of text, and the cache that was measured at its end."""

    kind: str
    buckets: tuple[Bucket, ...]
    sequences: int
    cache_tokens: int  # per sequence
    cache_bytes: int  # allocated, per sequence
    formula_bytes: int  # what the plan says, per sequence

    @property
    def overall(self) -> Bucket:
        """Token-weighted mean over all buckets."""
        n = sum(b.tokens for b in self.buckets)

        def mean(field: str) -> float:
            return float(sum(getattr(b, field) * b.tokens for b in self.buckets)) / n

        return Bucket(
            self.buckets[0].first,
            self.buckets[-1].last,
            n,
            *map(mean, ("kl", "top1", "nll", "nll_reference")),
        )


def teacher_forced(
    model: CompiledModel,
    reference: CompiledModel,
    texts: Sequence[Sequence[int]],
    *,
    kind: str,
    context: int,
    buckets: int = 4,
    expected: Sequence[Tensor] | None = None,
    on_step: Progress | None = None,
) -> TextAgreement:
    """Decode `texts` (token ids, all of one length) one token at a time after a prefill of `context` tokens.

    The compressed model decodes with every text as one row of a batch, through its real cache; the reference sees
    each text once, in one pass, unless its logits are `expected` (see `expected_logits`). Predictions of tokens
    context … length - 1 are compared.
    """
    length = len(texts[0])
    if not 1 <= context < length:
        raise DataError(f"context {context} must lie between 1 and the text length {length}, exclusive")
    if expected is None:
        expected = [expected_logits(reference, text, context) for text in texts]
    cache = model.new_cache(len(texts))
    cache.reserve([length - 1] * len(texts))
    sums = torch.zeros(length - context, 4, dtype=torch.float64)
    logits = model.forward([text[:context] for text in texts], cache)
    for step, position in enumerate(range(context, length)):
        wanted = torch.stack([e[step] for e in expected]).to(logits.device)
        target = torch.tensor([text[position] for text in texts], device=logits.device)
        sums[step] = _compare(logits, wanted, target)
        if position + 1 < length:
            logits = model.forward([[text[position]] for text in texts], cache)
        if on_step is not None:
            on_step(step + 1, length - context)
    edges = [context + round(i * (length - context) / buckets) for i in range(buckets + 1)]
    parts = [
        Bucket(
            a,
            b,
            (b - a) * len(texts),
            *(sums[a - context : b - context].sum(0) / ((b - a) * len(texts))).tolist(),
        )
        for a, b in zip(edges, edges[1:])
        if b > a
    ]
    held = cache.lengths[0]
    return TextAgreement(
        kind, tuple(parts), len(texts), held, cache.nbytes // len(texts), model.plan.cache_bytes(held)
    )


def expected_logits(reference: CompiledModel, text: Sequence[int], context: int) -> Tensor:
    """Logits that predict tokens context … of one text, [tokens, V], in half the memory of float32 where possible."""
    cache = reference.new_cache(1)
    head = reference.forward([text[:context]], cache)
    rest = reference.forward([text[context:-1]], cache, every=True) if len(text) > context + 1 else head[:0]
    return torch.cat([head, rest])


def _compare(logits: Tensor, expected: Tensor, target: Tensor) -> Tensor:
    """Summed over rows: KL(expected || logits), agreement of the most likely token, and both NLLs of the target."""
    ours, theirs = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double()
    pick = target[:, None]
    return torch.stack(
        [
            kl.double().sum(),
            same.sum(),
            -ours.gather(1, pick).double().sum(),
            -theirs.gather(1, pick).double().sum(),
        ]
    ).cpu()


@dataclass(frozen=True)
class Answer:
    """One retrieval task: where its fact stands, and whether each model's answer had it."""

    depth: float  # share of the context before the (first) fact
    found: bool
    found_uncompressed: bool


@dataclass(frozen=True)
class RetrievalScore:
    """Share of answers found, in percent, on one kind of task."""

    kind: str
    tokens: int  # context length aimed at
    question_visible: bool  # to the compressor, when the context was compressed
    tasks: int
    score: float
    reference: float
    answers: tuple[Answer, ...] = ()

    @property
    def drop(self) -> float:
        """Points lost."""
        return self.reference - self.score


def retrieve(
    model: CompiledModel,
    task: Task,
    ask: Callable[[Task], tuple[list[int], list[int]]],
    visible: bool,
    answer_tokens: int,
) -> bool:
    """Whether the model's greedy answer contains the task's. `ask` gives context and question as token ids.

    Visible: both go through one prefill. Hidden: the context is prefilled and compressed, then the question comes.
    """
    context, question = ask(task)
    cache = model.new_cache(1)
    cache.reserve([len(context) + len(question) + answer_tokens])
    if visible:
        logits = model.forward([[*context, *question]], cache)
    else:
        model.forward([context], cache)
        logits = model.forward([question], cache)
    answer: list[int] = []
    while len(answer) < answer_tokens:
        token = int(logits.argmax(-1))
        if token in model.identity.eos_token_ids:
            break
        answer.append(token)
        if len(answer) < answer_tokens:
            logits = model.forward([[token]], cache)
    assert model.tokenizer is not None
    return contains_answer(model.tokenizer.decode(answer), task)


@dataclass(frozen=True)
class GreedyAgreement:
    """Free-running greedy continuations of the same prompts."""

    prompts: int
    tokens: int
    same: float  # fraction of positions with the same token
    first_difference: float  # mean tokens before the first difference


def greedy_agreement(
    model: CompiledModel, reference: CompiledModel, prompts: Sequence[Sequence[int]], tokens: int
) -> GreedyAgreement:
    """Continue each prompt greedily with both models and compare."""
    ours = model.generate(prompts, max_tokens=tokens, ignore_eos=True)
    theirs = reference.generate(prompts, max_tokens=tokens, ignore_eos=True)
    same = [[a == b for a, b in zip(x.tokens, y.tokens)] for x, y in zip(ours, theirs)]
    firsts = [row.index(False) if False in row else len(row) for row in same]
    count = sum(map(len, same))
    return GreedyAgreement(len(prompts), tokens, sum(map(sum, same)) / count, sum(firsts) / len(firsts))
