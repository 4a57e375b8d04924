"""The commands after a run, on a run folder with a known update, against stock PEFT and NumPy."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import RepoUrl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hsplitlora_flwr.cli.export import export
from hsplitlora_flwr.cli.generate import generate
from hsplitlora_flwr.cli.outcome import Outcome, ends
from hsplitlora_flwr.cli.report import report
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.lora.export import save_peft_adapter
from hsplitlora_flwr.lora.layers import shape_of
from hsplitlora_flwr.lora.update import AccumulatedUpdate
from hsplitlora_flwr.reporting.report import RunReport

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
RANK = 6


def run_folder(folder: Path, model: Path, **changes: object) -> Path:
    """A finished run on ``model`` whose update has rank 6 in two layers."""
    config = Config.from_run_config(
        Config().to_run_config() | {"model.path": str(model), "run.dir": str(folder)} | changes
    )
    told = RunReport(folder, config.to_run_config())
    told.evaluated(0, 9.0, 100, 1.0)
    row = {"client": "0", "losses": [4.0, 3.0], "measured_bytes": 10**9, "predicted_bytes": 10**9, "tokens": 50}
    row |= {"bytes_up": 3_000_000, "bytes_down": 1_000_000, "trainable_parameters": 1000, "seconds": 1.0}
    told.round_finished(1, 2.0, 1.0, [row | {"tokens_per_second": 50.0}])
    told.evaluated(1, 4.5, 100, 1.0)
    base = AutoModelForCausalLM.from_pretrained(model)
    save_peft_adapter(update(base).changes(), folder / "adapter", base, str(model))
    told.finished(["adapter/adapter_model.safetensors"])
    return folder


def update(base: PreTrainedModel) -> AccumulatedUpdate:
    generator, accumulated = torch.Generator().manual_seed(0), AccumulatedUpdate()
    factors = {}
    for name in LAYERS:
        rows, columns = shape_of(base.get_submodule(name))
        b = torch.randn(rows, RANK, generator=generator)
        factors[name] = b, torch.randn(RANK, columns, generator=generator)
    accumulated.add(factors)
    return accumulated


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Path:
    (folder := tmp_path / "run").mkdir()
    return run_folder(folder, tiny_folder)


def with_peft(base: Path, adapter: Path) -> PreTrainedModel:
    model: PreTrainedModel = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    return model


def products(adapter: Path) -> dict[str, np.ndarray]:
    tensors = {key.removeprefix("base_model.model."): value.numpy() for key, value in load_file(adapter).items()}
    names = {key.rpartition(".lora_")[0] for key in tensors}
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def test_texts_are_those_of_the_adapter_in_stock_peft(
    run: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a first prompt\n", "another\n"]
    generate([str(run), *prompts, "--max-new-tokens", "12", "--beams", "1"])
    printed = capsys.readouterr().out
    tokenizer, expected = AutoTokenizer.from_pretrained(tiny_folder), ""
    for model in (with_peft(tiny_folder, run / "adapter"), AutoModelForCausalLM.from_pretrained(tiny_folder)):
        texts = []
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            written = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0)
            texts.append(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        expected = expected or "".join(f"{text}\n" for text in texts)
    assert printed == expected
    assert "".join(f"{text}\n" for text in texts) != expected  # the base alone writes something else


def test_the_merged_model_computes_what_the_adapter_does(run: Path, tiny_folder: Path) -> None:
    export([str(run), "--merged"])
    ids = torch.arange(1, 21).reshape(2, 10)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(run / "merged")(ids).logits
        wanted = with_peft(tiny_folder, run / "adapter")(ids).logits
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(run / "merged")("text").input_ids


@pytest.mark.parametrize("rank", [1, 4, 50])
def test_a_smaller_adapter_is_the_best_of_its_rank(
    rank: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export([str(run), "--rank", str(rank), "--out", str(tmp_path / "small")])
    whole, small = (products(folder / "adapter_model.safetensors") for folder in (run / "adapter", tmp_path / "small"))
    lost = total = 0.0
    for name, product in whole.items():
        u, sigma, vh = np.linalg.svd(product.astype(np.float64), full_matrices=False)
        np.testing.assert_allclose(small[name], (u[:, :rank] * sigma[:rank]) @ vh[:rank], atol=1e-4)
        lost, total = lost + (sigma[rank:] ** 2).sum(), total + (sigma**2).sum()
    said = float(capsys.readouterr().out.partition("without ")[2].partition("%")[0])
    assert said == pytest.approx(100 * lost / total, rel=1e-2, abs=1e-6)


def test_nothing_is_written_over_and_what_cannot_be_is_said(run: Path, tmp_path: Path) -> None:
    for arguments, text in (
        ([str(run), "--rank", "2", "--out", str(run / "adapter")], "is there already"),
        ([str(run), "--rank", "0"], "--rank=0 must be at least 1"),
        ([str(tmp_path), "--merged"], "no folder of a run"),
    ):
        with pytest.raises(ConfigError, match=text):
            export(arguments)
    assert load_file(run / "adapter" / "adapter_model.safetensors")
    summary = json.loads((run / "summary.json").read_text())
    summary["config"]["model.quantise"] = "8bit"
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match="8bit"):
        export([str(run), "--merged"])
    (run / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the summary of a run"):
        Outcome.read(str(run))
    (run / "summary.json").write_text('{"status"')
    with pytest.raises(ConfigError, match="damaged"):
        Outcome.read(str(run))


def test_an_adapter_of_another_model_is_refused(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_folder).config
    config.num_hidden_layers = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "shorter")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "shorter")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj"):
        export([str(run), "--rank", "2", "--model", str(tmp_path / "shorter")])


def test_a_run_that_is_not_finished_has_nothing_to_write_with(tmp_path: Path) -> None:
    RunReport(tmp_path, Config().to_run_config())
    with pytest.raises(ConfigError, match="running, not finished"):
        Outcome.read(str(tmp_path)).load()


def test_the_page_of_a_run_is_made_anew_and_runs_stand_side_by_side(
    run: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (other := tmp_path / "other").mkdir()
    run_folder(other, tiny_folder, **{"train.lr": 0.25})
    (run / "report.html").unlink()
    report([str(run), str(other)])
    assert "4.5" in (run / "report.html").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [str(run / "report.html"), str(other / "report.html")]
    table = {
        cells[1].strip(): [cell.strip() for cell in cells[2:4]] for line in lines if len(cells := line.split("│")) > 3
    }
    assert table["train.lr"] == ["0.002", "0.25"]
    assert table["perplexity after"] == ["4.500", "4.500"] and table["sent by all, MB"] == ["4.0", "4.0"]
    assert "train.rounds" not in table and "run.dir" not in table


def test_a_run_of_an_earlier_release_is_read_by_the_names_of_now(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["config"]["train.recompute"] = "on"
    del summary["config"]["train.activation_checkpointing"]
    summary["plans"] = [{"round": 1, "clients": [{"client": "0", "split": 2, "recompute": "client"}]}]
    (run / "summary.json").write_text(json.dumps(summary))
    outcome = Outcome.read(str(run))
    assert outcome.config.train.activation_checkpointing == "on"
    assert outcome.summary["plans"][0]["clients"] == [{"client": "0", "split": 2, "checkpointing": "client"}]


def test_a_mistake_ends_with_status_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        ends(lambda: report([str(tmp_path)]))
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is no folder of a run: no summary.json can be read there\n"


def test_a_smaller_adapter_says_what_it_costs_and_has_a_card(
    run: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run / "held_out.txt"
    rows.write_text("one text\nand another\n")
    summary = json.loads((run / "summary.json").read_text())
    summary["config"] |= {"data.source": "own", "data.eval_path": str(rows)}
    (run / "summary.json").write_text(json.dumps(summary))
    export([str(run), "--rank", "2"])
    folder = run / "adapter-rank-2"
    model, tokenizer = with_peft(tiny_folder, folder), AutoTokenizer.from_pretrained(tiny_folder)
    nats = tokens = 0.0
    for line in rows.read_text().splitlines():
        ids = torch.tensor([[*tokenizer(line)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    said = re.search(r"perplexity ([\d.]+); the exact adapter 4\.500, the base 9\.000", capsys.readouterr().out)
    assert said and float(said[1]) == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    assert f"| perplexity at rank 2 at most | {said[1]} |" in (folder / "README.md").read_text()

    summary["config"]["data.eval_path"] = str(run / "gone.txt")
    (run / "summary.json").write_text(json.dumps(summary))
    export([str(run), "--rank", "3"])
    assert "was not measured: cannot read" in capsys.readouterr().out
    assert json.loads((run / "adapter-rank-3" / "manifest.json").read_text())["rounds"][0]["perplexity"] == 4.5


def test_an_adapter_is_pushed_to_the_hub_as_it_is(
    run: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> RepoUrl:
            calls.append((name, options))
            return RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, **options: Any) -> None:
            calls.append(("", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export([str(run), "--push-to-hub", "ann/adapter"])
    export([str(run), "--rank", "2", "--push-to-hub", "ann/small", "--public"])
    assert [(name, options.get("private")) for name, options in calls if name] == [
        ("ann/adapter", True),
        ("ann/small", False),
    ]
    assert [options["folder_path"] for name, options in calls if not name] == [run / "adapter", run / "adapter-rank-2"]
    assert f"folder of this machine, {tiny_folder}" in capsys.readouterr().out

    def refuse(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(ConfigError, match=r"ann/adapter cannot be pushed \(no route to host\); log in"):
        export([str(run), "--push-to-hub", "ann/adapter"])
    with pytest.raises(ConfigError, match="say what to export"):
        export([str(run)])
