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
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from hsplitlora_flwr.cli.forecast import PARTS, Forecast, forecast, over_budgets, usual_budgets
from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.overrides import start
from hsplitlora_flwr.cli.plan_page import gains, plan_page
from hsplitlora_flwr.cli.settings import CONF, composed_config
from hsplitlora_flwr.cli.terminal import table_console
from hsplitlora_flwr.comparison.files import write
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.planning import ClientPlan
from hsplitlora_flwr.planning.leakage import LeakageTable
from hsplitlora_flwr.reporting.events import format_bytes


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
        say(f"round: {plan.seconds:.3g} s; the server takes steps one by one while clients compute")
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

    options = options or Options()
    try:
        result = forecast(composed_config(composed), options.like)
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
    console = table_console()
    if status := run(composed, console, _typed[-1]):
        sys.exit(status)


_typed: list[Options] = []


def command() -> None:
    """The command line."""
    options, sys.argv[1:] = Options.take(sys.argv[1:])
    _typed.append(options)
    sys.exit(start(main, Launcher, __doc__ or ""))
