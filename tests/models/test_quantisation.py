"""A base in 8 or 4 bits holds the numbers that the papers say, and those that transformers loads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from hsplitlora_flwr.models import load_causal_lm, load_client_parts
from hsplitlora_flwr.models import quantisation as quantisation_module
from hsplitlora_flwr.models.parts import is_linear
from hsplitlora_flwr.models.quantisation import QuantisedLinear, check_quantiser, weight_bytes
from tests.tiny import CONFIGS, random_batches, tiny_model

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""QLoRA, appendix E."""


@pytest.fixture
def _library() -> None:
    pytest.importorskip("bitsandbytes")


def by_hand(weight: torch.Tensor, quantise: str) -> torch.Tensor:
    """What a weight ``(out, in)`` becomes."""
    if quantise == "8bit":
        weight = weight.half().float()
        largest = weight.abs().amax(1, keepdim=True)
        return (weight * (127 / largest)).round() * largest.double() / 127
    numbers = torch.nn.functional.pad(weight.double().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = numbers.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4, dtype=torch.float64)
    nearest = codes[(numbers[..., None] / scale[..., None] - codes).abs().argmin(-1)] * scale
    return nearest.flatten()[: weight.numel()].view(weight.shape)


def quantised(layer: torch.nn.Linear | Conv1D, quantise: str) -> QuantisedLinear:
    result = QuantisedLinear(layer.requires_grad_(False), quantise)
    result.load(layer.weight)
    return result


def random_layer(rows: int = 48, columns: int = 38, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Linear(columns, rows, dtype=dtype)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("quantise", ["8bit", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_those_of_the_papers(quantise: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation_module, "_PIECE", 128)  # several pieces, and a broken block
    layer = random_layer(dtype=dtype)
    weight = layer.weight.detach()
    found = quantised(layer, quantise)
    assert found.dequantised().dtype == dtype
    torch.testing.assert_close(
        found.dequantised().double(), by_hand(weight, quantise), rtol=0, atol=4e-3 if dtype == torch.bfloat16 else 1e-6
    )
    assert found.packed.nbytes + found.scales.nbytes == weight_bytes(48, 38, weight.itemsize, quantise)
    transposed = Conv1D(48, 38)
    transposed.weight.data = weight.T.contiguous()
    assert torch.equal(quantised(transposed, quantise).dequantised(), found.dequantised())


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("quantise", ["8bit", "4bit"])
def test_a_layer_computes_what_its_dequantised_weight_does_and_keeps_nothing(quantise: str) -> None:
    plain = random_layer()
    layer = quantised(plain, quantise)
    twin = torch.nn.Linear(38, 48)
    twin.weight.data, twin.bias.data = layer.dequantised(), plain.bias.data
    x = torch.randn(2, 5, 38, generator=torch.Generator().manual_seed(0))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(one)
    assert not kept
    expected = twin(other)
    assert torch.equal(y, expected)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("quantise", ["8bit", "4bit"])
def test_weights_are_those_that_transformers_loads(name: str, quantise: str, tmp_path: Path) -> None:
    import bitsandbytes.functional as functional

    tiny_model(name, dtype=torch.float32).save_pretrained(tmp_path)
    ours = load_causal_lm(str(tmp_path), quantise=quantise)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=stock_config(quantise), dtype="float32")
    layers = [(n, m) for n, m in ours.named_modules() if isinstance(m, QuantisedLinear)]
    assert {n for n, m in stock.named_modules() if is_linear(m)} == {n for n, _ in layers} | {"lm_head"}
    for layer, module in layers:
        weight = stock.get_submodule(layer).weight
        theirs = (
            functional.int8_vectorwise_dequant(weight.data, weight.SCB)
            if quantise == "8bit"
            else functional.dequantize_4bit(weight.data, weight.quant_state)
        )
        assert torch.equal(module.dequantised(), theirs)
    if quantise == "4bit":  # in 8 bits stock layers round activations too, unless they train on a CPU
        batch = next(random_batches())
        torch.testing.assert_close(ours(batch.input_ids).logits, stock(batch.input_ids).logits)


def stock_config(quantise: str) -> BitsAndBytesConfig:
    if quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("name", CONFIGS)
def test_linears_of_blocks_are_quantised_and_nothing_else(name: str, tmp_path: Path) -> None:
    tiny_model(name, dtype=torch.float32).save_pretrained(tmp_path)
    plain = load_causal_lm(str(tmp_path))
    client, head = load_client_parts(str(tmp_path), 2, quantise="4bit")
    whole, _ = load_client_parts(str(tmp_path), 2)
    assert client.resident_parameters() == whole.resident_parameters()
    assert all(isinstance(linear, QuantisedLinear) for _, linear in client.linears())
    assert [n for n, _ in client.linears()] == [n for n, _ in whole.linears()]
    names = {f"{client.family.decoder}.{n}": p for n, p in client.decoder.named_parameters()}
    names |= dict(head.causal_lm.named_parameters())
    assert len(names) > 2
    for parameter_name, parameter in names.items():
        assert torch.equal(parameter, plain.get_parameter(parameter_name)), parameter_name


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hsplitlora_flwr.models import quantisation

    quantisation._functional.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    check_quantiser("none")
    with pytest.raises(ModuleNotFoundError, match=r"needs bitsandbytes: pip install 'hsplitlora_flwr\[quantised\]'"):
        load_causal_lm(str(tmp_path / "is not looked at"), quantise="4bit")
    with pytest.raises(ValueError, match="quantise='2bit' is not known; choose one of none, 8bit, 4bit"):
        check_quantiser("2bit")
