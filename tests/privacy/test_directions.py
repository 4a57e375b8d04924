"""The directions that a bottleneck keeps, against what they are to be and against other directions."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsplitlora_flwr.data.collate import Tokens, collate
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.privacy import directions
from hsplitlora_flwr.transport.bottleneck import Bottleneck


def rows_of(count: int, seed: int) -> list[Tokens]:
    generator = random.Random(seed)
    return [Tokens(array("i", [generator.randrange(1, 90) for _ in range(12)]), 3) for _ in range(count)]


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> SharedBase:
    return SharedBase(str(tiny_folder))


def test_all_directions_lose_nothing(base: SharedBase) -> None:
    hidden = int(base.model.config.hidden_size)
    learnt = directions.learn(base, rows_of(60, 1), [1, 3], hidden)
    batch = collate(rows_of(4, 2), 0)
    for split, bottleneck in learnt.items():
        cut = base.client_part(split).eval()(batch.input_ids, batch.attention_mask).detach()
        torch.testing.assert_close(bottleneck.widen(bottleneck.narrow(cut)), cut, rtol=1e-3, atol=1e-3)


def test_moments_are_those_of_the_pass(base: SharedBase) -> None:
    """Activations and gradients of every split point, against a pass from each alone."""
    batch = collate(rows_of(3, 4), 0)
    for split, (cut, gradient) in zip((1, 2), directions._passed(base, batch, [1, 2]), strict=True):
        alone = base.client_part(split).eval()(batch.input_ids, batch.attention_mask).detach().requires_grad_()
        base.server_part(split).eval()(alone, batch.attention_mask, batch.labels, 1).loss.backward()
        torch.testing.assert_close(cut, alone.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, alone.grad, rtol=1e-3, atol=1e-5)


def learnt_from(cut: Tensor, gradient: Tensor, width: int) -> Bottleneck:
    moments = directions._Moments()
    for at in range(0, len(cut), 100):
        moments.add(cut[at : at + 100], gradient[at : at + 100])
    return moments.bottleneck(width)


def test_what_is_lost_matters_least() -> None:
    """No other bottleneck of that width costs less loss, to second order: not the principal ones either."""
    torch.manual_seed(0)
    mix, slopes = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    cut, gradient = (
        torch.randn(4000, 8, dtype=torch.float64) @ mix + 1,
        torch.randn(4000, 8, dtype=torch.float64) @ slopes,
    )

    def cost(change: Tensor) -> float:
        return float((change @ gradient.T).square().mean())

    found = learnt_from(cut, gradient, 3)
    ours = cost(found.widen(found.narrow(cut)) - cut)
    middle = cut - cut.mean(0)
    _, _, principal = torch.linalg.svd(middle, full_matrices=False)
    for kept in (principal[:3], *torch.randn(30, 3, 8, dtype=torch.float64)):
        fitted = torch.linalg.lstsq(middle @ kept.T, middle).solution
        assert ours < cost(middle @ kept.T @ fitted - middle) * 1.001
    code = found.narrow(cut)
    assert float(
        torch.linalg.vector_norm(learnt_from(cut, gradient, 8).narrow(cut), dim=1).square().mean()
    ) == pytest.approx(1, rel=0.1)
    uncorrelated = code.T @ code / len(code)
    assert float((uncorrelated - uncorrelated.diagonal().diag()).abs().max()) < 0.01 * float(uncorrelated.max())


def test_massive_tokens_have_a_direction_of_their_own() -> None:
    torch.manual_seed(1)
    cut, gradient = torch.randn(2000, 6, dtype=torch.float64), torch.randn(2000, 6, dtype=torch.float64)
    cut[::20] = 300 * torch.tensor([0.0, 0, 0, 0, 1, 0]) + torch.randn(100, 6)
    found = learnt_from(cut, gradient, 2)
    assert found.switches == 1 and learnt_from(cut[1::20], gradient[1::20], 2).switches == 0
    code = found.narrow(cut)
    torch.testing.assert_close(found.widen(code)[::20, 4], cut[::20, 4], rtol=0.02, atol=0)
    norms = torch.linalg.vector_norm(code, dim=1)
    assert 0.5 < float(norms[::20].mean()) < 2, "no longer than others, so that clipping leaves it"
    usual = torch.ones(2000, dtype=torch.bool)
    usual[::20] = False
    assert float(code[usual, 0].abs().max()) < 0.1
