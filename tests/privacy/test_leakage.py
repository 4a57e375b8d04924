"""Attacks recover planted text from an unprotected cut, and nothing from noise."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hsplitlora_flwr.config import SplitConfig
from hsplitlora_flwr.data.collate import Tokens
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.update import AccumulatedUpdate, Change
from hsplitlora_flwr.models.loading import split_model
from hsplitlora_flwr.models.split import head_part
from hsplitlora_flwr.privacy import directions
from hsplitlora_flwr.privacy.attacks import ATTACKS, Known, Text
from hsplitlora_flwr.privacy.labels import labels_from_gradients, measure_labels
from hsplitlora_flwr.privacy.leakage import Leakage, View, cut_activations, embeddings_of, measure
from hsplitlora_flwr.privacy.protection import protection
from hsplitlora_flwr.transport.bottleneck import Bottleneck
from tests.tiny import tiny_model

WORDS = 90  # of the vocabulary


def rows_of(count: int, seed: int, words: int = WORDS) -> list[Tokens]:
    generator = random.Random(seed)
    return [Tokens(array("i", [generator.randrange(1, words) for _ in range(12)]), 0) for _ in range(count)]


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> SharedBase:
    return SharedBase(str(tiny_folder))


def test_the_activations_are_those_that_cross_the_cut(base: SharedBase, tiny_folder: Path) -> None:
    rows = [*rows_of(17, 0), Tokens(array("i", [5, 6, 7]), 0)]  # of two lengths, over two batches
    for split, texts in cut_activations(base, rows, [1, 3]):
        client, _ = split_model(str(tiny_folder), split)
        for row, (activation, ids) in zip(rows, texts, strict=True):
            assert ids.tolist() == row.input_ids
            alone = client.eval()(torch.tensor([row.input_ids]), torch.ones(1, len(row), dtype=torch.long))[0]
            torch.testing.assert_close(activation, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attack", ["regression", "inverter", "search"])
def test_planted_text_is_recovered(base: SharedBase, attack: str) -> None:
    [leakage] = measure(base, rows_of(150, 1), rows_of(20, 2), [1], [attack])
    assert leakage.recovered > 0.9
    assert leakage.tokens == 20 * 12


def test_a_search_finds_what_no_other_attack_does(base: SharedBase, tmp_path: Path) -> None:
    """Unseen words, behind the deepest cut, in few numbers; noise that is larger than what tells tokens apart hides."""
    file = tmp_path / "directions.safetensors"
    Bottleneck.write(file, directions.learn(base, rows_of(40, 3), [3], 8))
    split = SplitConfig(bottleneck=str(file), width=8)

    def recovered(attack: str, noise: float = 0.0) -> Leakage:
        noisy = replace(split, clip=1.0 if noise else 0.0, noise=noise)
        view = View(partial(protection, noisy), partial(protection, replace(noisy, noise=0.0)))
        [leakage] = measure(base, rows_of(40, 1, words=30), rows_of(8, 2), [3], [attack], view=view)
        return leakage

    found = recovered("search")
    assert found.recovered == found.unseen == 1.0 > 4 * recovered("regression").recovered
    assert recovered("search", noise=20.0).recovered < 0.3


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_search_goes_through_caches_of_other_models(name: str, tmp_path: Path) -> None:
    tiny_model(name, dtype=torch.float32).save_pretrained(tmp_path)
    [leakage] = measure(SharedBase(str(tmp_path)), rows_of(20, 1, words=30), rows_of(4, 2), [2], ["search"])
    assert leakage.recovered == 1.0


def test_a_search_computes_with_one_update(base: SharedBase) -> None:
    with pytest.raises(ValueError, match="search computes with one update"):
        list(measure(base, rows_of(9, 1), rows_of(2, 2), [1], ["search"], view=View(updates=[{}, {}])))


def test_words_that_the_public_text_lacks_are_recovered_too(base: SharedBase) -> None:
    [leakage] = measure(base, rows_of(300, 1, words=80), rows_of(20, 2), [1], ["regression"])
    assert 10 < leakage.unseen_tokens < 60
    assert leakage.unseen and leakage.unseen > 0.5  # by chance one of 257


def test_without_unseen_words_there_is_no_share_of_them(base: SharedBase) -> None:
    [leakage] = measure(base, rows_of(150, 1), rows_of(3, 2), [1], ["nearest"])
    assert leakage.unseen_tokens == 0 and leakage.unseen is None


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_noise_tells_nothing(base: SharedBase, attack: str) -> None:
    def noise(rows: list[Tokens], seed: int) -> list[Text]:
        generator = torch.Generator().manual_seed(seed)
        return [
            (torch.randn(activation.shape, generator=generator), ids)
            for _, texts in cut_activations(base, rows, [1])
            for activation, ids in texts
        ]

    recover = ATTACKS[attack](noise(rows_of(60, 1), 1), Known(embeddings_of(base), 0, base.client_part(1).eval()))
    private = noise(rows_of(40, 2), 2)
    right = sum(int((recover(activation) == ids).sum()) for activation, ids in private)
    assert right / (40 * 12) < 4 / WORDS


def test_noise_of_a_node_s_own_hides_and_clipping_alone_does_not(base: SharedBase) -> None:
    def recovered(noise: float) -> float:
        view = View(partial(protection, SplitConfig(clip=0.5, noise=noise)))
        [leakage] = measure(base, rows_of(150, 1), rows_of(20, 2), [1], ["regression"], view=view)
        assert leakage.norm < 0.51 or noise
        return leakage.recovered

    assert recovered(0.0) > 0.9
    assert recovered(8.0) < 0.3


def test_beside_an_activation_stands_the_direction_of_its_gradient(base: SharedBase, tiny_folder: Path) -> None:
    rows = rows_of(2, 0)
    [(_, texts)] = cut_activations(base, rows, [2], View(gradients=True))
    unsplit, hidden = AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), int(base.model.config.hidden_size)
    for row, (seen, _) in zip(rows, texts, strict=True):
        ids = torch.tensor([row.input_ids])
        output = unsplit(ids, labels=ids, output_hidden_states=True)
        cut = output.hidden_states[2]
        (gradient,) = torch.autograd.grad(output.loss, cut)
        torch.testing.assert_close(seen[:, :hidden], cut[0].detach(), rtol=1e-4, atol=1e-5)
        direction = torch.nn.functional.normalize(gradient[0], dim=-1) * hidden**0.5
        torch.testing.assert_close(seen[:, hidden : 2 * hidden], direction, rtol=1e-3, atol=1e-3)
        assert not seen[0, 2 * hidden :].any() and torch.equal(seen[1:, 2 * hidden :], seen[:-1, hidden : 2 * hidden])


def test_gradients_alone_tell_planted_text_and_with_them_noise_still_tells_nothing(base: SharedBase) -> None:
    def seen(rows: list[Tokens], seed: int, hidden: bool) -> list[Text]:
        """With activations that are noise, and the gradients that honest ones have, or noise as well."""
        generator, [(_, texts)] = (
            torch.Generator().manual_seed(seed),
            cut_activations(base, rows, [1], View(gradients=True)),
        )
        wide = int(base.model.config.hidden_size)
        blank = [(torch.randn(each.shape, generator=generator), ids) for each, ids in texts]
        if hidden:
            return blank
        return [
            (torch.cat([noise[:, :wide], each[:, wide:]], 1), ids)
            for (each, ids), (noise, _) in zip(texts, blank, strict=True)
        ]

    def recovered(hidden: bool) -> float:
        recover = ATTACKS["regression"](seen(rows_of(300, 1), 1, hidden), Known(embeddings_of(base)))
        private = seen(rows_of(40, 2), 2, hidden)
        return sum(int((recover(each) == ids).sum()) for each, ids in private) / (40 * 12)

    assert recovered(hidden=True) < 4 / WORDS
    assert recovered(hidden=False) > 20 / WORDS


def test_what_crossed_under_several_updates_stands_side_by_side(base: SharedBase) -> None:
    rows, name = rows_of(3, 0), "model.layers.0.mlp.down_proj"
    wide = base.model.config.hidden_size, base.model.config.intermediate_size
    draws = torch.Generator().manual_seed(0)
    update = AccumulatedUpdate()
    update.add({name: (torch.randn(wide[0], 1, generator=draws), torch.randn(1, wide[1], generator=draws))})
    rounds: list[Mapping[str, Change]] = [{}, update.changes()]
    both = dict(cut_activations(base, rows, [1, 2], View(updates=rounds)))
    for number, changes in enumerate(rounds):
        base.update(changes)
        for split, texts in cut_activations(base, rows, [1, 2]):
            for (seen, ids), (alone, its) in zip(both[split], texts, strict=True):
                part = seen[:, number * wide[0] : (number + 1) * wide[0]]
                assert torch.equal(part, alone) and torch.equal(ids, its)
    base.update({})


def test_labels_that_the_server_has_count_as_read(base: SharedBase) -> None:
    private = [Tokens(row.ids, masked=9) for row in rows_of(20, 2)]  # the last three are labels
    noise = View(partial(protection, SplitConfig(clip=0.5, noise=50.0)))
    [leakage] = measure(base, rows_of(60, 1), private, [1], ["regression"], view=noise)
    assert 3 / 12 <= leakage.with_labels <= 3 / 12 + leakage.recovered < 0.4


def test_split_points_must_rise(base: SharedBase) -> None:
    with pytest.raises(ValueError, match=r"splits=\[2, 1\] must rise"):
        list(cut_activations(base, rows_of(2, 0), [2, 1]))


@pytest.mark.parametrize("name", ["llama", "llama-tied-grouped", "gpt2", "gemma2"])
def test_gradients_tell_the_labels_that_stay(name: str, tmp_path: Path) -> None:
    tiny_model(name, dtype=torch.float32).save_pretrained(tmp_path)
    found = measure_labels(SharedBase(str(tmp_path)), rows_of(10, 3))
    assert found.labels == 10 * 11 and found.tokens == 10 * 12
    assert found.recovered > 0.9


def test_gradients_that_are_noise_tell_nothing(base: SharedBase) -> None:
    draws = torch.Generator().manual_seed(0)
    hidden, noise = torch.randn(2, 300, int(base.model.config.hidden_size), generator=draws).unbind()
    head, weights = head_part(base.model, base.family).eval(), base.model.get_output_embeddings().weight.detach()
    truth = torch.randint(len(weights), (300,), generator=draws)
    assert float((labels_from_gradients(head, weights, hidden, noise) == truth).double().mean()) < 0.05
