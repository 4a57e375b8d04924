"""A Hugging Face causal LM cut in two, or in three."""

from hsplitlora_flwr.models.checkpoint import ModelFilesError
from hsplitlora_flwr.models.families import Family, UnsupportedModelError, list_families
from hsplitlora_flwr.models.loading import (
    load_causal_lm,
    load_client_model,
    load_client_parts,
    split_model,
)
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.split import BodyModel, ClientModel, HeadModel, ServerModel, SplitError

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
