"""HSplitLoRA, its ablations and what it is compared with: which plan, which aggregation, split or not.

All of them share data, seeds, batches, schedule, optimizer, training step and evaluation. What is not the same stands
in :data:`METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from hsplitlora_flwr.config import METHODS as NAMES
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.models.loading import read_config, read_settled_config
from hsplitlora_flwr.models.placement import pick_devices
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.planning.cost import CostModel, PlanError, Workload
from hsplitlora_flwr.planning.planner import Budget, Plan, make_plan
from hsplitlora_flwr.planning.uniform import equal_plan, whole_plan
from hsplitlora_flwr.training.cores import all_cores


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Parameters
    ----------
    source : str
        Where it comes from.
    split : bool
        The model is cut, and the server trains its part. Else a client holds all of it.
    half : {"", "shared", "per_client"}
        Whose adapters a client's steps train on the server, whatever ``server.half`` says; "" leaves it to that.
    central : bool
        All data lie in one place and are trained on there.
    ranks : str
        ``plan``: splits and ranks by importance and budgets (ARMSC). ``budget``: per client the highest one rank for
        all its weights that its memory holds. ``equal``: ``lora.rank`` and one split for everybody.
    importance : bool
        Whether weights are scored (IWI); without it all count the same.
    rule : str
        How adapters are added up; see :mod:`hsplitlora_flwr.lora.aggregation`.
    carries : bool
        There is one global adapter, which every round goes on from, cut to each client's rank. Else the update of a
        round goes into the weights and adapters start afresh.
    init : str
        Where ``A`` starts in a round unless ``lora.init`` says otherwise: ``kaiming``, or from the second round on
        along the last round's ``update``. Without meaning where an adapter is carried on.
    freeze_a : bool
        ``A`` stays as it started; only ``B`` trains.
    full : bool
        All weights train, without adapters.
    targets : tuple of str, optional
        Layers that get adapters unless ``lora.targets`` says otherwise; all when None.
    """

    source: str
    split: bool = True
    half: str = ""
    central: bool = False
    ranks: Literal["plan", "budget", "equal"] = "plan"
    importance: bool = True
    rule: str = "noise_free"
    carries: bool = False
    init: Literal["kaiming", "update"] = "kaiming"
    freeze_a: bool = False
    full: bool = False
    targets: tuple[str, ...] | None = None


_WHOLE = Method("", split=False, importance=False)
_HSPLITLORA = Method("arXiv 2505.02795", init="update")
QUERY_AND_VALUE = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj", "Wqkv")
"""Query and value projections by the names that families give them; some keep query, key and value in one layer."""

METHODS: dict[str, Method] = {
    "hsplitlora": _HSPLITLORA,
    "splitlora": replace(
        _HSPLITLORA,
        source="arXiv 2407.00952",
        half="shared",
        ranks="equal",
        importance=False,
        rule="mean",
        carries=True,
        targets=QUERY_AND_VALUE,
    ),
    "splitlora-v1": replace(
        _HSPLITLORA,
        source="arXiv 2407.00952, version 1",
        half="per_client",
        ranks="equal",
        importance=False,
        rule="mean",
        carries=True,
        targets=QUERY_AND_VALUE,
    ),
    "fedit": replace(_WHOLE, source="arXiv 2305.05644", ranks="equal", rule="mean", carries=True),
    "hetlora": replace(_WHOLE, source="arXiv 2401.06432", ranks="budget", rule="zero_pad_by_norm", carries=True),
    "flexlora": replace(_WHOLE, source="arXiv 2402.11505", ranks="budget", rule="svd", carries=True),
    "flora": replace(_WHOLE, source="arXiv 2409.05976", ranks="budget"),
    "ffa": replace(_WHOLE, source="arXiv 2403.12313", ranks="equal", rule="mean_b", carries=True, freeze_a=True),
    "cenlora": replace(_WHOLE, source="LoRA, arXiv 2106.09685", central=True, ranks="equal"),
    "full": replace(_WHOLE, source="full fine-tuning", central=True, ranks="equal", full=True),
    "hsplitlora-no-iwi": replace(_HSPLITLORA, source="ablation: uniform importance", importance=False),
    "hsplitlora-no-armsc": replace(
        _HSPLITLORA, source="ablation: one split, one rank", ranks="equal", importance=False
    ),
    "hsplitlora-no-naa": replace(_HSPLITLORA, source="ablation: zero padding", rule="zero_pad"),
}
assert tuple(METHODS) == NAMES  # the schema names them without importing anything


def cost_model(config: Config, rows: int, length: int, clients: int = 0) -> CostModel:
    """What plans of a run cost, from the configuration of its model.

    Parameters
    ----------
    rows, length : int
        Of a micro-batch.
    clients : int
        How many may add to the update in a round; 0 = ``clients.count``.

    Raises
    ------
    ValueError
        If the model cannot be read or cut, or has none of the layers that are to get adapters.
    """
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
        # in a joint pass all clients meet; where the labels stay, activations wait for gradients
        passes=None if config.split.labels == "client" or takes_all(config) else passes_at_once(config),
    )
    highest = max(*config.ranks, config.lora.rank)
    update_rank = config.lora.rank_cap or train.rounds * (clients or config.clients.count) * highest
    cost = CostModel(model, family, workload, config.targets, update_rank, highest)
    if config.lora.targets.strip() != "auto" or method.targets is None:
        return cost
    names = {layer.name.rpartition(".")[2] for layer in cost.layers}
    targets = tuple(sorted(names & set(method.targets)))
    if not targets:
        raise PlanError(
            f"method.name={config.method.name} puts adapters on query and value, and none of this model's layers has "
            f"one of their names: {sorted(names)}; name its layers in lora.targets"
        )
    return CostModel(model, family, workload, targets, update_rank, highest)


def split_bounds(config: Config, num_blocks: int) -> tuple[int, int]:
    """Fewest and most blocks on a client.

    Without a stated limit a client of a shared half holds no more than half of the blocks: what it holds learns from
    its own steps, what the server holds from everybody's, and a plan weighs both alike.
    """
    least = config.split.min
    most = num_blocks // 2 if shares_half(config) else num_blocks - 1
    return least, config.split.max or max(most, least)


def starts_along_update(config: Config) -> bool:
    """Whether ``A`` starts along the last round's update."""
    chosen = METHODS[config.method.name].init if config.lora.init == "auto" else config.lora.init
    return chosen == "update"


def shares_half(config: Config) -> bool:
    """Whether one half of the server serves all clients of a round; each has one of its own else."""
    method = METHODS[config.method.name]
    return method.split and (method.half or config.server.half) == "shared"


def takes_all(config: Config) -> bool:
    """Whether the server takes all clients that wait through its blocks in one pass."""
    # they come one by one
    if shares_half(config) or config.transport.kind == "messages" or config.split.labels == "client":
        return False
    joint = config.train.joint
    return joint == "on" or (joint == "auto" and pick_devices(config.model.device) != ["cpu"])


def passes_at_once(config: Config) -> int:
    """Clients that the server computes for at once, each in a pass of its own; steps of a shared half take turns."""
    return 1 if shares_half(config) else config.train.passes or all_cores()


def make_round_plan(
    config: Config,
    budgets: Mapping[str, Budget],
    server: Budget | None,
    importance: Mapping[str, float],
    cost: CostModel,
    shares: Mapping[str, float] | None = None,
) -> Plan:
    """Splits and ranks of a round, as the method chooses them.

    Parameters
    ----------
    budgets : Mapping[str, Budget]
        By client.
    server : Budget, optional
        The server's; unlimited when None.
    importance : Mapping[str, float]
        By absolute layer name; all weights count the same where the method scores none.
    shares : Mapping[str, float], optional
        ``p_i`` by client; equal when None.

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
            ranks=config.ranks if method.ranks == "budget" else (config.lora.rank,),
            over_budget=plan.over_budget,
            recompute=train.recompute,
            shares=shares,
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
            recompute=train.recompute,
            shares=shares,
        )
    return make_plan(
        budgets,
        importance,
        cost,
        shares=shares,
        ranks=config.ranks,
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
        recompute=train.recompute,
    )
