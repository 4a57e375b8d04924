"""The forecast of a run: every client's split, ranks, memory and seconds, before anything is loaded or started."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsplitlora_flwr.cli import own_memory
from hsplitlora_flwr.cli.outcome import Outcome
from hsplitlora_flwr.cli.own_memory import OwnMemory
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.lora.limits import capped_shares
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.quantisation import check_quantiser
from hsplitlora_flwr.planning import Budget, CostModel, Plan, PlanError
from hsplitlora_flwr.planning.round import Size, cost_model, make_round_plan, own_costs

_MOST_BUDGETS = 12
PARTS = ("weights", "adapters", "activations", "update", "temporary", "process")
"""Of :meth:`hsplitlora_flwr.planning.CostModel.memory_parts`."""


@dataclass(frozen=True)
class Measured:
    """What a run has found out and a plan before it cannot know; by client where it differs among them.

    Parameters
    ----------
    folder : Path
        Of the run.
    importance : Mapping[str, float]
        Of every weight when its last plan was made.
    lengths, examples : Mapping[str, int]
        Tokens of the longest example, and how many there are.
    """

    folder: Path
    importance: Mapping[str, float]
    lengths: Mapping[str, int]
    examples: Mapping[str, int]

    @classmethod
    def read(cls, folder: str, config: Config) -> Measured:
        """Of a run whose clients are those of these settings.

        Raises
        ------
        ConfigError
            If it is none, or has made no plan.
        """
        found = Outcome.read(folder)
        plans = found.summary.get("plans") or [{"clients": ()}]
        rows = {row["client"]: row for row in plans[-1]["clients"]}
        named = {str(client) for client in range(config.clients.count)}
        if not all("longest" in row for row in rows.values()) or rows.keys() != named:
            raise ConfigError(
                f"--like {folder}: its last plan is for {', '.join(sorted(rows)) or 'nobody'}, and these settings for "
                f"{', '.join(sorted(named))}; name a run with the same clients, of this release"
            )
        lengths = {client: int(row["longest"]) for client, row in rows.items()}
        examples = {client: int(row["examples"]) for client, row in rows.items()}
        return cls(found.folder, plans[-1].get("importance", {}), lengths, examples)

    def shares(self, cap: float) -> dict[str, float]:
        """The weights ``p_i`` by client, none above ``cap``."""
        return dict(zip(self.examples, capped_shares(list(self.examples.values()), cap), strict=True))


@dataclass(frozen=True)
class Forecast:
    """A plan and what it was made from.

    Parameters
    ----------
    config : Config
        The settings.
    cost : CostModel
        Of its model, batch and length.
    budgets : Mapping[str, Budget]
        By client.
    server : Budget
    process : OwnMemory
        What a process takes by itself.
    plan : Plan
    measured : Measured, optional
        What a run found, where it is a plan for that; else importance is uniform and texts are of ``data.max_length``.
    """

    config: Config
    cost: CostModel
    budgets: Mapping[str, Budget]
    server: Budget
    process: OwnMemory
    plan: Plan
    measured: Measured | None = None

    @property
    def about(self) -> str:
        """The model and the work, in a line."""
        cost, workload = self.cost, self.cost.workload
        quantised = "" if workload.quantise == "none" else f", blocks in {workload.quantise}"
        return (
            f"{self.config.model.path}: {cost.num_blocks} blocks, {cost.total_parameters / 1e9:.2f} billion parameters "
            f"in {workload.dtype}{quantised}; {workload.batch_size} x {workload.sequence_length} tokens at a time; "
            f"{self.config.method.name}"
        )

    @property
    def of_importance(self) -> str:
        """What is taken of what only a run can know."""
        if self.measured:
            return f"with texts' lengths and amounts, as {self.measured.folder} found them"
        return "uniform, as it is not known before training; --like RUN takes that of a run"

    @property
    def timed(self) -> bool:
        """Whether predicted seconds mean something."""
        config = self.config
        return METHODS[config.method.name].ranks == "plan" and bool(config.clients.gflops or config.plan.server_gflops)

    @property
    def worth(self) -> str:
        """How good the plan is, in a line; "" of a method that does not choose."""
        plan = self.config.plan
        if METHODS[self.config.method.name].ranks != "plan" or not self.plan.bound:
            return ""
        share = self.plan.objective / self.plan.bound
        given_up = ""
        if plan.planner == "exact" and plan.tolerance:
            given_up = f"; each client may give up {plan.tolerance:.2%} for a shorter round (plan.tolerance)"
        return f"worth: {share:.1%} of the most that any plan can be worth with these budgets{given_up}"


def forecast(config: Config, like: str = "") -> Forecast:
    """Plan the first round of a run.

    Parameters
    ----------
    like : str
        The folder of a run whose measurements are to be taken; "" for none.

    Raises
    ------
    ValueError
        ``ConfigError``, ``ModelFilesError``, ``UnsupportedModelError`` or ``PlanError``, each with the value that is
        wrong and what to do.
    ModuleNotFoundError
        If what quantises the base is not installed.
    """
    path, train = Path(config.model.path).expanduser(), config.train
    if path.is_file() and path.name == "config.json":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(path.parent)))
    if METHODS[config.method.name].central:
        raise ConfigError(f"method.name={config.method.name} trains in one place; there are no clients to plan for")
    if not config.clients.memory_bytes:
        raise ConfigError(
            "clients.memory_gb is empty; state the memory of the clients, or clients.gpu_memory_gb, that of their GPUs"
        )
    rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
    measured = Measured.read(like, config) if like else None
    longest = max(measured.lengths.values()) if measured else config.data.max_length
    cost = cost_model(config, rows, longest, config.clients.count)
    check_quantiser(config.model.quantise)
    process = own_memory.stated(config) or own_memory.remembered(config) or own_memory.measured(config)
    own = 0 if config.clients.gpu_memory_gb else process.bytes  # beside a GPU the process takes nothing there
    budgets = {str(client): _budget(config, client, own) for client in range(config.clients.count)}
    # Memory that is not stated shall not be that of the machine on which somebody plans.
    on_gpus = bool(config.plan.server_gpu_memory_gb)
    memory = int((config.plan.server_gpu_memory_gb or config.plan.server_memory_gb) * 1e9) or sys.maxsize
    server_process = 0 if on_gpus else int(config.plan.server_process_mb * 1e6) or process.bytes
    server = Budget(memory, server_process, flops=config.plan.server_gflops * 1e9 or None)
    if not measured:
        plan = make_round_plan(config, budgets, server, {}, cost)
    else:
        sizes = {name: Size(length, config.split.width) for name, length in measured.lengths.items()}
        own_cost = own_costs(config, rows, sizes, config.clients.count)
        shares = measured.shares(config.clients.max_share)
        plan = make_round_plan(config, budgets, server, measured.importance, cost, shares, own_cost)
    return Forecast(config, cost, budgets, server, process, plan, measured)


def _budget(config: Config, client: int, own: int) -> Budget:
    clients = config.clients

    def stated(values: Sequence[float], unit: float) -> float | None:
        return values[client % len(values)] * unit if values else None

    memory, adapters = clients.memory_bytes[client % len(clients.memory_bytes)], stated(clients.adapter_mb, 1e6)
    speeds = stated(clients.gflops, 1e9), stated(clients.mbit_up, 1e6 / 8), stated(clients.mbit_down, 1e6 / 8)
    return Budget(memory, own, *speeds, None if adapters is None else int(adapters))


def over_budgets(config: Config, budgets: Sequence[float]) -> dict[float, Forecast | str]:
    """The forecast of a client alone, with each of these memories in GB, ascending; why there is none where there is no
    plan. Whatever else is stated of clients is that of the first."""
    first = {f"clients.{name}": values[:1] for name, values in config.clients.lists.items()}
    alone = {"clients.count": 1, "clients.min": 1, "clients.per_round": 0, "clients.fraction": 1.0}
    where = "gpu_memory_gb" if config.clients.gpu_memory_gb else "memory_gb"
    found: dict[float, Forecast | str] = {}
    for gb in sorted(budgets):
        changes = first | alone | {f"clients.{where}": (gb,)}
        try:
            found[gb] = forecast(Config.from_run_config(config.to_run_config() | changes))
        except PlanError as error:
            found[gb] = str(error).partition(". ")[0]
    return found


def usual_budgets(config: Config) -> list[float]:
    """The memories that are stated, and some below and above them, in GB."""
    stated = sorted(set(config.clients.gpu_memory_gb or config.clients.memory_gb))
    around = (stated[0] / 2, stated[0] * 3 / 4, *stated, stated[-1] * 1.5, stated[-1] * 2)
    return sorted({float(f"{gb:.2g}") if gb not in stated else gb for gb in around})[:_MOST_BUDGETS]
