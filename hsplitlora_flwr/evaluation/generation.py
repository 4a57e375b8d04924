"""Texts that the model writes after held-out prompts, and their scores."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hsplitlora_flwr.data.chat import end_of_turn
from hsplitlora_flwr.data.collate import prompt_ids
from hsplitlora_flwr.data.example import Example
from hsplitlora_flwr.evaluation.scores import check_installed, score_texts

GENERATED_FILE = "generated.jsonl"


def generate_and_score(
    model: PreTrainedModel,
    tokenizer: Any,
    held_out: Sequence[Example],
    folder: Path,
    *,
    batch_size: int,
    max_new_tokens: int,
    beams: int = 1,
) -> dict[str, float | None]:
    """Write a text for every held-out prompt and score it against all completions of that prompt.

    Parameters
    ----------
    model, tokenizer, batch_size, max_new_tokens, beams
        As for :func:`generate`.
    held_out : Sequence[Example]
        Rows with one prompt are one text with several references.
    folder : Path
        Gets ``generated.jsonl``: an object a line with ``prompt``, ``text`` and ``references``. It is written before
        the texts are scored.

    Returns
    -------
    dict[str, float | None]
        As of :func:`hsplitlora_flwr.evaluation.scores.score_texts`.

    Raises
    ------
    ModuleNotFoundError
        If a package of the extra ``generation`` is missing; before a text is written.
    ValueError
        As of :func:`generate` and :func:`hsplitlora_flwr.evaluation.scores.score_texts`.
    """
    check_installed()
    references = references_by_prompt(held_out)
    texts = answer(
        model, tokenizer, list(references), batch_size=batch_size, max_new_tokens=max_new_tokens, beams=beams
    )
    rows = (
        {"prompt": asked.prompt, "text": text, "references": completions}
        for text, (asked, completions) in zip(texts, references.items(), strict=True)
    )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / GENERATED_FILE).write_text(lines, encoding="utf-8")
    return score_texts(texts, list(references.values()))


def references_by_prompt(examples: Sequence[Example]) -> dict[Example, list[str]]:
    """The completions of everything asked, in the order in which both first appear."""
    references: dict[Example, list[str]] = {}
    for example in examples:
        references.setdefault(example.asked, []).append(example.completion)
    return references


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    beams: int = 1,
) -> list[str]:
    """As :func:`answer`, after texts as they are."""
    asked = [Example(prompt, "") for prompt in prompts]
    return answer(model, tokenizer, asked, batch_size=batch_size, max_new_tokens=max_new_tokens, beams=beams)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    asked: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    beams: int = 1,
) -> list[str]:
    """What the model writes after every prompt: the likeliest tokens, until EOS, or the template's end of a turn.

    Nothing is drawn by chance, and what the model brings as its own generation settings (sampling, penalties, other
    ends of a text) does not count. A prompt has the tokens that it has alone, which are those of training unless it
    ends inside a token (:func:`hsplitlora_flwr.data.collate.prompts_inside_tokens`); when it would not leave room for
    ``max_new_tokens`` among the model's positions it is cut as in training, on its left behind the special tokens. The
    text of a prompt does not depend on the batch, up to rounding.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, on any device; it is left in evaluation mode.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer; EOS ends a text.
    asked : Sequence[Example]
        Examples with a prompt, or chats; what is to be written may be missing.
    batch_size : int
        Prompts that are continued at once. With beams a batch takes ``beams`` times the memory.
    max_new_tokens : int
        The longest text in tokens, EOS included.
    beams : int
        Width of the search for the text with the highest mean log-probability of a token; 1 = greedy.

    Returns
    -------
    list[str]
        One text a prompt, in their order, without special tokens.

    Raises
    ------
    ValueError
        If a prompt is empty, a number is below 1, the tokenizer has no EOS, or ``max_new_tokens`` leaves no room for
        a prompt.
    """
    for name, value in {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "beams": beams}.items():
        if value < 1:
            raise ValueError(f"{name}={value}; it must be at least 1")
    rows = prompt_ids(asked, tokenizer, _room(model, max_new_tokens))
    ends = [tokenizer.eos_token_id]
    if any(example.turns for example in asked):
        ends += end_of_turn(tokenizer)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=beams,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.eos_token_id,  # what it is does not matter: the attention mask tells padding
    )
    texts = [""] * len(rows)
    # Padding is computed like text, so prompts of like length go together; the longest first, as it needs most memory.
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    if model.dtype == torch.float64 and model.config._attn_implementation == "eager":
        # The mask is the least float64 and the softmax takes it in float32: rows of padding would become NaN.
        batch_size = 1
    writer: Any = model.eval()
    with _own_settings_aside(model):
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            input_ids, attention_mask = _pad_left([rows[row] for row in batch], tokenizer.eos_token_id, model.device)
            written = writer.generate(input_ids, settings, attention_mask=attention_mask)
            for row, ids in zip(batch, written[:, input_ids.shape[1] :].tolist(), strict=True):
                texts[row] = _text(tokenizer, ids, ends)
    return texts


def _room(model: PreTrainedModel, max_new_tokens: int) -> int:
    """Tokens that a prompt may have."""
    positions = getattr(model.config, "max_position_embeddings", 2**31)
    if max_new_tokens >= positions:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the {positions} positions of the model; "
            "lower it"
        )
    return int(positions - max_new_tokens)


def _pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 of shape (batch, longest row); every row ends at the last place."""
    pads = [max(map(len, rows)) - len(row) for row in rows]
    input_ids = [[pad_id] * pad + list(row) for row, pad in zip(rows, pads, strict=True)]
    attention_mask = [[0] * pad + [1] * len(row) for row, pad in zip(rows, pads, strict=True)]
    return torch.tensor(input_ids, device=device), torch.tensor(attention_mask, device=device)


def _text(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> str:
    """The text of the tokens before the first that ends it."""
    written = list(itertools.takewhile(lambda token: token not in ends, ids))
    return str(tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def _own_settings_aside(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's own settings, from which transformers fills in whatever a caller leaves open."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
