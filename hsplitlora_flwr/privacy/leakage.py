"""How many tokens of a client's text a curious server reads off the activations at the cut.

The server sees every cut activation, has the base model, and may have public text of the same language. It runs that
text through its own copy of the client's part, learns to go back from activations to tokens
(:mod:`hsplitlora_flwr.privacy.attacks`), and does so with what the clients send.

The share of all tokens that it recovers tells how readable the text is. The share among those tokens that its public
text does not hold tells of names and numbers: what is worth protecting, and what no attacker finds by learning frequent
words by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplitlora_flwr.data.collate import Tokens, evaluation_batches
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.privacy.attacks import ATTACKS, Text
from hsplitlora_flwr.training.cut import CutTransform, SeededCut

ROWS = 16
"""Rows of one forward pass."""


@dataclass(frozen=True)
class Leakage:
    """What one attack recovered at one split point.

    Parameters
    ----------
    split : int
        Blocks on the client.
    attack : str
        A name in :data:`~hsplitlora_flwr.privacy.attacks.ATTACKS`.
    recovered : float
        Share of the private tokens that were named right, 0 to 1.
    unseen : float or None
        The same among those private tokens that the public text does not hold; None where there are none.
    tokens, unseen_tokens : int
        How many private tokens there were, and how many of them the public text does not hold.
    norm : float
        Median norm of the private tokens' activations, as they crossed the cut.
    """

    split: int
    attack: str
    recovered: float
    unseen: float | None
    tokens: int
    unseen_tokens: int
    norm: float


def measure(
    base: SharedBase,
    public: Sequence[Tokens],
    private: Sequence[Tokens],
    splits: Sequence[int],
    attacks: Sequence[str] = tuple(ATTACKS),
    seed: int = 0,
    protect: Callable[[int], CutTransform | None] = lambda split: None,
    crossings: int = 1,
) -> Iterator[Leakage]:
    """Attack the activations of every split point.

    Parameters
    ----------
    base : SharedBase
        The model as clients hold it, with whatever update it has.
    public : Sequence[Tokens]
        What the attacker learns from.
    private : Sequence[Tokens]
        What it is to recover; it sees the activations alone.
    splits : Sequence[int]
        Rising.
    attacks : Sequence[str]
        Names in :data:`~hsplitlora_flwr.privacy.attacks.ATTACKS`.
    seed : int
        Of attacks that are trained.
    protect : Callable[[int], CutTransform or None]
        What clients do to their activations, by split point. The attacker knows it, and does the same to those of its
        own text; what is drawn at random it cannot draw again.
    crossings : int
        How often each row has crossed, as it does once an epoch: the attacker has the mean of what it received, which
        is right where the blocks below the cut do not train, and takes noise out.

    Yields
    ------
    Leakage
        For every split and attack.
    """
    embeddings = embeddings_of(base)
    known = {token for row in public for token in row.ids}
    for (split, of_public), (_, of_private) in zip(
        cut_activations(base, public, splits, protect, f"{seed}/attacker", crossings),
        cut_activations(base, private, splits, protect, f"{seed}/client", crossings),
        strict=True,
    ):
        for name in attacks:
            recover = ATTACKS[name](of_public, embeddings, seed)
            yield _score(split, name, of_private, [recover(activation) for activation, _ in of_private], known)


def embeddings_of(base: SharedBase) -> Tensor:
    """The input embeddings, ``(vocabulary, hidden)`` in fp32."""
    weight: Tensor = base.model.get_input_embeddings().get_parameter("weight")
    return weight.detach().float()


@torch.no_grad()
def cut_activations(
    base: SharedBase,
    rows: Sequence[Tokens],
    splits: Sequence[int],
    protect: Callable[[int], CutTransform | None] = lambda split: None,
    seed: str = "",
    crossings: int = 1,
) -> Iterator[tuple[int, list[Text]]]:
    """What a server has of these rows, split point by split point; parameters as for :func:`measure`.

    Yields
    ------
    tuple[int, list of Text]
        The split, and for each row its activations, ``(tokens, hidden)`` in fp32, with the ids, ``(tokens,)``, that
        they come from.

    Raises
    ------
    ValueError
        If the split points do not rise.
    """
    if list(splits) != sorted(set(splits)):
        raise ValueError(f"splits={list(splits)} must rise; each is computed from the one before")
    first = base.client_part(splits[0]).eval()
    batches = list(evaluation_batches(rows, ROWS))
    hidden = [first(batch.input_ids, batch.attention_mask) for batch in batches]
    for split, after in zip(splits, [*splits[1:], 0], strict=True):
        change = protect(split)
        yield (
            split,
            [
                (activation[mask.bool()].float(), ids[mask.bool()])
                for index, (batch, cut) in enumerate(zip(batches, hidden, strict=True))
                for activation, mask, ids in zip(
                    _as_received(cut, change, f"{seed}/{split}", index, crossings),
                    batch.attention_mask,
                    batch.input_ids,
                    strict=True,
                )
            ],
        )
        if after:
            middle = base.middle_part(split, after).eval()
            hidden = [middle(cut, batch.attention_mask) for batch, cut in zip(batches, hidden, strict=True)]


def _as_received(cut: Tensor, change: CutTransform | None, seed: str, index: int, crossings: int) -> Tensor:
    """What a server makes of an activation that was changed whenever it crossed."""
    if change is None:
        return cut
    seeded = SeededCut(change, seed)
    sent = torch.stack([seeded(cut, crossing, index) for crossing in range(crossings)]).mean(0)
    return change.bottleneck.widen(sent) if change.bottleneck else sent


def _score(split: int, attack: str, texts: Sequence[Text], guesses: Sequence[Tensor], known: set[int]) -> Leakage:
    ids, guessed = torch.cat([ids for _, ids in texts]), torch.cat(list(guesses))
    right = (ids == guessed).double()
    unseen = torch.tensor([int(token) not in known for token in ids])
    of_unseen = float(right[unseen].mean()) if unseen.any() else None
    norm = float(torch.cat([torch.linalg.vector_norm(cut, dim=-1) for cut, _ in texts]).median())
    return Leakage(split, attack, float(right.mean()), of_unseen, len(ids), int(unseen.sum()), norm)
