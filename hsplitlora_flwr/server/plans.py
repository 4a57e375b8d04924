"""The plan of a round: what it was made for, and when it has to be made again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.limits import capped_weights
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.placement import on_gpus, pick_devices
from hsplitlora_flwr.planning.budget import Budget, PlanError
from hsplitlora_flwr.planning.cost import CostModel, Layer
from hsplitlora_flwr.planning.importance import combine, complete, drift, fill, smooth
from hsplitlora_flwr.planning.planner import ClientPlan, Plan, probe_plan
from hsplitlora_flwr.planning.round import Size, cost_model, make_round_plan, own_costs, split_bounds
from hsplitlora_flwr.server.checkpoint import RunState
from hsplitlora_flwr.training.memory import free_bytes


@dataclass(frozen=True)
class Costs:
    """What plans cost with the clients' examples as they are now.

    Parameters
    ----------
    sizes : Mapping[str, Size]
        Of what clients send, by name.
    whole : CostModel
        Of the longest of all.
    own : Mapping[str, CostModel]
        Of each client's side.
    """

    sizes: Mapping[str, Size]
    whole: CostModel
    own: Mapping[str, CostModel]

    @classmethod
    def of(cls, config: Config, sizes: Mapping[str, Size]) -> Costs:
        """The costs of what clients send."""
        train, count = config.train, len(sizes)
        at_once = min(train.micro_batch_size or train.batch_size, train.batch_size)
        whole = cost_model(config, at_once, max(size.tokens for size in sizes.values()), count)
        return cls(sizes, whole, own_costs(config, at_once, sizes, count))


class RoundPlanner:
    """Plans the rounds of a run; a plan is kept until importance, budgets or examples moved.

    Parameters
    ----------
    config : Config
    sizes : Mapping[str, Size]
        Of what clients send, by name.
    process_bytes : int
        What the server's process takes for itself.
    state : RunState, optional
        What an earlier run left: its importance, and its plans where they hold for these settings too.

    Attributes
    ----------
    importance : dict[str, float]
        Of every weight, as far as it is known; uniform where the method scores none.
    plans : dict[str, ClientPlan]
        In force, by client.
    planned_budgets, planned_importance
        What they were made for.
    """

    def __init__(
        self, config: Config, sizes: Mapping[str, Size], process_bytes: int, state: RunState | None = None
    ) -> None:
        self._config, self._method = config, METHODS[config.method.name]
        self._process_bytes = process_bytes
        self.costs = Costs.of(config, sizes)
        self.importance = dict(state.importance) if state else {}
        if not self._method.importance:
            self.importance = {layer.name: 1 / len(self.costs.whole.layers) for layer in self.costs.whole.layers}
        kept = state if state and state.plans_hold(config) else None
        self.plans: dict[str, ClientPlan] = dict(kept.plans) if kept else {}
        self.planned_budgets: dict[str, Budget] = dict(kept.planned_budgets) if kept else {}
        self.planned_importance: dict[str, float] = dict(kept.planned_importance) if kept else {}
        self._planned_sizes = dict(sizes)

    @property
    def layers(self) -> Sequence[Layer]:
        """All linear layers of the blocks, whether they may get adapters or not."""
        return self.costs.whole.all_layers

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return self.costs.whole.num_blocks

    def fit(self, sizes: Mapping[str, Size]) -> None:
        """Take note of the clients that are there now, by what they send."""
        if sizes != self.costs.sizes:
            self.costs = Costs.of(self._config, sizes)

    def check(self, budgets: Mapping[str, Budget]) -> None:
        """See that a plan is possible, before the base is loaded and a weight scored.

        Raises
        ------
        PlanError
            If none is.
        """
        make_round_plan(self._config, budgets, None, {}, self.costs.whole, own=self.costs.own)

    # ------------------------------------------------------------------ importance

    @property
    def probe_due(self) -> bool:
        """Whether importance is to be measured before there can be a plan: nothing is known of it."""
        return not self.importance

    def probe_plan(self, client: str, budget: Budget) -> ClientPlan | None:
        """What a client holds while it scores weights; None if it cannot take part, of which the plan says more."""
        return probe_plan(
            self.costs.own[client],
            budget,
            self._config.lora.ranks,
            *split_bounds(self._config, self.num_blocks),
            checkpointing=self._config.train.activation_checkpointing == "on",
            clients=self._config.lora.clients,
        )

    def take_scores(self, server_round: int, shares: Sequence[float], scores: Sequence[Mapping[str, float]]) -> None:
        """Let measured importance move what is known so far.

        Parameters
        ----------
        shares : Sequence[float]
            The weights ``p_i`` of the clients that scored.
        scores : Sequence[Mapping[str, float]]
            Theirs, by layer name, of both sides of the cut.
        """
        if known := self.importance:
            scores = [fill(each, known) for each in scores]
        totals = [math.fsum(each.values()) for each in scores]
        weights = capped_weights(shares, totals, self._config.clients.max_share)
        names = [layer.name for layer in self.costs.whole.layers]
        measured = complete(combine(zip(weights, scores, strict=True)), names)
        if known:
            measured = smooth(known, measured, server_round - 1, self._config.train.rounds)
        self.importance = measured

    @property
    def drift(self) -> float:
        """How far importance moved since the plan was made; 0 before there is one."""
        return drift(self.importance, self.planned_importance) if self.planned_importance else 0.0

    # ------------------------------------------------------------------ plans

    def why_replan(self, budgets: Mapping[str, Budget]) -> str | None:
        """Why the plan has to be made anew: "" for the first one, None while it holds."""
        stated, limit = _stated(budgets), self._config.plan.drift
        if not self.plans:
            return ""
        if stated.keys() != self.planned_budgets.keys():
            return "other clients take part"
        if stated != self.planned_budgets:
            return "budgets changed"
        if self.costs.sizes != self._planned_sizes:
            return "the size of examples or of what is sent changed"
        if self.drift > limit:
            return f"importance moved by {self.drift:.3f}, more than plan.drift={limit:g}"
        return None

    def replan(self, budgets: Mapping[str, Budget], shares: Mapping[str, float], server: Budget) -> Plan:
        """Make a plan, which holds from now on.

        Parameters
        ----------
        budgets : Mapping[str, Budget]
            By client.
        shares : Mapping[str, float]
            The weights ``p_i`` by client.
        server : Budget
            The server's, as of now (:meth:`server_budget`).

        Raises
        ------
        PlanError
            If none is possible.
        """
        costs = self.costs
        plan = make_round_plan(self._config, budgets, server, self.importance, costs.whole, shares, costs.own)
        self.plans = dict(plan.clients)
        self.planned_budgets, self.planned_importance = _stated(budgets), self.importance
        self._planned_sizes = dict(costs.sizes)
        return plan

    def server_budget(self) -> Budget:
        """What the server may use where its half lies: as ``plan.server_*`` states it, else the memory that is free
        now. On GPUs its process takes none of that.

        Raises
        ------
        PlanError
            If the process by itself takes more of the machine than it may, beside GPUs.
        """
        plan, device = self._config.plan, self._config.model.device
        stated, host = int(plan.server_gpu_memory_gb * 1e9), int(plan.server_memory_gb * 1e9)
        if stated and 0 < host < self._process_bytes:
            raise PlanError(
                f"the server's process takes {self._process_bytes:,} bytes by itself, and "
                f"plan.server_memory_gb={plan.server_memory_gb:g} lets it have {host:,}; raise that"
            )
        memory = stated or host or free_bytes(pick_devices(device))
        return Budget(memory, 0 if on_gpus(device) else self._process_bytes, flops=plan.server_gflops * 1e9 or None)


def _stated(budgets: Mapping[str, Budget]) -> dict[str, Budget]:
    """What clients state of themselves; what their processes take is measured anew every time."""
    return {name: replace(budget, process_bytes=0) for name, budget in budgets.items()}
