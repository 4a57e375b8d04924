"""What a server reads off the cut, and what protections stop and cost: ``python -m simulations.privacy [PART...]``.

SmolLM2-135M and the dialogues; a seed deals the topics into public ones, from which the attacker learns (600 rows), and
private ones, of which it is to read 60 rows. The parts, each a file of rows in ``--out``:

- ``splits``: attacks at split points from 1 to 29, nothing protected.
- ``protections``: attacks at split 15 on what protections let through.
- ``deeper``: bottlenecks at other split points.
- ``price``: perplexity of held-out text after 40 steps on private rows, behind protections at split 15. Clients train
  nothing; the model is measured as it is used, without a protection.
- ``trained``: the same with clients that train, against the tokens' embeddings or not (``split.decorrelate``), and an
  attack on what they send after it.
- ``gradients``: attacks that also have the loss's gradient at the cut.
- ``told``: whether the right token is told from 255 others at its place by what came, behind split 15; 4 private rows.

Every figure is computed once: a row that a file holds is not measured again, so the command can be stopped at any time.
``--plot`` draws what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from hsplitlora_flwr.cli.attack import deal, numbers
from hsplitlora_flwr.comparison.files import write
from hsplitlora_flwr.config import Config, SplitConfig, TrainConfig
from hsplitlora_flwr.data.collate import Tokens, evaluation_batches, training_batches
from hsplitlora_flwr.data.fit import fit_text
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.layers import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.update import AccumulatedUpdate
from hsplitlora_flwr.models.parts import ModelPart
from hsplitlora_flwr.privacy import directions
from hsplitlora_flwr.privacy.attacks import Computes, Known, Text
from hsplitlora_flwr.privacy.leakage import PLAIN, Reader, View, as_received, cut_activations, embeddings_of
from hsplitlora_flwr.privacy.protection import protection
from hsplitlora_flwr.training.allowance import Allowance
from hsplitlora_flwr.training.client import ClientTrainer, train_client
from hsplitlora_flwr.training.cut import SeededCut
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.bottleneck import Bottleneck
from hsplitlora_flwr.transport.frames import Frame

Row = dict[str, Any]

PUBLIC, PRIVATE, HELD_OUT, LEARNT_FROM = 600, 60, 80, 200  # rows; the last for directions
WIDTH = 128
SPLIT = 15
SPLITS = (1, 2, 4, 8, 15, 22, 29)
DEEPER = (4, 8, 22)
STEPS, BATCH, RANK = 40, 8, 8
TRAIN = TrainConfig(lr=2e-3, rounds=1, steps=STEPS)
PLAIN_CUT = SplitConfig()
PROTECTIONS = {
    "": PLAIN_CUT,
    "width 64": SplitConfig(width=64),
    "width 32": SplitConfig(width=32),
    "width 64, clip 1.5, noise 1": SplitConfig(width=64, clip=1.5, noise=1.0),
}
TOLD = {
    **PROTECTIONS,
    "width 16": SplitConfig(width=16),
    **{
        f"width 64, clip 1.5, noise {noise:g}": SplitConfig(width=64, clip=1.5, noise=noise)
        for noise in (0.5, 1.0, 2.0, 4.0)
    },
}
TOLD_ROWS, CANDIDATES = 4, 256
ATTACKED = ("regression", "inverter", "search")
DECORRELATED = (0.0, 1.0, 10.0)


@dataclass(frozen=True)
class Cell:
    """A figure to be: what it is of, and how it is measured."""

    key: Row
    measure: Callable[[], Row]


class Deal:
    """The text of a seed, and what leaves a client of it.

    Parameters
    ----------
    config : Config
    seed : int
    folder : Path
        Where the directions of bottlenecks are kept.
    at : Sequence[int]
        Split points whose activations are needed, rising.
    read : int
        Private rows that are to be read.
    """

    def __init__(self, config: Config, seed: int, folder: Path, at: Sequence[int], read: int = PRIVATE) -> None:
        self.config, self.seed, self._folder, self._at, self._read = config, seed, folder, at, read
        text = load_text(config.data, config.run.seed)
        public, private = deal(text.train, seed)
        self.public, self.private = fit_text(public[:PUBLIC], config), fit_text(private, config)
        self.held_out = fit_text(text.held_out[:HELD_OUT], config)

    @cached_property
    def base(self) -> SharedBase:
        """The model, without an update."""
        return SharedBase(self.config.model.path, "float32")

    @cached_property
    def reader(self) -> Reader:
        """Who attacks."""
        return Reader.of(self.base, self.public, self.private[: self._read], self.seed)

    def seen(self, splits: Sequence[int], view: View = PLAIN) -> dict[int, tuple[list[Text], list[Text]]]:
        """What is seen of public and private rows, by split point."""
        both = zip(
            cut_activations(self.base, self.public, splits, view, f"{self.seed}/attacker"),
            cut_activations(self.base, self.private[: self._read], splits, view, f"{self.seed}/client"),
            strict=True,
        )
        return {split: (public, private) for (split, public), (_, private) in both}

    @cached_property
    def plain(self) -> Mapping[int, tuple[list[Text], list[Text]]]:
        """The activations as they are computed."""
        return self.seen(self._at)

    def settings(self, split: int, protect: SplitConfig) -> SplitConfig:
        """Those of a protection, with directions for this split point if it needs any."""
        if not protect.width:
            return protect
        file = self._folder / f"directions-{split}-{self.seed}.safetensors"
        if not file.exists():
            Bottleneck.write(file, directions.learn(self.base, self.public[:LEARNT_FROM], [split], WIDTH))
        return replace(protect, bottleneck=str(file))

    def attacked(self, split: int, protect: SplitConfig, attack: str) -> Row:
        """What an attack reads behind a protection."""
        settings = self.settings(split, protect)
        change, quiet = protection(settings, split), protection(replace(settings, noise=0.0), split)

        def sent(texts: Sequence[Text], who: str) -> list[Text]:
            seed = f"{self.seed}/{who}/{split}"
            return [(as_received(cut[None], change, seed, at)[0], ids) for at, (cut, ids) in enumerate(texts)]

        public, private = self.plain[split]
        return asdict(self.reader.read(split, attack, sent(public, "attacker"), sent(private, "client"), quiet))


# ---------------------------------------------------------------------- the parts


def splits(of: Deal, attack: str) -> Iterator[Cell]:
    """Attacks at split points from 1 to 29, nothing protected."""
    for split in SPLITS:
        yield Cell({"split": split, "attack": attack}, partial(of.attacked, split, PLAIN_CUT, attack))


def protections(of: Deal, attack: str) -> Iterator[Cell]:
    """Attacks at split 15 on what protections let through."""
    for name, protect in PROTECTIONS.items():
        key = {"split": SPLIT, "protection": name, "attack": attack}
        yield Cell(key, partial(of.attacked, SPLIT, protect, attack))


def deeper(of: Deal, attack: str) -> Iterator[Cell]:
    """Bottlenecks at other split points."""
    for split in DEEPER:
        for name in ("width 64", "width 32"):
            key = {"split": split, "protection": name, "attack": attack}
            yield Cell(key, partial(of.attacked, split, PROTECTIONS[name], attack))


def price(of: Deal, attack: str) -> Iterator[Cell]:
    """Perplexity behind protections, where clients train nothing."""
    for name, protect in PROTECTIONS.items():
        yield Cell({"split": SPLIT, "protection": name}, partial(priced, of, SPLIT, protect))


def trained(of: Deal, attack: str) -> Iterator[Cell]:
    """Perplexity where clients train, and an attack on what they send then."""
    for weight in DECORRELATED:
        key = {"split": SPLIT, "decorrelate": weight, "attack": attack}
        yield Cell(key, partial(priced, of, SPLIT, PLAIN_CUT, weight, attack))


def gradients(of: Deal, attack: str) -> Iterator[Cell]:
    """Attacks that also have the loss's gradient at the cut."""

    def seen() -> Row:
        public, private = of.seen([SPLIT], View(gradients=True))[SPLIT]
        return asdict(of.reader.read(SPLIT, attack, public, private))

    yield Cell({"split": SPLIT, "attack": attack}, seen)


def told(of: Deal, attack: str) -> Iterator[Cell]:
    """Whether what came tells the right token from others, if the attacker has read what stands before it."""
    for name, protect in TOLD.items():
        yield Cell({"split": SPLIT, "protection": name, "candidates": CANDIDATES}, partial(told_apart, of, protect))


AT: Mapping[str, Sequence[int]] = {"splits": SPLITS, "protections": (SPLIT,), "deeper": DEEPER}
"""Split points whose activations a part attacks."""
PARTS = {part.__name__: part for part in (splits, protections, deeper, price, trained, gradients, told)}


class Loopback:
    """A link to a trainer in the same thread."""

    def __init__(self, trainer: ServerTrainer) -> None:
        self._trainer, self._sent = trainer, deque[Frame]()

    def send(self, frame: Frame) -> None:
        """Keep a frame until its answer is asked for."""
        self._sent.append(frame)

    def receive(self) -> Frame:
        """The answer to the frame that was sent first."""
        return self._trainer(self._sent.popleft())


def priced(of: Deal, split: int, protect: SplitConfig, decorrelate: float | None = None, attack: str = "") -> Row:
    """Train on private rows, behind a protection, and measure the model as it is used.

    Parameters
    ----------
    decorrelate : float, optional
        Clients train too, with so much of the penalty; None if they compute forward alone.
    attack : str
        On what clients send after it; "" for none.
    """
    change, before = protection(of.settings(split, protect), split), perplexity(of.base, of.held_out)
    server, client = of.base.server_part(split), of.base.client_part(split)
    above, forward_only = _adapters(server, of.seed), decorrelate is None
    below = AdapterOptimizer([], TRAIN) if forward_only else _adapters(client, of.seed)
    bottleneck = change.bottleneck if change else None
    trainer = ServerTrainer(
        server.train(), OwnHalf(above), allowance=Allowance(forward_only=forward_only), bottleneck=bottleneck
    )
    record = train_client(
        ClientTrainer(
            client.train(),
            below,
            training_batches(of.private, BATCH, of.seed),
            first_step=0,
            transform=SeededCut(change, f"{of.seed}/client") if change else None,
            decorrelate=decorrelate or 0.0,
            forward_only=forward_only,
        ),
        Loopback(trainer),
        STEPS,
    )
    update = AccumulatedUpdate()
    update.add(extract(server) | extract(client))
    of.base.update(update.changes())
    found: dict[str, Any] = {
        "perplexity_before": before,
        "perplexity": perplexity(of.base, of.held_out),
        "last_loss": sum(record.losses[-8:]) / 8,
    }
    if attack:
        public, private = of.seen([split])[split]
        found |= asdict(of.reader.read(split, attack, public, private))
    of.base.update({})
    return found


def told_apart(of: Deal, protect: SplitConfig) -> Row:
    """The share of tokens whose code is nearer to what came than those of others at its place, drawn at random."""
    settings = of.settings(SPLIT, protect)
    change, quiet = protection(settings, SPLIT), protection(replace(settings, noise=0.0), SPLIT)
    embeddings = embeddings_of(of.base)
    client = Computes(Known(embeddings, client=of.base.client_part(SPLIT).eval()))
    draws, right = torch.Generator().manual_seed(of.seed), []
    for number, row in enumerate(of.private[:TOLD_ROWS]):
        before = client.nothing()
        for place, token in enumerate(row.ids):
            others = torch.randint(len(embeddings), (CANDIDATES - 1,), generator=draws)
            cut, after = client(torch.cat([torch.tensor([token]), others]), before)
            noise = torch.Generator().manual_seed(1000 * number + place)
            came = change.apply(cut[:1, None], noise)[:, 0] if change else cut[:1]
            might = quiet.apply(cut[:, None], noise)[:, 0] if quiet else cut
            distances = torch.linalg.vector_norm(might - came, dim=1)
            right.append(bool(distances[0] < distances[1:].min()))
            after.batch_select_indices(torch.tensor([0]))
            before = after
    return {"right": fmean(right), "tokens": len(right)}


def _adapters(part: ModelPart, seed: int) -> AdapterOptimizer:
    specs = {name: AdapterSpec(RANK, 2.0 * RANK) for name, _ in part.linears()}
    return AdapterOptimizer(inject(part, specs, f"seed{seed}"), TRAIN)


@torch.no_grad()
def perplexity(base: SharedBase, rows: Sequence[Tokens]) -> float:
    """Of the labels of some rows."""
    whole, loss, count = base.whole().eval(), 0.0, 0
    for batch in evaluation_batches(rows, 16):
        losses, _ = whole.token_losses(batch.input_ids, batch.attention_mask, batch.labels)
        loss, count = loss + float(losses.double().sum()), count + len(losses)
    return math.exp(loss / count)


# ---------------------------------------------------------------------- rows, and the picture


class Table:
    """The rows of a part in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: list[Row] = json.loads(file.read_text())["rows"] if file.exists() else []

    def holds(self, key: Row) -> bool:
        """Whether there is a row of this."""
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, row: Row) -> None:
        """Write a row more."""
        self.rows.append(row)
        about = {"model": "smollm2-135m", "data": "dialogues", "public_rows": PUBLIC, "private_rows": PRIVATE}
        rows = ",\n".join("  " + json.dumps(row) for row in self.rows)
        write(self._file, json.dumps(about)[:-1] + ', "rows": [\n' + rows + "\n]}\n")


def plot(folder: Path) -> Path:
    """Draw ``splits.png``: what attacks read of all tokens, and of those that the public text does not hold."""
    from matplotlib.figure import Figure

    rows = Table(folder / "splits.json").rows
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for colour, attack in zip(("tab:blue", "tab:orange", "tab:green"), ATTACKED, strict=True):
        for line, (name, told) in zip(("-", ":"), {"recovered": "all", "unseen": "unseen"}.items(), strict=True):
            found = {
                split: [100 * row[name] for row in rows if row["split"] == split and row["attack"] == attack]
                for split in SPLITS
            }
            found = {split: shares for split, shares in found.items() if shares}
            spread = [stdev(shares) if len(shares) > 1 else 0.0 for shares in found.values()]
            if found:
                means = [fmean(shares) for shares in found.values()]
                label = f"{attack}, {told}"
                axes.errorbar(list(found), means, spread, ls=line, color=colour, marker="o", capsize=3, label=label)
    axes.set(xlabel="blocks on the client, of 30", ylabel="tokens recovered, %", ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file = folder / "splits.png"
    figure.savefig(file, dpi=120)
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="each deals the topics anew (0,1,2)")
    parser.add_argument("--attack", default="regression", help="regression, inverter or search (regression)")
    parser.add_argument("--read", type=int, default=PRIVATE, help=f"private rows to read ({PRIVATE})")
    parser.add_argument("--out", type=Path, default=Path("simulations/results/privacy"), help="folder of the files")
    parser.add_argument("--work", type=Path, default=Path("runs/privacy"), help="folder of learnt directions")
    parser.add_argument("--plot", action="store_true", help="draw what is there, and measure nothing")
    options = parser.parse_args(arguments)
    if options.plot:
        print(plot(options.out))
        return 0
    if wrong := set(options.parts) - set(PARTS):
        parser.error(f"{wrong.pop()!r} is no part; choose of {', '.join(PARTS)}")
    parts = options.parts or list(PARTS)
    at = sorted({split for part in parts for split in AT.get(part, ())})
    for seed in options.seeds:
        of = Deal(Config(), seed, options.work, at, options.read)
        for part in parts:
            table = Table(options.out / f"{part}.json")
            for cell in PARTS[part](of, options.attack):
                key = {"seed": seed} | cell.key
                if not table.holds(key):
                    table.add(key | cell.measure())
                    print(part, json.dumps(table.rows[-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
