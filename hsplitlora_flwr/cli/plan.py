"""The plan of a run, without running it: ``hsplitlora plan [overrides]``.

Reads only the configuration of the model, so it answers in seconds for models that this machine could never hold. What
training would measure is not known yet: the importance of weights is taken as uniform, texts as long as
``data.max_length``, and the process of a client as large as this one. The exit status is 0, or 2 if there is no plan or
the settings are wrong.

::

    hsplitlora plan                                                       # three clients, SmolLM2-135M
    hsplitlora plan model.path=llama-70b/ model.dtype=bfloat16 clients.memory_gb=[24,40,80]
    hsplitlora plan clients.gflops=[500,2000,2000] plan.server_gflops=1e4 # with predicted seconds
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from hsplitlora_flwr.cli.overrides import start
from hsplitlora_flwr.cli.run import Launcher
from hsplitlora_flwr.cli.settings import CONF
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.loading import read_config
from hsplitlora_flwr.models.quantisation import check_quantiser
from hsplitlora_flwr.planning import Budget, CostModel, Plan
from hsplitlora_flwr.planning.leakage import LeakageTable
from hsplitlora_flwr.planning.round import cost_model, make_round_plan
from hsplitlora_flwr.reporting.events import format_bytes
from hsplitlora_flwr.training.memory import process_bytes, resting_bytes

PARTS = ("weights", "adapters", "activations", "update", "temporary", "process")
"""Of :meth:`hsplitlora_flwr.planning.CostModel.memory_parts`."""


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
    server : Budget or None
        None when its memory is not stated.
    plan : Plan
        For uniform importance.
    """

    config: Config
    cost: CostModel
    budgets: Mapping[str, Budget]
    server: Budget
    plan: Plan


def forecast(config: Config) -> Forecast:
    """Plan the first round of a run.

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
        raise ConfigError("clients.memory_gb is empty; state the memory of the clients")
    rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
    cost = cost_model(config, rows, config.data.max_length)
    check_quantiser(config.model.quantise)  # and load the library, which is part of a client's process
    own = int(config.clients.process_mb * 1e6) or process_bytes(read_config(config.model.path))
    budgets = {str(client): _budget(config, client, own) for client in range(config.clients.count)}
    # Memory that is not stated shall not be that of the machine on which somebody plans.
    memory = int(config.plan.server_memory_gb * 1e9) or sys.maxsize
    server_process = int(config.plan.server_process_mb * 1e6) or resting_bytes()
    server = Budget(memory, server_process, flops=config.plan.server_gflops * 1e9 or None)
    return Forecast(config, cost, budgets, server, make_round_plan(config, budgets, server, {}, cost))


def _budget(config: Config, client: int, own: int) -> Budget:
    clients = config.clients

    def stated(values: Sequence[float], unit: float) -> float | None:
        return values[client % len(values)] * unit if values else None

    memory, adapters = clients.memory_bytes[client % len(clients.memory_bytes)], stated(clients.adapter_mb, 1e6)
    speeds = stated(clients.gflops, 1e9), stated(clients.mbit_up, 1e6 / 8), stated(clients.mbit_down, 1e6 / 8)
    return Budget(memory, own, *speeds, None if adapters is None else int(adapters))


def show(result: Forecast, console: Console) -> None:
    """Print a forecast."""
    config, cost, plan, server = result.config, result.cost, result.plan, result.server
    workload = cost.workload
    quantised = "" if workload.quantise == "none" else f", blocks in {workload.quantise}"

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    say(
        f"{config.model.path}: {cost.num_blocks} blocks, {cost.total_parameters / 1e9:.2f} billion parameters in "
        f"{workload.dtype}{quantised}; {workload.batch_size} x {workload.sequence_length} tokens at a time; "
        f"{config.method.name}"
    )
    say("importance: uniform, as it is not known before training")
    console.print(_table(result))
    for client, missing in plan.left_out.items():
        say(f"client {client} is left out: it misses {missing:,} bytes of its {format_bytes(_memory(result, client))}")
    if METHODS[config.method.name].split:
        if table := LeakageTable.of(config):
            for warning in table.warnings({name: client.split for name, client in plan.clients.items()}):
                say(f"warning: {warning}")
        up, down = cost.wire_bytes(config.transport.up, config.transport.down)
        say(f"wire: {format_bytes(up)} up and {format_bytes(down)} down, a client and step")
        if any(client.forward_only for client in plan.clients.values()):
            _, down = cost.wire_bytes(config.transport.up, config.transport.down, forward_only=True)
            say(f"      {format_bytes(down)} down to a client that trains nothing")
        budget = (
            "memory not stated" if server.memory_bytes == sys.maxsize else f"of {format_bytes(server.memory_bytes)}"
        )
        say(f"server: {format_bytes(plan.server_bytes)} ({budget})")
    if _timed(config):
        say(f"round: {plan.seconds:.3g} s, the slowest client and the server for all of them")
    if METHODS[config.method.name].ranks == "plan":
        bound = f", no plan above {plan.bound:.4f}" if config.plan.planner == "exact" else ""
        say(f"objective: {config.plan.planner} {plan.objective:.4f}, greedy {plan.greedy_objective:.4f}{bound}")


def _table(result: Forecast) -> Table:
    config, cost, plan = result.config, result.cost, result.plan
    timed = _timed(config)
    table = Table(header_style="bold", title="clients", title_justify="left")
    for name in (
        "client",
        "budget",
        "split",
        "blocks",
        "trains",
        "ranks",
        "mean",
        "recompute",
        "memory",
        *PARTS,
        *(["round"] if timed else []),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for name, client in plan.clients.items():
        budget, split = result.budgets[name], client.split
        ranks = list(client.ranks.values()) or [0]
        # The cost model takes the memory of a part of the model apart, not that of the whole.
        whole = split == cost.num_blocks
        again = client.recompute
        parts = {} if whole else cost.memory_parts(split, client.ranks, budget.process_bytes, recompute=again)
        table.add_row(
            name,
            format_bytes(budget.memory_bytes),
            "-" if whole else str(split),
            f"0-{split - 1}" if split > 1 else "0",
            "no" if client.forward_only else "yes",
            f"{min(ranks)}-{max(ranks)}" if min(ranks) < max(ranks) else str(ranks[0]),
            f"{sum(ranks) / len(ranks):.1f}",
            client.recomputing,
            format_bytes(client.predicted_bytes),
            *(format_bytes(parts[part]) if parts else "-" for part in PARTS),
            *([f"{client.predicted_seconds:.3g} s"] if timed else []),
        )
    return table


def _timed(config: Config) -> bool:
    """Whether predicted seconds mean something."""
    return METHODS[config.method.name].ranks == "plan" and bool(config.clients.gflops or config.plan.server_gflops)


def _memory(result: Forecast, client: str) -> int:
    return result.budgets[client].memory_bytes


def run(composed: DictConfig, console: Console) -> int:
    """Read the composed settings, plan and show; returns the exit status."""
    try:
        values: Any = OmegaConf.to_container(composed, resolve=True)
        del values["launcher"]
        show(forecast(Config.from_mapping(values)), console)
    except (ValueError, ModuleNotFoundError, OmegaConfBaseException) as error:  # what settings, models and plans raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    """Hydra's entry point."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file has no width to keep to
    if status := run(composed, console):
        sys.exit(status)


def command() -> None:
    """The command line."""
    sys.exit(start(main, Launcher, __doc__ or ""))
