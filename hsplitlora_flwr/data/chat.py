"""Chats as text: the tokenizer's template says how, and what of it is the assistant's.

    <|im_start|>user\\nWho?<|im_end|>\\n<|im_start|>assistant\\nMe.<|im_end|>\\n
    .......................................................=============..      = is learnt

Learnt is what the assistant says, and the mark by which the template ends its turn. Where a template marks the
assistant's part itself (``{% generation %}``), that is learnt. Elsewhere the chat is rendered a second time with a
character of no meaning around every answer, which shows where answers stand whatever the template does around them:
no part of a chat is rendered on its own, since templates write some turns otherwise when others follow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from hsplitlora_flwr.data.example import ASSISTANT, DataError, Turn

OPEN, CLOSE = "\ue000", "\ue001"
"""Of Unicode's private use: no text means anything by them."""
_MARKS = re.compile(f"[{OPEN}{CLOSE}]")
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A text, and where in it something is learnt.

    Parameters
    ----------
    text : str
    learnt : tuple of (int, int)
        First character of each stretch, and the one behind its last; in order.
    ended : bool
        Whether the text brings its own end; else EOS is to follow.
    """

    text: str
    learnt: tuple[tuple[int, int], ...]
    ended: bool


def marks_its_own(turns: Sequence[Turn], tokenizer: Any) -> bool:
    """Whether the template says itself what of this chat is learnt."""
    marked = _MARKED.search(_template(tokenizer)) and getattr(tokenizer, "is_fast", False)
    return bool(marked) and all(turn.learnt for turn in turns if turn.role == ASSISTANT)


def render(turns: Sequence[Turn], tokenizer: Any) -> Rendered:
    """The text of a chat that ends with a turn of the assistant.

    Raises
    ------
    DataError
        If the tokenizer has no template, the template refuses the chat, or it changes what the assistant says.
    """
    text = apply_template(turns, tokenizer)
    if _MARKS.search(text):
        raise DataError("the chat has the characters U+E000 or U+E001, which mean nothing; take them out")
    learnt = [turn.learnt for turn in turns if turn.role == ASSISTANT]
    for split in (_whole, _stripped):
        marked = apply_template([_between_marks(turn, *split(turn.content)) for turn in turns], tokenizer)
        if _MARKS.sub("", marked) == text and "".join(_MARKS.findall(marked)) == (OPEN + CLOSE) * len(learnt):
            break
    else:
        raise DataError(
            f"the chat template of {_name(tokenizer)} changes what the assistant says, so that it is not to be found "
            "in the text; mark it in the template with {% generation %} and {% endgeneration %}"
        )
    places = [place.start() - number for number, place in enumerate(_MARKS.finditer(marked))]
    end = text[places[-1] :]
    if ended := bool(end.strip()):
        end = end.rstrip()
    spans = (
        (first, last + (len(end) if text.startswith(end, last) else 0))
        for first, last, learns in zip(places[::2], places[1::2], learnt, strict=True)
        if learns
    )
    return Rendered(text, tuple(spans), ended)


def apply_template(turns: Sequence[Turn], tokenizer: Any, **options: Any) -> Any:
    """What the tokenizer's template makes of a chat, as text unless ``options`` say otherwise; raises DataError."""
    _template(tokenizer)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
    except Exception as error:  # a template is code of others
        told = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise DataError(f"the chat template of {_name(tokenizer)} refuses the chat: {told}") from None


def end_of_turn(tokenizer: Any) -> list[int]:
    """The token that ends a turn by the template, in a list; empty where there is no such token."""
    turns = Turn("user", "a"), Turn(ASSISTANT, "b")
    rendered = render(turns, tokenizer)
    ((_, end),) = rendered.learnt
    mark = rendered.text[rendered.text.rindex("b") + 1 : end]
    ids = list(tokenizer(mark, add_special_tokens=False)["input_ids"])
    return ids if len(ids) == 1 else []


def _template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise DataError(
            f"rows are chats, and the tokenizer of {_name(tokenizer)} has no chat template to make texts of them; put "
            "one beside it (chat_template.jinja), name a model that has one, or write rows of {prompt, completion}"
        ) from None


def _between_marks(turn: Turn, before: str, said: str, after: str) -> Turn:
    return replace(turn, content=f"{before}{OPEN}{said}{CLOSE}{after}") if turn.role == ASSISTANT else turn


def _whole(content: str) -> tuple[str, str, str]:
    return "", content, ""


def _stripped(content: str) -> tuple[str, str, str]:
    """For templates that strip what is said."""
    said = content.strip()
    before, _, after = content.partition(said) if said else (content, "", "")
    return before, said, after


def _name(tokenizer: Any) -> str:
    return tokenizer.name_or_path or "the model"
