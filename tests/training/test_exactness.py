"""Invariants S1 and S2: split training equals unsplit training, whatever the family, split point and micro-batches.

The other side of every comparison is stock PEFT on the whole model with a plain training loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.training.client import train_client
from hsplitlora_flwr.training.schedule import AdapterOptimizer, learning_rate
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.frames import Activation, Finished, Frame, decode, encode
from tests.tiny import BLOCKS, CONFIGS, random_batches, tiny_model

STEPS = 5
TRAIN = TrainConfig(
    rounds=1, steps=STEPS, lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.01, clip=0.05
)  # a clip that bites at every step


class Loopback:
    """Hands frames to a trainer as bytes, the way a stream does."""

    def __init__(self, trainer: ServerTrainer) -> None:
        self.trainer = trainer

    def exchange(self, frame: Frame) -> Frame:
        return decode(encode(self.trainer(decode(encode(frame)))))


def specs_of(model: PreTrainedModel) -> dict[str, AdapterSpec]:
    """Mixed ranks and alphas, and no adapter on every fifth layer."""
    client, server = split_model(model, 1)
    names = [name for part in (client, server) for name, _ in part.linears()]
    ranks = itertools.cycle([2, 4, 8, 0, 16])
    return {name: AdapterSpec(rank, 3.0 * rank**0.5) for name, rank in zip(names, ranks, strict=False) if rank}


def train_split(
    model: PreTrainedModel, specs: Mapping[str, AdapterSpec], split: int, micro_batch_size: int = 0
) -> tuple[dict[str, Factors], list[float]]:
    client, server = split_model(model, split)
    trainer = ServerTrainer(server.train(), AdapterOptimizer(inject(server, specs, "seed"), TRAIN))
    optimizer = AdapterOptimizer(inject(client, specs, "seed"), TRAIN)
    record = train_client(
        client.train(),
        optimizer,
        random_batches(),
        Loopback(trainer),
        first_step=0,
        steps=STEPS,
        micro_batch_size=micro_batch_size,
        wire=model.dtype,
    )
    assert trainer.finished
    assert not extract(client).keys() & extract(server).keys()
    return {**extract(client), **extract(server)}, record.losses


def peft_twin(model: PreTrainedModel, specs: Mapping[str, AdapterSpec]) -> PeftModel:
    """The unsplit model under stock PEFT, its adapters started like ours."""
    config = LoraConfig(
        r=1,
        target_modules=list(specs),
        rank_pattern={f"^{name}": spec.rank for name, spec in specs.items()},
        alpha_pattern={f"^{name}": spec.alpha for name, spec in specs.items()},
        fan_in_fan_out=model.config.model_type == "gpt2",
        lora_dropout=0.0,
    )
    client, server = split_model(model, 1)
    inject(client, specs, "seed"), inject(server, specs, "seed")
    starts = {**extract(client), **extract(server)}
    twin = get_peft_model(model, config, autocast_adapter_dtype=False).to(model.dtype)
    for name, spec in specs.items():
        layer = twin.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(starts[name][1] / spec.scale)
    return twin


def train_unsplit(model: PreTrainedModel, specs: Mapping[str, AdapterSpec]) -> tuple[dict[str, Factors], list[float]]:
    twin = peft_twin(model, specs)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, weight_decay=TRAIN.weight_decay)
    losses = []
    twin.train()
    for step, batch in zip(range(STEPS), random_batches(), strict=False):
        logits = twin(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, TRAIN.clip)
        adamw.param_groups[0]["lr"] = learning_rate(TRAIN, step)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    result = {}
    for name, spec in specs.items():
        layer = twin.get_submodule(f"base_model.model.{name}")
        result[name] = layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data * spec.scale
    return result, losses


def assert_same(got: Mapping[str, Factors], expected: Mapping[str, Factors]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        for mine, theirs in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CONFIGS)
def test_split_training_equals_unsplit_training_at_every_split(name: str) -> None:
    specs = specs_of(tiny_model(name))
    expected, losses = train_unsplit(tiny_model(name), specs)
    assert all(b.abs().max() > 1e-7 for b, _ in expected.values()), "every adapter must have moved"
    for split in range(1, BLOCKS):
        got, split_losses = train_split(tiny_model(name), specs, split)
        assert split_losses == pytest.approx(losses, rel=1e-9)
        assert_same(got, expected)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batches_change_nothing(micro_batch_size: int) -> None:
    specs = specs_of(tiny_model("llama"))
    expected, losses = train_split(tiny_model("llama"), specs, 2)
    got, micro_losses = train_split(tiny_model("llama"), specs, 2, micro_batch_size)
    assert micro_losses == pytest.approx(losses, rel=1e-9)
    assert_same(got, expected)


def test_fp32_losses_agree_to_1e_5() -> None:
    specs = specs_of(tiny_model("llama", dtype=torch.float32))
    _, expected = train_unsplit(tiny_model("llama", dtype=torch.float32), specs)
    _, losses = train_split(tiny_model("llama", dtype=torch.float32), specs, 2)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_clients_on_one_base_do_not_touch_each_other() -> None:
    """Two clients with different splits, trained in turn over the same tensors, end as each does alone."""
    model = tiny_model("qwen2")
    specs = specs_of(model)
    alone = {split: train_split(tiny_model("qwen2"), specs, split)[0] for split in (1, 3)}
    before = {name: p.clone() for name, p in model.named_parameters()}
    together = {split: train_split(model, specs, split)[0] for split in (1, 3)}
    for split in (1, 3):
        assert_same(together[split], alone[split])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), f"the base weight {name} moved"


def test_a_bf16_wire_halves_the_bytes_and_stays_close() -> None:
    specs = specs_of(tiny_model("llama", dtype=torch.float32))
    _, exact = train_split(tiny_model("llama", dtype=torch.float32), specs, 2)
    sizes: dict[torch.dtype, int] = {}
    for wire in (torch.float32, torch.bfloat16):
        client, server = split_model(tiny_model("llama", dtype=torch.float32), 2)
        trainer = ServerTrainer(server.train(), AdapterOptimizer(inject(server, specs, "seed"), TRAIN))
        sent: list[int] = []

        class Counting(Loopback):
            def exchange(self, frame: Frame, sent: list[int] = sent) -> Frame:
                answer = super().exchange(frame)
                sent.extend(t.nbytes for f in (frame, answer) for t in (getattr(f, "cut", None),) if t is not None)
                return answer

        optimizer = AdapterOptimizer(inject(client, specs, "seed"), TRAIN)
        record = train_client(
            client.train(), optimizer, random_batches(), Counting(trainer), first_step=0, steps=STEPS, wire=wire
        )
        sizes[wire] = sum(sent)
        assert record.losses == pytest.approx(exact, rel=1e-6 if wire == torch.float32 else 1e-2)
    assert record.losses != exact
    assert sizes[torch.bfloat16] * 2 == sizes[torch.float32]


def test_a_bf16_base_trains_fp32_adapters() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    specs = specs_of(model)
    adapters, losses = train_split(model, specs, 2)
    _, exact = train_split(tiny_model("llama", dtype=torch.float32), specs, 2)
    assert losses == pytest.approx(exact, rel=2e-2)
    assert {factor.dtype for pair in adapters.values() for factor in pair} == {torch.float32}
    assert all(b.abs().max() > 0 for b, _ in adapters.values())


def test_frames_that_do_not_belong_are_refused() -> None:
    model = tiny_model("llama")
    _, server = split_model(model, 2)
    trainer = ServerTrainer(server, AdapterOptimizer([], TRAIN))
    ids, cut = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, 32, dtype=torch.float64)
    for frame, says in [
        (Activation(0, cut[:, :2], ids, ids, 4, True, 0.0), r"cut activation \(2, 2, 32\) must be \(2, 3, 32\)"),
        (Activation(0, cut, ids[:1], ids, 4, True, 0.0), r"attention mask \(1, 3\)"),
        (Activation(0, cut, ids, ids, 0, True, 0.0), "without labelled tokens"),
        (Finished(), "does not send frames of kind Finished"),
    ]:
        with pytest.raises(ValueError, match=says):
            trainer(frame)
    assert not trainer.finished
