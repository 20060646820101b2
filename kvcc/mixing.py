"""Widths for K and V of every layer, by what quantising each of them alone was measured to cost."""

import heapq
from collections.abc import Mapping

WIDTHS = (2, 3, 4, 8)
PROBE = 2  # bits at which a layer's K, or V, is measured; each further bit costs a quarter of the one before


def metadata(group_size: int) -> float:
    """Bits per element of scales and zeros."""
    return 32 / group_size


def least(group_size: int) -> float:
    """Bits per element below which no widths go."""
    return WIDTHS[0] + metadata(group_size)


def single_side(layer: int, side: str, group_size: int) -> str:
    """Passes of a recipe that quantises K, or V, of one layer coarsely and the other with 8 bits."""
    k_bits, v_bits = (PROBE, 8) if side == "k" else (8, PROBE)
    widths = f"k_bits: {k_bits}, v_bits: {v_bits}"
    return f"passes:\n  - kivi: {{{widths}, group_size: {group_size}, layers: [{layer}]}}\n"


def mixed_recipe(costs: Mapping[tuple[int, str], float], bits: float, group_size: int) -> str | None:
    """Passes that give (layer, "k" or "v") the widths that lose least, together at most `bits` per element.

    `costs`: KL of PROBE bits, in nats. Losses are taken to add up and to fall fourfold a bit, as squared steps do;
    what gains most per bit comes first. None where even the least widths are too many bits. All sides count alike.
    """
    chosen = dict.fromkeys(costs, 0)
    left = len(costs) * (bits - least(group_size))
    if left < 0:
        return None
    heap = [(-_gain(cost, 0), place) for place, cost in costs.items()]
    heapq.heapify(heap)
    while heap:
        _, place = heapq.heappop(heap)
        at = chosen[place]
        price = WIDTHS[at + 1] - WIDTHS[at]
        if price > left:
            continue
        left -= price
        chosen[place] = at + 1
        if at + 2 < len(WIDTHS):
            heapq.heappush(heap, (-_gain(costs[place], at + 1), place))
    layers: dict[tuple[int, int], list[int]] = {}
    for layer in sorted({layer for layer, _ in costs}):
        widths = WIDTHS[chosen[layer, "k"]], WIDTHS[chosen[layer, "v"]]
        layers.setdefault(widths, []).append(layer)
    lines = [
        f"  - kivi: {{k_bits: {k}, v_bits: {v}, group_size: {group_size}, layers: {held}}}\n"
        for (k, v), held in sorted(layers.items())
    ]
    return "passes:\n" + "".join(lines)


def _gain(cost: float, at: int) -> float:
    """Nats saved per bit by the next width."""
    low, high = WIDTHS[at], WIDTHS[at + 1]
    return cost * (4.0 ** (PROBE - low) - 4.0 ** (PROBE - high)) / (high - low)
