"""The shapes that rows of data come in, and what example each row is.

A row is told by its columns that hold text: those of a known shape and no others, since half of a text would go
unnoticed. What a row says besides, such as an id, is passed over; columns that are empty say nothing.

    text        {"text"}
    pair        {"prompt", "completion"}, joined as they are
    line        {"question", "answer"} and the like, or columns by name: a line break between, unless there is space
    alpaca      {"instruction", "input", "output"}, in the words that Alpaca was trained on
    chat        {"messages"} of role and content, ShareGPT's {"conversations"} of from and value

Source of Alpaca's words: https://github.com/tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsplitlora_flwr.data.example import ASSISTANT, DataError, Example, Turn

Row = Mapping[str, Any]
Group = str

_READ_FIRST = (
    *("system", "tools", "context", "instruction", "prompt", "question", "query", "input", "text"),
    *("messages", "conversations", "conversation", "output", "response", "answer", "completion", "chosen", "rejected"),
)
TEXT_COLUMNS = frozenset(_READ_FIRST)
"""Columns that hold text in the data sets that are about."""
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys((ASSISTANT, "gpt", "chatgpt", "bot", "model"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), "system"),
}
_BELOW = "Below is an instruction that describes a task"
_WRITE = ". Write a response that appropriately completes the request.\n\n"
_WITH_INPUT = ", paired with an input that provides further context"
_RESPONSE = "### Response:\n"


@dataclass(frozen=True)
class Shape:
    """How rows of one kind become examples.

    Parameters
    ----------
    kind : str
        ``text``, ``pair``, ``line``, ``alpaca`` or ``chat``.
    needed, may : tuple of str
        The columns that a row has, and those that it may have besides.
    """

    kind: str
    needed: tuple[str, ...]
    may: tuple[str, ...] = ()

    def example(self, row: Row, group: Group) -> Example:
        """The example of a row.

        Raises
        ------
        DataError
            If a column does not hold what it should; the text does not say of which row.
        """
        return _MAKERS[self.kind](self, row, group)


def shape_of(row: Row, prompt: str = "", completion: str = "") -> Shape | None:
    """The shape of a row; None if it is not known.

    Parameters
    ----------
    row : Mapping
    prompt, completion : str
        Columns by name, which go before all that is known.
    """
    if completion:
        chat = isinstance(row.get(completion), list)
        return Shape(
            "chat" if chat else "line" if prompt else "text", (prompt, completion) if prompt else (completion,)
        )
    found = TEXT_COLUMNS & row.keys()
    return _known(found) or _known({name for name in found if row[name] not in (None, "", [])})


def kind_of(examples: Sequence[Example]) -> str:
    """The kind whose prompts these are, by which :func:`asked` makes a user's prompt one of them."""
    prompts = [example.prompt for example in examples]
    if any(example.turns for example in examples):
        return "chat"
    if not any(prompts):
        return "text"
    if all(prompt.startswith(_BELOW) and prompt.endswith(_RESPONSE) for prompt in prompts):
        return "alpaca"
    return "line" if all(prompt.endswith("\n") for prompt in prompts) else "pair"


def asked(kind: str, text: str) -> Example:
    """What a user asks, as the prompt of an example of a kind."""
    if kind == "chat":
        return Example.chat([Turn("user", text), Turn(ASSISTANT, "?")])
    if kind == "alpaca":
        return Example(_alpaca_prompt(text, ""), "")
    return Example(text + _between(text, "") if kind == "line" else text, "")


def refusal(row: Any, code: str) -> str:
    """What is wrong with a row of no known shape, and the command that makes a known one of all rows.

    Parameters
    ----------
    row : object
    code : str
        Python that loads the rows with the library ``datasets``.
    """
    accepted = (
        'a row must be {"prompt": ..., "completion": ...}, {"text": ...}, {"messages": [...]} or another that '
        "docs/data.md lists"
    )
    if not isinstance(row, Mapping):
        return accepted
    columns = [name for name in _READ_FIRST if name in row] or list(row)[:5]
    said = f"{accepted}, and this one has {', '.join(map(repr, columns)) or 'nothing'}"
    if not columns:
        return said
    return (
        f"{said}; name its columns, data.prompt=COLUMN data.completion=COLUMN, or convert the rows, for example: "
        f"{conversion(row, columns, code)}"
    )


def conversion(row: Row, columns: list[str], code: str) -> str:
    """The line of a shell that writes the rows anew, as ``rows.jsonl``."""
    lists = [name for name in columns if _holds_rows(row[name])]
    nested = next((name for name in lists if not _holds_turns(row[name])), None)
    if nested and len(row) - len(lists) < 2 and "data_files" in code:  # all rows in one field of a file
        made = code.replace(", split=", f", field={json.dumps(nested)}, split=")
        return f"python -c 'from datasets import *; {made}.to_json(\"rows.jsonl\")'"
    *names, last = [name for name in columns if name != "rejected"] or columns
    if last in lists:
        fields = {"messages": f"row[{json.dumps(last)}]"}
    else:
        read = " + ".join([*(f'row[{json.dumps(name)}] + "\\n"' for name in names)]) or '""'
        fields = {"prompt": read, "completion": f"row[{json.dumps(last)}]"}
    made = ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items())
    return (
        f"python -c 'from datasets import *; {code}.map(lambda row: {{{made}}})"
        f'.select_columns({json.dumps(list(fields))}).to_json("rows.jsonl")\''
    )


def text_in(row: Row, name: str) -> str:
    """A column that holds text.

    Raises
    ------
    DataError
        If it holds something else.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"'{name}' must be a string, not {json.dumps(value, default=str)[:40]}")
    # JSON can escape half of a character ("\ud83d"), on which tokenizers fail much later.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"'{name}' holds half of a surrogate pair, which is no text; mend or delete the row")
    return value


_SHAPES = (
    Shape("text", ("text",)),
    Shape("pair", ("prompt", "completion")),
    *(
        Shape("line", names)
        for names in (("prompt", "response"), ("question", "answer"), ("question", "response"), ("query", "response"))
    ),
    *(Shape("line", names) for names in (("query", "answer"), ("input", "output"), ("instruction", "response"))),
    Shape("alpaca", ("instruction", "output"), ("input",)),
    Shape("alpaca", ("instruction", "response"), ("context",)),
    *(Shape("chat", (name,), ("system",)) for name in ("messages", "conversations", "conversation")),
)


def _known(found: Iterable[str]) -> Shape | None:
    columns = set(found)
    return next(
        (each for each in _SHAPES if set(each.needed) <= columns <= {*each.needed, *each.may}),
        None,
    )


def _plain(shape: Shape, row: Row, group: Group) -> Example:
    *prompts, last = shape.needed
    completion = text_in(row, last)
    if not completion.strip():
        raise DataError(f"'{last}' is empty; give text or delete the row")
    prompt = "".join(text_in(row, name) for name in prompts)
    if shape.kind == "line" and prompt:
        prompt += _between(prompt, completion)
    return Example(prompt, completion, group)


def _alpaca(shape: Shape, row: Row, group: Group) -> Example:
    instruction, output = (text_in(row, name) for name in shape.needed)
    [more] = shape.may
    if not output.strip():
        raise DataError(f"'{shape.needed[1]}' is empty; give text or delete the row")
    context = text_in(row, more) if row.get(more) is not None else ""
    return Example(_alpaca_prompt(instruction, context), output, group)


def _alpaca_prompt(instruction: str, context: str) -> str:
    parts = {"Instruction": instruction, "Input": context} if context.strip() else {"Instruction": instruction}
    named = "".join(f"### {name}:\n{text}\n\n" for name, text in parts.items())
    return _BELOW + (_WITH_INPUT if "Input" in parts else "") + _WRITE + named + _RESPONSE


def _chat(shape: Shape, row: Row, group: Group) -> Example:
    column = shape.needed[-1]
    if shape.kind == "chat" and len(shape.needed) > 1:
        raise DataError(
            f"'{column}' holds turns, which have their prompts among them; leave data.prompt empty, or convert the row"
        )
    turns = row[column]
    if not isinstance(turns, list):
        raise DataError(f"'{column}' must be a list of turns, not {json.dumps(turns, default=str)[:40]}")
    found = [_turn(turn, f"turn {number} of '{column}'") for number, turn in enumerate(turns, start=1)]
    if row.get("system"):
        found.insert(0, Turn("system", text_in(row, "system")))
    return Example.chat(found, group)


def _turn(turn: Any, where: str) -> Turn:
    """A turn as OpenAI writes it (role, content) or ShareGPT (from, value)."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} must be an object of role and content, or of from and value")
    named = "role" if turn.get("role") is not None else "from"
    said = "content" if turn.get("content") is not None else "value"
    role = _ROLES.get(str(turn.get(named)).lower())
    if role is None:
        raise DataError(
            f"{where} has '{named}': {json.dumps(turn.get(named), default=str)[:40]}, which is no side of a chat; "
            f"there are {', '.join(sorted(_ROLES))}"
        )
    if calls := [name for name in ("tool_calls", "function_call") if turn.get(name)]:
        raise DataError(f"{where} has '{calls[0]}', which is no text; leave such rows out or write the call as content")
    weight = turn.get("weight")
    return Turn(role, _content(turn, said, where), learnt=weight is None or bool(weight))


def _content(turn: Row, name: str, where: str) -> str:
    """Text, or a list of parts that are all text."""
    parts = turn.get(name)
    if isinstance(parts, list):
        if strange := [part for part in parts if not (isinstance(part, Mapping) and isinstance(part.get("text"), str))]:
            raise DataError(f"{where} holds {json.dumps(strange[0], default=str)[:60]}, which is no text")
        name = "text"
    else:
        parts = [turn]
    try:
        return "".join(text_in(part, name) for part in parts)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


_MAKERS: dict[str, Callable[[Shape, Row, Group], Example]] = {
    **dict.fromkeys(("text", "pair", "line"), _plain),
    "alpaca": _alpaca,
    "chat": _chat,
}


def _between(prompt: str, completion: str) -> str:
    """What keeps words of one from running into those of the other."""
    return "" if prompt[-1:].isspace() or completion[:1].isspace() else "\n"


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _holds_turns(value: Any) -> bool:
    return bool({"role", "from"} & value[0].keys())
