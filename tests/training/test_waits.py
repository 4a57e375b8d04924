"""The host waits for a GPU where a number has to leave it, and nowhere else."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.evaluation.perplexity import evaluate
from hsplitlora_flwr.lora import AdapterSpec, inject
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.models import parts
from hsplitlora_flwr.models.parts import ModelPart
from hsplitlora_flwr.planning.importance import scoring
from hsplitlora_flwr.training.client import ClientTrainer, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.training.whole import train_whole
from hsplitlora_flwr.transport.frames import Frame, decode, encode
from tests.devices import SeveralDevices
from tests.tiny import random_batches, tiny_model
from tests.training.test_multi_adapter import client_parts, entered, works_of

THE_MODELS = "masking_utils"
"""Transformers look whether a batch has padding, once or twice a pass."""
GPU = "meta:0"


class OnGpu:
    """A base on a pretended GPU, whose head takes four positions at a time."""

    def __init__(self, folder: Path, devices: SeveralDevices) -> None:
        tiny_model("llama").save_pretrained(folder)
        self._devices, self.base = devices, SharedBase(str(folder), "float32", GPU)

    def optimizer(self, part: ModelPart) -> AdapterOptimizer:
        specs = {name: AdapterSpec(4, 8.0, 0.1) for name, _ in part.linears()}
        return AdapterOptimizer(inject(part.train(), specs, "seed"), TrainConfig())

    def waits(self) -> dict[str, int]:
        """Modules in which the host has waited since the last call, but for the model's own code."""
        found = Counter(place.partition(":")[0] for place in self._devices.waits)
        self._devices.waits.clear()
        del found[THE_MODELS]
        return dict(found)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnGpu]:
    monkeypatch.setattr(parts, "CHUNK", 4)
    with SeveralDevices() as devices:
        yield OnGpu(tmp_path, devices)


class Answering:
    """A link to a server in the same thread, over bytes."""

    def __init__(self, server: ServerTrainer) -> None:
        self._server, self._answers = server, deque[Frame]()

    def send(self, frame: Frame) -> None:
        self._answers.append(decode(encode(self._server(decode(encode(frame))))))

    def receive(self) -> Frame:
        return self._answers.popleft()


def test_a_step_waits_for_what_leaves_each_side(gpu: OnGpu) -> None:
    lower, upper = gpu.base.client_part(2), gpu.base.server_part(2)
    below, above = gpu.optimizer(lower), gpu.optimizer(upper)
    client = ClientTrainer(lower, below, random_batches(), first_step=0, up="float32", down="float32")
    link = Answering(ServerTrainer(upper, OwnHalf(above)))
    train_client(client, link, 1)
    gpu.waits()
    train_client(client, link, 1)
    # The cut and its gradient are looked at and fetched, the loss and the server's norm together, and the client's norm
    # for the next activation; one more of it ends the round.
    assert gpu.waits() == {"codecs": 2, "copies": 3, "client": 2}


def test_a_joint_pass_waits_for_nothing(gpu: OnGpu) -> None:
    works = works_of(client_parts(gpu.base, [1, 2, 3], dropout=0.1), [11, 7, 9], [2, 3, 2])
    works = [replace(work, labels=work.labels.to("cpu")) for work in works]
    together = entered(gpu.base, [work.model for work in works])
    gpu.waits()
    together.differentiate(works)
    assert gpu.waits() == {}


def test_a_step_in_one_place_waits_for_its_loss(gpu: OnGpu) -> None:
    whole = gpu.base.whole()
    optimizer = gpu.optimizer(whole)
    gpu.waits()
    train_whole(whole, optimizer, random_batches(), first_step=0, steps=1, micro_batch_size=2)
    assert gpu.waits() == {"copies": 1}


def test_scores_and_perplexity_are_read_once(gpu: OnGpu) -> None:
    part, batch = gpu.base.server_part(2), next(random_batches())
    cut = torch.randn(4, 11, 32).to(GPU).requires_grad_()
    mask = batch.attention_mask.to(GPU)
    gpu.waits()
    with scoring(part) as scores:
        part(cut, mask, batch.labels).loss.backward()
    assert len(scores) == 14
    assert gpu.waits() == {"copies": 1}
    evaluate(gpu.base.whole(), [batch])
    assert gpu.waits() == {"copies": 1}
