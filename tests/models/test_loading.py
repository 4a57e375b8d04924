"""Parts loaded from files hold the same numbers as the whole, and nothing else is read."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    ApertusConfig,
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    DeepseekV3Config,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.models import (
    Family,
    ModelFilesError,
    SplitError,
    UnsupportedModelError,
    configuration,
    find_family,
    load_causal_lm,
    load_client_model,
    load_client_parts,
    split_model,
)
from hsplitlora_flwr.models.checkpoint import Checkpoint
from hsplitlora_flwr.models.configuration import read_config, with_model_dtype
from hsplitlora_flwr.models.families import tiny_config
from hsplitlora_flwr.models.loading import check_model
from hsplitlora_flwr.models.stored import StoredModel, read_settled_config
from hsplitlora_flwr.planning.cost import CostModel, Workload
from tests.tiny import BLOCKS, CONFIGS, random_batches, randomise, tiny_model

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
EXPERTS = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16}
EXPERTS |= {"num_experts_per_tok": 2, "pad_token_id": 0}
OTHERS: dict[str, PretrainedConfig] = {
    "apertus": tiny_config(ApertusConfig(), BLOCKS),  # the numbers of its activation are buffers
    "bloom": tiny_config(BloomConfig(), BLOCKS),
}
if "exaone" in CONFIG_MAPPING:  # of newer releases of transformers; its files name everything otherwise
    OTHERS["exaone"] = tiny_config(CONFIG_MAPPING["exaone"](), BLOCKS)
WHOLE: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**EXPERTS, num_local_experts=4),  # its files hold every expert apart
    "qwen3_moe": Qwen3MoeConfig(**EXPERTS, num_experts=4),
    "deepseek_v3": DeepseekV3Config(  # its router has a bias that is no parameter
        **(EXPERTS | {"head_dim": None}),
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "codegen": CodeGenConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
}


def state(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, those that are in no file included, under all of its names."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in module.named_parameters(remove_duplicate=False)} | buffers


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same numbers in the same dtypes, to the last bit, wherever ``got`` has some."""
    assert got
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def assert_parts_are_those_of_transformers(folder: Path, dtype: str = "float32") -> None:
    """The whole and every part of it, at every split, hold what transformers loads from the same files."""
    expected = state(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)))
    whole = load_causal_lm(str(folder), dtype)
    assert state(whole).keys() == expected.keys()
    assert_same(state(whole), expected)
    family = find_family(whole.config)
    for split in range(1, whole.config.num_hidden_layers):
        _, server = split_model(whole, split)
        assert_same(absolute(state(server.causal_lm), family, split), expected)
        assert_same(absolute(state(load_client_model(str(folder), split, dtype).decoder), family), expected)
        client, head = load_client_parts(str(folder), split, dtype)
        assert_same(absolute(state(client.decoder), family), expected)
        assert_same(state(head.causal_lm), expected)


def absolute(tensors: dict[str, Tensor], family: Family, first: int = 0) -> dict[str, Tensor]:
    """Names as the whole has them, of the tensors of a decoder or causal LM whose first block is number ``first``."""
    found, inside = {}, f"{family.decoder}.{family.blocks}."
    outside = f"{family.decoder}.", "lm_head.", "embed_out."  # which GPT-NeoX's head is called in older releases
    for relative, tensor in tensors.items():
        name = relative if relative.startswith(outside) else f"{family.decoder}.{relative}"
        if name.startswith(inside):
            index, _, rest = name.removeprefix(inside).partition(".")
            name = f"{family.block_name(int(index) + first)}.{rest}"
        found[name] = tensor
    return found


def save(config: PretrainedConfig, folder: Path, **options: str) -> None:
    """A random model, saved as transformers does: under the names of the original checkpoints."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # saving writes into it
    randomise(model).save_pretrained(folder, **options)


def rewrite(folder: Path, change: dict[str, Tensor], without: Iterable[str] = ()) -> None:
    """Change tensors of a checkpoint of one file."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items() if name not in without}
    save_file(tensors | change, file, metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_parts_hold_what_transformers_loads(name: str, max_shard_size: str, tmp_path: Path) -> None:
    config = OTHERS[name] if name in OTHERS else tiny_config(CONFIGS[name], BLOCKS)
    save(config, tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    check_model(str(tmp_path))
    assert_parts_are_those_of_transformers(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WHOLE)
def test_merged_experts_and_biases_of_routers_are_those_of_transformers(name: str, dtype: str, tmp_path: Path) -> None:
    save(WHOLE[name], tmp_path)
    expected = state(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)))
    got = state(load_causal_lm(str(tmp_path), dtype))
    assert got.keys() == expected.keys()
    assert_same(got, expected)


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

    def watched(self: Checkpoint, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        names_read.extend(names)
        return tensors(self, names)

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


TIED = tiny_config(CONFIGS["llama-tied-grouped"], BLOCKS)
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def test_a_head_of_its_own_under_a_flag_that_ties_it(tmp_path: Path, read: list[str]) -> None:
    save(TIED, tmp_path)
    own = torch.randn(97, 32)
    rewrite(tmp_path, {HEAD: own})
    check_model(str(tmp_path))
    assert_parts_are_those_of_transformers(tmp_path)
    whole = load_causal_lm(str(tmp_path))
    assert torch.equal(whole.lm_head.weight, own)
    assert whole.config.tie_word_embeddings is False
    whole.save_pretrained(tmp_path / "again")
    assert_same(state(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), state(whole))
    read.clear()
    load_client_model(str(tmp_path), 1)
    assert HEAD not in read, "a client without a head does not need to know"


def test_plans_count_a_head_of_its_own(tmp_path: Path) -> None:
    save(TIED, tmp_path)

    def parameters(labels: str) -> tuple[int, int]:
        cost = CostModel(config, find_family(config), Workload(2, 8, labels=labels))
        return cost.client_parameters(2), cost.total_parameters

    for own in (False, True):
        if own:
            rewrite(tmp_path, {HEAD: torch.randn(97, 32)})
        config = read_settled_config(str(tmp_path))
        client, head = load_client_parts(str(tmp_path), 2)
        below, whole = sum(p.numel() for p in client.parameters()), load_causal_lm(str(tmp_path)).num_parameters()
        both = {id(p): p.numel() for part in (client, head) for p in part.parameters()}
        assert parameters("server") == (below, whole)
        assert parameters("client") == (sum(both.values()), whole)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert read_settled_config(str(tmp_path)).tie_word_embeddings, "a plan needs no weights"


def test_a_head_that_repeats_the_embeddings_is_one_with_them(tmp_path: Path) -> None:
    save(TIED, tmp_path)
    rewrite(tmp_path, {HEAD: load_file(tmp_path / "model.safetensors")[EMBEDDINGS]})
    assert_parts_are_those_of_transformers(tmp_path)
    whole = load_causal_lm(str(tmp_path))
    client, head = load_client_parts(str(tmp_path), 1)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert head.causal_lm.lm_head.weight is client.decoder.embed_tokens.weight
    assert whole.config.tie_word_embeddings


def test_embeddings_that_are_stored_as_the_head_alone(tmp_path: Path) -> None:
    save(TIED, tmp_path)
    rewrite(tmp_path, {HEAD: load_file(tmp_path / "model.safetensors")[EMBEDDINGS]}, without=[EMBEDDINGS])
    check_model(str(tmp_path))
    assert_parts_are_those_of_transformers(tmp_path)


def test_a_head_that_is_neither_stored_nor_tied(tmp_path: Path) -> None:
    save(tiny_config(CONFIGS["llama"], BLOCKS), tmp_path)
    rewrite(tmp_path, {}, without=[HEAD])
    with pytest.raises(ModelFilesError, match=r"no tensor 'lm_head.weight'; .*tie_word_embeddings=true"):
        check_model(str(tmp_path))
    load_client_model(str(tmp_path), 1)


def test_buffers_in_files_are_read(tmp_path: Path) -> None:
    save(OTHERS["apertus"], tmp_path)
    beta = "model.layers.1.mlp.act_fn.beta"
    rewrite(tmp_path, {beta: torch.tensor(1.5)})
    assert_parts_are_those_of_transformers(tmp_path)
    assert load_client_model(str(tmp_path), 2).decoder.layers[1].mlp.act_fn.beta == 1.5
    rewrite(tmp_path, {}, without=[beta])
    with pytest.raises(ModelFilesError, match=f"no tensor '{beta}'"):
        check_model(str(tmp_path))


def test_a_checkpoint_that_lacks_an_expert_or_has_one_of_another_shape(tmp_path: Path) -> None:
    save(WHOLE["mixtral"], tmp_path)
    expert = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    whole = load_file(tmp_path / "model.safetensors")[expert]
    for change, without, message in (
        ({}, [expert], r"'model.layers.1.mlp.experts.down_proj' has shape \(3, 32, 48\), .* says \(4, 32, 48\)"),
        (
            {expert: whole[:, :7].clone()},
            [],
            r"'model.layers.1.mlp.experts.down_proj' cannot be made of .*experts.0.w2",
        ),
    ):
        rewrite(tmp_path, change, without)
        with pytest.raises(ModelFilesError, match=message):
            StoredModel(str(tmp_path)).check()
        with pytest.raises(ModelFilesError, match=message):
            load_causal_lm(str(tmp_path))


def test_what_a_check_finds_before_anything_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(TIED, tmp_path)
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"  # old checkpoints hold it, and every model computes it
    rewrite(tmp_path, {table: torch.ones(4)})
    with caplog.at_level(logging.WARNING):
        check_model(str(tmp_path))
    assert not caplog.records
    rewrite(tmp_path, {f"model.layers.{index}.self_attn.q_proj.bias": torch.ones(32) for index in range(6)})
    with caplog.at_level(logging.WARNING):
        check_model(str(tmp_path))
    (record,) = caplog.records
    assert "no place for, and ignores, model.layers.0.self_attn.q_proj.bias, " in record.getMessage()
    assert record.getMessage().endswith(" and 2 more")
    norm = "model.layers.2.input_layernorm.weight"
    rewrite(tmp_path, {norm: torch.ones(31)})
    with pytest.raises(ModelFilesError, match=rf"'{norm}' has shape \(31,\), the configuration says \(32,\)"):
        check_model(str(tmp_path))
    rewrite(tmp_path, {}, without=[norm])
    with pytest.raises(ModelFilesError, match=f"no tensor '{norm}'"):
        check_model(str(tmp_path))
    load_client_model(str(tmp_path), 2)


def test_one_file_goes_before_shards_as_in_transformers(tmp_path: Path) -> None:
    save(TIED, tmp_path, max_shard_size="20KB")
    save(TIED, tmp_path / "other")
    rewrite(tmp_path / "other", {"model.norm.weight": torch.full((32,), 3.0)})
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert_parts_are_those_of_transformers(tmp_path)
    assert load_causal_lm(str(tmp_path)).model.norm.weight[0] == 3


def test_an_adapter_is_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFilesError, match=r"no config.json but a PEFT adapter; merge it"):
        check_model(str(tmp_path))
    save(TIED, tmp_path)
    with pytest.raises(ModelFilesError, match=r"a PEFT adapter \(adapter_config.json\), which would not be used"):
        check_model(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_hidden_layers", "4", "its config.json is not one of a 'llama': .*num_hidden_layers"),
        (
            "hidden_size",
            33,
            "its config.json is not one of a 'llama': .*not a multiple of the number of attention",
        ),
        ("hidden_act", "swish9", r"no 'llama' can be made as its config\.json says \(KeyError: 'swish9'\); correct"),
        ("rope_parameters", {"rope_type": "unknown"}, r"no 'llama' can be made .*KeyError: 'unknown'"),
    ],
)
def test_a_configuration_that_no_model_can_be_made_of(field: str, value: object, says: str, tmp_path: Path) -> None:
    save(tiny_config(CONFIGS["llama"], BLOCKS), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ModelFilesError, match=says):
        check_model(str(tmp_path))


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', "{", "\xff"])
def test_an_index_that_names_no_files(index: str, tmp_path: Path) -> None:
    save(tiny_config(CONFIGS["llama"], BLOCKS), tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("latin1"))
    with pytest.raises(ModelFilesError, match=r"model\.safetensors\.index\.json names no file"):
        check_model(str(tmp_path))


def test_pointers_in_the_place_of_weights(tmp_path: Path) -> None:
    save(tiny_config(CONFIGS["llama"], BLOCKS), tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelFilesError, match=r"model\.safetensors is a pointer of Git LFS .*git lfs pull"):
        check_model(str(tmp_path))


def test_pythia_s_name_for_its_head(tmp_path: Path) -> None:
    save(tiny_config(CONFIGS["gpt_neox"], BLOCKS), tmp_path)
    file = tmp_path / "model.safetensors"
    names = {HEAD: "embed_out.weight"}
    save_file({names.get(name, name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert "embed_out.weight" in load_file(file)
    assert_parts_are_those_of_transformers(tmp_path)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("bfloat16", "bfloat16"), ("float32", "float32"), ("float64", "float64"), ("float16", "float32")],
)
def test_the_dtype_of_the_base_is_that_of_its_configuration_where_that_is_asked_for(
    tmp_path: Path, stored: str, dtype: str
) -> None:
    config = tiny_model("llama").config
    config.dtype = getattr(torch, stored)
    config.save_pretrained(tmp_path)
    left_to_it = Config.from_run_config({"model.path": str(tmp_path), "model.dtype": "auto"})
    assert with_model_dtype(left_to_it).model.dtype == dtype
    stated = Config.from_run_config({"model.path": str(tmp_path), "model.dtype": "float64"})
    assert with_model_dtype(stated) == stated


def test_a_hub_that_cannot_be_reached_is_asked_once_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def away(url: str, timeout: float) -> None:
        asked.append((url, timeout))
        raise ConnectionError("no route to host")

    monkeypatch.setattr(configuration, "get_hf_file_metadata", away)
    for _ in range(2):
        with pytest.raises(ModelFilesError, match=r"model\.path=nobody/nothing: no folder of that name, .* no route"):
            read_config("nobody/nothing")
    [(url, timeout)] = asked
    assert "nobody/nothing" in url and timeout <= 5
