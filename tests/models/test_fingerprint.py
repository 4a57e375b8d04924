"""Another base is recognised before anything trains, and the same base in another form is not another."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hsplitlora_flwr.models import checkpoint
from hsplitlora_flwr.models.fingerprint import BaseMismatchError, check_part, fingerprint, part_digests
from hsplitlora_flwr.models.loading import PartTensors, load_client_parts

BLOCK = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    return tmp_path / "cache" / "fingerprints"


@pytest.fixture
def other(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "other"))


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[BLOCK][3, 5] += 1e-6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def another_seed(folder: Path) -> None:
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(folder).config).save_pretrained(folder)


def merges(folder: Path) -> None:
    edit(
        folder / "tokenizer.json",
        lambda content: content["model"].update(
            merges=[["a", "t"]], vocab={**content["model"]["vocab"], "at": len(content["model"]["vocab"])}
        ),
    )


def order(folder: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit(folder / "tokenizer.json", swap)


def pieces(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda content: content["pre_tokenizer"].update(add_prefix_space=True))


def differs(here: Path, there: Path, split: int = 2) -> str:
    """What a node says whose base lies at ``here``; nothing where it takes part."""
    try:
        fingerprint.cache_clear()
        fingerprint(str(here)).check(fingerprint(str(there)), str(here))
        digests = part_digests(str(there), split, "float32", head=False)
        check_part(digests, str(here), split, "float32", head=False)
    except BaseMismatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (one_weight, f"the digest of '{BLOCK}' is "),
        (another_seed, "the digest of 'model.embed_tokens.weight' is .*more differ"),
        (merges, "the vocabulary's size is 258 here and 257 on the server"),
        (order, "the vocabulary's digest is "),
        (pieces, "the digest of a tokenized text is "),
        (
            lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=5)),
            "num_hidden_layers=5 here and 4 on",
        ),
        (lambda f: edit(f / "config.json", lambda c: c.update(rms_norm_eps=0.1)), "rms_norm_eps=0.1 here and 1e-06 on"),
    ],
)
def test_another_base(change: Callable[[Path], None], says: str, tiny_folder: Path, other: Path) -> None:
    assert not differs(other, tiny_folder)
    change(other)
    said = differs(other, tiny_folder)
    assert re.search(says, said), said
    assert "model-path in its --node-config" in said and str(other) in said


def test_what_a_client_does_not_hold_is_not_compared(tiny_folder: Path, other: Path) -> None:
    one_weight(other)
    assert not differs(other, tiny_folder, split=1)
    assert differs(other, tiny_folder, split=4), "the whole model"


def test_the_same_weights_in_another_form_are_the_same_base(tiny_folder: Path, tmp_path: Path, other: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    half.save_pretrained(other, max_shard_size="20KB")  # in shards
    (other / "model.safetensors").unlink()
    assert (other / "model.safetensors.index.json").exists()
    edit(other / "config.json", lambda content: content.update(transformers_version="4.0", use_cache=False, news=1))
    fingerprint(str(other)).check(fingerprint(str(tiny_folder)), str(other))
    for dtype, same in (("bfloat16", True), ("float32", False)):
        mine, theirs = (part_digests(str(folder), 2, dtype, head=False) for folder in (other, tiny_folder))
        assert (mine == theirs) is same


@pytest.mark.parametrize("head", [False, True])
def test_the_tensors_are_those_of_the_part(head: bool, tiny_folder: Path) -> None:
    client, top = load_client_parts(str(tiny_folder), 2, head=head)
    held = {id(p): p for part in (client, top) if part for p in part.parameters()}
    tensors = PartTensors(str(tiny_folder), 2, "float32", head=head)
    assert sum(tensor.numel() for _, tensor in tensors.read(tensors.names)) == sum(p.numel() for p in held.values())
    assert any("layers.1." in name for name in tensors.names) and not any("layers.2." in name for name in tensors.names)


def test_digests_are_computed_once_and_anew_when_a_file_changes(
    tiny_folder: Path, other: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = part_digests(str(other), 2, "float32", head=False)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "safe_open", lambda *_, **__: pytest.fail("a file was read"))
        assert part_digests(str(other), 2, "float32", head=False) == first
    one_weight(other)
    assert part_digests(str(other), 2, "float32", head=False).keys() == first.keys()
    assert part_digests(str(other), 2, "float32", head=False) != first
    for file in cache.iterdir():
        file.write_text("{")
    shutil.copystat(tiny_folder / "model.safetensors", other / "model.safetensors")
    assert part_digests(str(tiny_folder), 2, "float32", head=False) == first
    assert {file.suffix for file in cache.iterdir()} == {".json"}


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(tiny_folder: Path, cache: Path) -> None:
    cache.parent.write_text("no folder")
    assert part_digests(str(tiny_folder), 2, "float32", head=False)
