"""The control plane: what the Flower messages of a round hold.

A round asks a client one thing after another, by message type (:mod:`hsplitlora_flwr.messages.kinds`). What a message
or a reply holds is a class of its own, which is written to Flower's records and read from them there and nowhere else:

- :class:`Description`: what a node says of itself, its budget and its data, in reply to :data:`DESCRIBE`.
- :class:`Task`: what a client is to do in :data:`PROBE`, :data:`TRAIN` and :data:`EVALUATE`, with its part of the plan.
- :class:`Outcome`: what it returns: adapters, importance, losses and measurements.

Replies come from other machines, so every field of them is checked as it is read
(:mod:`hsplitlora_flwr.messages.reading`).
"""

from hsplitlora_flwr.messages.description import HELD_BYTES, NAME_LENGTH, Description
from hsplitlora_flwr.messages.kinds import DESCRIBE, EVALUATE, FORGET, PROBE, TRAIN, TURN, answering_here
from hsplitlora_flwr.messages.outcome import Outcome, Progress
from hsplitlora_flwr.messages.packing import (
    PACKET_BYTES,
    PACKET_TYPE,
    pack_content,
    take_tensors,
    to_arrays,
    unpack_content,
)
from hsplitlora_flwr.messages.reading import ReplyError, printable, reading, record
from hsplitlora_flwr.messages.task import (
    Task,
    read_base,
    read_settings,
    settings_records,
    take_patch,
    take_start,
    token_of,
)

__all__ = [
    "DESCRIBE",
    "EVALUATE",
    "FORGET",
    "HELD_BYTES",
    "NAME_LENGTH",
    "PACKET_BYTES",
    "PACKET_TYPE",
    "PROBE",
    "TRAIN",
    "TURN",
    "Description",
    "Outcome",
    "Progress",
    "ReplyError",
    "Task",
    "answering_here",
    "pack_content",
    "printable",
    "read_base",
    "read_settings",
    "reading",
    "record",
    "settings_records",
    "take_patch",
    "take_start",
    "take_tensors",
    "to_arrays",
    "token_of",
    "unpack_content",
]
