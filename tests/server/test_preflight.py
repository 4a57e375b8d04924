"""Wrong settings are found from files and configuration alone."""

from __future__ import annotations

import errno
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import platformdirs
import pytest
import torch

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.data.sources import DataError, Example, TextData
from hsplitlora_flwr.models import ModelFilesError, SplitError, quantisation
from hsplitlora_flwr.models.placement import check_device
from hsplitlora_flwr.paths import check_run_folder
from hsplitlora_flwr.planning import PlanError
from hsplitlora_flwr.planning.round import cost_model
from hsplitlora_flwr.server.preflight import check_model_settings, check_parts, check_text
from tests.tiny import tiny_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    folder = tmp_path / "model"
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder)
    return Config.from_run_config({"model.path": str(folder)})


def change(config: Config, **settings: object) -> Config:
    flat = config.to_run_config() | {key.replace("__", "."): value for key, value in settings.items()}
    return Config.from_run_config(flat)


def test_good_settings_pass(config: Config) -> None:
    check_model_settings(config)


def test_each_mistake_has_an_error_of_its_own(config: Config, tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="split=4 is not possible"):
        check_model_settings(change(config, split__max=4))
    with pytest.raises(PlanError, match=r"lora.targets names \['query'\]"):
        check_model_settings(change(config, lora__targets="query"))
    with pytest.raises(ModelFilesError, match="no folder of that name"):
        check_model_settings(change(config, model__path=str(tmp_path / "nothing")))


def test_a_run_folder_must_take_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)
    with pytest.raises(ConfigError) as raised:
        check_run_folder(tmp_path / "a" / "b")
    assert str(raised.value) == (
        f"run.dir={tmp_path / 'a' / 'b'} cannot be written: {tmp_path} takes no file (Read-only file system); "
        "name another folder"
    )


def test_a_run_folder_need_not_be_there_but_is_a_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "a" / "b"):
        check_run_folder(folder)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file takes no file \(Not a directory\); name another folder"):
        check_run_folder(tmp_path / "file" / "run")


def test_text_must_fit_the_model(tiny_folder: Path, tmp_path: Path) -> None:
    config = Config.from_run_config({"model.path": str(tiny_folder)})
    check_text(config, TextData((Example("a", "b"),), (Example("a", "c"),)))
    with pytest.raises(DataError, match=r"example 1 .* no token that can be predicted"):
        check_text(config, TextData((Example("a", "b"), Example("", "")), ()))
    tiny_model("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "gpt2")  # of 64 positions
    with pytest.raises(ConfigError, match=r"data\.max_length=65 is above the 64 positions"):
        check_model_settings(change(config, model__path=str(tmp_path / "gpt2"), data__max_length=65))


def test_a_deadline_needs_speeds_where_memory_is_stated(config: Config) -> None:
    stated = change(config, plan__deadline=9.0, clients__memory_gb="1")
    with pytest.raises(ConfigError, match=r"plan\.deadline=9 needs speeds.*state clients\.gflops"):
        check_model_settings(stated)
    for speeds in ({"clients__gflops": "10"}, {"plan__server_gflops": 10.0}, {"clients__memory_gb": ""}):
        check_model_settings(change(stated, **speeds))


def test_a_generated_text_needs_room(config: Config) -> None:
    check_model_settings(change(config, evaluation__max_new_tokens=64))
    check_model_settings(change(config, evaluation__max_new_tokens=63, evaluation__generate=True))
    with pytest.raises(ConfigError, match=r"evaluation\.max_new_tokens=64 leaves no room .* 64 positions"):
        check_model_settings(change(config, evaluation__max_new_tokens=64, evaluation__generate=True))


def test_every_client_keeps_something_to_train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path)
    text = TextData(tuple(Example("", str(row), "g") for row in range(7)), ())
    config = Config.from_run_config({"data.partition": "iid", "evaluation.client_rows": 1})
    check_parts(config, text)
    with pytest.raises(ConfigError, match=r"evaluation\.client_rows=2 keeps all of a client's 2 rows out"):
        check_parts(change(config, evaluation__client_rows=2), text)
    with pytest.raises(DataError, match="1 groups cannot serve 3 clients"):
        check_parts(change(config, data__partition="natural"), text)
    check_parts(change(config, data__partition="natural", method__name="cenlora"), text)


@pytest.mark.parametrize(
    ("gpus", "good", "bad"),
    [
        (0, ["auto", "balanced", "cpu"], {"cuda": "there is no GPU here", "cuda:1": "no GPU here"}),
        (2, ["cuda", "cuda:1"], {"cuda:2": "the GPUs here are cuda:0 to cuda:1"}),
    ],
)
def test_a_device_must_be_here(
    gpus: int, good: list[str], bad: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in good:
        check_device(name)
    for name, says in bad.items():
        with pytest.raises(ConfigError, match=rf"model\.device={name}, and .*{says}"):
            check_device(name)


@pytest.mark.parametrize("method", ["fedit", "cenlora"])
def test_adapters_that_are_carried_on_start_nowhere(method: str, config: Config) -> None:
    check_model_settings(change(config, lora__init="update"))
    check_model_settings(change(config, method__name=method, plan__over_budget=True))
    with pytest.raises(ConfigError, match=rf"lora.init=update is for .* method.name={method} are carried on"):
        check_model_settings(change(config, method__name=method, plan__over_budget=True, lora__init="update"))


def test_without_a_half_of_the_server_somebody_must_train(config: Config) -> None:
    check_model_settings(change(config, lora__clients="none"))
    with pytest.raises(ConfigError, match=r"lora.clients=none leaves .* method.name=fedit has none; set it to plan"):
        check_model_settings(change(config, method__name="fedit", plan__over_budget=True, lora__clients="none"))


def test_what_quantises_is_missing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    quantisation._functional.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModuleNotFoundError, match=r"model\.quantise.*pip install 'hsplitlora_flwr\[quantised\]'"):
        check_model_settings(change(config, model__quantise="8bit", model__path="is not looked at"))


def test_a_budget_below_the_weights_names_the_missing_bytes(config: Config) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    weights = 4 * sum(
        p.numel() for part in (model.model.embed_tokens, model.model.layers[0]) for p in part.parameters()
    )
    with pytest.raises(
        PlanError, match=r"clients.memory_gb=1e-06,2e-06: even the largest budget misses ([\d,]+) bytes"
    ) as e:
        check_model_settings(change(config, clients__memory_gb="1e-06,2e-06"))
    missing = int(str(e.value).split("misses ")[1].split(" ")[0].replace(",", ""))
    assert weights - 2000 <= missing <= weights + 40_000  # and what one step of two tokens takes
    check_model_settings(change(config, clients__memory_gb="1e-06,1"))


def test_a_method_without_a_split_asks_for_the_whole_model(config: Config) -> None:
    tight = change(config, clients__memory_gb="0.00015")
    check_model_settings(tight)
    with pytest.raises(PlanError, match=r"misses [\d,]+ bytes for all of .*plan\.over_budget: method\.name=fedit"):
        check_model_settings(change(tight, method__name="fedit"))
    check_model_settings(change(tight, method__name="fedit", plan__over_budget=True))
    check_model_settings(change(tight, method__name="cenlora"))


def test_query_and_value_are_found_by_their_names_or_asked_for(tmp_path: Path) -> None:
    for name, expected in {"llama": {"q_proj", "v_proj"}, "gpt2": {"c_attn"}, "gpt_neox": {"query_key_value"}}.items():
        tiny_model(name, dtype=torch.float32).save_pretrained(tmp_path / name)
        config = Config.from_run_config({"model.path": str(tmp_path / name), "method.name": "splitlora"})
        assert {layer.name.rpartition(".")[2] for layer in cost_model(config, 2, 8).layers} == expected
    config = Config.from_run_config({"model.path": str(tmp_path / "llama"), "method.name": "splitlora"})
    named = cost_model(change(config, lora__targets="down_proj"), 2, 8)
    assert {layer.name.rpartition(".")[2] for layer in named.layers} == {"down_proj"}


def test_texts_to_generate_need_prompts(tiny_folder: Path) -> None:
    config = Config.from_run_config({"model.path": str(tiny_folder), "evaluation.generate": True})
    text = TextData((Example("a", "b", ""),), (Example("a", "b", ""), Example("", "b", "")))
    pytest.importorskip("sacrebleu")
    pytest.importorskip("pycocoevalcap")
    with pytest.raises(DataError, match="some held-out rows have none"):
        check_text(config, text)
    check_text(config, replace(text, held_out=text.held_out[:1]))
    check_text(change(config, evaluation__generate=False), text)
