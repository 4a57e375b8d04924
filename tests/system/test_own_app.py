"""The Flower app of docs/embedding.md as ``hsplitlora new`` writes it and its author runs it, with another model."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

from hsplitlora_flwr.cli.new import new
from hsplitlora_flwr.cli.superlink import open_superlink, started_run


def test_the_new_app_runs(tiny_folder: Path, tmp_path: Path) -> None:
    app, results = tmp_path / "notes-app", tmp_path / "results"
    new(app)
    (app / "notes" / "site-1" / "one more.txt").write_text("What site 1 has more.")
    values = {"model.path": tiny_folder, "run.dir": results, "train.steps": 2, "train.rounds": 1}
    lines = (
        f"{key} = {json.dumps(value if isinstance(value, int) else str(value))}\n" for key, value in values.items()
    )
    (tmp_path / "run.toml").write_text("".join(lines))
    log = tmp_path / "flwr.log"
    with open_superlink("", app, tmp_path / "superlink.log") as link:
        with link.stream(app, tmp_path / "run.toml", "num-supernodes=2 client-resources-num-cpus=1", log) as process:
            process.wait(timeout=500)
        run_id = started_run(log)
        assert run_id and link.status(run_id).text == "finished:completed", log.read_text()
    summary = json.loads((results / run_id / "summary.json").read_text())
    assert [client["examples"] for client in summary["rounds"][0]["clients"]] == [4, 5]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), str(results / run_id / "adapter"))
