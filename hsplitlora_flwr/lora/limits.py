"""What one client may weigh in a round, and how far it may move the model.

A client's number of examples is its own word, and an update is numbers from its machine. What it says is bounded by
what the others say: its share of the weights, and of the importance, by a cap, the size of its update by a multiple of
the median.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median_high

from hsplitlora_flwr.lora.aggregation import Factors, Update

_FEWEST = 3
"""Sizes that a median must be of, for it to be that of honest clients where one is not."""


def capped_shares(weights: Sequence[float], cap: float) -> list[float]:
    """Weights as shares of their sum, none above ``cap``; what a client loses goes to the others in proportion.

    Parameters
    ----------
    weights : Sequence[float]
        Above 0, for instance numbers of examples.
    cap : float
        The largest share, above 0 and up to 1. Of fewer than ``1 / cap`` clients all count the same.

    Returns
    -------
    list of float
        They sum to 1.
    """
    shares = [1 / len(weights)] * len(weights)
    if cap * len(weights) <= 1:
        return shares
    capped: set[int] = set()
    while True:
        rest = math.fsum(weight for i, weight in enumerate(weights) if i not in capped)
        left = 1 - cap * len(capped)
        shares = [cap if i in capped else left * (weight / rest) for i, weight in enumerate(weights)]
        above = {i for i, share in enumerate(shares) if share > cap * (1 + 1e-12)}
        if not above:
            return shares
        capped |= above


def capped_weights(weights: Sequence[float], amounts: Sequence[float], cap: float) -> list[float]:
    """Weights under which nobody makes more than ``cap`` of the weighted sum of all amounts.

    Parameters
    ----------
    weights, amounts : Sequence[float]
        Each 0 or more. An amount of 0 adds nothing, and keeps its weight.
    cap : float
        As for :func:`capped_shares`.

    Returns
    -------
    list of float
        The same weights where nobody does.
    """
    parts = {i: weight * amounts[i] for i, weight in enumerate(weights) if weight * amounts[i] > 0}
    if not parts or max(parts.values()) <= cap * math.fsum(parts.values()):
        return list(weights)
    shares = dict(zip(parts, capped_shares(list(parts.values()), cap), strict=True))
    return [shares[i] / amounts[i] if i in shares else weight for i, weight in enumerate(weights)]


def update_norm(update: Update) -> float:
    """The Frobenius norm of a change of the whole model, ``(B, A)`` by layer name, from its factors alone, in fp64."""
    return math.sqrt(math.fsum(map(_square, update.values())))


def update_size(update: Update) -> float:
    """The norm of an update for each unit of its rank, as a root mean square: clients hold adapters on more or fewer
    layers, of higher or lower rank, and this is what of them compares. 0 of an update without adapters."""
    units = sum(b.shape[1] for b, _ in update.values())
    return update_norm(update) / math.sqrt(units) if units else 0.0


def _square(factors: Factors) -> float:
    b, a = (factor.double() for factor in factors)
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)


class SizeLimit:
    """Tells which updates of a round are too large beside the others.

    The yardstick is the median of the round's updates, and of as many that were accepted before: so it means something
    for two clients too, from the second round on, and several that lie at once must be more than those that do not and
    those that did not. The update of a single client is all that there is, and has no such limit.

    Parameters
    ----------
    multiple : float
        Of the median, up to which an update is accepted; 0 = no limit.
    """

    def __init__(self, multiple: float) -> None:
        self.multiple = multiple
        self._accepted: deque[float] = deque(maxlen=1000)

    def exceeding(self, sizes: Mapping[int, float]) -> dict[int, float]:
        """By how much they are larger than the median, of those that are too large; the others count from now on.

        Parameters
        ----------
        sizes : Mapping[int, float]
            Of the round's updates, by node; see :func:`update_size`. Those of 0 say nothing.
        """
        present = [size for size in sizes.values() if size]
        earlier = list(self._accepted)[-len(present) :] if len(present) > 1 else []
        known, too_large = [*present, *earlier], dict[int, float]()
        if self.multiple and len(known) >= _FEWEST:
            middle = median_high(known)
            too_large = {node: size / middle for node, size in sizes.items() if size > self.multiple * middle}
        self._accepted += [size for node, size in sizes.items() if size and node not in too_large]
        return too_large
