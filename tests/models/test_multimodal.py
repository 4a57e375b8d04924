"""Of a multimodal model the text decoder is used, and it makes of a text what the whole makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    LlavaConfig,
    PaliGemmaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
)

from hsplitlora_flwr.models import ModelFilesError, UnsupportedModelError, load_causal_lm, load_client_parts
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.loading import check_model
from hsplitlora_flwr.models.multimodal import prove_text_decoder

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CONFIGS = {
    "gemma3": Gemma3Config(text_config=SMALL | {"head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4),
    "llava": LlavaConfig(
        text_config=SMALL | {"model_type": "llama"}, vision_config=VISION | {"model_type": "clip_vision_model"}
    ),
}
IDS = torch.arange(3, 25).reshape(2, 11)
MASK = torch.ones_like(IDS)


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[request.param]).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_the_text_decoder_is_what_the_whole_makes_of_a_text(saved: tuple[PreTrainedModel, Path]) -> None:
    whole, folder = saved
    assert check_model(str(folder)).decoder == "model"
    assert read_config(str(folder)).num_hidden_layers == 3
    text = load_causal_lm(str(folder))
    with torch.no_grad():
        expected = whole(input_ids=IDS, attention_mask=MASK).logits
        torch.testing.assert_close(text(input_ids=IDS, attention_mask=MASK).logits, expected)
    assert not any("vision" in name for name, _ in text.named_parameters())


def test_a_client_holds_a_part_of_the_text_decoder(saved: tuple[PreTrainedModel, Path]) -> None:
    whole, folder = saved
    client, _ = load_client_parts(str(folder), 1)
    hidden = []
    whole.get_decoder().layers[1].register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with torch.no_grad():
        whole(input_ids=IDS, attention_mask=MASK)
        torch.testing.assert_close(client(IDS, MASK), hidden[0])


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (PaliGemmaConfig(), "a token changes what the model says of earlier ones"),  # inside a prompt
        (Qwen2VLConfig(), "no causal language model for its text decoder, 'qwen2_vl_text'; name a text model"),
    ],
)
def test_what_the_text_decoder_cannot_stand_for_is_refused(config: PretrainedConfig, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        prove_text_decoder(config)


def test_a_model_type_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt-9", "hidden_size": 8}))
    with pytest.raises(ModelFilesError, match=r"names the model type 'gpt-9', which transformers .* does not know"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ModelFilesError, match=r"its config.json names no model_type"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidd')
    with pytest.raises(ModelFilesError, match=r"its config.json is damaged"):
        read_config(str(tmp_path))
