"""Loading a Hugging Face causal LM, and cutting it into the client's and the server's part."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsplitlora_flwr.models.checkpoint import ModelFilesError
    from hsplitlora_flwr.models.families import Family, UnsupportedModelError, list_families
    from hsplitlora_flwr.models.loading import (
        load_causal_lm,
        load_client_model,
        load_client_parts,
        split_model,
    )
    from hsplitlora_flwr.models.parts import BodyModel, ClientModel, HeadModel, ServerModel
    from hsplitlora_flwr.models.proof import find_family
    from hsplitlora_flwr.models.split import SplitError

__all__ = [
    "BodyModel",
    "ClientModel",
    "Family",
    "HeadModel",
    "ModelFilesError",
    "ServerModel",
    "SplitError",
    "UnsupportedModelError",
    "find_family",
    "list_families",
    "load_causal_lm",
    "load_client_model",
    "load_client_parts",
    "split_model",
]

_HOMES = {
    "BodyModel": "parts",
    "ClientModel": "parts",
    "Family": "families",
    "HeadModel": "parts",
    "ModelFilesError": "checkpoint",
    "ServerModel": "parts",
    "SplitError": "split",
    "UnsupportedModelError": "families",
    "find_family": "proof",
    "list_families": "families",
    "load_causal_lm": "loading",
    "load_client_model": "loading",
    "load_client_parts": "loading",
    "split_model": "loading",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: torch and transformers take seconds."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
