"""One example: a text that a model learns from, whatever it was read from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ASSISTANT = "assistant"
"""The role whose turns are learnt."""


class DataError(ValueError):
    """Data are missing, malformed or too few. The text names the file and line, or the setting, and the remedy."""


@dataclass(frozen=True)
class Turn:
    """What one side of a chat says.

    Parameters
    ----------
    role : str
        As chat templates call it: ``system``, ``user`` or ``assistant``.
    content : str
    learnt : bool
        Whether a turn of the assistant carries loss; those of others never do.
    """

    role: str
    content: str
    learnt: bool = True


@dataclass(frozen=True)
class Example:
    """One text: the model reads ``prompt`` and learns ``completion``.

    Parameters
    ----------
    prompt, completion : str
        Of a chat, the last answer and what it answers.
    group : str
        What non-IID partitions deal by.
    turns : tuple of Turn
        A chat, which the tokenizer's template makes a text of: every turn of the assistant is learnt. Empty for a text
        that is its prompt and its completion.
    """

    prompt: str
    completion: str
    group: str = ""
    turns: tuple[Turn, ...] = ()

    @classmethod
    def chat(cls, turns: Iterable[Turn], group: str = "") -> Example:
        """Of turns up to the last that the assistant has; behind it there is nothing to learn.

        Raises
        ------
        DataError
            If there is nothing to learn at all.
        """
        turns = tuple(turns)
        last = max((place for place, turn in enumerate(turns) if _teaches(turn)), default=-1)
        if last < 0:
            raise DataError(f"no turn of the role '{ASSISTANT}' with something to learn; add one or delete the row")
        return cls(turns[last - 1].content if last else "", turns[last].content, group, turns[: last + 1])

    @property
    def text(self) -> tuple[str, str, tuple[Turn, ...]]:
        """All but the group: two examples of one text are the same to a model."""
        return self.prompt, self.completion, self.turns

    @property
    def asked(self) -> Example:
        """What a model is given to write the completion."""
        return Example(self.prompt, "", "", self.turns[:-1])


def _teaches(turn: Turn) -> bool:
    return turn.role == ASSISTANT and turn.learnt and bool(turn.content.strip())
