"""Parts loaded from files hold the same numbers as the whole, and nothing else is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hsplitlora_flwr.models import (
    ModelFilesError,
    SplitError,
    UnsupportedModelError,
    load_causal_lm,
    load_client_model,
    load_client_parts,
    split_model,
)
from hsplitlora_flwr.models.loading import Checkpoint, check_model
from tests.tiny import BLOCKS, CONFIGS, random_batches, tiny_model


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    tiny_model(request.param, dtype=torch.float32).save_pretrained(tmp_path)
    return request.param, tmp_path


def test_the_whole_equals_what_was_saved(saved: tuple[str, Path]) -> None:
    name, folder = saved
    batch = next(random_batches())
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    expected = tiny_model(name, dtype=torch.float32)(**inputs).logits
    assert torch.equal(load_causal_lm(str(folder))(**inputs).logits, expected)


def test_a_client_part_equals_the_part_of_the_whole(saved: tuple[str, Path]) -> None:
    name, folder = saved
    batch = next(random_batches())
    for split in range(1, BLOCKS):
        expected, _ = split_model(tiny_model(name, dtype=torch.float32), split)
        client = load_client_model(str(folder), split)
        assert client.resident_parameters() == expected.resident_parameters()
        got = client(batch.input_ids, batch.attention_mask)
        assert torch.equal(got, expected(batch.input_ids, batch.attention_mask))


def test_a_client_with_a_head_equals_the_parts_of_the_whole(saved: tuple[str, Path]) -> None:
    name, folder = saved
    batch = next(random_batches())
    whole = tiny_model(name, dtype=torch.float32)
    for split in (1, BLOCKS - 1):
        expected, body, expected_head = split_model(whole, split, labels="client")
        client, head = load_client_parts(str(folder), split)
        assert client.resident_parameters() == expected.resident_parameters()
        assert head.resident_parameters() == expected_head.resident_parameters()
        hidden = body(client(batch.input_ids, batch.attention_mask), batch.attention_mask)
        assert torch.equal(hidden, body(expected(batch.input_ids, batch.attention_mask), batch.attention_mask))
        assert torch.equal(head(hidden, batch.labels).loss, expected_head(hidden, batch.labels).loss)
        assert not any(p.is_meta or p.requires_grad for part in (client, head) for p in part.parameters())
    assert load_client_parts(str(folder), 1, head=False)[1] is None


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read from files."""
    names_read: list[str] = []
    tensors = Checkpoint.tensors

    def watched(self: Checkpoint, names: list[str], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        names_read.extend(names)
        return tensors(self, names, prefix)

    monkeypatch.setattr(Checkpoint, "tensors", watched)
    return names_read


def test_a_client_reads_its_own_tensors_and_no_others(tmp_path: Path, read: list[str]) -> None:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    load_client_model(str(tmp_path), 2)
    stored = load_file(tmp_path / "model.safetensors")
    below = {name for name in stored if name.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1."))}
    assert sorted(read) == sorted(below)
    read.clear()
    load_client_parts(str(tmp_path), 2)
    assert sorted(read) == sorted(below | {"model.norm.weight", "lm_head.weight"})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list what a process maps")
def test_weights_of_the_files_dtype_are_its_pages_and_not_a_copy(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)

    def mapped(dtype: str) -> list[bool]:
        """For every weight whether it lies in the file's pages, which processes of one machine share."""
        client = load_client_model(str(tmp_path), 2, dtype)
        ranges = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(tmp_path / "model.safetensors"))
        ]
        return [any(low <= weight.data_ptr() < high for low, high in ranges) for weight in client.parameters()]

    assert all(mapped("float32"))
    assert not any(mapped("bfloat16"))


def test_a_tied_head_is_read_and_held_once(tmp_path: Path, read: list[str]) -> None:
    tiny_model("gpt2", dtype=torch.float32).save_pretrained(tmp_path)
    client, head = load_client_parts(str(tmp_path), 1)
    assert len(read) == len(set(read))
    assert "lm_head.weight" not in read
    assert head.causal_lm.get_output_embeddings().weight is client.decoder.get_input_embeddings().weight
    held = {p.data_ptr(): p.numel() for part in (client, head) for p in part.parameters()}
    assert sum(held.values()) == client.resident_parameters() + 2 * 32, "with the final norm: weight and bias"


def test_shards_and_bare_names_as_on_the_hub(tmp_path: Path) -> None:
    """GPT-2's checkpoint on the hub names its tensors without the prefix of the base model."""
    model = tiny_model("gpt2", dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(shard).items()}
        save_file(bare, shard, metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name.removeprefix("transformer."): s for name, s in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    batch = next(random_batches())
    assert torch.equal(load_causal_lm(str(tmp_path))(batch.input_ids).logits, model(batch.input_ids).logits)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float64", 8)])
def test_dtype_of_the_base(tmp_path: Path, dtype: str, size: int) -> None:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    client = load_client_model(str(tmp_path), 1, dtype)
    assert {p.element_size() for p in client.parameters()} == {size}
    batch = next(random_batches())
    assert client(batch.input_ids, batch.attention_mask).element_size() == size


def test_a_folder_without_weights(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ModelFilesError, match=r"there are no weights.*save_pretrained"):
        check_model(str(tmp_path))


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"holds no config.json"):
        check_model(str(tmp_path))


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="no folder of that name"):
        check_model(str(tmp_path / "nothing"))


def test_a_missing_tensor_and_a_damaged_file(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file({n: t.clone() for n, t in whole.items() if "layers.1.mlp.up" not in n}, file, metadata={"format": "pt"})
    load_client_model(str(tmp_path), 1)
    with pytest.raises(ModelFilesError, match=r"no tensor 'model.layers.1.mlp.up_proj.weight'"):
        load_client_model(str(tmp_path), 2)
    file.write_bytes(b"\x00" * 100)
    with pytest.raises(ModelFilesError, match=r"model.safetensors is damaged"):
        load_client_model(str(tmp_path), 1)


def test_a_split_that_the_model_does_not_allow(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(SplitError, match="split=4 is not possible"):
        check_model(str(tmp_path), 1, 4)
    with pytest.raises(SplitError, match="split=7 is not possible"):
        check_model(str(tmp_path), 7)
    assert check_model(str(tmp_path), 1, 3).name == "Llama-like"


def test_a_family_that_cannot_be_cut(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=97, state_size=4)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UnsupportedModelError, match="mamba"):
        check_model(str(tmp_path))
