"""Wrong settings are found from files and configuration alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hsplitlora_flwr.checks import check_model_settings
from hsplitlora_flwr.config import Config
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


def test_good_settings_pass(config: Config) -> None:
    check_model_settings(config)


def test_each_mistake_has_an_error_of_its_own(config: Config, tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="split=4 is not possible"):
        check_model_settings(change(config, split__max=4))
    with pytest.raises(PlanError, match=r"lora.targets names \['query'\]"):
        check_model_settings(change(config, lora__targets="query"))
    with pytest.raises(ModelFilesError, match="no folder of that name"):
        check_model_settings(change(config, model__path=str(tmp_path / "nothing")))


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
