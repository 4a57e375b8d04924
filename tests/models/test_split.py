"""A model cut in two computes what the whole computes; models that cannot be cut are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma3nTextConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from hsplitlora_flwr.models import SplitError, UnsupportedModelError, find_family, list_families, parts, split_model
from hsplitlora_flwr.models.families import FAMILIES, tiny_config
from hsplitlora_flwr.models.proof import prove
from hsplitlora_flwr.models.split import check_split, whole_model
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


@pytest.mark.parametrize("name", CONFIGS)
def test_three_parts_give_the_unsplit_loss_and_gradients(name: str) -> None:
    """The parts see leaves only, as over a wire: every gradient goes back through the cuts by hand."""
    model, batch = tiny_model(name), next(random_batches())
    expected = unsplit_loss(model)
    expected.backward()  # of every parameter; a matrix that embeddings and head share gets both gradients
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for split in range(1, BLOCKS):
        client, body, head = split_model(model, split, labels="client")
        model.zero_grad()
        model.requires_grad_(True)
        cut = client(batch.input_ids, batch.attention_mask)
        received = cut.detach().requires_grad_()
        hidden = body(received, batch.attention_mask)
        assert hidden.shape == (4, 11, 32)
        returned = hidden.detach().requires_grad_()
        output = head(returned, batch.labels)
        output.loss.backward()
        hidden.backward(returned.grad)
        cut.backward(received.grad)
        torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-9)
        assert output.tokens == batch.label_tokens
        torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, gradients, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-350m-like"])
def test_losses_of_micro_batches_add_up_at_the_head(name: str) -> None:
    model, batch = tiny_model(name), next(random_batches())
    client, body, head = split_model(model, 2, labels="client")
    losses = [
        head(body(client(m.input_ids, m.attention_mask), m.attention_mask), m.labels, batch.label_tokens).loss
        for m in batch.micro_batches(1)
    ]
    assert len({round(float(loss), 6) for loss in losses}) == 4
    torch.testing.assert_close(sum(losses), unsplit_loss(model), rtol=0, atol=1e-9)


def test_the_head_computes_labelled_positions_only() -> None:
    model, batch = tiny_model("llama"), next(random_batches())
    _, body, head = split_model(model, 2, labels="client")
    seen: list[tuple[int, ...]] = []
    head.causal_lm.lm_head.register_forward_hook(lambda module, args, logits: seen.append(tuple(logits.shape)))
    hidden = body(torch.randn(4, 11, 32, dtype=torch.float64), batch.attention_mask)
    head(hidden, batch.labels)
    assert seen == [(batch.label_tokens, 1, 97)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("trains", [False, True])
def test_the_loss_comes_in_chunks(name: str, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients of any chunk are those of all logits at once, with a head that is frozen or trains."""
    model, batch = tiny_model(name), next(random_batches())
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    head = model.get_output_embeddings().weight
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(parts, "CHUNK", 7)
        whole = whole_model(model, find_family(model.config)).train()
        sizes: list[int] = []
        whole.causal_lm.get_output_embeddings().register_forward_hook(lambda m, args, y: sizes.append(len(y)))
        for parameter in whole.parameters():
            parameter.requires_grad_(trains or parameter is not head)
        output = whole(batch.input_ids, batch.attention_mask, batch.labels)
        output.loss.backward()
    assert max(sizes) == 7 and sum(sizes) == batch.label_tokens == output.tokens
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-12)
    found = dict(whole.causal_lm.named_parameters())
    for key, gradient in gradients.items():
        if key in found and found[key].requires_grad and gradient is not None:
            torch.testing.assert_close(found[key].grad, gradient, rtol=1e-9, atol=1e-12)


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


@pytest.mark.parametrize(
    ("name", "final"),
    [
        ("gpt2", {"transformer.ln_f.weight", "transformer.ln_f.bias", "transformer.wte.weight"}),
        ("llama", {"model.norm.weight", "lm_head.weight"}),
        ("opt-350m-like", {"model.decoder.project_out.weight", "model.decoder.embed_tokens.weight"}),
    ],
)
def test_body_and_head_hold_only_their_own(name: str, final: set[str]) -> None:
    model = tiny_model(name)
    client, body, head = split_model(model, 1, labels="client")
    whole = {p.data_ptr(): name for name, p in model.named_parameters()}
    between = {whole[p.data_ptr()] for p in body.parameters()}
    blocks = tuple(body.family.block_name(index) for index in range(1, BLOCKS))
    assert between == {name for name in whole.values() if name.startswith(blocks)}
    assert {whole[p.data_ptr()] for p in head.parameters()} == final
    client_names = {whole[p.data_ptr()] for p in client.parameters()}
    assert client_names | between | final == set(whole.values())
    assert client_names & between == between & final == set()


def test_adapters_have_their_places_in_the_body_and_none_in_the_head() -> None:
    model = tiny_model("llama")
    _, body, head = split_model(model, 2, labels="client")
    _, server = split_model(model, 2)
    assert [name for name, _ in body.linears()] == [name for name, _ in server.linears()]
    assert next(body.linears())[0] == "model.layers.2.self_attn.q_proj"
    assert list(head.linears()) == []
    assert list(head.blocks) == []


def test_labels_are_on_one_of_two_sides() -> None:
    with pytest.raises(ValueError, match="labels='both' is not possible; choose 'server' or 'client'"):
        split_model(tiny_model("llama"), 2, labels="both")  # type: ignore[call-overload]


@pytest.mark.parametrize("split", [0, -1, BLOCKS, 99])
def test_split_out_of_range(split: int) -> None:
    with pytest.raises(
        SplitError, match=f"split={split} is not possible: a llama with 4 blocks can be cut after 1 to 3"
    ):
        split_model(tiny_model("llama"), split)
    with pytest.raises(SplitError, match=f"split={split} is not possible"):
        split_model(tiny_model("llama"), split, labels="client")


@pytest.mark.parametrize("name", CONFIGS)
def test_registered_families_prove_themselves_too(name: str) -> None:
    model = tiny_model(name)
    prove(model, find_family(model.config))


@pytest.mark.parametrize(
    "config", [BloomConfig(), GraniteConfig(embedding_multiplier=12.0, logits_scaling=8.0), CohereConfig()]
)
def test_an_unregistered_family_that_proves_itself_is_used(config: PretrainedConfig) -> None:
    """Outside the layers that hold weights, and so once, on one side.

    Bloom normalises its embeddings, Granite scales them and the logits, and Cohere the logits.
    """
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
    with pytest.raises(UnsupportedModelError, match="cut in two after block 1, its loss is"):
        prove(tiny_model("gpt2"), dataclasses.replace(gpt2, final=()))


def test_a_model_without_a_final_norm_is_entered_at_its_head() -> None:
    config = tiny_config(OPTConfig(do_layer_norm_before=False), BLOCKS)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    family = find_family(config)
    assert not any(getattr(model.model.decoder, name) for name in family.final)
    prove(model, family)


def test_a_wrong_entrance_of_the_head_is_caught() -> None:
    """Entered behind its norm, the head would give another loss; the cut in two does not mind the order."""
    opt = next(family for family in FAMILIES if family.name == "OPT")
    config = tiny_config(OPTConfig(word_embed_proj_dim=512), BLOCKS)  # a norm, and a projection behind it
    model = AutoModelForCausalLM.from_config(config).double().eval()
    prove(model, opt)
    with pytest.raises(UnsupportedModelError, match="cut in three after block 1, its loss is"):
        prove(model, dataclasses.replace(opt, final=opt.final[::-1]))


def test_a_model_of_one_block_cannot_be_cut() -> None:
    with pytest.raises(SplitError, match="a model of one block cannot be cut; name one with two or more"):
        check_split(LlamaConfig(num_hidden_layers=1), 1)
