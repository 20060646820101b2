"""Graphs that look like those that are fused, and are not: they compute what they say."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kvcc.kernels import cpu
from kvcc.runtime.fuse import fuse
from tests.compiled import recipe, runnable

aten = torch.ops.aten


def rotated_by_a_size(x: Tensor) -> Tensor:
    turned = aten.cat.default(
        [aten.neg.default(aten.slice.Tensor(x, 3, 4, 2**63 - 1)), aten.slice.Tensor(x, 3, 0, 4)], -1
    )
    size = aten.sym_size.int(x, 2)
    return aten.add.Tensor(aten.mul.Tensor(x, size), aten.mul.Tensor(turned, size))


def gated_by_a_size(x: Tensor) -> Tensor:
    return aten.mul.Tensor(aten.silu.default(x), aten.sym_size.int(x, 2))


def test_a_size_that_is_cast_is_captured() -> None:
    """The same, where a decode step is captured: torch takes a number for a tensor of no dimension."""
    model = runnable("llama", recipe(), cpu)
    nodes = model.graph.graph
    first = next(n for n in nodes.nodes if n.target is aten.embedding.default)
    with nodes.inserting_after(first):
        size = nodes.call_function(aten.sym_size.int, (first, 0))
    with nodes.inserting_after(size):
        times = nodes.call_function(aten.to.other, (size, first))
    with nodes.inserting_after(times):
        product = nodes.call_function(aten.mul.Tensor, (first, times))
    first.replace_all_uses_with(product, delete_user_cb=lambda user: user not in (size, times, product))
    model.graph.recompile()
    plain = runnable("llama", recipe(), cpu)
    found = []
    for each in (model, plain):
        cache = each.new_cache(1)
        each.forward([[3, 4, 5]], cache)
        found.append(each.forward([[6]], cache))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("computed", [rotated_by_a_size, gated_by_a_size])
def test_a_size_in_place_of_a_tensor(computed: Callable[[Tensor], Tensor]) -> None:
    """Found by the fuzzer, in artifacts that kvcc did not write."""
    x = torch.randn(1, 2, 3, 8)
    module = fx.symbolic_trace(computed)
    assert "fused" in fuse(module).code
    torch.testing.assert_close(module(x), computed(x))


def test_what_the_gate_computes() -> None:
    x = torch.randn(1, 2, 3, 8)
    torch.testing.assert_close(gated_by_a_size(x), F.silu(x) * 3)
