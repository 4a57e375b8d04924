"""Multi-adapter batching: several clients' adapters on one frozen base, every layer run once for the examples of all.

A batch holds the examples of one client after those of another, padded to the longest. A layer computes ``W x`` once
for all of them, and each client's ``s B A x`` on its own. No example sees another one, so outputs and gradients are
those of clients that come one after another, up to the rounding of larger products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hsplitlora_flwr.lora.layers import AdaptedLinear
from hsplitlora_flwr.models.parts import ModelPart


@dataclass(frozen=True)
class Share:
    """One client's examples of a batch: their number, their length before padding, and its layers by absolute name."""

    examples: int
    length: int
    layers: Mapping[str, AdaptedLinear]


@dataclass
class AdapterBatch:
    """Whose examples the batch under way holds, in their order."""

    shares: Sequence[Share] = field(default_factory=list)

    @property
    def examples(self) -> int:
        """Of all clients together."""
        return sum(share.examples for share in self.shares)


class MultiAdapterLinear(nn.Module):
    """A frozen linear layer on which every example meets the adapter of its own client.

    Parameters
    ----------
    base : nn.Module
        The shared layer, with the accumulated update where that stands beside it.
    name : str
        Its absolute name.
    batch : AdapterBatch
        Says whose examples come.
    """

    is_adapted_linear = True

    def __init__(self, base: nn.Module, name: str, batch: AdapterBatch) -> None:
        super().__init__()
        self.base = base
        self._name, self._batch = name, batch

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that looks at its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def adapters(self) -> list[AdaptedLinear]:
        """Those of the clients whose examples the batch holds."""
        return [share.layers[self._name] for share in self._batch.shares if self._name in share.layers]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        shares = self._batch.shares
        if not self.adapters:
            return y
        # Some models flatten (batch, seq) on the way to a layer.
        examples = x.reshape(self._batch.examples, -1, x.shape[-1])
        parts = examples.split([share.examples for share in shares])
        terms = [self._term(share, part, y) for share, part in zip(shares, parts, strict=True)]
        return y + torch.cat(terms).reshape(y.shape)

    def _term(self, share: Share, x: Tensor, y: Tensor) -> Tensor:
        """What a client's adapter adds to its examples ``(batch, seq, in)``: nothing behind their own length."""
        if self._name not in share.layers:
            return y.new_zeros(*x.shape[:-1], y.shape[-1])
        term = share.layers[self._name].low_rank(x[:, : share.length]).to(y.dtype)
        return nn.functional.pad(term, (0, 0, 0, x.shape[1] - share.length))


def batch_adapters(part: ModelPart) -> AdapterBatch:
    """Make all linear layers of ``part`` serve several clients; the batch that they get is to be said each time."""
    batch = AdapterBatch()
    for name, module in list(part.linears()):
        part.replace(name, MultiAdapterLinear(module, name, batch))
    return batch


def adapted_layers(part: ModelPart) -> dict[str, AdaptedLinear]:
    """The layers of a client's part that have an adapter, by absolute name."""
    return {
        name: module for name, module in part.linears() if isinstance(module, AdaptedLinear) and module.spec is not None
    }
