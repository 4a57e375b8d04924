"""The model of a finished run in another form: ``hsplitlora export RUN --merged | --rank R [--out FOLDER]``.

The run's own ``adapter/`` holds the update exactly. Where a program takes no adapters, ``--merged`` writes the whole
model with the update in its weights; where an adapter is to be small, ``--rank`` writes the best approximation of every
layer's update of at most that rank, and says what is lost.

::

    hsplitlora export runs/2026-11-28_00-58-10 --merged
    hsplitlora export runs/2026-11-28_00-58-10 --rank 16 --out small/
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hsplitlora_flwr.cli.outcome import MERGED, Outcome, ends, parser
from hsplitlora_flwr.config import ConfigError


def export(arguments: Sequence[str] | None = None) -> None:
    """Write the model or the adapter and print where.

    Raises
    ------
    ValueError, OSError
        If the run left nothing to export, a value is not allowed, or something is in the way.
    """
    typed = parser("Write the model of a finished run in another form.")
    form = typed.add_mutually_exclusive_group(required=True)
    form.add_argument("--merged", action="store_true", help="the whole model with the update in its weights")
    form.add_argument("--rank", type=int, metavar="R", help="an adapter of at most this rank in every layer")
    typed.add_argument("--out", default="", metavar="FOLDER", help="default: RUN/merged or RUN/adapter-rank-R")
    options = typed.parse_args(arguments)
    if not options.merged and options.rank < 1:
        raise ConfigError(f"--rank={options.rank} must be at least 1")
    outcome = Outcome.read(options.run)
    usual = MERGED if options.merged else f"adapter-rank-{options.rank}"
    folder = Path(options.out) if options.out else outcome.folder / usual
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; name another folder with --out")
    if options.merged:
        _merge(outcome, options.model, folder)
    else:
        _shrink(outcome, options.model, folder, options.rank)


def _merge(outcome: Outcome, model: str, folder: Path) -> None:
    from hsplitlora_flwr.lora.export import save_merged_model
    from hsplitlora_flwr.lora.update import Change
    from hsplitlora_flwr.models.loading import load_tokenizer

    config = outcome.config
    if config.model.quantise != "none":
        raise ConfigError(
            f"the base of this run was in {config.model.quantise}, and its update is one to those weights; use the "
            "adapter, or merge it with PEFT into a base that is not quantised"
        )
    base, adapter = outcome.load(model, without="merge: its merged/ is the model")
    base.update({name: Change(factors=pair) for name, pair in adapter.items()})
    save_merged_model(base.merged(), load_tokenizer(model or config.model.path), folder)
    print(f"the model with the update in its weights: {folder}")


def _shrink(outcome: Outcome, model: str, folder: Path, rank: int) -> None:
    from hsplitlora_flwr.lora.export import save_peft_adapter
    from hsplitlora_flwr.lora.update import Delta

    base, adapter = outcome.load(model, without="shrink")
    smaller = Delta(rank)
    smaller.add(adapter)
    save_peft_adapter(smaller.changes(), folder, base.model, model or outcome.config.model.path, base.inside)
    print(f"an adapter of rank {rank} at most, without {100 * smaller.dropped:.3g}% of the update's square: {folder}")


def command() -> None:
    """The command line."""
    ends(export)
