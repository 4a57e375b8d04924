"""Text that a model cannot take is refused before it is used, and what is cut is counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoTokenizer,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
)

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.data.collate import tokenize
from hsplitlora_flwr.data.fit import Cut, beyond_training, fit_text
from hsplitlora_flwr.data.sources import DataError, Example
from hsplitlora_flwr.models.loading import load_tokenizer


def config_of(folder: Path, **changes: Any) -> Config:
    return Config.from_run_config({"model.path": str(folder)} | {f"data.{key}": v for key, v in changes.items()})


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_text_that_fits_has_the_tokens_of_its_model(tiny_folder: Path) -> None:
    examples = [Example("q: ", "a"), Example("", "text")]
    assert fit_text(examples, config_of(tiny_folder)) == tokenize(examples, load_tokenizer(str(tiny_folder)), 128)


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        (GPT2Config(n_positions=32), 32),
        (OPTConfig(max_position_embeddings=48), 48),
        (MptConfig(max_seq_len=40), 40),  # a bias of so many
        (LlamaConfig(max_position_embeddings=32), None),  # rotary: computed as they come
    ],
    ids=["gpt2", "opt", "mpt", "llama"],
)
def test_rows_may_be_as_long_as_there_are_positions(folder: Path, model: PretrainedConfig, limit: int | None) -> None:
    model.vocab_size = 300
    model.save_pretrained(folder)
    longest = limit or 100
    [row] = fit_text([Example("", "x" * 200)], config_of(folder, max_length=longest))
    assert len(row) == longest
    if limit:
        with pytest.raises(
            ConfigError, match=rf"data.max_length={limit + 1} is above the {limit} positions of .*model"
        ):
            fit_text([Example("", "x")], config_of(folder, max_length=limit + 1))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("model", "trained"),
    [
        (LlamaConfig(max_position_embeddings=32), 32),
        (LlamaConfig(max_position_embeddings=32, rope_parameters=YARN), 128),
        (Gemma3TextConfig(max_position_embeddings=64), 64),  # rotary positions by kind of layer
        (BloomConfig(), None),  # no positions, but distances
    ],
    ids=["llama", "stretched", "gemma3", "bloom"],
)
def test_rows_beyond_what_rotary_positions_were_trained_on_are_told(
    folder: Path, model: PretrainedConfig, trained: int | None
) -> None:
    model.vocab_size = 300
    model.save_pretrained(folder)
    assert beyond_training(config_of(folder, max_length=trained or 9999)) == ""
    if trained:
        said = beyond_training(config_of(folder, max_length=trained + 1))
        assert f"data.max_length={trained + 1} is above the {trained} positions that {folder} was trained on" in said


def test_positions_that_end_are_refused_and_not_warned_of(folder: Path) -> None:
    GPT2Config(n_positions=32, vocab_size=300).save_pretrained(folder)
    assert beyond_training(config_of(folder, max_length=33)) == ""


def test_a_token_without_an_embedding(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    embeddings = len(tokenizer)
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    fit_text([Example("", "what no row holds does no harm")], config_of(folder))
    with pytest.raises(
        DataError, match=rf"token {embeddings} \('<\|user\|>'\) of example 1 is beyond the {embeddings} "
    ):
        fit_text([Example("", "a"), Example("<|user|>", "secret")], config_of(folder))


def test_a_tokenizer_without_an_end(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}))
    with pytest.raises(
        DataError, match=r"tokenizer of .*model has no end-of-sequence token.*name one as \"eos_token\""
    ):
        fit_text([Example("", "a")], config_of(folder))


def test_what_is_cut_is_counted(tiny_folder: Path) -> None:
    examples = [Example("", "x" * length) for length in (5, 15, 16, 99)]  # and an EOS each; a byte is a token
    cut = Cut.of(fit_text(examples, config_of(tiny_folder, max_length=16)))
    assert cut == Cut(rows=4, tokens=5 + 15 + 16 + 99 + 4, cut_rows=2, cut_tokens=1 + 84)
    both = Cut.total([cut, Cut(1, 11, 0, 0)])
    assert both == Cut(5, 150, 2, 85)
    assert str(both) == "2 of 5 rows, 56.7% of the tokens"
    assert Cut.of([]).share == 0 == Cut.total([]).rows
