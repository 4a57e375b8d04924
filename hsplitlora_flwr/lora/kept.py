"""A shared half from one round to the next: its adapters and their optimizer continue (``server.between_rounds=keep``).

``W_0 + delta`` is the model that a round starts from, and ``S = s B A`` is what an adapter had become when the last
round ended, as part of ``delta``. The adapter goes on from there over ``W_0 + delta - S``: the model is the same, and
its factors and the optimizer's moments are those of the last step. What it adds in a round is its change, with the
weights of the clients that trained it:

    dW = (sum over those of p_i) (s B A - S)  +  sum over the others of p_i s_i B_i A_i

If all clients trained it, the new model is ``W_0 + delta - S + s B A``, and is stored as just that: nothing is
subtracted and added again, so neither ranks nor rounding errors accumulate. An adapter that has another rank in a new
plan starts anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from hsplitlora_flwr.lora.aggregation import Factors, SharedUpdate, Update
from hsplitlora_flwr.lora.layers import AdapterSpec
from hsplitlora_flwr.lora.update import AccumulatedUpdate, Change, with_adapter


class KeptHalf:
    """What the shared half goes on from.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        As :meth:`hsplitlora_flwr.training.half.SharedHalf.tensors` gave them in the last round; none before the first.

    Attributes
    ----------
    tensors : dict[str, Tensor]
        Those that the round goes on from, and after it what it left.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.tensors = dict(tensors or {})
        self._start: dict[str, Factors] = {}
        self._beside: Mapping[str, Change] = {}

    def begin(self, specs: Mapping[str, AdapterSpec]) -> None:
        """A round with adapters of these ranks, by absolute layer name: those of another rank start anew."""
        known = {key.rpartition(":")[0]: len(a) for key, a in self.tensors.items() if key.endswith(_A)}
        going_on = [name for name, rank in known.items() if name in specs and specs[name].rank == rank]
        self.tensors = {key: tensor for key, tensor in self.tensors.items() if key.rpartition(":")[0] in going_on}
        self._start = {
            name: (self.tensors[name + _B].cpu(), self.tensors[name + _A].cpu() * specs[name].scale)
            for name in going_on
        }

    def beside(self, accumulated: AccumulatedUpdate) -> Mapping[str, Change]:
        """What weights have of the update, besides the adapters that go on."""
        self._beside = accumulated.without(self._start)
        return self._beside

    def update(self, adapters: Update, trained_by: Mapping[str, Collection[int]]) -> SharedUpdate:
        """What the round made of the adapters, as the sum of the clients takes it: their change."""
        return SharedUpdate({name: self._change(name, pair) for name, pair in adapters.items()}, trained_by)

    def end(self, tensors: Mapping[str, Tensor], adapters: Update, settled: Collection[str]) -> dict[str, Change]:
        """The round is over.

        Parameters
        ----------
        tensors : Mapping[str, Tensor]
            What the next round goes on from.
        adapters : Mapping[str, tuple[Tensor, Tensor]]
            ``(B, s A)`` as they ended.
        settled : Collection[str]
            Layers that all clients of the round trained.

        Returns
        -------
        dict[str, Change]
            Of those the whole change, which the update and the adapter beside it add up to.
        """
        wholes = {name: with_adapter(self._beside.get(name), adapters[name]) for name in settled}
        self.tensors, self._start, self._beside = dict(tensors), {}, {}
        return wholes

    def _change(self, name: str, adapter: Factors) -> Factors:
        if name not in self._start:
            return adapter
        (b, a), (start_b, start_a) = adapter, self._start[name]
        return torch.cat([b, start_b], dim=1), torch.cat([a, -start_a])


_B, _A = ":B/adapter", ":A/adapter"
