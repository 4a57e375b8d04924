"""What a client does to its cut activation before it leaves: noise, clipping, fewer numbers, or whatever protects its
text.

The change stands between the client's last block and the wire, in training, while weights are scored and when the
client's own text is measured. Autograd goes through it, so the gradients of the client's adapters are those of the
changed model; the server sees the changed activation only.

Random numbers of a change are those of its place, a micro-batch of a step: computed again, as a client does that goes
away between messages, it gives the same. They follow from a secret of the node, which no server can draw again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplitlora_flwr.transport.bottleneck import Bottleneck


class CutError(ValueError):
    """A change of the cut activation gave something that cannot take its place."""


@dataclass(frozen=True)
class CutTransform:
    """A change of the cut activation.

    Parameters
    ----------
    name : str
        How plans, the log and the summary call it; at most 64 characters.
    apply : Callable[[Tensor, torch.Generator], Tensor]
        From the activation, ``(batch, seq, hidden)``, to another of the same shape, dtype and device, differentiable.
        The generator is on that device and seeded for this micro-batch; draw all random numbers from it.
    reproducible : bool
        The seeds follow from the run's settings alone, so that another run draws the same numbers. The server knows
        those settings, and can then take noise away again: for experiments only.
    bottleneck : Bottleneck, optional
        Through which it goes: what leaves is ``(batch, seq, width)`` then, and the server widens it.
    """

    name: str
    apply: Callable[[Tensor, torch.Generator], Tensor]
    reproducible: bool = False
    bottleneck: Bottleneck | None = None


def chained(*transforms: CutTransform | None) -> CutTransform | None:
    """One change after the other as one; None where there are none."""
    changes = [change for change in transforms if change]
    if len(changes) < 2:
        return changes[0] if changes else None

    def apply(cut: Tensor, generator: torch.Generator) -> Tensor:
        for change in changes:
            cut = change.apply(cut, generator)
        return cut

    name = ", ".join(change.name for change in changes)
    return CutTransform(
        name,
        apply,
        reproducible=all(change.reproducible for change in changes),
        bottleneck=next((change.bottleneck for change in changes if change.bottleneck), None),
    )


class SeededCut:
    """A change with the seeds of one client's task.

    Parameters
    ----------
    transform : CutTransform
    seed : str
        Of the task; the same in every process that works on it.
    """

    def __init__(self, transform: CutTransform, seed: str) -> None:
        self._transform, self._seed = transform, seed

    def __call__(self, cut: Tensor, step: int, index: int) -> Tensor:
        """The activation that leaves, of micro-batch ``index`` of a global step.

        Raises
        ------
        CutError
            If it has another shape, dtype or device, or no gradient comes back through it.
        """
        digest = hashlib.blake2b(f"{self._seed}/{step}/{index}".encode(), digest_size=8).digest()
        generator = torch.Generator(cut.device).manual_seed(int.from_bytes(digest, "big") >> 1)
        changed = self._transform.apply(cut, generator)
        narrow = self._transform.bottleneck
        shape = (*cut.shape[:-1], narrow.width if narrow else cut.shape[-1])
        if (changed.shape, changed.dtype, changed.device) != (shape, cut.dtype, cut.device):
            wanted, found = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (cut, changed))
            raise CutError(f"cut transform '{self._transform.name}' made {found} of {wanted}; they must be alike")
        if cut.requires_grad and not changed.requires_grad:
            raise CutError(
                f"cut transform '{self._transform.name}' lets no gradient through, so the client would train nothing; "
                "compute it with torch's differentiable operations"
            )
        return changed
