"""What a split point and ranks cost: bytes of memory, operations of a step, bytes on the wire (docs/method.md, 2).

The paper's plan needs to know what client ``i`` with split ``l`` and ranks ``r_m`` takes. Everything follows from the
model's configuration: the model is built without memory for its weights, and one step of each kind of block on fake
tensors shows what autograd keeps (:mod:`hsplitlora_flwr.planning.trace`). So a plan for a 70B model needs no weights.

**Memory of a client**, in bytes, is the larger of what loading and what training take:

    loading  = process + weights(l) + update(l) + the largest matrix in fp32
    training = process + weights(l) + sum over m < l of r_m (in + out) x bytes per adapter parameter
               + activations kept for backward + the largest temporary

- *Weights*: embeddings and blocks ``0 .. l - 1`` in the dtype of the base, or quantised. With the labels, a client also
  holds the final norm and the head, whose step may be the largest temporary.
- *Bytes per adapter parameter*: its value, its gradient and the optimizer's states.
- *Activations*: from the lowest block with an adapter up, for every micro-batch in flight. Under activation
  checkpointing a block keeps its input alone, and the rest of one block becomes a temporary.
- *Scores*: where weights are scored on the way, some rows of one weight's gradient are a temporary too.
- *Update*: the accumulated update of earlier rounds. Merged into fp32 or fp64 weights it is gone when training starts;
  beside bf16, 8-bit or 4-bit weights it stays.
- A client *without adapters* computes forward alone: it keeps no activations, and no gradient comes down to it.

**Memory of the server**: the whole base and update, and for the clients adapters above their cuts, activations of the
passes that can meet, and frames that wait (:meth:`CostModel.server_bytes`).

**Operations** are floating-point operations of one step, a multiplication and an addition counting as two. A linear
layer takes ``2 tokens in out`` forward and, frozen, as many backward for the gradient of its input; an adapter
``2 tokens r (in + out)``, three times with its backward pass. **Wire**: the tensors of a step, each way.

Batches count as padded to their longest row. Weights are read through a memory map, so rows of the embeddings that no
text has used yet are not resident: a short run stays below the prediction by as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from hsplitlora_flwr.lora.layers import takes_changes
from hsplitlora_flwr.models.families import Family, block_config
from hsplitlora_flwr.models.quantisation import weight_bytes
from hsplitlora_flwr.planning.budget import PlanError
from hsplitlora_flwr.planning.temporaries import Temporaries
from hsplitlora_flwr.planning.trace import ModelTrace, trace_model
from hsplitlora_flwr.planning.workload import Workload
from hsplitlora_flwr.transport.codecs import CODECS, packed_bytes


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block: its name, block and sizes, and what an adapter on it makes autograd keep."""

    name: str
    block: int
    in_features: int
    out_features: int
    input_id: int = field(compare=False)
    """Layers of a block with the same number read the same tensor; it is kept once."""
    input_bytes: int = field(compare=False)
    """Bytes of that tensor, over all micro-batches in flight, if a block without adapters would not keep it; else 0."""

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of an adapter: ``rank (in + out)``."""
        return rank * (self.in_features + self.out_features)


class _Part(NamedTuple):
    """Blocks ``first .. last - 1``. The backward pass reaches down to the lowest one with an adapter or, with
    ``to_first``, through all of them, as on the server, which returns the gradient of the cut activation."""

    first: int
    last: int
    to_first: bool = False


class CostModel:
    """Memory, operations and bytes on the wire of clients and server, by split points and ranks.

    Parameters
    ----------
    config : PretrainedConfig
        The model's configuration.
    family : Family
        Its layout.
    workload : Workload
        Batch, length and dtype of a step.
    targets : tuple of str, optional
        Names of the linear layers that may get an adapter; all when None.
    update_rank : int, optional
        The highest rank that the accumulated update of a layer can reach; when None it may become dense.
    adapter_rank : int
        The highest rank of an adapter, with which the largest temporary is traced.

    Attributes
    ----------
    num_blocks : int
        ``L``.
    tokens : int
        Tokens of a micro-batch, padding included.
    layers, all_layers : list of Layer
        Those that may get an adapter, and all linear layers of the blocks, in order.
    total_parameters, embedding_parameters, head_parameters : int
        Of the base; those of the embeddings; those of final norm and head, or the norm alone where the head is tied.
    cut_bytes : int
        Bytes of a micro-batch's cut activation, ``(batch, seq, hidden)``, in the dtype of the base.
    temporary_bytes, head_bytes, forward_bytes : int
        The largest temporaries of a client: blocks, head, and blocks without adapters.

    Raises
    ------
    PlanError
        If ``targets`` names a layer that the model does not have.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        family: Family,
        workload: Workload,
        targets: tuple[str, ...] | None = None,
        update_rank: int | None = None,
        adapter_rank: int = 1,
    ) -> None:
        self.num_blocks = int(config.num_hidden_layers)
        self.workload = workload
        self.tokens = workload.batch_size * workload.sequence_length
        shape = workload.batch_size, workload.sequence_length
        trace = trace_model(config, family, workload.dtype, *shape, adapter_rank)
        self._client_has_labels = workload.labels == "client"

        self.all_layers = _layers(trace, family, workload.in_flight)
        self.layers = _targeted(self.all_layers, targets)
        matrices = [layer.in_features * layer.out_features for layer in self.all_layers]
        self._largest_matrix = max(matrices)

        # Prefix sums over blocks 0 .. l - 1: parameters, bytes that quantising saves, bytes of the largest update.
        saved, update = [0] * self.num_blocks, [0] * self.num_blocks
        for layer, matrix in zip(self.all_layers, matrices, strict=True):
            held = weight_bytes(layer.out_features, layer.in_features, workload.item, workload.quantise)
            saved[layer.block] += matrix * workload.item - held
        for layer in self.layers:
            matrix = layer.in_features * layer.out_features
            factors = matrix if update_rank is None else layer.adapter_parameters(update_rank)
            update[layer.block] += 4 * min(matrix, factors)
        parameters = [trace.blocks[kind].parameters for kind in trace.kinds]
        self._block_parameters, self._saved, self._update = (
            [0, *accumulate(each)] for each in (parameters, saved, update)
        )
        self.embedding_parameters = trace.embeddings
        self.head_parameters = trace.beside_blocks - trace.embeddings
        self.total_parameters = trace.beside_blocks + self._block_parameters[-1]

        hidden = int(config.hidden_size)
        self.cut_bytes = self.tokens * hidden * workload.item
        self._sent = workload.width or hidden  # numbers per token that cross the cut
        # What the block that keeps most keeps for backward: activations kept, and under activation checkpointing.
        kept = max(each.kept for each in trace.blocks.values())
        self._block_bytes = workload.in_flight * kept, workload.in_flight * self.cut_bytes
        self._temporaries = Temporaries.of(workload, trace, hidden, self._largest_matrix, adapter_rank)
        self.temporary_bytes = self._temporaries.block
        self.head_bytes, self.forward_bytes = self._temporaries.head, self._temporaries.forward

        # Operations are those of the average block: time is an estimate in any case.
        self.linear_parameters = sum(matrices) / self.num_blocks
        self._head_flops = 2.0 * self.tokens * int(config.vocab_size) * hidden
        first = block_config(config, 0)
        heads = int(first.num_attention_heads)
        head_size = int(getattr(first, "head_dim", None) or hidden // heads)
        self._attention_flops = 4.0 * self.tokens * workload.sequence_length * heads * head_size

    # ------------------------------------------------------------------ memory of a client

    def client_parameters(self, split: int) -> int:
        """Base parameters of a client: embeddings, its blocks and, with the labels, the final norm and the head.

        A head that is tied to the embeddings counts once.
        """
        above = self._block_parameters[-1] - self._block_parameters[split]
        return self.total_parameters - above - (0 if self._client_has_labels else self.head_parameters)

    def client_weight_bytes(self, split: int) -> int:
        """Bytes of :meth:`client_parameters` as they are stored."""
        return self.client_parameters(split) * self.workload.item - self._saved[split]

    @property
    def total_weight_bytes(self) -> int:
        """Bytes of the whole base as it is stored."""
        return self.total_parameters * self.workload.item - self._saved[-1]

    def client_bytes(
        self,
        split: int,
        ranks: Mapping[str, int],
        process_bytes: int = 0,
        *,
        checkpointing: bool = False,
        updated: bool = True,
    ) -> int:
        """Predicted peak memory of a client process; the sum of :meth:`memory_parts`.

        Parameters
        ----------
        split : int
            ``l``, the number of its blocks.
        ranks : Mapping[str, int]
            ``r_m`` by absolute layer name; layers at or above ``split`` are the server's and do not count.
        process_bytes : int
            What the process takes for itself; see :func:`hsplitlora_flwr.training.memory.process_bytes`.
        checkpointing : bool
            Activation checkpointing of its blocks.
        updated : bool
            Whether the client gets an accumulated update, as from the second round on.
        """
        return sum(
            self.memory_parts(split, ranks, process_bytes, checkpointing=checkpointing, updated=updated).values()
        )

    def memory_parts(
        self,
        split: int,
        ranks: Mapping[str, int],
        process_bytes: int = 0,
        *,
        checkpointing: bool = False,
        updated: bool = True,
    ) -> dict[str, int]:
        """Predicted peak memory of a client process by what takes it, in bytes; parameters as for :meth:`client_bytes`.

        Returns
        -------
        dict[str, int]
            ``weights``, ``adapters`` (with gradients and optimizer states), ``activations``, ``update``, ``temporary``
            and ``process``. ``update`` is what the accumulated update adds to the peak: nothing where it is merged into
            the weights and loading it took less than training then does.
        """
        adapters = self.adapter_bytes(ranks, 0, split)
        return self._parts(
            weights=self.client_weight_bytes(split),
            adapters=adapters,
            activations=self.kept_bytes(ranks, 0, split, checkpointing=checkpointing),
            update=self.update_bytes(split) if updated else 0,
            temporary=self._temporary(self._client_has_labels, checkpointing)
            if adapters
            else self._forward_temporary(),
            process=process_bytes,
        )

    def whole_bytes(
        self, ranks: Mapping[str, int], process_bytes: int = 0, *, checkpointing: bool = False, updated: bool = True
    ) -> int:
        """Predicted peak memory of a client that trains the unsplit model; parameters as for :meth:`client_bytes`."""
        parts = self._parts(
            weights=self.total_weight_bytes,
            adapters=self.adapter_bytes(ranks, 0, self.num_blocks),
            activations=self.kept_bytes(ranks, 0, self.num_blocks, checkpointing=checkpointing),
            update=self.update_bytes(self.num_blocks) if updated else 0,
            temporary=self._temporary(True, checkpointing),
            process=process_bytes,
        )
        return sum(parts.values())

    def _temporary(self, head: bool, checkpointing: bool) -> int:
        """The largest temporary of a part that trains, with or without the head."""
        blocks = self._temporaries.block_checkpointed if checkpointing else self._temporaries.block
        return max(blocks, self._temporaries.head) if head else blocks

    def _forward_temporary(self) -> int:
        """The largest temporary of a client without adapters."""
        return max(self._temporaries.forward, self._temporaries.head if self._client_has_labels else 0)

    def _parts(
        self, weights: int, adapters: int, activations: int, update: int, temporary: int, process: int
    ) -> dict[str, int]:
        """The parts of a client's peak, which comes while it loads or while it trains."""
        if update and takes_changes(getattr(torch, self.workload.dtype), self.workload.quantise):
            update = max(update + 4 * self._largest_matrix - adapters - activations - temporary, 0)
        return {
            "weights": weights,
            "adapters": adapters,
            "activations": activations,
            "update": update,
            "temporary": temporary,
            "process": process,
        }

    # ------------------------------------------------------------------ memory of the server

    def server_bytes(
        self,
        clients: Mapping[str, tuple[int, Mapping[str, int]]],
        process_bytes: int = 0,
        *,
        checkpointing: bool = False,
    ) -> int:
        """Predicted peak memory of the server.

        It holds one base, the accumulated update, and frames of every client that wait. A shared half adds one set of
        adapters from the lowest split up, and one pass from there. Halves of their own add each client's adapters, and
        the largest passes that can meet.

        Parameters
        ----------
        clients : Mapping[str, tuple[int, Mapping[str, int]]]
            ``(split, ranks)`` by client.
        process_bytes, checkpointing
            As for :meth:`client_bytes`, of the server.
        """
        base = self.total_weight_bytes + self.update_bytes(self.num_blocks)
        if self.workload.half == "shared" and clients:
            lowest, ranks = min(clients.values(), key=lambda client: client[0])
            waiting = (len(clients) - 1) * self._temporaries.frames
            one = self.held_bytes(lowest, ranks) + self.pass_bytes(lowest, ranks, checkpointing=checkpointing)
            return process_bytes + base + waiting + one
        held = sum(self.held_bytes(split, ranks) for split, ranks in clients.values())
        passes = sorted(self.pass_bytes(split, ranks, checkpointing=checkpointing) for split, ranks in clients.values())
        at_once = len(passes) if self.workload.passes is None else self.workload.passes
        return process_bytes + base + held + sum(passes[-at_once:])

    def held_bytes(self, split: int, ranks: Mapping[str, int]) -> int:
        """What one client costs the server during the whole round: its adapters from ``split`` up, and its frames."""
        return self.adapter_bytes(ranks, split, self.num_blocks) + self._temporaries.frames

    def pass_bytes(self, split: int, ranks: Mapping[str, int], *, checkpointing: bool = False) -> int:
        """Activations and temporaries of the server while it computes for one client, from ``split`` up.

        A server without the labels keeps them until the client has returned the gradient of its hidden state.
        """
        kept = self.kept_bytes(ranks, split, self.num_blocks, everything=True, checkpointing=checkpointing)
        temporary = self._temporaries.served_checkpointed if checkpointing else self._temporaries.served
        return kept // self.workload.in_flight * self.server_micro_batches + temporary

    @property
    def server_micro_batches(self) -> int:
        """Micro-batches of a client whose activations the server keeps at the same time."""
        return self.workload.in_flight if self._client_has_labels else 1

    # ------------------------------------------------------------------ adapters, activations and update of some blocks

    def adapter_parameters(self, ranks: Mapping[str, int]) -> int:
        """Trainable parameters of a client, both sides together: ``sum_m r_m (in + out)``."""
        return sum(layer.adapter_parameters(ranks.get(layer.name, 0)) for layer in self.layers)

    def adapter_bytes(self, ranks: Mapping[str, int], first: int, last: int) -> int:
        """Bytes of the adapters of blocks ``first .. last - 1`` with their gradients and optimizer states."""
        layers = (layer for layer in self.layers if first <= layer.block < last)
        parameters = sum(layer.adapter_parameters(ranks.get(layer.name, 0)) for layer in layers)
        return parameters * self.workload.adapter_parameter_bytes

    def kept_bytes(
        self,
        ranks: Mapping[str, int],
        first: int,
        last: int,
        *,
        everything: bool = False,
        checkpointing: bool = False,
    ) -> int:
        """Bytes that blocks ``first .. last - 1`` keep for backward, over all micro-batches in flight.

        Nothing is kept below the lowest adapter, unless ``everything`` says that the gradient of the first block's
        input is wanted too, as that of the cut activation is on the server. Beside what a block keeps by itself, an
        adapter keeps its input, once for all adapters that read it, and ``A x``, of shape ``(batch, seq, r)``.
        """
        part = _Part(first, last, everything)
        adapted, lowest = self._trained(ranks, part)
        blocks = (last - lowest) * self.block_bytes(checkpointing)
        if checkpointing:
            return blocks
        inputs = {(layer.block, layer.input_id): layer.input_bytes for layer in adapted}
        low_rank = self._low_rank_bytes(sum(ranks[layer.name] for layer in adapted))
        return blocks + sum(inputs.values()) + self.workload.in_flight * low_rank

    def block_bytes(self, checkpointing: bool = False) -> int:
        """What a block without adapters keeps for backward, over all micro-batches in flight."""
        return self._block_bytes[checkpointing]

    def adapter_price(self, layer: Layer, rank: int, micro_batches: int) -> int:
        """What one more adapter adds to :meth:`adapter_bytes` and, over so many micro-batches, to :meth:`kept_bytes`,
        its input apart."""
        kept = micro_batches * self._low_rank_bytes(rank)
        return layer.adapter_parameters(rank) * self.workload.adapter_parameter_bytes + kept

    def update_bytes(self, split: int) -> int:
        """The accumulated update of blocks ``0 .. split - 1`` at its largest, in fp32: factors, or dense if smaller."""
        return self._update[split]

    def _low_rank_bytes(self, rank: int) -> int:
        """Bytes of ``A x``, ``(batch, seq, rank)``, of one micro-batch."""
        return rank * self.tokens * self.workload.adapter_item

    def _trained(self, ranks: Mapping[str, int], part: _Part) -> tuple[list[Layer], int]:
        """The layers of a part with an adapter, and the lowest block that the backward pass reaches."""
        adapted = [layer for layer in self.layers if part.first <= layer.block < part.last and ranks.get(layer.name, 0)]
        return adapted, part.first if part.to_first else min((layer.block for layer in adapted), default=part.last)

    # ------------------------------------------------------------------ operations of a step

    def client_flops(self, split: int, ranks: Mapping[str, int], *, checkpointing: bool = False) -> float:
        """Floating-point operations of the client in one training step, forward and backward.

        Nothing below the lowest adapted block needs a backward pass. A client with the labels computes the head too, as
        :meth:`server_flops` counts it.
        """
        head = 2 * self._head_flops if self._client_has_labels else 0
        return self._block_flops(_Part(0, split), ranks, checkpointing) + head

    def server_flops(self, split: int, ranks: Mapping[str, int], *, checkpointing: bool = False) -> float:
        """Floating-point operations of the server for one client in one training step.

        The backward pass always reaches the cut. Every position counts as labelled, so the head's share is an upper
        bound.
        """
        head = 0 if self._client_has_labels else 2 * self._head_flops
        return self._block_flops(_Part(split, self.num_blocks, True), ranks, checkpointing) + head

    def whole_flops(self, ranks: Mapping[str, int]) -> float:
        """Floating-point operations of one training step of the unsplit model."""
        return self._block_flops(_Part(0, self.num_blocks), ranks, False) + 2 * self._head_flops

    def scoring_flops(self, ranks: Mapping[str, int], first: int, last: int) -> float:
        """Floating-point operations that scoring the adapted weights of blocks ``first .. last - 1`` adds to a step.

        That is the gradient of each.
        """
        adapted, _ = self._trained(ranks, _Part(first, last))
        return 2.0 * self.tokens * sum(layer.in_features * layer.out_features for layer in adapted)

    def weight_gradient_flops(self, first: int, last: int, *, head: bool = False) -> float:
        """Floating-point operations of a step that forms the gradient of every weight of blocks ``first .. last - 1``.

        That is a third product per weight, beside the one forward and the one backward. A measurement of the importance
        takes it, and so does full fine-tuning, which also trains the head.
        """
        blocks = 3 * (2.0 * self.tokens * self.linear_parameters + self._attention_flops)
        return (last - first) * blocks + (3 * self._head_flops if head else 0)

    def _block_flops(self, part: _Part, ranks: Mapping[str, int], checkpointing: bool) -> float:
        """Operations of a part, forward and as far down as its backward pass reaches."""
        adapted, lowest = self._trained(ranks, part)
        forward = 2.0 * self.tokens * self.linear_parameters + self._attention_flops
        # The gradient of a frozen layer's input costs as much as its forward pass; attention has two operands.
        backward = 2.0 * self.tokens * self.linear_parameters + 2 * self._attention_flops
        low_rank = 2.0 * self.tokens * sum(layer.adapter_parameters(ranks[layer.name]) for layer in adapted)
        if checkpointing:  # a second forward pass
            backward, low_rank = backward + forward, low_rank * 4 / 3
        return (part.last - part.first) * forward + (part.last - lowest) * backward + 3 * low_rank

    # ------------------------------------------------------------------ wire

    def wire_bytes(self, up: str = "float32", down: str = "float32", *, forward_only: bool = False) -> tuple[int, int]:
        """Bytes of the tensors of one training step on the wire, up and down.

        Up go the cut activation, the attention mask and, unless they stay, the labels; down goes the gradient of the
        cut activation, unless the client has no adapters (``forward_only``). Where the labels stay, the server's hidden
        state goes down and its gradient up as well.

        Parameters
        ----------
        up, down : str
            Codec each way: names in :data:`hsplitlora_flwr.transport.codecs.CODECS`.

        Raises
        ------
        PlanError
            If there is no such codec.
        """
        hidden = self.cut_bytes // self.workload.item // self.tokens if self._client_has_labels else 0
        ids = 8 * self.tokens  # int64, of the attention mask and of the labels
        return (
            self._packed_bytes(self._sent, up)
            + self._packed_bytes(hidden, up)
            + ids
            + (0 if self._client_has_labels else ids),
            (0 if forward_only else self._packed_bytes(self._sent, down)) + self._packed_bytes(hidden, down),
        )

    def _packed_bytes(self, numbers: int, codec: str) -> int:
        """Bytes of ``(batch, seq, numbers)`` on the wire."""
        if codec not in CODECS:
            raise PlanError(f"numbers on the wire cannot be {codec!r}; choose one of {', '.join(CODECS)}")
        batch, length = self.workload.batch_size, self.workload.sequence_length
        return packed_bytes((batch, length, numbers), codec) if numbers else 0


def _layers(trace: ModelTrace, family: Family, in_flight: int) -> list[Layer]:
    """All linear layers of a model, in the order of its blocks."""
    return [
        Layer(
            f"{family.block_name(block)}.{name}",
            block,
            layer.in_features,
            layer.out_features,
            layer.input_id,
            in_flight * layer.input_bytes,
        )
        for block, kind in enumerate(trace.kinds)
        for name, layer in trace.blocks[kind].layers.items()
    ]


def _targeted(layers: list[Layer], targets: tuple[str, ...] | None) -> list[Layer]:
    """Those of ``layers`` that ``targets`` name by the last part of their name; all when None."""
    if targets is None:
        return list(layers)
    names = {layer.name.rpartition(".")[2] for layer in layers}
    if missing := [target for target in targets if target not in names]:
        raise PlanError(f"lora.targets names {missing}; the blocks of this model have {sorted(names)}")
    return [layer for layer in layers if layer.name.rpartition(".")[2] in targets]
