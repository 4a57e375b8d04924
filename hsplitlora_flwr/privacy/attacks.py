"""Ways back from cut activations to tokens, each learnt from public text by somebody who has the base model.

==============  ====================================================================================================
``nearest``     the token whose embedding is nearest to the activation; learns nothing
``regression``  a ridge regression from activations to embeddings, then the nearest one; in closed form
``inverter``    a small transformer over the sequence of activations, trained to name the tokens
``search``      tries tokens in the client's own blocks, behind those that it has read, until the activation is that
                which came; the regression says which to try first
==============  ====================================================================================================

What each attacker may tune, it tunes on a part of its public text, as an adversary would.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from hsplitlora_flwr.models.parts import ClientModel
from hsplitlora_flwr.training.cut import CutTransform

Text = tuple[Tensor, Tensor]
"""What is seen of one row, ``(tokens, seen)`` in fp32, and the token ids ``(tokens,)`` that it comes from. The first
numbers of a token are its activation; gradients, or activations of other rounds, may stand beside it."""
Recover = Callable[[Tensor], Tensor]
"""Token ids ``(tokens,)`` from what is seen of one row, ``(tokens, seen)``."""


@dataclass(frozen=True)
class Known:
    """What an attacker has besides public text.

    Parameters
    ----------
    embeddings : Tensor
        ``(vocabulary, hidden)``, of the base.
    seed : int
        Of what it trains.
    client : ClientModel, optional
        The client's blocks, with the update that they have.
    change : CutTransform, optional
        What clients do to their activations, but for what is drawn at random.
    """

    embeddings: Tensor
    seed: int = 0
    client: ClientModel | None = None
    change: CutTransform | None = None


Attack = Callable[[Sequence[Text], Known], Recover]
"""Learns from public text."""

RIDGES = tuple(10.0**power for power in range(-6, 3))
"""What the regression tries, as shares of the mean variance of the activations."""
HELD_BACK = 5
"""One row in so many of the public text is for tuning."""
CHOSEN_BY = 1000
"""Tokens of it that are named in order to choose: each is compared with the whole vocabulary."""
TRIED = (32, 512)
"""How many tokens a search tries at a place; more if none of the first ones is the one."""
THE_SAME = 1e-3
"""An activation is the one that came if it differs from it by no more than this share of its norm."""


def nearest(public: Sequence[Text], known: Known) -> Recover:
    """The naive attack: the activation is taken for an embedding."""
    name, hidden = _Nearest(known.embeddings), known.embeddings.shape[1]
    return lambda seen: name(seen[:, :hidden])


def regression(public: Sequence[Text], known: Known) -> Recover:
    """Ridge regression to the embeddings; the penalty that recovers most of the rows held back is used on all."""
    name, embed = _Nearest(known.embeddings), _regression(public, known.embeddings)
    return lambda seen: name(embed(seen))


def _regression(public: Sequence[Text], embeddings: Tensor) -> Callable[[Tensor], Tensor]:
    """From what is seen to embeddings."""
    name = _Nearest(embeddings)
    for_fit, for_choice = _parted(public)
    fitted = _Ridge(for_fit, embeddings)

    def recovered(ridge: float) -> float:
        linear = fitted.at(ridge)
        return _share_right(lambda seen: name(linear(seen)), for_choice)

    return _Ridge(public, embeddings).at(max(RIDGES, key=recovered))


def search(public: Sequence[Text], known: Known) -> Recover:
    """Token by token: what the client computes from a token and those before it is compared with what came.

    Blocks of a causal model see what is before a token alone, and the attacker has read that; so the right token gives
    the very activation, and noise decides only between tokens that are nearer to each other than it is large.
    """
    assert known.client is not None
    embed, name, computes = _regression(public, known.embeddings), _Nearest(known.embeddings), Computes(known)

    def recover(seen: Tensor) -> Tensor:
        places, read = name.best(embed(seen), max(TRIED)), []
        cache = computes.nothing()
        for place, came in zip(places, computes.sent(seen[:, : known.embeddings.shape[1]]), strict=True):
            for tried in TRIED:
                sent, after = computes(place[:tried], cache)
                distances = torch.linalg.vector_norm(sent - came, dim=1)
                best = int(distances.argmin())
                if float(distances[best]) <= THE_SAME * float(torch.linalg.vector_norm(came)):
                    break
            after.batch_select_indices(torch.tensor([best]))
            read.append(place[best])
            cache = after
        return torch.stack(read)

    return recover


class Computes:
    """What a client would send for tokens behind a text, all of it but for noise."""

    def __init__(self, known: Known) -> None:
        assert known.client is not None
        self._decoder, self._change = known.client.decoder, known.change
        names = inspect.signature(self._decoder.forward).parameters  # the older one goes with transformers 5.40
        self._name = "cache" if "cache" in names else "past_key_values"
        self._bottleneck = known.change.bottleneck if known.change else None
        self._draws = torch.Generator()

    def nothing(self) -> DynamicCache:
        """Before the first token."""
        return DynamicCache(config=self._decoder.config)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, before: DynamicCache) -> tuple[Tensor, DynamicCache]:
        """Codes or activations ``(tokens, width)`` of tokens that might come next, and what each leaves behind."""
        after = copy.deepcopy(before)
        if after.get_seq_length():
            after.batch_repeat_interleave(len(tokens))
        inputs = {"input_ids": tokens[:, None], self._name: after, "use_cache": True}
        cut = self._decoder(**inputs).last_hidden_state
        changed = self._change.apply(cut, self._draws) if self._change else cut
        return changed[:, 0].float(), after

    def sent(self, received: Tensor) -> Tensor:
        """What was sent of what a server has made of it, which a bottleneck has made wider."""
        return self._bottleneck.narrow(received) if self._bottleneck else received


def inverter(public: Sequence[Text], known: Known, epochs: int = 30, rate: float = 1e-3, width: int = 256) -> Recover:
    """A transformer of two layers without a causal mask, whose outputs are compared with the base's embeddings.

    It learns to tell the tokens of the public text apart, and names any. The epoch that recovers most of the rows held
    back is kept; training ends when three did not get better.
    """
    for_fit, for_choice = _parted(public)
    words, places = torch.cat([ids for _, ids in for_fit]).unique(return_inverse=True)
    targets = places.split([len(ids) for _, ids in for_fit])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(known.seed)
        network = _Inverter(for_fit, known.embeddings, width)
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


ATTACKS: dict[str, Attack] = {
    "nearest": nearest,
    "regression": regression,
    "inverter": inverter,
    "search": search,
}
"""By name, from the weakest to the strongest."""


class _Nearest:
    """Names the token whose embedding points the same way, seen from the mean of all."""

    def __init__(self, embeddings: Tensor) -> None:
        self._mean = embeddings.mean(0)
        self._directions = functional.normalize(embeddings - self._mean, dim=1)

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.best(vectors, 1)[:, 0]

    def best(self, vectors: Tensor, count: int) -> Tensor:
        """The tokens ``(vectors, count)`` that fit best, the best one first; all there are, if there are fewer."""
        count = min(count, len(self._directions))
        parts = ((part - self._mean) @ self._directions.T for part in vectors.split(256))
        return torch.cat([part.topk(count).indices for part in parts])


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
