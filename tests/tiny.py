"""Small random models of every family, and batches for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.models import load_causal_lm
from hsplitlora_flwr.models.families import tiny_config
from hsplitlora_flwr.models.quantisation import QuantisedLinear

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(),
    "llama-tied-grouped": LlamaConfig(num_key_value_heads=8, tie_word_embeddings=True),
    "mistral": MistralConfig(),
    "qwen2": Qwen2Config(),
    "qwen3": Qwen3Config(),
    "gpt2": GPT2Config(),
    "gpt_neox": GPTNeoXConfig(),
    "opt": OPTConfig(),
    "opt-350m-like": OPTConfig(word_embed_proj_dim=512, do_layer_norm_before=False),
    "gemma2": Gemma2Config(),
    "gemma3_text": Gemma3TextConfig(layer_types=["sliding_attention", "full_attention"] * 13),
}
BLOCKS = 4


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model of a family with 4 blocks, hidden size 32 and a vocabulary of 97, without dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(CONFIGS[name], BLOCKS))
    return randomise(model, seed).to(dtype).eval()


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Norms start at one, biases and many buffers at zero or one, which would hide mistakes."""
    kept = model.state_dict(keep_vars=True).values()  # without buffers that are computed
    for tensor in {id(tensor): tensor for tensor in kept if tensor.is_floating_point()}.values():
        tensor.data += 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return model


def quantised_twins(name: str, quantise: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """In float64, a tiny model with its blocks in 8 or 4 bits, and a plain one with the weights that they stand for."""
    pytest.importorskip("bitsandbytes")
    tiny_model(name).save_pretrained(folder)
    plain = load_causal_lm(str(folder), "float64")
    quantised = load_causal_lm(str(folder), "float64", quantise=quantise)
    for layer, module in quantised.named_modules():
        if isinstance(module, QuantisedLinear):
            weight = module.dequantised()
            plain.get_submodule(layer).weight.data = weight.T if module.transposed else weight
    return quantised, plain


def random_batches(seed: int = 0, rows: int = 4, length: int = 11) -> Iterator[Batch]:
    """Right-padded batches with a masked prompt; rows hold different numbers of labelled tokens."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        input_ids = torch.randint(3, 97, (rows, length), generator=generator)
        ends = torch.randint(5, length + 1, (rows, 1), generator=generator)
        prompts = torch.randint(0, 4, (rows, 1), generator=generator)
        positions = torch.arange(length)[None]
        attention_mask = (positions < ends).long()
        labels = input_ids.masked_fill((positions < prompts) | (attention_mask == 0), -100)
        yield Batch(input_ids, attention_mask, labels)
