"""What a split point and ranks cost in memory, operations and bytes on the wire (HSplitLoRA, section ARMSC).

Everything is read off the model's configuration: the model is built without memory for its weights, and one step of
one block on fake tensors tells what autograd keeps (:mod:`hsplitlora_flwr.planning.trace`). So a plan for a 70B model
needs no weights. A client peaks while it loads or while it trains:

    loading  = process + weights + accumulated update + the largest matrix
    training = process + weights + adapters x (parameter + gradient + optimizer states)
               + activations kept for backward + the largest temporary

Without adapters a client computes forward alone and keeps nothing: its largest temporary is that of one block's forward
pass, and no gradient comes down to it.

An update that is merged into the weights is gone before training starts; one beside them (bf16, 8 or 4 bits) stays.
Where the labels stay with the client it also holds the final norm and the head, and their step may be the largest
temporary. Activations are kept for every micro-batch that is under way. Where they are computed again, a block keeps
its input alone, and all of one block is the temporary. A quantised weight is dequantised for each of its products.

The activations are those of a padded batch of the longest sequences. Weights are read through a memory map, so the rows
of the embeddings that no text has used yet are not resident: a short run stays below the prediction by as much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from transformers import PretrainedConfig

from hsplitlora_flwr.lora.layers import takes_changes
from hsplitlora_flwr.lora.optimizers import OPTIMIZERS
from hsplitlora_flwr.models.families import Family, block_config
from hsplitlora_flwr.models.quantisation import dequantised_bytes, weight_bytes
from hsplitlora_flwr.planning.budget import PlanError
from hsplitlora_flwr.planning.trace import trace_model
from hsplitlora_flwr.transport.codecs import CODECS, packed_bytes

LABELS = ("server", "client")
"""Who may hold the labels, and with them the final norm and the head."""
HALVES = ("shared", "per_client")
"""Whose the server's adapters are: one half that every client's step trains, or one for each client."""


@dataclass(frozen=True)
class Workload:
    """What one training step works on.

    Parameters
    ----------
    batch_size, sequence_length : int
        Of one micro-batch; the longest sequence counts.
    dtype : str
        Dtype of the frozen base.
    optimizer : str
        Of the adapters: a name in :data:`hsplitlora_flwr.lora.optimizers.OPTIMIZERS`.
    momentum : bool
        Whether SGD keeps one.
    labels : {"server", "client"}
        Who computes the loss, from the final norm on.
    in_flight : int
        Micro-batches whose activations are kept at once. A server that computes the loss takes them one by one.
    quantise : {"none", "8bit", "4bit"}
        How the linear layers of the blocks hold their weights; their products are in ``dtype``.
    passes : int, optional
        Clients whose activations the server keeps at once; those of all when None. Of a shared half there is one.
    half : {"shared", "per_client"}
        Whether the server has one adapter for each of its weights, or one for each of its weights and clients.
    width : int
        Numbers in which a token crosses the cut; 0 for all of its hidden state.

    Raises
    ------
    PlanError
        If a value is not one of these.
    """

    batch_size: int
    sequence_length: int
    dtype: str = "float32"
    optimizer: str = "adamw"
    momentum: bool = False
    labels: str = "server"
    in_flight: int = 1
    quantise: str = "none"
    passes: int | None = None
    half: Literal["shared", "per_client"] = "shared"
    width: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise PlanError(f"optimizer={self.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
        if self.labels not in LABELS:
            raise PlanError(f"labels={self.labels!r} is not possible; choose one of {', '.join(LABELS)}")
        if self.half not in HALVES:
            raise PlanError(f"half={self.half!r} is not possible; choose one of {', '.join(HALVES)}")
        if self.in_flight < 1:
            raise PlanError(f"in_flight={self.in_flight!r} is out of range; at least 1")
        if self.passes is not None and self.passes < 1:
            raise PlanError(f"passes={self.passes!r} is out of range; at least 1, or None for all clients")

    @property
    def adapter_parameter_bytes(self) -> int:
        """Bytes per adapter parameter: its value (fp32, or fp64 over fp64), its gradient and the optimizer's states."""
        optimizer = OPTIMIZERS[self.optimizer]
        return self.adapter_item * (2 + optimizer.states + (optimizer.momentum and self.momentum))

    @property
    def item(self) -> int:
        """Bytes of a number of the base."""
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def adapter_item(self) -> int:
        """Bytes of a number of an adapter."""
        return max(self.item, 4)


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
    """Bytes of that tensor, in every micro-batch in flight, when a block alone would not keep it, else 0."""

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of an adapter of ``rank``."""
        return rank * (self.in_features + self.out_features)


class CostModel:
    """Memory of clients and server as a function of split points, ranks, and whether activations are computed again.

    Under activation ``checkpointing`` the blocks of a side keep their input alone and compute the rest again in the
    backward pass.

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
        The highest rank of an adapter: that of the step whose largest temporary is taken.

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
        self.rows = workload.batch_size * workload.sequence_length
        shape = workload.batch_size, workload.sequence_length
        model = trace_model(config, family, workload.dtype, *shape, adapter_rank)
        kinds, traces, beside_blocks = model.kinds, model.blocks, model.beside_blocks
        self.embedding_parameters = model.embeddings
        # What is neither embedding nor block: final norm and head, or the norm alone where the head is tied.
        self.head_parameters = beside_blocks - self.embedding_parameters
        self._client_has_labels = workload.labels == "client"
        in_flight = workload.in_flight
        names = {name for trace in traces.values() for name in _last_names(trace.layers)}
        if missing := [target for target in targets or () if target not in names]:
            raise PlanError(f"lora.targets names {missing}; the blocks of this model have {sorted(names)}")
        self.all_layers = [
            Layer(
                f"{family.block_name(block)}.{name}",
                block,
                *dataclasses.astuple(dataclasses.replace(layer, input_bytes=in_flight * layer.input_bytes)),
            )
            for block, kind in enumerate(kinds)
            for name, layer in traces[kind].layers.items()
        ]
        self.layers = [
            layer for layer in self.all_layers if targets is None or layer.name.rpartition(".")[2] in targets
        ]
        matrices = [layer.in_features * layer.out_features for layer in self.all_layers]
        # Operations are those of the average block: time is an estimate anyway.
        self.linear_parameters, self._largest_matrix = sum(matrices) / self.num_blocks, max(matrices)
        # What quantising takes off the blocks, and the largest update of each.
        saved, update = [0] * self.num_blocks, [0] * self.num_blocks
        for layer, matrix in zip(self.all_layers, matrices, strict=True):
            held = weight_bytes(layer.out_features, layer.in_features, workload.item, workload.quantise)
            saved[layer.block] += matrix * workload.item - held
        for layer in self.layers:
            matrix = layer.in_features * layer.out_features
            factors = matrix if update_rank is None else layer.adapter_parameters(update_rank)
            update[layer.block] += 4 * min(matrix, factors)
        self._block_parameters, self._saved, self._update = (
            [0, *accumulate(each)] for each in ([traces[kind].parameters for kind in kinds], saved, update)
        )
        self.total_parameters = beside_blocks + self._block_parameters[-1]
        self.cut_bytes = self.rows * int(config.hidden_size) * workload.item
        # kept, computed again; of the block that keeps most
        self._block_bytes = in_flight * max(trace.kept for trace in traces.values()), in_flight * self.cut_bytes
        # A micro-batch on the wire: one frame as sent, one as received, and a copy of each inside the stream.
        # Where the labels stay, hidden states go to and fro as well.
        hidden = int(config.hidden_size)
        self._sent = workload.width or hidden
        on_wire = self.rows * (hidden if self._client_has_labels else self._sent)
        frames = 4 * on_wire * workload.adapter_item
        every = {layer.name: adapter_rank for layer in self.all_layers}
        # one block, all of it
        dequantised = dequantised_bytes(self._largest_matrix, workload.item, workload.quantise)
        again = dequantised + max(trace.peak for trace in traces.values())
        step = dequantised + max(
            trace.peak
            - trace.kept
            - (self._kept(every, self.all_layers, kind, kind + 1) - self.block_bytes()) // in_flight
            for kind, trace in traces.items()
        )
        # All but one may be on the wire while that one is computed on; or all are, and nothing is computed.
        # of a bottleneck: two matrices of directions, and what they make of the cut
        directions = workload.adapter_item * (2 * hidden + self.rows) * workload.width
        waiting, all_waiting = (in_flight - 1) * frames + directions, self.cut_bytes + in_flight * frames + directions
        self.temporary_bytes = max(step + waiting, all_waiting)
        self._temporary_again = max(again + waiting, all_waiting)
        self.head_bytes = model.head + waiting
        # Forward alone one micro-batch more may wait, but nothing is on its way down, unless labels stay.
        sent = waiting if self._client_has_labels else in_flight * frames // 2 + directions
        # beside the block that computes, what went into the first one
        forward = dequantised + self.cut_bytes + max(trace.forward for trace in traces.values())
        self.forward_bytes = max(forward + sent, all_waiting if self._client_has_labels else sent + frames // 2)
        # The server's, whose frames wait as long as its client is under way.
        self._frames = in_flight * frames + directions
        on_top = max(self.cut_bytes, 0 if self._client_has_labels else model.head)
        self._pass_temporary = max(step, on_top), max(again, on_top)
        self._head_flops = 2.0 * self.rows * int(config.vocab_size) * int(config.hidden_size)
        first = block_config(config, 0)
        heads = int(first.num_attention_heads)
        head_size = int(getattr(first, "head_dim", None) or config.hidden_size // heads)
        self._attention_flops = 4.0 * self.rows * workload.sequence_length * heads * head_size

    def client_parameters(self, split: int) -> int:
        """Base parameters of a client: embeddings, its blocks and, with the labels, the final norm and the head.

        A head that is tied to the embeddings counts once.
        """
        above = self._block_parameters[-1] - self._block_parameters[split]
        return self.total_parameters - above - (0 if self._client_has_labels else self.head_parameters)

    def client_weight_bytes(self, split: int) -> int:
        """Bytes of :meth:`client_parameters`, as they are held."""
        return self.client_parameters(split) * self.workload.item - self._saved[split]

    @property
    def total_weight_bytes(self) -> int:
        """Bytes of the whole base, as it is held."""
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
            Number of its blocks.
        ranks : Mapping[str, int]
            By absolute layer name; layers at or above ``split`` are not the client's and do not count.
        process_bytes : int
            What the process takes for itself; see :func:`hsplitlora_flwr.training.memory.process_bytes`.
        checkpointing : bool
            Whether its activations are computed again.
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
        """Predicted peak memory of a client process by what takes it, in bytes.

        Parameters are those of :meth:`client_bytes`. A process peaks while it loads or while it trains. ``update`` is
        what the accumulated update adds to the peak: nothing where it is merged into the weights and was smaller than
        what training then takes.

        Returns
        -------
        dict[str, int]
            ``weights``, ``adapters``, ``activations``, ``update``, ``temporary`` and ``process``.
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

    def _temporary(self, head: bool, checkpointing: bool) -> int:
        """The largest temporary of a part, with or without the head."""
        blocks = self._temporary_again if checkpointing else self.temporary_bytes
        return max(blocks, self.head_bytes) if head else blocks

    def _forward_temporary(self) -> int:
        """The largest temporary of a client without adapters."""
        return max(self.forward_bytes, self.head_bytes if self._client_has_labels else 0)

    def _parts(
        self, weights: int, adapters: int, activations: int, update: int, temporary: int, process: int
    ) -> dict[str, int]:
        """The parts of a client's peak."""
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

    def server_bytes(
        self,
        clients: Mapping[str, tuple[int, Mapping[str, int]]],
        process_bytes: int = 0,
        *,
        checkpointing: bool = False,
    ) -> int:
        """Predicted peak memory of the server.

        One base, the accumulated update, frames for each client ``(split, ranks)``, adapters and passes. Of a shared
        half there are the adapters from the lowest split up, which are those of any client with that split, and one
        pass from there. With a half for each client there are the adapters of all, and the largest passes that can
        meet.
        """
        base = self.total_weight_bytes + self.update_bytes(self.num_blocks)
        if self.workload.half == "shared" and clients:
            lowest, ranks = min(clients.values(), key=lambda client: client[0])
            waiting = (len(clients) - 1) * self._frames
            one = self.held_bytes(lowest, ranks) + self.pass_bytes(lowest, ranks, checkpointing=checkpointing)
            return process_bytes + base + waiting + one
        held = sum(self.held_bytes(split, ranks) for split, ranks in clients.values())
        passes = sorted(self.pass_bytes(split, ranks, checkpointing=checkpointing) for split, ranks in clients.values())
        at_once = len(passes) if self.workload.passes is None else self.workload.passes
        return process_bytes + base + held + sum(passes[-at_once:])

    def held_bytes(self, split: int, ranks: Mapping[str, int]) -> int:
        """What one client costs the server all the time: its adapters from ``split`` up, and frames under way."""
        return self.adapter_bytes(ranks, split, self.num_blocks) + self._frames

    def pass_bytes(self, split: int, ranks: Mapping[str, int], *, checkpointing: bool = False) -> int:
        """Activations and temporaries of the server while it computes for one client, from ``split`` up.

        A server without the labels keeps them until the client has returned its gradients.
        """
        kept = self.kept_bytes(ranks, split, self.num_blocks, everything=True, checkpointing=checkpointing)
        return kept // self.workload.in_flight * self.server_micro_batches + self._pass_temporary[checkpointing]

    @property
    def server_micro_batches(self) -> int:
        """Micro-batches of a client whose activations the server keeps at once."""
        return self.workload.in_flight if self._client_has_labels else 1

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

    def client_flops(self, split: int, ranks: Mapping[str, int], *, checkpointing: bool = False) -> float:
        """Floating-point operations of the client in one training step, forward and backward.

        Nothing below the lowest adapted block needs a backward pass. A multiplication and an addition are two. With the
        labels goes the head, as for :meth:`server_flops`.
        """
        head = 2 * self._head_flops if self._client_has_labels else 0
        return self._block_flops(ranks, 0, split, checkpointing=checkpointing) + head

    def server_flops(self, split: int, ranks: Mapping[str, int], *, checkpointing: bool = False) -> float:
        """Floating-point operations of the server for one client in one training step.

        The backward pass always reaches the cut. Every position is taken as labelled, so the head's share is a bound.
        """
        head = 0 if self._client_has_labels else 2 * self._head_flops
        return self._block_flops(ranks, split, self.num_blocks, everything=True, checkpointing=checkpointing) + head

    def whole_flops(self, ranks: Mapping[str, int]) -> float:
        """Floating-point operations of one training step of the unsplit model."""
        return self._block_flops(ranks, 0, self.num_blocks) + 2 * self._head_flops

    def weight_gradient_flops(self, first: int, last: int, *, head: bool = False) -> float:
        """Floating-point operations of a step that forms the gradient of every weight of blocks ``first .. last - 1``.

        That is a third product a weight, beside the one forward and the one backward. A probe of the importance takes
        it, and full fine-tuning, which also trains the head.
        """
        blocks = 3 * (2.0 * self.rows * self.linear_parameters + self._attention_flops)
        return (last - first) * blocks + (3 * self._head_flops if head else 0)

    def wire_bytes(self, up: str = "float32", down: str = "float32", *, forward_only: bool = False) -> tuple[int, int]:
        """Bytes of the tensors of one training step on the wire, up and down.

        Up go the cut activation, the attention mask and, unless they stay, the labels; down goes the gradient, unless
        the client has no adapters (``forward_only``). Where the labels stay, the server's hidden state goes down and
        its gradient up as well.

        Parameters
        ----------
        up, down : str
            Numbers on the wire, each way: names in :data:`hsplitlora_flwr.transport.codecs.CODECS`.

        Raises
        ------
        PlanError
            If they are none of these.
        """
        hidden = self.cut_bytes // self.workload.item // self.rows if self._client_has_labels else 0
        ids = 8 * self.rows  # int64, of the attention mask and of the labels
        return (
            self._packed_bytes(self._sent, up)
            + self._packed_bytes(hidden, up)
            + ids
            + (0 if self._client_has_labels else ids),
            (0 if forward_only else self._packed_bytes(self._sent, down)) + self._packed_bytes(hidden, down),
        )

    def _packed_bytes(self, numbers: int, wire: str) -> int:
        """So many numbers of every token on the wire."""
        if wire not in CODECS:
            raise PlanError(f"numbers on the wire cannot be {wire!r}; choose one of {', '.join(CODECS)}")
        batch, length = self.workload.batch_size, self.workload.sequence_length
        return packed_bytes((batch, length, numbers), wire) if numbers else 0

    def _block_flops(
        self,
        ranks: Mapping[str, int],
        first: int,
        last: int,
        *,
        everything: bool = False,
        checkpointing: bool = False,
    ) -> float:
        """Of blocks ``first .. last - 1``; backward reaches down to the lowest adapted one, or to all of them."""
        adapted = [layer for layer in self.layers if first <= layer.block < last and ranks.get(layer.name, 0)]
        lowest = first if everything else min((layer.block for layer in adapted), default=last)
        forward = 2.0 * self.rows * self.linear_parameters + self._attention_flops
        # The gradient of a frozen layer's input costs as much as its forward pass; attention has two operands.
        backward = 2.0 * self.rows * self.linear_parameters + 2 * self._attention_flops
        low_rank = 2.0 * self.rows * sum(layer.adapter_parameters(ranks[layer.name]) for layer in adapted)
        if checkpointing:
            backward, low_rank = backward + forward, low_rank * 4 / 3
        return (last - first) * forward + (last - lowest) * backward + 3 * low_rank

    def adapter_parameters(self, ranks: Mapping[str, int]) -> int:
        """Trainable parameters of a client, both sides together."""
        return sum(layer.adapter_parameters(ranks.get(layer.name, 0)) for layer in self.layers)

    def adapter_bytes(self, ranks: Mapping[str, int], first: int, last: int) -> int:
        """Adapters of blocks ``first .. last - 1`` with their gradients and optimizer states."""
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
        """Activations that blocks ``first .. last - 1`` keep for backward, for all micro-batches in flight.

        Below the lowest adapter no gradient is needed and nothing is kept, unless ``everything`` says that the input of
        the first block asks for its gradient, as the cut activation does on the server.
        """
        return self._kept(ranks, self.layers, first, last, everything=everything, checkpointing=checkpointing)

    def _kept(
        self,
        ranks: Mapping[str, int],
        layers: Iterable[Layer],
        first: int,
        last: int,
        *,
        everything: bool = False,
        checkpointing: bool = False,
    ) -> int:
        adapted = [layer for layer in layers if first <= layer.block < last and ranks.get(layer.name, 0)]
        if not adapted and not everything:
            return 0
        lowest = first if everything else min(layer.block for layer in adapted)
        blocks = (last - lowest) * self.block_bytes(checkpointing)
        if checkpointing:
            return blocks
        inputs = {(layer.block, layer.input_id): layer.input_bytes for layer in adapted}
        low_rank = self._low_rank_bytes(sum(ranks[layer.name] for layer in adapted))
        return blocks + sum(inputs.values()) + self.workload.in_flight * low_rank

    def block_bytes(self, checkpointing: bool = False) -> int:
        """What a block without adapters keeps for backward, for all micro-batches in flight."""
        return self._block_bytes[checkpointing]

    def adapter_price(self, layer: Layer, rank: int, micro_batches: int) -> int:
        """What one more adapter adds to :meth:`adapter_bytes` and, of so many micro-batches, to :meth:`kept_bytes`,
        its input apart."""
        kept = micro_batches * self._low_rank_bytes(rank)
        return layer.adapter_parameters(rank) * self.workload.adapter_parameter_bytes + kept

    def _low_rank_bytes(self, rank: int) -> int:
        """What an adapter of ``rank`` keeps for backward between ``A`` and ``B``, of one micro-batch."""
        return rank * self.rows * self.workload.adapter_item

    def update_bytes(self, split: int) -> int:
        """The accumulated update of the client's blocks at its largest, fp32, in a message: dense or factors."""
        return self._update[split]


def _last_names(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}
