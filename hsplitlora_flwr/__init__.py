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
    from hsplitlora_flwr.lora.aggregation import register_rule
    from hsplitlora_flwr.methods import METHODS, Method, register_method
    from hsplitlora_flwr.server.strategy import HSplitLoRA

__all__ = [
    "METHODS",
    "Config",
    "HSplitLoRA",
    "Method",
    "register_method",
    "register_rule",
    "split_client_app",
]

_HOMES = {
    "Config": "config",
    "HSplitLoRA": "server.strategy",
    "METHODS": "methods",
    "Method": "methods",
    "register_method": "methods",
    "register_rule": "lora.aggregation",
    "split_client_app": "client.handlers",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: torch, transformers and Flower take seconds."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
