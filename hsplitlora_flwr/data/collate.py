"""From text to batches of token ids.

    input_ids       BOS  p p p p  c c c c EOS  pad pad     p = prompt, c = completion
    labels           .   . . . .  c c c c EOS   .   .      . = -100, no loss
    attention_mask   1   1 1 1 1  1 1 1 1  1    0   0

The model predicts position t + 1 at position t, so the label at position 0 is never predicted. Padding is told by the
mask and never by its id, because many models pad with EOS. Of a chat every turn of the assistant has labels, as
:mod:`hsplitlora_flwr.data.chat` finds them.

Prompt and completion are tokenized as the one text that they are: tokenizers in the manner of SentencePiece put a space
before every text, and a completion on its own would have one that the data do not have. Where a token holds the end of
the prompt and the start of the completion, it counts to the completion, all of which is learnt. A text is written after
the tokens that its prompt has alone, so prompts had better end where tokens end, as at a line break;
:func:`prompts_inside_tokens` counts those that do not.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hsplitlora_flwr.data.chat import Rendered, apply_template, marks_its_own, render
from hsplitlora_flwr.data.example import DataError, Example, Turn

_AT_ONCE = 1024  # examples: where the tokens of a text lie takes many times their memory
IGNORED = -100
"""The label of a position without loss, as torch's cross entropy and transformers have it."""


@dataclass(frozen=True)
class Tokens:
    """One example in four bytes a token, since a client holds all of its examples.

    Parameters
    ----------
    ids : array of int32
        Token ids.
    masked : int
        How many of the first tokens carry no loss.
    cut : int
        How many tokens of the example are not among them, for lack of room.
    gaps : tuple of (int, int)
        Where tokens behind those carry no loss either: the first of each stretch, and the one behind its last.
    """

    ids: array[int]
    masked: int
    cut: int = 0
    gaps: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ids: Sequence[int], learnt: Sequence[bool], cut: int = 0) -> Tokens:
        """Of token ids, and whether each carries loss."""
        masked = next((place for place, learns in enumerate(learnt) if learns), len(ids))
        stretches = itertools.groupby(range(masked, len(ids)), key=lambda place: learnt[place])
        gaps = (list(places) for learns, places in stretches if not learns)
        return cls(array("i", ids), masked, cut, tuple((gap[0], gap[-1] + 1) for gap in gaps))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def input_ids(self) -> list[int]:
        """The token ids."""
        return self.ids.tolist()

    @property
    def labels(self) -> list[int]:
        """The token ids where they are to be predicted, -100 elsewhere."""
        labels = self.ids.tolist()
        for first, end in ((0, self.masked), *self.gaps):
            labels[first:end] = [IGNORED] * (end - first)
        return labels


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples padded on the right: three int64 tensors of shape (batch, sequence)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def label_tokens(self) -> int:
        """How many tokens the loss is a mean over: labels that are predicted, hence none at position 0."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def micro_batches(self, size: int) -> list[Batch]:
        """The batch in slices of ``size`` examples, the last one smaller; all keep the padding of the whole."""
        slices = (slice(at, at + size) for at in range(0, len(self.input_ids), size))
        return [Batch(self.input_ids[part], self.attention_mask[part], self.labels[part]) for part in slices]


def tokenize(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Tokens]:
    """Token ids of prompt, completion and EOS, with loss on the completion and EOS only.

    The special tokens that the tokenizer puts at the start of a text stand before the prompt; an EOS that some put
    at its end does not. What a text brings itself, as after a chat template, is not put there twice: special tokens at
    its start, and EOS at its end, where white space may follow. With an empty prompt everything is label.

    Of a chat the ids are those of the tokenizer's template, with loss on the assistant's turns; EOS follows only where
    the template ends no turn.

    An example longer than ``max_length`` is cut at its end, and loses EOS. Where that would leave no token of the
    completion, the prompt is cut on its left instead, behind the special tokens, because its end is what the
    completion follows: the completion keeps its first ``max_length // 2`` tokens (all, when it has fewer), the prompt
    what remains. So every example keeps something to learn; of a chat, the prompt is all before the first answer.

    Raises
    ------
    DataError
        If the tokenizer has no EOS or no chat template for a chat, or an example has no token that can be predicted.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no end-of-sequence token, by which a model "
            'learns where a text ends; name one as "eos_token" in its tokenizer_config.json'
        )
    start, rows = _start_tokens(tokenizer), list[Tokens]()
    for whole in _whole_texts(tokenizer, examples):
        ids, learnt, head = whole.ids, whole.learnt, start
        if ids[: len(start)] == start:
            ids, learnt = ids[len(start) :], learnt[len(start) :]
        elif whole.example.turns:  # the template says how a chat starts
            head = []
        unread = not (whole.example.prompt or whole.example.turns)
        closed = whole.text.rstrip().endswith(tokenizer.eos_token) and eos in itertools.compress(ids, learnt)
        if not (whole.ended or closed):
            ids, learnt = [*ids, eos], [*learnt, True]
        ids, learnt = [*head, *ids], [unread] * len(head) + learnt
        length = len(ids)
        read = next((place for place, learns in enumerate(learnt) if learns), length)
        if read >= max_length and read > len(head):
            answer = min(length - read, max_length // 2)
            room = max_length - answer
            head = head[:room]
            kept = slice(read - room + len(head), read + answer)
            ids, learnt = head + ids[kept], [unread] * len(head) + learnt[kept]
        row = Tokens.of(ids[:max_length], learnt[:max_length], length - min(length, max_length))
        if max(row.masked, 1) >= len(row):
            raise DataError(
                f"example {len(rows)} ({whole.example.completion[:40]!r}) has no token that can be predicted"
            )
        rows.append(row)
    return rows


def prompt_ids(examples: Sequence[Example], tokenizer: Any, room: int) -> list[list[int]]:
    """The token ids that a model is given to write the completion of every example, at most ``room``.

    A prompt that is longer is cut as in training, on its left behind the special tokens.

    Raises
    ------
    ValueError
        If an example has no prompt.
    """
    found = []
    for index, example in enumerate(examples):
        if example.turns:
            ids = list(
                apply_template(
                    example.asked.turns, tokenizer, tokenize=True, add_generation_prompt=True, return_dict=False
                )
            )
            found.append(ids[-room:])
            continue
        if not example.prompt:
            raise ValueError(f"prompt {index} is empty; a text is written after a prompt, so the data must have them")
        [row] = tokenize([example.asked], tokenizer, room + 1)
        found.append(row.input_ids[:-1])
    return found


def prompts_inside_tokens(examples: Sequence[Example], tokenizer: Any) -> int:
    """How many examples have a prompt that ends inside a token of theirs: ``"Name: "`` before ``"John"``, for instance.

    The tokens of such a prompt alone, after which a text is written, are not those that the example starts with, after
    which a completion is learnt.
    """
    prompted = [example for example in examples if example.prompt and not example.turns]
    prompts = _ids(tokenizer, [example.prompt for example in prompted]) if prompted else []
    wholes = (whole.ids for whole in _whole_texts(tokenizer, prompted))
    return sum(whole[: len(prompt)] != prompt for prompt, whole in zip(prompts, wholes, strict=True))


def collate(rows: Sequence[Tokens], pad_id: int = 0) -> Batch:
    """One batch as long as its longest row, padded on the right with ``pad_id``, label -100 and mask 0."""
    length = max(map(len, rows))
    pads = [length - len(row) for row in rows]
    return Batch(
        input_ids=torch.tensor([row.input_ids + [pad_id] * pad for row, pad in zip(rows, pads, strict=True)]),
        attention_mask=torch.tensor([(1,) * (length - pad) + (0,) * pad for pad in pads]),
        labels=torch.tensor([row.labels + [IGNORED] * pad for row, pad in zip(rows, pads, strict=True)]),
    )


def training_batches(
    rows: Sequence[Tokens], batch_size: int, seed: int, first_step: int = 0, pad_id: int = 0
) -> Iterator[Batch]:
    """Batches without end, from number ``first_step`` on.

    The rows stand in one endless line, epoch after epoch, each epoch in its own order drawn from (seed, epoch); batch
    k is places ``k * batch_size`` to ``(k + 1) * batch_size - 1`` of that line. So batch k does not depend on where
    one started, a later round goes on where the last ended, and a batch may reach into the next epoch.

    Padding is computed like text, so rows of like length stand together: the random order of an epoch is cut into
    pools of 16 batches, each pool is sorted by length, and its batches are shuffled.

    Raises
    ------
    ValueError
        If there are no rows.
    """
    if not rows:
        raise ValueError("no rows to make training batches of")

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        drawn: list[int] = torch.randperm(len(rows), generator=generator).tolist()
        line: list[int] = []
        for at in range(0, len(drawn), 16 * batch_size):
            pool = sorted(drawn[at : at + 16 * batch_size], key=lambda row: len(rows[row]))
            batches = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
            for index in torch.randperm(len(batches), generator=generator).tolist():
                line += batches[index]
        return line

    def batch(step: int) -> Batch:
        places = (divmod(place, len(rows)) for place in range(step * batch_size, (step + 1) * batch_size))
        return collate([rows[order(epoch)[place]] for epoch, place in places], pad_id)

    return map(batch, itertools.count(first_step))


def evaluation_batches(rows: Sequence[Tokens], batch_size: int, pad_id: int = 0) -> Iterator[Batch]:
    """Every row once, rows of like length together; the longest first, so that too large a batch fails at once."""
    ordered = sorted(rows, key=lambda row: -len(row))
    return (collate(ordered[at : at + batch_size], pad_id) for at in range(0, len(ordered), batch_size))


@dataclass(frozen=True)
class _Whole:
    """An example as one text: its token ids, which of them are learnt, and whether it brings its own end."""

    example: Example
    text: str
    ids: list[int]
    learnt: list[bool]
    ended: bool


def _whole_texts(tokenizer: Any, examples: Sequence[Example]) -> Iterator[_Whole]:
    """Every example as one text."""
    for at in range(0, len(examples), _AT_ONCE):
        part = examples[at : at + _AT_ONCE]
        texts = [_rendered(example, tokenizer) for example in part]
        for example, text, (ids, places) in zip(part, texts, _places(tokenizer, texts), strict=True):
            learnt = [False] * len(ids)
            for first, end in places:
                learnt[first:end] = [True] * (end - first)
            if example.turns and marks_its_own(example.turns, tokenizer):
                ids, learnt = _marked(tokenizer, example.turns)
            yield _Whole(example, text.text, ids, learnt, text.ended)


def _rendered(example: Example, tokenizer: Any) -> Rendered:
    if example.turns:
        return render(example.turns, tokenizer)
    text = example.prompt + example.completion
    return Rendered(text, ((len(example.prompt), len(text)),), ended=False)


def _places(tokenizer: Any, texts: Sequence[Rendered]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """The token ids of every text; and of what is learnt the first token, and the one behind the last."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(
            [text.text for text in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
            yield list(ids), [_between(offsets, *stretch, len(text.text)) for stretch in text.learnt]
        return
    for text, ids in zip(texts, _ids(tokenizer, [text.text for text in texts]), strict=True):
        # What the rest of a text does not change is of what stands before it.
        starts = [_ids(tokenizer, [text.text[:place] for place in stretch]) for stretch in text.learnt]
        yield (
            ids,
            [
                (_alike(ids, before), len(ids) if end == len(text.text) else _alike(ids, through))
                for (before, through), (_, end) in zip(starts, text.learnt, strict=True)
            ],
        )


def _between(offsets: Sequence[tuple[int, int]], start: int, stop: int, length: int) -> tuple[int, int]:
    """The tokens that hold some of the characters from ``start`` up to ``stop`` of a text of ``length``."""
    # By where tokens end: a token of spaces may have lost its start, since offsets can leave spaces out.
    first = next((place for place, (_, end) in enumerate(offsets) if end > start), len(offsets)) if start else 0
    behind = (place for place in range(first, len(offsets)) if offsets[place][0] >= stop and stop < length)
    return first, next(behind, len(offsets))


def _alike(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts have in common from the start."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))


def _marked(tokenizer: Any, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and which of them the template marks as the assistant's."""
    found = apply_template(turns, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return list(found["input_ids"]), list(map(bool, found["assistant_masks"]))


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of every text, without special tokens."""
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: what stands before the bare ids of a probe in its full ids.

    Not told by id: OPT starts a text with the same token that others end it with.
    """
    [bare], full = _ids(tokenizer, ["a"]), list(tokenizer("a")["input_ids"])
    return next((full[:at] for at in range(len(full)) if full[at : at + len(bare)] == bare), [])
