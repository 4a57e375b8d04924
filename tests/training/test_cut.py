"""A change of the cut activation: gradients through it, its seeds, and what cannot take the activation's place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora import AdapterSpec, inject
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.models.parts import ClientModel, ServerModel
from hsplitlora_flwr.training.client import ClientTrainer
from hsplitlora_flwr.training.cut import CutError, CutTransform, SeededCut
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from tests.tiny import random_batches, tiny_model

TRAIN = TrainConfig(optimizer="sgd", clip=0.0)


def parts(name: str) -> tuple[ClientModel, ServerModel, list[torch.nn.Parameter]]:
    """Both sides with adapters that already do something, and those of the client."""
    client, server = split_model(tiny_model(name), 2)
    specs = {layer: AdapterSpec(3, 6.0) for part in (client, server) for layer, _ in part.linears()}
    own, other = inject(client, specs, "seed"), inject(server, specs, "seed")
    generator = torch.Generator().manual_seed(1)
    for parameter in (*own, *other):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 9)
    return client.train(), server.train(), own


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("micro_batch_size", [0, 3])
def test_gradients_go_through_it_as_autograd_says(name: str, micro_batch_size: int) -> None:
    drawn: list[Tensor] = []

    def noted(cut: Tensor, generator: torch.Generator) -> Tensor:
        drawn.append(torch.randn(cut.shape, generator=generator, dtype=cut.dtype))
        norm = torch.linalg.vector_norm(cut, dim=-1, keepdim=True)
        return cut * (0.1 / norm).clamp(max=1.0) + drawn[-1]

    client, server, own = parts(name)
    trainer = ClientTrainer(
        client,
        AdapterOptimizer(own, TRAIN),
        random_batches(),
        first_step=0,
        micro_batch_size=micro_batch_size,
        up="float64",
        transform=SeededCut(CutTransform("noted", noted), "seed"),
    )
    answers = ServerTrainer(server, OwnHalf(AdapterOptimizer([], TRAIN)), down="float64")
    for index in range(trainer.begin()):
        trainer.backward(index, answers(trainer.forward(index)))
    found = [parameter.grad for parameter in own]

    client, server, own = parts(name)
    batch = next(random_batches())
    cut = client(batch.input_ids, batch.attention_mask)
    clipped = cut * (0.1 / cut.square().sum(-1, keepdim=True).sqrt()).clamp(max=1.0)
    server(clipped + torch.cat(drawn), batch.attention_mask, batch.labels, batch.label_tokens).loss.backward()
    for gradient, parameter in zip(found, own, strict=True):
        assert gradient is not None and parameter.grad is not None and parameter.grad.abs().max() > 0
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-15)


def test_random_numbers_are_those_of_the_place() -> None:
    cut = torch.ones(2, 3, 4, dtype=torch.float64)
    blur = CutTransform("blur", lambda cut, draw: cut + torch.randn(cut.shape, generator=draw, dtype=cut.dtype))

    def at(step: int, index: int, seed: str = "seed") -> Tensor:
        return SeededCut(blur, seed)(cut, step, index)

    assert torch.equal(at(3, 1), at(3, 1))
    others = [at(3, 1), at(3, 0), at(1, 3), at(31, 0), at(3, 1, "other")]
    assert all(not torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])
    before = torch.random.get_rng_state()
    at(0, 0)
    assert torch.equal(before, torch.random.get_rng_state()), "the process's own numbers are left alone"


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        (lambda cut, _: cut[:, 1:], r"made \(2, 2, 4\) torch.float32 on cpu of \(2, 3, 4\) torch.float32 on cpu"),
        (lambda cut, _: cut.double(), "torch.float64"),
        (lambda cut, _: cut.detach(), "'theirs' lets no gradient through"),
    ],
)
def test_what_cannot_take_its_place_is_refused(apply: object, said: str) -> None:
    cut = torch.ones(2, 3, 4).requires_grad_()
    with pytest.raises(CutError, match=said):
        SeededCut(CutTransform("theirs", apply), "")(cut, 0, 0)  # type: ignore[arg-type]
    if "gradient" in said:  # a client without adapters has none
        SeededCut(CutTransform("theirs", apply), "")(cut.detach(), 0, 0)  # type: ignore[arg-type]
