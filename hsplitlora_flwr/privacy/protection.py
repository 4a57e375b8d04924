"""What a client may do to its cut activations, out of the box: send fewer numbers, bound every token's, add noise.

With ``split.width`` a token is sent in so many directions of ``split.bottleneck``, and what follows is done to these
numbers, ``hidden`` of which there are fewer then.

With ``split.clip`` a token's activation is scaled down to a norm ``C`` where it is longer. With ``split.noise`` a
Gaussian vector of the expected norm ``split.noise * C`` is added: at 1 there is as much noise as signal.

Each token that crosses the cut is then one release of the Gaussian mechanism. Replacing it by any other moves its own
vector by at most ``2 C``, and noise of standard deviation ``split.noise * C / sqrt(hidden)`` a number stands against
that. Nothing is said of what the tokens after it tell, whose activations hold it too, nor of labels and adapters.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr
from torch import Tensor

from hsplitlora_flwr.config import SplitConfig
from hsplitlora_flwr.training.cut import CutTransform, chained
from hsplitlora_flwr.transport.bottleneck import Bottleneck


def protection(split: SplitConfig, blocks: int) -> CutTransform | None:
    """The change that the settings ask for, at a split point; None where they ask for none.

    Raises
    ------
    ConfigError
        If ``split.bottleneck`` holds no such directions.
    """
    narrowed = _narrowed(split, blocks)
    return chained(narrowed, _blurred(split, narrowed.bottleneck.switches if narrowed and narrowed.bottleneck else 0))


def protection_name(split: SplitConfig) -> str:
    """What a client does to protect what it sends, in words, wherever the model is cut; "" for nothing."""
    learnt = f"decorrelate {split.decorrelate:g}" if split.decorrelate else ""
    narrowed = f"width {split.width}" if split.width else ""
    blurred = change.name if (change := _blurred(split)) else ""
    return ", ".join(filter(None, (learnt, narrowed, blurred)))


def _narrowed(split: SplitConfig, blocks: int) -> CutTransform | None:
    if not split.width:
        return None
    bottleneck = Bottleneck.read(split.bottleneck, blocks, split.width)
    return CutTransform(f"width {split.width}", lambda cut, _: bottleneck.narrow(cut), True, bottleneck)


def _blurred(split: SplitConfig, switches: int = 0) -> CutTransform | None:
    """Clipping and noise. The switches of a bottleneck are sent as they are, on or off: what is behind one is a hundred
    times as long as all else, and a little noise there would be the end of the rest."""
    if not split.clip:
        return None

    def apply(cut: Tensor, generator: torch.Generator) -> Tensor:
        kept, rest = cut[..., :switches].round(), cut[..., switches:]
        return torch.cat([kept, clip_and_blur(rest, generator, split.clip, split.noise)], dim=-1)

    name = f"clip {split.clip:g}" + (f", noise {split.noise:g}" if split.noise else "")
    return CutTransform(name, apply)


def clip_and_blur(cut: Tensor, generator: torch.Generator, clip: float, noise: float) -> Tensor:
    """Bound the norm of every token, then add noise to it.

    Parameters
    ----------
    cut : Tensor
        ``(..., hidden)``.
    generator : torch.Generator
        Draws the noise.
    clip : float
        Longest norm of a token.
    noise : float
        Expected norm of its noise, in units of ``clip``.
    """
    norm = torch.linalg.vector_norm(cut, dim=-1, keepdim=True)
    clipped: Tensor = cut * (clip / norm.clamp_min(torch.finfo(cut.dtype).tiny)).clamp(max=1.0)
    if not noise:
        return clipped
    scale = noise * clip / math.sqrt(cut.shape[-1])
    drawn = torch.randn(cut.shape, generator=generator, device=cut.device, dtype=torch.float32)
    return clipped.add((scale * drawn).to(cut.dtype))


def epsilon(noise: float, hidden: int, releases: int = 1, delta: float = 1e-5) -> float:
    """How well a token's own vector is hidden: its differential privacy, exactly.

    Any number of Gaussian releases is as one with a smaller deviation, of which ``delta`` follows from ``epsilon`` in
    closed form.

    Parameters
    ----------
    noise : float
        ``split.noise``, above 0.
    hidden : int
        Numbers in an activation.
    releases : int
        How often the token crosses the cut.
    delta : float
        Between 0 and 1.

    Returns
    -------
    float
        0 or more: the odds of any token against any other change by a factor of ``exp(epsilon)`` at most, but for a
        probability of ``delta``.

    References
    ----------
    Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018, theorem 8.
    """
    ratio = 2 * math.sqrt(hidden * releases) / noise  # sensitivity over deviation

    def excess(value: float) -> float:
        above, below = log_ndtr(ratio / 2 - value / ratio), value + log_ndtr(-ratio / 2 - value / ratio)
        return float(math.exp(above) - math.exp(below)) - delta

    if excess(0.0) <= 0:
        return 0.0
    most = ratio * ratio / 2 + ratio * math.sqrt(2 * math.log(1 / delta)) + 1
    return float(brentq(excess, 0.0, most))
