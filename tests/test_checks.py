"""Wrong settings are found from files and configuration alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hsplitlora_flwr.checks import check_settings
from hsplitlora_flwr.config import Config, DataConfig
from hsplitlora_flwr.data.sources import DataError
from hsplitlora_flwr.models import ModelFilesError, SplitError
from hsplitlora_flwr.planning import PlanError
from tests.tiny import tiny_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    folder = tmp_path / "model"
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder)
    return Config.from_run_config({"model.path": str(folder)})


def change(config: Config, **settings: object) -> Config:
    flat = config.to_run_config() | {key.replace("__", "."): value for key, value in settings.items()}
    return Config.from_run_config(flat)


def test_good_settings_return_the_data(config: Config) -> None:
    text = check_settings(config)
    assert len(text.held_out) == config.data.eval_rows
    assert not {(e.prompt, e.completion) for e in text.train} & {(e.prompt, e.completion) for e in text.held_out}


def test_each_mistake_has_an_error_of_its_own(config: Config, tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="split=4 is not possible"):
        check_settings(change(config, split__max=4))
    with pytest.raises(PlanError, match=r"lora.targets names \['query'\]"):
        check_settings(change(config, lora__targets="query"))
    with pytest.raises(ModelFilesError, match="no folder of that name"):
        check_settings(change(config, model__path=str(tmp_path / "nothing")))
    with pytest.raises(DataError, match="nowhere"):
        check_settings(dataclasses.replace(config, data=DataConfig(source="e2e", path=str(tmp_path / "nowhere"))))


def test_a_budget_below_the_weights_names_the_missing_bytes(config: Config) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    weights = 4 * sum(
        p.numel() for part in (model.model.embed_tokens, model.model.layers[0]) for p in part.parameters()
    )
    with pytest.raises(
        PlanError, match=r"clients.memory_gb=1e-06,2e-06: even the largest budget misses ([\d,]+) bytes"
    ) as e:
        check_settings(change(config, clients__memory_gb="1e-06,2e-06"))
    missing = int(str(e.value).split("misses ")[1].split(" ")[0].replace(",", ""))
    assert weights - 2000 <= missing <= weights + 40_000  # and what one step of two tokens takes
    check_settings(change(config, clients__memory_gb="1e-06,1"))
