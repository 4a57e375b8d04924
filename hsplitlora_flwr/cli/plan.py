"""The plan of a run, without running it: ``hsplitlora plan [overrides]``.

Reads only the configuration of the model, so it answers in seconds for models that this machine could never hold. What
a run would measure is not known yet: the importance of weights is taken as uniform, texts as long as
``data.max_length``, and clients as alike. ``--like RUN`` takes what a run has measured, and so comes to the plan that
it had. What a client's process takes by itself is that of the last run here, else measured once, in a process for it.
The exit status is 0, or 2 if there is no plan or the settings are wrong.

::

    hsplitlora plan                                                       # three clients, SmolLM2-135M
    hsplitlora plan model.path=llama-70b/ model.dtype=bfloat16 clients.memory_gb=[24,40,80]
    hsplitlora plan clients.gflops=[500,2000,2000] plan.server_gflops=1e4 # with predicted seconds
    hsplitlora plan --like runs/2026-11-22_12-00-00                       # for texts and weights as that run found them
    hsplitlora plan --budgets 6,8,12 --page plan.html                     # what other budgets gain, in the picture
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from hsplitlora_flwr.cli import own_memory
from hsplitlora_flwr.cli.outcome import Outcome
from hsplitlora_flwr.cli.overrides import start
from hsplitlora_flwr.cli.own_memory import OwnMemory
from hsplitlora_flwr.cli.run import Launcher
from hsplitlora_flwr.cli.settings import CONF
from hsplitlora_flwr.comparison.files import write
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.lora.limits import capped_shares
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.quantisation import check_quantiser
from hsplitlora_flwr.planning import Budget, ClientPlan, CostModel, Plan, PlanError
from hsplitlora_flwr.planning.leakage import LeakageTable
from hsplitlora_flwr.planning.round import Size, cost_model, make_round_plan, own_costs
from hsplitlora_flwr.reporting.events import format_bytes

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


def show(result: Forecast, console: Console) -> None:
    """Print a forecast."""
    config, cost, plan, server = result.config, result.cost, result.plan, result.server

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    say(result.about)
    say(f"importance: {result.of_importance}")
    where = "in the machine, beside its GPU" if config.clients.gpu_memory_gb else "of a client's memory"
    say(f"process: {format_bytes(result.process.bytes)} {where}, {result.process.source}")
    for each in _tables(result):
        console.print(each)
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
    if result.timed:
        say(f"round: {plan.seconds:.3g} s, the slowest client and the server for all of them")
    if result.worth:
        say(result.worth)


def _tables(result: Forecast) -> Iterator[Table]:
    """Who holds what, and what that takes; each fits 80 columns. What is the same for everybody has no column."""
    plan, budgets = result.plan, result.budgets
    yield _table(
        {
            "client": list(plan.clients),
            "budget": [format_bytes(budgets[name].memory_bytes) for name in plan.clients],
            **{title: [tell(client) for client in plan.clients.values()] for title, tell in _columns(result).items()},
        }
    )
    shares = {name: _memory_parts(result, name) for name in plan.clients}
    yield _table({"memory": list(shares)} | {part: [share[part] for share in shares.values()] for part in PARTS})


def _columns(result: Forecast) -> dict[str, Callable[[ClientPlan], str]]:
    clients, blocks = result.plan.clients.values(), result.cost.num_blocks
    columns: dict[str, Callable[[ClientPlan], str]] = {
        "split": lambda client: "-" if client.split == blocks else str(client.split),
        "blocks": lambda client: f"0-{client.split - 1}" if client.split > 1 else "0",
        "ranks": lambda client: _spread(client.ranks.values()),
        "mean": lambda client: f"{sum(client.ranks.values()) / max(len(client.ranks), 1):.1f}",
        "memory": lambda client: format_bytes(client.predicted_bytes),
    }
    if any(client.forward_only for client in clients):
        columns["trains"] = lambda client: "no" if client.forward_only else "yes"
    if any(client.checkpointed != "none" for client in clients):
        columns["checkpointing"] = lambda client: client.checkpointed
    if result.timed:
        columns["round"] = lambda client: f"{client.predicted_seconds:.3g} s"
    return columns


def _spread(ranks: Collection[int]) -> str:
    least, most = min(ranks, default=0), max(ranks, default=0)
    return f"{least}-{most}" if least < most else str(most)


def _memory_parts(result: Forecast, name: str) -> dict[str, str]:
    client = result.plan.clients[name]
    if client.split == result.cost.num_blocks:  # the cost model takes a part of the model apart, not the whole
        return dict.fromkeys(PARTS, "-")
    own = result.budgets[name].process_bytes
    parts = result.cost.memory_parts(client.split, client.ranks, own, checkpointing=client.checkpointing)
    return {part: format_bytes(parts[part]) for part in PARTS}


def _table(columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 2 if len(columns) < 9 else 1, 0, 0), pad_edge=False, header_style="bold")
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _memory(result: Forecast, client: str) -> int:
    return result.budgets[client].memory_bytes


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


@dataclass(frozen=True)
class Options:
    """What the command takes besides settings.

    Parameters
    ----------
    page : str
        The file of the picture; "" for none.
    budgets : Sequence[float]
        Memories of a client in GB that are laid side by side in it; empty = :func:`usual_budgets`.
    like : str
        The folder of a run to plan after; "" for none.
    """

    page: str = ""
    budgets: Sequence[float] = ()
    like: str = ""

    @classmethod
    def take(cls, arguments: Sequence[str]) -> tuple[Options, list[str]]:
        """From a command line, and what else stands there."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--page", default="plan.html")
        parser.add_argument("--budgets", type=_gigabytes, default=())
        parser.add_argument("--like", default="")
        known, rest = parser.parse_known_args(arguments)
        return cls(known.page, known.budgets, known.like), rest


def _gigabytes(text: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.strip("[]").split(","))
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError
    return numbers


def run(composed: DictConfig, console: Console, options: Options | None = None) -> int:
    """Read the composed settings, plan, show and draw; returns the exit status."""
    from hsplitlora_flwr.cli.plan_page import gains, plan_page

    options = options or Options()
    try:
        values: Any = OmegaConf.to_container(composed, resolve=True)
        del values["launcher"]
        result = forecast(Config.from_mapping(values), options.like)
        show(result, console)
        if options.page:
            others = over_budgets(result.config, options.budgets or usual_budgets(result.config))
            for gain in gains({gb: each for gb, each in others.items() if isinstance(each, Forecast)}):
                console.print(gain, soft_wrap=True, markup=False)
            write(Path(options.page), plan_page(result, others))
            console.print(f"as a picture: {options.page}", soft_wrap=True, markup=False)
    except (ValueError, ModuleNotFoundError, OSError, OmegaConfBaseException) as error:  # of settings, models and plans
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    """Hydra's entry point."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file has no width to keep to
    if status := run(composed, console, _typed[-1]):
        sys.exit(status)


_typed: list[Options] = []


def command() -> None:
    """The command line."""
    options, sys.argv[1:] = Options.take(sys.argv[1:])
    _typed.append(options)
    sys.exit(start(main, Launcher, __doc__ or ""))
