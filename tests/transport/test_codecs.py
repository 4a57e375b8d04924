"""Numbers on the wire: the error that is stated is kept, and what does not fit is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from hsplitlora_flwr.config.names import WIRES
from hsplitlora_flwr.transport.codecs import WireError, check_codec, pack, unpack

# wire: (largest relative error, smallest and largest normal number)
CASTS = {
    "float64": (0.0, 2.0**-1022, 1e308),
    "float32": (2.0**-24, 2.0**-126, 3.4e38),
    "bfloat16": (2.0**-8, 2.0**-126, 3.38e38),
    "float16": (2.0**-11, 2.0**-14, 65504.0),
}


def there_and_back(tensor: torch.Tensor, wire: str) -> torch.Tensor:
    return unpack(*pack(tensor, wire), tensor.dtype, "cpu")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(CASTS)), st.data())
def test_a_cast_keeps_its_relative_error(wire: str, data: st.DataObject) -> None:
    error, smallest, largest = CASTS[wire]
    magnitude = st.floats(smallest, largest) | st.just(0.0)
    numbers = data.draw(st.lists(st.tuples(st.sampled_from([-1.0, 1.0]), magnitude), min_size=1, max_size=20))
    exact = np.array([sign * number for sign, number in numbers])
    back = there_and_back(torch.tensor(exact), wire).numpy()
    assert (np.abs(back - exact) <= error * np.abs(exact)).all()


def rotated(token: np.ndarray, rows: int) -> np.ndarray:
    return np.asarray(dctn(token.reshape(rows, -1), norm="ortho")).reshape(token.shape)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-30, 30), st.lists(st.floats(-1, 1), min_size=6, max_size=6)), min_size=1, max_size=6),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_the_stated_error_of_int8(tokens: list[tuple[float, list[float]]], dtype: torch.dtype) -> None:
    tensor = torch.tensor([[10**power * value for value in values] for power, values in tokens], dtype=dtype)
    back = there_and_back(tensor, "int8").double().numpy()
    for exact, got in zip(tensor.double().numpy(), back, strict=True):
        bound = math.sqrt(6) * np.abs(rotated(exact, 2)).max() / 254
        assert np.linalg.norm(got - exact) <= max(bound * (1 + 1e-4), 1.5e-36 * math.sqrt(6))


@pytest.mark.parametrize(("hidden", "rows"), [(576, 24), (128, 8), (30, 5), (7, 1), (1, 1)])
def test_what_int8_sends(hidden: int, rows: int) -> None:
    tensor = torch.randn(2, 3, hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tensor[0, 0] = 0
    values, scale = pack(tensor, "int8")
    assert values.dtype == torch.int8 and scale.dtype == torch.float32
    for index in np.ndindex(2, 3):
        expected = rotated(tensor[index].numpy(), rows)
        assert scale[index].item() == pytest.approx(np.abs(expected).max() / 127, rel=1e-6)
        if scale[index]:
            assert values[index].tolist() == (expected / scale[index].item()).round().tolist()
        else:
            assert not values[index].any()


def test_a_channel_that_is_large_in_every_token_does_not_coarsen_the_others() -> None:
    tensor = torch.randn(50, 576, generator=torch.Generator().manual_seed(0))
    tensor[:, 17] *= 1000
    back = there_and_back(tensor, "int8")
    others = torch.arange(576) != 17
    plain = tensor.abs().amax(-1, keepdim=True) / 254  # the step of a quantisation without rotation, halved
    error = (back - tensor)[:, others].abs().mean()
    assert error < 0.1 * plain.mean()
    assert error < 0.3 * tensor[:, others].abs().mean()


def test_a_token_too_small_for_an_fp32_scale_becomes_zero() -> None:
    tokens = torch.tensor([[1e-37, -1e-40], [1e-35, 0.0]])
    back = there_and_back(tokens, "int8")
    assert back[0].tolist() == [0.0, 0.0]
    assert back[1, 0].item() == pytest.approx(1e-35, rel=1 / 254)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(wire: str, dtype: torch.dtype) -> None:
    for shape in ((2, 3, 4), (2, 0, 4), (5,)):
        values, scale = pack(torch.full(shape, 127.0, dtype=dtype, requires_grad=True), wire)
        assert values.dtype == getattr(torch, wire) and values.shape == shape and not values.requires_grad
        assert scale.shape == (shape[:-1] if wire == "int8" else (0,))
        back = unpack(values, scale, dtype, "cpu")
        tolerance = 1e-5 if wire == "int8" else 0.0
        assert back.dtype == dtype
        torch.testing.assert_close(back, torch.full(shape, 127.0, dtype=dtype), rtol=tolerance, atol=0.0)


def test_float16_ends_where_rounding_would_give_infinity() -> None:
    assert there_and_back(torch.tensor([65519.0]), "float16").item() == 65504.0
    with pytest.raises(WireError, match=r"6\.552e\+04 does not fit the codec float16, .* to bfloat16 or int8"):
        pack(torch.tensor([1.0, -65520.0]), "float16")


@pytest.mark.parametrize(("wire", "fits", "not_"), [("float32", 3e38, 1e39), ("int8", 1e40, 1e41)])
def test_float64_may_be_too_large(wire: str, fits: float, not_: float) -> None:
    back = there_and_back(torch.tensor([fits], dtype=torch.float64), wire)
    assert back.item() == pytest.approx(fits, rel=1e-6)
    with pytest.raises(
        WireError, match=f"{not_:.0e}".replace("+", r"\+") + f" does not fit the codec {wire}.* float64"
    ):
        pack(torch.tensor([not_], dtype=torch.float64), wire)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(wire: str, number: float) -> None:
    with pytest.raises(WireError, match=r"not finite .* lower train\.lr"):
        pack(torch.tensor([[1.0, 2.0], [number, 0.0]]), wire)


def test_an_unknown_wire() -> None:
    with pytest.raises(WireError, match="'int4' is unknown; choose one of float32"):
        pack(torch.ones(2), "int4")


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (torch.ones(2, 3, dtype=torch.int8), torch.ones(3)),
        (torch.ones(2, 3, dtype=torch.int8), torch.ones(1)),  # would be broadcast
        (torch.ones(2, 3, dtype=torch.int8), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2, 3, dtype=torch.int8), torch.empty(0)),
        (torch.ones(2, 3), torch.ones(2)),
        (torch.ones(2, 3, dtype=torch.int64), torch.empty(0)),
    ],
)
def test_values_and_scale_that_do_not_belong_together(values: torch.Tensor, scale: torch.Tensor) -> None:
    with pytest.raises(WireError, match="are no tensor of a codec"):
        unpack(values, scale, torch.float32, "cpu")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wire", WIRES)
def test_what_arrives_is_finite(wire: str, number: float) -> None:
    values, scale = pack(torch.ones(2, 3, 4), wire)
    (scale if wire == "int8" else values).view(-1)[1] = number
    with pytest.raises(WireError, match=r"what arrived has a magnitude of .* not finite"):
        unpack(values, scale, torch.float64, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_arrives_is_finite_in_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    values, scale = pack(torch.full((1, 4), torch.finfo(dtype).max, dtype=torch.float64), "float64")
    assert unpack(values, scale, dtype, "cpu").isfinite().all()
    with pytest.raises(WireError, match=f"not finite in {dtype}"):
        unpack(values * 1.01, scale, dtype, "cpu")


def test_the_rotation_back_may_make_a_value_twice_as_large_as_all_four() -> None:
    values, scale = torch.full((1, 4), 127, dtype=torch.int8), torch.tensor([3e38 / 127])
    assert float(unpack(values, scale, torch.float64, "cpu").max()) == pytest.approx(6e38)
    with pytest.raises(WireError, match=r"not finite in torch\.float32"):
        unpack(values, scale, torch.float32, "cpu")


@pytest.mark.parametrize("wire", WIRES)
def test_numbers_come_as_agreed(wire: str) -> None:
    for other in WIRES:
        values, _ = pack(torch.ones(2, 3), other)
        if other == wire:
            check_codec(values, wire)
        else:
            with pytest.raises(WireError, match=f"where the codec {wire} was agreed on"):
                check_codec(values, wire)
