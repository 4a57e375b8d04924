"""Rows of the summary: a client in a plan, a client in a round, a step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.messages import Description, Outcome
from hsplitlora_flwr.planning.planner import ClientPlan, Plan
from hsplitlora_flwr.training.server import StepReport


@dataclass
class RoundFigures:
    """What is counted while a round goes on, besides what clients say with their last replies.

    Parameters
    ----------
    started : float
        Seconds since the epoch.
    server_peak, server_host_peak : int
        Memory of the server where its half lies while the clients trained, and of its process in the machine, in bytes.
    up, down : Counter[int]
        Bytes of each node besides those of its training: of its probe, and of the tensors in messages to it.
    """

    started: float = field(default_factory=time.time)
    server_peak: int = 0
    server_host_peak: int = 0
    up: Counter[int] = field(default_factory=Counter)
    down: Counter[int] = field(default_factory=Counter)

    def count_probe(self, node: int, metrics: Mapping[str, float]) -> None:
        """Add what a node says of its probe."""
        self.up[node] += int(metrics["bytes-up"])
        self.down[node] += int(metrics["bytes-down"])


def plan_rows(clients: Iterable[Description], plan: Plan, num_blocks: int) -> list[dict[str, Any]]:
    """What a plan gives every client, or by how much it misses taking part."""
    rows = []
    for client in clients:
        row: dict[str, Any] = {
            "client": client.name,
            "examples": client.examples,
            "longest": client.longest,
            "cut_rows": client.cut_rows,
            "cut_share": client.cut.share,
            "budget_bytes": client.memory_bytes,
            "host_budget_bytes": client.host_bytes,
            "blocks": num_blocks,
            "cut_transform": client.cut_transform,
            "left_out": "",
        }
        if own := plan.clients.get(client.name):
            row |= {
                "split": own.split,
                "ranks": dict(own.ranks),
                "trains": not own.forward_only,
                "checkpointing": own.checkpointed,
                "predicted_bytes": own.predicted_bytes,
            }
        else:
            row["left_out"] = f"misses {plan.left_out[client.name]:,} bytes of memory"
        rows.append(row)
    return rows


def step_row(client: str, server_round: int, train: TrainConfig, step: StepReport) -> dict[str, Any]:
    """A step of a client, counted from 1 within its round."""
    return {
        "round": server_round,
        "rounds": train.rounds,
        "client": client,
        "step": step.step - (server_round - 1) * train.steps + 1,
        "steps": train.steps,
        "loss": step.loss,
        "tokens": step.label_tokens,
        "all_tokens": step.tokens,
    }


def client_row(
    client: Description,
    plan: ClientPlan,
    outcome: Outcome,
    adapters: Mapping[str, Factors],
    *,
    trains_a: bool,
    up: int,
    down: int,
    seconds: float,
) -> dict[str, Any]:
    """A client's round: what it held, computed and sent.

    Parameters
    ----------
    adapters : Mapping[str, Factors]
        Of both sides.
    trains_a : bool
        Whether ``A`` trains, besides ``B``.
    up, down : int
        Bytes besides those of its training: of its probe, and of the tensors in messages to it.
    seconds : float
        From that message to its last reply. What it did not work in them (``seconds_around``) went into Flower's
        messages, the start of its process, and imports.
    """
    metrics, ranks = outcome.metrics, list(plan.ranks.values())
    own = sum(b.nbytes + a.nbytes for b, a in outcome.adapters.values())
    return {
        "client": client.name,
        "examples": client.examples,
        "split": plan.split,
        "ranks": {rank: ranks.count(rank) for rank in sorted(set(ranks))},
        "trains": not plan.forward_only,
        "checkpointing": plan.checkpointed,
        "cut_transform": client.cut_transform,
        "trainable_parameters": sum(b.numel() + (a.numel() if trains_a else 0) for b, a in adapters.values()),
        "resident_parameters": int(metrics["resident-parameters"]),
        "budget_bytes": client.memory_bytes,
        "predicted_bytes": plan.predicted_bytes,
        "measured_bytes": int(metrics["measured-bytes"]),
        "process_bytes": client.process_bytes,
        "host_budget_bytes": client.host_bytes,
        "host_process_bytes": client.host_process_bytes,
        "host_measured_bytes": int(metrics["host-bytes"]),
        "tokens": int(metrics["tokens"]),
        "label_tokens": int(metrics["label-tokens"]),
        "tokens_per_second": metrics["tokens"] / metrics["seconds"],
        "bytes_up": int(metrics["bytes-up"]) + own + up,
        "bytes_down": int(metrics["bytes-down"]) + down,
        "frame_bytes_per_token": (metrics["bytes-up"] + metrics["bytes-down"]) / metrics["tokens"],
        "seconds": metrics["seconds"],
        "seconds_before": metrics["seconds-before"],
        "seconds_around": seconds - metrics["seconds"] - metrics["seconds-before"],
        "losses": outcome.losses,
    }
