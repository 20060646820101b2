"""A compressed cache for stock transformers models: `generate(…, past_key_values=CompressedCache.from_artifact(path))`.

`update` gives back the new keys and values only, as tensors that carry the cache. Attention meets them in
`scaled_dot_product_attention`, or in the attention function registered here as "kvcc_cache", and is then computed by
kvcc's kernels over pages and windows: nothing is dequantised into memory and nothing is copied a step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcc.errors import DataError, KernelUnavailable, UnsupportedModel
from kvcc.kernels import backend as kernel_backend
from kvcc.runtime import cache as paged
from kvcc.runtime.artifact import Artifact, read_artifact
from kvcc.runtime.attention import cached_attention
from kvcc.runtime.plan import LayerPlan

ATTENTION = "kvcc_cache"  # for model.set_attn_implementation
_CARRIED = (Tensor.__getitem__, Tensor.expand, Tensor.reshape)  # what repeats KV heads for query heads
_QUESTIONS = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")


class CompressedCache(Cache):
    """The cache of one batch, stored as an artifact's plan says. Not croppable: sealed pages are not opened again."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(layers=[_Layer(self, i, plan) for i, plan in enumerate(artifact.plan.layers)])
        self.artifact = artifact
        if artifact.manifest.folded is None:
            raise UnsupportedModel(
                f"{artifact.path} does not say what its recipe folds into weights; export it again"
            )
        self.folded = not artifact.manifest.folded  # whether the model's weights are those that pages expect
        self.columns = 0  # tokens of a row, padding included
        self.pages: paged.Cache | None = None  # made at the first update, which knows batch and device
        self._step: _Step | None = None

    @classmethod
    def from_artifact(
        cls, path: str | Path, model: PreTrainedModel | None = None, *, key: str | Path | None = None
    ) -> "CompressedCache":
        """An empty cache as the artifact's plan says. Raises ArtifactError for what is no artifact.

        `key`: a file of public keys, one of which must have signed it; see `kvcc.runtime.load`.

        With `model`, what the recipe folded into weights is put into the model's own, once; see `fold_into`.
        """
        cache = cls(read_artifact(path, verify="sizes", key=key))
        if model is not None:
            cache.fold_into(model)
        return cache

    def folded_state_dict(self) -> dict[str, Tensor]:
        """What the recipe changed of the model's weights, by their names in the model; biases may be new.

        Raises UnsupportedModel where a stock model has no place for it.
        """
        found = {}
        for name, parameter in (self.artifact.manifest.folded or {}).items():
            if not parameter:
                raise UnsupportedModel(
                    f"recipe {self.artifact.manifest.recipe_name} puts {name} in place of a weight of another shape, "
                    "which a stock model cannot hold; run the artifact with kvcc.runtime.load"
                )
            found[parameter.removeprefix("model.")] = self.artifact.weights[name]
        return found

    def fold_into(self, model: nn.Module) -> None:
        """Put `folded_state_dict` into a stock model, in place; does nothing a second time.

        Raises UnsupportedModel where the recipe changed shapes, or the model already carries another artifact's folds.
        """
        digest = self.artifact.manifest.files["weights.safetensors"].sha256
        before = getattr(model, "_kvcc_folded", None)
        if before not in (None, digest):
            raise UnsupportedModel("the model's weights carry the folds of another artifact; load it anew")
        if before is None and not self.folded:
            _put(model, self.folded_state_dict())
            model._kvcc_folded = digest  # type: ignore[assignment]
        self.folded = True

    @torch.no_grad()
    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float,
        softcap: float = 0.0, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of the new tokens: q [B, Hq, n, D], k and v [B, Hkv, n, D], mask bool [B, 1, n, columns + n] or
        None. Returns [B, n, Hq, Dv]; rows of padding are 0. No gradient passes. Raises DataError for a mask that is not
        causal, UnsupportedModel for layers on several devices.
        """
        plans = self.artifact.plan.layers
        step = self._step if layer else self._begin(q, k, mask)
        assert step is not None
        assert self.pages is not None
        if k.device != self.pages.device:
            raise UnsupportedModel(
                f"layer {layer} is on {k.device} and the cache on {self.pages.device}: a compressed cache lies on one "
                "device; load the model onto one"
            )
        if layer == 0 or (plans[layer].window and not any(p.window for p in plans[:layer])):
            _check_causal(mask, step, self.pages.lengths, plans[layer].window)
        rows, columns = step.rows, step.columns
        new_q, new_k, new_v = (x.transpose(1, 2)[rows, columns].transpose(0, 1)[None] for x in (q, k, v))
        options = {"layer": layer, "scale": scale, "window": plans[layer].window, "softcap": softcap}
        found = cached_attention(self.pages, new_q, new_k, new_v, sinks, **options)  # type: ignore[arg-type]
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        out[rows, columns] = found[0].to(out.dtype)
        if layer == len(plans) - 1:
            self.pages.commit()
            self.columns += q.shape[2]
            self._step = None
        return out

    def _begin(self, q: Tensor, k: Tensor, mask: Tensor | None) -> "_Step":
        batch, _, new, _ = q.shape
        if self.pages is None:
            self.pages = self._made(batch, k)
        if batch != len(self.pages.lengths):
            raise DataError(
                f"the cache holds {len(self.pages.lengths)} sequences and was given {batch}; reset() it"
            )
        real = torch.ones(batch, new, dtype=torch.bool, device=q.device)
        if mask is not None:  # a token that does not see itself is padding
            real = mask[:, 0, :, self.columns :].diagonal(dim1=1, dim2=2).expand(batch, -1)
        rows, columns = real.nonzero(as_tuple=True)
        self._step = _Step(rows, columns, real)
        self.pages.begin(real.sum(1).tolist())
        return self._step

    def _made(self, batch: int, k: Tensor) -> paged.Cache:
        if not self.folded:
            raise UnsupportedModel(
                f"recipe {self.artifact.manifest.recipe_name} changes weights of the model: give it, "
                "from_artifact(path, model), or load folded_state_dict() yourself and set cache.folded"
            )
        plan, device = self.artifact.plan, k.device
        kernels = kernel_backend("auto", device)
        for index, layout in enumerate(plan.layouts()):
            if layout is not None and (reason := kernels.supports(layout, plan.exact, device)):
                raise KernelUnavailable(
                    f"layer {index}: {kernels.name} kernels cannot run this plan: {reason}"
                )
        tables = {name: table.to(device) for name, table in self.artifact.tables.items()}
        return paged.Cache(plan, paged.kept_channels(plan, tables), kernels, batch, device)

    # ------------------------------------------------------------------ transformers' own calls

    def reset(self) -> None:
        """Forget everything; the batch may be another afterwards."""
        self.columns, self.pages, self._step = 0, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become those of `beam_idx`; pages that several share are stored once."""
        if self.pages is not None:
            self.pages.keep(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `reorder_cache`."""
        if self.pages is not None:
            self.pages.keep(torch.arange(self.pages.batch)[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.pages is not None:
            self.pages.keep([row for row in range(self.pages.batch) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for 0: DataError."""
        if tokens_to_remove:
            raise DataError(
                "a compressed cache cannot be cropped: sealed pages are not opened again; reset() it"
            )

    @property
    def is_croppable(self) -> bool:
        """Never. Releases before 5.17 do not ask, and meet `crop`."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self.pages is None else self.pages.nbytes


@dataclass(frozen=True)
class _Step:
    """The real tokens of one forward pass, in order: row and column of each, and where they are [B, n]."""

    rows: Tensor
    columns: Tensor
    real: Tensor


class _Layer(CacheLayerMixin):
    """One layer as transformers sees it; everything is the cache's."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: CompressedCache, index: int, plan: LayerPlan) -> None:
        super().__init__()
        self.cache, self.index, self.plan = cache, index, plan
        self.is_sliding = bool(plan.window)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the cache is made when its first tokens attend."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new tokens only; they are stored when they have attended."""
        source = _Source(self.cache, self.index, key_states, value_states)
        return _carrying(key_states, source), _carrying(value_states, source)

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.cache.pages is None else self.cache.pages.batch


# ------------------------------------------------------------------ where attention meets the cache


@dataclass(frozen=True)
class _Source:
    cache: CompressedCache
    layer: int
    k: Tensor
    v: Tensor


class _Pending(Tensor):
    """New keys or values that attention has to hand to the cache."""

    source: _Source

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _sdpa(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            if func in _CARRIED:
                source = next(x.source for x in args if isinstance(x, _Pending))
                return _carrying(func(*args, **(kwargs or {})), source)
            if getattr(func, "__name__", "") in ("__get__", "size", "dim", "__len__", "stride", "__repr__"):
                return func(*args, **(kwargs or {}))
        raise UnsupportedModel(
            f"this attention implementation reads keys itself ({getattr(func, '__name__', func)}); call "
            f'model.set_attn_implementation("{ATTENTION}")'
        )


def _carrying(x: Tensor, source: _Source) -> _Pending:
    found = x.detach().as_subclass(_Pending)
    found.source = source
    return found


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` of new tokens over the cache and themselves: as `query`, [B, H, n, Dv].

    One query for all heads of a group, as transformers packs them, [B, Hkv, group, D], comes back packed.
    """
    if not isinstance(key, _Pending):
        raise UnsupportedModel("keys of a compressed cache must reach attention as the cache gave them")
    source = key.source
    batch, new = source.k.shape[0], source.k.shape[2]
    packed = query.shape[2] != new
    q = query.reshape(batch, -1, new, query.shape[-1]) if packed else query
    mask = _kept(attn_mask, new)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = source.cache.attend(source.layer, q, source.k, source.v, mask, scale).transpose(1, 2)
    return out.reshape(*query.shape[:-1], out.shape[-1]) if packed else out


def _kept(mask: Tensor | None, new: int) -> Tensor | None:
    """What may be seen, bool [B, 1, n, T], of a mask that may be additive."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return mask[:, :1, :new]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function "kvcc_cache": for models that have softcap or sinks, and so no SDPA."""
    if not isinstance(key, _Pending):  # another cache, or none
        if softcap is not None or s_aux is not None:
            raise UnsupportedModel(
                'attention "kvcc_cache" computes softcap and sinks with a CompressedCache only'
            )
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return found
    source = key.source
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _kept(attention_mask, query.shape[2])
    out = source.cache.attend(source.layer, query, source.k, source.v, mask, scale, softcap or 0.0, s_aux)
    return out, None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _check_causal(mask: Tensor | None, step: _Step, lengths: list[int], window: int) -> None:
    """Raise DataError unless every real token sees all real ones before it (in its window) and itself."""
    if mask is None:
        return
    before = torch.tensor(lengths, device=mask.device)[:, None]
    sees = before + step.real.cumsum(1)
    if window:
        sees = sees.clamp_max(window)
    if (mask[:, 0].sum(-1).expand_as(sees) != sees)[step.real].any():
        raise DataError(
            "the attention mask is not causal over all earlier tokens; a compressed cache takes causal ones and padding"
        )


# ------------------------------------------------------------------ folds


def _put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        owner_name, _, attribute = name.rpartition(".")
        try:
            owner = model.get_submodule(owner_name)
            held = getattr(owner, attribute)
        except AttributeError as error:
            raise UnsupportedModel(
                f"the model has no {name}: it is not the one the artifact was made from"
            ) from error
        if held is not None and held.shape != tensor.shape:
            raise UnsupportedModel(
                f"{name} is {list(tensor.shape)} in the artifact and {list(held.shape)} in the model: "
                "it is not the one the artifact was made from"
            )
    for name, tensor in state.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        place = next(owner.parameters())
        setattr(
            owner, attribute, nn.Parameter(tensor.to(place.device, place.dtype).clone(), requires_grad=False)
        )
