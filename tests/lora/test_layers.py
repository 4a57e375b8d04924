"""Adapters in a model part, and the accumulated update on weights of any precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hsplitlora_flwr.lora import AccumulatedUpdate, AdapterSpec, attach_changes, extract, inject, merge_changes
from hsplitlora_flwr.lora.layers import SeededDropout, draw_masks, shape_of, start_along
from hsplitlora_flwr.models import split_model
from tests.tiny import quantised_twins, random_batches, tiny_model


def changes_for(names: list[str], shapes: dict[str, tuple[int, int]]) -> AccumulatedUpdate:
    accumulated, generator = AccumulatedUpdate(), torch.Generator().manual_seed(1)
    accumulated.add(
        {
            name: (
                0.1 * torch.randn(shapes[name][0], 2, generator=generator),
                0.1 * torch.randn(2, shapes[name][1], generator=generator),
            )
            for name in names
        }
    )
    return accumulated


def test_a_fresh_adapter_changes_nothing_and_its_start_depends_on_name_and_seed_alone() -> None:
    model, batch = tiny_model("gpt2"), next(random_batches())
    client, server = split_model(model, 2)
    before = client(batch.input_ids, batch.attention_mask)
    specs = {name: AdapterSpec(4, 8.0) for part in (client, server) for name, _ in part.linears()}
    assert len(inject(client, specs, "s")) == 2 * 2 * 4  # A and B, two blocks, four linears
    assert torch.equal(client(batch.input_ids, batch.attention_mask), before)

    deeper, _ = split_model(model, 3)
    inject(deeper, specs, "s")
    for name, (_, a) in extract(client).items():
        assert torch.equal(a, extract(deeper)[name][1])
    other, _ = split_model(model, 2)
    inject(other, specs, "t")
    assert all(not torch.equal(a, extract(other)[name][1]) for name, (_, a) in extract(client).items())


def test_an_adapter_that_starts_along_directions_changes_nothing_and_is_as_long_as_a_fresh_one() -> None:
    (client, _), batch = split_model(tiny_model("llama"), 1), next(random_batches())
    before = client(batch.input_ids, batch.attention_mask)
    name, spec = "model.layers.0.mlp.up_proj", AdapterSpec(4, 10.0)
    out_features, _ = shape_of(dict(client.linears())[name])
    rows = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(0))).Q.T
    fresh, *_ = inject(client, {name: spec}, "s")
    fresh = fresh.detach().clone()
    a, b = inject(client, {name: spec}, "s", {name: start_along((torch.zeros(out_features, 0), rows), spec)})
    assert torch.allclose(a.detach()[:3].float(), rows / 3**0.5) and not b.detach().any()
    assert torch.equal(a.detach()[3], fresh[3]), "where directions end, rows are fresh"
    assert float(a.detach()[:3].square().mean()) == pytest.approx(float(fresh.square().mean()), rel=0.2)
    assert torch.equal(client(batch.input_ids, batch.attention_mask), before)


def test_extract_folds_the_scale_into_a() -> None:
    client, _ = split_model(tiny_model("llama"), 1)
    name = "model.layers.0.mlp.up_proj"
    parameters = inject(client, {name: AdapterSpec(4, 10.0)}, "s")
    a = parameters[0].detach()
    assert torch.equal(extract(client)[name][1], 2.5 * a)
    assert a.abs().max() <= 1 / 32**0.5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_starts_from_the_original_every_time(name: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    originals = {key: value.clone() for key, value in model.named_parameters()}
    client, _ = split_model(model, 2)
    names = [layer for layer, _ in client.linears()]
    shapes = {layer: tuple(originals[f"{layer}.weight"].shape)[:: -1 if name == "gpt2" else 1] for layer in names}
    accumulated = changes_for(names, shapes)  # type: ignore[arg-type]
    for _ in range(3):  # again and again: the change is added to W_0, not to what is there
        merge_changes(client, accumulated.changes(), lambda layer: originals[f"{layer}.weight"])
    for layer, module in client.linears():
        dense = accumulated.changes()[layer].dense()
        expected = originals[f"{layer}.weight"] + (dense.T if name == "gpt2" else dense)
        assert torch.equal(module.weight, expected)


def test_over_a_bf16_base_the_update_stays_fp32() -> None:
    """An update far below bf16's resolution still acts, beside an untouched weight."""
    model, batch = tiny_model("llama", dtype=torch.bfloat16), next(random_batches())
    client, _ = split_model(model, 1)
    name = "model.layers.0.mlp.down_proj"
    weight = model.get_submodule(name).weight.clone()
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    tiny = torch.full((32, 1), 1e-6), torch.full((1, 48), 1.0)
    accumulated = AccumulatedUpdate()
    accumulated.add({name: tiny})
    attach_changes(client, accumulated.changes())
    layer = dict(client.linears())[name]
    y = layer(x.to(torch.bfloat16)).float()
    exact = x.to(torch.bfloat16).float() @ (weight.float() + accumulated.changes()[name].dense()).T
    assert torch.equal(model.get_submodule(name).weight, weight)
    assert (y - exact).abs().max() <= 0.01 * exact.abs().max()
    # Added to the bf16 weight instead, the same update would vanish.
    rounded = (weight.float() + accumulated.changes()[name].dense()).to(torch.bfloat16)
    assert (rounded == weight).float().mean() > 0.9
    client(batch.input_ids, batch.attention_mask)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_over_a_quantised_base_the_update_stays_exact(name: str, tmp_path: Path) -> None:
    model, plain = quantised_twins(name, "4bit", tmp_path)
    client, _ = split_model(model, 1)
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    accumulated = changes_for([layer for layer, _ in client.linears()], {n: shape_of(m) for n, m in client.linears()})
    attach_changes(client, accumulated.changes())
    specs = {layer: AdapterSpec(2, 4.0) for layer, _ in client.linears()}
    inject(client, specs, "s")
    for layer, module in client.linears():
        assert module.lora_A.dtype == torch.float64
        rows, columns = accumulated.changes()[layer].shape
        x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        stored = plain.get_submodule(layer)
        weight = stored.weight.T if name == "gpt2" else stored.weight
        exact = x @ (weight + accumulated.changes()[layer].dense().double()).T
        bias = 0 if stored.bias is None else stored.bias
        torch.testing.assert_close(module(x), exact + bias, rtol=0, atol=1e-6)
        assert module.lora_B.shape == (rows, 2)
    assert all(torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())
    with pytest.raises(TypeError, match=r"a weight in 4bit takes no update; .* attach_changes"):
        merge_changes(
            split_model(model, 1)[0], accumulated.changes(), lambda layer: plain.get_parameter(f"{layer}.weight")
        )


def test_dropout_acts_in_training_only() -> None:
    client, _ = split_model(tiny_model("llama"), 1)
    name = "model.layers.0.self_attn.q_proj"
    b = inject(client, {name: AdapterSpec(4, 8.0, dropout=0.5)}, "s")[1]
    b.data.fill_(1.0)
    layer, x = dict(client.linears())[name], torch.ones(64, 32, dtype=torch.float64)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


def test_an_adapter_goes_on_from_another_one_of_lower_rank() -> None:
    client, _ = split_model(tiny_model("llama"), 2)
    name = next(name for name, _ in client.linears())
    wide, narrow = (split_model(tiny_model("llama"), 2)[0] for _ in range(2))
    inject(wide, {name: AdapterSpec(6, 12.0)}, "seed")
    inject(narrow, {name: AdapterSpec(2, 3.0)}, "seed")
    # one start for all: the adapter of lower rank is the first rows of the wider one
    torch.testing.assert_close(extract(narrow)[name][1] / 1.5, extract(wide)[name][1][:2] / 2.0)

    start = torch.randn(32, 2, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    inject(client, {name: AdapterSpec(6, 12.0)}, "seed", {name: start})
    b, a = extract(client)[name]
    torch.testing.assert_close(b @ a, start[0] @ start[1])
    torch.testing.assert_close(a[2:], extract(wide)[name][1][2:])
    assert not b[:, 2:].any()


def test_freezing_a_trains_b_alone() -> None:
    client, _ = split_model(tiny_model("llama"), 2)
    specs = {name: AdapterSpec(2, 4.0) for name, _ in client.linears()}
    parameters = inject(client, specs, "seed", freeze_a=True)
    assert len(parameters) == len(specs)
    assert {id(p) for p in client.parameters() if p.requires_grad} == {id(p) for p in parameters}


def test_dropout_draws_by_seed_and_only_in_training() -> None:
    dropout, twin = SeededDropout(0.25, 7), SeededDropout(0.25, 7)
    x = torch.ones(400, 50)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(123)  # the process's generator has no part in it
    assert torch.equal(twin(x), first) and torch.equal(twin(x), second)
    assert not torch.equal(first, second)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((first == 0).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert dropout.eval()(x) is x


def test_a_forward_pass_that_is_computed_again_drops_the_same() -> None:
    client, _ = split_model(tiny_model("llama"), 2)
    inject(client, {name: AdapterSpec(2, 4.0, 0.5) for name, _ in client.linears()}, "seed")
    for name, parameter in client.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    ids = torch.ones(2, 5, dtype=torch.long)

    def forward(step: int, index: int) -> torch.Tensor:
        draw_masks(client.train(), step, index)
        return client(ids, ids)

    first = forward(3, 1)
    assert not torch.equal(forward(3, 2), first) and not torch.equal(forward(4, 1), first)
    assert torch.equal(forward(3, 1), first)
