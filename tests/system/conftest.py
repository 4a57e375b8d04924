"""A tiny model on disk, with a tokenizer, and whole runs of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROJECT = Path(__file__).resolve().parents[2]

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 blocks over bytes."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{symbol: index for index, symbol in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def start_run(tiny_folder: Path, tmp_path: Path) -> Run:
    """Starts ``python -m simulations.run`` on the tiny model, as a user does."""

    def start(**settings: Any) -> subprocess.Popen[str]:
        wanted = {
            "model.path": tiny_folder,
            "clients.memory_gb": "2.0,2.5,3.0",
            "data.eval_rows": 40,
            "train.steps": 3,
            "train.batch_size": 4,
            "train.lr": 0.01,
            "run.dir": tmp_path / "run",
        } | {key.replace("__", "."): value for key, value in settings.items()}
        command = [sys.executable, "-m", "simulations.run", *(f"{key}={value}" for key, value in wanted.items())]
        command = [part.replace("2.0,2.5,3.0", "'2.0,2.5,3.0'") for part in command]
        return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start
