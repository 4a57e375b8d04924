"""A cut activation in fewer numbers: codes, what is made of them, and files that do not hold what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hsplitlora_flwr.config import ConfigError
from hsplitlora_flwr.transport.bottleneck import Bottleneck, digest, widths

HIDDEN, WIDTH = 6, 4


def bottleneck(seed: int = 0, width: int = WIDTH) -> Bottleneck:
    generator = torch.Generator().manual_seed(seed)
    return Bottleneck(*(torch.randn(*shape, generator=generator) for shape in ((HIDDEN,), *2 * [(width, HIDDEN)])))


@pytest.fixture
def file(tmp_path: Path) -> str:
    Bottleneck.write(tmp_path / "new" / "directions", {split: bottleneck(split) for split in (1, 2, 3, 8)})
    return str(tmp_path / "new" / "directions")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_code_is_what_the_matrices_say(dtype: torch.dtype) -> None:
    made = bottleneck()
    cut = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(9)).to(dtype)
    code = made.narrow(cut)
    near = {"rtol": 2e-2, "atol": 5e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert code.dtype is dtype and code.shape == (2, 3, WIDTH)
    by_hand = torch.stack([((cut.double() - made.mean) * row).sum(-1) for row in made.encoder], dim=-1)
    torch.testing.assert_close(code.double(), by_hand, **near)
    back = made.widen(code)
    assert back.dtype is dtype
    by_hand = made.mean + sum(code.double()[..., place, None] * row for place, row in enumerate(made.decoder))
    torch.testing.assert_close(back.double(), by_hand.double(), **near)


def test_gradients_are_those_of_autograd() -> None:
    made = bottleneck()
    cut = torch.randn(2, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made.narrow, (cut,))
    code = made.narrow(cut).detach().requires_grad_()
    above = torch.randn(2, HIDDEN, dtype=torch.float64)
    made.widen(code).backward(above)
    torch.testing.assert_close(made.narrow_gradient(above), code.grad)


def test_a_narrower_one_is_the_beginning_of_a_wider_one(file: str) -> None:
    whole, part = Bottleneck.read(file, 8, WIDTH), Bottleneck.read(file, 8, 2)
    assert part.width == 2 and torch.equal(part.mean, whole.mean)
    assert torch.equal(part.encoder, whole.encoder[:2]) and torch.equal(part.decoder, bottleneck(8).decoder[:2])
    assert widths(file) == {1: 4, 2: 4, 3: 4, 8: 4}


def test_files_are_told_apart(file: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    Bottleneck.write(other, {1: bottleneck(1)})
    assert digest(file) == digest(file) != digest(str(other))
    before = digest(str(other))
    Bottleneck.write(other, {1: bottleneck(2)})
    assert digest(str(other)) != before


@pytest.mark.parametrize(
    ("split", "width", "told"),
    [
        (5, 2, r"holds directions of the split points 1-3, 8, and not of 5"),
        (8, 5, r"split.width=5 is more than the 4 directions that split.bottleneck=.* holds for split point 8"),
    ],
)
def test_what_a_file_lacks_is_told(split: int, width: int, told: str, file: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Bottleneck.read(file, split, width)


def test_what_is_no_file_of_directions_is_told(tmp_path: Path) -> None:
    text, empty = tmp_path / "text", tmp_path / "empty"
    text.write_text("{}")
    Bottleneck.write(empty, {})
    for wrong in (text, empty, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"split.bottleneck=.*hsplitlora bottleneck --out FILE"):
            widths(str(wrong))
    with pytest.raises(ConfigError, match="cannot be read"):
        digest(str(tmp_path / "missing"))
