"""Tokens and batches, against positions counted by hand and a loss computed without padding."""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel as ByteLevelSplit
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

from hsplitlora_flwr.data.collate import (
    Batch,
    Tokens,
    collate,
    evaluation_batches,
    prompts_inside_tokens,
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
    text = Example(words(10, prompt) + "\n", words(30, completion), "")
    [row] = tokenize([text], word_tokenizer("<s> $A"), 8)
    assert row.cut == 1 + prompt + completion + 1 - len(row)
    assert list(row.input_ids) == ids
    assert list(row.labels) == [-100] * (8 - labels) + ids[8 - labels :]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 12), st.integers(1, 10), st.integers(2, 12), st.sampled_from(["<s> $A", "$A"]))
def test_every_example_keeps_a_label_within_max_length(
    prompt: int, completion: int, max_length: int, template: str
) -> None:
    text = Example(words(10, prompt) + "\n" if prompt else "", words(30, completion), "")
    [row] = tokenize([text], word_tokenizer(template), max_length)
    assert len(row.input_ids) == len(row.labels) <= max_length
    assert any(label >= 30 for label in row.labels)
    assert collate([row]).label_tokens > 0
    assert all(label in (-100, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    assert not prompt or all(label == -100 or label >= 30 or label == EOS for label in row.labels)


CHARACTERS = " \nabcdxyz"
MERGES = [("b", "c"), ("Ġ", "a"), ("c", "d"), ("Ġ", "Ġ"), ("Ċ", "x"), ("bc", "d")]


def byte_tokenizer(*, trim_offsets: bool) -> Any:
    """Byte-level BPE in the manner of GPT-2; merges join letters, spaces and line breaks with what follows."""
    symbols = [{" ": "Ġ", "\n": "Ċ"}.get(character, character) for character in CHARACTERS]
    tokens = ["<s>", "</s>", *symbols, *("".join(pair) for pair in MERGES)]
    core = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=MERGES))
    core.pre_tokenizer = ByteLevelSplit(add_prefix_space=False, use_regex=False)
    core.post_processor = ByteLevelProcessor(trim_offsets=trim_offsets)
    core.decoder = ByteLevelDecoder()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def metaspace_tokenizer(scheme: Any) -> Any:
    """In the manner of SentencePiece: a space before the first word, before every piece, or nowhere."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *CHARACTERS[1:], "▁a", "bc"]
    merges = [("▁", "a"), ("b", "c")]
    core = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, unk_token="<unk>"))
    core.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    core.decoder = MetaspaceDecoder(replacement="▁", prepend_scheme=scheme, split=False)
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class SlowTokenizer(PreTrainedTokenizer):
    """In Python, without offsets: the longest known piece first."""

    pieces = ("<unk>", "<s>", "</s>", *CHARACTERS, "bc", "bcd", " a", "  ")

    def __init__(self) -> None:
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        found = []
        while text:
            found.append(next(text[:length] for length in (3, 2, 1) if text[:length] in self.pieces))
            text = text[len(found[-1]) :]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


TOKENIZERS = {
    "byte-level": byte_tokenizer(trim_offsets=False),
    "byte-level, offsets without spaces": byte_tokenizer(trim_offsets=True),
    **{f"metaspace {scheme}": metaspace_tokenizer(scheme) for scheme in ("first", "never", "always")},
    "slow": SlowTokenizer(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(prompt=st.text(CHARACTERS, max_size=6), completion=st.text(CHARACTERS, min_size=1, max_size=6))
@example(prompt="ab", completion="cd")
@example(prompt="a  ", completion="ab")
@example(prompt="a ", completion=" b")
def test_ids_are_those_of_the_whole_text_and_loss_is_on_all_of_the_completion(
    name: str, prompt: str, completion: str
) -> None:
    tokenizer = TOKENIZERS[name]
    [row] = tokenize([Example(prompt, completion, "")], tokenizer, 64)
    whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    assert row.input_ids == [*whole, tokenizer.eos_token_id] and row.cut == 0

    def written(ids: list[int]) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(ids)).translate(str.maketrans("ĠĊ▁", " \n "))

    # What is read is a start of the prompt, and it goes on for as long as no token holds some of the completion.
    read, learnt = written(row.input_ids[: row.masked]), written(row.input_ids[row.masked : -1])
    added = len(read + learnt) - len(prompt + completion)  # the tokenizer's own first space
    assert added in (0, 1)
    assert len(read) <= len(prompt) + added and learnt.endswith(completion)
    if prompt:
        first = tokenizer.convert_ids_to_tokens(row.input_ids[row.masked])
        assert len(learnt) - len(completion) < len(first) or row.masked == len(row) - 1


@pytest.mark.parametrize("name", ["byte-level", "byte-level, offsets without spaces", "metaspace never", "slow"])
def test_a_token_over_the_border_is_learnt(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    [row] = tokenize([Example("ab", "cx", "")], tokenizer, 64)
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["a", "bc", "x", "</s>"]
    assert row.masked == 1


@pytest.mark.parametrize("name", ["byte-level", "byte-level, offsets without spaces", "metaspace never", "slow"])
def test_prompts_that_end_inside_a_token_are_counted(name: str) -> None:
    inside = [Example("ab", "cx", ""), Example("x ", "ax", "")]
    others = [Example("a\n", "bc", ""), Example("x", " ax", ""), Example("", "bc", ""), Example("bc", "ab", "")]
    assert prompts_inside_tokens(others, TOKENIZERS[name]) == 0
    assert prompts_inside_tokens([*inside, *others], TOKENIZERS[name]) == 2
    assert prompts_inside_tokens([], TOKENIZERS[name]) == 0


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("<s>w10 \n", "w12 w13</s>"),
        ("<s> w10\n", "w12 w13 </s>\n"),
        ("", "<s>w10 w12 w13</s>"),
        ("w10\n", "w12 w13"),
    ],
)
@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_special_tokens_that_a_text_brings_are_not_put_there_twice(prompt: str, completion: str, template: str) -> None:
    [row] = tokenize([Example(prompt, completion, "")], word_tokenizer(template), 16)
    assert row.input_ids == [BOS, 10, 12, 13, EOS]
    assert row.masked == (2 if prompt else 0)


def test_an_end_that_goes_on_is_not_the_end() -> None:
    [row] = tokenize([Example("w10</s>\n", "w12</s>w13", "")], word_tokenizer("<s> $A"), 16)
    assert row.input_ids == [BOS, 10, EOS, 12, EOS, 13, EOS]
    # a prompt that ends with EOS, for a text to be written after it
    [row] = tokenize([Example("w10</s>", "", "")], word_tokenizer("<s> $A"), 16)
    assert row.input_ids == [BOS, 10, EOS, EOS]


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
