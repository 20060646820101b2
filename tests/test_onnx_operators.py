"""Pages in ONNX operators, run one by one by ONNX Runtime, against the reference on the kernels' cases."""

from typing import Any

import numpy as np
import pytest
import torch

from kvcc.exchange.onnx_pages import ITEM_BYTES, onnx_pages
from kvcc.kernels import reference
from tests.kernel_cases import SPECS, Spec, build

pytest.importorskip("onnxruntime", reason="the onnx extra")
ops = pytest.importorskip("kvcc.exchange.onnx_operators", reason="the onnx extra")

TYPES = {"bytes": np.uint8, "halves": np.float16, "floats": np.float32}
CASES = [
    spec
    for spec in SPECS
    if spec.paged
    and not spec.salient
    and spec.dtype == torch.float32
    and spec.sealed(max(spec.lengths))
    and all(any(side.channels for side in sides) for sides in (spec.k, spec.v))
]
NAMES = (
    "unit-mixed",
    "unit-per-head",
    "unit-page24",
    "unit-by-token",
    "per-head",
    "mixed-planes",
    "odd-mixed",
)
MEANS = tuple(spec.name for spec in CASES if spec.name.startswith("means"))
LEVELS = ("fp8", "nvfp4", "nvfp4-by-channel", "normal3", "normal-unit", "clipped")
SHAPES = (
    "k2v2-group32",
    "k3v3-group64",
    "k16v16-group8",
    "k32v32-group8",
    "narrow-k39",
    "v-by-channel",
    "page-8",
)
FEW = [spec for spec in CASES if spec.name in (*NAMES, *MEANS, *LEVELS, *SHAPES)]


def array(value: Any) -> np.ndarray:
    return np.asarray(value.value if hasattr(value, "value") else value)


def compare(spec: Spec, louder: float = 1.0) -> None:
    """What ONNX seals is what the reference seals, and its products are those with what pages stand for."""
    case = build(spec)
    assert case.layout is not None
    assert case.cached.pool is not None
    case.k_pages.mul_(louder)
    reference.seal(case.layout, case.k_pages, case.v_pages, case.cached.pool, case.ids)
    pages = onnx_pages(case.layout)
    assert 0 <= case.layout.nbytes - pages.nbytes < 16 * 3 * 2 * sum(map(len, case.layout.k + case.layout.v))
    k, v = (x.float().transpose(2, 3)[:, None].contiguous().numpy() for x in (case.k_pages, case.v_pages))
    records = {name: array(x) for name, x in ops.seal(pages, k, v).items()}
    shapes = {name: (x.dtype, x.shape) for name, x in records.items()}
    assert shapes == {name: (TYPES[name], (len(k), 1, n)) for name, n in pages.sizes.items()}
    assert sum(x.nbytes for x in records.values()) == len(k) * pages.nbytes
    assert pages.nbytes == sum(n * ITEM_BYTES[name] for name, n in pages.sizes.items())

    held_k, held_v = reference.unseal(case.layout, case.cached.pool.read(case.ids))
    rng = np.random.default_rng(0)
    q = rng.standard_normal((len(k), len(spec.k), spec.group, pages.k.width)).astype(np.float32)
    weights = rng.random((len(k), 1, len(spec.k), spec.group, spec.page)).astype(np.float32) / spec.page
    logits = array(ops.logits(pages, records, q))[:, 0]
    summed = array(ops.weighted(pages, records, weights))
    assert np.abs(logits - np.einsum("nhgc,nhtc->nhgt", q, held_k.numpy())).max() < 1e-3
    assert np.abs(summed - np.einsum("nhgt,nhtc->nhgc", weights[:, 0], held_v.numpy())).max() < 1e-4


@pytest.mark.parametrize("spec", FEW, ids=str)
def test_pages_are_those_of_the_reference(spec: Spec) -> None:
    compare(spec)


@pytest.mark.parametrize("name", ["means", "means-only"])
def test_means_end_at_the_largest_code(name: str) -> None:
    spec = next(spec for spec in CASES if spec.name == name)
    compare(spec, louder=100.0)
    layout = build(spec).layout
    assert layout is not None
    pages = onnx_pages(layout)
    k, v = (np.full((1, 1, len(spec.k), side.width, 64), -1e6, np.float32) for side in (pages.k, pages.v))
    held = array(ops.seal(pages, k, v)["bytes"])[0, 0, pages.k.means :][: len(pages.k.mean_channels)]
    assert set(held.tolist()) == {128 - 127}


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in CASES if spec not in FEW], ids=str)
def test_all_other_pages(spec: Spec) -> None:
    compare(spec)
