"""The directions of the cut that matter for the loss: ``hsplitlora bottleneck [options] [key=value ...]``.

Learns them from the configured text, which is taken to be public, and writes the file that ``split.bottleneck`` names.
Sites and server need the same file. With ``split.width`` clients then send a token in so many numbers.

::

    hsplitlora bottleneck model.path=FOLDER data=own data.path=public.jsonl --out directions.safetensors
    hsplitlora bottleneck --splits 15 --deal 0        # SmolLM2-135M, the public half of the dialogues
    hsplitlora attack --splits 15 split.bottleneck=directions.safetensors split.width=64
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hsplitlora_flwr.cli.attack import deal, numbers, read_settings
from hsplitlora_flwr.data.fit import fit_text
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.models.configuration import with_model_dtype
from hsplitlora_flwr.models.split import check_split
from hsplitlora_flwr.models.stored import read_settled_config
from hsplitlora_flwr.privacy.directions import learn
from hsplitlora_flwr.transport.bottleneck import Bottleneck


def main(arguments: Sequence[str] | None = None) -> int:
    """Learn and write; returns the exit status, 2 where the command line is wrong."""
    options = _parser().parse_args(arguments)
    try:
        config = with_model_dtype(read_settings(options.overrides))
        model = read_settled_config(config.model.path)
        splits = sorted(set(options.splits)) or list(range(1, int(model.num_hidden_layers)))
        for split in splits:
            check_split(model, split)
        if not 0 < options.width <= int(model.hidden_size):
            raise ValueError(f"--width {options.width} must be from 1 to the {model.hidden_size} of the hidden size")
        text = load_text(config.data, config.run.seed).train
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    public = text if options.deal is None else deal(text, options.deal)[0]
    rows = fit_text(public[: options.rows], config)
    base = SharedBase(config.model.path, config.model.dtype, quantise=config.model.quantise)
    Bottleneck.write(options.out, learn(base, rows, splits, options.width))
    print(
        f"{options.width} of {model.hidden_size} directions at the split points {', '.join(map(str, splits))}, from "
        f"{sum(map(len, rows)):,} tokens: {options.out}"
    )
    return 0


def command() -> None:
    """The process of a command line; ends with the exit status."""
    sys.exit(main())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("::")[0] if __doc__ else "", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=numbers, default=[], help="split points, such as 5,10,15; all by default")
    parser.add_argument("--width", type=int, default=128, help="most directions that a client may send (128)")
    parser.add_argument("--rows", type=int, default=400, help="rows to learn from (400)")
    parser.add_argument(
        "--deal", type=int, help="only the half that hsplitlora attack deals to the public by this seed"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("directions.safetensors"), help="where to write (directions.safetensors)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of model and data")
    return parser
