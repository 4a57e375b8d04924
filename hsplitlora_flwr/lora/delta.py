"""The accumulated update of the model: exact, bounded, versioned, and kept apart from the base.

``W_eff = W_0 + change``. Each round adds the factors of its update to the change of every layer. Factors grow with
every round, so a change takes whichever exact form is smallest: the factors as they are, a thinner pair of the same
product (QR of both sides, SVD of the small core), or the dense matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """The accumulated change of one weight, fp32: a pair ``B (out, R)``, ``A (R, in)``, or ``matrix (out, in)``."""

    factors: tuple[Tensor, Tensor] | None = None
    matrix: Tensor | None = None

    def dense(self) -> Tensor:
        """The change as a matrix ``(out, in)``, fp32."""
        if self.matrix is not None:
            return self.matrix
        assert self.factors is not None
        b, a = self.factors
        return (b.double() @ a.double()).float()

    def apply(self, x: Tensor) -> Tensor:
        """``change @ x`` for ``x`` of shape ``(..., in)``."""
        if self.matrix is not None:
            return torch.nn.functional.linear(x, self.matrix)
        assert self.factors is not None
        b, a = self.factors
        return torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)

    def to(self, device: torch.device | str) -> Change:
        """The same change on another device."""
        if self.matrix is not None:
            return Change(matrix=self.matrix.to(device))
        assert self.factors is not None
        return Change(factors=(self.factors[0].to(device), self.factors[1].to(device)))

    @property
    def nbytes(self) -> int:
        """Bytes of this form."""
        return sum(tensor.nbytes for tensor in ((self.matrix,) if self.matrix is not None else self.factors or ()))


class Delta:
    """The accumulated update of the whole model, by absolute layer name.

    Attributes
    ----------
    version : int
        Number of updates added; version 0 is the base.
    """

    def __init__(self) -> None:
        self.version = 0
        self._changes: dict[str, Change] = {}

    def add(self, update: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add the update of one round: ``(B, A)`` by layer name, scales and weights folded in."""
        for name, (b, a) in update.items():
            self._changes[name] = _add(self._changes.get(name), b.detach().float().cpu(), a.detach().float().cpu())
        self.version += 1

    def changes(self) -> Mapping[str, Change]:
        """Every layer's change."""
        return self._changes

    def below(self, names: set[str]) -> dict[str, Change]:
        """The changes of those layers that a part holds."""
        return {name: change for name, change in self._changes.items() if name in names}


def pack(changes: Mapping[str, Change]) -> dict[str, Tensor]:
    """Changes as flat tensors by name, for a message or a file."""
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        if change.matrix is not None:
            tensors[f"{name}:dense"] = change.matrix
        else:
            assert change.factors is not None
            tensors[f"{name}:B"], tensors[f"{name}:A"] = change.factors
    return tensors


def unpack(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Change]]:
    """The inverse of :func:`pack`, one layer at a time."""
    for key, tensor in tensors.items():
        name, _, role = key.rpartition(":")
        if role == "dense":
            yield name, Change(matrix=tensor)
        elif role == "B":
            yield name, Change(factors=(tensor, tensors[f"{name}:A"]))


def _add(change: Change | None, b: Tensor, a: Tensor) -> Change:
    if change is not None and change.matrix is not None:
        return Change(matrix=(change.matrix.double() + b.double() @ a.double()).float())
    if change is not None:
        assert change.factors is not None
        b = torch.cat([change.factors[0], b], dim=1)
        a = torch.cat([change.factors[1], a], dim=0)
    if b.shape[1] * (b.shape[0] + a.shape[1]) >= b.shape[0] * a.shape[1]:
        return Change(matrix=(b.double() @ a.double()).float())
    return Change(factors=thin(b, a))


def thin(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The thinnest pair with the product ``B A`` to fp32 rounding; the given pair when it is as thin already.

    Parameters
    ----------
    b, a : Tensor
        ``(out, R)`` and ``(R, in)``, fp32.
    """
    q_left, r_left = torch.linalg.qr(b.double())
    q_right, r_right = torch.linalg.qr(a.double().T)
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.T)
    # What lies below fp32 rounding of the largest singular value cannot be told from rounding of the factors.
    threshold = float(sigma.max()) * torch.finfo(torch.float32).eps / 8 if sigma.numel() else 0.0
    rank = int((sigma > threshold).sum())
    if rank >= b.shape[1]:
        return b, a
    root = sigma[:rank].sqrt()
    return (q_left @ (u[:, :rank] * root)).float(), ((root[:, None] * vh[:rank]) @ q_right.T).float()
