"""What a node says of itself: name, data, budget, and what it holds of the accumulated update."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from hsplitlora_flwr.data.fit import Cut
from hsplitlora_flwr.messages.reading import ReplyError, printable, reading, record
from hsplitlora_flwr.planning.budget import Budget

NAME_LENGTH = 64
"""Longest name of a client."""
HELD_BYTES = 4 << 20
"""Longest ``held`` text, which is enough for some ten thousand layers."""


@dataclass(frozen=True)
class Description:
    """A node's answer to ``describe``.

    Parameters
    ----------
    name : str
        The client's name in logs and results.
    examples : int
        Its number of training examples.
    memory_bytes : int
        Its memory budget where the model lies, on its GPU or in the machine.
    tokens : int
        Tokens of its training examples, before any was cut to ``data.max_length``.
    cut_rows, cut_tokens : int
        How many examples were cut, and how many tokens that cost.
    flops, up, down : float
        Its speed in operations/s, and its link to and from the server in bytes/s; 0 where it states none.
    adapter_bytes : int
        Adapters that it may send in a round; 0 for no bound.
    process_bytes : int
        What its process takes there before a model is loaded; 0 on a GPU.
    host_bytes, host_process_bytes : int
        With a GPU, what its process may take in the machine, 0 for no bound, and takes by itself; else 0.
    longest : int
        Tokens of its longest example.
    held : Mapping[str, str]
        The state of each layer's accumulated update that it holds; see
        :meth:`hsplitlora_flwr.lora.update.AccumulatedUpdate.held`.
    version : int
        The version that it held last.
    cut_transform : str
        What it does to its cut activation before sending it; "" for nothing.
    cut_width : int
        Numbers per token that it sends, with a bottleneck; 0 for the whole cut activation.
    cut_directions : str
        Digest of the bottleneck's file; "" without one.
    """

    name: str
    examples: int
    memory_bytes: int
    process_bytes: int
    longest: int
    held: Mapping[str, str] = field(default_factory=dict)
    version: int = 0
    flops: float = 0.0
    up: float = 0.0
    down: float = 0.0
    adapter_bytes: int = 0
    tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    cut_transform: str = ""
    host_bytes: int = 0
    host_process_bytes: int = 0
    cut_width: int = 0
    cut_directions: str = ""

    @staticmethod
    def is_all_of(records: RecordDict) -> bool:
        """Whether a reply's content is a description and nothing else."""
        return set(records) == {"description"}

    @property
    def budget(self) -> Budget:
        """What a plan may use."""
        speeds = self.flops or None, self.up or None, self.down or None
        return Budget(self.memory_bytes, self.process_bytes, *speeds, self.adapter_bytes or None)

    @property
    def cut(self) -> Cut:
        """What of its training text was cut."""
        return Cut(self.examples, self.tokens, self.cut_rows, self.cut_tokens)

    def to_records(self) -> RecordDict:
        """As the content of a reply."""
        return RecordDict({"description": ConfigRecord(vars(self) | {"held": json.dumps(dict(self.held))})})

    @classmethod
    def from_records(cls, records: RecordDict) -> Description:
        """Read from the content of a reply.

        Raises
        ------
        ReplyError
            If it is not what :meth:`to_records` makes, or says what cannot be.
        """
        with reading("its description of itself"):
            values: dict[str, Any] = dict(record(records, "description", ConfigRecord))
            for key, allowed in _CLAIMS.items():
                if key in values and not allowed.holds(values[key]):
                    raise ReplyError(
                        f"its description of itself cannot be used: {key}={printable(repr(values[key]), 80)}, which "
                        f"must be {allowed}"
                    )
            held = {str(name): str(state) for name, state in dict(json.loads(values["held"])).items()}
            made = cls(**values | {"held": held})
            if not (made.cut_rows <= made.examples and made.cut_rows <= made.cut_tokens <= made.tokens):
                raise ReplyError(f"its description of itself cannot be used: {made.cut} cannot be cut")
            return made


@dataclass(frozen=True)
class _Number:
    """The type and bounds of a number in a description."""

    kind: type[int] | type[float]
    low: float
    high: float
    or_zero: bool = False

    def holds(self, value: object) -> bool:
        typed = type(value) is self.kind or (self.kind is float and type(value) is int)
        return typed and (self.low <= value <= self.high or (self.or_zero and value == 0))  # type: ignore[operator]

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        return f"{what} from {self.low:g} to {self.high:g}" + (", or 0" if self.or_zero else "")


@dataclass(frozen=True)
class _Text:
    """The longest length of a text in a description, and whether all of it must be printable."""

    length: int
    printable: bool = False
    or_empty: bool = False

    def holds(self, value: object) -> bool:
        if not isinstance(value, str) or not (1 - self.or_empty) <= len(value) <= self.length:
            return False
        return not self.printable or (value.isprintable() and value == value.strip())

    def __str__(self) -> str:
        return f"a text of at most {self.length} characters" + (", none of them invisible" if self.printable else "")


_CLAIMS: Mapping[str, _Number | _Text] = {
    "name": _Text(NAME_LENGTH, printable=True),
    "examples": _Number(int, 1, 1e12),
    "memory_bytes": _Number(int, 1, 1e15),
    "process_bytes": _Number(int, 0, 1e15),
    "host_bytes": _Number(int, 0, 1e15),
    "host_process_bytes": _Number(int, 0, 1e15),
    "longest": _Number(int, 1, 1e9),
    "held": _Text(HELD_BYTES),
    "cut_transform": _Text(NAME_LENGTH, printable=True, or_empty=True),
    "cut_width": _Number(int, 0, 1e6),
    "cut_directions": _Text(NAME_LENGTH, printable=True, or_empty=True),
    "version": _Number(int, 0, 1e9),
    "flops": _Number(float, 1e6, 1e18, or_zero=True),
    "up": _Number(float, 1, 1e15, or_zero=True),
    "down": _Number(float, 1, 1e15, or_zero=True),
    "adapter_bytes": _Number(int, 0, 1e15),
    "tokens": _Number(int, 0, 1e15),
    "cut_rows": _Number(int, 0, 1e12),
    "cut_tokens": _Number(int, 0, 1e15),
}
"""What each field may hold. Speeds beyond these bounds belong to no machine, and would only distort a plan."""
