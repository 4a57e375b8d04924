"""One base for all: updates reach every part, exactly, whatever the precision of the base."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import pytest
import torch
from transformers import PreTrainedModel

from hsplitlora_flwr.evaluation.perplexity import evaluate
from hsplitlora_flwr.lora import AccumulatedUpdate
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.training.server import CorePool
from hsplitlora_flwr.transport.frames import Finish, Finished, Frame
from tests.tiny import random_batches, tiny_model


def random_delta(model: PreTrainedModel, rounds: int) -> AccumulatedUpdate:
    accumulated, generator = AccumulatedUpdate(), torch.Generator().manual_seed(0)
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    for _ in range(rounds):
        update = {}
        for name in names:
            rows, columns = model.get_submodule(name).weight.shape
            b = 0.1 * torch.randn(rows, 3, generator=generator)
            update[name] = b, 0.1 * torch.randn(3, columns, generator=generator)
        accumulated.add(update)
    return accumulated


def expected_nll(model: PreTrainedModel, accumulated: AccumulatedUpdate) -> tuple[float, int]:
    """The unsplit model in fp64 with the dense update in its weights."""
    for name, change in accumulated.changes().items():
        model.get_submodule(name).weight.data += change.dense()
    model = model.double()
    batch = next(random_batches())
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    targets = batch.labels[:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")), int(
        (targets != -100).sum()
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-6), ("bfloat16", 2e-3)])
def test_updates_reach_parts_and_start_from_the_original_weights(tmp_path: Path, dtype: str, tolerance: float) -> None:
    stored = tiny_model("llama", dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    stored.save_pretrained(tmp_path)
    base = SharedBase(str(tmp_path), dtype)
    before = base.whole()
    for rounds in (1, 2, 3):
        accumulated = random_delta(stored, rounds)
        base.update(accumulated.changes())
        nll, tokens = expected_nll(
            tiny_model("llama", dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32).float(), accumulated
        )
        batches = [next(random_batches())]
        found = evaluate(base.whole(), batches)
        assert found.tokens == tokens
        assert found.nll == pytest.approx(nll, rel=tolerance)
        if dtype != "bfloat16":  # parts made earlier share the weights that were updated
            assert evaluate(before, batches).nll == found.nll
    base.update({})
    untouched, _ = expected_nll(stored.float(), AccumulatedUpdate())
    assert evaluate(base.whole(), batches).nll == pytest.approx(untouched, rel=tolerance)


def test_the_merged_model_is_the_base_with_the_update(tmp_path: Path) -> None:
    stored = tiny_model("llama", dtype=torch.bfloat16)
    stored.save_pretrained(tmp_path)
    base, accumulated = SharedBase(str(tmp_path), "bfloat16"), random_delta(stored, 2)
    base.update(accumulated.changes())
    merged = base.merged()
    for name, change in accumulated.changes().items():
        exact = stored.get_submodule(name).weight.float() + change.dense()
        assert torch.equal(merged.get_submodule(name).weight, exact.to(torch.bfloat16))
    assert merged.get_submodule("model.layers.0.self_attn.k_proj").weight.equal(
        stored.get_submodule("model.layers.0.self_attn.k_proj").weight
    )


def test_perplexity_is_pooled_over_tokens(tmp_path: Path) -> None:
    """Batches of very different size: the mean is over tokens, not over batches."""
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    base = SharedBase(str(tmp_path))
    small, large = next(random_batches(1, rows=1)), next(random_batches(2, rows=12))
    whole = base.whole()
    one, other, both = evaluate(whole, [small]), evaluate(whole, [large]), evaluate(whole, [small, large])
    assert both.tokens == one.tokens + other.tokens == small.label_tokens + large.label_tokens
    assert both.nll == pytest.approx(one.nll + other.nll)
    mean_of_batches = (one.perplexity + other.perplexity) / 2
    assert abs(both.perplexity - mean_of_batches) > 1e-3


@pytest.mark.parametrize("count", [1, 2])
def test_no_more_passes_at_once_than_cores_and_the_first_come_first(count: int) -> None:
    cores, lock, go = CorePool(count), Lock(), Event()
    begun: list[int] = []
    at_once: set[int] = set()
    most = 0

    def handler(client: int, frame: Frame) -> Frame:
        nonlocal most
        with lock:
            begun.append(client)
            at_once.add(client)
            most = max(most, len(at_once))
        go.wait(300)
        with lock:
            at_once.remove(client)
        return Finished()

    handlers = [cores.share(lambda frame, client=client: handler(client, frame)) for client in range(5)]  # type: ignore[misc]
    with ThreadPoolExecutor(5) as clients:
        answers = []
        for one in handlers:
            answers.append(clients.submit(one, Finish(0.0)))
            time.sleep(0.05)
        assert begun == list(range(count))
        go.set()
        assert all(isinstance(answer.result(300), Finished) for answer in answers)
    assert most == count and set(begun) == set(range(5))
    if count == 1:
        assert begun == [0, 1, 2, 3, 4]
    cores.close()


def test_what_a_pass_raises_reaches_its_client() -> None:
    def fails(frame: Frame) -> Frame:
        raise ValueError("a batch without labelled tokens has no loss")

    cores = CorePool(1)
    with pytest.raises(ValueError, match="no loss"):
        cores.share(fails)(Finish(0.0))
    cores.close()
