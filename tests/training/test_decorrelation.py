"""The penalty that makes the cut tell less of the tokens: its value, its gradient, and that it works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from hsplitlora_flwr.config import Config, ConfigError, TrainConfig
from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora import AdapterSpec, inject
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.training.client import ClientTrainer, train_client
from hsplitlora_flwr.training.decorrelation import MOST, distance_correlation, penalty_gradient
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from tests.tiny import random_batches, tiny_model
from tests.training.test_bottleneck import Link


def by_definition(one: np.ndarray, other: np.ndarray) -> float:
    """Székely's definition with scipy's distances, of directions."""

    def centred(samples: np.ndarray) -> np.ndarray:
        directions = samples / np.linalg.norm(samples, axis=1, keepdims=True)
        distances = cdist(directions, directions)
        return distances - distances.mean(0) - distances.mean(1)[:, None] + distances.mean()

    a, b = centred(one), centred(other)
    return float((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))


def test_it_is_the_distance_correlation() -> None:
    draws = torch.Generator().manual_seed(0)
    one = torch.randn(40, 7, generator=draws, dtype=torch.float64)
    other = one[:, :3] ** 2 + torch.randn(40, 3, generator=draws, dtype=torch.float64)
    assert float(distance_correlation(one, other)) == pytest.approx(by_definition(one.numpy(), other.numpy()), abs=1e-5)
    turned = 5 * one @ torch.linalg.qr(torch.randn(7, 7, generator=draws, dtype=torch.float64))[0]
    assert float(distance_correlation(one, turned)) == pytest.approx(1, abs=1e-5)
    apart = torch.randn(2, 400, 7, generator=draws)
    assert float(distance_correlation(*apart)) < 0.15


def test_its_gradient_is_that_of_finite_differences_and_leaves_padding_alone() -> None:
    draws = torch.Generator().manual_seed(1)
    sent, embeddings = torch.randn(2, 3, 5, 4, generator=draws, dtype=torch.float64).unbind()
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[0, 3:] = 0
    real, step = mask.bool(), 1e-6
    found = penalty_gradient(sent, embeddings, mask, 2.0)
    assert found[~real].abs().max() == 0
    for place in [(0, 1, 2), (2, 4, 0)]:
        moved = [sent.clone(), sent.clone()]
        moved[0][place] += step
        moved[1][place] -= step
        above, below = (2 * distance_correlation(embeddings[real], each[real]) for each in moved)
        assert float(found[place]) == pytest.approx(float(above - below) / (2 * step), rel=1e-4, abs=1e-9)
    many = torch.randn(2, MOST, 4, generator=draws)
    compared = penalty_gradient(many, many, torch.ones(2, MOST), 1.0).abs().sum(-1) > 0
    assert int(compared.sum()) <= MOST


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_a_client_trains_on_both(name: str, micro_batch_size: int) -> None:
    """A step moves its adapters by the gradient of loss and penalty together, by autograd through one graph."""
    train = TrainConfig(optimizer="sgd", clip=0.0, lr=1.0)
    client, server = split_model(tiny_model(name), 2)
    own = inject(client.train(), {layer: AdapterSpec(3, 6.0) for layer, _ in client.linears()}, "seed")
    draws = torch.Generator().manual_seed(1)
    for parameter in own:
        parameter.data.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64) / 9)
    batch: Batch = next(random_batches())
    cut = client(batch.input_ids, batch.attention_mask)
    real = batch.attention_mask.bool()
    embeddings = client.decoder.get_input_embeddings()(batch.input_ids).detach()
    loss = server.train()(cut, batch.attention_mask, batch.labels, batch.label_tokens).loss
    wanted = torch.autograd.grad(loss + 0.7 * distance_correlation(embeddings[real], cut[real]), own)
    start = [parameter.detach().clone() for parameter in own]
    trainer = ClientTrainer(
        client,
        AdapterOptimizer(own, train),
        random_batches(),
        first_step=0,
        micro_batch_size=micro_batch_size,
        up="float64",
        decorrelate=0.7,
    )
    train_client(trainer, Link(ServerTrainer(server, OwnHalf(AdapterOptimizer([], train)), down="float64")), 1)
    for before, parameter, gradient in zip(start, own, wanted, strict=True):
        torch.testing.assert_close(before - parameter, gradient, rtol=1e-7, atol=1e-12)


def test_who_has_no_adapters_cannot_learn_it() -> None:
    with pytest.raises(ConfigError, match=r"split.decorrelate=1 is learnt by clients' adapters"):
        Config.from_run_config({"split.decorrelate": 1.0, "lora.clients": "none"})
