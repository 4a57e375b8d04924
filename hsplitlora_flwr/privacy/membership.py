"""Membership inference: whether a row was trained on, told from an update of the model.

The attacker has the base and an update: the server has a client's adapters, a thief the final one. It computes the loss
of a row with and without the update. Training lowers the loss of its own rows more than that of similar ones. How well
that separates them is reported as the area under the ROC curve (0.5 for guessing) and as the true positive rate at a
false positive rate of 1 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplitlora_flwr.data.collate import Tokens, evaluation_batches
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.update import Change

ROWS = 16
"""Rows of one forward pass."""
ACCUSED = 0.01
"""Share of rows that were not trained on, and are taken for such that were."""


@dataclass(frozen=True)
class Membership:
    """How well rows that were trained on are told from others.

    Parameters
    ----------
    area : float
        Probability that of a member and another row the member's loss fell by more; 0.5 for guessing.
    found : float
        Share of the members that are named where :data:`ACCUSED` of the others are.
    members, others : int
        Rows of each.
    """

    area: float
    found: float
    members: int
    others: int


def measure_membership(
    base: SharedBase, update: Mapping[str, Change], members: Sequence[Tokens], others: Sequence[Tokens]
) -> Membership:
    """Tell members from others by how far the update lowered their losses; the base has the update after.

    Parameters
    ----------
    base : SharedBase
        Without an update.
    update : Mapping[str, Change]
        By absolute layer name.
    members, others : Sequence[Tokens]
        Rows that the update was trained on, and such that it was not.
    """
    rows = [*members, *others]
    before = row_losses(base, rows)
    base.update(update)
    fallen = before - row_losses(base, rows)
    return tell_apart(fallen[: len(members)], fallen[len(members) :])


def tell_apart(members: Tensor, others: Tensor) -> Membership:
    """How well scores ``(rows,)`` tell members, who are to have the higher ones, from others."""
    ahead = (members[:, None] > others).double() + (members[:, None] == others).double() / 2
    limit = torch.quantile(others.double(), 1 - ACCUSED)
    found = float((members.double() > limit).double().mean())
    return Membership(float(ahead.mean()), found, len(members), len(others))


@torch.no_grad()
def row_losses(base: SharedBase, rows: Sequence[Tokens]) -> Tensor:
    """The mean loss of every row's labels, fp64 ``(rows,)``, in their order."""
    whole, order = base.whole().eval(), sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    sums, counts = torch.zeros(2, len(rows), dtype=torch.float64)
    for at, batch in enumerate(evaluation_batches(rows, ROWS)):
        losses, places = whole.token_losses(batch.input_ids, batch.attention_mask, batch.labels)
        own = torch.tensor(order[at * ROWS : (at + 1) * ROWS])[places]
        sums.index_add_(0, own, losses.double())
        counts.index_add_(0, own, torch.ones(len(own), dtype=torch.float64))
    means: Tensor = sums / counts.clamp_min(1)
    return means
