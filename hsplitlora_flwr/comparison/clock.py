"""How long the rounds of a run would take on the devices and links that its settings state.

The operations of a step are the cost model's, for rows of the mean length; bytes are those that were sent. A client
computes up to its cut, sends, waits for the server, and goes back through its blocks; the server serves one client
after another, in the order that ``server.order`` says::

    client 0   forward ─ up ┐           ┌ down ─ backward, forward ─ up ┐
    client 1   forward ─ up ┼─┐         │ ┌ down ─ ...                  │
    server                  └ 0 ┘ 1 ┘ 2 ┘                               └ 0 ┘ ...

A client that computes forward alone waits for no gradient: it goes on with the next step when it has sent one, a step
ahead of the server at most. A round is over when the last client's adapters have arrived. Aggregation and evaluation
take no time here, and neither does bringing all text to one place, for the methods that train there.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.methods import METHODS, shares_half
from hsplitlora_flwr.planning.cost import CostModel
from hsplitlora_flwr.planning.round import cost_model, scored_steps


@dataclass(frozen=True)
class Device:
    """FLOP/s, and bytes/s of the link; infinite where a link is not stated."""

    flops: float
    up: float = math.inf
    down: float = math.inf


@dataclass(frozen=True)
class Step:
    """Seconds of one client's step: up to its cut, on the link, on the server, on the link, and back; and whether its
    next one waits for them."""

    forward: float
    up: float
    server: float
    down: float
    backward: float
    waits: bool = True


def serve(clients: Sequence[Sequence[Step]], *, fixed: bool) -> list[float]:
    """When each client has taken all its steps at a server that takes them one by one.

    Parameters
    ----------
    clients : Sequence[Sequence[Step]]
        The steps of each.
    fixed : bool
        The server takes them in the order of steps and clients, and else as they come.
    """
    free, ends, ready = 0.0, [0.0] * len(clients), [0.0] * len(clients)
    # by arrival, or by step and then by client
    queue = [(0.0 if fixed else own[0].forward + own[0].up, 0, index) for index, own in enumerate(clients)]
    heapq.heapify(queue)
    while queue:
        _, step, index = heapq.heappop(queue)
        one = clients[index][step]
        sent, before = ready[index] + one.forward + one.up, ends[index]
        free = max(free, sent) + one.server
        ends[index] = free + one.down + one.backward
        ready[index] = ends[index] if one.waits else max(sent, before)
        if step + 1 < len(clients[index]):
            following = clients[index][step + 1]
            arrival = ready[index] + following.forward + following.up
            heapq.heappush(queue, (step + 1.0 if fixed else arrival, step + 1, index))
    return ends


def round_seconds(config: Config, summary: Mapping[str, Any]) -> list[float]:
    """Seconds of every round of a run.

    Parameters
    ----------
    config : Config
        Its settings; empty seconds where they state no ``clients.gflops``.
    summary : Mapping[str, Any]
        Its ``summary.json``.
    """
    if not config.clients.gflops:
        return []
    return _Clock(config, summary).rounds()


class _Clock:
    """The devices, and what a step costs on them."""

    def __init__(self, config: Config, summary: Mapping[str, Any]) -> None:
        self.config, self.summary, self.method = config, summary, METHODS[config.method.name]
        self.devices = list(itertools.islice(_devices(config), config.clients.count))
        self.server = config.plan.server_gflops * 1e9 or fmean(device.flops for device in self.devices)
        rows = [row for round_ in summary["rounds"] for row in round_["clients"]]
        steps = sum(len(row["losses"]) for row in rows)
        length = math.ceil(sum(row["tokens"] for row in rows) / (steps * config.train.batch_size))
        self.cost = cost_model(config, config.train.batch_size, length)
        wire = config.transport.up, config.transport.down
        self._frame = self.cost.wire_bytes(*wire)
        self._one_way = self.cost.wire_bytes(*wire, forward_only=True)

    def rounds(self) -> list[float]:
        return [self._central(row) if self.method.central else self._round(row) for row in self.summary["rounds"]]

    def _central(self, round_: Mapping[str, Any]) -> float:
        cost, rank = self.cost, self.config.lora.rank
        ranks = {layer.name: rank for layer in cost.layers}
        flops = (
            cost.weight_gradient_flops(0, cost.num_blocks, head=True) if self.method.full else cost.whole_flops(ranks)
        )
        steps: int = sum(len(row["losses"]) for row in round_["clients"])
        return steps * flops / self.server

    def _round(self, round_: Mapping[str, Any]) -> float:
        plan = _plan_of(self.summary["plans"], round_["round"])
        rows = round_["clients"]
        devices = [self.devices[int(row["client"]) % len(self.devices)] for row in rows]
        steps = self.config.train.steps
        if not self.method.split:
            times: list[float] = [
                row["bytes_down"] / device.down
                + steps * self.cost.whole_flops(plan[row["client"]]["ranks"]) / device.flops
                + row["bytes_up"] / device.up
                for row, device in zip(rows, devices, strict=True)
            ]
            return max(times)
        half = _half(self.cost, plan.values()) if shares_half(self.config) else None
        scored = scored_steps(self.config, round_["round"])
        training, beside = list[list[Step]](), list[float]()
        for row, device in zip(rows, devices, strict=True):
            own = plan[row["client"]]
            up, down = self._frame if row.get("trains", True) else self._one_way
            above = half or own["ranks"]
            step = self._training(device, own, above, row)
            training.append([self._scored(step, device, own, above)] * scored + [step] * (steps - scored))
            messages = max(row["bytes_up"] - steps * up, 0), max(row["bytes_down"] - steps * down, 0)
            beside.append(messages[0] / device.up + messages[1] / device.down)
        ends = serve(training, fixed=shares_half(self.config) and self.config.server.order == "fixed")
        probing = self._probe(devices, [plan[row["client"]]["split"] for row in rows], round_["round"])
        return probing + max(end + more for end, more in zip(ends, beside, strict=True))

    def _training(
        self, device: Device, plan: Mapping[str, Any], above: Mapping[str, int], row: Mapping[str, Any]
    ) -> Step:
        cost, split, checkpointing = self.cost, plan["split"], row["checkpointing"]
        both = cost.client_flops(split, plan["ranks"], checkpointing=checkpointing in ("client", "both"))
        served = cost.server_flops(split, above, checkpointing=checkpointing in ("server", "both"))
        step = self._step(device, split, both, served)
        if row.get("trains", True):
            return step
        stays = self.config.split.labels == "client"  # and then the loss is made of what the server sends
        return replace(step, down=self._one_way[1] / device.down, waits=stays)

    def _scored(self, step: Step, device: Device, plan: Mapping[str, Any], above: Mapping[str, int]) -> Step:
        """A step in which the weights with adapters are scored."""
        cost, split = self.cost, plan["split"]
        backward = step.backward + cost.scoring_flops(plan["ranks"], 0, split) / device.flops
        served = step.server + cost.scoring_flops(above, split, cost.num_blocks) / self.server
        return replace(step, server=served, backward=backward)

    def _probe(self, devices: Sequence[Device], splits: Sequence[int], server_round: int) -> float:
        """The measurement of the importance before the first plan: every weight's gradient is formed, none is sent."""
        cost = self.cost
        if server_round > 1 or not self.method.importance:
            return 0.0
        steps = []
        for device, split in zip(devices, splits, strict=True):
            served = cost.weight_gradient_flops(split, cost.num_blocks, head=True)
            step = self._step(device, split, cost.weight_gradient_flops(0, split), served)
            steps.append([step] * self.config.plan.probe_batches)
        return max(serve(steps, fixed=False))

    def _step(self, device: Device, split: int, both: float, served: float) -> Step:
        """From the operations of a client, forward and backward, and of the server."""
        (up, down), forward = self._frame, self.cost.client_flops(split, {})
        return Step(
            forward / device.flops,
            up / device.up,
            served / self.server,
            down / device.down,
            (both - forward) / device.flops,
        )


def _devices(config: Config) -> Iterable[Device]:
    """Of client 0, 1, ..., without an end."""
    clients = config.clients
    endless = [itertools.cycle(speeds or [math.inf]) for speeds in (clients.gflops, clients.mbit_up, clients.mbit_down)]
    return (Device(flops * 1e9, up * 1e6 / 8, down * 1e6 / 8) for flops, up, down in zip(*endless, strict=True))


def _plan_of(plans: Sequence[Mapping[str, Any]], server_round: int) -> dict[str, Mapping[str, Any]]:
    """The plan in force in a round, by client."""
    plan = [each for each in plans if each["round"] <= server_round][-1]
    return {row["client"]: row for row in plan["clients"] if not row["left_out"]}


def _half(cost: CostModel, clients: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The ranks of the half that all train: the highest that a client has of a layer above its cut."""
    clients, half = list(clients), dict[str, int]()
    for layer in cost.layers:
        ranks = [client["ranks"].get(layer.name, 0) for client in clients if client["split"] <= layer.block]
        half[layer.name] = max(ranks, default=0)
    return half
