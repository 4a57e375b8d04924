"""Fixtures that several test folders share."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LONGEST = (
    "tests/system",
    "tests/cli/test_run",
    "tests/test_transports",
    "tests/server",
    "tests/test_hostile",
    "tests/cli",
)

# The same examples in every run, and the first that fails as it is: to find a smaller one can take minutes.
settings.register_profile("fixed", derandomize=True, phases=set(Phase) - {Phase.shrink, Phase.explain})
settings.register_profile("random")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: they take the longest and mostly wait, so others fit in beside them, and none ends alone."""
    places = {part: index for index, part in enumerate(LONGEST)}

    def place(item: pytest.Item) -> int:
        return min((index for part, index in places.items() if part in item.path.as_posix()), default=len(places))

    items.sort(key=place)


@pytest.fixture(scope="session")
def e2e_folder() -> Path:
    """The folder of the E2E NLG challenge: ``HSPLITLORA_E2E``, else ``shared/data/e2e`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "e2e"
    folder = Path(os.environ.get("HSPLITLORA_E2E", beside))
    if not (folder / "devset.csv").is_file():
        pytest.skip(f"no E2E data in {folder}; put trainset.csv and devset.csv there, or set HSPLITLORA_E2E")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and threads that wait for each other on a busy machine cost seconds."""
    torch.set_num_threads(1)
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    """A server that computes in the calling thread leaves it with more, on which depends what kernels take."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def imported_code_is_no_garbage() -> Iterator[None]:
    """Measuring memory collects garbage, which takes most of a second in a process that has imported everything."""
    before = len(sys.modules)
    yield
    if len(sys.modules) > before + 10:
        gc.collect()
        gc.freeze()


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
