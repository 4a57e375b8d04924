"""Invariants S1 and S2: split training equals unsplit training, whatever the family, split point and micro-batches.

The other side of every comparison is stock PEFT on the whole model with a plain training loop.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.data.collate import Batch, Tokens, collate
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.models import load_causal_lm, split_model
from hsplitlora_flwr.training.allowance import Allowance
from hsplitlora_flwr.training.client import ClientTrainer, take_turn, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer, learning_rate
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.frames import (
    Activation,
    Finished,
    Frame,
    Gradient,
    Hidden,
    HiddenGradient,
    Loss,
    decode,
    encode,
)
from tests.tiny import BLOCKS, CONFIGS, quantised_twins, random_batches, tiny_model

Labels = Literal["server", "client"]

STEPS = 5
TRAIN = TrainConfig(
    rounds=1, steps=STEPS, lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.01, clip=0.05
)  # a clip that bites at every step


class Loopback:
    """Hands frames to a trainer as bytes, the way a stream does."""

    def __init__(self, trainer: ServerTrainer) -> None:
        self.trainer = trainer
        self.most_waiting = 0
        self._sent: deque[bytes] = deque()

    def send(self, frame: Frame) -> None:
        self._sent.append(encode(frame))
        self.most_waiting = max(self.most_waiting, len(self._sent))

    def receive(self) -> Frame:
        return decode(encode(self.trainer(decode(self._sent.popleft()))))


def specs_of(model: PreTrainedModel) -> dict[str, AdapterSpec]:
    """Mixed ranks and alphas, and no adapter on every fifth layer."""
    client, server = split_model(model, 1)
    names = [name for part in (client, server) for name, _ in part.linears()]
    ranks = itertools.cycle([2, 4, 8, 0, 16])
    return {name: AdapterSpec(rank, 3.0 * rank**0.5) for name, rank in zip(names, ranks, strict=False) if rank}


def wire_of(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def trainers(
    model: PreTrainedModel,
    specs: Mapping[str, AdapterSpec],
    split: int,
    labels: Labels = "server",
    micro_batch_size: int = 0,
    wire: str = "",
    train: TrainConfig = TRAIN,
) -> tuple[ClientTrainer, ServerTrainer]:
    """Both halves of a fresh training run; a client without an adapter computes forward alone."""
    client, server, *head = split_model(model, split, labels)
    wire = wire or wire_of(model)
    seat = OwnHalf(AdapterOptimizer(inject(server, specs, "seed"), train))
    own = inject(client, specs, "seed")
    return ClientTrainer(
        client.train(),
        AdapterOptimizer(own, train),
        random_batches(),
        first_step=0,
        head=head[0].train() if head else None,
        micro_batch_size=micro_batch_size,
        up=wire,
        forward_only=not own,
    ), ServerTrainer(server.train(), seat, down=wire, allowance=Allowance(forward_only=not own))


def adapters_of(client: ClientTrainer, server: ServerTrainer) -> dict[str, Factors]:
    assert server.finished
    assert not extract(client.model).keys() & extract(server.model).keys()
    return {**extract(client.model), **extract(server.model)}


def train_split(
    model: PreTrainedModel,
    specs: Mapping[str, AdapterSpec],
    split: int,
    micro_batch_size: int = 0,
    labels: Labels = "server",
    in_flight: int = 1,
) -> tuple[dict[str, Factors], list[float]]:
    client, server = trainers(model, specs, split, labels, micro_batch_size)
    link = Loopback(server)
    record = train_client(client, link, STEPS, in_flight)
    each = -(-4 // (micro_batch_size or 4))
    assert link.most_waiting == (min(in_flight + 1, STEPS * each) if client.runs_ahead else min(in_flight, each))
    return adapters_of(client, server), record.losses


def train_in_turns(
    model: PreTrainedModel, specs: Mapping[str, AdapterSpec], split: int, labels: Labels, micro_batch_size: int
) -> tuple[dict[str, Factors], list[float]]:
    """Every turn with a new client, which knows nothing but what the one before left as tensors."""
    client, server = trainers(model, specs, split, labels, micro_batch_size)
    answers: list[Frame] = []
    while not server.finished:
        frames = take_turn(client, answers, STEPS)
        answers = [decode(encode(server(decode(encode(frame))))) for frame in frames]
        tensors = {name: tensor.clone() for name, tensor in client.optimizer.tensors().items()}
        before, (client, _) = client, trainers(model, specs, split, labels, micro_batch_size)
        client.optimizer.restore(tensors)
        client.global_step, client.grad_norm_sq, client.record = before.global_step, before.grad_norm_sq, before.record
        for _ in range(client.global_step):
            next(client.batches)
    return adapters_of(client, server), client.record.losses


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_step_waits_for_its_figures_as_often_whatever_the_number_of_adapters(labels: Labels) -> None:
    class Reads(TorchDispatchMode):
        """Counts where a program waits for a number of a tensor."""

        count = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += op is torch.ops.aten._local_scalar_dense.default
            return op(*args, **kwargs or {})

    found = []
    for some in (slice(None, None, 11), slice(None)):
        model = tiny_model("llama")
        specs = dict(list(specs_of(model).items())[some])
        sgd = replace(TRAIN, optimizer="sgd")  # AdamW reads counters of its own, which lie on the CPU
        client, server = trainers(model, specs, 2, labels, train=sgd)
        assert extract(client.model) and extract(server.model)
        with Reads() as reads:
            train_client(client, Loopback(server), STEPS)
        found.append(reads.count)
    assert found[0] == found[1] > 0


def starts_of(model: PreTrainedModel, specs: Mapping[str, AdapterSpec]) -> dict[str, Factors]:
    client, server = split_model(model, 1)
    inject(client, specs, "seed"), inject(server, specs, "seed")
    return {**extract(client), **extract(server)}


def peft_twin(
    model: PreTrainedModel, specs: Mapping[str, AdapterSpec], starts: Mapping[str, Factors] | None = None
) -> PeftModel:
    """The unsplit model under stock PEFT, its adapters started like ours."""
    starts = starts or starts_of(model, specs)
    config = LoraConfig(
        r=1,
        target_modules=list(specs),
        rank_pattern={f"^{name}": spec.rank for name, spec in specs.items()},
        alpha_pattern={f"^{name}": spec.alpha for name, spec in specs.items()},
        fan_in_fan_out=model.config.model_type == "gpt2",
        lora_dropout=0.0,
    )
    twin = get_peft_model(model, config, autocast_adapter_dtype=False).to(model.dtype)
    for name, spec in specs.items():
        layer = twin.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(starts[name][1] / spec.scale)
    return twin


def train_unsplit(
    model: PreTrainedModel, specs: Mapping[str, AdapterSpec], starts: Mapping[str, Factors] | None = None
) -> tuple[dict[str, Factors], list[float]]:
    twin = peft_twin(model, specs, starts)
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


def batches_of_chats() -> Iterator[Batch]:
    """Rows with labels on several stretches, each of other places and numbers."""
    generator = torch.Generator().manual_seed(0)
    while True:
        rows = []
        for turns in ((2, 3, 1, 2), (1, 1, 4, 1, 2, 1), (3, 2), (0, 2, 1, 1, 1, 3)):  # read, learnt, read, learnt ...
            learnt = [bool(place % 2) for place, length in enumerate(turns) for _ in range(length)]
            rows.append(Tokens.of(torch.randint(3, 97, (len(learnt),), generator=generator).tolist(), learnt))
        yield collate(rows)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_labels_on_several_turns_of_a_chat_are_exact(labels: Labels, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(set(row)) > 2 for row in next(batches_of_chats()).labels.tolist()] == [True] * 4
    monkeypatch.setitem(globals(), "random_batches", batches_of_chats)
    specs = specs_of(tiny_model("llama"))
    expected = train_unsplit(tiny_model("llama"), specs)
    for split, micro_batch_size in ((1, 0), (3, 3)):
        got = train_split(tiny_model("llama"), specs, split, micro_batch_size, labels)
        assert_same(got[0], expected[0])
        assert got[1] == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_labels_that_stay_with_the_client_change_nothing(name: str) -> None:
    specs = specs_of(tiny_model(name))
    expected, losses = train_split(tiny_model(name), specs, 2)
    got, split_losses = train_split(tiny_model(name), specs, 2, labels="client")
    assert split_losses == pytest.approx(losses, rel=1e-9)
    assert_same(got, expected)


def above(model: PreTrainedModel, split: int) -> dict[str, AdapterSpec]:
    """Adapters on the server alone."""
    own = {name for name, _ in split_model(model, split)[1].linears()}
    return {name: spec for name, spec in specs_of(model).items() if name in own}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_client_that_trains_nothing_is_unsplit_training_of_what_lies_above_its_cut(name: str) -> None:
    for split in range(1, BLOCKS):
        specs = above(tiny_model(name), split)
        expected, losses = train_unsplit(tiny_model(name), specs)
        got, split_losses = train_split(tiny_model(name), specs, split)
        assert split_losses == pytest.approx(losses, rel=1e-9)
        assert_same(got, expected)


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize(("micro_batch_size", "in_flight"), [(0, 1), (0, 3), (1, 1), (3, 2), (1, 9)])
def test_how_far_it_runs_ahead_changes_nothing(micro_batch_size: int, in_flight: int, labels: Labels) -> None:
    specs = above(tiny_model("llama"), 2)
    expected, losses = train_unsplit(tiny_model("llama"), specs)
    got, split_losses = train_split(tiny_model("llama"), specs, 2, micro_batch_size, labels, in_flight)
    assert split_losses == pytest.approx(losses, rel=1e-9)
    assert_same(got, expected)
    got, turn_losses = train_in_turns(tiny_model("llama"), specs, 2, labels, micro_batch_size)
    assert turn_losses == pytest.approx(losses, rel=1e-9)
    assert_same(got, expected)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_it_keeps_no_graph_and_no_gradient_comes_down(labels: Labels) -> None:
    client, server = trainers(tiny_model("llama"), above(tiny_model("llama"), 2), 2, labels)
    answers: list[Frame] = []

    class Seen(Loopback):
        def receive(self) -> Frame:
            answers.append(super().receive())
            return answers[-1]

    made: list[torch.Tensor] = []
    client.model.register_forward_hook(lambda part, given, cut: made.append(cut))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("kept"), lambda t: t):
        client.begin()
        client.forward(0)
    client, server = trainers(tiny_model("llama"), above(tiny_model("llama"), 2), 2, labels)
    train_client(client, Seen(server), STEPS)
    assert not made[0].requires_grad and not client._step.cuts
    expected = [Loss] if labels == "server" else [Hidden, Loss]
    assert [type(answer) for answer in answers] == [*expected * STEPS, Finished]
    assert client.optimizer.tensors() == {} and extract(client.model) == {}


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_turns_of_clients_that_go_away_between_them_change_nothing(labels: Labels, micro_batch_size: int) -> None:
    specs = specs_of(tiny_model("llama"))
    expected, losses = train_split(tiny_model("llama"), specs, 2)
    got, turn_losses = train_in_turns(tiny_model("llama"), specs, 2, labels, micro_batch_size)
    assert turn_losses == pytest.approx(losses, rel=1e-9)
    assert_same(got, expected)


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("in_flight", [1, 2, 9])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batches_change_nothing(micro_batch_size: int, in_flight: int, labels: Labels) -> None:
    specs = specs_of(tiny_model("llama"))
    expected, losses = train_split(tiny_model("llama"), specs, 2)
    got, micro_losses = train_split(tiny_model("llama"), specs, 2, micro_batch_size, labels, in_flight)
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


@pytest.mark.parametrize(("wire", "bytes_per_number"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("int8", 1)])
def test_a_narrow_wire_has_fewer_bytes_and_stays_close(wire: str, bytes_per_number: int) -> None:
    specs = specs_of(tiny_model("llama", dtype=torch.float32))
    _, exact = train_split(tiny_model("llama", dtype=torch.float32), specs, 2)
    client, server = trainers(tiny_model("llama", dtype=torch.float32), specs, 2, wire=wire)
    sizes: list[tuple[int, int]] = []

    class Counting(Loopback):
        def receive(self) -> Frame:
            answer = super().receive()
            if isinstance(answer, Gradient):
                sizes.append((answer.gradient.nbytes, answer.gradient.numel()))
            return answer

    record = train_client(client, Counting(server), STEPS)
    assert record.losses == pytest.approx(exact, rel=1e-6 if wire == "float32" else 1e-2)
    assert (record.losses == exact) == (wire == "float32")
    assert sizes and all(size == bytes_per_number * numbers for size, numbers in sizes)


def test_a_bf16_base_trains_fp32_adapters() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    specs = specs_of(model)
    adapters, losses = train_split(model, specs, 2)
    _, exact = train_split(tiny_model("llama", dtype=torch.float32), specs, 2)
    assert losses == pytest.approx(exact, rel=2e-2)
    assert {factor.dtype for pair in adapters.values() for factor in pair} == {torch.float32}
    assert all(b.abs().max() > 0 for b, _ in adapters.values())


QUANTISED = [("llama", "4bit"), ("gpt2", "4bit"), ("opt-350m-like", "4bit"), ("gemma2", "4bit"), ("gpt2", "8bit")]


@pytest.mark.parametrize(("name", "quantise"), QUANTISED)
def test_a_quantised_base_trains_as_the_weights_that_it_stands_for(name: str, quantise: str, tmp_path: Path) -> None:
    model, plain = quantised_twins(name, quantise, tmp_path)
    specs = specs_of(model)
    expected, losses = train_unsplit(plain, specs)
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    got, split_losses = train_split(model, specs, 2)
    assert split_losses == pytest.approx(losses, rel=1e-9)
    assert_same(got, expected)
    assert all(torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())


@pytest.mark.parametrize("quantise", ["8bit", "4bit"])
def test_a_quantised_base_trains_as_stock_peft_over_bitsandbytes(quantise: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), quantise=quantise)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    chosen = BitsAndBytesConfig(load_in_8bit=True) if quantise == "8bit" else four
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=chosen, dtype=torch.float32)
    specs = specs_of(model)
    _, expected = train_unsplit(stock, specs, starts_of(model, specs))
    _, losses = train_split(model, specs, 2)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_frames_that_do_not_belong_are_refused() -> None:
    model = tiny_model("llama")
    _, server = split_model(model, 2)
    trainer = ServerTrainer(server, OwnHalf(AdapterOptimizer([], TRAIN)))
    ids, cut, none = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, 32, dtype=torch.float64), torch.empty(0)
    for frame, says in [
        (Activation(0, cut[:, :2], none, ids, ids, 4, True, 0.0), r"cut activation \(2, 2, 32\) must be \(2, 3, 32\)"),
        (Activation(0, cut, none, ids[:1], ids, 4, True, 0.0), r"attention mask \(1, 3\)"),
        (Activation(0, cut, none, ids, ids, 0, True, 0.0), "without labelled tokens"),
        (Activation(0, cut, none, ids, ids[:0, 0], 4, True, 0.0), r"labels \(0,\) the same"),
        (HiddenGradient(cut, none, 1.0), "no hidden state"),
        (Finished(), "does not send Finished"),
    ]:
        with pytest.raises(ValueError, match=says):
            trainer(frame)
    assert not trainer.finished
