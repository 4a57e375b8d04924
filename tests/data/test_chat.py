"""Chats: ids are those of the template, and labels the assistant's turns, found by other means than the product's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hsplitlora_flwr.data.chat import end_of_turn, render
from hsplitlora_flwr.data.collate import IGNORED, collate, prompt_ids, prompts_inside_tokens, tokenize
from hsplitlora_flwr.data.example import DataError, Example, Turn
from hsplitlora_flwr.evaluation.generation import answer
from tests.data.test_collate import SlowTokenizer, word_tokenizer
from tests.tiny import tiny_model

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LAST_ONE_THINKS = (  # turns are written otherwise when others follow
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
)
PLAIN = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
TURNS = (
    Turn("system", "Be brief."),
    Turn("user", "Who?"),
    Turn("assistant", "Me."),
    Turn("user", "Me.\nWho else?"),  # what the assistant said, said by another
    Turn("assistant", " You, and Me. "),
)


@pytest.fixture
def tokenizer(tiny_folder: Any) -> Any:
    """Over bytes: every character is a token."""
    kind: Any = PreTrainedTokenizerFast
    made = kind.from_pretrained(tiny_folder)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def learnt_text(row: Any, tokenizer: Any) -> list[str]:
    """The stretches with labels, as text."""
    stretches: list[list[int]] = [[]]
    for label in row.labels:
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(ids) for ids in stretches if ids]


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (CHATML, ["Me.<|im_end|>", " You, and Me. <|im_end|>"]),
        (MARKED, ["Me.<|im_end|>", " You, and Me. <|im_end|>"]),
        (LLAMA_2.replace("{% if message.role == 'user'", "{% if message.role != 'assistant'"),
         ["Me. <eos>", "You, and Me. <eos>"]),
        (LAST_ONE_THINKS, ["Me.<|im_end|>", " You, and Me. <|im_end|>"]),
        (PLAIN, ["Me.\n", " You, and Me. \n<eos>"]),
    ],
)  # fmt: skip
def test_ids_are_those_of_the_template_and_every_turn_of_the_assistant_is_learnt(
    template: str, learnt: list[str], tokenizer: Any
) -> None:
    tokenizer.chat_template = template
    [row] = tokenize([Example.chat(TURNS)], tokenizer, 1000)
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert row.input_ids == ids + [tokenizer.eos_token_id] * (template == PLAIN)
    assert learnt_text(row, tokenizer) == learnt
    if template == MARKED:
        found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert [label != IGNORED for label in row.labels] == list(map(bool, found["assistant_masks"]))


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_turns_of_weight_zero_are_read_and_not_learnt(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    turns = [*TURNS[:2], Turn("assistant", "Me.", learnt=False), *TURNS[3:], Turn("assistant", "", learnt=False)]
    [row] = tokenize([Example.chat(turns)], tokenizer, 1000)
    assert learnt_text(row, tokenizer) == [" You, and Me. <|im_end|>"]


def test_a_tokenizer_without_offsets_finds_the_same_turns() -> None:
    slow: Any = SlowTokenizer()
    slow.chat_template = "{% for message in messages %}{{ ' ' + message.content + '\n' }}{% endfor %}"
    turns = [Turn("user", "ab"), Turn("assistant", "cd"), Turn("user", "x"), Turn("assistant", "bcd")]
    [row] = tokenize([Example.chat(turns)], slow, 64)
    answers = [[" ", "c", "d", "\n"], [" ", "bcd", "\n", "</s>"]]
    assert slow.convert_ids_to_tokens(row.input_ids) == [" a", "b", "\n", *answers[0], " ", "x", "\n", *answers[1]]
    assert [place for place, label in enumerate(row.labels) if label != IGNORED] == [4, 5, 6, 11, 12, 13]


def test_chats_and_texts_stand_in_one_batch(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    examples = [Example("a", "b"), Example.chat(TURNS), Example("", "c")]
    rows = tokenize(examples, tokenizer, 1000)
    assert [learnt_text(row, tokenizer)[0] for row in rows] == ["b<eos>", "Me.<|im_end|>", "c<eos>"]
    assert prompts_inside_tokens(examples, tokenizer) == 0
    batch = collate(rows)
    assert [[label for label in labels if label != IGNORED] for labels in batch.labels.tolist()] == [
        [label for label in row.labels if label != IGNORED] for row in rows
    ]


@pytest.mark.parametrize(
    ("max_length", "learnt", "starts"),
    [
        (30, ["bbbb<|im_end|>"], "<|im_start|>user\naaaaa"),  # cut behind the first answer
        (26, ["bb"], "<|im_start|>user\naaaaa"),
        (24, ["bbbb<|im_end|>"], "\n<|im_start|>assistant\n"),  # the question gives way, on its left
        (8, ["bbbb"], "ant\n"),
    ],
)
def test_long_chats_keep_something_to_learn(max_length: int, learnt: list[str], starts: str, tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    turns = [Turn("user", "aaaaa"), Turn("assistant", "bbbb"), Turn("user", "cc"), Turn("assistant", "dd")]
    [row] = tokenize([Example.chat(turns)], tokenizer, max_length)
    whole = len(tokenizer.apply_chat_template([vars(turn) for turn in turns], return_dict=False))
    assert (len(row), row.cut) == (max_length, whole - max_length)
    assert learnt_text(row, tokenizer) == learnt
    assert tokenizer.decode(row.input_ids).startswith(starts)


def test_a_template_that_brings_the_start_of_a_text_is_believed() -> None:
    tokenizer = word_tokenizer("<s> $A")
    turns = [Turn("user", "w10"), Turn("assistant", "w11")]
    for template, start in (("{{ bos_token + ' ' }}", [1]), ("", [])):
        tokenizer.chat_template = template + "{% for m in messages %}{{ m.content + ' </s> ' }}{% endfor %}"
        [row] = tokenize([Example.chat(turns)], tokenizer, 16)
        assert row.input_ids == [*start, 10, 2, 11, 2]
        assert row.labels == [*[IGNORED] * (len(start) + 2), 11, 2]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template to make texts of them"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the chat: roles must alternate"),
        ("{% for m in messages %}{{ m.content + m.role / 2 }}{% endfor %}", "refuses the chat: TypeError"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", "changes what the assistant says"),
        ("{% for m in messages %}{{ m.content[::-1] }}{% endfor %}", "changes what the assistant says"),
        ("nothing", "changes what the assistant says"),
    ],
)
def test_a_chat_that_no_template_renders_is_refused(template: str | None, said: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=said):
        tokenize([Example.chat(TURNS)], tokenizer, 100)


def test_characters_that_mark_answers_are_refused_in_chats(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    with pytest.raises(DataError, match=r"U\+E000"):
        render([Turn("user", "\ue000"), Turn("assistant", "a")], tokenizer)


def test_answers_are_written_after_the_template_s_prompt_and_end_where_it_ends_turns(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(tokenizer) == [end]
    [ids] = prompt_ids([Example.chat(TURNS)], tokenizer, 1000)
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS[:-1]]
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_ids([Example.chat(TURNS)], tokenizer, 5) == [ids[-5:]]

    written = [5, 6, end, 7]

    class Scripted(torch.nn.Module):
        """Writes tokens of a script, whatever it is given."""

        config, dtype, device = tiny_model("llama").config, torch.float32, torch.device("cpu")
        generation_config = None

        def generate(self, input_ids: torch.Tensor, settings: Any, **options: Any) -> torch.Tensor:
            assert settings.eos_token_id == [tokenizer.eos_token_id, end] and input_ids[0].tolist() == ids
            return torch.cat([input_ids, torch.tensor([written])], dim=1)

    model: Any = Scripted()
    model.config.max_position_embeddings = 1000
    assert answer(model, tokenizer, [Example.chat(TURNS)], batch_size=1, max_new_tokens=4) == [tokenizer.decode([5, 6])]


def texts(turns: Sequence[Turn]) -> list[str]:
    return [turn.content for turn in turns]


def test_what_follows_the_last_answer_is_left_out() -> None:
    example = Example.chat([*TURNS, Turn("user", "And?")])
    assert example.turns == TURNS and texts(example.asked.turns) == texts(TURNS[:-1])
    with pytest.raises(DataError, match="no turn of the role 'assistant'"):
        Example.chat(TURNS[:2])
