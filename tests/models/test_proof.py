"""Which models are taken, in what they differ from a Llama, and why others are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    CodeGenConfig,
    CTRLConfig,
    DeepseekV3Config,
    FalconConfig,
    GPTJConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    NanoChatConfig,
    OlmoConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen3MoeConfig,
    T5Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from hsplitlora_flwr.lora.layers import AdapterSpec, extract, inject
from hsplitlora_flwr.models import Family, UnsupportedModelError, find_family, split_model
from hsplitlora_flwr.models.build import build_causal_lm
from hsplitlora_flwr.models.families import tiny_config
from hsplitlora_flwr.models.parts import ModelPart
from hsplitlora_flwr.models.proof import find_unadapted
from hsplitlora_flwr.models.split import whole_model
from tests.tiny import random_batches

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
MIXTRAL = MixtralConfig(num_local_experts=4)
TAKEN: dict[str, PretrainedConfig] = {
    "experts": MIXTRAL,
    "experts in some blocks": Qwen3MoeConfig(num_experts=8, num_experts_per_tok=2, mlp_only_layers=[0, 2]),
    "latent attention, experts, a dense start": DeepseekV3Config(n_routed_experts=16, num_experts_per_tok=4),
    "a size that follows from others": FalconConfig(),
    "few key heads": FalconConfig(
        new_decoder_architecture=True, hidden_size=4096, num_attention_heads=64, num_kv_heads=8
    ),
    "no rotary positions": FalconConfig(alibi=True),
    "rotary positions on a part of a head": CodeGenConfig(),
    "the same, in another size": GPTJConfig(rotary_dim=32, n_head=8, n_embd=512),
    "a number for every rotary frequency": Phi3Config(rope_parameters=LONGROPE, pad_token_id=0),
    "a final norm without weights": OlmoConfig(),
    "a layer between the decoder and the head": ModernBertDecoderConfig(),
    "attention in every eighth block": JambaConfig(num_experts=4),
    "a router that is a linear layer": Llama4TextConfig(num_local_experts=4),
}
if "minicpm3" in CONFIG_MAPPING:  # of newer releases of transformers
    TAKEN["a scale before the head"] = CONFIG_MAPPING["minicpm3"]()


def tiny(config: PretrainedConfig, dtype: torch.dtype = torch.float64, blocks: int = 6) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_causal_lm(tiny_config(config, blocks), dtype).eval()
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def adapt(part: ModelPart) -> None:
    """Adapters that change something on every layer that takes one."""
    inject(part, {name: AdapterSpec(2, 4.0) for name, _ in part.linears()}, "seed")
    for name, parameter in part.named_parameters():
        if name.endswith("lora_B"):
            parameter.data = torch.linspace(-0.1, 0.1, parameter.numel(), dtype=parameter.dtype).view_as(parameter)


def merged(model: PreTrainedModel, adapted: ModelPart) -> PreTrainedModel:
    """The model with the adapters of ``adapted`` in its weights."""
    model = copy.deepcopy(model)
    for name, (b, a) in extract(adapted).items():
        model.get_parameter(f"{name}.weight").data += b @ a
    return model


def loss_of(model: PreTrainedModel) -> Tensor:
    batch = next(random_batches())
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())


@pytest.mark.parametrize("kind", TAKEN)
def test_what_differs_from_a_llama_is_exact_at_every_cut_with_adapters(kind: str) -> None:
    family = find_family(TAKEN[kind])
    model, batch = tiny(TAKEN[kind]), next(random_batches())
    whole = whole_model(model, family)
    adapt(whole)
    with torch.no_grad():
        expected, plain = loss_of(merged(model, whole)), loss_of(model)
        assert abs(expected - plain) > 1e-4  # else adapters might be missing
        for split in range(1, 6):
            client, server = split_model(model, split)
            adapt(client)
            adapt(server)
            got = server(client(batch.input_ids, batch.attention_mask), batch.attention_mask, batch.labels).loss
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
            bottom, body, head = split_model(model, split, labels="client")
            adapt(bottom)
            adapt(body)
            got = head(body(bottom(batch.input_ids, batch.attention_mask), batch.attention_mask), batch.labels).loss
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mixture_of_experts_trains_in_two_as_in_one(dtype: torch.dtype) -> None:
    """With the implementation of experts that the dtype allows; gradients go back through the cut by hand."""
    model, batch = tiny(MIXTRAL, dtype), next(random_batches())
    whole = whole_model(model, find_family(MIXTRAL))
    client, server = split_model(model, 2)
    parts: tuple[ModelPart, ...] = (whole, client, server)
    for part in parts:
        adapt(part)
        part.train()
    expected = whole(batch.input_ids, batch.attention_mask, batch.labels)
    expected.loss.backward()
    cut = client(batch.input_ids, batch.attention_mask)
    received = cut.detach().requires_grad_()
    got = server(received, batch.attention_mask, batch.labels)
    got.loss.backward()
    cut.backward(received.grad)
    torch.testing.assert_close(got.loss, expected.loss)
    gradients = [
        {
            f"{name}.{which}": getattr(layer, which).grad
            for name, layer in part.linears()
            for which in ("lora_A", "lora_B")
        }
        for part in parts
    ]
    assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1] | gradients[2], gradients[0])


def test_a_router_gets_no_adapter_and_a_gate_that_is_a_plain_layer_does() -> None:
    client, _ = split_model(tiny(TAKEN["a router that is a linear layer"]), 1)
    names = {name.rpartition(".")[2] for name, _ in client.linears()}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("always", [True, False], ids=["always", "in training alone"])
def test_layers_that_code_looks_into_get_no_adapter(always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As fused kernels of state space models do, some of which are for training alone."""

    def forward(mlp: LlamaMLP, x: Tensor) -> Tensor:
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        if always or mlp.training:
            return nn.functional.linear(inner, mlp.down_proj.weight)
        out: Tensor = mlp.down_proj(inner)
        return out

    model, family = tiny(LlamaConfig()), find_family(LlamaConfig())
    assert find_unadapted(model, family) == ()
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert find_unadapted(model, family) == ("mlp.down_proj",)
    assert not model.training


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (T5Config(), "it has an encoder and a decoder; name a model that is a decoder alone"),
        (BertConfig(), "a token changes what the model says of earlier ones, as in an encoder"),
        (MambaConfig(), "its configuration has no num_attention_heads; .* no recurrent models such as Mamba or RWKV"),
        (CTRLConfig(), "its loss is .* its code does something around the blocks .* such as scaling the embeddings"),
        (NanoChatConfig(), "cut in two after block 1, its loss is"),  # its norm runs before the blocks as well
        (
            OlmoConfig(hidden_act="unknown"),
            "no tiny model of it runs in float64",
        ),
        (Qwen2VLConfig(), "it is multimodal"),
    ],
)
def test_a_refusal_says_why_in_one_line(config: PretrainedConfig, why: str) -> None:
    for _ in range(2):  # what is remembered is said again
        with pytest.raises(UnsupportedModelError, match=f"'{config.model_type}' cannot be split: .*{why}") as raised:
            find_family(config)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_what_is_proven_of_one_configuration_is_not_believed_of_another() -> None:
    first: Family = find_family(FalconConfig())
    assert find_family(FalconConfig(architectures=["FalconForCausalLM"], dtype="bfloat16")) is first
    assert find_family(FalconConfig(parallel_attn=False)) is not first


def test_a_decoder_that_sees_later_tokens_is_refused() -> None:
    from transformers import GemmaConfig

    assert find_family(GemmaConfig()).decoder == "model"
    with pytest.raises(UnsupportedModelError, match="a token changes what the model says of earlier ones"):
        find_family(GemmaConfig(use_bidirectional_attention=True))


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (DeepseekV3Config(), {"head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "first_k_dense_replace": 3}),
        (CodeGenConfig(), {"hidden_size": 32, "rotary_dim": 4}),
        (FalconConfig(), {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}),
        (FalconConfig(hidden_size=4096, num_attention_heads=64, num_kv_heads=8), {"num_kv_heads": 2}),
        (FalconConfig(hidden_size=4096, num_attention_heads=64, num_kv_heads=1), {"num_kv_heads": 1}),
        (
            TAKEN["a number for every rotary frequency"],
            {
                "rope_parameters": LONGROPE
                | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 4096}
            },
        ),
    ],
)
def test_sizes_that_depend_on_each_other_stay_so(config: PretrainedConfig, fields: dict[str, Any]) -> None:
    small = tiny_config(config)
    assert {name: getattr(small, name) for name in fields} == fields


def test_blocks_of_every_kind_are_in_a_tiny_model() -> None:
    """Qwen 2's later blocks alone have windows."""
    from transformers import Qwen2Config

    config = Qwen2Config(num_hidden_layers=30, use_sliding_window=True, max_window_layers=28)
    kinds = tiny_config(config).layer_types
    assert kinds == ["full_attention"] * 6 + ["sliding_attention"] * 2
