"""Where a family of models keeps its embeddings, blocks, final norm and head.

A causal LM is a *decoder* (embeddings, blocks, final norm) below a head. The decoder's own ``forward`` runs whatever
blocks it finds in its list, so a part of a model is the decoder with a shorter list: no code of a model is copied here.
What differs between families is only the names.

A family that is not in the table is used when it proves itself (:mod:`hsplitlora_flwr.models.proof`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
    unadapted: tuple[str, ...] = ()
    """Linear layers that take no adapter and are not quantised, by their name inside a block: code looks into them, or
    they return more than a product."""
    alike: bool = True
    """Whether all blocks are known to have parameters of the same names and shapes."""

    def block_name(self, index: int) -> str:
        """Absolute name of a block, for instance ``model.layers.7``."""
        return f"{self.decoder}.{self.blocks}.{index}"


@dataclass(frozen=True)
class Architecture:
    """A model's configuration as a key, by which what was found out about it is remembered."""

    text: str
    config: PretrainedConfig = field(compare=False)

    @classmethod
    def of(cls, config: PretrainedConfig) -> Architecture:
        """The key of ``config``."""
        return cls(f"{type(config).__name__} {config.to_json_string(use_diff=False)}", config)


FAMILIES = (
    Family(
        "Llama-like", ("llama", "mistral", "qwen2", "qwen3"), "model", "layers", ("embed_tokens",), ("norm",)
    ),  # SmolLM2 is a Llama
    Family("GPT-2", ("gpt2",), "transformer", "h", ("wte", "wpe"), ("ln_f",)),
    Family("GPT-NeoX", ("gpt_neox",), "gpt_neox", "layers", ("embed_in",), ("final_layer_norm",)),
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
    """The same architecture with at most ``blocks`` small blocks, a vocabulary of 97 and no dropout.

    Sizes that depend on each other stay so: 4 heads of 8 numbers for a hidden size of 32, fewer key than query heads
    where there were fewer, half of a head under rotary positions where it was a part of one. What a configuration
    leaves out or sets to zero stays so, and what follows from other fields is left alone.
    """
    tiny, config = copy.deepcopy(config), copy.deepcopy(config)
    overrides = _overrides(config)
    if overrides:
        tiny.per_layer_config = config.per_layer_config = None  # until the end, what blocks have in common
    sizes: dict[str, Any] = _SIZES | {name: _fewer_heads(config, name) for name in _KEY_HEADS}
    if getattr(config, "word_embed_proj_dim", None) is not None:
        sizes["word_embed_proj_dim"] = 32 if config.word_embed_proj_dim == config.hidden_size else 16
    if getattr(config, "linear_num_key_heads", None) == getattr(config, "linear_num_value_heads", None):
        sizes["linear_num_key_heads"] = sizes["linear_num_value_heads"]
    sizes |= {name: 0.0 for name in vars(config) if "drop" in name and isinstance(getattr(config, name), float)}
    sizes |= {name: blocks // 2 for name in _FIRST_DENSE if (_value(config, name) or 0) > blocks // 2}
    shrink = (_rotary(config), sizes["head_dim"])
    for name, value in sizes.items():
        if _value(tiny, name):
            with suppress(AttributeError):  # a property that follows from others
                setattr(tiny, name, value)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(vars(tiny).get(name), dict):
            setattr(tiny, name, _short_rope(vars(tiny)[name], *shrink))
    if overrides:
        tiny.per_layer_config = {
            block: {name: _in_proportion(own[name], _value(config, name), _value(tiny, name)) for name in own}
            for block, own in overrides.items()
        }
    _keep_blocks(tiny, _typical_blocks(config, blocks))
    return tiny


_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 97),
    "hidden_size": 32,
    "hidden_size_per_layer_input": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # feed-forward
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("dense_intermediate_size", "decoder_ffn_dim"), 48),
    # experts
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    # attention
    "num_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 8,
    "kv_channels": 8,
    "rotary_dim": 4,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    # latent attention
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "linear_num_heads": 4,
    "mamba_expand": 2,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim"), 8),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 16),
    "mamba_dt_rank": 4,
}
"""Sizes of a tiny model, by the name of the field that holds them."""
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")
_FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


def _value(config: PretrainedConfig, name: str) -> Any:
    """A field, or None where there is none."""
    return getattr(config, name, None)


def _in_proportion(value: Any, usual: Any, tiny: Any) -> Any:
    """What a block has in place of the ``usual`` value, in a model where that became ``tiny``."""
    if type(value) is not int or not usual or usual == tiny:
        return value
    return max(value * tiny // usual, 1)


def _fewer_heads(config: PretrainedConfig, name: str) -> int:
    """Key heads of a tiny model: 1, as many as query heads, or half as many."""
    heads = _value(config, name)
    return 1 if heads == 1 else 4 if heads == config.num_attention_heads else 2


def _rotary(config: PretrainedConfig) -> int:
    """Numbers of a head of ``config``."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    return int(_value(config, "qk_rope_head_dim") or _value(config, "head_dim") or hidden // heads)


def _short_rope(rope: dict[str, Any], head: int, short: int) -> dict[str, Any]:
    """Parameters of rotary positions for a shorter head: what lists a number for every frequency has fewer of them."""
    result: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            value = _short_rope(value, head, short)
        elif isinstance(value, list) and key.endswith("_factor"):
            value = value[: max(len(value) * short // head, 1)]
        elif isinstance(value, list) and key.endswith("_section"):
            parts = [max(part * short // head, 1) for part in value]
            value = [sum(value) * short // head - sum(parts[1:]), *parts[1:]]
        result[key] = value
    return result


def shorten(config: PretrainedConfig, first: int, last: int) -> None:
    """Make a configuration describe blocks ``first .. last - 1``, in place: the count and the per-block lists."""
    _keep_blocks(config, range(first, last))


def block_config(config: PretrainedConfig, index: int) -> PretrainedConfig:
    """The configuration of one block, which may have other sizes than others."""
    block = config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config
    assert isinstance(block, PretrainedConfig)
    return block


def _keep_blocks(config: PretrainedConfig, kept: Sequence[int]) -> None:
    overrides = _overrides(config)
    if overrides:
        config.per_layer_config = None
    for name, values in _block_lists(config).items():
        setattr(config, name, [values[index] for index in kept])
    for name in [name for name in vars(config) if name.endswith("_layer_offset")]:  # of what comes in every n-th block
        period = getattr(config, f"{name.removesuffix('offset')}period")
        setattr(config, name, (getattr(config, name) - kept[0]) % period if kept else 0)
    config.num_hidden_layers = len(kept)
    if overrides:
        config.per_layer_config = {new: overrides[old] for new, old in enumerate(kept) if old in overrides}


def _overrides(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """What single blocks have in place of what all have, by block."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(block): own for block, own in config.to_dict()["per_layer_config"].items()}


def _block_lists(config: PretrainedConfig) -> dict[str, list[Any]]:
    """Fields that list something for every block."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers and _OF_BLOCKS.search(name)
    }


_OF_BLOCKS = re.compile("_types?$|_layers$|layer_freq$|layers_block_type$|_pattern$|_per_layer$")


def _typical_blocks(config: PretrainedConfig, count: int) -> list[int]:
    """At most ``count`` blocks, in order: the first two of every kind that the lists know, then the first ones."""
    length, lists = config.num_hidden_layers, _block_lists(config).values()
    kinds = [repr([values[index] for values in lists]) for index in range(length)]
    early = [index for index in range(length) if kinds[:index].count(kinds[index]) < 2]
    return sorted((early + [index for index in range(length) if index not in early])[:count])
