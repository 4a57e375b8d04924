"""The card of an adapter: what the hub reads of it, and what it must not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.reporting.card import write_card


def summary(**settings: Any) -> dict[str, Any]:
    return {
        "config": Config().to_run_config() | settings,
        "versions": {"python": "3.12.0", "torch": "2.9"},
        "perplexity_before": 18.02,
        "perplexity_after": 8.27,
        "held_out_tokens": 2909,
        "best": {"round": 1, "perplexity": 8.0},
        "rounds": [{"clients": [{"client": "0"}, {"client": "1"}]}, {"clients": [{"client": "0"}]}],
        "text": {
            "training": {"rows": 1056, "tokens": 25876, "cut_rows": 16, "cut_tokens": 900},
            "held_out": {"rows": 120, "tokens": 2909, "cut_rows": 1, "cut_tokens": 2, "prompts": "line"},
        },
    }


def written(folder: Path, content: dict[str, Any], **facts: str) -> ModelCard:
    write_card(content, folder, facts)
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_base_tags_and_perplexity(tmp_path: Path) -> None:
    card = written(tmp_path, summary(), **{"perplexity at rank 4 at most": "8.300"})
    data = card.data.to_dict()
    assert (data["base_model"], data["library_name"], data["pipeline_tag"]) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "peft",
        "text-generation",
    )
    assert {"lora", "federated-learning", "hsplitlora"} <= set(data["tags"])
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == (
        "perplexity",
        8.27,
        "dialogues, held-out rows",
    )
    for said in (
        "read from a 4-bit file",
        "2 rounds of 10 steps of 8 rows, by 2 clients",
        "English dialogues of the package chatterbot-corpus: 1,056 rows, 25,876 tokens, prompts, each on lines",
        "Rows were dealt to clients in whole groups.",
        "| perplexity of the base | 18.020 |",
        "| perplexity of the best round | 8.000, after round 1 |",
        "| perplexity at rank 4 at most | 8.300 |",
        "AutoPeftModelForCausalLM.from_pretrained(adapter)",
        "torch 2.9",
    ):
        assert said in card.content, said


def test_paths_of_ones_own_data_and_model_stay_out_of_a_card(tmp_path: Path) -> None:
    (tmp_path / "secret-model").mkdir()
    settings = {"model.path": str(tmp_path / "secret-model"), "data.source": "own", "data.path": "/srv/ward-7.jsonl"}
    card = written(tmp_path, summary(**settings))
    assert "base_model" not in card.data.to_dict() and "datasets" not in card.data.to_dict()
    assert "Data of one's own: 1,056 rows" in card.content
    assert "ward-7" not in card.content and str(tmp_path) not in card.content


def test_names_of_the_hub_stand_in_the_metadata(tmp_path: Path) -> None:
    card = written(tmp_path, summary(**{"model.path": "ann/model", "data.source": "own", "data.path": "ann/chats"}))
    assert (card.data.base_model, card.data.datasets) == ("ann/model", ["ann/chats"])
    assert "[ann/model](https://huggingface.co/ann/model)" in card.content


@pytest.mark.parametrize("missing", ["text", "best", "perplexity_after"])
def test_a_card_says_what_there_is(missing: str, tmp_path: Path) -> None:
    content = summary()
    content[missing] = {} if missing != "perplexity_after" else None
    card = written(tmp_path, content)
    assert bool(card.data.eval_results) == (missing != "perplexity_after")


def test_a_merged_model_is_loaded_without_peft(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    card = written(tmp_path, summary())
    assert card.data.library_name == "transformers" and "peft" not in card.content.partition("## How to load")[2]
