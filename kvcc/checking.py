"""`check`: accuracy of an artifact through its real cache, against the uncompressed model, held to gates."""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kvcc.artifact import update_file
from kvcc.calibration import encode_sets
from kvcc.calibration_data import HELD_OUT, held_out, load_prompts, names
from kvcc.calibration_data.retrieval_tasks import GENERATORS, Task
from kvcc.errors import DataError
from kvcc.frontend import LoadedModel, load_model
from kvcc.gates import GateResult, Gates, judge
from kvcc.kernels.linear import WeightType
from kvcc.layer_errors import LayerError, layer_errors
from kvcc.measure import (
    Answer,
    Found,
    GreedyAgreement,
    RetrievalScore,
    TextAgreement,
    endings,
    expected_logits,
    greedy_agreement,
    require_context,
    retrieve,
    scored,
    teacher_forced,
)
from kvcc.progress import OnProgress, unseen
from kvcc.report import render_report
from kvcc.runtime import CompiledModel, load
from kvcc.runtime.identity import ModelIdentity
from kvcc.uncompressed import uncompressed

ANSWER = 16  # tokens of a retrieval's answer


@dataclass(frozen=True)
class CheckSize:
    """How much is measured."""

    texts: int = 4  # sequences of each kind of text
    length: int = 1536  # tokens of a text
    context: int = 1024  # of these, prefilled; the rest is decoded one by one
    retrieval_lengths: tuple[int, ...] = (1024,)  # tokens of context; empty for no retrieval
    retrieval_tasks: int = 4  # of each kind, at each length, visible and hidden
    greedy_prompts: int = 4
    greedy_tokens: int = 64
    other_contexts: tuple[int, ...] = ()  # the same texts again, behind prefills of so many tokens
    layers: bool = False  # each layer compressed by itself, on the first text of each kind

    def within(self, tokens: int) -> "CheckSize":
        """The same for a model with a context of `tokens`: shorter where this would not fit."""
        if self.length <= tokens:
            return self
        fitting = tuple(n for n in self.retrieval_lengths if 2 * n <= tokens)
        return replace(
            self, length=tokens, context=tokens * self.context // self.length, retrieval_lengths=fitting
        )


@dataclass(frozen=True)
class Verdict:
    """What was measured, on what, and whether the gates hold."""

    artifact: str
    against: str
    recipe: str
    seed: int
    size: CheckSize
    texts: tuple[TextAgreement, ...]
    retrieval: tuple[RetrievalScore, ...]
    greedy: GreedyAgreement | None
    bytes_per_token: float
    bits_per_element: float
    uncompressed_bytes_per_token: int  # fp16
    weights: str | None = None  # how linear layers stored theirs; None: as in the artifact
    other_contexts: tuple[TextAgreement, ...] = ()
    layers: tuple[LayerError, ...] = ()
    gates: tuple[GateResult, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return all(gate.holds for gate in self.gates)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = asdict(self)
        texts = zip([*data["texts"], *data["other_contexts"]], [*self.texts, *self.other_contexts])
        for plain, text in texts:
            overall = text.overall
            plain["overall"] = {**asdict(overall), "ppl_increase_percent": overall.perplexity_increase}
        for plain, gate in zip(data["gates"], self.gates):
            plain["holds"] = gate.holds
        return {**data, "passed": self.passed}


def check(
    artifact: Path,
    against: str | LoadedModel,
    *,
    gates: Gates | None = None,
    data: Sequence[str] = ("prose",),
    size: CheckSize | None = None,
    seed: int = 0,
    backend: str = "auto",
    weights: WeightType | None = None,
    reference: CompiledModel | None = None,
    expected: dict[str, list[Tensor]] | None = None,
    on_progress: OnProgress | None = None,
) -> Verdict:
    """Measure an artifact against the uncompressed model.

    `data` names kinds of held-out text (prose, code, odd) or prompt files as `kvcc calibrate` takes them. `weights`
    stores the artifact's linear layers as `load` does; the reference keeps the model's own.
    `reference` is `uncompressed(against)` when the caller has it already; `expected` keeps its logits by kind of text,
    for another check of the same size and seed. `on_progress(what, done, total)` is called
    as work goes on. Raises ArtifactError, DataError, UnsupportedModel;
    a gate that does not hold is not an error here: see `Verdict.passed`.
    """
    size = size or CheckSize()
    report = on_progress or unseen
    model = load(artifact, backend=backend, weights=weights)
    _check_size(size, model.identity)
    kinds = {kind: _texts(model, kind, size, seed) for kind in data}
    tasks = list(_tasks(model, size, seed))
    loaded = load_model(against, model.identity.dtype) if isinstance(against, str) else against
    require_model(artifact, model.identity, loaded.identity)
    reference = reference or uncompressed(loaded, model.tokenizer)
    known = {} if expected is None else expected
    for kind, rows in kinds.items():
        if kind not in known:
            known[kind] = [expected_logits(reference, row, size.context) for row in rows]
    texts = tuple(
        teacher_forced(
            model,
            reference,
            ids,
            kind=kind,
            context=size.context,
            expected=known[kind],
            on_step=partial(report, f"text: {kind}"),
        )
        for kind, ids in kinds.items()
    )
    lengths = tuple(_other_contexts(model, reference, kinds, size, report))
    layers: tuple[LayerError, ...] = ()
    if size.layers:
        firsts = [rows[0] for rows in kinds.values()]
        wanted = [known[kind][0] for kind in kinds]
        layers = layer_errors(model, firsts, wanted, size.context, partial(report, "layer by layer"))
    greedy = None
    if size.greedy_prompts:
        prompts = [ids[: size.context] for ids in next(iter(kinds.values()))[: size.greedy_prompts]]
        greedy = greedy_agreement(model, reference, prompts, size.greedy_tokens)
        report("greedy", 1, 1)
    retrieval = tuple(_retrieval(model, reference, tasks, report))
    verdict = Verdict(
        str(artifact),
        loaded.identity.name,
        model.recipe,
        seed,
        size,
        texts,
        retrieval,
        greedy,
        model.plan.bytes_per_token(),
        model.plan.bits_per_element(),
        model.plan.uncompressed_bytes_per_token(),
        weights,
        lengths,
        layers,
    )
    return replace(verdict, gates=judge(gates or Gates(), _measured(verdict)))


def _check_size(size: CheckSize, model: ModelIdentity) -> None:
    """Raise DataError, before hours of work, for what the model's context does not hold."""
    require_context(size.context, size.length)
    if size.length > model.context_length:
        raise DataError(
            f"texts of {size.length} tokens: {model.name} has a context of {model.context_length}; use a smaller "
            "--length, and --context"
        )
    for context in size.other_contexts:
        if not 1 <= context <= size.context:
            raise DataError(f"context {context} must lie between 1 and {size.context}, the longest one")


def _texts(model: CompiledModel, kind: str, size: CheckSize, seed: int) -> list[list[int]]:
    if model.tokenizer is None:
        raise DataError(f"{model.identity.name} has no tokenizer, so no text can be measured")
    if kind in HELD_OUT:
        prompts = held_out(kind, samples=size.texts, length=size.length, seed=seed)
    elif kind in names():
        raise DataError(f"{kind} is for calibration; measure on {', '.join(HELD_OUT)}, or a prompt file")
    else:
        prompts = load_prompts(kind, samples=size.texts, length=size.length, seed=seed)
    sets = encode_sets(prompts, model.tokenizer, seed=seed, length=size.length)
    ids = [list(prompt.ids) for each in sets for prompt in each.prompts]
    short = [len(i) for i in ids if len(i) < size.length]
    if short:
        raise DataError(f"{kind}: a text has only {short[0]} of {size.length} tokens; use a smaller --length")
    return ids


def _other_contexts(
    model: CompiledModel,
    reference: CompiledModel,
    kinds: dict[str, list[list[int]]],
    size: CheckSize,
    report: OnProgress,
) -> Iterator[TextAgreement]:
    """As many tokens of each text as `size` measures behind its context, behind other contexts."""
    measured = size.length - size.context
    for context in size.other_contexts:
        for kind, rows in kinds.items():
            cut = [ids[: context + measured] for ids in rows]
            step = partial(report, f"text: {kind} behind {context:,} tokens")
            yield teacher_forced(model, reference, cut, kind=kind, context=context, on_step=step)


def _tasks(model: CompiledModel, size: CheckSize, seed: int) -> Iterator[tuple[str, int, list[Task]]]:
    """Retrieval tasks by kind and length. Raises DataError for ones that the model's context does not hold."""
    limit = model.identity.context_length
    for kind, make in GENERATORS.items():
        for tokens in size.retrieval_lengths:
            words = _words(model, make, tokens)
            tasks = [make(seed, i, words) for i in range(size.retrieval_tasks)]
            longest = max(sum(map(len, _ask(model, task))) + _answer_tokens(model, task) for task in tasks)
            if longest > limit:
                raise DataError(
                    f"retrieval in {tokens} tokens takes up to {longest} with question and answer: "
                    f"{model.identity.name} has a context of {limit}; use a smaller --retrieval"
                )
            yield kind, tokens, tasks


def _retrieval(
    model: CompiledModel,
    reference: CompiledModel,
    wanted: Sequence[tuple[str, int, list[Task]]],
    report: OnProgress,
) -> list[RetrievalScore]:
    """Both models on every task; the uncompressed one once, since it does not matter to it what was in sight when."""
    scores = []
    total = 3 * sum(len(tasks) for _, _, tasks in wanted)
    done = 0

    def solve(who: CompiledModel, tasks: Sequence[Task], visible: bool) -> Iterator[Found]:
        nonlocal done
        for task in tasks:
            yield retrieve(who, task, lambda t: _ask(model, t), visible, ANSWER)
            done += 1
            report("retrieval", done, total)

    for kind, tokens, tasks in wanted:
        expected = list(solve(reference, tasks, visible=True))
        for visible in (True, False):
            answers = [
                Answer(task.depth, ours.answered, theirs.answered, ours.preferred, theirs.preferred)
                for task, ours, theirs in zip(tasks, solve(model, tasks, visible), expected)
            ]
            scores.append(scored(kind, tokens, visible, answers))
    return scores


def _answer_tokens(model: CompiledModel, task: Task) -> int:
    return max(ANSWER, *map(len, endings(model, task)))


def _words(model: CompiledModel, make: Callable[[int, int, int], Task], tokens: int) -> int:
    """How many words of haystack make a context and question of about `tokens` tokens."""
    short, long = (sum(map(len, _ask(model, make(0, 0, words)))) for words in (100, 300))
    return max(20, int(100 + 200 * (tokens - short) / (long - short)))


def _ask(model: CompiledModel, task: Task) -> tuple[list[int], list[int]]:
    """Context and question as token ids; a chat model is asked inside its template."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    marker = f"<<{random.Random(task.context).random()}>>"
    text, chat = f"{task.context}\n\n{marker}{task.question}", tokenizer.has_chat_template
    if chat:
        text = tokenizer.chat([{"role": "user", "content": text}])
    context, _, question = text.partition(marker)
    return tokenizer.encode(context, special_tokens=not chat), tokenizer.encode(
        question, special_tokens=False
    )


def _measured(verdict: Verdict) -> dict[str, float | None]:
    """What each gate looks at: the worst over texts and lengths."""
    overall = [t.overall for t in verdict.texts]
    drops: dict[str, float | None] = {}
    for kind in GENERATORS:
        mine = [r.drop for r in verdict.retrieval if r.kind == kind]
        drops[f"{kind}_drop_points"] = max(mine) if mine else None
    return {
        "ppl_increase_percent": largest(b.perplexity_increase for b in overall),
        "kl": largest(b.kl for b in overall),
        "top1": min(b.top1 for b in overall),
        "greedy_agreement": verdict.greedy.same if verdict.greedy else None,
        "bytes_per_token_max": verdict.bytes_per_token,
        "cache_error_percent": max(100 * abs(t.cache_bytes / t.formula_bytes - 1) for t in verdict.texts),
        **drops,
    }


def require_model(artifact: Path, of: ModelIdentity, against: ModelIdentity) -> None:
    """Raises DataError for an artifact `of` another model."""
    if against.digest != of.digest:
        raise DataError(
            f"{artifact} was compiled from {of.name} ({of.digest[:19]}), not from "
            f"{against.name} ({against.digest[:19]}); give the model it was compiled from"
        )


def largest(values: Iterable[float]) -> float:
    """The largest, or NaN where one is, which no gate accepts; max() gives NaN only where it comes first."""
    given = list(values)
    return math.nan if any(map(math.isnan, given)) else max(given)


def store_accuracy(artifact: Path, verdict: Verdict) -> None:
    """Keep a verdict in the artifact, as accuracy.json and report.html. Raises DataError for one that is not finite."""
    try:
        text = json.dumps(verdict.as_dict(), indent=2, allow_nan=False)
    except ValueError as error:
        raise DataError(f"{artifact}: a measurement is not a finite number, so it is not stored") from error
    page = render_report(artifact, verdict)
    update_file(artifact, "accuracy.json", f"{text}\n".encode())
    update_file(artifact, "report.html", page.encode())
