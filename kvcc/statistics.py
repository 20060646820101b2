"""What calibration accumulates for one attention layer: sums over tokens, so that parts add up to the whole.

Every number is taken at the attention node: q and k after RoPE and any QK-norm, v as it is stored. A *body*
token is a token whose index in its prompt is at least `skip_first`: the first tokens (attention sinks) are
stored exactly and would distort means and covariances of the rest.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kvcc import sketch
from kvcc.errors import ProfileError

VERSION = 5  # of the meaning of the fields below; profiles of different versions do not merge
SINKS = 16  # the position class "sinks": the first tokens of a prompt
RECENT = 64  # the position class "recent": the last tokens up to and including the query
CLASSES = ("sinks", "middle", "recent")
PROBES = 16  # last rows, and as many random rows, on which attention is looked at (ZipCache's probe queries)
THINK_WINDOW = 32  # last queries that ThinK's score looks at
SAMPLED = 1024  # body tokens kept as they are
PAGE = 64  # body tokens in a row whose mean key counts as a page's; the last ones of a prompt may be fewer
MAX_TOKENS = 2**31 - 1  # what the sketch's int32 counters hold

_MINIMA, _MAXIMA = ("k_min", "v_min"), ("k_max", "v_max")
_SAMPLES = ("k_sample", "k_page_sample", "v_sample")
_WON = ("k_won", "k_page_won", "v_won", "k_won_weight", "v_won_weight")
_NOT_DRAWN = 2**63 - 1


@dataclass(frozen=True)
class LayerShape:
    """One attention layer: heads, sizes and what its logits go through. `window` in tokens; None: full."""

    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads


@dataclass(frozen=True)
class LayerStatistics:
    """Sums for one layer. H KV heads, D key channels, E value channels, B sketch buckets, C position classes.

    Sums are float64, counts int64, sketches int32. Query sums run over body tokens and over the query heads
    of a group; attention is averaged over the query heads of a group.
    """

    tokens: Tensor  # [] body tokens
    prompts: Tensor  # [] prompts in think_sum
    q_sum: Tensor  # [H, D] Σ q
    qq_sum: Tensor  # [H, D, D] Σ q qᵀ
    k_sum: Tensor  # [H, D]
    kk_sum: Tensor  # [H, D, D]
    k_page_sum: Tensor  # [H, D, D] Σ m mᵀ, m the mean key of the PAGE tokens around
    v_sum: Tensor  # [H, E]
    vv_sum: Tensor  # [H, E, E]
    k_min: Tensor  # [H, D] over body tokens
    k_max: Tensor  # [H, D]
    v_min: Tensor  # [H, E]
    v_max: Tensor  # [H, E]
    k_sketch: Tensor  # [H, D, B] body tokens by bucket of their value (kvcc.sketch)
    v_sketch: Tensor  # [H, E, B]
    rows: Tensor  # [] probe rows
    mass_sum: Tensor  # [H, C] Σ over probe rows of the attention that a class receives
    mass_sq_sum: Tensor  # [H, C] the same, squared
    uniform_sum: Tensor  # [C] what uniform attention over the visible keys would give
    saliency_keys: Tensor  # [C] keys in saliency_sum
    saliency_sum: Tensor  # [H, C] Σ over keys of ZipCache's normalised saliency
    saliency_sq_sum: Tensor  # [H, C]
    think_sum: Tensor  # [H, D] Σ over prompts of ThinK's score
    sample_draws: (
        Tensor  # [S] int64 random numbers of the sampled tokens, ascending; the largest int64 for none
    )
    k_sample: Tensor  # [S, H, D] float32 keys of the body tokens that drew least
    k_page_sample: Tensor  # [S, H, D] means of the PAGE keys around them
    v_sample: Tensor  # [S, H, E]
    grad_rows: Tensor  # [] predictions whose gradients were taken (kvcc.sensitivity); 0: none were
    k_grad: Tensor  # [H, D, D] Σ over stored tokens of g gᵀ, g the gradient at their key
    v_grad: Tensor  # [H, E, E]
    k_cost_sum: Tensor  # [H, D] Σ c k over stored tokens, c = |g|²: what errors in a token's key cost
    kk_cost_sum: Tensor  # [H, D, D] Σ c k kᵀ
    k_page_cost_sum: Tensor  # [H, D, D] Σ c (k - m)(k - m)ᵀ, m the mean key of the PAGE tokens around
    v_cost_sum: Tensor  # [H, E]
    vv_cost_sum: Tensor  # [H, E, E]
    races: Tensor  # [S] float64 least draws of exponential variables, one race a slot; infinite: none was run
    k_won: Tensor  # [S, H, D] float32 keys of the tokens that won the races: where errors cost much, often the same
    k_page_won: Tensor  # [S, H, D] means of the PAGE keys around them
    v_won: Tensor  # [S, H, E]
    k_won_weight: Tensor  # [S, H] c over how often a race is won by such a token
    v_won_weight: Tensor  # [S, H]

    def tensors(self) -> dict[str, Tensor]:
        """Every field by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def layout(shape: LayerShape) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every field of LayerStatistics for a layer of this shape."""
    H, D, E, B, C = shape.kv_heads, shape.head_dim, shape.v_head_dim, sketch.BUCKETS, len(CLASSES)
    sizes: dict[str, tuple[int, ...]] = {
        "tokens": (), "prompts": (), "rows": (), "saliency_keys": (C,), "uniform_sum": (C,),
        "q_sum": (H, D), "k_sum": (H, D), "v_sum": (H, E), "think_sum": (H, D),
        "qq_sum": (H, D, D), "kk_sum": (H, D, D), "k_page_sum": (H, D, D), "vv_sum": (H, E, E),
        "k_min": (H, D), "k_max": (H, D), "v_min": (H, E), "v_max": (H, E),
        "k_sketch": (H, D, B), "v_sketch": (H, E, B),
        "mass_sum": (H, C), "mass_sq_sum": (H, C), "saliency_sum": (H, C), "saliency_sq_sum": (H, C),
        "sample_draws": (SAMPLED,), "k_sample": (SAMPLED, H, D),
        "k_page_sample": (SAMPLED, H, D), "v_sample": (SAMPLED, H, E),
        "grad_rows": (), "k_grad": (H, D, D), "v_grad": (H, E, E),
        "k_cost_sum": (H, D), "kk_cost_sum": (H, D, D), "k_page_cost_sum": (H, D, D),
        "v_cost_sum": (H, E), "vv_cost_sum": (H, E, E),
        "races": (SAMPLED,), "k_won": (SAMPLED, H, D), "k_page_won": (SAMPLED, H, D), "v_won": (SAMPLED, H, E),
        "k_won_weight": (SAMPLED, H), "v_won_weight": (SAMPLED, H),
    }  # fmt: skip
    counts = {"tokens", "prompts", "rows", "saliency_keys", "sample_draws", "grad_rows"}

    def dtype(name: str) -> torch.dtype:
        if name.endswith("sketch"):
            return torch.int32
        if name in _SAMPLES + _WON:
            return torch.float32
        return torch.int64 if name in counts else torch.float64

    return {field.name: (dtype(field.name), sizes[field.name]) for field in fields(LayerStatistics)}


def empty(shape: LayerShape, device: torch.device | str = "cpu") -> LayerStatistics:
    """Statistics of no token at all: the neutral element of `merged`."""
    start = dict.fromkeys(_MINIMA, torch.inf) | dict.fromkeys(_MAXIMA, -torch.inf)
    start |= {"sample_draws": _NOT_DRAWN, "races": torch.inf}
    return LayerStatistics(
        **{
            name: torch.full(size, start.get(name, 0), dtype=dtype, device=device)
            for name, (dtype, size) in layout(shape).items()
        }
    )


def from_tensors(shape: LayerShape, tensors: Mapping[str, Tensor], where: str) -> LayerStatistics:
    """Check names, dtypes and shapes of stored fields. Raises ProfileError; `where` names the layer in it."""
    expected = layout(shape)
    if expected.keys() != tensors.keys():
        odd = ", ".join(sorted(expected.keys() ^ tensors.keys()))
        raise ProfileError(f"{where}: missing or unknown statistics: {odd}")
    for name, (dtype, size) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ProfileError(f"{where}: statistic {name} is {found}, not {dtype} {size}")
    return LayerStatistics(**tensors)


def merged(a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    """The statistics of the tokens of both. Commutative; associative up to float64 rounding."""
    samples = _least_drawn(
        *(torch.cat([getattr(x, name) for x in (a, b)]) for name in ("sample_draws", *_SAMPLES))
    )
    samples |= _winners(a.tensors(), b.tensors())
    pairs = {name: (x, b.tensors()[name]) for name, x in a.tensors().items() if name not in samples}
    combine = dict.fromkeys(_MINIMA, torch.minimum) | dict.fromkeys(_MAXIMA, torch.maximum)
    sums = {name: combine.get(name, torch.add)(x, y) for name, (x, y) in pairs.items()}
    return LayerStatistics(**sums, **samples)


def _least_drawn(draws: Tensor, *samples: Tensor) -> dict[str, Tensor]:
    """The SAMPLED tokens with the least draws: a uniform sample, whatever the order in which parts came."""
    draws, order = draws.sort(stable=True)
    order = order[:SAMPLED]
    return {"sample_draws": draws[:SAMPLED]} | {
        name: x[order] for name, x in zip(_SAMPLES, samples, strict=True)
    }


def _winners(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each race that was run in two parts, the winner of both."""
    first = a["races"] <= b["races"]

    def pick(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(first.view(-1, *[1] * (x.dim() - 1)), x, y)

    return {name: pick(a[name], b[name]) for name in ("races", *_WON)}


def add_gradients(
    statistics: LayerStatistics,
    k: Tensor,
    v: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
    generator: torch.Generator,
) -> None:
    """Add one prompt's body tokens k [H, T, D], v [H, T, E] and the gradients at them, of the same shapes.

    A token weighs as much as errors in it cost, c = |g|². Means and covariances are of weighed tokens; samples are
    drawn with replacement, a token as often as it weighs on average over heads, K and V: the least of exponential
    variables is that of a token in proportion to its rate, and stays so when prompts are added.
    """
    held, costs = statistics.tensors(), []
    around = page_means(k)
    for name, x, grad in (("k", k, k_grad), ("v", v, v_grad)):
        g, exact = grad.double(), x.double()
        cost = g.square().sum(-1)  # [H, T]
        held[f"{name}_grad"].baddbmm_(g.mT, g)
        held[f"{name}_cost_sum"].add_((cost[..., None] * exact).sum(1))
        held[f"{name}{name}_cost_sum"].baddbmm_((cost[..., None] * exact).mT, exact)
        costs.append(cost)
    within = k.double() - around
    statistics.k_page_cost_sum.baddbmm_((costs[0][..., None] * within).mT, within)
    every = torch.cat(costs)  # [2 H, T]
    rate = (every / every.sum(1, keepdim=True).clamp_min(torch.finfo(every.dtype).tiny)).mean(0)
    if not bool(rate.sum() > 0):
        return  # nothing was seen: no errors cost anything
    rate = rate / rate.sum() * k.shape[1]
    races = torch.empty(SAMPLED, dtype=torch.float64).exponential_(generator=generator) / k.shape[1]
    token = torch.multinomial(rate, SAMPLED, replacement=True, generator=generator)
    values = (x[:, token].transpose(0, 1).float() for x in (k, around, v))
    weights = ((cost / rate)[:, token].mT.float() for cost in costs)
    new = dict(zip(("races", *_WON), (races, *values, *weights)))
    for name, tensor in _winners(held, new).items():
        held[name].copy_(tensor)


def add_prompt(
    statistics: LayerStatistics,
    shape: LayerShape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None,
    sinks: Tensor | None,
    probes: Tensor,
    draws: Tensor,
    skip_first: int,
) -> None:
    """Add one prompt of T ≥ 1 tokens, without padding, to `statistics` in place.

    q [Hq, T, D], k [H, T, D], v [H, T, E] of any float dtype; `visible` [T, T] bool, True where a query may
    attend to a key (None: causal, within the layer's window); `sinks` [Hq] attention-sink logits or None;
    `probes`: sorted row indices int64; `draws` [T] int64: random numbers of the tokens. Nothing depends on other
    prompts, so sums do not depend on how prompts are batched.
    """
    queries = q.unflatten(0, (shape.kv_heads, shape.group))  # [H, group, T, D]
    body_k, body_v = k[:, skip_first:], v[:, skip_first:]
    around = page_means(body_k)
    _add_moments(statistics, queries[:, :, skip_first:], body_k, around, body_v)
    _add_samples(statistics, draws[skip_first:], body_k, around, body_v)
    _add_think(statistics, queries[:, :, -THINK_WINDOW:], k)
    attention, seen = _probe_attention(shape, queries, k, visible=visible, sinks=sinks, probes=probes)
    _add_attention(statistics, attention, seen, probes)


def page_means(k: Tensor) -> Tensor:
    """For each of keys [H, T, D] the mean of the PAGE around it, float64 [H, T, D]."""
    page = torch.arange(k.shape[1], device=k.device) // PAGE
    sums = torch.zeros(len(k), -(-k.shape[1] // PAGE), k.shape[2], dtype=torch.float64, device=k.device)
    sums.index_add_(1, page, k.double())
    return (sums / page.bincount()[:, None])[:, page]


def _add_moments(statistics: LayerStatistics, queries: Tensor, k: Tensor, around: Tensor, v: Tensor) -> None:
    """Counts, first and second moments, ranges and sketches of body tokens: queries [H, group, T, D]."""
    if k.shape[1] == 0:
        return
    statistics.tokens.add_(k.shape[1])
    # float64 before the products: keys of some models have means a hundred times their spread, and a float32
    # Gram matrix would lose the covariance.
    exact = {"q": queries.double().flatten(1, 2), "k": k.double(), "v": v.double()}
    for name, rows in exact.items():
        getattr(statistics, f"{name}_sum").add_(rows.sum(1))
        getattr(statistics, f"{name}{name}_sum").baddbmm_(rows.mT, rows)
    statistics.k_page_sum.baddbmm_(around.mT, around)
    for name, rows in (("k", k), ("v", v)):
        minimum, maximum = getattr(statistics, f"{name}_min"), getattr(statistics, f"{name}_max")
        torch.minimum(minimum, rows.amin(1).double(), out=minimum)
        torch.maximum(maximum, rows.amax(1).double(), out=maximum)
        sketch.add(getattr(statistics, f"{name}_sketch"), rows)


def _add_samples(statistics: LayerStatistics, draws: Tensor, k: Tensor, around: Tensor, v: Tensor) -> None:
    """Keep those of k, around, v [H, T, …] that drew less than what is kept."""
    held = statistics.tensors()
    here = draws < held["sample_draws"][-1]
    if bool(here.any()):
        new = draws[here], *(x[:, here].transpose(0, 1).float() for x in (k, around, v))
        names = ("sample_draws", *_SAMPLES)
        kept = _least_drawn(
            *(torch.cat([held[name], x.to(held[name].device)]) for name, x in zip(names, new))
        )
        for name, tensor in kept.items():
            held[name].copy_(tensor)


def token_draws(length: int, prompt_id: str) -> Tensor:
    """Random numbers of a prompt's tokens, [length] int64: the same for the same prompt."""
    generator = torch.Generator().manual_seed(random.Random(prompt_id).getrandbits(62))
    return torch.randint(_NOT_DRAWN, (length,), generator=generator)


def _add_think(statistics: LayerStatistics, queries: Tensor, k: Tensor) -> None:
    """ThinK's channel score (arXiv 2407.21018): mean q² over the last queries × mean k² over all keys.

    The mean of q² runs over the query group too, as the score is of a KV head.
    """
    score = queries.double().square().mean((1, 2)) * k.double().square().mean(1)
    statistics.think_sum.add_(score)
    statistics.prompts.add_(1)


def probe_rows(length: int, prompt_id: str) -> list[int]:
    """Query rows on which attention is looked at: the last ones and random ones, drawn by the prompt's id."""
    earlier = max(length - PROBES, 0)
    drawn = random.Random(prompt_id).sample(range(earlier), min(PROBES, earlier))
    return sorted(drawn) + list(range(earlier, length))


def _probe_attention(
    shape: LayerShape,
    queries: Tensor,
    k: Tensor,
    *,
    visible: Tensor | None,
    sinks: Tensor | None,
    probes: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention of the probe rows, mean over the query group: [H, rows, T] float32; and `seen` [rows, T]."""
    length = k.shape[1]
    if visible is None:
        distance = probes[:, None] - torch.arange(length, device=k.device)
        seen = (distance >= 0) & (distance < (shape.window or length))
    else:
        seen = visible[probes]
    logits = torch.einsum("hgrd,htd->hgrt", queries[:, :, probes].float(), k.float()) * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    logits.masked_fill_(~seen, -torch.inf)
    if sinks is not None:
        extra = sinks.float().view(shape.kv_heads, shape.group, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    return logits.softmax(-1)[..., :length].mean(1), seen


def _add_attention(statistics: LayerStatistics, attention: Tensor, seen: Tensor, probes: Tensor) -> None:
    """Mass by position class, and ZipCache's saliency (arXiv 2405.14256): Σ over rows ÷ rows that see a key.

    For the mass, "recent" counts back from the row; for the saliency of a key, from the end of the prompt.
    """
    attention = attention.double()
    length = attention.shape[-1]
    key = torch.arange(length, device=attention.device)
    by_row = _one_hot(_classes(key, probes[:, None] - key))  # [rows, T, C]
    mass = torch.einsum("hrt,rtc->hrc", attention, by_row)
    statistics.rows.add_(len(probes))
    statistics.mass_sum.add_(mass.sum(1))
    statistics.mass_sq_sum.add_(mass.square().sum(1))
    uniform = seen.double() / seen.sum(1, keepdim=True)
    statistics.uniform_sum.add_(torch.einsum("rt,rtc->c", uniform, by_row))

    looks = seen.sum(0)
    by_key = _one_hot(_classes(key, length - 1 - key)) * (looks > 0)[:, None]  # [T, C]
    saliency = attention.sum(1) / looks.clamp(min=1)
    statistics.saliency_keys.add_(by_key.sum(0).long())
    statistics.saliency_sum.add_(saliency @ by_key)
    statistics.saliency_sq_sum.add_(saliency.square() @ by_key)


def _classes(key: Tensor, age: Tensor) -> Tensor:
    """Index into CLASSES of keys at position `key` that lie `age` tokens before the query."""
    recent = torch.where(age < RECENT, 2, 1)
    return torch.where(key < SINKS, 0, recent)


def _one_hot(classes: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(classes, len(CLASSES)).double()


def not_finite(statistics: LayerStatistics) -> Iterable[str]:
    """Of "q", "k", "v", those whose sums hold infinities or NaN: the model overflowed."""
    return (name for name in "qkv" if not bool(getattr(statistics, f"{name}{name}_sum").isfinite().all()))
