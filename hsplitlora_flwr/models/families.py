"""Where a family of models keeps its embeddings, blocks, final norm and head.

A causal LM is a *decoder* (embeddings, blocks, final norm) below a head. The decoder's own ``forward`` runs whatever
blocks it finds in its list, so a part of a model is the decoder with a shorter list: no code of a model is copied here.
What differs between families is only the names.

A family that is not in the table is used when it proves itself (:mod:`hsplitlora_flwr.models.proof`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig


class UnsupportedModelError(ValueError):
    """A model cannot be cut, or a cut of it does not compute what the whole computes."""


@dataclass(frozen=True)
class Family:
    """Names of the parts of a causal LM.

    ``decoder`` is the absolute name of the module that runs the blocks; the other names are relative to it.
    """

    name: str
    model_types: tuple[str, ...]
    decoder: str
    blocks: str
    embeddings: tuple[str, ...]
    """Modules with parameters that run before the first block; the client holds them."""
    final: tuple[str, ...]
    """Modules with parameters that run after the last block; the server holds them, and the head."""
    stored_as: tuple[tuple[str, str], ...] = ()
    """Names in the model that checkpoints write differently: (name, name in files)."""

    def block_name(self, index: int) -> str:
        """Absolute name of a block, for instance ``model.layers.7``."""
        return f"{self.decoder}.{self.blocks}.{index}"


FAMILIES = (
    Family(
        "Llama-like", ("llama", "mistral", "qwen2", "qwen3"), "model", "layers", ("embed_tokens",), ("norm",)
    ),  # SmolLM2 is a Llama
    Family("GPT-2", ("gpt2",), "transformer", "h", ("wte", "wpe"), ("ln_f",)),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        "gpt_neox",
        "layers",
        ("embed_in",),
        ("final_layer_norm",),
        (("lm_head.weight", "embed_out.weight"),),
    ),
    Family(
        "OPT",
        ("opt",),
        "model.decoder",
        "layers",
        ("embed_tokens", "embed_positions", "project_in"),
        ("final_layer_norm", "project_out"),
    ),
    Family("Gemma", ("gemma2", "gemma3_text"), "model", "layers", ("embed_tokens",), ("norm",)),
)


def list_families() -> dict[str, tuple[str, ...]]:
    """The registered families: name -> the ``model_type`` values of Hugging Face configs that belong to it."""
    return {family.name: family.model_types for family in FAMILIES}


def tiny_config(config: PretrainedConfig, blocks: int = 8) -> PretrainedConfig:
    """The same architecture with at most ``blocks`` small blocks, a vocabulary of 97 and no dropout."""
    tiny = copy.deepcopy(config)
    sizes: dict[str, Any] = {"hidden_size": 32, "vocab_size": 97, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "max_position_embeddings": 64}
    sizes |= {"sliding_window": 8, "query_pre_attn_scalar": 8}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads):
        sizes["num_key_value_heads"] = 2
    elif getattr(config, "num_key_value_heads", None) is not None:
        sizes["num_key_value_heads"] = 4
    if getattr(config, "word_embed_proj_dim", None) is not None:
        sizes["word_embed_proj_dim"] = 32 if config.word_embed_proj_dim == config.hidden_size else 16
    sizes |= {name: 0.0 for name in vars(config) if "drop" in name and isinstance(getattr(config, name), float)}
    for name, value in sizes.items():
        if getattr(tiny, name, None) is not None:
            setattr(tiny, name, value)
    shorten(tiny, 0, min(blocks, config.num_hidden_layers))
    return tiny


def shorten(config: PretrainedConfig, first: int, last: int) -> None:
    """Make a configuration describe blocks ``first .. last - 1``, in place: the count and the per-block lists."""
    length = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == length and name.endswith(("_types", "_layers")):
            setattr(config, name, value[first:last])
    config.num_hidden_layers = last - first
