"""The accumulated update of the model: exact, bounded, versioned, and kept apart from the base.

``W_eff = W_0 + change``, where every round adds the factors of its update to the change of each layer (docs/method.md,
section 4). A change is stored in the exact form of the fewest bytes: the factors as they are, recompressed factors of
smaller rank with the same product, or the dense matrix. Recompression is tried whenever the rank passes a power of two:
it takes longer than the rest of a round's aggregation, and mostly finds nothing, since adapters start afresh every
round.

The server's :class:`AccumulatedUpdate` remembers the latest updates of a layer, as long as they have fewer bytes than
the dense matrix. :meth:`AccumulatedUpdate.since` brings a client up to date from there, however many rounds it missed:
for each layer that changed, either the updates that the client lacks or the whole change, whichever has fewer bytes.
The client's own adds those updates one by one, as the server did, so both make the same roundings and nothing drifts
apart. What a client holds is known by the *state* of each layer, a digest of how its change came about: a layer that
the client never held, a store of another run, or one from before the server went back to a checkpoint is recognised,
and gets the whole change.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType

import torch
from torch import Tensor

from hsplitlora_flwr.lora.aggregation import Factors, Update, is_finite

BASE = "0"
"""The state of a layer without a change. Later states are ``version-digest``."""


class UpdateError(ValueError):
    """An update, a patch or a file that does not fit the accumulated update; the text says what to do."""


@dataclass(frozen=True)
class Change:
    """A change of one weight, fp32: a pair ``B (out, R)``, ``A (R, in)``, or ``matrix (out, in)``."""

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
    def tensors(self) -> tuple[Tensor, ...]:
        """``(B, A)`` or ``(matrix,)``."""
        return self.factors or (() if self.matrix is None else (self.matrix,))

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.tensors[0].shape[0], self.tensors[-1].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of this form."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class LayerPatch:
    """What brings a layer from the state ``start`` to ``end``: ``updates``, added one by one.

    From :data:`BASE`, ``updates`` are the one whole change, whatever the layer held.
    """

    start: str
    end: str
    updates: tuple[Change, ...]


@dataclass(frozen=True)
class Patch:
    """What brings a store to ``version``, by absolute layer name; layers that need nothing are left out."""

    version: int
    layers: Mapping[str, LayerPatch]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_nbytes(part.updates) for part in self.layers.values())

    def pack(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and text for a message or a file; a whole change has the keys of :func:`pack`."""
        changes = {_key(n, p.start, i): update for n, p in self.layers.items() for i, update in enumerate(p.updates)}
        states = {name: (part.start, part.end, len(part.updates)) for name, part in self.layers.items()}
        return pack(changes), {"version": str(self.version), "states": json.dumps(states)}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> Patch:
        """The inverse of :meth:`pack`; raises :class:`UpdateError` if tensors and text are not of one patch."""
        try:
            changes, states = dict(unpack(tensors)), json.loads(text["states"])
            layers = {
                name: LayerPatch(start, end, tuple(changes[_key(name, start, i)] for i in range(count)))
                for name, (start, end, count) in states.items()
            }
            return cls(int(text["version"]), layers)
        except (KeyError, ValueError) as error:
            raise UpdateError(f"tensors and text are not those of one patch ({error!r}); send both again") from error


class AccumulatedUpdate:
    """The accumulated update of the whole model, or of the layers that a client holds, by absolute layer name.

    Parameters
    ----------
    rank_cap : int
        Largest rank of a layer's change; a change above it is replaced by its best approximation of that rank (a
        truncated SVD), for everybody, the server included. 0 = none: the change is exact.

    Attributes
    ----------
    version : int
        Number of updates added; version 0 is the base.
    dropped, dropped_total : float
        What the rank cap took in the last round, and in all rounds since this store was made: the sum over layers of
        the squared Frobenius norm that was cut off, as a share of the sum before the cut.
    """

    def __init__(self, rank_cap: int = 0) -> None:
        if rank_cap < 0:
            raise UpdateError(f"rank_cap={rank_cap} is negative; give the largest rank, or 0 for none")
        self.rank_cap = rank_cap
        self.version = 0
        self.dropped = self.dropped_total = 0.0
        self._layers: dict[str, _Layer] = {}
        self._cut = self._energy = 0.0

    def add(self, update: Update, wholes: Mapping[str, Change] = MappingProxyType({})) -> dict[str, float]:
        """Add the update of one round: ``(B, A)`` by layer name, scales and weights folded in.

        The store keeps the tensors where they are fp32 on the CPU; they are not to be changed after.

        Parameters
        ----------
        update : Mapping[str, tuple[Tensor, Tensor]]
            What the round adds.
        wholes : Mapping[str, Change]
            The whole change of layers of which more is known than that sum: it takes the sum's place.

        Returns
        -------
        dict[str, float]
            The share of its squared Frobenius norm that each layer lost to the rank cap; empty without a cap.

        Raises
        ------
        UpdateError
            If shapes disagree or values are not finite; then nothing was added.
        """
        return self._finish_round(
            {
                name: _Layer.whole(wholes[name], self.version + 1)
                if name in wholes
                else self._layers.get(name, _Layer(_zero(change.shape))).plus(change, self.version + 1)
                for name, change in _checked(update, self._layers).items()
            }
        )

    def replace(self, update: Update) -> dict[str, float]:
        """Make the update of one round the whole change: layers that it does not name go back to the base.

        For methods that keep one global adapter over the rounds. Returns and raises what :meth:`add` does.
        """
        changes = {name: _zero(layer.change.shape) for name, layer in self._layers.items()}
        changes |= _checked(update, self._layers)
        return self._finish_round({name: _Layer.whole(change, self.version + 1) for name, change in changes.items()})

    def changes(self) -> Mapping[str, Change]:
        """Every layer's change."""
        return {name: layer.change for name, layer in self._layers.items()}

    def without(self, adapters: Update) -> dict[str, Change]:
        """Every layer's change less the adapters ``(B, A)`` that are to go on over it."""
        changes = dict(self.changes())
        return changes | {name: _less(changes.get(name), pair) for name, pair in adapters.items()}

    def below(self, names: Collection[str]) -> dict[str, Change]:
        """The changes of those layers that a part holds."""
        return {name: layer.change for name, layer in self._layers.items() if name in names}

    def held(self) -> dict[str, str]:
        """The state of every layer, for the server's :meth:`since`."""
        return {name: layer.states[-1] for name, layer in self._layers.items()}

    def since(self, held: int | Mapping[str, str], names: Collection[str] | None = None) -> Patch:
        """What a store lacks that holds an earlier version, whichever form has the fewest bytes for each layer.

        Parameters
        ----------
        held : int or Mapping[str, str]
            What the store holds: its :meth:`held`; or a version of *this* store, of which it holds every layer. States
            and versions that are not known here, or not any more, get the whole change.
        names : Collection[str], optional
            The layers that are wanted; all by default.
        """
        if isinstance(held, int) and not 0 <= held <= self.version:
            held = {}
        layers = {}
        for name, layer in self._layers.items():
            state = layer.state_at(held) if isinstance(held, int) else held.get(name, BASE)
            if state != layer.states[-1] and (names is None or name in names):
                layers[name] = layer.since(state)
        return Patch(self.version, layers)

    def apply(self, patch: Patch) -> None:
        """Take over what :meth:`since` of another store gave for this one.

        Raises
        ------
        UpdateError
            If the patch continues a state that this store does not hold; then nothing was changed.
        """
        held = self.held()
        for name, part in patch.layers.items():
            if part.start not in (BASE, held.get(name, BASE)):
                raise UpdateError(
                    f"layer '{name}': the patch to version {patch.version} continues state '{part.start}', but this "
                    f"store holds '{held.get(name, BASE)}'; ask for since(held()) of this store"
                )
        for name, part in patch.layers.items():  # one after another, so that no two whole stores are in memory
            start = () if part.start == BASE else (self._layers[name].change,)
            self._layers[name] = _Layer(reduce(_sum, (*start, *part.updates)), (part.end,))
        self.version = patch.version

    def _finish_round(self, layers: dict[str, _Layer]) -> dict[str, float]:
        shares: dict[str, float] = {}
        round_cut = round_energy = 0.0
        for name, layer in layers.items() if self.rank_cap else ():
            change, cut, energy = _truncate(layer.change, self.rank_cap)
            if cut:  # the sum of the updates is not the change any more
                layers[name] = _Layer.whole(change, self.version + 1)
            shares[name] = _share(cut, energy)
            round_cut, round_energy = round_cut + cut, round_energy + energy
        self._layers |= layers
        self.version += 1
        self._cut, self._energy = self._cut + round_cut, self._energy + round_energy
        self.dropped, self.dropped_total = _share(round_cut, round_energy), _share(self._cut, self._energy)
        return shares


@dataclass(frozen=True)
class _Layer:
    """A layer's change, and the latest updates that led to it: ``updates[i]`` from ``states[i]`` to the next."""

    change: Change
    states: tuple[str, ...] = (BASE,)
    updates: tuple[Change, ...] = ()

    @classmethod
    def whole(cls, change: Change, version: int) -> _Layer:
        return cls(change, (f"{version}-{_name(change)}",))

    def plus(self, update: Change, version: int) -> _Layer:
        if not update.nbytes:
            return self
        states = (*self.states, f"{version}-{_name(update, self.states[-1])}")
        updates = (*self.updates, update)
        while _nbytes(updates) >= 4 * math.prod(update.shape):  # not below those of the dense matrix
            states, updates = states[1:], updates[1:]
        return _Layer(_sum(self.change, update), states, updates)

    def state_at(self, version: int) -> str:
        known = [state for state in self.states if int(state.partition("-")[0]) <= version]
        return known[-1] if known else BASE

    def since(self, state: str) -> LayerPatch:
        if state != BASE and state in self.states:
            updates = self.updates[self.states.index(state) :]
            if _nbytes(updates) < self.change.nbytes:
                return LayerPatch(state, self.states[-1], updates)
        return LayerPatch(BASE, self.states[-1], (self.change,))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _nbytes(changes: Iterable[Change]) -> int:
    return sum(change.nbytes for change in changes)


def _key(name: str, start: str, index: int) -> str:
    return name if start == BASE else f"{name}+{index}"


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


def _name(change: Change, *before: str) -> str:
    """A digest of what came before and of a change's sums along each rank: to tell changes apart, not to check them."""
    return digest([*before, *(tensor.sum(dim) for dim, tensor in enumerate(change.tensors))])


def digest(parts: Iterable[str | Tensor]) -> str:
    """A name for texts and CPU tensors: 16 hexadecimal digits, which differ when a bit or a shape does."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            total.update(part.contiguous().numpy().data)
        else:
            total.update(f"{len(part)}:{part}".encode())
    return total.hexdigest()[:16]


def recompress(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the smallest rank with the product ``B A`` to fp32 rounding; the given ones if that is their rank.

    Parameters
    ----------
    b, a : Tensor
        ``(out, R)`` and ``(R, in)``, fp32.
    """
    r_left, r_right = (torch.linalg.qr(factor.double(), mode="r").R for factor in (b, a.T))
    sigma = torch.linalg.svdvals(r_left @ r_right.T)
    tail = sigma.square().flip(0).cumsum(0).flip(0).sqrt()  # tail[k]: norm of what rank k leaves out
    # Below the unit roundoff of fp32, it cannot be told from rounding of the factors.
    rank = int((tail > tail[:1] * torch.finfo(torch.float32).eps / 2).sum())
    return (b, a) if rank >= b.shape[1] else _balanced(*_svd(Change(factors=(b, a))), rank)


def _svd(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """``U (out, k)``, the singular values ``(k,)`` and ``V^T (k, in)`` of a change, fp64."""
    if change.factors is None:
        u, sigma, vh = torch.linalg.svd(change.dense().double(), full_matrices=False)
        return u, sigma, vh
    b, a = change.factors
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(b.double()), torch.linalg.qr(a.T.double())
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, sigma, vh @ q_right.T


def _balanced(u: Tensor, sigma: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading part of a singular value decomposition as an fp32 pair, the singular values shared out evenly."""
    root = sigma[:rank].sqrt()
    return (u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()


def _zero(shape: tuple[int, int]) -> Change:
    return Change(factors=(torch.zeros(shape[0], 0), torch.zeros(0, shape[1])))


def _smallest(b: Tensor, a: Tensor) -> Change:
    """The product of a pair as a change: as that pair, or dense where this has no more bytes."""
    pair = Change(factors=(b.contiguous(), a.contiguous()))
    return pair if b.shape[1] * (b.shape[0] + a.shape[1]) < b.shape[0] * a.shape[1] else Change(matrix=pair.dense())


def _sum(change: Change, update: Change) -> Change:
    if not change.nbytes:
        return update
    if change.factors is not None and update.factors is not None:
        (b, a), (new_b, new_a) = change.factors, update.factors
        b, a, known = torch.cat([b, new_b], dim=1), torch.cat([a, new_a], dim=0), b.shape[1]
        # What is tried follows from the two alone, so that server and clients do the same.
        passes_power_of_two = b.shape[1].bit_length() > known.bit_length()
        return _smallest(*recompress(b, a)) if passes_power_of_two else _smallest(b, a)
    total = change.dense().double()
    if update.factors is not None:
        total.addmm_(update.factors[0].double(), update.factors[1].double())
    else:
        total += update.dense()
    return Change(matrix=total.float())


def with_adapter(change: Change | None, adapter: Factors) -> Change:
    """A change, or none yet, and an adapter ``(B, A)`` on top; :meth:`AccumulatedUpdate.without` takes it off again.

    In factors the adapter is the last of them, to the last bit.
    """
    b, a = (factor.detach().to("cpu", torch.float32) for factor in adapter)
    if change is None or not change.nbytes:
        return _smallest(b, a)
    if change.factors is None:
        return _sum(change, Change(factors=(b, a)))
    return _smallest(torch.cat([change.factors[0], b], dim=1), torch.cat([change.factors[1], a]))


def _less(change: Change | None, adapter: Factors) -> Change:
    """A change, or none yet, less an adapter."""
    b, a = (factor.detach().to("cpu", torch.float32) for factor in adapter)
    if change is None:
        change = _zero((len(b), a.shape[1]))
    if change.factors is not None and change.factors[1].shape[0] >= len(a):
        rank = change.factors[1].shape[0] - len(a)
        whole_b, whole_a = change.factors
        if torch.equal(whole_b[:, rank:], b) and torch.equal(whole_a[rank:], a):
            return Change(factors=(whole_b[:, :rank].contiguous(), whole_a[:rank].contiguous()))
    return _sum(change, Change(factors=(-b, a)))


def _truncate(change: Change, rank: int) -> tuple[Change, float, float]:
    """The best approximation of ``rank``, the squared Frobenius norm that it lacks, and that of the whole change."""
    u, sigma, vh = _svd(change)
    energy = sigma.square()
    if min(len(sigma), change.tensors[0].shape[1]) <= rank:
        return change, 0.0, float(energy.sum())
    return _smallest(*_balanced(u, sigma, vh, rank)), float(energy[rank:].sum()), float(energy.sum())


def _checked(update: Update, layers: Mapping[str, _Layer]) -> dict[str, Change]:
    """The update as changes of their own, fp32 on the CPU, each in its smallest exact form."""
    changes = {}
    for name, (b, a) in update.items():
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise UpdateError(
                f"layer '{name}': B {tuple(b.shape)} and A {tuple(a.shape)} do not share a rank; "
                "(out, r) and (r, in) are needed"
            )
        shape = (b.shape[0], a.shape[1])
        if name in layers and layers[name].change.shape != shape:
            raise UpdateError(f"layer '{name}' is {layers[name].change.shape}, and its update is {shape}")
        if not (is_finite(b) and is_finite(a)):
            raise UpdateError(f"layer '{name}': the update is not finite; lower train.lr or set train.clip")
        if not all(factor.numel() and any(factor.aminmax()) for factor in (b, a)):
            b, a = b[:, :0], a[:0]
        changes[name] = _smallest(*(factor.detach().to("cpu", torch.float32) for factor in (b, a)))
    return changes
