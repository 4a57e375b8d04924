"""A model that is not cut trains as stock PEFT trains it, and as the same model trains when it is cut."""

from __future__ import annotations

import pytest
import torch

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora.layers import AdapterSpec, extract, inject
from hsplitlora_flwr.models import find_family, split_model
from hsplitlora_flwr.models.split import whole_model
from hsplitlora_flwr.training.client import ClientTrainer, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer, StepReport
from hsplitlora_flwr.training.whole import train_whole
from tests.tiny import CONFIGS, random_batches, tiny_model
from tests.training.test_exactness import STEPS, TRAIN, Loopback, assert_same, train_unsplit
from tests.training.test_exactness import specs_of as mixed_specs


def specs_of(part: torch.nn.Module, rank: int = 3, dropout: float = 0.0) -> dict[str, AdapterSpec]:
    return {name: AdapterSpec(rank, 2.0 * rank, dropout) for name, _ in part.linears()}  # type: ignore[operator]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_model_trains_as_under_stock_peft(name: str) -> None:
    model = tiny_model(name)
    specs = mixed_specs(model)
    whole = whole_model(model, find_family(model.config))
    optimizer = AdapterOptimizer(inject(whole, specs, "seed"), TRAIN)
    reports: list[StepReport] = []
    batches = random_batches()
    record = train_whole(whole.train(), optimizer, batches, first_step=0, steps=STEPS, report=reports.append)
    expected, losses = train_unsplit(tiny_model(name), specs)
    assert record.losses == pytest.approx(losses, rel=1e-9)
    assert [report.loss for report in reports] == record.losses
    assert_same(extract(whole), expected)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("freeze_a", [False, True])
def test_cut_or_not_is_the_same_training_with_dropout_too(name: str, dropout: float, freeze_a: bool) -> None:
    train = TrainConfig(lr=0.01, steps=STEPS)
    model = tiny_model(name)
    whole = whole_model(model, find_family(model.config))
    client, server = split_model(model, 2)
    specs = specs_of(whole, dropout=dropout)
    for part in (whole, client, server):
        for module in part.modules():  # the model's own dropout draws from the process's generator
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    optimizer = AdapterOptimizer(inject(whole, specs, "seed", freeze_a=freeze_a), train)
    train_whole(whole.train(), optimizer, random_batches(), first_step=0, steps=STEPS)

    own = AdapterOptimizer(inject(client, specs, "seed", freeze_a=freeze_a), train)
    upper = AdapterOptimizer(inject(server, specs, "seed", freeze_a=freeze_a), train)
    link = Loopback(ServerTrainer(server.train(), OwnHalf(upper), down="float64"))
    trainer = ClientTrainer(client.train(), own, random_batches(), first_step=0, up="float64")
    train_client(trainer, link, STEPS)

    together = {**extract(client), **extract(server)}
    assert together.keys() == extract(whole).keys()
    fresh = whole_model(model, find_family(model.config))
    inject(fresh, specs, "seed")
    moved = 0
    for layer, (b, a) in extract(whole).items():
        torch.testing.assert_close(together[layer][0], b, atol=1e-9, rtol=0)
        torch.testing.assert_close(together[layer][1], a, atol=1e-9, rtol=0)
        moved += int(b.abs().sum() > 0)
        assert torch.equal(a, extract(fresh)[layer][1]) == freeze_a
    assert moved == len(together)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_loss_of_the_whole_is_the_model_s_own(name: str) -> None:
    model = tiny_model(name)
    whole = whole_model(model, find_family(model.config))
    batch = next(random_batches())
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    torch.testing.assert_close(whole(batch.input_ids, batch.attention_mask, batch.labels).loss, expected)


def test_micro_batches_change_nothing() -> None:
    adapters = []
    for size in (0, 1, 3):
        model = tiny_model("llama")
        whole = whole_model(model, find_family(model.config))
        optimizer = AdapterOptimizer(inject(whole, specs_of(whole), "seed"), TrainConfig(lr=0.01))
        train_whole(whole.train(), optimizer, random_batches(), first_step=0, steps=3, micro_batch_size=size)
        adapters.append(extract(whole))
    for other in adapters[1:]:
        for layer, (b, a) in adapters[0].items():
            torch.testing.assert_close(other[layer][0], b, atol=1e-9, rtol=0)
            torch.testing.assert_close(other[layer][1], a, atol=1e-9, rtol=0)
