"""How far a compressed model is from the uncompressed one, through its real cache."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcc.calibration_data.retrieval_tasks import Task, contains_answer
from kvcc.errors import DataError
from kvcc.runtime import CompiledModel
from kvcc.runtime.cache import Cache

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
    require_context(context, length)
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


def require_context(context: int, length: int) -> None:
    """Raise DataError unless texts of `length` tokens leave some to predict behind `context` ones."""
    if not 1 <= context < length:
        raise DataError(f"context {context} must lie between 1 and the text length {length}, exclusive")


def expected_logits(reference: CompiledModel, text: Sequence[int], context: int) -> Tensor:
    """Logits that predict tokens context … of one text, [tokens, V], in half the memory of float32 where possible."""
    cache = reference.new_cache(1)
    head = reference.forward([text[:context]], cache)
    rest = reference.forward([text[context:-1]], cache, every=True) if len(text) > context + 1 else head[:0]
    return torch.cat([head, rest])


def divergences(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) of each row of log-probabilities [N, V], in nats, [N] float64."""
    return (expected.exp() * (expected - found)).sum(-1).clamp_min(0).double()


def _compare(logits: Tensor, expected: Tensor, target: Tensor) -> Tensor:
    """Summed over rows: KL(expected || logits), agreement of the most likely token, and both NLLs of the target."""
    ours, theirs = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double()
    pick = target[:, None]
    return torch.stack(
        [
            divergences(theirs, ours).sum(),
            same.sum(),
            -ours.gather(1, pick).double().sum(),
            -theirs.gather(1, pick).double().sum(),
        ]
    ).cpu()


@dataclass(frozen=True)
class Found:
    """What one model made of a retrieval task."""

    answered: bool  # its greedy answer had the answer
    preferred: bool  # of the task's candidates the answer was the likeliest


@dataclass(frozen=True)
class Answer:
    """One retrieval task: where its fact stands, and what each model made of it."""

    depth: float  # share of the context before the (first) fact
    found: bool
    found_uncompressed: bool
    preferred: bool = False
    preferred_uncompressed: bool = False


@dataclass(frozen=True)
class RetrievalScore:
    """Shares of tasks solved, in percent, on one kind of task: by free answers, and by the likeliest candidate.

    A model too small to answer freely may still know which of a few candidates is right, and then shows what
    compression takes away.
    """

    kind: str
    tokens: int  # context length aimed at
    question_visible: bool  # to the compressor, when the context was compressed
    tasks: int
    score: float
    reference: float
    answers: tuple[Answer, ...] = ()
    preference: float | None = None  # None: measured before candidates were compared
    preference_reference: float | None = None

    @property
    def drop(self) -> float:
        """Points lost, by free answers or by candidates, whichever lost more."""
        lost = self.reference - self.score
        if self.preference is None or self.preference_reference is None:
            return lost
        return max(lost, self.preference_reference - self.preference)


def scored(kind: str, tokens: int, visible: bool, answers: Sequence[Answer]) -> RetrievalScore:
    """The score of one kind of task at one length."""

    def percent(field: str) -> float:
        return 100 * sum(getattr(a, field) for a in answers) / len(answers)

    return RetrievalScore(
        *(kind, tokens, visible, len(answers)),
        score=percent("found"),
        reference=percent("found_uncompressed"),
        answers=tuple(answers),
        preference=percent("preferred"),
        preference_reference=percent("preferred_uncompressed"),
    )


def retrieve(
    model: CompiledModel,
    task: Task,
    ask: Callable[[Task], tuple[list[int], list[int]]],
    visible: bool,
    answer_tokens: int,
) -> Found:
    """What the model answers greedily, and which candidate it prefers. `ask` gives context and question as token ids.

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
    preferred = _likeliest(model, cache, logits[0], task) == task.answer
    answer: list[int] = []
    while len(answer) < answer_tokens:
        token = int(logits.argmax(-1))
        if token in model.identity.eos_token_ids:
            break
        answer.append(token)
        if len(answer) < answer_tokens:
            logits = model.forward([[token]], cache)
    assert model.tokenizer is not None
    return Found(contains_answer(model.tokenizer.decode(answer), task), preferred)


def endings(model: CompiledModel, task: Task) -> list[list[int]]:
    """Token ids of each candidate, as the end of the answer that the task's lead begins."""
    assert model.tokenizer is not None
    texts = [f"{task.lead} {candidate}." for candidate in task.candidates]
    return [model.tokenizer.encode(text, special_tokens=False) for text in texts]


def _likeliest(model: CompiledModel, cache: Cache, logits: Tensor, task: Task) -> str:
    """The candidate whose ending the model finds likeliest.

    logits [V] are of the first answered token. The cache of one sequence is the same afterwards: candidates are
    copies of it, which share its pages.
    """
    rows = endings(model, task)
    cache.keep([0] * (1 + len(rows)))
    every = model.forward([[], *rows], cache, every=True).split([len(row) for row in rows])
    cache.keep([0])
    likelihoods = []
    for row, found in zip(rows, every):
        predicted = torch.cat([logits[None], found[:-1]]).float().log_softmax(-1)
        likelihoods.append(float(predicted.gather(1, torch.tensor(row)[:, None].to(predicted.device)).sum()))
    return task.candidates[max(range(len(rows)), key=likelihoods.__getitem__)]


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
