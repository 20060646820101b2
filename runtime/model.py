"""A compiled model: the lowered graph, its plan and tables, and the kernels that run it."""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from kvcc.errors import ArtifactGraph, CapacityError, DataError
from kvcc.kernels.protocol import Backend
from kvcc.runtime.cache import Cache, KeptChannels, KeyBasis, kept_channels
from kvcc.runtime.captured import CapturedStep, NotCapturable, capture
from kvcc.runtime.identity import ModelIdentity
from kvcc.runtime.plan import Plan
from kvcc.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kvcc.runtime.generation import Generation, Piece, Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompiledModel:
    """What `load` returns. `tokenizer` is None for an artifact without one.

    On the CPU, with the cpu kernels, decode steps are captured once for every batch size and number of threads, and
    then replayed.
    """

    identity: ModelIdentity
    recipe: str  # its name
    plan: Plan
    graph: fx.GraphModule
    tables: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    backend: Backend
    device: torch.device
    exact_in: torch.dtype | None = None  # type in which new tokens attend to each other; None: the model's
    steps: dict[tuple[int, int], CapturedStep | None] = field(default_factory=dict, repr=False, compare=False)
    capturing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def new_cache(self, batch: int = 1, budget: int | None = None) -> Cache:
        """An empty cache for `batch` sequences, of at most `budget` bytes when given."""
        return Cache(self.plan, self.kept_channels, self.backend, batch, self.device, budget, self.exact_in)

    @cached_property
    def kept_channels(self) -> list[KeptChannels | KeyBasis | None]:
        """What pages store of K, by layer; all caches share it."""
        return kept_channels(self.plan, self.tables)

    def generate(self, prompts: Sequence["Prompt"], **options: Any) -> "list[Generation]":
        """One Generation a prompt; options as in `kvcc.runtime.generation.generate`."""
        from kvcc.runtime.generation import generate

        return generate(self, prompts, **options)

    def stream(self, prompts: Sequence["Prompt"], **options: Any) -> "Iterator[Piece]":
        """Pieces of text as they come; options as in `kvcc.runtime.generation.stream`."""
        from kvcc.runtime.generation import stream

        return stream(self, prompts, **options)

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[Sequence[int]], cache: Cache, *, chunk: int | None = None, every: bool = False
    ) -> Tensor:
        """Append `tokens[row]` to each sequence and give logits.

        Any number of new tokens per sequence, also none. Returns the logits of each sequence's last token
        [B, V] (rows without new tokens are left out), or with `every` of all new tokens, sequence after sequence
        [N, V]. With `chunk`, at most that many tokens of a sequence go through the model at once: later chunks then
        attend to pages that earlier ones sealed, so logits differ a little from those of an exact prefill.
        Raises CapacityError when the context does not suffice, or memory for the cache; the cache is then unchanged.
        When memory runs out in the middle of a step (CapacityError, too), or the artifact's graph fails (ArtifactGraph;
        only one that kvcc did not write does), some layers have stored their tokens: the cache is to be thrown away.
        """
        self._check(tokens, cache)
        if chunk is not None and chunk < 1:
            raise DataError(f"chunk {chunk}: at least one token goes through the model at once")
        longest = max(map(len, tokens), default=0)
        if not longest:
            raise DataError("forward needs at least one new token")
        if chunk is None or longest <= chunk:
            return self._step(tokens, cache, every)
        cache.reserve([length + len(t) for length, t in zip(cache.lengths, tokens)])
        pieces: list[list[Tensor]] = [[] for _ in tokens]
        for first in range(0, longest, chunk):
            part = [t[first : first + chunk] for t in tokens]
            logits = self._step(part, cache, every)
            counts = [len(p) if every else min(len(p), 1) for p in part]
            for row, piece in enumerate(logits.split(counts)):
                if len(piece):
                    pieces[row] = [*pieces[row], piece] if every else [piece]
        return torch.cat([piece for row in pieces for piece in row])

    def _step(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool) -> Tensor:
        cache.begin([len(t) for t in tokens])
        try:
            return self._run(tokens, cache, every)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise CapacityError(f"{self.identity.name}: no memory on {self.device} for this step") from error
        except (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            # Shapes were checked when the graph was loaded; an index out of range shows only now.
            reason = (str(error).strip().splitlines() or [""])[0]
            if "allocate memory" in reason:  # torch's words on the CPU
                raise CapacityError(f"{self.identity.name}: {reason[:200]}") from error
            raise ArtifactGraph(f"graph: fails on these tokens: {reason[:200]}") from error

    def _run(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool) -> Tensor:
        counts = cache.counts
        if set(counts) == {1} and all(cache.lengths) and (captured := self._captured(cache)):
            last = captured.run([row[0] for row in tokens], cache)
            cache.commit()
            return last
        flat = torch.tensor([[t for row in tokens for t in row]], device=self.device)
        starts = [range(length, length + count) for length, count in zip(cache.lengths, counts)]
        positions = torch.tensor([[p for row in starts for p in row]], device=self.device)
        if every:
            rows = torch.arange(flat.shape[1], device=self.device)
        else:
            ends = torch.tensor([c for c in counts if c], device=self.device).cumsum(0)
            rows = ends - 1
        logits: Tensor = self.graph(flat, positions, rows, cache)
        cache.commit()
        return logits[0]

    def _captured(self, cache: Cache) -> CapturedStep | None:
        """The captured step for a batch as large as the cache's; None where the graph has to run as it is."""
        if self.backend.name != "cpu":
            return None
        key = cache.batch, torch.get_num_threads()
        with self.capturing:
            if key not in self.steps:
                try:
                    self.steps[key] = capture(self.graph, cache)
                except NotCapturable as error:
                    log.warning("decode steps run operator by operator, which is slower: %s", error)
                    self.steps[key] = None
            return self.steps[key]

    def _check(self, tokens: Sequence[Sequence[int]], cache: Cache) -> None:
        if len(tokens) != cache.batch:
            raise DataError(f"{len(tokens)} sequences given to a cache of batch {cache.batch}")
        for row, (new, length) in enumerate(zip(tokens, cache.lengths)):
            total = length + len(new)
            if total > self.identity.context_length:
                raise CapacityError(
                    f"sequence {row} would be {total} tokens long; {self.identity.name} has a context of "
                    f"{self.identity.context_length}; shorten the prompt or generate less"
                )
            bad = next((t for t in new if not 0 <= t < self.identity.vocab_size), None)
            if bad is not None:
                raise DataError(
                    f"sequence {row}: token {bad} is outside the vocabulary of {self.identity.vocab_size}"
                )
