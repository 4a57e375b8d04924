"""``step``: a client and a server on one device against stock PEFT there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product, repeat

from transformers import LlamaConfig, PretrainedConfig

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora.layers import AdapterSpec, inject
from hsplitlora_flwr.models.families import tiny_config
from hsplitlora_flwr.training.client import ClientTrainer, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from simulations.benchmarks.common import RANK, take_turns
from simulations.benchmarks.gpu.cases import Case, Figure, Place
from simulations.benchmarks.gpu.device import waits
from simulations.benchmarks.gpu.links import LINKS
from simulations.benchmarks.gpu.models import PlainPeft, RandomBase, random_batch

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
"""The shapes of SmolLM2-135M."""
DTYPES = ("float32", "bfloat16")
SPLITS = (5, 20)
STEPS, TURNS = 4, 5
SPEC = AdapterSpec(RANK, 2.0 * RANK)


def step(place: Place) -> Iterator[Case]:
    """Models of the shapes of SmolLM2-135M in fp32 and bf16, batches of 8 x 64 and of 8 x 512."""
    config, splits = (tiny_config(SMOLLM2, 4), (2,)) if place.small else (SMOLLM2, SPLITS)
    for dtype, length in product(DTYPES, (16,) if place.small else (64, 512)):
        yield Case(f"{dtype}, 8 x {length}", partial(_speeds, place, config, splits, dtype, length))


def _speeds(
    place: Place, config: PretrainedConfig, splits: tuple[int, ...], dtype: str, length: int
) -> Iterator[Figure]:
    base = RandomBase(config, dtype, place)
    batch = random_batch(config, 8, length, 0)
    steps, turns = (1, 1) if place.small else (STEPS, TURNS)
    plain, losses = PlainPeft(base, SPEC, TrainConfig()), list[float]()

    def plainly() -> None:
        losses.extend(float(plain.step([batch])) for _ in range(steps))

    ways = list(product(splits, LINKS))
    trainers = [_trainer(base, split, dtype, batch) for split, _ in ways]
    ours = [
        partial(train_client, trainer, LINKS[kind](server), steps)
        for (trainer, server), (_, kind) in zip(trainers, ways, strict=True)
    ]
    sides: list[Callable[[], object]] = [plainly, *ours]
    unsplit, *figures = take_turns([partial(place.seconds, side) for side in sides], turns)
    tokens = steps * batch.input_ids.numel()
    yield Figure("peft_tokens_per_s", tokens / unsplit.median)
    for (split, kind), (trainer, _), side, own in zip(ways, trainers, ours, figures, strict=True):
        how = f"split {split}, frames as {kind}"
        yield Figure("tokens_per_s", tokens / own.median, note=how)
        ratio = unsplit / own
        yield Figure("split / peft", ratio.median, at_least=1.0, note=f"{how}; spread {ratio.spread:.3g}")
        yield Figure("error_of_the_first_loss", abs(trainer.record.losses[0] / losses[0] - 1), at_most=1e-2, note=how)
        for figure in waits(place, side):
            yield replace(figure, note=f"{how}, {steps} steps; {figure.note}")


def _trainer(base: RandomBase, split: int, dtype: str, batch: Batch) -> tuple[ClientTrainer, ServerTrainer]:
    """Both sides of a client that always trains on one batch."""
    lower, upper = base.client_part(split).train(), base.server_part(split).train()
    below, above = (
        AdapterOptimizer(inject(part, dict.fromkeys(base.linears(), SPEC), ""), TrainConfig())
        for part in (lower, upper)
    )
    client = ClientTrainer(lower, below, repeat(batch), first_step=0, up=dtype, down=dtype)
    return client, ServerTrainer(upper, OwnHalf(above), down=dtype)
