"""What a run leaves behind is read by stock PEFT and stock transformers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from hsplitlora_flwr.lora import Delta, save_peft_adapter
from hsplitlora_flwr.lora.export import save_delta
from hsplitlora_flwr.models import split_model
from tests.tiny import random_batches, tiny_model


def random_delta(name: str, ranks: tuple[int, ...]) -> Delta:
    model = tiny_model(name, dtype=torch.float32)
    client, server = split_model(model, 2)
    delta, generator, cycle = Delta(), torch.Generator().manual_seed(0), itertools.cycle(ranks)
    update = {}
    for layer, module in [*client.linears(), *server.linears()]:
        rows, columns = module.weight.shape[:: -1 if name == "gpt2" else 1]
        if rank := next(cycle):
            b = 0.1 * torch.randn(rows, rank, generator=generator)
            update[layer] = b, 0.1 * torch.randn(rank, columns, generator=generator)
    delta.add(update)
    return delta


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_stock_peft_computes_with_the_update(name: str, tmp_path: Path) -> None:
    delta = random_delta(name, (2, 0, 5, 40, 1))  # rank 40 is more than these matrices have: stored dense
    assert {change.matrix is None for change in delta.changes().values()} == {True, False}
    base = tiny_model(name, dtype=torch.float32)
    save_peft_adapter(delta.changes(), tmp_path, base, "base")

    expected = tiny_model(name, dtype=torch.float32)
    for layer, change in delta.changes().items():
        weight = expected.get_submodule(layer).weight
        weight.data += change.dense().T if name == "gpt2" else change.dense()
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    batch = next(random_batches())
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    got, wanted = loaded(**inputs).logits, expected(**inputs).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - tiny_model(name, dtype=torch.float32)(**inputs).logits).abs().max() > 1e-2


def test_an_update_of_zero_is_a_valid_adapter(tmp_path: Path) -> None:
    base, batch = tiny_model("llama", dtype=torch.float32), next(random_batches())
    expected = base(input_ids=batch.input_ids).logits
    save_peft_adapter({}, tmp_path, base)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(input_ids=batch.input_ids).logits, expected)


def test_checkpoint_holds_update_and_version(tmp_path: Path) -> None:
    delta = random_delta("llama", (2, 3))
    save_delta(delta, tmp_path)
    with safe_open(tmp_path / "delta.safetensors", framework="pt") as file:
        assert file.metadata()["version"] == "1"
        name = next(iter(delta.changes()))
        got = file.get_tensor(f"{name}:B") @ file.get_tensor(f"{name}:A")
        torch.testing.assert_close(got, delta.changes()[name].dense())
