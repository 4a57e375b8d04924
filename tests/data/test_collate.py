"""Tokens and batches, against positions counted by hand and a loss computed without padding."""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hsplitlora_flwr.data.collate import (
    Batch,
    Tokens,
    collate,
    evaluation_batches,
    tokenize,
    training_batches,
)
from hsplitlora_flwr.data.sources import Example

BOS, EOS = 1, 2
WORDS = {f"w{number}": number for number in range(10, 40)}


def word_tokenizer(template: str, bos: str = "<s>") -> Any:
    """Word ``wN`` has id N; the template says which special tokens the tokenizer puts around a text."""
    core = Tokenizer(WordLevel({"<unk>": 0, "<s>": BOS, "</s>": EOS, **WORDS}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=core, bos_token=bos, eos_token="</s>", unk_token="<unk>")


def words(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def tokens_of(lengths: list[int]) -> list[Tokens]:
    """Rows whose ids name the row, so that a batch shows which rows it holds."""
    return [Tokens(array("i", [row] * length), 1) for row, length in enumerate(lengths, start=100)]


def rows_in(batch: Batch) -> list[int]:
    return [int(row) - 100 for row in batch.input_ids[:, 0]]


# tokenize


@pytest.mark.parametrize(
    ("template", "bos", "start"),
    [
        ("<s> $A", "<s>", [BOS]),
        ("$A", "<s>", []),
        ("<s> $A </s>", "<s>", [BOS]),  # an EOS of the tokenizer's own does not end the prompt
        ("</s> $A", "</s>", [EOS]),  # OPT: BOS and EOS are one
    ],
)
def test_loss_is_on_the_completion_and_one_eos(template: str, bos: str, start: list[int]) -> None:
    tokenizer = word_tokenizer(template, bos)
    [row] = tokenize([Example("w10 w11\n", "w12 w13 w14", "")], tokenizer, 16)
    assert row.input_ids == [*start, 10, 11, 12, 13, 14, EOS]
    assert row.labels == [*[-100] * len(start), -100, -100, 12, 13, 14, EOS]


def test_without_a_prompt_everything_is_label() -> None:
    [row] = tokenize([Example("", "w12 w13", "")], word_tokenizer("<s> $A"), 16)
    assert row.input_ids == row.labels == [BOS, 12, 13, EOS]
    assert collate([row]).label_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "labels"),
    [
        # Fits exactly.
        (3, 3, [BOS, 10, 11, 12, 30, 31, 32, EOS], 4),
        # Cut at the end as long as one token of the completion is left.
        (3, 9, [BOS, 10, 11, 12, 30, 31, 32, 33], 4),
        (6, 9, [BOS, 10, 11, 12, 13, 14, 15, 30], 1),
        # The prompt alone would fill it: its left goes, behind BOS, and half is for the completion ...
        (7, 9, [BOS, 14, 15, 16, 30, 31, 32, 33], 4),
        (20, 9, [BOS, 27, 28, 29, 30, 31, 32, 33], 4),
        # ... which a shorter one leaves to the prompt.
        (20, 1, [BOS, 25, 26, 27, 28, 29, 30, EOS], 2),
    ],
)
def test_long_examples_keep_something_to_learn(prompt: int, completion: int, ids: list[int], labels: int) -> None:
    example = Example(words(10, prompt), words(30, completion), "")
    [row] = tokenize([example], word_tokenizer("<s> $A"), 8)
    assert list(row.input_ids) == ids
    assert list(row.labels) == [-100] * (8 - labels) + ids[8 - labels :]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 12), st.integers(1, 10), st.integers(2, 12), st.sampled_from(["<s> $A", "$A"]))
def test_every_example_keeps_a_label_within_max_length(
    prompt: int, completion: int, max_length: int, template: str
) -> None:
    [row] = tokenize([Example(words(10, prompt), words(30, completion), "")], word_tokenizer(template), max_length)
    assert len(row.input_ids) == len(row.labels) <= max_length
    assert any(label >= 30 for label in row.labels)
    assert collate([row]).label_tokens > 0
    assert all(label in (-100, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    assert not prompt or all(label == -100 or label >= 30 or label == EOS for label in row.labels)


def test_a_tokenizer_without_eos_or_a_text_without_tokens_is_an_error() -> None:
    tokenizer = word_tokenizer("$A")
    with pytest.raises(ValueError, match=r"example 1 .* no token that can be predicted"):
        tokenize([Example("", "w10 w11", ""), Example("", " ", "")], tokenizer, 8)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        tokenize([Example("", "w10", "")], tokenizer, 8)


# batches


def test_collate_pads_right_and_masks_by_length() -> None:
    # The id of EOS is also the padding id here, and is masked only where it pads.
    batch = collate([Tokens(array("i", [5, EOS]), 1), Tokens(array("i", [6, 7, 8, EOS]), 0)], pad_id=EOS)
    assert batch.input_ids.tolist() == [[5, EOS, EOS, EOS], [6, 7, 8, EOS]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, EOS, -100, -100], [6, 7, 8, EOS]]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}
    assert batch.label_tokens == 1 + 3


def test_micro_batches_are_row_slices_that_keep_the_padding() -> None:
    batch = collate(tokens_of([2, 9, 3, 4, 5]))
    parts = batch.micro_batches(2)
    assert [tuple(part.input_ids.shape) for part in parts] == [(2, 9), (2, 9), (1, 9)]
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert sum(part.label_tokens for part in parts) == batch.label_tokens == 1 + 8 + 2 + 3 + 4


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 12), size=st.integers(1, 15), seed=st.integers(0, 9), first=st.integers(0, 20))
def test_training_batches_go_on_where_they_ended(rows: int, size: int, seed: int, first: int) -> None:
    data = tokens_of([3] * rows)
    line = list(itertools.islice(training_batches(data, size, seed), first + 4))
    later = list(itertools.islice(training_batches(data, size, seed, first_step=first), 4))
    assert [rows_in(batch) for batch in line[first:]] == [rows_in(batch) for batch in later]
    places = [row for batch in line for row in rows_in(batch)]
    assert all(len(rows_in(batch)) == size for batch in line)
    for epoch in range(len(places) // rows):
        assert sorted(places[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    data = tokens_of([3] * 50)

    def orders(seed: int) -> list[tuple[int, ...]]:
        return [tuple(rows_in(batch)) for batch in itertools.islice(training_batches(data, 50, seed), 3)]

    assert len({*orders(0), *orders(1), tuple(range(50))}) == 7
    with pytest.raises(ValueError, match="no rows"):
        training_batches([], 4, seed=0)


def test_evaluation_batches_hold_every_row_once_with_like_lengths() -> None:
    lengths = [2, 30, 4, 28, 3, 5, 29]
    batches = list(evaluation_batches(tokens_of(lengths), 3))
    assert Counter(row for batch in batches for row in rows_in(batch)) == Counter(range(7))
    assert [batch.input_ids.shape[1] for batch in batches] == [30, 5, 2]
    assert sum(batch.label_tokens for batch in batches) == sum(length - 1 for length in lengths)


def test_pooled_perplexity_of_padded_batches_is_that_of_single_texts() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    texts = [("w10 w11\n", "w12"), ("w13\n", "w14 w15 w16 w17"), ("w18 w19 w20 w21\n", "w22 w23")]
    rows = tokenize([Example(*text, "") for text in texts], word_tokenizer("<s> $A"), 32)
    loss, count = 0.0, 0
    with torch.no_grad():
        for batch in evaluation_batches(rows, 2, pad_id=EOS):
            mean = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            loss += float(mean) * batch.label_tokens
            count += batch.label_tokens
        # The definition: -log p(token | all before it) of every completion word and EOS, one text at a time.
        expected = []
        for prompt, completion in texts:
            ids = [BOS, *(WORDS[word] for word in (prompt + completion).split()), EOS]
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            learned = range(len(ids) - len(completion.split()) - 1, len(ids))
            expected += [-float(log_p[at - 1, ids[at]]) for at in learned]
    assert count == len(expected) == 2 + 5 + 3
    assert math.exp(loss / count) == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)
