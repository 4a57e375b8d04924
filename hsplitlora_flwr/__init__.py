"""HSplitLoRA for Flower: language models fine-tuned on private data that cannot leave weak, uneven machines.

A causal LM is cut in two. Each client holds the embeddings and the first blocks and keeps its data; the server holds
the rest inside a Flower strategy. Only cut activations and their gradients travel, and both sides train LoRA adapters
only.

Source: HSplitLoRA, https://arxiv.org/abs/2505.02795.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsplitlora_flwr.client.handlers import split_client_app
    from hsplitlora_flwr.config import Config
    from hsplitlora_flwr.data.sources import register_reader, register_source
    from hsplitlora_flwr.lora.aggregation import register_rule
    from hsplitlora_flwr.lora.optimizers import Optimizer, register_optimizer
    from hsplitlora_flwr.methods import METHODS, Method, register_method
    from hsplitlora_flwr.reporting.events import Event, Listener
    from hsplitlora_flwr.reporting.report import register_listener
    from hsplitlora_flwr.server.strategy import HSplitLoRA
    from hsplitlora_flwr.training.cut import CutTransform
    from hsplitlora_flwr.transport.codecs import Codec, Part, WireError, register_codec
    from hsplitlora_flwr.transport.link import Endpoint, Ticket, Transport, register_transport

__all__ = [
    "METHODS",
    "Codec",
    "Config",
    "CutTransform",
    "Endpoint",
    "Event",
    "HSplitLoRA",
    "Listener",
    "Method",
    "Optimizer",
    "Part",
    "Ticket",
    "Transport",
    "WireError",
    "register_codec",
    "register_listener",
    "register_method",
    "register_optimizer",
    "register_reader",
    "register_rule",
    "register_source",
    "register_transport",
    "split_client_app",
]

_HOMES = {
    "Codec": "transport.codecs",
    "Config": "config",
    "CutTransform": "training.cut",
    "Endpoint": "transport.link",
    "Event": "reporting.events",
    "HSplitLoRA": "server.strategy",
    "Listener": "reporting.events",
    "METHODS": "methods",
    "Method": "methods",
    "Optimizer": "lora.optimizers",
    "Part": "transport.codecs",
    "Ticket": "transport.link",
    "Transport": "transport.link",
    "WireError": "transport.codecs",
    "register_codec": "transport.codecs",
    "register_listener": "reporting.report",
    "register_method": "methods",
    "register_optimizer": "lora.optimizers",
    "register_reader": "data.sources",
    "register_rule": "lora.aggregation",
    "register_source": "data.sources",
    "register_transport": "transport.link",
    "split_client_app": "client.handlers",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: torch, transformers and Flower take seconds."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
