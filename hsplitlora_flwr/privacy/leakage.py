"""How many tokens of a client's text a curious server reads off the activations at the cut.

The server sees every cut activation, has the base model, and may have public text of the same language. It runs that
text through its own copy of the client's part, learns to go back from activations to tokens
(:mod:`hsplitlora_flwr.privacy.attacks`), and does so with what the clients send.

It may see more than one activation of a token: the loss's gradient there, which it computes itself, and the activations
of the same row under the updates of several rounds (:class:`View`).

The share of all tokens that it recovers tells how readable the text is. The share among those tokens that its public
text does not hold tells of names and numbers: what is worth protecting, and what no attacker finds by learning frequent
words by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hsplitlora_flwr.data.collate import IGNORED, Batch, Tokens, evaluation_batches
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.update import Change
from hsplitlora_flwr.models.parts import ServerModel
from hsplitlora_flwr.privacy.attacks import ATTACKS, Known, Text
from hsplitlora_flwr.training.cut import CutTransform, SeededCut

ROWS = 16
"""Rows of one forward pass."""


@dataclass(frozen=True)
class View:
    """What a server has of a row.

    Parameters
    ----------
    protect : Callable[[int], CutTransform or None]
        What clients do to their activations, by split point. The attacker knows it, and does the same to those of its
        own text; what is drawn at random it cannot draw again.
    without_noise : Callable[[int], CutTransform or None]
        The same but for what is drawn at random.
    crossings : int
        How often each row has crossed, as it does once an epoch: the attacker has the mean of what it received, which
        is right where the blocks below the cut do not train, and takes noise out.
    gradients : bool
        Beside the activation, the directions of the loss's gradient there and at the token before.
    updates : Sequence[Mapping[str, Change]]
        The row has crossed under each of these updates of the base, by absolute layer name; what was seen of it stands
        side by side. Empty: once, under the update that the base has.
    """

    protect: Callable[[int], CutTransform | None] = lambda split: None
    without_noise: Callable[[int], CutTransform | None] = lambda split: None
    crossings: int = 1
    gradients: bool = False
    updates: Sequence[Mapping[str, Change]] = ()


PLAIN = View()
"""The activations as they are computed, once."""


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
    with_labels : float
        Share of the private tokens that the server has in all, as it has those that are labels anyway.
    norm : float
        Median norm of what was seen of the private tokens: of their activations, as they crossed the cut, if no more.
    """

    split: int
    attack: str
    recovered: float
    unseen: float | None
    tokens: int
    unseen_tokens: int
    with_labels: float
    norm: float


def measure(
    base: SharedBase,
    public: Sequence[Tokens],
    private: Sequence[Tokens],
    splits: Sequence[int],
    attacks: Sequence[str] = tuple(ATTACKS),
    seed: int = 0,
    view: View = PLAIN,
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
    view : View
        What it has of them.

    Yields
    ------
    Leakage
        For every split and attack.
    """
    if view.updates and "search" in attacks:
        raise ValueError("search computes with one update; have --rounds without it")
    reader = Reader.of(base, public, private, seed)
    for (split, of_public), (_, of_private) in zip(
        cut_activations(base, public, splits, view, f"{seed}/attacker"),
        cut_activations(base, private, splits, view, f"{seed}/client"),
        strict=True,
    ):
        for attack in attacks:
            yield reader.read(split, attack, of_public, of_private, view.without_noise(split))


@dataclass(frozen=True)
class Reader:
    """Attacks what is seen of some text, and counts what was right.

    Parameters
    ----------
    base : SharedBase
    known : frozenset[int]
        Tokens that the public text holds.
    labelled : Tensor
        Which private tokens are labels, ``(tokens,)``, in the order of :func:`cut_activations`.
    seed : int
        Of attacks that are trained.
    """

    base: SharedBase
    known: frozenset[int]
    labelled: Tensor
    seed: int

    @classmethod
    def of(cls, base: SharedBase, public: Sequence[Tokens], private: Sequence[Tokens], seed: int) -> Reader:
        """For this text; parameters as for :func:`measure`."""
        batches = evaluation_batches(private, ROWS)
        labelled = [batch.labels[batch.attention_mask.bool()] != IGNORED for batch in batches]
        known = frozenset(token for row in public for token in row.ids)
        return cls(base, known, torch.cat(labelled), seed)

    def read(
        self,
        split: int,
        attack: str,
        public: Sequence[Text],
        private: Sequence[Text],
        change: CutTransform | None = None,
    ) -> Leakage:
        """Learn from the public text and recover the private one; ``change`` is what clients do, but for noise."""
        known = Known(embeddings_of(self.base), self.seed, self.base.client_part(split).eval(), change)
        recover = ATTACKS[attack](public, known)
        ids = torch.cat([ids for _, ids in private])
        right = torch.cat([recover(seen) for seen, _ in private]) == ids
        unseen = torch.tensor([int(token) not in self.known for token in ids])
        return Leakage(
            split,
            attack,
            _share(right),
            _share(right[unseen]) if unseen.any() else None,
            len(ids),
            int(unseen.sum()),
            _share(right | self.labelled),
            float(torch.cat([torch.linalg.vector_norm(seen, dim=-1) for seen, _ in private]).median()),
        )


def embeddings_of(base: SharedBase) -> Tensor:
    """The input embeddings, ``(vocabulary, hidden)`` in fp32."""
    weight: Tensor = base.model.get_input_embeddings().get_parameter("weight")
    return weight.detach().float()


def cut_activations(
    base: SharedBase, rows: Sequence[Tokens], splits: Sequence[int], view: View = PLAIN, seed: str = ""
) -> Iterator[tuple[int, list[Text]]]:
    """What a server has of these rows, split point by split point; parameters as for :func:`measure`.

    Yields
    ------
    tuple[int, list of Text]
        The split, and for each row, the longest first, what is seen of it, ``(tokens, seen)`` in fp32, with the ids,
        ``(tokens,)``, that it comes from.

    Raises
    ------
    ValueError
        If the split points do not rise.
    """
    if list(splits) != sorted(set(splits)):
        raise ValueError(f"splits={list(splits)} must rise; each is computed from the one before")
    if not view.updates:
        yield from _crossed(base, rows, splits, view, seed)
        return
    rounds = []
    for number, update in enumerate(view.updates):
        base.update(update)
        rounds.append(list(_crossed(base, rows, splits, view, f"{seed}/{number}")))
    for split, *texts in zip(splits, *([text for _, text in each] for each in rounds), strict=True):
        yield split, [(torch.cat([seen for seen, _ in row], dim=1), row[0][1]) for row in zip(*texts, strict=True)]


@torch.no_grad()
def _crossed(
    base: SharedBase, rows: Sequence[Tokens], splits: Sequence[int], view: View, seed: str
) -> Iterator[tuple[int, list[Text]]]:
    """What is seen of rows under one update."""
    first = base.client_part(splits[0]).eval()
    batches = list(evaluation_batches(rows, ROWS))
    hidden = [first(batch.input_ids, batch.attention_mask) for batch in batches]
    for split, after in zip(splits, [*splits[1:], 0], strict=True):
        change, server = view.protect(split), base.server_part(split).eval() if view.gradients else None
        texts = []
        for index, (batch, cut) in enumerate(zip(batches, hidden, strict=True)):
            seen = as_received(cut, change, f"{seed}/{split}", index, view.crossings)
            if server:
                seen = torch.cat([seen, _directions(server, seen, batch)], dim=-1)
            rows_of = zip(seen, batch.attention_mask.bool(), batch.input_ids, strict=True)
            texts += [(row[mask].float(), ids[mask]) for row, mask, ids in rows_of]
        yield split, texts
        if after:
            middle = base.middle_part(split, after).eval()
            hidden = [middle(cut, batch.attention_mask) for batch, cut in zip(batches, hidden, strict=True)]


def _directions(server: ServerModel, cut: Tensor, batch: Batch) -> Tensor:
    """The directions of the loss's gradients at a cut, as long as activations usually are, ``(batch, seq, 2 hidden)``:
    a token's own, and that of the token before it, whose label it may be."""
    with torch.enable_grad():
        leaf = cut.detach().requires_grad_()
        loss = server(leaf, batch.attention_mask, batch.labels, 1).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    own = functional.normalize(gradient, dim=-1) * cut.shape[-1] ** 0.5
    return torch.cat([own, functional.pad(own, (0, 0, 1, -1))], dim=-1)


def as_received(cut: Tensor, change: CutTransform | None, seed: str, index: int, crossings: int = 1) -> Tensor:
    """What a server makes of the activation of batch ``index``, which was changed whenever it crossed."""
    if change is None:
        return cut
    seeded = SeededCut(change, seed)
    sent = torch.stack([seeded(cut, crossing, index) for crossing in range(crossings)]).mean(0)
    return change.bottleneck.widen(sent) if change.bottleneck else sent


def _share(right: Tensor) -> float:
    return float(right.double().mean())
