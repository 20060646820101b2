"""Calibration: run a model's graph over prompts and take statistics at its attention nodes."""

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, fx

from kvcc import statistics
from kvcc.atomic import write_atomically
from kvcc.calibration_data import Prompt, digest, load_prompts
from kvcc.errors import CapacityError, DataError, ProfileError
from kvcc.graph import Graph
from kvcc.profile import Profile, Source, pack, sorted_sources, unpack
from kvcc.runtime.identity import ModelIdentity
from kvcc.sensitivity import Gradients
from kvcc.statistics import LayerShape, LayerStatistics

if TYPE_CHECKING:
    from kvcc.frontend import LoadedModel
    from kvcc.runtime.tokenizer import Tokenizer

SKIP_FIRST = 16  # tokens at the start of a prompt that means and covariances leave out
SHIFT = 97  # positions, by which a model is tried out
SAVE_EVERY = 30.0  # seconds between checkpoints


@dataclass(frozen=True)
class TokenPrompt:
    """One prompt as the model sees it. `id` stands for the whole text, before truncation."""

    ids: tuple[int, ...]
    id: str


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one origin. Batches never straddle sets, so that its sums do not depend on others."""

    name: str
    digest: str
    seed: int
    prompts: tuple[TokenPrompt, ...]


@dataclass(frozen=True)
class Progress:
    """How far a run is. `resumed_tokens` were measured by an earlier, interrupted run."""

    prompts: int
    total_prompts: int
    tokens: int
    total_tokens: int
    resumed_tokens: int
    seconds: float  # of this run

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - self.resumed_tokens) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None while nothing has been measured."""
        rate = self.tokens_per_second
        return (self.total_tokens - self.tokens) / rate if rate > 0 else None


class Encoder(Protocol):
    """What calibration needs of a tokenizer: kvcc.runtime.tokenizer.Tokenizer has it."""

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, special_tokens: bool = True) -> list[int]: ...

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str: ...


def encode_sets(prompts: Sequence[Prompt], tokenizer: Encoder, *, seed: int, length: int) -> list[PromptSet]:
    """Tokenise prompts, cut each after `length` tokens, and group them by source in order of appearance.

    Messages go through the chat template, or become lines of "Role: content" for a model that has none.
    `seed`: what the prompts were drawn with, for the record. Raises DataError for a source without a token.
    """
    by_source: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_source.setdefault(prompt.source, []).append(prompt)
    sets = []
    for source, members in by_source.items():
        encoded = [_encode(prompt, tokenizer, length) for prompt in members]
        # The folder of a file is nobody's business but its owner's.
        name = source if source.startswith("hf:") else Path(source).name
        if not any(each.ids for each in encoded):
            raise DataError(f"{name}: holds no text: nothing is left after tokenising")
        kept = tuple(each for each in encoded if each.ids)
        sets.append(PromptSet(name, f"sha256:{digest(members)}", seed, kept))
    return sets


def _encode(prompt: Prompt, tokenizer: Encoder, length: int) -> TokenPrompt:
    if prompt.messages is None:
        text = prompt.text or ""
    elif tokenizer.has_chat_template:
        text = tokenizer.chat(list(prompt.messages), add_generation_prompt=False)
    else:
        text = "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in prompt.messages)
    # A chat template writes the special tokens itself.
    templated = prompt.messages is not None and tokenizer.has_chat_template
    ids = tokenizer.encode(text, special_tokens=not templated)[:length]
    return TokenPrompt(tuple(ids), hashlib.sha256(text.encode()).hexdigest()[:16])


def calibrate(
    graph: Graph,
    sets: Sequence[PromptSet],
    *,
    batch_size: int = 1,
    skip_first: int = SKIP_FIRST,
    gradients: bool = False,
    positions: int | None = None,
    state: Path | None = None,
    resume: bool = False,
    save_every: float = SAVE_EVERY,
    progress: Callable[[Progress], None] | None = None,
) -> Profile:
    """Measure the model on every prompt of every set, each prompt once, and return the profile.

    With `gradients`, a backward pass through every prompt follows, alone and unpadded (four times the time, and
    memory for its activations in every layer). A prompt that occurs again, in the same or a later set, is left out.

    Where attention knows distances only (rotary positions), a prompt begins at a position drawn between 0 and
    `positions` less its length (None: the model's context; 0: all begin at 0). It computes the same there, and
    statistics of keys, which turn with their positions, then hold for contexts of that length.

    With `state`, a checkpoint is kept in that file every `save_every` seconds, for the caller to remove once the
    profile is saved; with `resume`, a run that was killed goes on from there, and ends with the same bits as one that
    was not. Without a state file `resume` starts from the beginning.

    Raises DataError (no prompt; none longer than `skip_first`), CapacityError (a prompt longer than the
    model's context; a batch too large for memory), ProfileError (a state file of another run; values that
    overflow).
    """
    sets = without_repeats(sets)
    batches = _batches(sets, batch_size)
    _check_prompts(graph.model, sets, skip_first)
    span = graph.model.context_length if positions is None else positions
    if span > graph.model.context_length:
        raise CapacityError(
            f"positions {span} lie beyond the context of {graph.model.name}, {graph.model.context_length} tokens"
        )
    span = span if span and knows_distances_only(graph, sets[0].prompts[0]) else 0
    key = _run_key(graph.model, sets, batch_size, skip_first, gradients, span)
    tap, done = _Tap(graph.module, skip_first, span), 0
    backward = Gradients(graph.module, skip_first) if gradients else None
    if resume and state is not None and state.exists():
        tap.shapes, tap.layers, done = _load_state(state, key)

    total_tokens = sum(_count(batch) for batch in batches)
    resumed = sum(_count(batch) for batch in batches[:done])
    started = saved = time.monotonic()
    tokens = resumed
    for index in range(done, len(batches)):
        _measure(tap, batches[index], backward)
        tokens += _count(batches[index])
        now = time.monotonic()
        if state is not None and now - saved >= save_every:
            _save_state(state, key, tap, index + 1)
            saved = time.monotonic()
        if progress is not None:
            prompts = sum(map(len, batches[: index + 1]))
            totals = sum(map(len, batches)), tokens, total_tokens, resumed
            progress(Progress(prompts, *totals, now - started))
    return _profile(graph.model, sets, tap, skip_first)


def knows_distances_only(graph: Graph, prompt: TokenPrompt) -> bool:
    """Whether the model computes the same when all positions are shifted, up to rounding, tried on a few tokens."""
    few = TokenPrompt(prompt.ids[:32], prompt.id)
    shift = min(SHIFT, graph.model.context_length - len(few.ids))
    tokens, at, mask = _left_padded([few], 0)
    with torch.no_grad():
        rows = torch.tensor([tokens.shape[1] - 1])
        here, there = (graph.module(tokens, at + by, mask, rows).float() for by in (0, shift))
    rounding = torch.finfo(getattr(torch, graph.model.dtype)).eps ** 0.5
    return bool((here - there).abs().max() <= 10 * rounding * here.abs().max())


def without_repeats(sets: Sequence[PromptSet]) -> tuple[PromptSet, ...]:
    """The sets without prompts that came before, and without sets that this leaves empty."""
    seen: set[str] = set()
    kept = []
    for each in sets:
        fresh = tuple({p.id: p for p in each.prompts if p.id not in seen}.values())
        seen.update(p.id for p in fresh)
        if fresh:
            kept.append(PromptSet(each.name, each.digest, each.seed, fresh))
    return tuple(kept)


class _Tap(fx.Interpreter):
    """Runs the graph as it is, and adds what each attention node receives to that layer's statistics."""

    def __init__(self, module: fx.GraphModule, skip_first: int, span: int = 0) -> None:
        super().__init__(module)
        self.skip_first = skip_first
        self.span = span  # positions that prompts are moved to; 0: they begin at 0
        self.shapes: dict[int, LayerShape] = {}
        self.layers: dict[int, LayerStatistics] = {}
        self.batch: list[tuple[int, Tensor, Tensor]] = []  # length, probe rows and draws of each prompt

    def measure(self, batch: Sequence[TokenPrompt]) -> None:
        """One forward pass, with logits of one row only."""
        self.batch = [
            (
                len(p.ids),
                torch.tensor(statistics.probe_rows(len(p.ids), p.id)),
                statistics.token_draws(len(p.ids), p.id),
            )
            for p in batch
        ]
        tokens, positions, mask = _left_padded(batch, self.span)
        with torch.no_grad():
            self.run(tokens, positions, mask, torch.tensor([tokens.shape[1] - 1]))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.kvcc.attention.default:
            names = (argument.name for argument in target._schema.arguments)
            self._observe(**(dict(zip(names, args, strict=False)) | kwargs))
        return super().call_function(target, args, kwargs)

    def _observe(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        layer: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> None:
        """Add q [B, Hq, T, D], k [B, H, T, D], v [B, H, T, E] of a left-padded batch, prompt by prompt."""
        if layer not in self.layers:
            sizes = q.shape[1], k.shape[1], k.shape[3], v.shape[3]
            self.shapes[layer] = LayerShape(*sizes, scale, window or None, softcap or None)
            self.layers[layer] = statistics.empty(self.shapes[layer], q.device)
        for row, (length, probes, draws) in enumerate(self.batch):
            real = slice(q.shape[2] - length, None)
            statistics.add_prompt(
                self.layers[layer],
                self.shapes[layer],
                q[row, :, real],
                k[row, :, real],
                v[row, :, real],
                visible=None if mask is None else mask[row if mask.shape[0] > 1 else 0, 0, real, real],
                sinks=sinks,
                probes=probes,
                draws=draws,
                skip_first=self.skip_first,
            )


def _measure(tap: _Tap, batch: Sequence[TokenPrompt], backward: Gradients | None) -> None:
    """Add a batch to the statistics. Raises CapacityError and ProfileError."""
    try:
        tap.measure(batch)
        if backward is not None:
            for prompt in batch:
                backward.add(tap.layers, prompt.ids, prompt.id, _start(prompt, tap.span))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        longest = max(len(prompt.ids) for prompt in batch)
        raise CapacityError(
            f"a batch of {len(batch)} prompts of up to {longest} tokens does not fit into memory: "
            "use a smaller --batch-size or --length"
        ) from error
    for layer, held in sorted(tap.layers.items()):
        if bad := next(iter(statistics.not_finite(held)), None):
            raise ProfileError(
                f"layer {layer}: {bad} is not finite on prompt {batch[0].id}: the model overflows in "
                "this dtype; use --dtype float32 or bfloat16"
            )


def _left_padded(batch: Sequence[TokenPrompt], span: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, positions [B, T] int64 and mask [B, T] int64, 1 at real tokens; padding comes first.

    A prompt's first token has a position between 0 and `span` less the prompt's length, drawn by its id.
    """
    lengths = torch.tensor([len(prompt.ids) for prompt in batch])
    width = int(lengths.max())
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, prompt in enumerate(batch):
        tokens[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
    positions = torch.arange(width) - (width - lengths)[:, None]
    starts = torch.tensor([_start(prompt, span) for prompt in batch])
    return tokens, positions.clamp(min=0) + starts[:, None], (positions >= 0).long()


def _start(prompt: TokenPrompt, span: int) -> int:
    """Position of a prompt's first token."""
    return random.Random(f"position {prompt.id}").randint(0, max(0, span - len(prompt.ids)))


def _batches(sets: Sequence[PromptSet], size: int) -> list[tuple[TokenPrompt, ...]]:
    if size < 1:
        raise DataError(f"batch size {size} is not positive")
    return [s.prompts[i : i + size] for s in sets for i in range(0, len(s.prompts), size)]


def _count(batch: Sequence[TokenPrompt]) -> int:
    return sum(len(prompt.ids) for prompt in batch)


def _check_prompts(model: ModelIdentity, sets: Sequence[PromptSet], skip_first: int) -> None:
    lengths = [len(prompt.ids) for each in sets for prompt in each.prompts]
    longest = max(lengths, default=0)
    if longest > model.context_length:
        raise CapacityError(
            f"a prompt has {longest} tokens, but {model.name} has a context of {model.context_length}: "
            f"use --length {model.context_length}"
        )
    if longest <= skip_first:
        raise DataError(
            f"no prompt is longer than the {skip_first} first tokens that statistics leave out: "
            "use longer prompts"
        )
    if sum(lengths) > statistics.MAX_TOKENS:
        raise DataError(f"{sum(lengths)} tokens are more than the {statistics.MAX_TOKENS} a profile counts")


def _run_key(
    model: ModelIdentity,
    sets: Sequence[PromptSet],
    batch_size: int,
    skip_first: int,
    gradients: bool,
    span: int,
) -> dict[str, str]:
    """What two runs must share for one to go on where the other stopped."""
    tokens = hashlib.sha256(json.dumps([[p.id, p.ids] for s in sets for p in s.prompts]).encode())
    return {
        "model": model.digest,
        "tokenizer": model.tokenizer_digest,
        "dtype": model.dtype,
        "statistics version": str(statistics.VERSION),
        "skip_first": str(skip_first),
        "batch size": str(batch_size),
        "gradients": str(gradients),
        "positions": str(span),
        "seed": ", ".join(str(each.seed) for each in sets),
        "data": ", ".join(f"{each.name} {each.digest}" for each in sets),
        "prompt tokens (length)": f"sha256:{tokens.hexdigest()}",
    }


def _save_state(path: Path, key: dict[str, str], tap: _Tap, done: int) -> None:
    shapes = [asdict(tap.shapes[i]) for i in sorted(tap.shapes)]
    state = json.dumps({"key": key, "done": done, "shapes": shapes})
    layers = [tap.layers[i] for i in sorted(tap.layers)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(pack(layers), metadata={"kvcc.calibration": state}))
    except OSError as error:
        raise ProfileError(f"cannot write calibration state {path}: {error.strerror or error}") from error


def _load_state(
    path: Path, key: dict[str, str]
) -> tuple[dict[int, LayerShape], dict[int, LayerStatistics], int]:
    """Shapes, statistics and batches done. Raises ProfileError when it is of another run or unreadable."""
    again = "run without --resume to start again"
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["kvcc.calibration"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        shapes = [LayerShape(**shape) for shape in state["shapes"]]
        found, done = state["key"], int(state["done"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ProfileError(f"{path} is not a readable calibration state: {again}") from error
    for what, value in key.items():
        if found.get(what) != value:
            raise ProfileError(
                f"{path} is the state of another run: its {what} is {found.get(what)}, not {value}; {again}"
            )
    layers = unpack(tensors, shapes, str(path))
    return dict(enumerate(shapes)), dict(enumerate(layers)), done


def _profile(model: ModelIdentity, sets: Sequence[PromptSet], tap: _Tap, skip_first: int) -> Profile:
    sources = [
        Source(name=s.name, digest=s.digest, seed=s.seed, samples=len(s.prompts), tokens=_count(s.prompts))
        for s in sets
    ]
    return Profile(
        model=model,
        skip_first=skip_first,
        positions=tap.span,
        sources=sorted_sources(sources),
        prompts=tuple(sorted(p.id for s in sets for p in s.prompts)),
        shapes=tuple(tap.shapes[i] for i in sorted(tap.shapes)),
        layers=tuple(tap.layers[i] for i in sorted(tap.layers)),
    )


def own_prompts(
    loaded: "LoadedModel", graph: Graph, tokenizer: "Tokenizer", *, samples: int, length: int, seed: int
) -> PromptSet:
    """Prompts of `length` tokens that the model writes itself; see kvcc.own_text."""
    from kvcc.own_text import NAME, own_text
    from kvcc.uncompressed import uncompressed

    rows = own_text(uncompressed(loaded, tokenizer, graph), samples=samples, length=length, seed=seed)
    digests = [hashlib.sha256(json.dumps(row).encode()).hexdigest() for row in rows]
    prompts = tuple(TokenPrompt(tuple(row), digest[:16]) for row, digest in zip(rows, digests))
    return PromptSet(NAME, f"sha256:{hashlib.sha256(''.join(digests).encode()).hexdigest()}", seed, prompts)


def calibrate_model(
    model: str,
    data: str,
    output: Path,
    *,
    field: str = "text",
    samples: int = 16,
    length: int = 1024,
    seed: int = 0,
    batch_size: int = 1,
    dtype: str = "float32",
    skip_first: int = SKIP_FIRST,
    gradients: bool = False,
    own: int = 0,
    positions: int | None = None,
    save_every: float = SAVE_EVERY,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Profile:
    """What `kvcc calibrate` does: load a model and prompts, measure, write the profile folder `output`.

    `data`: as for calibration_data.load_prompts; `samples` prompts in all, of at most `length` tokens. The model adds
    `own` prompts that it writes itself (kvcc.own_text).
    While it runs, its checkpoint is the file `output` + ".partial". `say` gets a line for each stage. Raises
    the KvccError of whichever stage refuses.
    """
    from kvcc.frontend import capture, load_model, runtime_tokenizer  # transformers takes seconds to import

    if output.exists() and not output.is_dir():
        raise ProfileError(f"{output} is a file: a profile is a folder; give another name")
    prompts = load_prompts(data, samples=samples, length=length, seed=seed, field=field)
    say(f"loading {model}")
    loaded = load_model(model, dtype)
    if length > loaded.identity.context_length:
        raise CapacityError(
            f"--length {length} is longer than the context of {loaded.identity.name}, "
            f"{loaded.identity.context_length} tokens"
        )
    tokenizer = runtime_tokenizer(loaded)
    if not tokenizer.has_chat_template and any(prompt.messages for prompt in prompts):
        say("the model has no chat template: chats are written as plain text")
    sets = encode_sets(prompts, tokenizer, seed=seed, length=length)
    repeated = len(prompts) - sum(len(each.prompts) for each in without_repeats(sets))
    if repeated:
        say(f"{repeated} empty or repeated prompts are left out")
    say("capturing the graph")
    graph = capture(loaded)
    if own:
        say(f"writing {own} prompts of the model's own")
        sets.append(own_prompts(loaded, graph, tokenizer, samples=own, length=length, seed=seed))
    state = output.absolute().with_name(f"{output.name}.partial")
    if resume:
        say("resuming" if state.exists() else f"nothing to resume ({state} does not exist): starting")
    profile = calibrate(
        graph,
        sets,
        batch_size=batch_size,
        skip_first=skip_first,
        gradients=gradients,
        positions=positions,
        state=state,
        resume=resume,
        save_every=save_every,
        progress=progress,
    )
    profile.save(output)
    state.unlink(missing_ok=True)
    return profile
