"""The names that settings may give: fixed ones, and registries to which other packages add theirs.

What stands behind a registered name is made elsewhere, in its ``home``, and registered there.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from hsplitlora_flwr.registry import Registry

Dtype = Literal["float32", "bfloat16", "float64"]
Quantisation = Literal["none", "8bit", "4bit"]
DTYPES: tuple[str, ...] = get_args(Dtype)
QUANTISATIONS: tuple[str, ...] = get_args(Quantisation)
WIRES = ("float32", "bfloat16", "float16", "int8", "float64")
OPTIMIZERS = ("adamw", "sgd")
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
SOURCES = ("dialogues", "chitchat", "e2e", "own", "jsonl")
OWN = ("own", "jsonl")
"""Sources of one's own data; the second is what they were called when there were JSON lines alone."""

KNOWN_METHODS: Registry[Any] = Registry("method", home="hsplitlora_flwr.methods")
KNOWN_CODECS: Registry[Any] = Registry("codec", *WIRES)
KNOWN_OPTIMIZERS: Registry[Any] = Registry("optimizer", *OPTIMIZERS)
KNOWN_SOURCES: Registry[Any] = Registry("source of text", *SOURCES)
KNOWN_TRANSPORTS: Registry[Any] = Registry(
    "transport", "stream", "messages", "auto", home="hsplitlora_flwr.transport.stream"
)
KNOWN_LISTENERS: Registry[Any] = Registry("listener")
