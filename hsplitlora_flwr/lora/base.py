"""The frozen base model, loaded once, and the update that every part of it computes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from hsplitlora_flwr.lora.layers import attach_changes, merge_changes, reset_weights, takes_changes
from hsplitlora_flwr.lora.update import Change
from hsplitlora_flwr.models.loading import load_causal_lm
from hsplitlora_flwr.models.parts import BodyModel, ClientModel, ModelPart, ServerModel, WholeModel
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.split import body_part, client_part, middle_part, server_part, whole_model
from hsplitlora_flwr.models.stored import StoredModel

P = TypeVar("P", bound=ModelPart)


class SharedBase:
    """The base model on the server: loaded once, shared by all clients of a round and by evaluation.

    Parameters
    ----------
    path, dtype, device, quantise
        As for :func:`hsplitlora_flwr.models.load_causal_lm`.
    """

    def __init__(
        self, path: str, dtype: str = "float32", device: str | Sequence[str] = "cpu", quantise: str = "none"
    ) -> None:
        self.model = load_causal_lm(path, dtype, device, quantise)
        self.family = find_family(self.model.config)
        self._stored = StoredModel(path, "float64" if dtype == "float64" else "float32", head=False)
        self._in_place = takes_changes(self.model.dtype, quantise)
        self._changes: Mapping[str, Change] = {}

    def update(self, changes: Mapping[str, Change]) -> None:
        """Make every part, existing and to come, compute with ``W_0 + change``; no client may be training.

        Layers without a change are ``W_0`` again, whatever they were before.
        """
        before, self._changes = self._changes, changes
        if self._in_place:
            moved = {name: change for name, change in changes.items() if change is not before.get(name)}
            self._merge(moved, [name for name in before if name not in changes])

    @property
    def inside(self) -> Mapping[str, str]:
        """As of :class:`~hsplitlora_flwr.models.stored.StoredModel`."""
        return self._stored.inside

    def client_part(self, split: int) -> ClientModel:
        """Embeddings and blocks below ``split``, around the shared tensors."""
        return self._with_changes(client_part(self.model, self.family, split))

    def server_part(self, split: int) -> ServerModel:
        """Blocks from ``split`` up, norm and head, around the shared tensors."""
        return self._with_changes(server_part(self.model, self.family, split))

    def body_part(self, split: int) -> BodyModel:
        """Blocks from ``split`` up without norm and head, around the shared tensors."""
        return self._with_changes(body_part(self.model, self.family, split))

    def middle_part(self, first: int, last: int) -> BodyModel:
        """Blocks ``first .. last - 1``, around the shared tensors; ``first`` is at least 1."""
        return self._with_changes(middle_part(self.model, self.family, first, last))

    def whole(self) -> WholeModel:
        """All of the model as one part, around the shared tensors."""
        return self._with_changes(whole_model(self.model, self.family))

    def merged(self) -> PreTrainedModel:
        """The whole model with the update in its weights, rounded to their dtype; parts are not to be made any more.

        Raises
        ------
        TypeError
            If weights are quantised.
        """
        self._merge(self._changes)
        return self.model

    def _merge(self, changes: Mapping[str, Change], reset: Sequence[str] = ()) -> None:
        whole = whole_model(self.model, self.family)
        merge_changes(whole, changes, self._original)
        reset_weights(whole, reset, self._original)

    def _with_changes(self, part: P) -> P:
        if not self._in_place:
            attach_changes(part, self._changes)
        return part

    def _original(self, name: str) -> Tensor:
        return self._stored.tensor(f"{name}.weight")
