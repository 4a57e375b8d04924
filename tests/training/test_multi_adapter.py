"""S1 per client: clients that share one pass over the base get the gradients that each would get alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.layers import draw_masks, shape_of
from hsplitlora_flwr.lora.update import Change
from hsplitlora_flwr.models.parts import ModelPart, ServerModel
from hsplitlora_flwr.planning.importance import Scorer
from hsplitlora_flwr.training import multi_adapter
from hsplitlora_flwr.training.activation_checkpointing import checkpoint_blocks
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.multi_adapter import MultiAdapterPass
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import MicroBatch, ServerTrainer, differentiate
from hsplitlora_flwr.transport.frames import Activation, Finish, Finished, Gradient
from tests.tiny import BLOCKS, CONFIGS, random_batches, tiny_model

NONE = torch.empty(0)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SharedBase]:
    """Bases in float64, one a family and dtype."""
    bases: dict[tuple[str, str], SharedBase] = {}

    def get(family: str, dtype: str = "float64") -> SharedBase:
        if (family, dtype) not in bases:
            folder: Path = tmp_path_factory.mktemp("base")
            model: PreTrainedModel = tiny_model(family)
            model.save_pretrained(folder)
            bases[family, dtype] = SharedBase(str(folder), dtype)
        return bases[family, dtype]

    return get


def client_parts(base: SharedBase, splits: Sequence[int], dropout: float = 0.0) -> list[ServerModel]:
    """Server parts of clients whose adapters have different ranks on different layers, and are not zero."""
    parts = []
    for number, split in enumerate(splits):
        part = base.server_part(split).train()
        ranks = itertools.cycle([*[2, 4, 0, 8][number % 4 :], 3])
        specs = {n: AdapterSpec(r, 2.0 * r, dropout) for (n, _), r in zip(part.linears(), ranks, strict=False) if r}
        inject(part, specs, f"client {number}")
        generator = torch.Generator().manual_seed(number)
        for parameter in trained(part):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parts.append(part)
    return parts


def trained(part: ServerModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def works_of(parts: Sequence[ServerModel], lengths: Sequence[int], rows: Sequence[int]) -> list[MicroBatch]:
    works = []
    for number, (part, length, count) in enumerate(zip(parts, lengths, rows, strict=True)):
        batch = next(random_batches(number, count, length))
        shape = count, length, int(part.decoder.config.hidden_size)
        cut = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        cut, mask, labels = cut.to(part.device, part.dtype), batch.attention_mask, batch.labels
        normalizer = int((batch.labels[:, 1:] != -100).sum()) + number
        works.append(MicroBatch(part, cut.requires_grad_(), mask.to(part.device), labels.to(part.device), normalizer))
    return works


def entered(base: SharedBase, parts: Sequence[ServerModel], checkpointing: bool = False) -> MultiAdapterPass:
    together = MultiAdapterPass(base)
    for part in parts:
        together.enter(part, checkpointing=checkpointing)
    return together


def check(base: SharedBase, works: Sequence[MicroBatch], tolerance: float = 1e-9, checkpointing: bool = False) -> None:
    """The pass of all against one pass a client, losses and all gradients."""

    def gradients(work: MicroBatch) -> list[torch.Tensor]:
        leaves = [work.cut, *trained(work.model)]
        found = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert len(found) == len(leaves)
        for leaf in leaves:
            leaf.grad = None
        return found

    alone, expected = [], []
    for work in works:
        draw_masks(work.model, 3, 0)
        alone.append(float(differentiate(work)))
        expected.append(gradients(work))
        draw_masks(work.model, 3, 0)
    losses = entered(base, [work.model for work in works], checkpointing).differentiate(works)
    assert list(map(float, losses)) == pytest.approx(alone, rel=tolerance)
    for work, wanted in zip(works, expected, strict=True):
        for one, other in zip(gradients(work), wanted, strict=True):
            assert torch.linalg.norm(one - other) <= tolerance * torch.linalg.norm(other)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_each_client_alone(family: str, base_of: Callable[..., SharedBase]) -> None:
    base = base_of(family)
    parts = client_parts(base, [3, 1, 2, 1], dropout=0.2)
    # Gemma 2 takes the softmax of its attention in fp32, and of rows that are padded further here.
    check(base, works_of(parts, [11, 7, 9, 13], [2, 3, 1, 2]), 1e-6 if family == "gemma2" else 1e-9)


def test_activations_computed_again_change_no_gradient(
    base_of: Callable[..., SharedBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[ModelPart] = []

    def watched(part: ModelPart) -> None:
        again.append(part)
        checkpoint_blocks(part)

    monkeypatch.setattr(multi_adapter, "checkpoint_blocks", watched)
    base = base_of("llama")
    check(base, works_of(client_parts(base, [3, 1, 2], dropout=0.2), [11, 7, 9], [2, 3, 1]), checkpointing=True)
    assert len(again) == 3, "a part from each split point to the next"


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(1, BLOCKS - 1), st.integers(6, 14), st.integers(1, 3)), min_size=2, max_size=5))
def test_any_two_to_five_clients(base_of: Callable[..., SharedBase], clients: list[tuple[int, int, int]]) -> None:
    base = base_of("llama")
    splits, lengths, rows = zip(*clients, strict=True)
    check(base, works_of(client_parts(base, splits), lengths, rows))


def test_an_update_beside_the_weights(base_of: Callable[..., SharedBase]) -> None:
    base = base_of("llama", "bfloat16")
    generator = torch.Generator().manual_seed(0)
    changes = {
        name: Change(matrix=0.5 * torch.randn(linear.get_parameter("weight").shape, generator=generator))
        for name, linear in base.server_part(2).linears()
    }
    without = differentiate(works_of(client_parts(base, [2]), [8], [2])[0])
    base.update(changes)
    works = works_of(client_parts(base, [2, 1]), [8, 8], [2, 2])
    check(base, works, 0.05)  # bfloat16
    assert abs(differentiate(works[0]) - without) > 0.01 * without
    base.update({})


@pytest.mark.parametrize("quantise", ["8bit", "4bit"])
def test_a_quantised_base_with_an_update_beside_it(quantise: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("gpt2").save_pretrained(tmp_path)
    base = SharedBase(str(tmp_path), "float64", quantise=quantise)
    generator = torch.Generator().manual_seed(0)
    layers = [(name, linear) for name, linear in base.server_part(2).linears() if name.endswith("c_fc")]
    base.update({name: Change(matrix=torch.randn(shape_of(linear), generator=generator)) for name, linear in layers})
    works = works_of(client_parts(base, [2, 1, 2]), [8, 8, 6], [2, 2, 1])
    check(base, works, 1e-6)  # the update is in fp32
    changed = differentiate(works[0])
    base.update({})
    assert abs(differentiate(works_of(client_parts(base, [2]), [8], [2])[0]) - changed) > 1e-3 * changed


def test_nothing_is_accumulated_by_a_pass_that_fails(base_of: Callable[..., SharedBase]) -> None:
    base = base_of("llama")
    works = works_of(client_parts(base, [1, 2]), [8, 8], [2, 2])
    bad = replace(works[1], labels=torch.full_like(works[1].labels, 10**6))  # no such token
    together = entered(base, [work.model for work in works])
    with pytest.raises(IndexError):
        together.differentiate([works[0], bad])
    assert all(leaf.grad is None for work in works for leaf in (work.cut, *trained(work.model)))


class Arrivals:
    """Holds the first pass until a number of others have come."""

    def __init__(self, together: MultiAdapterPass, monkeypatch: pytest.MonkeyPatch) -> None:
        self.first, self.go, self.sizes = Event(), Event(), list[int]()
        serve = together._serve

        def watched(batch: Sequence[object]) -> None:
            self.sizes.append(len(batch))
            self.first.set()
            self.go.wait(300)
            serve(batch)  # type: ignore[arg-type]

        monkeypatch.setattr(together, "_serve", watched)


def test_whatever_waits_is_the_next_pass(base_of: Callable[..., SharedBase], monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    works = works_of(client_parts(base, [1, 2, 3, 1]), [8, 9, 7, 8], [2, 1, 2, 2])
    expected = [float(differentiate(work)) for work in works]
    together = entered(base, [work.model for work in works])
    arrivals = Arrivals(together, monkeypatch)
    with ThreadPoolExecutor(4) as threads:
        results = [threads.submit(together, works[0])]
        arrivals.first.wait(300)
        results += [threads.submit(together, work) for work in works[1:]]
        while len(together._waiting) < 3:
            pass
        arrivals.go.set()
        assert [float(result.result(300)) for result in results] == pytest.approx(expected, rel=1e-9)
    assert arrivals.sizes == [1, 3]


def test_a_client_whose_part_is_scored_goes_alone(
    base_of: Callable[..., SharedBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("llama")
    works = works_of(client_parts(base, [1, 2, 3]), [8, 9, 7], [2, 1, 2])
    works[1] = replace(works[1], alone=True)
    together = entered(base, [work.model for work in works])
    scorers = [Scorer(works[1].model, adapted=True) for _ in range(2)]
    with scorers[0].watching(0):
        expected = [float(differentiate(work)) for work in works]
    passes, joint = list[Sequence[MicroBatch]](), together.differentiate

    def watched(works: Sequence[MicroBatch]) -> list[torch.Tensor]:
        passes.append(works)
        return joint(works)

    monkeypatch.setattr(together, "differentiate", watched)
    results = [Future[torch.Tensor]() for _ in works]
    with scorers[1].watching(0):
        together._serve(list(zip(works, results, strict=True)))
    assert passes == [[works[0], works[2]]]
    assert [float(result.result()) for result in results] == pytest.approx(expected, rel=1e-9)
    assert scorers[1].scores() == pytest.approx(scorers[0].scores(), rel=1e-9) and scorers[1].scores()


def test_the_guilty_one_alone_learns_of_it(
    base_of: Callable[..., SharedBase], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of("llama")
    works = works_of(client_parts(base, [1, 2, 3]), [8, 9, 7], [2, 1, 2])
    expected = float(differentiate(works[2]))
    works[1] = replace(works[1], labels=torch.full_like(works[1].labels, 10**6))
    together = entered(base, [work.model for work in works])
    arrivals = Arrivals(together, monkeypatch)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(together, works[0])
        arrivals.first.wait(300)
        bad, good = (threads.submit(together, work) for work in works[1:])
        while len(together._waiting) < 2:
            pass
        arrivals.go.set()
        assert float(good.result(300)) == pytest.approx(expected, rel=1e-9)
        first.result(300)
        with pytest.raises(IndexError):
            bad.result(300)
    assert "a pass for 2 clients failed; they come one by one" in caplog.text


@pytest.mark.parametrize("huge", [1e30, 1e200, 1e308])
def test_what_overflows_for_one_client_is_finite_for_the_others(
    base_of: Callable[..., SharedBase], huge: float
) -> None:
    base, gradients = base_of("llama"), []
    for scale in (1.0, huge):
        works = works_of(client_parts(base, [1, 2, 3]), [8, 11, 9], [2, 2, 1])
        works[1].cut.data.mul_(scale)
        losses = entered(base, [work.model for work in works]).differentiate(works)
        others = [leaf.grad for work in (works[0], works[2]) for leaf in (work.cut, *trained(work.model))]
        gradients.append([torch.tensor([losses[0], losses[2]], dtype=torch.float64), *others])
    for one, other in zip(*gradients, strict=True):
        assert other is not None and other.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_clients_of_a_pass_that_failed_drop_what_they_would_have_dropped_in_it(
    base_of: Callable[..., SharedBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, gradients = base_of("llama"), []
    for fails in (False, True):
        works = works_of(client_parts(base, [1, 3], dropout=0.5), [8, 9], [2, 1])
        together = entered(base, [work.model for work in works])
        whole = together._forward

        def forward(works: Sequence[MicroBatch], fails: bool = fails, whole: Callable[..., Any] = whole) -> Any:
            losses = whole(works)
            if fails:
                raise MemoryError("for both at once")
            return losses

        monkeypatch.setattr(together, "_forward", forward)
        together._serve([(work, Future[torch.Tensor]()) for work in works])
        gradients.append([leaf.grad for work in works for leaf in (work.cut, *trained(work.model))])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_trainers_that_share_passes_end_where_single_ones_do(base_of: Callable[..., SharedBase], clip: float) -> None:
    base, config = base_of("llama"), TrainConfig(lr=1e-2, clip=clip)

    def adapters(shared: bool) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        parts = client_parts(base, [1, 3, 2], dropout=0.1)
        together = entered(base, parts)
        through = together if shared else differentiate
        trainers = [
            ServerTrainer(part, OwnHalf(AdapterOptimizer(trained(part), config)), down="float64", through=through)
            for part in parts
        ]
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(run, trainers, range(3)))
        return [extract(part) for part in parts]

    def run(trainer: ServerTrainer, number: int) -> None:
        batches = random_batches(number, 2, 8 + number)
        for step, batch in zip(range(4), batches, strict=False):
            generator = torch.Generator().manual_seed(10 * number + step)
            cut = torch.randn(2, 8 + number, 32, dtype=torch.float64, generator=generator)
            tokens = int((batch.labels[:, 1:] != -100).sum())
            frame = Activation(step, cut, NONE, batch.attention_mask, batch.labels, tokens, True, 0.5)
            assert isinstance(trainer(frame), Gradient)
        assert isinstance(trainer(Finish(0.5)), Finished)

    for one, other in zip(adapters(shared=True), adapters(shared=False), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            for mine, theirs in zip(one[name], other[name], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
