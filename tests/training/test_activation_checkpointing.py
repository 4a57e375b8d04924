"""Computing activations again changes what is kept, and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch

from hsplitlora_flwr.lora import AdapterSpec, inject
from hsplitlora_flwr.lora.layers import draw_masks
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.models.parts import ClientModel, ModelPart, ServerModel
from hsplitlora_flwr.planning.importance import scoring
from hsplitlora_flwr.training.activation_checkpointing import checkpoint_blocks
from tests.tiny import CONFIGS, random_batches, tiny_model


def adapt(part: ModelPart) -> list[torch.nn.Parameter]:
    """Adapters of mixed ranks with dropout, and not zero."""
    ranks = itertools.cycle([2, 0, 4, 8, 3])
    specs = {n: AdapterSpec(r, 2.0 * r, 0.2) for (n, _), r in zip(part.linears(), ranks, strict=False) if r}
    parameters = inject(part.train(), specs, "seed")
    for number, parameter in enumerate(parameters):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return parameters


def gradients(client: ClientModel, server: ServerModel) -> list[torch.Tensor]:
    """Of the adapters of both sides after a step of two micro-batches, the cut's among the way."""
    parameters = [p for part in (client, server) for p in part.parameters() if p.requires_grad]
    batch = next(random_batches())
    for index, micro in enumerate(batch.micro_batches(2)):
        for part in (client, server):
            draw_masks(part, 7, index)
        cut = client(micro.input_ids, micro.attention_mask)
        server(cut, micro.attention_mask, micro.labels, batch.label_tokens).loss.backward()
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_stay_what_they_are(name: str) -> None:
    found = []
    for again in (False, True):
        client, server = split_model(tiny_model(name), 2)
        for part in (client, server):
            adapt(part)
            if again:
                checkpoint_blocks(part)
        found.append(gradients(client, server))
    kept, computed = found
    assert len(kept) == len(computed) > 10
    for one, other in zip(kept, computed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_masks_are_those_of_the_first_time() -> None:
    """With two micro-batches in flight the masks of the second are drawn before the first is computed again."""
    found = []
    for again in (False, True):
        _, body, _ = split_model(tiny_model("llama"), 2, labels="client")
        parameters = adapt(body)
        if again:
            checkpoint_blocks(body)
        hidden = []
        for index in range(2):
            draw_masks(body, 0, index)
            cut = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
            hidden.append(body(cut.requires_grad_(), torch.ones(2, 9, dtype=torch.long)))
        for state in hidden:
            state.sum().backward()
        found.append([parameter.grad for parameter in parameters])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_nothing_is_computed_twice_without_gradients() -> None:
    _, server = split_model(tiny_model("llama"), 2)
    adapt(server)
    checkpoint_blocks(server)
    calls: list[int] = []
    server.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    inner: list[int] = []
    next(server.blocks[0].children()).register_forward_hook(lambda *_: inner.append(1))
    batch, cut = next(random_batches()), torch.randn(4, 11, 32, dtype=torch.float64)
    with torch.no_grad():
        server.eval()(cut, batch.attention_mask, batch.labels)
    assert len(calls) == len(inner) == 1
    server.train()(cut.requires_grad_(), batch.attention_mask, batch.labels).loss.backward()
    assert len(calls) == 2 and len(inner) == 3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_stay_what_they_are(name: str) -> None:
    found = []
    for again in (False, True):
        client, server = split_model(tiny_model(name), 2)
        for part in (client, server):
            part.train()
            if again:
                checkpoint_blocks(part)
        batch = next(random_batches())
        with scoring(client) as below, scoring(server) as above:
            cut = client(batch.input_ids, batch.attention_mask)
            server(cut, batch.attention_mask, batch.labels).loss.backward()
        found.append(below | above)
    kept, computed = found
    assert kept.keys() == computed.keys()
    for layer, score in kept.items():
        assert computed[layer] == pytest.approx(score, rel=1e-9)
