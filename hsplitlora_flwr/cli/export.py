"""The model of a finished run in another form: ``hsplitlora export RUN --merged | --rank R [--out FOLDER]``.

The run's own ``adapter/`` holds the update exactly. Where a program takes no adapters, ``--merged`` writes the whole
model with the update in its weights; where an adapter is to be small, ``--rank`` writes the best approximation of every
layer's update of at most that rank, and says what is lost. ``--push-to-hub`` puts what was written onto the hub;
without another form, that is the exact adapter. What is pushed is private unless ``--public``.

::

    hsplitlora export runs/2026-11-28_00-58-10 --merged
    hsplitlora export runs/2026-11-28_00-58-10 --rank 16 --out small/
    hsplitlora export runs/2026-11-28_00-58-10 --push-to-hub OWNER/NAME
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hsplitlora_flwr.cli.outcome import ADAPTER, MERGED, Outcome, ends, parser
from hsplitlora_flwr.config import ConfigError

if TYPE_CHECKING:
    from hsplitlora_flwr.lora.base import SharedBase

_CONFIG = "adapter_config.json"


def export(arguments: Sequence[str] | None = None) -> None:
    """Write the model or the adapter and print where.

    Raises
    ------
    ValueError, OSError
        If the run left nothing to export, a value is not allowed, or something is in the way.
    """
    typed = parser("Write the model of a finished run in another form.")
    form = typed.add_mutually_exclusive_group()
    form.add_argument("--merged", action="store_true", help="the whole model with the update in its weights")
    form.add_argument("--rank", type=int, metavar="R", help="an adapter of at most this rank in every layer")
    typed.add_argument("--out", default="", metavar="FOLDER", help="default: RUN/merged or RUN/adapter-rank-R")
    typed.add_argument("--push-to-hub", default="", metavar="OWNER/NAME", help="put it onto the hub")
    typed.add_argument("--public", action="store_true", help="push for everybody to read")
    options = typed.parse_args(arguments)
    if not (options.merged or options.push_to_hub or options.rank is not None):
        raise ConfigError("say what to export: --merged, --rank R, or --push-to-hub OWNER/NAME for the exact adapter")
    if options.rank is not None and options.rank < 1:
        raise ConfigError(f"--rank={options.rank} must be at least 1")
    outcome = Outcome.read(options.run)
    if not (options.merged or options.rank):
        folder = outcome.folder / (MERGED if outcome.full else ADAPTER)
        if not folder.is_dir():
            raise ConfigError(f"{outcome.folder} has no {folder.name}/: the run is {outcome.summary['status']}")
    else:
        usual = MERGED if options.merged else f"adapter-rank-{options.rank}"
        folder = Path(options.out) if options.out else outcome.folder / usual
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is there already; name another folder with --out")
        (_merge if options.merged else _shrink)(outcome, options.model, folder, options.rank)
    if options.push_to_hub:
        push(folder, options.push_to_hub, private=not options.public)


def push(folder: Path, name: str, *, private: bool) -> None:
    """Put a folder onto the hub, as the account that is logged in, and print where.

    Raises
    ------
    ConfigError
        If the hub takes it not, or cannot be reached.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        place = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=place.repo_id, commit_message="An adapter made with HSplitLoRA")
    except Exception as error:  # of whatever lies between here and there
        told = " ".join(str(error).split())[:300]
        raise ConfigError(f"{name} cannot be pushed ({told}); log in with `hf auth login`, and see its name") from error
    print(f"pushed {folder} to {place}")
    base = json.loads((folder / _CONFIG).read_text())["base_model_name_or_path"] if (folder / _CONFIG).exists() else ""
    if base and Path(base).is_dir():
        print(f"note: the adapter names its base by a folder of this machine, {base}; others need --model HUB_NAME")


def _merge(outcome: Outcome, model: str, folder: Path, rank: int | None) -> None:
    from hsplitlora_flwr.lora.export import save_merged_model
    from hsplitlora_flwr.lora.update import Change
    from hsplitlora_flwr.models.loading import load_tokenizer
    from hsplitlora_flwr.reporting.card import write_card

    config = outcome.config
    if config.model.quantise != "none":
        raise ConfigError(
            f"the base of this run was in {config.model.quantise}, and its update is one to those weights; use the "
            "adapter, or merge it with PEFT into a base that is not quantised"
        )
    base, adapter = outcome.load(model, without="merge: its merged/ is the model")
    base.update({name: Change(factors=pair) for name, pair in adapter.items()})
    save_merged_model(base.merged(), load_tokenizer(model or config.model.path), folder)
    write_card(outcome.summary, folder)
    print(f"the model with the update in its weights: {folder}")


def _shrink(outcome: Outcome, model: str, folder: Path, rank: int) -> None:
    from hsplitlora_flwr.lora.export import at_rank, save_peft_adapter, write_manifest
    from hsplitlora_flwr.lora.update import Change
    from hsplitlora_flwr.reporting.card import shrunk_facts, write_card

    base, adapter = outcome.load(model, without="shrink")
    smaller, dropped = at_rank({name: Change(factors=pair) for name, pair in adapter.items()}, rank)
    save_peft_adapter(smaller, folder, base.model, model or outcome.config.model.path, base.inside)
    print(f"an adapter of rank {rank} at most, without {100 * dropped:.3g}% of the update's square: {folder}")
    base.update(smaller)
    measured = _perplexity(outcome, base)
    write_manifest(folder, outcome.summary["rounds"])
    write_card(outcome.summary, folder, shrunk_facts(rank, measured, dropped))


def _perplexity(outcome: Outcome, base: SharedBase) -> float | None:
    """Of the run's held-out text, told beside that of the exact adapter; None where the text is not here."""
    from hsplitlora_flwr.data.collate import evaluation_batches
    from hsplitlora_flwr.data.fit import fit_text
    from hsplitlora_flwr.data.sources import DataError, load_text
    from hsplitlora_flwr.evaluation.perplexity import evaluate

    config = outcome.config
    try:
        held_out = fit_text(load_text(config.data, config.run.seed).held_out, config)
    except DataError as error:
        print(f"what that costs in perplexity was not measured: {error}")
        return None
    found = evaluate(base.whole(), evaluation_batches(held_out, config.evaluation.batch_size))
    exact, before = outcome.summary["perplexity_after"], outcome.summary["perplexity_before"]
    print(f"perplexity {found.perplexity:.3f}; the exact adapter {exact:.3f}, the base {before:.3f}")
    return found.perplexity


def command() -> None:
    """The command line."""
    ends(export)
