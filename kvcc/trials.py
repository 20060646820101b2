"""Trials: recipes compiled in memory and measured on the same texts, through the real cache."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from kvcc.atomic import write_atomically
from kvcc.attention_time import attention_ms
from kvcc.calibration import encode_sets
from kvcc.calibration_data import load_prompts
from kvcc.errors import ArtifactUnwritable, DataError
from kvcc.graph import Graph
from kvcc.measure import divergences
from kvcc.pipeline import in_memory, run_passes
from kvcc.profile import Profile
from kvcc.recipe import parse_recipe
from kvcc.runtime import CompiledModel
from kvcc.runtime.cache import Cache
from kvcc.shared_prefill import Filler, Prompt, filler, record
from kvcc.uncompressed import EXACT_TOLERANCE, departure

DATA = "stdlib-docs,stdlib-code"  # kinds of text that `kvcc check` measures on, other halves of them
CHUNK = 64  # tokens appended at once while measuring
TIMED = 4096  # tokens that attention is timed over
OPENING = 32  # tokens that tell whether a recipe computes prompts as the model does


@dataclass(frozen=True)
class Measured:
    """One recipe through the real cache: mean KL(model || compressed) over all texts, in nats a token."""

    recipe: str  # YAML
    bits: float  # per element, metadata included
    bytes_per_token: float
    kl: float
    by_kind: dict[str, float]
    attention_ms: float | None = None  # where it was asked for


@dataclass(frozen=True)
class Text:
    """A prompt that was prefilled once for all recipes, tokens behind it, and what the model predicts after each."""

    prompt: Prompt
    behind: tuple[int, ...]
    expected: Tensor  # log-probabilities [len(behind), V]


class Trials:
    """Texts of each kind of DATA, and what was measured on them; kept in the file `state` when given.

    `reference` is the model in `graph`, uncompressed and with a tokenizer.

    The first `texts` of a kind are what recipes are compared on, as many others what the best are verified on: `tokens`
    predictions behind `context` tokens, or as many as the model's context leaves. Raises DataError where it leaves few,
    ProfileError for a profile of another model.
    """

    def __init__(
        self,
        graph: Graph,
        reference: CompiledModel,
        profile: Profile | None,
        texts: int,
        context: int,
        tokens: int,
        seed: int,
        state: Path | None,
    ) -> None:
        self.graph, self.reference, self.profile = graph, reference, profile
        self.count, self.state = texts, state
        model, tokenizer = graph.model, reference.tokenizer
        if profile is not None:
            profile.require_model(model)
        if tokenizer is None:
            raise DataError(f"{model.name} has no tokenizer; planning measures on text")
        left = model.context_length - tokens
        if left < OPENING:
            raise DataError(
                f"{model.name} has a context of {model.context_length} tokens; planning takes "
                f"{tokens} predictions behind {OPENING} or more"
            )
        context = min(context, left)
        length = context + tokens
        prompts = load_prompts(DATA, samples=4 * texts, length=length, seed=seed + 1000)
        sets = encode_sets(prompts, tokenizer, seed=seed, length=length)
        self.texts = {}
        for each in sets:
            rows = [p.ids for p in each.prompts if len(p.ids) == length][: 2 * texts]
            self.texts[each.name] = [_text(self.reference, ids[:context], ids[context:]) for ids in rows]
        self.prompt = next(iter(self.texts.values()))[0].prompt
        self.opening = self.prompt.tokens[:OPENING]
        self.opened = _opened(self.reference, self.opening)
        self.tolerance = EXACT_TOLERANCE[model.dtype]
        self.about = ["behind", model.digest, context, tokens, texts, seed]
        self.known: dict[str, Any] = {}
        if state is not None and state.is_file():
            self.known = _held(state, self.key)

    @cached_property
    def key(self) -> str:
        """What measurements depend on besides the recipe; of use with a `state` only, and a second's work."""
        about = [*self.about, self.profile and self.profile.digest()]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def measure(
        self,
        recipe: str,
        bits: float | None,
        *,
        timed: bool = False,
        again: bool = False,
        short: bool = False,
    ) -> Measured | None:
        """A recipe on all texts it is compared on; None where its plan is beyond `bits`.

        `timed`: also how long attention takes. `again`: on the texts for verifying. `short`: on one text of each kind,
        half its context and a quarter of its predictions.
        """
        first = self.count if again else 0
        key = f"{'short ' if short else ''}{'timed ' if timed else ''}{first} {recipe}"
        if key not in self.known:
            found = self._measure(recipe, bits, timed, first, short)
            if found is None:
                return None
            self.known[key] = asdict(found)
            if self.state is not None:
                _hold(self.state, self.key, self.known)
        return Measured(**self.known[key])

    def _measure(
        self, recipe: str, bits: float | None, timed: bool, first: int, short: bool
    ) -> Measured | None:
        made = run_passes(self.graph, self.profile, parse_recipe(recipe, "plan"))
        plan = made.plan
        if bits is not None and plan.bits_per_element() > bits + 1e-9:
            return None
        model = in_memory(made, self.graph.model, "plan")
        prefill = self._prefill(model)
        some = slice(first, first + self.count)
        texts = self.short if short else {name: every[some] for name, every in self.texts.items()}
        kinds = {n: sum(_loss(model, t, prefill) for t in every) / len(every) for n, every in texts.items()}
        mean = sum(kinds.values()) / len(kinds)
        taken = attention_ms(plan, model.backend, TIMED) if timed else None
        return Measured(recipe, plan.bits_per_element(), plan.bytes_per_token(), mean, kinds, taken)

    @cached_property
    def short(self) -> dict[str, list[Text]]:
        """The first text of each kind with half its prompt and a quarter of the tokens behind."""
        return {name: [_shortened(self.reference, every[0])] for name, every in self.texts.items()}

    def _prefill(self, model: CompiledModel) -> Filler | None:
        """What fills caches of `model`; None where it computes prompts in a way of its own."""
        if not departure(_opened(model, self.opening), self.opened) <= self.tolerance:
            return None
        return filler(model, self.prompt)


def _held(state: Path, key: str) -> dict[str, Any]:
    """What was measured for the same `key`, from a file. Raises DataError for one that is none of ours."""
    try:
        held = json.loads(state.read_text())
        return dict(held["measured"]) if held["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state} cannot be read; remove it, or plan without --resume") from error


def _hold(state: Path, key: str, measured: dict[str, Any]) -> None:
    """Keep it there. Raises ArtifactUnwritable."""
    try:
        write_atomically(state, json.dumps({"key": key, "measured": measured}, indent=1).encode())
    except OSError as error:
        raise ArtifactUnwritable(f"cannot write {state}: {error.strerror or error}") from error


def _text(reference: CompiledModel, context: Sequence[int], behind: Sequence[int]) -> Text:
    cache = reference.new_cache(1)
    prompt = record(reference, context, cache)
    return Text(prompt, tuple(behind), _continued(reference, cache, behind))


def _shortened(reference: CompiledModel, text: Text) -> Text:
    context = len(text.prompt.tokens) // 2
    following = (*text.prompt.tokens[context:], *text.behind)
    behind = following[: max(1, len(text.behind) // 4)]
    prompt = text.prompt.first(context)
    cache = _filled(reference, prompt, filler(reference, prompt))
    return Text(prompt, behind, _continued(reference, cache, behind))


def _loss(model: CompiledModel, text: Text, prefill: Filler | None) -> float:
    """Mean KL(expected || predicted) behind the prompt, in nats a token."""
    found = _continued(model, _filled(model, text.prompt, prefill), text.behind)
    return float(divergences(text.expected, found).mean())


def _filled(model: CompiledModel, prompt: Prompt, prefill: Filler | None) -> Cache:
    """A cache that holds the prompt, by a forward pass where there is nothing else."""
    cache = model.new_cache(1)
    if prefill is None:
        model.forward([prompt.tokens], cache)
    else:
        prefill.fill(cache, prompt)
    return cache


def _continued(model: CompiledModel, cache: Cache, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities [N, V] after each of `tokens`, appended in chunks."""
    return model.forward([tokens], cache, chunk=CHUNK, every=True).float().log_softmax(-1)


def _opened(model: CompiledModel, tokens: Sequence[int]) -> Tensor:
    return model.forward([tokens], model.new_cache(1), every=True).float()
