"""Checkpoints that are already quantised become the weights that they stand for, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    Mxfp4Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hsplitlora_flwr.models import ModelFilesError, load_causal_lm, load_client_parts
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.loading import check_model
from tests.tiny import randomise

BLOCK = 16
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}

Packed = Callable[[str, Tensor], dict[str, Tensor]]


def save(config: PretrainedConfig, folder: Path, quantisation: dict[str, Any], pack: Packed) -> dict[str, Tensor]:
    """A random checkpoint whose projections are packed; returns what it held before."""
    randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    before, after = load_file(folder / "model.safetensors"), {}
    for name, tensor in before.items():
        after |= pack(name, tensor) if "_proj" in name and "bias" not in name else {name: tensor}
    save_file(after, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantisation}))
    return before


def in_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """As DeepSeek-V3 and the FP8 releases of Qwen3 are stored: a scale for every square of numbers."""
    squares = weight.view(weight.shape[0] // BLOCK, BLOCK, weight.shape[1] // BLOCK, BLOCK)
    scales = squares.abs().amax(dim=(1, 3)) / 448
    numbers = (squares / scales[:, None, :, None]).reshape(weight.shape)
    return {name: numbers.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [Qwen3Config(**SMALL), Qwen3MoeConfig(**SMALL, **EXPERTS)], ids=["dense", "experts"])
def test_fp8_becomes_what_transformers_makes_of_it(config: PretrainedConfig, dtype: str, tmp_path: Path) -> None:
    before = save(config, tmp_path, FP8, in_fp8)
    numbers = getattr(torch, dtype)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=numbers, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).state_dict()
    whole = load_causal_lm(str(tmp_path), dtype)
    got = whole.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    query = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(got[query].float(), before[query])
    assert torch.allclose(got[query].float(), before[query], atol=0.05 * float(before[query].abs().max()))
    assert getattr(whole.config, "quantization_config", None) is None


def test_parts_of_an_fp8_checkpoint_and_what_is_saved_of_it(tmp_path: Path) -> None:
    save(Qwen3Config(**SMALL), tmp_path, FP8, in_fp8)
    assert check_model(str(tmp_path)).name == "Llama-like"
    whole = load_causal_lm(str(tmp_path))
    expected = whole.state_dict()
    client, head = load_client_parts(str(tmp_path), 1)
    for name, tensor in client.decoder.state_dict().items():
        assert torch.equal(tensor, expected[f"model.{name}"])
    assert torch.equal(head.causal_lm.lm_head.weight, expected["lm_head.weight"])
    whole.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert not hasattr(read_config(str(tmp_path)), "quantization_config")


def test_mxfp4_becomes_what_transformers_makes_of_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def in_mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
        """As gpt-oss is stored: for every 32 numbers, 16 bytes of two 4-bit numbers and an exponent."""
        if "experts" not in name:
            return {name: weight}
        experts, rows, columns = weight.shape
        shape = (experts, columns, rows // 32)
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": torch.randint(118, 128, shape, dtype=torch.uint8)}

    config = GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    save(config, tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, in_mxfp4)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).state_dict()
    got = load_causal_lm(str(tmp_path), "bfloat16").state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert len(got["model.layers.0.mlp.experts.down_proj"].unique()) > 50


def in_int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """As bitsandbytes stores what it has quantised: a scale for every row."""
    scales = weight.abs().amax(1)
    numbers = (weight / scales[:, None] * 127).round().to(torch.int8)
    return {name: numbers, name.replace("weight", "SCB"): scales}


@pytest.mark.parametrize(
    ("quantisation", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt"),
        ({"bits": 8}, "None"),
    ],
)
def test_what_transformers_does_not_dequantise_is_refused(
    quantisation: dict[str, Any], named: str, tmp_path: Path
) -> None:
    save(Qwen3Config(**SMALL), tmp_path, quantisation, in_int8)
    message = rf"weights are quantised \({named}\).*name the checkpoint that it was made from; model.quantise=8bit"
    with pytest.raises(ModelFilesError, match=message):
        check_model(str(tmp_path))
    with pytest.raises(ModelFilesError, match=message):
        load_client_parts(str(tmp_path), 1)


@pytest.mark.parametrize(("pack", "kind"), [(in_int8, "int8"), (in_fp8, "float8_e4m3fn")])
def test_packed_weights_whose_configuration_says_nothing_are_refused(pack: Packed, kind: str, tmp_path: Path) -> None:
    save(Qwen3Config(**SMALL), tmp_path, {}, pack)
    with pytest.raises(ModelFilesError, match=rf"_proj.weight' is stored as {kind}, without the scales"):
        check_model(str(tmp_path))
    with pytest.raises(ModelFilesError, match=rf"_proj.weight' is stored as {kind}, without the scales"):
        load_client_parts(str(tmp_path), 1)


def test_fp8_without_its_scales_is_refused(tmp_path: Path) -> None:
    save(Qwen3Config(**SMALL), tmp_path, FP8, lambda name, weight: {name: in_fp8(name, weight)[name]})
    with pytest.raises(ModelFilesError, match=r"_proj.weight' is stored as float8_e4m3fn, without the scales"):
        check_model(str(tmp_path))
