"""``aggregate``: a round's aggregation for LLaMA-2-7B."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.aggregation import aggregate as join
from hsplitlora_flwr.lora.update import AccumulatedUpdate
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.planning.trace import LiveBytes
from simulations.benchmarks.common import Row, Setup, take_turns, timed

BLOCKS = 32
SHAPES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
    "down_proj": (4096, 11008),
}
"""``(out, in)`` of the linear layers of a block of LLaMA-2-7B."""
CLIENTS = (10, 100)
RANKS = (4, 8, 16, 32)
NARROW = 4
"""Layers and ranks are so many times smaller where memory is measured."""
TURNS = 3


def aggregate(setup: Setup) -> Iterator[Row]:
    """One round's aggregation for the shapes of LLaMA-2-7B, fp32, with 10 and 100 clients of ranks 4 to 32.

    - ``ours_s``: :func:`hsplitlora_flwr.lora.aggregation.aggregate` with the rule of ``hsplitlora``, then
      :meth:`hsplitlora_flwr.lora.update.AccumulatedUpdate.add` to a change that is still zero.
    - ``dense_s``: every client's dense update in turn, ``W += (p_i B_i) @ A_i``; goal: 10 times as long as ours.
    - ``peft_s``: PEFT's ``add_weighted_adapter(..., combination_type="cat")`` and ``merge_adapter``, whose adapters are
      there already; goal: no shorter than ours.
    - ``extra / layer``: most bytes that our side takes besides the clients' adapters and the accumulated change that
      remains, over those of the largest layer as a dense fp32 matrix; goal: at most 2.

    The sides take turns on one block, and times are those of a block times 32: blocks are alike, and no side does
    anything across them. ``spread`` is the distance between the quartiles of a quotient. Memory is that of all 32
    blocks at once. It is measured on layers a quarter as wide and ranks a quarter as high, where every tensor has a
    sixteenth of the bytes; what LAPACK takes for itself is not seen.
    """
    for count in CLIENTS:
        clients = [make_client(index) for index in range(count)]
        shares = [1 / count] * count
        weights = {f"0.{name}": torch.zeros(shape) for name, shape in SHAPES.items()}
        stacked = PeftBlock(clients)
        ours, dense, peft = take_turns(
            [
                partial(timed, partial(aggregated, clients, shares)),
                partial(timed, partial(add_dense, weights, clients, shares)),
                partial(stacked.seconds, shares),
            ],
            TURNS,
            warm_up=0,
        )
        del weights, stacked
        gc.collect()
        extra, kept = (NARROW**2 * size for size in extra_bytes(count))
        layer = 4 * max(rows * columns for rows, columns in SHAPES.values())
        yield {
            "clients": count,
            "ranks": sum(RANKS[index % len(RANKS)] for index in range(count)),
            "ours_s": BLOCKS * ours.median,
            "dense_s": BLOCKS * dense.median,
            "peft_s": BLOCKS * peft.median,
            "dense / ours": (dense / ours).median,
            "spread of dense / ours": (dense / ours).spread,
            "peft / ours": (peft / ours).median,
            "spread of peft / ours": (peft / ours).spread,
            "change_mb": kept / 1e6,
            "extra_mb": extra / 1e6,
            "extra / layer": extra / layer,
        }


def make_client(index: int, blocks: int = 1, narrow: int = 1) -> dict[str, Factors]:
    """A client's adapters of so many blocks; all sizes and ranks are divided by ``narrow``."""
    generator = torch.Generator().manual_seed(index)
    rank = RANKS[index % len(RANKS)] // narrow
    adapters = {}
    for block, (name, shape) in itertools.product(range(blocks), SHAPES.items()):
        rows, columns = (size // narrow for size in shape)
        b = torch.randn(rows, rank, generator=generator) / rows**0.5
        a = torch.randn(rank, columns, generator=generator) / columns**0.5
        adapters[f"{block}.{name}"] = b, a
    return adapters


def aggregated(clients: Sequence[Mapping[str, Factors]], shares: Sequence[float]) -> AccumulatedUpdate:
    """The accumulated change after one round of ours."""
    accumulated = AccumulatedUpdate()
    accumulated.add(join(clients, shares, METHODS["hsplitlora"].rule))
    return accumulated


def add_dense(weights: Mapping[str, Tensor], clients: Sequence[Mapping[str, Factors]], shares: Sequence[float]) -> None:
    """Add every client's update to the weights."""
    for client, share in zip(clients, shares, strict=True):
        for name, (b, a) in client.items():
            weights[name].add_((share * b) @ a)


def extra_bytes(count: int) -> tuple[int, int]:
    """Most bytes besides the clients' adapters and the change that remains, and those of the change; narrow layers."""
    clients = [make_client(index, BLOCKS, NARROW) for index in range(count)]
    live = LiveBytes([factor for client in clients for pair in client.values() for factor in pair])
    with live:
        accumulated = aggregated(clients, [1 / count] * count)
    kept = sum(change.nbytes for change in accumulated.changes().values())
    return live.peak - kept, kept


class PeftBlock:
    """A block with an adapter of PEFT for every client.

    Parameters
    ----------
    clients : Sequence[Mapping[str, tuple[Tensor, Tensor]]]
        ``(B, A)`` by layer name.
    """

    def __init__(self, clients: Sequence[Mapping[str, Factors]]) -> None:
        self._names = [f"client{index}" for index in range(len(clients))]
        layers = {
            name: nn.Linear(columns, rows, bias=False, device="meta").to_empty(device="cpu")
            for name, (rows, columns) in SHAPES.items()
        }
        for layer in layers.values():
            nn.init.zeros_(layer.weight)
        whole: Any = nn.Sequential(nn.ModuleDict(layers))  # names as those of the adapters
        for number, (name, client) in enumerate(zip(self._names, clients, strict=True)):
            rank = next(iter(client.values()))[0].shape[1]
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(SHAPES), init_lora_weights=False)
            if number == 0:
                whole = get_peft_model(whole, config, adapter_name=name)
            else:
                whole.add_adapter(name, config)
            for path, (b, a) in client.items():
                adapted = whole.base_model.model.get_submodule(path)
                adapted.lora_B[name].weight.data, adapted.lora_A[name].weight.data = b, a
        self._model = whole.base_model

    def seconds(self, shares: Sequence[float]) -> float:
        """Time of one aggregation into the base; it is undone after that."""
        taken = timed(partial(self._merge, shares))
        self._model.unmerge_adapter()
        self._model.delete_adapter("sum")
        return taken

    def change(self, shares: Sequence[float]) -> dict[str, Tensor]:
        """What an aggregation adds to each weight."""
        self._merge(shares)
        layers = self._model.model[0].items()
        changes = {f"0.{name}": layer.base_layer.weight.data.clone() for name, layer in layers}
        self._model.unmerge_adapter()
        self._model.delete_adapter("sum")
        return changes

    def _merge(self, shares: Sequence[float]) -> None:
        self._model.add_weighted_adapter(self._names, list(shares), "sum", combination_type="cat")
        self._model.merge_adapter(["sum"])
