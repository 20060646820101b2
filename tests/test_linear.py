"""Linear layers over stored weights, against float64."""

import itertools

import pytest
import torch
from torch import Tensor

from kvcc.kernels import linear as module
from kvcc.kernels.linear import Packed, WeightType, concat, linear, pack, scratch_bytes

KINDS: tuple[WeightType, ...] = ("float32", "bfloat16", "int8")
SHAPES = [(1, 1), (7, 33), (33, 7), (5, 1537), (576, 576), (1537, 33), (50, 64), (12, 31)]
COUNTS = [0, 1, 2, 3, 4, 5, 6, 7, 9, 13, 16, 33, 100]


@pytest.fixture(params=["compiled", "torch"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through `linear`: the C kernels, and torch."""
    few = 10**9 if request.param == "compiled" else -1
    monkeypatch.setattr(module, "FEW", dict.fromkeys(KINDS, few))
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: False)
    return str(request.param)


def made(rows: int, cols: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 10_007 + cols * 101 + n)
    weight = torch.randn(rows, cols, generator=generator) * torch.rand(rows, 1, generator=generator)
    x = torch.randn(n, cols, generator=generator) * 10 ** torch.randn(n, 1, generator=generator)
    return weight, x, torch.randn(rows, generator=generator)


def bound(x: Tensor, weight: Tensor, kind: WeightType) -> Tensor:
    """Rounding of sums in float32; of x to 16 bits, half a unit an element, where weights are int8."""
    sums = x.double().abs() @ weight.abs().T * 2e-6
    if kind == "int8":
        sums = sums + x.double().abs().amax(1, keepdim=True) / 32767 / 2 * weight.abs().sum(1) * 1.01
    return sums + 1e-30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_agrees_with_float64(shape: tuple[int, int], kind: WeightType, road: str) -> None:
    for n, with_bias in itertools.product(COUNTS, (False, True)):
        weight, x, bias = made(*shape, n)
        packed = pack(weight, kind)
        y = linear(x, packed, bias if with_bias else None)
        exact = packed.dequantised().double()
        expected = x.double() @ exact.T + (bias.double() if with_bias else 0)
        assert y.shape == expected.shape
        assert y.dtype == torch.float32
        assert ((y - expected).abs() <= bound(x, exact, kind) + 1e-6 * expected.abs()).all(), n


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_strides_and_types(kind: WeightType, road: str) -> None:
    weight, x, bias = made(40, 96, 24)
    packed, plain = pack(weight, kind), linear(x, pack(weight, kind), bias)
    assert torch.equal(linear(x.view(2, 3, 4, 96), packed, bias), plain.view(2, 3, 4, 40))
    apart = torch.full((24, 200), torch.nan)
    apart[:, 50:146] = x
    assert torch.equal(linear(apart[:, 50:146], packed, bias), plain)
    assert torch.equal(linear(x.T.contiguous().T, packed, bias), plain)
    half = linear(x.bfloat16(), packed, bias.bfloat16())
    assert half.dtype == torch.bfloat16
    wide = linear(x.bfloat16().float(), packed, bias.bfloat16().float())
    torch.testing.assert_close(half.float(), wide, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_neighbours(kind: WeightType) -> None:
    """Sums of a row are the same however many rows come with it: where a batch is cut changes nothing."""
    weight, x, _ = made(64, 608, 16)
    packed = pack(weight, kind)
    alone = torch.cat([linear(row, packed) for row in x.split(1)])
    for n in (2, 3, 4, 5, 16):
        torch.testing.assert_close(
            linear(x[:n], packed), alone[:n], rtol=1e-5, atol=1e-5 * float(x.abs().max())
        )


def test_the_call_adds_and_leaves_alone_what_lies_between_rows() -> None:
    weight, x, bias = made(31, 70, 5)
    for kind in KINDS:
        packed = pack(weight, kind)
        out = torch.arange(5 * 40.0).view(5, 40)
        before = out.clone()
        scratch = torch.empty(scratch_bytes(packed, 5, 2), dtype=torch.uint8)
        failed = module._library().kvcc_linear(
            *(module.ctypes.byref(packed.struct), x.data_ptr(), 70, 5, out.data_ptr(), 40),
            *(bias.data_ptr(), 1, 2, scratch.data_ptr()),
        )
        assert failed == 0
        assert torch.equal(out[:, 31:], before[:, 31:])
        torch.testing.assert_close(
            out[:, :31], before[:, :31] + linear(x, packed, bias), rtol=1e-5, atol=1e-4
        )


def test_int8_is_half_a_scale_off_at_most() -> None:
    weight, x, _ = made(64, 300, 4)
    packed = pack(weight, "int8")
    assert packed.scales is not None
    columns = torch.arange(300)
    group = columns // 160 * 8 + columns % 16 // 2  # two blocks of 160 columns, of 8 groups each
    most = torch.stack([weight[:, group == g].abs().amax(1) for g in range(16)], 1)
    assert torch.equal(packed.scales.flatten(1), (most / 127).bfloat16())
    scale = packed.scales.float().flatten(1)[:, group]
    assert ((packed.dequantised() - weight).abs() <= scale * 0.5001).all()
    error = (linear(x, packed) - x.double() @ weight.double().T).abs()
    unit = x.abs().amax(1, keepdim=True) / 32767
    assert (error <= x.double().abs() @ (scale.double() / 2).T + unit * weight.abs().sum(1) + 1e-5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values(kind: WeightType) -> None:
    """Weights and activations of one sign at full scale, of zeros, and very small: no sum overflows."""
    for scale in (1.0, 1e-12, 1e12):
        x, weight = torch.full((3, 4096), scale), torch.full((4, 4096), 127.0)
        weight[1] *= -1
        weight[2] = 0
        x[1] = 0
        y = linear(x, pack(weight, kind))
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_is_looked_up_in_the_same_weight(kind: WeightType) -> None:
    weight, _, _ = made(50, 70, 1)
    packed = pack(weight, kind)
    tokens = torch.tensor([[3, 49], [0, 3]])
    whole = packed.dequantised()
    assert whole.shape == (50, 70)
    assert whole.dtype == torch.float32
    if kind != "int8":
        assert torch.equal(whole, weight.to(getattr(torch, kind)).float())
    assert torch.equal(packed.dequantised(tokens), whole[tokens])
    assert torch.equal(packed.dequantised(slice(7, 9)), whole[7:9])


@pytest.mark.parametrize("kind", KINDS)
def test_concat_stacks_rows(kind: WeightType) -> None:
    (a, x, _), (b, _, _) = made(20, 70, 3), made(33, 70, 3)
    both = concat([pack(a, kind), pack(b, kind)])
    whole = pack(torch.cat([a, b]), kind)
    assert (both.rows, both.cols, both.nbytes) == (53, 70, whole.nbytes)
    assert torch.equal(linear(x, both), linear(x, whole))
    with pytest.raises(ValueError, match="kinds or widths"):
        concat([pack(a, kind), pack(b[:, :5], kind)])


def test_bytes_and_where_they_lie() -> None:
    weight = torch.randn(64, 128)
    assert [pack(weight, kind).nbytes for kind in KINDS] == [32768, 16384, 8192 + 64 * 8 * 2]
    assert pack(weight, "float32").data.data_ptr() == weight.data_ptr()
    assert torch.equal(pack(weight, "float32", move=True).dequantised(), weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_large_pages", lambda: False)
        assert torch.equal(pack(weight, "float32", move=True).dequantised(), weight)
    packs: list[Packed] = [pack(torch.randn(300, 70), "int8") for _ in range(4)]
    copies = [p.dequantised() for p in packs]
    if module._large_pages():
        assert all(p.data.data_ptr() % module.LINE == 0 for p in packs)
    assert all(
        torch.equal(p.dequantised(), c) for p, c in zip(packs, copies, strict=True)
    )  # none over another


def test_without_a_compiler_torch_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: False)  # torch would round x for such units
    weight, x, bias = made(40, 96, 3)
    with_kernels = [linear(x, pack(weight, kind), bias) for kind in KINDS]
    monkeypatch.setattr(module.cpu, "available", lambda: "no C compiler found")
    module._usable.cache_clear()
    try:
        without = [linear(x, pack(weight, kind), bias) for kind in KINDS for _ in range(2)][::2]
    finally:
        module._usable.cache_clear()
    torch.testing.assert_close(without, with_kernels, rtol=1e-3, atol=1e-3 * float(x.abs().max()))
    assert caplog.text.count("no C compiler found") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_where_the_processormultiplies_bfloat16(
    kind: WeightType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEW_BESIDE_UNITS", dict.fromkeys(KINDS, -1))
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)
    weight, x, bias = made(40, 300, 20)
    packed = pack(weight, kind)
    y = linear(x, packed, bias)
    exact = x.double() @ packed.dequantised().double().T + bias
    size = x.double().abs() @ weight.double().abs().T + bias.abs()
    assert y.dtype == torch.float32
    assert ((y - exact).abs() <= size * 2**-7).all()
