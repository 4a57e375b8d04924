"""One learning-rate schedule, one clipping norm, for both sides."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.training.schedule import AdapterOptimizer, farthest, learning_rate


def rates(schedule: str, warmup: int = 0) -> list[float]:
    train = TrainConfig(rounds=2, steps=5, lr=1.0, schedule=schedule, warmup_steps=warmup)
    return [learning_rate(train, step) for step in range(10)]


def test_constant_linear_and_cosine() -> None:
    assert rates("constant") == [1.0] * 10
    assert rates("linear") == pytest.approx([1 - k / 10 for k in range(10)])
    assert rates("cosine") == pytest.approx([(1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)])


def test_warm_up_rises_to_the_peak_and_then_the_schedule_begins() -> None:
    assert rates("constant", 4) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)
    assert rates("linear", 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_both_sides_clip_by_one_norm() -> None:
    """Two optimizers that know each other's norm move like one over all parameters."""
    train = TrainConfig(optimizer="sgd", lr=1.0, clip=0.5)
    gradients = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)
    one = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    one.grad = gradients.clone()
    torch.nn.utils.clip_grad_norm_([one], 0.5)
    expected = one.grad.clone()

    sides = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 1)]
    sides[0].grad, sides[1].grad = gradients[:2].clone(), gradients[2:].clone()
    optimizers = [AdapterOptimizer([side], train) for side in sides]
    norms = [float(optimizer.grad_norm()) for optimizer in optimizers]
    assert norms == [5.0, 12.0]
    for side, optimizer in zip(sides, optimizers, strict=True):
        optimizer.step(0, math.hypot(*norms))
        assert side.grad is None
    torch.testing.assert_close(-torch.cat([side.detach() for side in sides]), expected, rtol=1e-6, atol=0)


def test_sgd_has_momentum_and_weight_decay() -> None:
    train = TrainConfig(optimizer="sgd", momentum=0.5, weight_decay=0.1, lr=0.2, clip=0.0)
    parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = AdapterOptimizer([parameter], train)
    value, velocity = 1.0, 0.0
    for step, gradient in enumerate([1.0, -2.0, 0.5]):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step(step, 0.0)
        decayed = gradient + 0.1 * value
        velocity = decayed if step == 0 else 0.5 * velocity + decayed
        value -= 0.2 * velocity
        assert float(parameter.detach()) == pytest.approx(value, rel=1e-12)


def test_a_side_without_adapters_is_no_special_case() -> None:
    optimizer = AdapterOptimizer([], TrainConfig())
    assert optimizer.grad_norm() == 0.0
    optimizer.step(0, 4.0)


@pytest.mark.parametrize(("values", "largest"), [([1.0, -3.0, 2.0], 3.0), ([1.0, math.nan, 2.0], math.nan)])
def test_the_magnitude_of_adapters(values: list[float], largest: float) -> None:
    parameters = [torch.nn.Parameter(torch.tensor([value])) for value in values]
    assert AdapterOptimizer(parameters, TrainConfig()).magnitude() == pytest.approx(largest, nan_ok=True)
    assert AdapterOptimizer([], TrainConfig()).magnitude() == 0.0


@pytest.mark.parametrize("optimizer", [{"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.7}])
@given(data=st.data())
@hypothesis.settings(max_examples=30, deadline=None)
def test_no_gradients_take_an_adapter_farther_than_farthest(optimizer: dict[str, Any], data: st.DataObject) -> None:
    train = TrainConfig(lr=0.1, steps=8, rounds=2, schedule="cosine", warmup_steps=3, clip=2.0, **optimizer)
    parameter = torch.nn.Parameter(torch.zeros(3))
    moved = AdapterOptimizer([parameter], train)
    for step in range(4, 9):
        powers = data.draw(st.lists(st.floats(-8, 8), min_size=3, max_size=3))
        parameter.grad = torch.tensor([10.0**power for power in powers])
        moved.step(step, moved.grad_norm())
        assert parameter.norm() <= 1.0001 * farthest(train, 4, step - 3, 3)


def test_a_step_of_adam_can_be_nearly_as_far_as_farthest_says() -> None:
    """The bound is reached where gradients grow as its proof has it, so no smaller one holds."""
    train = TrainConfig(lr=0.1, clip=0.0, rounds=1, steps=2000)
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    moved = AdapterOptimizer([parameter], train)
    for step in range(train.steps):
        before = parameter.detach().clone()
        parameter.grad = torch.tensor([(0.9 / 0.999) ** (train.steps - step) * 1e30], dtype=torch.float64)
        moved.step(step, moved.grad_norm())
    last = float((parameter.detach() - before).abs())
    assert 0.9 * farthest(train, train.steps - 1, 1, 1) < last <= farthest(train, train.steps - 1, 1, 1)


def test_where_nothing_bounds_a_step_farthest_is_infinite() -> None:
    for changes in ({"clip": 0.0}, {"momentum": 0.5, "weight_decay": 0.1}, {"lr": 2.0, "weight_decay": 1.0}):
        assert farthest(TrainConfig(optimizer="sgd", **changes), 0, 3, 10) == math.inf
