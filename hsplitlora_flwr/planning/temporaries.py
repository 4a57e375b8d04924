"""The temporaries of a training step: bytes that come and go beside weights, adapters and kept activations.

Sizes come from a trace of the model's blocks and head (:mod:`hsplitlora_flwr.planning.trace`), and from the frames of
micro-batches that wait at a side while it computes on another one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hsplitlora_flwr.lora.layers import takes_changes
from hsplitlora_flwr.models.quantisation import dequantised_bytes
from hsplitlora_flwr.planning.importance import ROWS
from hsplitlora_flwr.planning.trace import BlockTrace, LayerTrace, ModelTrace
from hsplitlora_flwr.planning.workload import Workload


class Temporaries(NamedTuple):
    """The largest temporaries in bytes, by what is computed.

    Parameters
    ----------
    block, block_checkpointed : int
        A client's step through its blocks, with activations kept and under activation checkpointing.
    head : int
        A client's step through norm, head and loss.
    forward : int
        Blocks of a client without adapters, which computes forward alone.
    served, served_checkpointed : int
        A pass of the server.
    frames : int
        Frames of one client that wait at the server.
    """

    block: int
    block_checkpointed: int
    head: int
    forward: int
    served: int
    served_checkpointed: int
    frames: int

    @classmethod
    def of(cls, workload: Workload, trace: ModelTrace, hidden: int, largest_matrix: int, rank: int) -> Temporaries:
        """Those of a model.

        Parameters
        ----------
        workload : Workload
        trace : ModelTrace
            Of the model under that workload.
        hidden : int
            Its hidden size.
        largest_matrix : int
            Numbers in the largest weight of its blocks.
        rank : int
            Rank of the adapters, on all layers, with which it was traced.
        """
        in_flight, blocks = workload.in_flight, trace.blocks.values()
        labels_on_client = workload.labels == "client"
        tokens = workload.batch_size * workload.sequence_length
        cut = tokens * hidden * workload.item  # bytes of a micro-batch's cut activation

        # A quantised weight is dequantised for each of its products.
        dequantised = dequantised_bytes(largest_matrix, workload.item, workload.quantise)
        layers = (layer for each in blocks for layer in each.layers.values())
        scoring = max(_scoring_bytes(workload, layer, tokens) for layer in layers) if workload.scored else 0
        whole_block = scoring + dequantised + max(each.peak for each in blocks)
        # What a block keeps for backward is counted as activations, and not again here.
        beyond_kept = (
            scoring
            + dequantised
            + max(
                each.peak - each.kept - _kept_by_adapters(each, rank, tokens * workload.adapter_item) for each in blocks
            )
        )
        # Forward alone: the block that computes, and beside it what went into the first one.
        forward_alone = dequantised + cut + max(each.forward for each in blocks)

        # Of a micro-batch on the wire there are one frame as sent, one as received, and a copy of each in the stream.
        # Where the labels stay, hidden states travel in full, both ways.
        numbers = hidden if labels_on_client else workload.width or hidden
        frames = 4 * tokens * numbers * workload.adapter_item
        # A bottleneck: its two matrices (hidden, width), and the code of a micro-batch (tokens, width).
        bottleneck = workload.adapter_item * (2 * hidden + tokens) * workload.width

        # Either all micro-batches but one are on the wire while that one is computed on, or all are, and none is.
        others_wait = (in_flight - 1) * frames + bottleneck
        all_wait = cut + in_flight * frames + bottleneck
        # Forward alone, one more micro-batch may wait, but nothing is on its way down, unless the labels stay.
        if labels_on_client:
            forward = max(forward_alone + others_wait, all_wait)
        else:
            waiting = in_flight * frames // 2 + bottleneck
            forward = max(forward_alone + waiting, waiting + frames // 2)
        head_or_cut = max(cut, 0 if labels_on_client else trace.head)
        return cls(
            block=max(beyond_kept + others_wait, all_wait),
            block_checkpointed=max(whole_block + others_wait, all_wait),
            head=trace.head + others_wait,
            forward=forward,
            served=max(beyond_kept, head_or_cut),
            served_checkpointed=max(whole_block, head_or_cut),
            frames=in_flight * frames + bottleneck,
        )


def _scoring_bytes(workload: Workload, layer: LayerTrace, tokens: int) -> int:
    """Bytes that scoring a weight takes: some rows of its gradient; where the update lies beside the weight, those rows
    of both in fp32; and in low precision what the layer read, ``(tokens, in)``."""
    numbers = min(ROWS, layer.out_features) * layer.in_features
    merged = takes_changes(getattr(torch, workload.dtype), workload.quantise)
    read = tokens * layer.in_features * workload.item if workload.item < workload.adapter_item else 0
    return workload.item * numbers + (0 if merged else 8 * numbers) + read


def _kept_by_adapters(block: BlockTrace, rank: int, column_bytes: int) -> int:
    """Bytes that adapters of ``rank`` on all layers make a block keep: their inputs, and ``A x`` of each."""
    inputs = {layer.input_id: layer.input_bytes for layer in block.layers.values()}
    return sum(inputs.values()) + rank * column_bytes * len(block.layers)
