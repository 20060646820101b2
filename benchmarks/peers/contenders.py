"""Who is compared: name, environment, worker and options, and roughly how much memory a cached token takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.records import Cell

HERE = Path(__file__).parent
FP32, BF16 = 46_080, 23_040  # bytes of a cached token of SmolLM2-135M: 30 layers, K and V, 3 heads of 64
STEPS_PER_PAGE = 64  # kvcc times as many, so that each run seals every layer's page once per sequence


@dataclass(frozen=True)
class Contender:
    name: str
    environment: str  # a requirements file's name; kvcc's own python for "kvcc"
    script: str
    options: dict[str, Any]
    token_bytes: float  # an estimate, for leaving out what does not fit
    steps: int | None = None  # of a decode run of one sequence, where not the harness's
    most_tokens: int = (
        65_536  # of all sequences of a decode cell; engines that prefill every prompt take fewer
    )
    only_4k: bool = False  # decode one sequence of 4,096 tokens and no other, and time no prefill
    prefills: bool = False  # fills a cache from a real prompt, which it keeps; done once before the timed run

    @property
    def worker(self) -> Path:
        return HERE / self.script

    def takes(self, cell: Cell) -> bool:
        """Whether the cell is one of this contender's."""
        if cell.do == "decode":
            small = cell.context * cell.batch <= self.most_tokens
            return small and (not self.only_4k or (cell.context, cell.batch) == (4096, 1))
        return cell.do == "largest_batch" or not self.only_4k


def contenders(folder: Path, gguf: Path) -> list[Contender]:
    """All contenders, in the order in which they take turns; `folder` is the bench's."""
    prompt = {"prompt": str(folder / "prompt.json")}
    model = prompt | {"model": str(folder / "model" / "transformers")}
    return [
        *kvcc(folder),
        *transformers(model),
        *kvpress(model),
        *engines(folder, gguf, prompt),
        *vllm(model),
    ]


def kvcc(folder: Path) -> list[Contender]:
    kinds = [
        ("kivi-4", "float32", 14_000),
        ("kivi-4", "bfloat16", 14_000),
        ("kivi-4", "int8", 14_000),
        ("kivi-2", "int8", 12_000),
        ("think-40-kivi-2", "int8", 10_000),
    ]
    return [
        Contender(
            f"kvcc {recipe}, {weights} weights",
            "kvcc",
            "kvcc_worker.py",
            {"artifact": str(folder / "artifacts" / f"{recipe}.kvcc"), "weights": weights},
            nbytes,
            STEPS_PER_PAGE,
        )
        for recipe, weights, nbytes in kinds
    ]


def transformers(model: dict[str, Any]) -> list[Contender]:
    def cache(name: str, dtype: str, nbytes: float, only_4k: bool = False, **options: Any) -> Contender:
        return Contender(
            f"transformers {name}",
            "transformers",
            "torch_caches.py",
            model | {"dtype": dtype} | options,
            nbytes,
            only_4k=only_4k,
        )

    dynamic = [
        cache("DynamicCache fp32", "float32", 1.2 * FP32, cache="dynamic"),
        cache("DynamicCache bf16", "bfloat16", 1.2 * BF16, cache="dynamic"),
    ]
    return dynamic + [
        cache(f"QuantizedCache {kind} {bits}-bit", "float32", 20_000, True, cache=kind, nbits=bits)
        for kind in ("quanto", "hqq")
        for bits in (4, 2)
    ]


def kvpress(model: dict[str, Any]) -> list[Contender]:
    options = model | {"dtype": "float32", "cache": "dynamic"}
    presses = [
        ("ThinK, 40 % of K channels", {"press": "think", "ratio": 0.4}, FP32),
        ("SnapKV, half of the tokens", {"press": "snapkv", "ratio": 0.5}, FP32 / 2),
    ]
    return [
        Contender(
            f"kvpress {name}", "kvpress", "torch_caches.py", options | press, 1.2 * nbytes, only_4k=True
        )
        for name, press, nbytes in presses
    ]


def engines(folder: Path, gguf: Path, prompt: dict[str, Any]) -> list[Contender]:
    source = prompt | {"gguf": str(gguf)}
    llama = [
        Contender(
            f"llama.cpp {kind.upper()}",
            "llama_cpp",
            "llama_cpp_worker.py",
            source | {"kind": kind, "states": str(folder / "states")},
            nbytes,
            prefills=True,
        )
        for kind, nbytes in (("f16", BF16), ("q8_0", 12_300), ("q4_0", 6_500))
    ]
    converted = str(folder / "model" / "openvino")
    openvino = [
        Contender(
            f"OpenVINO GenAI {precision}",
            "openvino",
            "openvino_worker.py",
            source | {"model": converted, "precision": precision},
            2 * nbytes,  # a cache that grows is copied
            most_tokens=most,
            prefills=True,
        )
        for precision, nbytes, most in (("f32", FP32, 8192), ("u8", 13_700, 16_384), ("u4", 15_900, 16_384))
    ]
    return llama + openvino


def vllm(model: dict[str, Any]) -> list[Contender]:
    options = model | {"dtype": "bfloat16"}
    return [Contender("vLLM bf16", "vllm", "vllm_worker.py", options, BF16, most_tokens=4096, prefills=True)]


def chosen(everyone: Sequence[Contender], wanted: str | None) -> list[Contender]:
    """Those whose name contains one of the words in `wanted` (with commas between), or all.

    Raises ValueError for a word that is in no name.
    """
    if not wanted:
        return list(everyone)
    words = [word.strip().lower() for word in wanted.split(",") if word.strip()]
    for word in words:
        if not any(word in contender.name.lower() for contender in everyone):
            names = "; ".join(contender.name for contender in everyone)
            raise ValueError(f"no peer is called {word!r}; there are: {names}")
    return [c for c in everyone if any(word in c.name.lower() for word in words)]
