"""Ways back from cut activations to tokens, each learnt from public text by somebody who has the base model.

==============  ====================================================================================================
``nearest``     the token whose embedding is nearest to the activation; learns nothing
``regression``  a ridge regression from activations to embeddings, then the nearest one; in closed form
``inverter``    a small transformer over the sequence of activations, trained to name the tokens
==============  ====================================================================================================

What each attacker may tune, it tunes on a part of its public text, as an adversary would.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

Text = tuple[Tensor, Tensor]
"""What is seen of one row, ``(tokens, seen)`` in fp32, and the token ids ``(tokens,)`` that it comes from. The first
numbers of a token are its activation; gradients, or activations of other rounds, may stand beside it."""
Recover = Callable[[Tensor], Tensor]
"""Token ids ``(tokens,)`` from what is seen of one row, ``(tokens, seen)``."""
Attack = Callable[[Sequence[Text], Tensor, int], Recover]
"""Learns from public text, the embeddings ``(vocabulary, hidden)`` of the base and a seed."""

RIDGES = tuple(10.0**power for power in range(-6, 3))
"""What the regression tries, as shares of the mean variance of the activations."""
HELD_BACK = 5
"""One row in so many of the public text is for tuning."""
CHOSEN_BY = 1000
"""Tokens of it that are named in order to choose: each is compared with the whole vocabulary."""


def nearest(public: Sequence[Text], embeddings: Tensor, seed: int) -> Recover:
    """The naive attack: the activation is taken for an embedding."""
    name = _Nearest(embeddings)
    return lambda seen: name(seen[:, : embeddings.shape[1]])


def regression(public: Sequence[Text], embeddings: Tensor, seed: int) -> Recover:
    """Ridge regression to the embeddings; the penalty that recovers most of the rows held back is used on all."""
    name = _Nearest(embeddings)
    for_fit, for_choice = _parted(public)
    fitted = _Ridge(for_fit, embeddings)

    def recovered(ridge: float) -> float:
        linear = fitted.at(ridge)
        return _share_right(lambda seen: name(linear(seen)), for_choice)

    best = _Ridge(public, embeddings).at(max(RIDGES, key=recovered))
    return lambda seen: name(best(seen))


def inverter(
    public: Sequence[Text], embeddings: Tensor, seed: int, epochs: int = 30, rate: float = 1e-3, width: int = 256
) -> Recover:
    """A transformer of two layers without a causal mask, whose outputs are compared with the base's embeddings.

    It learns to tell the tokens of the public text apart, and names any. The epoch that recovers most of the rows held
    back is kept; training ends when three did not get better.
    """
    for_fit, for_choice = _parted(public)
    words, places = torch.cat([ids for _, ids in for_fit]).unique(return_inverse=True)
    targets = places.split([len(ids) for _, ids in for_fit])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Inverter(for_fit, embeddings, width)
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
        best, kept, worse = -1.0, network, 0
        for _ in range(epochs):
            network.train()
            for rows in torch.randperm(len(for_fit)).split(8):
                logits = network.forward([for_fit[row][0] for row in rows], words)
                loss = functional.cross_entropy(logits, torch.cat([targets[row] for row in rows]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            network.eval()
            share = _share_right(network.name, for_choice)
            best, kept, worse = (share, copy.deepcopy(network), 0) if share > best else (best, kept, worse + 1)
            if worse == 3:
                break
    return kept.name


ATTACKS: dict[str, Attack] = {"nearest": nearest, "regression": regression, "inverter": inverter}
"""By name, from the weakest to the strongest."""


class _Nearest:
    """Names the token whose embedding points the same way, seen from the mean of all."""

    def __init__(self, embeddings: Tensor) -> None:
        self._mean = embeddings.mean(0)
        self._directions = functional.normalize(embeddings - self._mean, dim=1)

    def __call__(self, vectors: Tensor) -> Tensor:
        return torch.cat([((part - self._mean) @ self._directions.T).argmax(1) for part in vectors.split(256)])


class _Ridge:
    """The linear maps of least squares from what is seen to embeddings, fp64, one for every penalty of its entries."""

    def __init__(self, texts: Sequence[Text], embeddings: Tensor) -> None:
        seen = torch.cat([seen for seen, _ in texts]).double()
        targets = embeddings[torch.cat([ids for _, ids in texts])].double()
        self._mean, self._target_mean = seen.mean(0), targets.mean(0)
        seen = seen - self._mean
        values, self._vectors = torch.linalg.eigh(seen.T @ seen)
        self._values = values.clamp_min(0)
        self._projected = self._vectors.T @ (seen.T @ (targets - self._target_mean))

    def at(self, ridge: float) -> Callable[[Tensor], Tensor]:
        """The map with a penalty, as a share of the mean variance of what is seen."""
        penalised = self._values + ridge * self._values.mean()
        weights = self._vectors @ (self._projected / penalised[:, None])
        return lambda seen: ((seen.double() - self._mean) @ weights + self._target_mean).float()


class _Inverter(nn.Module):
    def __init__(self, texts: Sequence[Text], embeddings: Tensor, width: int) -> None:
        super().__init__()
        cuts = torch.cat([cut for cut, _ in texts])
        self._mean, self._deviation = cuts.mean(0), cuts.std(0).clamp_min(1e-6)
        self._directions = functional.normalize(embeddings - embeddings.mean(0), dim=1)
        seen, hidden = cuts.shape[1], embeddings.shape[1]
        self.into = nn.Linear(seen, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, hidden)
        self.direct = nn.Linear(seen, hidden)  # what a regression finds, beside what the context adds
        self.scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def forward(self, cuts: Sequence[Tensor], words: Tensor | None = None) -> Tensor:
        """Logits ``(tokens of all rows, words)``; over the whole vocabulary where ``words`` are none."""
        lengths = torch.tensor([len(cut) for cut in cuts])
        padded = (pad_sequence(list(cuts), batch_first=True) - self._mean) / self._deviation
        absent = torch.arange(padded.shape[1]) >= lengths[:, None]
        seen = self.out(self.layers(self.into(padded), src_key_padding_mask=absent)) + self.direct(padded)
        directions = self._directions if words is None else self._directions[words]
        logits: Tensor = self.scale.exp() * functional.normalize(seen[~absent], dim=1) @ directions.T
        return logits

    @torch.no_grad()
    def name(self, cut: Tensor) -> Tensor:
        """Token ids of one row."""
        return self.forward([cut]).argmax(1)


def _parted(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Public text to fit, and to choose by."""
    fit = [text for index, text in enumerate(texts) if index % HELD_BACK]
    choose = [text for index, text in enumerate(texts) if not index % HELD_BACK]
    if not fit:
        raise ValueError(f"{len(texts)} rows of public text are too few to learn from; give at least {HELD_BACK}")
    return fit, choose


def _share_right(recover: Recover, texts: Sequence[Text]) -> float:
    """Of the first :data:`CHOSEN_BY` tokens, or all."""
    counts = accumulate(len(ids) for _, ids in texts)
    some = [text for text, count in zip(texts, counts, strict=True) if count - len(text[1]) < CHOSEN_BY]
    right = torch.cat([recover(cut) == ids for cut, ids in some])
    return float(right.double().mean())
