"""The plan of a round: from the settings of a run and its method to a cost model, split bounds and a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.methods import METHODS, shares_half
from hsplitlora_flwr.models.configuration import read_config, with_model_dtype
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.models.placement import pick_devices
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.stored import read_settled_config
from hsplitlora_flwr.planning.budget import Budget, PlanError
from hsplitlora_flwr.planning.cost import CostModel
from hsplitlora_flwr.planning.leakage import LeakageTable
from hsplitlora_flwr.planning.planner import Plan, make_plan
from hsplitlora_flwr.planning.uniform import equal_plan, whole_plan
from hsplitlora_flwr.planning.workload import Workload
from hsplitlora_flwr.transport.bottleneck import check_directions


def cost_model(config: Config, rows: int, length: int, clients: int = 0, width: int | None = None) -> CostModel:
    """The cost model of a run, from its settings and the configuration of its model.

    Parameters
    ----------
    config : Config
    rows, length : int
        Examples of a micro-batch, and tokens of its longest one.
    clients : int
        Clients whose adapters may add to the update in a round; 0 = ``clients.count``.
    width : int, optional
        Numbers per token that cross the cut, 0 for the whole hidden state; ``split.width`` when None.

    Raises
    ------
    ValueError
        If the model cannot be read or cut, or has none of the layers that are to get adapters.
    """
    config = with_model_dtype(config)
    method, family = METHODS[config.method.name], find_family(read_config(config.model.path))
    model = read_settled_config(config.model.path)
    train, micro_batches = config.train, math.ceil(config.train.batch_size / rows)
    workload = Workload(
        rows,
        length,
        config.model.dtype,
        train.optimizer,
        bool(train.momentum),
        labels=config.split.labels if method.split else "server",
        in_flight=min(config.transport.in_flight, micro_batches) if method.split else 1,
        quantise=config.model.quantise,
        half="shared" if shares_half(config) else "per_client",
        # all clients meet in a batched pass; where the labels stay, activations of all wait for their gradients
        passes=None if config.split.labels == "client" or takes_all(config) else passes_at_once(config),
        width=(config.split.width if width is None else width) if method.split else 0,
        scored=method.importance,
    )
    highest = max(*config.lora.ranks, config.lora.rank)
    update_rank = config.lora.rank_cap or train.rounds * (clients or config.clients.count) * highest
    named = None if isinstance(config.lora.targets, str) else config.lora.targets
    cost = CostModel(model, family, workload, named, update_rank, highest)
    if config.lora.targets != "auto" or method.targets is None:
        return cost
    names = {layer.name.rpartition(".")[2] for layer in cost.layers}
    targets = tuple(sorted(names & set(method.targets)))
    if not targets:
        raise PlanError(
            f"method.name={config.method.name} puts adapters on query and value, and none of this model's layers has "
            f"one of their names: {sorted(names)}; name its layers in lora.targets"
        )
    return CostModel(model, family, workload, targets, update_rank, highest)


class Size(NamedTuple):
    """What a client sends: tokens of its longest example, and numbers per token, 0 for the whole hidden state."""

    tokens: int
    width: int = 0


def own_costs(config: Config, rows: int, sizes: Mapping[str, Size], clients: int = 0) -> dict[str, CostModel]:
    """The cost model of each client by the length of its own rows, so that other clients' rows do not count.

    Lengths are rounded up by :func:`rounded_length`, so that there are few cost models; clients with the same length
    share one.

    Parameters
    ----------
    config, rows, clients
        As for :func:`cost_model`.
    sizes : Mapping[str, Size]
        By client.
    """
    most = config.data.max_length
    rounded = {name: size._replace(tokens=rounded_length(size.tokens, most)) for name, size in sizes.items()}
    models = {
        size: cost_model(config, rows, size.tokens, clients, size.width) for size in sorted(set(rounded.values()))
    }
    return {name: models[size] for name, size in rounded.items()}


def rounded_length(length: int, most: int) -> int:
    """The smallest of ``most / 2^(k/4)``, ``k = 0, 1, ...``, rounded up, that is at least ``length``."""
    steps = math.floor(4 * math.log2(most / min(max(length, 2), most)))
    return max(math.ceil(most / 2 ** (steps / 4)), length)


def split_bounds(config: Config, num_blocks: int) -> tuple[int, int]:
    """Fewest and most blocks on a client.

    Without a stated limit, and with a shared half, a client holds at most half of the blocks: its own part learns from
    its own steps alone and the server's half from everybody's, while the objective values both alike.

    Raises
    ------
    ConfigError, PlanError
        If ``split.leakage`` is no table, or leaves no split point; or ``split.bottleneck`` lacks one that is left.
    """
    split, floors = config.split, {"split.min": config.split.min}
    floors["split.min_share"] = min(math.ceil(split.min_share * num_blocks), num_blocks - 1)
    if (table := LeakageTable.of(config)) and split.max_leakage < 1:
        floors["split.max_leakage"] = table.floor(split.max_leakage)
    name = max(floors, key=lambda name: floors[name])
    least = floors[name]
    most = num_blocks // 2 if shares_half(config) else num_blocks - 1
    most = split.max or max(most, least)
    if least > most:
        raise PlanError(
            f"{name}={getattr(split, name.removeprefix('split.')):g} asks for {least} of {num_blocks} blocks on a "
            f"client, and split.max={most}; raise that, or lower {name}"
        )
    if split.bottleneck and METHODS[config.method.name].split:
        for blocks in range(least, most + 1):
            check_directions(split.bottleneck, blocks, split.width)
    return least, most


def scored_steps(config: Config, server_round: int) -> int:
    """Of the first steps that train in a round, those in which importance is measured, for the plan of the next round.

    That is every ``plan.probe_every`` rounds from the first on. In the first itself there are none, since a probe on
    the same batches came before its plan, and in the last, after which no plan is made.
    """
    every, train = config.plan.probe_every, config.train
    due = METHODS[config.method.name].importance and every and (server_round - 1) % every == 0
    return min(config.plan.probe_batches, train.steps) if due and 1 < server_round < train.rounds else 0


def takes_all(config: Config) -> bool:
    """Whether the server computes for all waiting clients in one pass: multi-adapter batching."""
    # here clients come one by one
    if shares_half(config) or config.transport.kind == "messages" or config.split.labels == "client":
        return False
    joint = config.train.multi_adapter_batching
    return joint == "on" or (joint == "auto" and pick_devices(config.model.device) != ["cpu"])


def passes_at_once(config: Config) -> int:
    """Clients that the server computes for at the same time, each in a pass of its own; a shared half serves one."""
    return 1 if shares_half(config) else config.train.passes or all_cores()


def make_round_plan(
    config: Config,
    budgets: Mapping[str, Budget],
    server: Budget | None,
    importance: Mapping[str, float],
    cost: CostModel,
    shares: Mapping[str, float] | None = None,
    own: Mapping[str, CostModel] | None = None,
) -> Plan:
    """Splits and ranks of a round, as the method chooses them.

    Parameters
    ----------
    budgets : Mapping[str, Budget]
        By client.
    server : Budget, optional
        The server's; unlimited when None.
    importance : Mapping[str, float]
        ``J_m`` by absolute layer name; all weights count the same where the method scores none.
    shares : Mapping[str, float], optional
        ``p_i`` by client; equal when None.
    own : Mapping[str, CostModel], optional
        Of each client's side; see :func:`own_costs`.

    Raises
    ------
    PlanError
        If no plan is possible.
    """
    method, split, plan, train = METHODS[config.method.name], config.split, config.plan, config.train
    if not method.split:
        return whole_plan(
            budgets,
            cost,
            ranks=config.lora.ranks if method.ranks == "budget" else (config.lora.rank,),
            over_budget=plan.over_budget,
            checkpointing=train.activation_checkpointing,
            shares=shares,
            own=own,
        )
    least, most = split_bounds(config, cost.num_blocks)
    if method.ranks == "equal":
        return equal_plan(
            budgets,
            cost,
            rank=config.lora.rank,
            split=split.point,
            server=server,
            min_split=least,
            max_split=most,
            checkpointing=train.activation_checkpointing,
            shares=shares,
            trains=config.lora.clients != "none",
            own=own,
        )
    return make_plan(
        budgets,
        importance,
        cost,
        shares=shares,
        ranks=config.lora.ranks,
        server=server,
        min_split=least,
        max_split=most,
        planner=plan.planner,
        important_share=plan.important_share,
        resource=plan.cost,
        tolerance=plan.tolerance,
        deadline=plan.deadline or None,
        steps=train.steps * math.ceil(train.batch_size / (train.micro_batch_size or train.batch_size)),
        wire=(config.transport.up, config.transport.down),
        checkpointing=train.activation_checkpointing,
        clients=config.lora.clients,
        own=own,
        exchanges=True,
    )
