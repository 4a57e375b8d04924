"""``hsplitlora COMMAND ...``: what there is to do, and which module of this package does it.

A module is imported when its command is called, since torch and transformers take seconds: on a terminal a line says so
meanwhile. Commands that need Hydra say what to install where it is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

from hsplitlora_flwr.cli.interrupts import interruptible

EXTRA = "pip install 'hsplitlora-flwr[simulation]'"
"""What brings the packages that only the command line needs."""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Parameters
    ----------
    module : str
        A module of this package; its ``command()`` reads ``sys.argv`` and ends with the exit status.
    text : str
        What it does.
    needs : tuple[str, ...]
        Packages of the extra ``simulation`` without which it cannot begin.
    """

    module: str
    text: str
    needs: tuple[str, ...] = ()


COMMANDS = {
    "run": Command("run", "one federated run on this machine; settings are KEY=VALUE", ("hydra",)),
    "plan": Command("plan", "who would hold what, without running it: will my devices do?", ("hydra",)),
    "preview": Command("preview", "what a run would train on: rows as tokens, lengths, what clients get", ("hydra",)),
    "compare": Command("compare", "methods x client settings x seeds: tables and plots", ("hydra",)),
    "sweep": Command("sweep", "the runs of a sweep side by side: sweep.html, a table and a CSV file"),
    "report": Command("report", "report.html of a run made anew; several runs side by side"),
    "generate": Command("generate", "texts, with the model of a finished run"),
    "export": Command("export", "the model of a finished run, merged or as a smaller adapter"),
    "attack": Command("attack", "how much of a client's text a curious server reads off the cut", ("hydra",)),
    "new": Command("new", "the beginning of a Flower app with data of one's own"),
    "bottleneck": Command(
        "bottleneck", "the directions of the cut that matter for the loss, from public text", ("hydra",)
    ),
    "doctor": Command("doctor", "what of this machine would be in a run's way, and what to do"),
}

EXAMPLES = """\
examples:
  hsplitlora run train.rounds=4 clients.memory_gb=[1,1.3,1.8]
  hsplitlora run -m +sweep=budgets
  hsplitlora plan model.path=FOLDER_OR_HUB_NAME clients.memory_gb=[6,8,12,20]
  hsplitlora compare data.path=E2E_FOLDER --methods hsplitlora,splitlora --seeds 1,2
  hsplitlora generate RUN_FOLDER "What is a cell?"
  hsplitlora export RUN_FOLDER --merged
  hsplitlora new my-app

`hsplitlora COMMAND --help` says what a command takes. The exit status is 0 if it did what it was to do, 1 if a run
failed, 2 if what was typed is wrong.
"""


def main(arguments: Sequence[str] | None = None, program: str = "hsplitlora {}") -> None:
    """Run a subcommand; it ends the process with its exit status.

    Parameters
    ----------
    arguments : Sequence[str], optional
        The command and its arguments; by default those of the process.
    program : str
        What the user typed in place of the command ``{}``, as usage lines show it.
    """
    if arguments is None:
        interruptible()  # from the first second: no traceback through half an import
        arguments = sys.argv[1:]
    arguments = list(arguments)
    name = _parser().parse_args(_meant(arguments)[:1]).command
    command = COMMANDS[name]
    if missing := [package for package in command.needs if find_spec(package) is None]:
        print(f"error: this command needs {', '.join(missing)}: {EXTRA}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [program.format(name), *arguments[1:]]
    from rich.console import Console

    # Where FORCE_COLOR is set, rich takes every file for a terminal.
    loading = Console(stderr=True).status(f"{name}: loading") if sys.stderr.isatty() else nullcontext()
    with loading:
        module = import_module(f"hsplitlora_flwr.cli.{command.module}")
    module.command()


def _meant(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments; where they begin with no command, the error says which one may be meant.

    Nothing, and ``help``, ask for the help.
    """
    first = next(iter(arguments), "help")
    if first == "help":
        return ["--help"]
    if first in COMMANDS or first.startswith("-"):
        return arguments
    close = get_close_matches(first, COMMANDS, 1)
    meant = ["run", first] if "=" in first else close
    if not meant:
        return arguments
    print(f"error: there is no command {first!r}; did you mean `hsplitlora {' '.join(meant)}`?", file=sys.stderr)
    sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<12}{command.text}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hsplitlora",
        usage="hsplitlora COMMAND ...",
        description="Fine-tune language models on private data that cannot leave weak, uneven machines.\n\n"
        f"commands:\n{listed}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"hsplitlora-flwr {version('hsplitlora-flwr')}")
    return parser


if __name__ == "__main__":
    main(program="python -m hsplitlora_flwr.cli {}")
