"""Bounds on one client's influence on a round: its weight, its importance and the size of its update.

A client states its number of examples itself, and its update comes from its own machine, so neither can be verified.
Both are bounded by those of the other clients: its share of the weights and of the importance by a cap, and the size of
its update by a multiple of the median.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median_high

from hsplitlora_flwr.lora.aggregation import Factors, Update

_FEWEST = 3
"""Fewest sizes whose median is that of an honest client if one of them is not."""


def capped_shares(weights: Sequence[float], cap: float) -> list[float]:
    """Weights as shares of their sum, none above ``cap``; what a client loses goes to the others in proportion.

    Parameters
    ----------
    weights : Sequence[float]
        Above 0, for instance numbers of examples.
    cap : float
        The largest share, above 0 and up to 1. With fewer than ``1 / cap`` clients all count the same.

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
    """Weights under which no client contributes more than ``cap`` of the weighted sum of all amounts.

    Parameters
    ----------
    weights, amounts : Sequence[float]
        Each 0 or more. An amount of 0 adds nothing, and keeps its weight.
    cap : float
        As for :func:`capped_shares`.

    Returns
    -------
    list of float
        The weights as they were if no client did.
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
    """The root mean square norm of an update per unit of rank, ``norm / sqrt(sum of ranks)``, which is comparable
    between clients with adapters on more or fewer layers and of different ranks; 0 for an update without adapters."""
    units = sum(b.shape[1] for b, _ in update.values())
    return update_norm(update) / math.sqrt(units) if units else 0.0


def _square(factors: Factors) -> float:
    b, a = (factor.double() for factor in factors)
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)


class SizeLimit:
    """Finds the updates of a round that are too large compared with the others.

    They are compared with the median of the round's updates together with as many that were accepted before. So it
    works for two clients too, from the second round on, and dishonest clients must outnumber the honest ones of both.
    The update of a single client has no limit.

    Parameters
    ----------
    multiple : float
        An update is accepted up to this multiple of the median; 0 = no limit.
    """

    def __init__(self, multiple: float) -> None:
        self.multiple = multiple
        self._accepted: deque[float] = deque(maxlen=1000)

    def exceeding(self, sizes: Mapping[int, float]) -> dict[int, float]:
        """The updates that are too large, by node, as multiples of the median; the others count as accepted from now
        on.

        Parameters
        ----------
        sizes : Mapping[int, float]
            Sizes of the round's updates by node; see :func:`update_size`. Those of 0 do not count.
        """
        present = [size for size in sizes.values() if size]
        earlier = list(self._accepted)[-len(present) :] if len(present) > 1 else []
        known, too_large = [*present, *earlier], dict[int, float]()
        if self.multiple and len(known) >= _FEWEST:
            middle = median_high(known)
            too_large = {node: size / middle for node, size in sizes.items() if size > self.multiple * middle}
        self._accepted += [size for node, size in sizes.items() if size and node not in too_large]
        return too_large
