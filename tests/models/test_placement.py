"""A model over several devices computes what it computes on one, and nothing is ever used where it does not lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from hsplitlora_flwr.config import ConfigError, TrainConfig
from hsplitlora_flwr.evaluation.perplexity import evaluate
from hsplitlora_flwr.lora import AdapterSpec, Change, extract, inject
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.models import loading
from hsplitlora_flwr.models.placement import check_gpu_memory, pick_device, pick_devices, spread
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.stored import empty_model
from hsplitlora_flwr.planning.importance import scoring
from hsplitlora_flwr.training.activation_checkpointing import checkpoint_blocks
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer, differentiate
from hsplitlora_flwr.transport.frames import Activation, Finish, Gradient
from tests.devices import Elsewhere, SeveralDevices
from tests.tiny import BLOCKS, CONFIGS, random_batches, tiny_model
from tests.training.test_multi_adapter import NONE, client_parts, entered, trained, works_of
from tests.training.test_server import random_delta

DEVICES = ["meta:0", "meta:1", "meta:2"]
SPLITS = [1, 2, 3]


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_are_spread_by_bytes_and_in_order(family: str) -> None:
    model = empty_model(tiny_model(family).config)
    layout = find_family(model.config)
    place = spread(model, layout, ["a", "b"])
    blocks = [
        {place(f"{layout.block_name(i)}.{n}") for n, _ in model.get_submodule(layout.block_name(i)).named_parameters()}
        for i in range(BLOCKS)
    ]
    assert all(len(devices) == 1 for devices in blocks)
    order = [device for devices in blocks for device in devices]
    assert order == sorted(order)
    held = {"a": 0, "b": 0}
    for name, parameter in model.named_parameters():
        held[place(name)] += parameter.numel()
    inside = sum(p.numel() for name, p in model.named_parameters() if f".{layout.blocks}." in name)
    assert abs(held["a"] - held["b"]) <= inside / BLOCKS + (sum(held.values()) - inside)


def test_memory_of_gpus_that_are_not_there_is_refused_as_it_was_typed() -> None:
    with pytest.raises(ConfigError, match=r"clients\.gpu_memory_gb=24\.0,80\.0 is of a GPU, and model\.device=cpu"):
        check_gpu_memory("clients.gpu_memory_gb", (24.0, 80.0), "cpu")
    for stated in ((), 0.0, None):
        check_gpu_memory("clients.gpu_memory_gb", stated, "cpu")


def results(base: SharedBase, joint: bool) -> list[tuple[float, list[torch.Tensor]]]:
    """Losses of three clients, and the gradients of their cuts and adapters."""
    works = works_of(client_parts(base, SPLITS), [11, 7, 9], [2, 3, 2])
    if joint:
        together = entered(base, [work.model for work in works])
        losses = together.differentiate(works)
    else:
        losses = [differentiate(work) for work in works]
    gradients = ([leaf.grad for leaf in (work.cut, *trained(work.model))] for work in works)
    return [
        (float(loss), [each.to("cpu") for each in own if each is not None])
        for loss, own in zip(losses, gradients, strict=True)
    ]


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_servers_parts(family: str, joint: bool, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    expected = results(SharedBase(str(tmp_path), "float64"), joint)
    with SeveralDevices():
        base = SharedBase(str(tmp_path), "float64", DEVICES)
        assert {p.device for p in base.model.parameters()} == set(map(torch.device, DEVICES))
        assert all(isinstance(p, Elsewhere) for p in base.model.parameters())
        found = results(base, joint)
    for (loss, gradients), (wanted, others) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-9)
        for one, other in zip(gradients, others, strict=True):
            assert torch.linalg.norm(one - other) <= 1e-9 * torch.linalg.norm(other)


def round_of(base: SharedBase, changes: Mapping[str, Change]) -> dict[str, list[torch.Tensor]]:
    """What a server computes in a round: an update, scores, three steps of a client, and perplexity."""
    base.update(changes)
    batch = next(random_batches())
    cuts = torch.randn(3, 4, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = int((batch.labels[:, 1:] != -100).sum())
    part = base.server_part(2).train()
    specs = {name: AdapterSpec(4, 8.0, 0.1) for name, _ in part.linears()}
    optimizer = AdapterOptimizer(inject(part, specs, "client"), TrainConfig(lr=0.05, clip=0.1))
    checkpoint_blocks(part)
    trainer, gradients = ServerTrainer(part, OwnHalf(optimizer)), []
    with scoring(part) as scores:
        for step, cut in enumerate(cuts):
            answer = trainer(Activation(step, cut, NONE, batch.attention_mask, batch.labels, tokens, True, 0.5))
            assert isinstance(answer, Gradient)
            gradients.append(answer.gradient.to("cpu"))
    trainer(Finish(0.5))
    body = base.body_part(1)
    hidden = body(cuts[0].to(body.device), batch.attention_mask.to(body.device))
    return {
        "gradients": gradients,
        "scores": [torch.tensor(list(scores.values()))],
        "adapters": [factor for pair in extract(part).values() for factor in pair],
        "hidden": [hidden.detach().to("cpu")],
        "perplexity": [torch.tensor(evaluate(base.whole(), [batch]).nll)],
    }


@pytest.mark.parametrize("family", ["llama-tied-grouped", "gpt2", "opt-350m-like", "gemma2"])
def test_a_round(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    changes = random_delta(model, 2).changes()
    expected = round_of(SharedBase(str(tmp_path), "float64"), changes)
    with SeveralDevices():
        found = round_of(SharedBase(str(tmp_path), "float64", DEVICES), changes)
    for what, tensors in expected.items():
        assert len(found[what]) == len(tensors) > 0
        for one, other in zip(found[what], tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12, msg=lambda text, what=what: f"{what}: {text}")


def test_without_moves_a_block_would_meet_what_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "follow", lambda model, family: None)
    with SeveralDevices(), pytest.raises(AssertionError, match=r"on tensors of \['meta:0', 'meta:1'\]"):
        evaluate(SharedBase(str(tmp_path), "float64", DEVICES).whole(), [next(random_batches())])


def test_balanced_takes_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_devices("cuda:1") == ["cuda:1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_devices("balanced") == ["cuda:0", "cuda:1"]
    assert pick_device("balanced") == pick_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_devices("balanced") == pick_devices("auto") == ["cpu"]
