"""The Profile: what calibration learned about a model, as sums that merge by addition."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kvcc import sketch, statistics
from kvcc._version import __version__
from kvcc.atomic import locked, write_atomically
from kvcc.errors import ProfileError
from kvcc.runtime.identity import ModelIdentity
from kvcc.statistics import CLASSES, LayerShape, LayerStatistics

SCHEMA = 1
# Tensors of older profiles, and what killed writers left of any.
_OURS = re.compile(
    r"statistics-[0-9a-f]{16}\.safetensors(\.tmp)?"
    r"|\.(profile\.json|statistics-[0-9a-f]{16}\.safetensors)\.[0-9a-f]{12}\.tmp"
)
TAKEN = "q, k and v at the attention node, after rotary embedding and query/key norms"


class Source(BaseModel):
    """One prompt set that a profile was taken on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # of a built-in set, or a file's name without its folder
    digest: str  # of the set's prompts, "sha256:…"
    seed: NonNegativeInt
    samples: PositiveInt  # prompts
    tokens: PositiveInt  # after truncation


class _Layer(BaseModel):
    """LayerShape as stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    q_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    v_head_dim: PositiveInt
    scale: float
    window: PositiveInt | None
    softcap: float | None


class _Tensors(BaseModel):
    """Where the numbers are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^statistics-[0-9a-f]{16}\.safetensors$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Document(BaseModel):
    """profile.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    schema_version: Literal[1]
    statistics_version: PositiveInt
    kvcc_version: str
    taken: str
    skip_first: NonNegativeInt
    positions: NonNegativeInt
    model: ModelIdentity
    sources: tuple[Source, ...]
    prompts: tuple[str, ...]  # ids, sorted
    layers: tuple[_Layer, ...]
    tensors: _Tensors


@dataclass(frozen=True)
class Profile:
    """Sufficient statistics of a model's queries, keys, values and attention, by layer.

    All derived quantities are float64, [H, …] with H the layer's KV heads, over *body* tokens (index in their
    prompt at least `skip_first`). They raise ProfileError when the profile has no body token, or no such
    layer.
    """

    model: ModelIdentity
    skip_first: int
    sources: tuple[Source, ...]
    prompts: tuple[str, ...]  # ids of the prompts counted, sorted
    shapes: tuple[LayerShape, ...]
    layers: tuple[LayerStatistics, ...]
    statistics_version: int = statistics.VERSION
    positions: int = 0  # that prompts were moved to; 0: they began at 0

    @property
    def tokens(self) -> int:
        """Tokens of all prompts, the first ones included."""
        return sum(source.tokens for source in self.sources)

    def require_model(self, model: ModelIdentity) -> None:
        """Raise ProfileError unless the profile was taken on this model."""
        if self.model.digest != model.digest:
            raise ProfileError(
                f"profile was taken on {self.model.name} ({_brief(self.model.digest)}), not on {model.name} "
                f"({_brief(model.digest)}): calibrate this model"
            )

    def body_tokens(self, layer: int) -> int:
        """Tokens that means, covariances, ranges and quantiles are taken over."""
        return int(self._layer(layer).tokens)

    def q_mean(self, layer: int) -> Tensor:
        """Mean query over the query group, [H, D]."""
        return self._layer(layer).q_sum / (self._count(layer) * self.shapes[layer].group)

    def qq(self, layer: int) -> Tensor:
        """E[q qᵀ] over body tokens and the query group, uncentred, [H, D, D]."""
        return self._layer(layer).qq_sum / (self._count(layer) * self.shapes[layer].group)

    def k_mean(self, layer: int) -> Tensor:
        """[H, D]."""
        return self._layer(layer).k_sum / self._count(layer)

    def kk(self, layer: int) -> Tensor:
        """E[k kᵀ], uncentred, [H, D, D]."""
        return self._layer(layer).kk_sum / self._count(layer)

    def k_cov(self, layer: int) -> Tensor:
        """Covariance of keys (divisor n), [H, D, D]."""
        return covariance(self.kk(layer), self.k_mean(layer))

    def k_page_cov(self, layer: int) -> Tensor:
        """Covariance of keys within the pages of statistics.PAGE tokens around them, [H, D, D]."""
        return self.kk(layer) - self._layer(layer).k_page_sum / self._count(layer)

    def v_mean(self, layer: int) -> Tensor:
        """[H, E]."""
        return self._layer(layer).v_sum / self._count(layer)

    def vv(self, layer: int) -> Tensor:
        """E[v vᵀ], uncentred, [H, E, E]."""
        return self._layer(layer).vv_sum / self._count(layer)

    def v_cov(self, layer: int) -> Tensor:
        """Covariance of values (divisor n), [H, E, E]."""
        return covariance(self.vv(layer), self.v_mean(layer))

    def samples(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of body tokens drawn at random, [H, S, D] and [H, S, E] float32, S at most 1,024."""
        held = self._layer(layer)
        drawn = min(self._count(layer), len(held.sample_draws))
        return held.k_sample[:drawn].transpose(0, 1), held.v_sample[:drawn].transpose(0, 1)

    def page_samples(self, layer: int) -> Tensor:
        """Means of the keys of the pages in which the keys of `samples` lie, [H, S, D] float32."""
        held = self._layer(layer)
        return held.k_page_sample[: min(self._count(layer), len(held.sample_draws))].transpose(0, 1)

    @property
    def has_gradients(self) -> bool:
        """Whether every layer with stored tokens was measured by kvcc.sensitivity, too."""
        return all(shape.window or int(held.grad_rows) for shape, held in zip(self.shapes, self.layers))

    def k_fisher(self, layer: int) -> Tensor:
        """E[g gᵀ] over stored tokens, [H, D, D]: an error δ in a token's key costs ½ δᵀ E[g gᵀ] δ nats a prompt."""
        return self._layer(layer).k_grad / self._count(layer)

    def v_fisher(self, layer: int) -> Tensor:
        """The same of values, [H, E, E]."""
        return self._layer(layer).v_grad / self._count(layer)

    def k_range(self, layer: int) -> tuple[Tensor, Tensor]:
        """Exact least and greatest value of each key channel, [H, D] each."""
        self._count(layer)
        return self._layer(layer).k_min, self._layer(layer).k_max

    def v_range(self, layer: int) -> tuple[Tensor, Tensor]:
        """Exact least and greatest value of each value channel, [H, E] each."""
        self._count(layer)
        return self._layer(layer).v_min, self._layer(layer).v_max

    def k_quantile(self, layer: int, p: float) -> Tensor:
        """p-quantile of each key channel, [H, D], within sketch.RELATIVE_ERROR of the exact one."""
        low, high = self.k_range(layer)
        return sketch.quantile(self._layer(layer).k_sketch, p).clamp(low, high)

    def v_quantile(self, layer: int, p: float) -> Tensor:
        """p-quantile of each value channel, [H, E], within sketch.RELATIVE_ERROR of the exact one."""
        low, high = self.v_range(layer)
        return sketch.quantile(self._layer(layer).v_sketch, p).clamp(low, high)

    def think_score(self, layer: int) -> Tensor:
        """ThinK's channel score (arXiv 2407.21018), mean over prompts, [H, D]; all keys count, sinks too."""
        held = self._layer(layer)
        return held.think_sum / held.prompts

    def channel_gamma(self, layer: int) -> Tensor:
        """What dropping channels costs: Γ = scale² · E[q qᵀ] ∘ Cov(k), [H, D, D].

        Dropping the set P of key channels changes the logits of body keys, up to a constant that the softmax
        ignores, by a mean square of 1ᵀ Γ_PP 1 per query head. For a set of RoPE pairs add up each pair's rows
        and columns. Covariance is over the body keys of all prompts together.
        """
        return self.shapes[layer].scale ** 2 * self.qq(layer) * self.k_cov(layer)

    def attention_mass(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean and second moment of the attention each of CLASSES receives from a probe row, [H, 3] each."""
        held = self._layer(layer)
        return held.mass_sum / held.rows, held.mass_sq_sum / held.rows

    def saliency(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean and second moment of ZipCache's normalised saliency over the keys of each class, [H, 3] each.

        NaN for a class that no key was in.
        """
        held = self._layer(layer)
        return held.saliency_sum / held.saliency_keys, held.saliency_sq_sum / held.saliency_keys

    def digest(self) -> str:
        """SHA-256 of all statistics, in hexadecimal: what passes cannot tell apart has the same."""
        return _document(self)[0].tensors.sha256

    def save(self, folder: Path | str) -> None:
        """Write profile.json and its tensor file into `folder`, made if missing; an older one is replaced.

        The tensors go into a file named by their digest and profile.json is renamed into place last, so that
        at every moment the folder loads as the old profile, as the new one, or as none. Several processes that save
        into one folder do so one after another. Raises ProfileError.
        """
        folder = Path(folder)
        document, tensors = _document(self)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder, wait=True):
                write_atomically(folder / document.tensors.file, tensors)
                write_atomically(folder / "profile.json", document.model_dump_json(indent=1).encode())
                for stale in folder.iterdir():
                    if _OURS.fullmatch(stale.name) and stale.name != document.tensors.file:
                        stale.unlink(missing_ok=True)
        except OSError as error:
            raise ProfileError(f"cannot write profile {folder}: {error.strerror or error}") from error

    @staticmethod
    def load(folder: Path | str) -> "Profile":
        """Read and verify a profile. Raises ProfileError that says what is wrong with which file."""
        return _load(Path(folder))

    def _layer(self, layer: int) -> LayerStatistics:
        if not 0 <= layer < len(self.layers):
            raise ProfileError(
                f"profile of {self.model.name} has layers 0 to {len(self.layers) - 1}, not {layer}"
            )
        return self.layers[layer]

    def _count(self, layer: int) -> int:
        count = int(self._layer(layer).tokens)
        if count == 0:
            raise ProfileError(
                f"profile of {self.model.name} holds no token after the first {self.skip_first} of a prompt: "
                "calibrate with longer prompts"
            )
        return count


def merge(profiles: Iterable[Profile]) -> Profile:
    """One profile of the prompts of all, whatever their order: equal to one run over all of them.

    Raises ProfileError when they are of different models, tokenizers, dtypes or statistics, or share a
    prompt.
    """
    parts = list(profiles)
    if not parts:
        raise ProfileError("nothing to merge: name at least one profile")
    return reduce(_merge_two, parts)


def _merge_two(a: Profile, b: Profile) -> Profile:
    """See `merge`. The name of the model is the lesser of the two, so that order does not matter."""
    comparisons: list[tuple[str, Callable[[Profile], Any]]] = [
        ("statistics version", lambda p: p.statistics_version),
        ("model", lambda p: p.model.digest),
        ("tokenizer", lambda p: p.model.tokenizer_digest),
        ("dtype", lambda p: p.model.dtype),
        ("skip_first", lambda p: p.skip_first),
        ("positions", lambda p: p.positions),
        ("layer shapes", lambda p: p.shapes),
    ]
    for what, get in comparisons:
        if get(a) != get(b):
            raise ProfileError(
                f"profiles do not merge: {what} differs: {_brief(get(a))} and {_brief(get(b))}"
            )
    if shared := set(a.prompts) & set(b.prompts):
        raise ProfileError(
            f"profiles do not merge: {len(shared)} prompts are in both and would count twice; "
            "calibrate on disjoint prompt sets"
        )
    if a.tokens + b.tokens > statistics.MAX_TOKENS:
        raise ProfileError(f"profiles do not merge: more than {statistics.MAX_TOKENS} tokens together")
    return Profile(
        model=min(a.model, b.model, key=lambda model: model.name),
        skip_first=a.skip_first,
        sources=sorted_sources(a.sources + b.sources),
        prompts=tuple(sorted(a.prompts + b.prompts)),
        shapes=a.shapes,
        layers=tuple(statistics.merged(x, y) for x, y in zip(a.layers, b.layers, strict=True)),
        statistics_version=a.statistics_version,
        positions=a.positions,
    )


def sorted_sources(sources: Iterable[Source]) -> tuple[Source, ...]:
    """The order in which a profile keeps them, whatever order they were measured in."""
    return tuple(sorted(sources, key=lambda s: (s.name, s.digest, s.seed)))


def pack(layers: Iterable[LayerStatistics]) -> dict[str, Tensor]:
    """All tensors of all layers by "layer.field", contiguous and on the CPU, as stored."""
    return {
        f"{i}.{name}": tensor.detach().cpu().contiguous()
        for i, layer in enumerate(layers)
        for name, tensor in layer.tensors().items()
    }


def unpack(
    tensors: dict[str, Tensor], shapes: Iterable[LayerShape], where: str
) -> tuple[LayerStatistics, ...]:
    """The inverse of `pack`. Raises ProfileError on what is missing, unknown or misshapen."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        by_layer.setdefault(index, {})[name] = tensor
    layers = tuple(
        statistics.from_tensors(shape, by_layer.pop(str(i), {}), f"{where}: layer {i}")
        for i, shape in enumerate(shapes)
    )
    if by_layer:
        raise ProfileError(f"{where}: holds statistics of unknown layers {', '.join(sorted(by_layer))}")
    return layers


def _document(profile: Profile) -> tuple[_Document, bytes]:
    tensors = save(pack(profile.layers))
    digest = hashlib.sha256(tensors).hexdigest()
    document = _Document(
        schema_version=SCHEMA,
        statistics_version=profile.statistics_version,
        kvcc_version=__version__,
        taken=TAKEN,
        skip_first=profile.skip_first,
        positions=profile.positions,
        model=profile.model,
        sources=profile.sources,
        prompts=profile.prompts,
        layers=tuple(_Layer(**vars(shape)) for shape in profile.shapes),
        tensors=_Tensors(file=f"statistics-{digest[:16]}.safetensors", sha256=digest),
    )
    return document, tensors


def _load(folder: Path) -> Profile:
    path = folder / "profile.json"
    document = _parse(path, _read(path, f"no profile at {folder}"))
    file = folder / document.tensors.file
    content = _read(file, f"{folder}: {file.name} is missing: calibrate again")
    if hashlib.sha256(content).hexdigest() != document.tensors.sha256:
        raise ProfileError(
            f"{file}: content is not what profile.json says (truncated or altered): calibrate again"
        )
    shapes = tuple(LayerShape(**layer.model_dump()) for layer in document.layers)
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ProfileError(f"{file}: not a safetensors file: {error}") from error
    return Profile(
        model=document.model,
        skip_first=document.skip_first,
        sources=document.sources,
        prompts=document.prompts,
        shapes=shapes,
        layers=unpack(tensors, shapes, str(file)),
        statistics_version=document.statistics_version,
        positions=document.positions,
    )


def _read(path: Path, absent: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ProfileError(absent) from None
    except OSError as error:
        raise ProfileError(f"cannot read {path}: {error.strerror}") from error


def _parse(path: Path, content: bytes) -> _Document:
    """Versions first: a later one may have any other fields."""
    try:
        found = json.loads(content)
        versions = found["schema_version"], found["statistics_version"]
    except (ValueError, KeyError, TypeError):
        raise ProfileError(f"{path}: not a kvcc profile") from None
    if versions != (SCHEMA, statistics.VERSION):
        raise ProfileError(
            f"{path}: schema {versions[0]} with statistics {versions[1]}; this kvcc reads schema {SCHEMA} "
            f"with statistics {statistics.VERSION}: calibrate again"
        )
    try:
        document = _Document.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ProfileError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if len(document.layers) != document.model.layers:
        raise ProfileError(
            f"{path}: {len(document.layers)} layers described, but the model has {document.model.layers}"
        )
    return document


def covariance(second: Tensor, mean: Tensor) -> Tensor:
    """[H, D, D] of second moments and means."""
    return second - mean[:, :, None] * mean[:, None, :]


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}…"


def summarize(profile: Profile) -> list[dict[str, Any]]:
    """One row of plain numbers per layer, for people and JSON; heads averaged.

    `k_energy_top10`: share of E[k²] in the strongest tenth of the channels. `k_outliers`: channels whose root
    mean square is over 4 times the head's median. `mass_*`: attention by position class. `think_top_half`:
    share of ThinK's score in the better half of the channels (0.5 when all are equal).
    """
    rows = []
    for layer, shape in enumerate(profile.shapes):
        power = profile.kk(layer).diagonal(dim1=1, dim2=2)
        rms = power.sqrt()
        mass, _ = profile.attention_mass(layer)
        rows.append(
            {
                "layer": layer,
                "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "tokens": profile.body_tokens(layer),
                "k_energy_top10": _top_share(power, max(1, shape.head_dim // 10)),
                "k_outliers": int((rms > 4 * rms.median(1, keepdim=True).values).sum()),
                "k_max_abs": float(torch.stack(profile.k_range(layer)).abs().max()),
                "v_max_abs": float(torch.stack(profile.v_range(layer)).abs().max()),
                **{f"mass_{name}": float(mass[:, i].mean()) for i, name in enumerate(CLASSES)},
                "think_top_half": _top_share(profile.think_score(layer), shape.head_dim // 2),
            }
        )
    return rows


def _top_share(values: Tensor, count: int) -> float:
    """Share of the sum that the `count` greatest of the last axis hold, mean over heads."""
    return float((values.topk(count, dim=-1).values.sum(-1) / values.sum(-1)).mean())
