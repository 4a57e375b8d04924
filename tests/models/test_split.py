"""A model cut in two computes what the whole computes; models that cannot be cut are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma3nTextConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from hsplitlora_flwr.models import SplitError, UnsupportedModelError, find_family, list_families, split_model
from hsplitlora_flwr.models.families import FAMILIES
from hsplitlora_flwr.models.proof import prove
from hsplitlora_flwr.models.split import check_split
from tests.tiny import BLOCKS, CONFIGS, random_batches, tiny_model


def unsplit_loss(model: PreTrainedModel) -> torch.Tensor:
    batch = next(random_batches())
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_split_gives_the_unsplit_loss(name: str) -> None:
    model, batch = tiny_model(name), next(random_batches())
    expected = unsplit_loss(model)
    for split in range(1, BLOCKS):
        client, server = split_model(model, split)
        cut = client(batch.input_ids, batch.attention_mask)
        assert cut.shape == (4, 11, 32)
        output = server(cut, batch.attention_mask, batch.labels)
        torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-10)
        assert output.tokens == batch.label_tokens
    # Cutting must not change the model that was cut.
    torch.testing.assert_close(unsplit_loss(model), expected, rtol=0, atol=0)


def test_the_mask_matters_to_both_sides() -> None:
    """Left padding reaches every later position, so a mask that one side ignores changes the loss."""
    model, batch = tiny_model("llama"), next(random_batches())
    mask = torch.ones_like(batch.attention_mask)
    mask[:, :3] = 0
    logits = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
    labels = batch.labels.masked_fill(mask == 0, -100)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    client, server = split_model(model, 2)
    got = server(client(batch.input_ids, mask), mask, labels).loss
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    careless = server(client(batch.input_ids, mask), torch.ones_like(mask), labels).loss
    assert abs(careless - expected) > 1e-6


def test_parts_share_tensors_and_hold_only_their_own() -> None:
    model = tiny_model("gpt2")
    client, server = split_model(model, 1)
    whole = {p.data_ptr(): name for name, p in model.named_parameters()}
    below = {whole[p.data_ptr()] for p in client.parameters()}
    above = {whole[p.data_ptr()] for p in server.parameters()}
    assert below == {name for name in whole.values() if ".h.0." in name or ".wte" in name or ".wpe" in name}
    # The head is tied to the embedding, so the server holds that matrix too.
    assert above == {name for name in whole.values() if ".h.0." not in name and ".wpe" not in name}


@pytest.mark.parametrize("split", [0, -1, BLOCKS, 99])
def test_split_out_of_range(split: int) -> None:
    with pytest.raises(
        SplitError, match=f"split={split} is not possible: a llama with 4 blocks can be cut after 1 to 3"
    ):
        split_model(tiny_model("llama"), split)


@pytest.mark.parametrize("name", CONFIGS)
def test_registered_families_prove_themselves_too(name: str) -> None:
    model = tiny_model(name)
    prove(model, find_family(model.config))


@pytest.mark.parametrize("config", [BloomConfig(), GraniteConfig()])
def test_an_unregistered_family_that_proves_itself_is_used(config: PretrainedConfig) -> None:
    """Bloom normalises its embeddings, and Granite scales them: both outside the embedding, once, on one side."""
    family = find_family(config)
    assert config.model_type not in sum(list_families().values(), ())
    assert family.name == config.model_type
    assert find_family(config) is family


@pytest.mark.parametrize("config", [MambaConfig(), Gemma3nTextConfig()])
def test_an_unregistered_family_that_fails_is_refused(config: PretrainedConfig) -> None:
    """Gemma 3n hands more than the hidden state from block to block."""
    with pytest.raises(UnsupportedModelError, match=f"'{config.model_type}'.*Known families: Llama-like"):
        find_family(config)


def test_a_wrong_layout_is_caught() -> None:
    """Were a family registered with its final norm left on the client, the proof would fail."""
    gpt2 = next(family for family in FAMILIES if family.name == "GPT-2")
    with pytest.raises(UnsupportedModelError, match="cut after block 1, its loss is"):
        prove(tiny_model("gpt2"), dataclasses.replace(gpt2, final=()))


def test_a_model_of_one_block_cannot_be_cut() -> None:
    with pytest.raises(SplitError, match="can be cut after 1 to 0"):
        check_split(LlamaConfig(num_hidden_layers=1), 1)
