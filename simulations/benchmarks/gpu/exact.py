"""``s1``: split training on the device against stock PEFT there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora.layers import AdapterSpec, extract, inject, shape_of
from hsplitlora_flwr.models.families import FAMILIES, tiny_config
from hsplitlora_flwr.training.client import ClientTrainer, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from simulations.benchmarks.gpu.cases import Case, Figure, Place
from simulations.benchmarks.gpu.links import Encoded
from simulations.benchmarks.gpu.models import PlainPeft, RandomBase, random_batch, random_factors

TOLERANCES = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 0.1)}
"""Largest relative error of a loss, and of the update of all adapters together.

In bf16 the two sides round a layer's sum at different places: PEFT once, a split part its adapter's term as well."""
BLOCKS, SPLIT, STEPS, RANK = 4, 2, 3, 4
SHAPE = (4, 24)
TRAIN = TrainConfig(optimizer="sgd", lr=0.1, clip=1.0)
"""The updates of SGD are as exact as its gradients; Adam makes steps of a fixed size of the smallest differences."""
MODELS = [kind for family in FAMILIES for kind in family.model_types]


def exact(place: Place) -> Iterator[Case]:
    """Every model type that is known by name, on every base; with labels on the client as well, in fp32."""
    for dtype, kind, labels in product(TOLERANCES, MODELS, ("server", "client")):
        if labels == "client" and dtype != "float32":
            continue
        yield Case(f"{kind} {dtype}, labels {labels}", partial(_compare, place, kind, dtype, labels))


def _compare(place: Place, kind: str, dtype: str, labels: str) -> Iterator[Figure]:
    base = RandomBase(tiny_config(CONFIG_MAPPING[kind](), BLOCKS), dtype, place, spread=0.1)
    config, layers = base.model.config, base.linears()
    start = random_factors({name: shape_of(layer) for name, layer in layers.items()}, RANK)
    spec = AdapterSpec(RANK, 2.0 * RANK)
    batches = [random_batch(config, *SHAPE, seed, padded=True) for seed in range(STEPS)]
    plain = PlainPeft(base, spec, TRAIN, start)
    expected = [float(plain.step([batch])) for batch in batches]

    lower, head = base.client_part(SPLIT).train(), base.head_part().train() if labels == "client" else None
    upper = (base.body_part(SPLIT) if head else base.server_part(SPLIT)).train()
    below, above = (
        AdapterOptimizer(inject(part, dict.fromkeys(layers, spec), "", start), TRAIN) for part in (lower, upper)
    )
    trainer = ClientTrainer(lower, below, iter(batches), first_step=0, head=head, up=dtype, down=dtype)
    found = train_client(trainer, Encoded(ServerTrainer(upper, OwnHalf(above), down=dtype)), STEPS).losses

    most, farthest = TOLERANCES[dtype]
    error = max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))
    yield Figure("largest_error_of_a_loss", error, at_most=most)
    ended = {name: (b, a / spec.scale) for name, (b, a) in (extract(lower) | extract(upper)).items()}
    mine, theirs = (_moved(factors, start, spec) for factors in (ended, plain.factors()))
    yield Figure("error_of_the_update", float((mine - theirs).norm() / theirs.norm()), at_most=farthest)


def _moved(
    factors: Mapping[str, tuple[Tensor, Tensor]], start: Mapping[str, tuple[Tensor, Tensor]], spec: AdapterSpec
) -> Tensor:
    """How far ``(B, A)`` have come from ``(B, s A)``, all in one vector on the host."""
    pieces = []
    for name, (b, a) in start.items():
        now_b, now_a = (factor.detach().double().cpu() for factor in factors[name])
        pieces += [(now_b - b.double()).flatten(), (now_a - a.double() / spec.scale).flatten()]
    return torch.cat(pieces)
