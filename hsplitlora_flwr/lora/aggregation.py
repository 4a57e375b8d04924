"""Many clients' adapters become one update of the model.

Noise-free adapter aggregation (HSplitLoRA, section NAA): for each layer, over the clients that hold an adapter on it,

    dW = sum_i p_i B_i A_i = [B_1 ... B_n] [p_1 A_1 ; ... ; p_n A_n]

with the LoRA scale already in ``A_i``. Concatenating along the rank sums the *products*, for any mix of ranks. Taking
the mean of the ``A`` and of the ``B`` instead sums products of one client's ``B`` with another client's ``A``: noise. A
client without an adapter on a layer contributes zero to it. The weights ``p_i`` are applied once, to ``A``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""``(B, A)`` of one layer: ``(out, r)`` and ``(r, in)``."""
Update = Mapping[str, Factors]
"""One client's adapters by absolute layer name, scales folded into ``A``."""


class AggregationError(ValueError):
    """Updates that cannot be summed; the text names the layer and the shapes."""


def aggregate(updates: Sequence[Update], weights: Sequence[float], rule: str = "noise_free") -> dict[str, Factors]:
    """Sum the updates of a round.

    Parameters
    ----------
    updates : Sequence[Mapping[str, tuple[Tensor, Tensor]]]
        One per client: absolute layer name -> ``(B, A)`` of shapes ``(out, r)`` and ``(r, in)``, the scale folded in.
        Ranks may differ between clients and layers, and so may the layers that clients hold.
    weights : Sequence[float]
        One per client, for instance the clients' numbers of examples; they are normalised to sum 1.
    rule : str
        A name in :data:`RULES`.

    Returns
    -------
    dict[str, tuple[Tensor, Tensor]]
        ``(B, A)`` by layer name; under ``noise_free`` their product is the weighted sum of the clients' products.

    Raises
    ------
    AggregationError
        If there is nothing to sum, a weight is negative or not finite, or shapes of one layer disagree.
    """
    if rule not in RULES:
        raise AggregationError(f"rule '{rule}' is unknown; choose one of {', '.join(RULES)}")
    if not updates or len(updates) != len(weights):
        raise AggregationError(f"{len(updates)} updates and {len(weights)} weights; one weight per update is needed")
    if any(not 0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
        raise AggregationError(f"weights {list(weights)} must be finite, not negative, and not all zero")
    shares = [weight / sum(weights) for weight in weights]
    for update in updates:
        for name, (b, a) in update.items():
            _check_shapes(name, b, a)
    return RULES[rule](updates, shares)


def _noise_free(updates: Sequence[Update], shares: Sequence[float]) -> dict[str, Factors]:
    result: dict[str, Factors] = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        holders = [(share, *update[name]) for share, update in zip(shares, updates, strict=True) if name in update]
        outer = {(b.shape[0], a.shape[1]) for _, b, a in holders}
        if len(outer) > 1:
            raise AggregationError(f"layer '{name}' has different (out, in) at different clients: {sorted(outer)}")
        left = torch.cat([b for _, b, _ in holders], dim=1)  # (out, R)
        right = torch.cat([share * a for share, _, a in holders], dim=0)  # (R, in)
        result[name] = left, right
    return result


RULES: dict[str, Callable[[Sequence[Update], Sequence[float]], dict[str, Factors]]] = {"noise_free": _noise_free}
"""Aggregation rules by name."""


def _check_shapes(name: str, b: Tensor, a: Tensor) -> None:
    if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
        raise AggregationError(
            f"layer '{name}': B {tuple(b.shape)} and A {tuple(a.shape)} do not share a rank; "
            "(out, r) and (r, in) are needed"
        )
