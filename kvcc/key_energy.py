"""How much of attention's logits the stored K channels carry, by the statistics of a profile.

What page means hold of other channels comes on top: it is not in these figures.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcc.profile import Profile
from kvcc.runtime.calibrated import Calibrated, CalibrationSource, KeyEnergy
from kvcc.runtime.plan import LayerPlan, Plan

BINS = 32  # at most; ranks of energy are put together so that a report stays small


def calibrated(profile: Profile, plan: Plan, tables: Mapping[str, Tensor]) -> Calibrated:
    """What an artifact compiled with `profile` records of it. Raises ProfileError for one without tokens."""
    return Calibrated(
        prompts=len(profile.prompts),
        tokens=profile.tokens,
        gradients=profile.has_gradients,
        sources=tuple(CalibrationSource(**source.model_dump()) for source in profile.sources),
        keys=tuple(_layer(profile, layer, index, tables) for index, layer in enumerate(plan.layers)),
    )


def _layer(profile: Profile, layer: LayerPlan, index: int, tables: Mapping[str, Tensor]) -> KeyEnergy | None:
    """None for a layer without pages, one whose K a fold has narrowed, and one that chooses per request."""
    found = _stored_columns(layer, index, tables)
    if found is None or layer.k_dim != profile.shapes[index].head_dim:
        return None
    q, cov = profile.qq(index), profile.k_cov(index)
    total = _trace(q, cov)
    kept, ranks = [], []
    for head, (keys, queries) in enumerate(found):
        rest = torch.eye(layer.k_dim, dtype=torch.float64) - keys @ queries.mT
        lost = rest.mT @ cov[head] @ rest  # covariance of what pages leave out of k
        share = 1 - float(_trace(q[head], lost) / total[head]) if total[head] > 0 else 1.0
        kept.append(_rounded(min(1.0, max(0.0, share))))
        ranks.append(_ranked(q[head], cov[head], keys, queries, lost))
    return KeyEnergy(kept=tuple(kept), ranks=_binned(torch.stack(ranks)))


def _stored_columns(
    layer: LayerPlan, index: int, tables: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]] | None:
    """For each KV head what turns k and q into a page's coordinates: [D, stored] each; None where that is not fixed.

    Stored are channels of planes. Those of which a page has a mean only do not count.
    """
    counts = [sum(plane.channels for plane in head.k.planes) for head in layer.heads]
    if not layer.page or layer.select not in ("all", "static", "basis"):
        return None
    if layer.select == "basis":
        pair = [tables[f"layers.{index}.{name}"].double().cpu() for name in ("k_basis", "q_basis")]
        return [(k[:, :n], q[:, :n]) for k, q, n in zip(*pair, counts)]
    one = torch.eye(layer.k_dim, dtype=torch.float64)
    if layer.select == "all":
        return [(one[:, :n], one[:, :n]) for n in counts]
    orders = tables[f"layers.{index}.k_channels"].cpu()
    return [(one[:, order[:n]], one[:, order[:n]]) for order, n in zip(orders, counts)]


def _ranked(q: Tensor, cov: Tensor, keys: Tensor, queries: Tensor, lost: Tensor) -> Tensor:
    """Channels of one head by falling energy, [D, 2]: energy, and 1 where it is stored.

    What is not stored counts by its principal directions, which for pruned channels of the model's own basis,
    uncorrelated, are those channels.
    """
    stored = (queries.mT @ q @ queries).diagonal() * (keys.mT @ cov @ keys).diagonal()
    values, vectors = torch.linalg.eigh(q)
    root = vectors * values.clamp_min(0).sqrt()
    dropped = torch.linalg.eigvalsh(root.mT @ lost @ root).clamp_min(0).flip(0)[: len(q) - len(stored)]
    energy = torch.cat([stored, dropped])
    flags = torch.cat([torch.ones_like(stored), torch.zeros_like(dropped)])
    order = energy.argsort(descending=True, stable=True)
    return torch.stack([energy[order], flags[order]], dim=1)


def _binned(ranks: Tensor) -> tuple[tuple[float, float], ...]:
    """[H, D, 2] over heads and neighbouring ranks: mean energy of a channel, and the share of it that is stored."""
    parts = ranks.tensor_split(min(BINS, ranks.shape[1]), dim=1)
    energy = [float(part[..., 0].mean()) for part in parts]
    stored = [float((part[..., 0] * part[..., 1]).mean()) for part in parts]
    return tuple((_rounded(e), _rounded(min(1.0, s / e)) if e > 0 else 1.0) for e, s in zip(energy, stored))


def _trace(q: Tensor, cov: Tensor) -> Tensor:
    """E[(qᵀ k)²] of centred keys that queries do not depend on."""
    return (q * cov).sum((-2, -1))


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
