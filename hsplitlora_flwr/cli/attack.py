"""What a curious server reads off the cut: ``hsplitlora attack [options] [key=value ...]``.

Splits the groups of the configured text (topics of ``dialogues``, kinds of food of ``e2e``) into public ones, from
which an attacker learns, and private ones, whose tokens it is to recover from the activations at the cut; another half
for every seed. Writes ``leakage.json``, which ``split.leakage`` reads, and prints a table.

::

    hsplitlora attack                                                  # SmolLM2-135M, dialogues
    hsplitlora attack --splits 1,4,8,12 model.path=FOLDER data=jsonl data.path=my.jsonl
    hsplitlora attack --run runs/2026-11-28_00-58-10                   # under the update of a finished run
    hsplitlora attack --splits 8 split.clip=40 split.noise=1           # what noise stops
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.data.fit import fit_text
from hsplitlora_flwr.data.sources import Example, load_text
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.export import load_update
from hsplitlora_flwr.lora.update import Change
from hsplitlora_flwr.models.configuration import with_model_dtype
from hsplitlora_flwr.models.split import check_split
from hsplitlora_flwr.models.stored import read_settled_config
from hsplitlora_flwr.paths import CHECKPOINTS, last_round
from hsplitlora_flwr.privacy.attacks import ATTACKS
from hsplitlora_flwr.privacy.labels import measure_labels
from hsplitlora_flwr.privacy.leakage import View, measure
from hsplitlora_flwr.privacy.membership import ACCUSED, measure_membership
from hsplitlora_flwr.privacy.protection import epsilon, protection


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit status, 2 where the command line is wrong."""
    options = _parser().parse_args(arguments)
    try:
        config = read_settings(options.overrides)
        splits = _splits(config, options.splits)
        for name in ("membership", "rounds"):
            if getattr(options, name) and not options.run:
                raise ConfigError(f"--{name} is told from the updates of a run; name its folder, --run FOLDER")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = [leakage | {"seed": seed} for seed in options.seeds for leakage in _measured(config, splits, seed, options)]
    page = {
        "model": config.model.path,
        "update": str(options.run or ""),
        "data": config.data.source,
        "public_rows": options.public_rows,
        "private_rows": options.private_rows,
        "clip": config.split.clip,
        "noise": config.split.noise,
        "width": config.split.width,
        "crossings": options.crossings,
        "gradients": options.gradients,
        "rounds": options.rounds,
        "seeds": options.seeds,
        "recovered": best_by_split(found),
        "attacks": found,
        **_beside(config, options),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    show(found, Console())
    if config.split.noise:
        numbers_sent = config.split.width or int(read_settled_config(config.model.path).hidden_size)
        hidden = epsilon(config.split.noise, numbers_sent, options.crossings)
        print(
            f"a token's own vector is hidden with epsilon {hidden:.3g} at delta 1e-5 after {options.crossings} "
            "crossing(s); see docs/privacy.md for what that is worth"
        )
    print(f"written to {options.out}")
    return 0


def command() -> None:
    """The process of a command line; ends with the exit status."""
    sys.exit(main())


def best_by_split(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the strongest attack recovered of all tokens at every split, the mean over seeds."""
    return {
        str(split): max(
            fmean(row["recovered"] for row in found if row["split"] == split and row["attack"] == attack)
            for attack in {row["attack"] for row in found}
        )
        for split in sorted({row["split"] for row in found})
    }


def show(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A row a split: of all tokens, and of those that the public text does not hold, by attack."""
    attacks = list(dict.fromkeys(row["attack"] for row in found))
    table = Table(title="tokens recovered: all / those that the public text does not hold", title_justify="left")
    for column in ("split", "median norm", *attacks):
        table.add_column(column, justify="right")
    for split in sorted({row["split"] for row in found}):
        cells = [f"{fmean(row['norm'] for row in found if row['split'] == split):.3g}"]
        for attack in attacks:
            rows = [row for row in found if row["split"] == split and row["attack"] == attack]
            cells.append(" / ".join(_with_spread([row[key] for row in rows]) for key in ("recovered", "unseen")))
        table.add_row(str(split), *cells)
    console.print(table)


def _with_spread(found: Sequence[float | None]) -> str:
    shares = [share for share in found if share is not None]
    if not shares:
        return "-"
    spread = f" ± {100 * stdev(shares):.0f}" if len(shares) > 1 else ""
    return f"{100 * fmean(shares):.0f}{spread} %"


def _measured(
    config: Config, splits: Sequence[int], seed: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    public, private = deal(load_text(config.data, config.run.seed).train, seed)
    config = with_model_dtype(config)
    base = _base(config)
    if options.run:
        base.update(_update(options.run, last_round(options.run)))
    learn, recover = fit_text(public[: options.public_rows], config), fit_text(private[: options.private_rows], config)
    updates = _updates(options.run) if options.rounds else []
    quiet = partial(protection, replace(config.split, noise=0.0))
    view = View(partial(protection, config.split), quiet, options.crossings, options.gradients, updates)
    for leakage in measure(base, learn, recover, splits, options.attacks, seed, view):
        print(
            f"seed {seed}, split {leakage.split}, {leakage.attack}: "
            f"{leakage.recovered:.1%} of {leakage.tokens:,} tokens",
            flush=True,
        )
        yield asdict(leakage)


def _beside(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """What else was asked for: labels from gradients, and membership, of the training rows against held-out ones."""
    if not (options.labels or options.membership):
        return {}
    text, config = load_text(config.data, config.run.seed), with_model_dtype(config)
    base, found = _base(config), {}
    if options.labels:
        rows = fit_text(deal(text.train, options.seeds[0])[1][: options.private_rows], config)
        labels = measure_labels(base, rows, config.transport.up)
        print(
            f"labels that stay with the client, from its gradients: {labels.recovered:.1%} of {labels.labels:,}; they "
            f"are {labels.labels / labels.tokens:.0%} of the tokens"
        )
        found["labels"] = asdict(labels)
    if options.membership:
        rows, others = (fit_text(each[: options.private_rows], config) for each in (text.train, text.held_out))
        told = measure_membership(base, _update(options.run, last_round(options.run)), rows, others)
        print(
            f"rows that were trained on, told from others by the update: area under the curve {told.area:.2f}, and "
            f"{told.found:.0%} of them where {ACCUSED:.0%} of others are taken for such"
        )
        found["membership"] = asdict(told)
    return found


def _base(config: Config) -> SharedBase:
    return SharedBase(config.model.path, config.model.dtype, quantise=config.model.quantise)


def _update(run: Path, number: int) -> Mapping[str, Change]:
    """Of the end of a round; none before the first."""
    return load_update(run / CHECKPOINTS / f"round-{number}").changes() if number else {}


def _updates(run: Path) -> list[Mapping[str, Change]]:
    """Those under which rows crossed in the rounds of a run, as far as they were kept."""
    begun = range(last_round(run))
    return [_update(run, number) for number in begun if not number or (run / CHECKPOINTS / f"round-{number}").is_dir()]


def deal(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Whole groups at random to the public and the private half; single rows where there is one group only."""
    generator = random.Random(seed)
    groups = sorted({example.group for example in examples})
    if len(groups) > 1:
        chosen = set(generator.sample(groups, len(groups) // 2))
        public = [example for example in examples if example.group in chosen]
        private = [example for example in examples if example.group not in chosen]
    else:
        rows = set(generator.sample(range(len(examples)), len(examples) // 2))
        public = [example for row, example in enumerate(examples) if row in rows]
        private = [example for row, example in enumerate(examples) if row not in rows]
    generator.shuffle(public)
    generator.shuffle(private)
    return public, private


def read_settings(overrides: Sequence[str]) -> Config:
    """Settings from ``key=value``, over the defaults of the schema.

    Raises
    ------
    ConfigError
        If one is unknown or wrong.
    """
    pairs = [override.partition("=") for override in overrides]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise ConfigError(f"{wrong[0]!r} is no setting; write key=value, such as model.path=FOLDER")
    given = {"data.source" if key == "data" else key: value for key, _, value in pairs}
    defaults = Config().to_run_config()
    typed = {key: type(defaults[key])(value) if key in defaults else value for key, value in given.items()}
    return Config.from_run_config(typed)


def _splits(config: Config, wanted: Sequence[int]) -> list[int]:
    model = read_settled_config(config.model.path)
    blocks = int(model.num_hidden_layers)
    splits = sorted(set(wanted)) or [split for split in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32) if split < blocks]
    for split in splits:
        check_split(model, split)
    return splits


def numbers(text: str) -> list[int]:
    """A list as it is typed, such as ``1,4,8``."""
    return [int(number) for number in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("::")[0] if __doc__ else "",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def attacks(text: str) -> list[str]:
        names = text.split(",")
        if wrong := [name for name in names if name not in ATTACKS]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is unknown; choose of {', '.join(ATTACKS)}")
        return names

    parser.add_argument(
        "--splits", type=numbers, default=[], help="split points, such as 1,4,8; some of all by default"
    )
    learnt = [name for name in ATTACKS if name != "search"]
    parser.add_argument(
        "--attacks",
        type=attacks,
        default=learnt,
        help=f"of {', '.join(ATTACKS)}; all but the last by default, which reads most and takes long",
    )
    parser.add_argument("--seeds", type=numbers, default=[0], help="each deals the groups anew (0)")
    parser.add_argument("--public-rows", type=int, default=1000, help="rows that the attacker learns from (1000)")
    parser.add_argument("--private-rows", type=int, default=200, help="rows to recover (200)")
    parser.add_argument(
        "--crossings", type=int, default=1, help="how often each row has crossed the cut, with other noise (1)"
    )
    parser.add_argument(
        "--labels", action="store_true", help="also read labels off the gradients of split.labels=client"
    )
    parser.add_argument(
        "--membership", action="store_true", help="with --run: also tell rows that it trained on from held-out ones"
    )
    parser.add_argument(
        "--gradients", action="store_true", help="the attacker also has the directions of the loss's gradients"
    )
    parser.add_argument(
        "--rounds", action="store_true", help="with --run: each row crossed in all of its rounds, under their updates"
    )
    parser.add_argument("--run", type=Path, help="folder of a run, whose update the model has")
    parser.add_argument("--out", type=Path, default=Path("leakage.json"), help="where to write (leakage.json)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of model and data")
    return parser
