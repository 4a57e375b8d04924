"""A Hugging Face causal LM cut in two."""

from hsplitlora_flwr.models.families import Family, UnsupportedModelError, list_families
from hsplitlora_flwr.models.loading import ModelFilesError, load_causal_lm, load_client_model, split_model
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.split import ClientModel, ServerModel, SplitError

__all__ = [
    "ClientModel",
    "Family",
    "ModelFilesError",
    "ServerModel",
    "SplitError",
    "UnsupportedModelError",
    "find_family",
    "list_families",
    "load_causal_lm",
    "load_client_model",
    "split_model",
]
