"""Greedy generation from a folder that `kvcc export --format onnx` wrote, with numpy and ONNX Runtime alone.

It shows how the graphs are driven: feed the cache, take it back, and seal a page when the recent window is full.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kvcc.errors import ArtifactManifest, ArtifactMissing, CapacityError, DataError, KernelUnavailable

VERSION = 1
ROOM = 256  # slots by which a cache of GroupQueryAttention grows

Arrays = dict[str, np.ndarray]


@dataclass
class OnnxCache:
    """The cache of a batch. lengths: tokens of each sequence; windows and pages by name ("0.window_k", "0.bytes").

    Windows are [B, KV heads, slots, channels], pages uint8, float16 or float32 [B, pages, numbers of a page]. Rows with
    fewer pages than others have anything in the last ones.
    """

    lengths: np.ndarray  # [B] int64
    windows: Arrays
    pages: Arrays

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in (*self.windows.values(), *self.pages.values()))


class OnnxModel:
    """The graphs of a folder in ONNX Runtime.

    threads: of one operator, None for ONNX Runtime's choice. Raises KernelUnavailable without onnxruntime,
    ArtifactMissing and ArtifactManifest for a folder that is no such export.
    """

    attention = "standard"
    graphs: tuple[str, ...] = ("prefill", "decode", "seal")

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        if find_spec("onnxruntime") is None:
            raise KernelUnavailable("running ONNX graphs needs onnxruntime: pip install 'kvcc[onnx]'")
        import onnxruntime

        self.description = _description(Path(folder), self.attention, self.graphs)
        settings = onnxruntime.SessionOptions()
        if threads is not None:
            settings.intra_op_num_threads = threads
        self._graphs = {
            name: onnxruntime.InferenceSession(
                str(Path(folder) / f"{name}.onnx"), settings, providers=["CPUExecutionProvider"]
            )
            for name in self.graphs
        }
        self._window_names = [s["name"] for s in self.description["states"] if s["segment"] == "window"]
        self._page_names = [s["name"] for s in self.description["states"] if s["segment"] == "pages"]

    def sealed(self, lengths: np.ndarray) -> np.ndarray:
        """How many of each sequence's tokens are in pages."""
        page = self.description["page"]
        beyond = lengths - self.description["sinks"] - self.description["recent"]
        return np.maximum(beyond // page * page, 0)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, OnnxCache]:
        """Logits [B, vocabulary] of each prompt's last token, and the cache of all. Raises DataError, CapacityError."""
        tokens, lengths = self._padded(prompts)
        made = self._run("prefill", {"tokens": tokens, "lengths": lengths}, "present.")
        windows = {name: made[name] for name in self._window_names}
        return made["logits"], OnnxCache(lengths, windows, {name: made[name] for name in self._page_names})

    def decode(self, tokens: Sequence[int], cache: OnnxCache) -> np.ndarray:
        """Append one token to each sequence; logits [B, vocabulary]. Raises CapacityError at the end of the context."""
        self._check_room(cache)
        graph = self._graphs["decode"]
        binding = graph.io_binding()
        for name, array in {"tokens": np.array(tokens, np.int64), "lengths": cache.lengths}.items():
            binding.bind_cpu_input(name, array)
        for name, array in (*cache.windows.items(), *cache.pages.items()):
            binding.bind_cpu_input(f"past.{name}", array)
        binding.bind_output("logits", "cpu")  # first, as get_outputs has them in this order
        for (
            name,
            array,
        ) in cache.windows.items():  # the same memory: the new token is written where it belongs
            binding.bind_output(f"present.{name}", "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        graph.run_with_iobinding(binding)
        before, cache.lengths = cache.lengths, cache.lengths + 1
        full = np.flatnonzero(self.sealed(cache.lengths) > self.sealed(before))
        if len(full):
            self._seal(cache, full, self.sealed(before)[full] // self.description["page"])
        return np.asarray(binding.get_outputs()[0].numpy())

    def _seal(self, cache: OnnxCache, rows: np.ndarray, places: np.ndarray) -> None:
        """Make the oldest recent tokens of sequences `rows` their pages number `places`."""
        feeds = {f"past.{name}": array for name, array in cache.windows.items()}
        made = self._run("seal", {"lengths": cache.lengths, "rows": rows} | feeds, "page.")
        for name, array in cache.pages.items():
            if array.shape[1] <= places.max():  # as many pages as the longest sequence has
                grown = np.zeros((array.shape[0], places.max() + 1, array.shape[2]), array.dtype)
                grown[:, : array.shape[1]] = array
                cache.pages[name] = grown
            cache.pages[name][rows, places] = made[name][:, 0]

    def keep(self, cache: OnnxCache, rows: Sequence[int]) -> OnnxCache:
        """The cache of some of its sequences, in this order."""
        index = np.array(rows, np.int64)
        most = self.sealed(cache.lengths[index]).max() // self.description["page"]
        return OnnxCache(
            cache.lengths[index],
            {name: array[index] for name, array in cache.windows.items()},
            {name: np.ascontiguousarray(array[index, :most]) for name, array in cache.pages.items()},
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 128, ignore_eos: bool = False
    ) -> list[list[int]]:
        """New token ids of each prompt, greedily, up to an end of text, `max_tokens` or the end of the context."""
        if max_tokens < 1:
            return [[] for _ in prompts]
        logits, cache = self.prefill(prompts)
        eos = set() if ignore_eos else set(self.description["model"]["eos_token_ids"])
        context = self.description["model"]["context_length"]
        found: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        while True:
            chosen = logits.argmax(-1).tolist()
            going = []
            for row, (index, token) in enumerate(zip(active, chosen)):
                found[index].append(token)
                room = min(max_tokens, context - len(prompts[index]))
                if token not in eos and len(found[index]) < room:
                    going.append(row)
            if not going:
                return found
            if len(going) < len(active):
                cache, active = self.keep(cache, going), [active[row] for row in going]
            logits = self.decode([chosen[row] for row in going], cache)

    def _run(self, graph: str, feeds: Arrays, prefix: str) -> Arrays:
        session = self._graphs[graph]
        names = [output.name for output in session.get_outputs()]
        return {name.removeprefix(prefix): x for name, x in zip(names, session.run(names, feeds))}

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, longest], with 0 behind shorter prompts, where nobody sees it; and lengths [B]."""
        self._check(prompts)
        lengths = np.array([len(p) for p in prompts], np.int64)
        tokens = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        return tokens, lengths

    def _check_room(self, cache: OnnxCache) -> None:
        context = self.description["model"]["context_length"]
        if cache.lengths.max() >= context:
            raise CapacityError(f"the context of {context} tokens is full")

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        model = self.description["model"]
        if not prompts:
            raise DataError("prefill needs at least one prompt")
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise DataError(f"prompt {row} is empty")
            if len(prompt) > model["context_length"]:
                raise CapacityError(
                    f"prompt {row} has {len(prompt)} tokens and the context {model['context_length']}; shorten it"
                )
            if not 0 <= min(prompt) <= max(prompt) < model["vocab_size"]:
                raise DataError(f"prompt {row} has a token outside the vocabulary of {model['vocab_size']}")


class OnnxGqaModel(OnnxModel):
    """The graph of a folder exported with `--onnx-attention gqa`; its cache is in `pages`, int8 [B, H, slots, D]."""

    attention = "gqa"
    graphs = ("step",)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, OnnxCache]:
        """See `OnnxModel.prefill`."""
        tokens, counts = self._padded(prompts)
        slots = tokens.shape[1] + ROOM
        empty = {
            state["name"]: np.zeros((len(prompts), state["shape"][1], slots, state["shape"][3]), np.int8)
            for state in self.description["states"]
        }
        cache = OnnxCache(np.zeros_like(counts), {}, empty)
        logits = self._step(tokens, counts, cache)
        cache.lengths = counts
        return logits, cache

    def decode(self, tokens: Sequence[int], cache: OnnxCache) -> np.ndarray:
        """See `OnnxModel.decode`."""
        self._check_room(cache)
        for name, array in cache.pages.items():
            if array.shape[2] == cache.lengths.max():
                cache.pages[name] = np.concatenate([array, np.zeros_like(array[:, :, :ROOM])], 2)
        logits = self._step(np.array(tokens, np.int64)[:, None], np.ones_like(cache.lengths), cache)
        cache.lengths = cache.lengths + 1
        return logits

    def keep(self, cache: OnnxCache, rows: Sequence[int]) -> OnnxCache:
        """See `OnnxModel.keep`."""
        index = np.array(rows, np.int64)
        return OnnxCache(
            cache.lengths[index], {}, {name: array[index] for name, array in cache.pages.items()}
        )

    def _step(self, tokens: np.ndarray, counts: np.ndarray, cache: OnnxCache) -> np.ndarray:
        """Append `counts` of the tokens [B, L] in place; logits of the last of each."""
        graph = self._graphs["step"]
        binding = graph.io_binding()
        for name, array in {"tokens": tokens, "counts": counts, "lengths": cache.lengths}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", "cpu")
        for name, array in cache.pages.items():
            binding.bind_cpu_input(f"past.{name}", array)
            binding.bind_output(f"present.{name}", "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        graph.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[0].numpy())


def _description(folder: Path, attention: str, graphs: Sequence[str]) -> dict[str, Any]:
    path = folder / "kvcc_onnx.json"
    if not path.is_file():
        raise ArtifactMissing(f"{folder}: has no {path.name}; export with `kvcc export --format onnx`")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactManifest(f"{path}: {error}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ArtifactManifest(f"{path}: not of version {VERSION}; use the kvcc that wrote it")
    if found["attention"] != attention:
        raise ArtifactManifest(f"{path}: attention is {found['attention']}: open it with the class for that")
    for name in graphs:
        if not (folder / f"{name}.onnx").is_file():
            raise ArtifactMissing(f"{folder / name}.onnx: missing; export again")
    return found
