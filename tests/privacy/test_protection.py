"""Clipped noise: what it does to an activation, its gradient, and what it promises."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from hsplitlora_flwr.config import Config, ConfigError, SplitConfig
from hsplitlora_flwr.privacy.protection import clip_and_blur, epsilon, protection
from hsplitlora_flwr.training.cut import CutTransform, chained
from hsplitlora_flwr.transport.bottleneck import Bottleneck


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_long_tokens_are_scaled_to_the_clip_and_short_ones_stay() -> None:
    cut = torch.tensor([[[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]])
    found = clip_and_blur(cut, draws(), 1.0, 0.0)
    torch.testing.assert_close(found, torch.tensor([[[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_the_norm_that_is_asked_for_and_no_direction(dtype: torch.dtype) -> None:
    noise = clip_and_blur(torch.zeros(40, 50, 64, dtype=dtype), draws(), 5.0, 2.0)
    assert noise.dtype is dtype
    assert float(noise.float().square().sum(-1).mean()) == pytest.approx((2.0 * 5.0) ** 2, rel=0.02)
    assert float(noise.float().mean().abs()) < 0.02
    assert torch.equal(noise, clip_and_blur(torch.zeros(40, 50, 64, dtype=dtype), draws(), 5.0, 2.0))
    assert not torch.equal(noise, clip_and_blur(torch.zeros(40, 50, 64, dtype=dtype), draws(1), 5.0, 2.0))


def test_its_gradient_is_that_of_finite_differences() -> None:
    cut = torch.randn(2, 3, 4, dtype=torch.float64, generator=draws(3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: clip_and_blur(x, draws(), 1.5, 0.5), (cut,))
    zero = torch.zeros(1, 1, 4, requires_grad=True)
    clip_and_blur(zero, draws(), 1.0, 0.0).sum().backward()
    assert zero.grad is not None and torch.isfinite(zero.grad).all()


def test_settings_ask_for_it() -> None:
    assert protection(SplitConfig(), 2) is None
    change = protection(SplitConfig(clip=5.0, noise=0.25), 2)
    assert change is not None and change.name == "clip 5, noise 0.25" and not change.reproducible
    cut = torch.randn(2, 3, 8, generator=draws(5))
    assert torch.equal(change.apply(cut, draws()), clip_and_blur(cut, draws(), 5.0, 0.25))
    with pytest.raises(ConfigError, match=r"split\.noise=0\.5 needs split\.clip"):
        Config.from_run_config({"split.noise": 0.5})


def test_switches_of_a_bottleneck_are_on_or_off_and_have_no_noise(tmp_path: Path) -> None:
    one = torch.eye(4)
    Bottleneck.write(tmp_path / "file", {2: Bottleneck(torch.zeros(4), one, one, switches=1)})
    change = protection(SplitConfig(bottleneck=str(tmp_path / "file"), width=3, clip=1.0, noise=0.5), 2)
    assert change is not None and change.name == "width 3, clip 1, noise 0.5"
    cut = torch.tensor([[[0.9, 0.3, 0.1, 7.0], [0.04, 3.0, 4.0, 7.0]]], dtype=torch.float64, requires_grad=True)
    sent = change.apply(cut, draws())
    assert sent[..., 0].tolist() == [[1, 0]]
    torch.testing.assert_close(sent[..., 1:], clip_and_blur(cut[..., 1:3], draws(), 1.0, 0.5))
    assert torch.autograd.gradcheck(lambda x: change.apply(x, draws())[..., 1:], (cut,))


def test_changes_follow_one_another() -> None:
    twice = CutTransform("twice", lambda cut, _: 2 * cut)
    more = CutTransform("one more", lambda cut, _: cut + 1, reproducible=True)
    assert chained(None, None) is None and chained(None, twice) is twice
    both = chained(twice, more)
    assert both is not None and both.name == "twice, one more" and not both.reproducible
    assert both.apply(torch.ones(1), draws()) == 3


@pytest.mark.parametrize(("noise", "hidden", "releases"), [(1.0, 64, 1), (30.0, 64, 1), (200.0, 576, 20), (5.0, 8, 3)])
def test_epsilon_is_what_the_two_gaussians_say(noise: float, hidden: int, releases: int) -> None:
    """Two tokens at opposite ends of the ball, told apart along the line between them by the densities themselves."""
    delta = 1e-5
    found = epsilon(noise, hidden, releases, delta)
    distance = 2 * math.sqrt(releases)
    deviation = noise / math.sqrt(hidden)
    x = np.linspace(-12 * deviation, distance + 12 * deviation, 400_001)
    here, there = norm.pdf(x, distance, deviation), norm.pdf(x, 0.0, deviation)
    excess = np.trapezoid(np.maximum(here - math.exp(min(found, 700)) * there, 0.0), x)
    assert excess == pytest.approx(delta, rel=1e-3)


def test_much_noise_hides_all_and_more_releases_hide_less() -> None:
    assert epsilon(1e8, 64) == 0.0
    assert epsilon(10.0, 64) < epsilon(10.0, 64, releases=4) < epsilon(5.0, 64, releases=4)
