"""What a run leaves behind is read by stock PEFT and stock transformers."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Mistral3Config,
    PreTrainedModel,
    Qwen3_5Config,
)

from hsplitlora_flwr.lora import AccumulatedUpdate, export, save_peft_adapter
from hsplitlora_flwr.lora.export import load_update, save_merged_model, save_update, write_manifest
from hsplitlora_flwr.lora.layers import shape_of
from hsplitlora_flwr.lora.update import UpdateError
from hsplitlora_flwr.models import load_causal_lm, split_model
from hsplitlora_flwr.models.loading import load_tokenizer
from hsplitlora_flwr.models.stored import StoredModel
from tests.models.test_multimodal import CONFIGS, IDS, MASK, SMALL, VISION
from tests.tiny import random_batches, tiny_model

MULTIMODAL = CONFIGS | {
    "mistral3": Mistral3Config(
        text_config=SMALL | {"model_type": "mistral", "head_dim": 8},
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
    ),
    "qwen3_5": Qwen3_5Config(
        text_config=SMALL
        | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention", "full_attention"]}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    ),
}


def random_delta(name: str, ranks: tuple[int, ...]) -> AccumulatedUpdate:
    return random_delta_of(tiny_model(name, dtype=torch.float32), ranks)


def random_delta_of(model: PreTrainedModel, ranks: tuple[int, ...]) -> AccumulatedUpdate:
    client, server = split_model(model, 2)
    accumulated, generator, cycle = AccumulatedUpdate(), torch.Generator().manual_seed(0), itertools.cycle(ranks)
    update = {}
    for layer, module in [*client.linears(), *server.linears()]:
        rows, columns = shape_of(module)
        if rank := next(cycle):
            b = 0.1 * torch.randn(rows, rank, generator=generator)
            update[layer] = b, 0.1 * torch.randn(rank, columns, generator=generator)
    accumulated.add(update)
    return accumulated


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_stock_peft_computes_with_the_update(name: str, tmp_path: Path) -> None:
    accumulated = random_delta(name, (2, 0, 5, 40, 1))  # rank 40 is more than these matrices have: stored dense
    assert {change.matrix is None for change in accumulated.changes().values()} == {True, False}
    base = tiny_model(name, dtype=torch.float32)
    save_peft_adapter(accumulated.changes(), tmp_path, base, "base")

    expected = tiny_model(name, dtype=torch.float32)
    for layer, change in accumulated.changes().items():
        weight = expected.get_submodule(layer).weight
        assert isinstance(weight, torch.Tensor)
        weight.data += change.dense().T if name == "gpt2" else change.dense()
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    batch = next(random_batches())
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    got, wanted = loaded(**inputs).logits, expected(**inputs).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - tiny_model(name, dtype=torch.float32)(**inputs).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", MULTIMODAL)
def test_stock_peft_computes_with_the_update_of_a_text_decoder_over_what_transformers_loads(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    base, config = str(tmp_path / "base"), MULTIMODAL[name]
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    expected = load_causal_lm(base)
    accumulated, inside = random_delta_of(expected, (2, 0, 5, 40, 1)), StoredModel(base).inside
    assert bool(inside) == (name != "qwen3_5")  # of which transformers loads the text decoder alone
    with torch.no_grad():
        before = expected(input_ids=IDS, attention_mask=MASK).logits
        for layer, change in accumulated.changes().items():
            expected.get_parameter(f"{layer}.weight").add_(change.dense())
        after = expected(input_ids=IDS, attention_mask=MASK).logits
        assert (after - before).abs().max() > 1e-2
        kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
        for number, changes in enumerate([accumulated.changes(), {}]):
            save_peft_adapter(changes, tmp_path / str(number), expected, base, inside)
            loaded = PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / str(number)).eval()
            logits = loaded(input_ids=IDS, attention_mask=MASK).logits
            torch.testing.assert_close(logits, after if changes else before, rtol=1e-4, atol=1e-5)
        save_merged_model(expected, load_tokenizer(str(tiny_folder)), tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(input_ids=IDS, attention_mask=MASK).logits, after)


def test_an_update_of_zero_is_a_valid_adapter(tmp_path: Path) -> None:
    base, batch = tiny_model("llama", dtype=torch.float32), next(random_batches())
    expected = base(input_ids=batch.input_ids).logits
    save_peft_adapter({}, tmp_path, base)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(input_ids=batch.input_ids).logits, expected)


def test_checkpoint_holds_update_and_version(tmp_path: Path) -> None:
    accumulated = random_delta("llama", (2, 3, 40))
    save_update(accumulated, tmp_path)
    with safe_open(tmp_path / "delta.safetensors", framework="pt") as file:
        assert file.metadata()["version"] == "1"
        name = next(iter(accumulated.changes()))
        got = file.get_tensor(f"{name}:B") @ file.get_tensor(f"{name}:A")
        torch.testing.assert_close(got, accumulated.changes()[name].dense())
    loaded = load_update(tmp_path, rank_cap=7)
    assert (loaded.version, loaded.held(), loaded.rank_cap) == (1, accumulated.held(), 7)
    for name, change in accumulated.changes().items():
        assert torch.equal(loaded.changes()[name].dense(), change.dense())


def test_checkpoint_of_the_base_and_of_a_change_of_zero(tmp_path: Path) -> None:
    accumulated = AccumulatedUpdate()
    save_update(accumulated, tmp_path)
    assert (load_update(tmp_path).version, load_update(tmp_path).changes()) == (0, {})
    accumulated.add({"w": (torch.ones(3, 1), torch.ones(1, 4))})
    accumulated.replace({})
    save_update(accumulated, tmp_path)
    assert torch.equal(load_update(tmp_path).changes()["w"].dense(), torch.zeros(3, 4))


def test_a_checkpoint_replaces_the_last_one_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulated = random_delta("llama", (2, 3))
    save_update(accumulated, tmp_path)

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_update(accumulated, tmp_path)
    assert load_update(tmp_path).held() == accumulated.held()


@pytest.mark.parametrize("damage", ["bit", "version", "end", "header", "empty"])
def test_a_damaged_checkpoint_is_recognised(damage: str, tmp_path: Path) -> None:
    save_update(random_delta("llama", (2, 3)), tmp_path)
    file = tmp_path / "delta.safetensors"
    content = file.read_bytes()
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    damaged = {
        "bit": flipped,
        "version": content.replace(b'"version":"1"', b'"version":"2"'),
        "end": content[:-100],
        "header": b"\xff" * 16 + content[16:],
        "empty": b"",
    }[damage]
    assert damaged != content
    file.write_bytes(damaged)
    with pytest.raises(UpdateError, match=r"delta.safetensors is damaged .*; restore the file"):
        load_update(tmp_path)


def test_a_missing_checkpoint_is_not_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"delta\.safetensors"):
        load_update(tmp_path)


def test_an_adapter_finds_its_base_by_itself_from_any_folder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    changes = random_delta_of(base, (2, 0, 5)).changes()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base").symlink_to(tiny_folder)
    monkeypatch.setenv("HSPLITLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "smollm2-135m").symlink_to(tiny_folder)  # where the demonstration model would lie
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("base", str(tiny_folder), "smollm2-135m")):
        save_peft_adapter(changes, tmp_path / str(number), base, name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = PeftModel.from_pretrained(base, str(tmp_path / "1")).eval()(input_ids=ids).logits
    for number in range(3):
        loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / str(number))).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_adapters_are_merged_with_others_by_peft(way: str, tmp_path: Path) -> None:
    ours, base = random_delta("llama", (2, 0, 5, 3, 1)), tiny_model("llama", dtype=torch.float32)
    save_peft_adapter(ours.changes(), tmp_path / "ours", base)
    theirs = get_peft_model(tiny_model("llama", dtype=torch.float32), LoraConfig(r=3, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(str(tmp_path / "theirs"))

    model = PeftModel.from_pretrained(base, str(tmp_path / "ours"), adapter_name="ours")
    model.load_adapter(str(tmp_path / "theirs"), adapter_name="theirs")
    model.add_weighted_adapter(["ours", "theirs"], [1.0, 0.5], "both", combination_type=way, svd_rank=8)
    model.set_adapter("both")

    expected = tiny_model("llama", dtype=torch.float32)
    for name, change in ours.changes().items():
        expected.get_parameter(f"{name}.weight").data += change.dense()
    for name, module in theirs.base_model.model.named_modules():
        if name.endswith("q_proj"):
            pair = module.lora_B["default"].weight @ module.lora_A["default"].weight
            expected.get_parameter(f"{name}.weight").data += 0.5 * module.scaling["default"] * pair.detach()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_manifest_says_what_each_layer_is(tmp_path: Path) -> None:
    accumulated, base = random_delta("llama", (2, 0, 5)), tiny_model("llama", dtype=torch.float32)
    save_peft_adapter(accumulated.changes(), tmp_path, base)
    write_manifest(tmp_path, [{"round": 1, "update_norm": 0.5, "perplexity": 9.0, "clients": []}, {"round": 2}])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["rounds"][0] == {"round": 1, "update_norm": 0.5, "perplexity": 9.0}
    assert manifest["layers"].keys() == accumulated.changes().keys()
    for name, change in accumulated.changes().items():
        layer = manifest["layers"][name]
        assert (layer["rank"], layer["shape"]) == (change.tensors[1].shape[0], list(change.shape))
        assert layer["norm"] == pytest.approx(float(torch.linalg.matrix_norm(change.dense().double())), rel=1e-5)
        b, a = change.tensors
        assert layer["sha256"] == hashlib.sha256(b.numpy().tobytes() + a.numpy().tobytes()).hexdigest()
    file = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert manifest["files"]["adapter_model.safetensors"] == hashlib.sha256(file).hexdigest()
